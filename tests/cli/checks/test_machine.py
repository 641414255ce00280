"""What the checks see of a machine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from pysmc.cli.checks.machine import TEXT_BYTES, Machine, size
from pysmc.config import Config


def test_by_default_it_is_this_machine():
    here = Machine()
    assert here.system == os.uname().sysname
    assert here.release == os.uname().release
    assert here.euid == os.geteuid()
    assert here.limit(resource.RLIMIT_NOFILE) == resource.getrlimit(
        resource.RLIMIT_NOFILE
    )
    stat = here.text("/proc/self/stat")
    assert stat is not None
    assert stat.startswith(f"{os.getpid()} ")
    assert here.environ is os.environ


def test_files(machine):
    here = machine({"/proc/a": " text\n", "/proc/b": "12\n", "/proc/c": "max"})
    assert here.text("/proc/a") == "text"
    assert here.text("/proc/none") is None
    assert here.text("/proc") is None
    assert [here.number(f"/proc/{n}") for n in "abc"] == [None, 12, None]
    assert here.number("/proc/none") is None
    assert here.names("/proc") == ["a", "b", "c"]
    assert here.names("/none") == []


def test_a_long_file_is_read_in_part(machine):
    assert len(machine({"/long": "x" * 3 * TEXT_BYTES}).text("/long")) == TEXT_BYTES


def test_what_is_no_utf8_is_read_all_the_same(machine, tmp_path):
    (tmp_path / "odd").write_bytes(b"a\xffb")
    assert machine().text("/odd") == "a\ufffdb"


def test_a_line_of_a_long_file(machine):
    here = machine({"/long": "x\n" * TEXT_BYTES + "the line\n"})
    assert here.has_line("/long", "e lin")
    assert not here.has_line("/long", "y")
    assert not here.has_line("/none", "x")


def test_pyverbs_is_looked_for_here():
    assert Machine().find_pyverbs().interpreter.startswith("cpython-3")


@pytest.mark.slow
def test_a_port_that_is_not_there():
    found = Machine().exchange(["none0:1:0", "none1:1:7"], 1.0)
    assert found == [f"there is no RDMA port {n}" for n in ("none0:1:0", "none1:1:7")]


def runs(monkeypatch, *words, start_seconds=20.0):
    """Have the exchange run Python with these words instead."""
    real = subprocess.run

    def run(command, **options):
        assert command[1:] == ["-m", "pysmc.cli.checks.exchange", "0.0", "a", "b"]
        return real([sys.executable, "-S", "-c", *words], **options)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("pysmc.cli.checks.machine.START_SECONDS", start_seconds)


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("print(); print()", ["", ""]),
        ("print(); print('why')", ["", "why"]),
        ("print('said'); raise OSError('why')", ["said", "OSError: why"]),
        ("raise OSError('why')", ["OSError: why", "OSError: why"]),
        ("import sys; sys.exit(3)", ["it ended with code 3"] * 2),
        ("import os; os.kill(os.getpid(), 11)", ["it ended with code -11"] * 2),
    ],
)
def test_how_an_exchange_ends(program, found, monkeypatch):
    runs(monkeypatch, program)
    assert Machine().exchange(["a", "b"], 0.0) == found


def test_an_exchange_that_does_not_end(monkeypatch):
    runs(monkeypatch, "import signal; signal.pause()", start_seconds=0.05)
    assert Machine().exchange(["a", "b"], 0.0) == ["no end within 0.05 s"] * 2


def test_a_python_that_may_not_be_started(monkeypatch):
    monkeypatch.setattr("sys.executable", "/none/python")
    with pytest.raises(FileNotFoundError, match="/none/python"):
        Machine().exchange(["a"], 0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Name:\tx\nCapEff:\t0000000000004000\n", True),
        ("CapEff:\t0000000000003fff\n", False),
        ("CapPrm:\t0000000000004000\n", False),
        ("", False),
    ],
)
def test_capabilities(text, expected, machine):
    here = machine({"/proc/self/status": text})
    assert here.has_capability(14) is expected


def test_a_device_that_can_be_opened_and_one_that_cannot(tmp_path):
    here = Machine()
    there = tmp_path / "device"
    there.touch()
    assert here.open_error(there) == ""
    assert here.open_error(tmp_path / "none") == "No such file or directory"


def test_the_configuration_is_the_environments(machine):
    here = machine(environ={"PYSMC_FABRICS": "verbs"})
    assert here.config.fabrics == ("verbs",)
    assert machine(environ={"PYSMC_FABRICS": "x"}).config == Config()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (16 * 1024, "16 KiB"),
        (3 << 19, "1.5 MiB"),
        (1 << 30, "1 GiB"),
        (5 << 40, "5120 GiB"),
    ],
)
def test_sizes_in_words(count, text):
    assert size(count) == text
