"""How QEMU is started, waited for, and ended."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lab import machine
from lab.errors import GuestDied
from lab.kernel import Kernel
from lab.places import new_results

TOOLS = Path(machine.__file__).resolve().parents[1]
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@pytest.fixture
def setup(tmp_path: Path) -> machine.Setup:
    results = tmp_path / "results"
    results.mkdir()
    kernel = Kernel(tmp_path / "kernel", "6.12.1")
    return machine.Setup("tcg", kernel, tmp_path / "archive", results)


def test_the_host_is_only_read_and_the_share_is_written(setup) -> None:
    words = setup.command()
    host, share = (one for one in words if one.startswith("local,"))
    assert (
        host
        == "local,path=/,mount_tag=host,readonly=on,security_model=none,multidevs=remap"
    )
    assert f"path={setup.results},mount_tag=share" in share
    assert "readonly" not in share
    assert words[words.index("-accel") + 1] == "tcg,thread=multi"
    assert words[words.index("-serial") + 1] == f"file:{setup.results}/console.log"
    assert "LAB_SHELL" not in words[words.index("-append") + 1]
    assert "-no-reboot" in words
    assert "panic=-1" in words[words.index("-append") + 1], "a panic ends QEMU"


def test_a_shell_has_the_terminal(setup) -> None:
    shell = machine.Setup("kvm", *setup_parts(setup), is_shell=True)
    words = shell.command()
    assert words[words.index("-serial") + 1] == "chardev:terminal"
    # Ctrl-C goes to the guest.
    assert words[words.index("-chardev") + 1] == "stdio,id=terminal,signal=off"
    assert words[words.index("-accel") + 1] == "kvm"
    assert "LAB_SHELL=1" in words[words.index("-append") + 1].split()


def setup_parts(setup: machine.Setup) -> tuple[Kernel, Path, Path]:
    return setup.kernel, setup.archive, setup.results


def test_a_file_of_the_guest_is_waited_for(setup, qemu) -> None:
    qemu("echo up >$share/ready; exec sleep 60")
    with machine.Machine(setup, 30) as guest:
        assert guest.wait("ready", 20).read_text() == "up\n"
        assert guest.is_running
    assert not guest.is_running


def test_a_dead_guest_is_told_with_its_last_words(setup, qemu) -> None:
    qemu("echo Kernel panic >$share/console.log; echo bad luck >&2; exit 1")
    with (
        machine.Machine(setup, 30) as guest,
        pytest.raises(GuestDied, match=r"(?s)Kernel panic.*bad luck"),
    ):
        guest.wait("ready", 20)
    qemu("exit 0")
    (setup.results / "console.log").unlink()
    with (
        machine.Machine(setup, 30) as guest,
        pytest.raises(GuestDied, match="it said nothing"),
    ):
        guest.wait("ready", 20)


def test_a_silent_guest_is_waited_for_so_long(setup, qemu) -> None:
    qemu("exec sleep 60")
    with (
        machine.Machine(setup, 30) as guest,
        pytest.raises(GuestDied, match=r"no word of the guest within 0\.2 s"),
    ):
        guest.wait("ready", 0.2)


def test_the_limit_ends_it_whatever_happens(setup, qemu) -> None:
    qemu("exec sleep 60")
    with machine.Machine(setup, 1) as guest:
        assert guest.join() != 0


def test_nothing_is_left_when_it_ends(setup, qemu) -> None:
    qemu("echo $$ >$share/ready; exec sleep 60")
    with machine.Machine(setup, 30) as guest:
        pid = int(guest.wait("ready", 20).read_text())
        descriptor = os.pidfd_open(pid)
    try:
        assert select.select([descriptor], [], [], 10)[0], "QEMU still runs"
    finally:
        os.close(descriptor)


HOLDER = """
import sys
from pathlib import Path
from lab import machine
from lab.kernel import Kernel
share = Path(sys.argv[1])
setup = machine.Setup("tcg", Kernel(share, "6.12.1"), share / "archive", share)
with machine.Machine(setup, 60) as guest:
    guest.wait("never", 50)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_guest_outlives_the_one_who_started_it(
    setup, qemu, number: signal.Signals
) -> None:
    qemu("echo $$ >$share/part; mv $share/part $share/ready; exec sleep 60")
    env = dict(os.environ, PYTHONPATH=str(TOOLS))
    command = [sys.executable, "-c", HOLDER, str(setup.results)]
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as holder:
        end = time.monotonic() + 20
        while not (setup.results / "ready").exists():
            assert time.monotonic() < end
            select.select([], [], [], 0.01)
        descriptor = os.pidfd_open(int((setup.results / "ready").read_text()))
        try:
            holder.send_signal(number)
            assert select.select([descriptor], [], [], 10)[0], "QEMU still runs"
        finally:
            os.close(descriptor)
        assert holder.wait(10) != 0


def test_one_guest_at_a_time(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entered = threading.Event()

    def second() -> None:
        with machine.only_one():
            entered.set()

    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=second)
        thread.start()
        end = time.monotonic() + 10
        while "waiting for another" not in capsys.readouterr().err:
            assert time.monotonic() < end
            select.select([], [], [], 0.01)
        assert not entered.is_set()
    assert entered.wait(10)
    thread.join()


@pytest.mark.parametrize(
    ("words", "way"), [("VFS: Unable to mount root", "kvm"), ("", "tcg")]
)
def test_kvm_is_tried_once_for_a_boot(
    setup, cache: Path, qemu, monkeypatch: pytest.MonkeyPatch, words: str, way: str
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: True)
    qemu(f"echo '{words} fs'")
    assert machine.accelerator(setup.kernel) == way
    qemu("echo 'not asked again'")
    assert machine.accelerator(setup.kernel) == way
    note = (cache / "accelerator").read_text().split()
    assert note == [BOOT_ID.read_text().strip(), way]
    (cache / "accelerator").write_text(f"another-boot {way}")
    assert machine.accelerator(setup.kernel) == "tcg"


def test_no_kvm_without_its_device(setup, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert machine.accelerator(setup.kernel) == "tcg"
    assert list(cache.iterdir()) == []


def test_old_results_make_way(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = cache / "results"
    runs.mkdir()
    for number in range(20):
        (runs / f"20260101-0000{number:02}-1").mkdir()
    fresh = new_results()
    kept = sorted(path.name for path in runs.iterdir() if not path.is_symlink())
    assert kept == [*(f"20260101-0000{n:02}-1" for n in range(9, 20)), fresh.name]
    assert (runs / "latest").resolve() == fresh
