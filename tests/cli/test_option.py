"""``pysmc option``: what it does, prints and answers; behind it is a fake kernel."""

from __future__ import annotations

import errno
import json
from contextlib import contextmanager

import pytest

from pysmc.cli import main
from pysmc.discovery.option import bpf, install, sockets, trial
from pysmc.discovery.option.cgroup import NoCgroupError
from pysmc.discovery.option.trial import Trial
from tests.discovery.option.fake_bpf import FakeBpf

WORKS = Trial(1, works=True, reason="")
NOT_HERE = Trial(None, works=False, reason="No programs are installed for X.")


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A fake kernel, whose root of all cgroups is an empty folder."""
    fake = FakeBpf()
    monkeypatch.setattr(bpf.Bpf.__init__, "__defaults__", (fake,))
    monkeypatch.setattr(install, "mount_point", lambda: tmp_path)
    yield fake
    assert fake.leaked() == []


@pytest.fixture
def tried(monkeypatch):
    @contextmanager
    def use(found):
        with monkeypatch.context() as patch:
            patch.setattr(trial, "try_option", lambda: found)
            yield

    return use


def option(capsys, *arguments):
    """Give exit code, standard output and standard error."""
    code = main(["option", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_attach_status_detach(kernel, tried, capsys, tmp_path):
    assert option(capsys, "attach") == (0, f"attached to {tmp_path}\n", "")
    again = f"were attached already to {tmp_path}\n"
    assert option(capsys, "attach") == (0, again, "")
    with tried(WORKS):
        code, out, err = option(capsys, "status")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "works for this process (version 1)"
    assert f"attached to {tmp_path}: sock_ops (id " in out
    assert option(capsys, "detach") == (0, "removed 3 programs\n", "")
    with tried(NOT_HERE):
        code, out, _ = option(capsys, "status")
    assert code == 1
    assert out.splitlines() == [
        "does not work for this process: No programs are installed for X.",
        "attached to no cgroup",
    ]


def test_status_as_json(kernel, tried, capsys, tmp_path):
    below = tmp_path / "service"
    below.mkdir()
    option(capsys, "attach", "--cgroup", below)
    with tried(NOT_HERE):
        code, out, err = option(capsys, "status", "--json")
    assert (code, err) == (1, "")
    report = json.loads(out)
    programs = report.pop("programs")
    assert report == {
        "installed": True,
        "abi": None,
        "cgroups": [str(below)],
        "here": False,
        "reason": "No programs are installed for X.",
        "unseen": None,
    }
    assert [set(row) for row in programs] == [
        {"cgroup", "program", "id", "abi", "tag"}
    ] * 3
    with tried(WORKS):
        code, out, _ = option(capsys, "status", "--json")
    assert code == 0
    assert json.loads(out)["reason"] is None


def test_an_ordinary_user_sees_what_works_here(kernel, tried, capsys):
    kernel.fails["PROG_QUERY"] = [errno.EPERM]
    with tried(WORKS):
        code, out, _ = option(capsys, "status")
    assert code == 0
    assert "Other cgroups cannot be seen" in out.splitlines()[1]


def test_no_cgroups_at_all(kernel, tried, capsys, monkeypatch):
    def nowhere():
        raise NoCgroupError("no cgroup2 file system is mounted")

    monkeypatch.setattr(install, "mount_point", nowhere)
    with tried(NOT_HERE):
        code, out, _ = option(capsys, "status", "--json")
    assert code == 1
    assert "no cgroup2 file system" in json.loads(out)["unseen"]
    code, out, err = option(capsys, "attach")
    assert (code, out) == (1, "")
    assert err == "pysmc option attach: no cgroup2 file system is mounted\n"


def test_a_failing_step_is_named(kernel, capsys):
    kernel.fails["PROG_LOAD"] = [None, errno.EACCES, errno.EACCES]
    kernel.log = b"R1 type=inv expected=ctx\n"
    code, out, err = option(capsys, "attach")
    assert (code, out) == (1, "")
    step = "load the program pysmc1_getopt: EACCES (Permission denied)"
    assert err.startswith(f"pysmc option attach: {step}\n")
    assert "R1 type=inv expected=ctx" in err


def test_a_directory_that_is_not_there(kernel, capsys, tmp_path):
    code, _, err = option(capsys, "attach", "--cgroup", tmp_path / "nowhere")
    assert code == 1
    assert "No such file or directory" in err


def test_programs_of_others_are_warned_of(kernel, capsys, tmp_path):
    kernel.attach_foreign(tmp_path, "tuner")
    code, out, err = option(capsys, "attach")
    assert (code, out) == (0, f"attached to {tmp_path}\n")
    assert err.startswith("warning: sock_ops program tuner (id 1) runs for the same")


def test_an_incomplete_set_up_is_replaced(kernel, capsys, tmp_path):
    kernel.attach_foreign(tmp_path, "pysmc1_sock_ops")
    code, out, _ = option(capsys, "attach")
    assert code == 0
    assert out.splitlines()[1] == "1 programs of an earlier set-up were replaced"


def test_pins(kernel, capsys, tmp_path):
    folder = tmp_path / "pins"
    assert option(capsys, "attach", "--pin", folder) == (0, f"pinned in {folder}\n", "")
    again = f"were pinned already in {folder}\n"
    assert option(capsys, "attach", "--pin", folder) == (0, again, "")
    assert option(capsys, "detach", "--pin", folder) == (0, "removed 3 pins\n", "")


def test_the_listing(capsys):
    code, out, _ = option(capsys, "listing")
    assert code == 0
    assert "sock_ops, 451 instructions" in out
    assert "; A SYN cookie: nothing of this SYN will be known later." in out


def test_whoever_read_it_has_gone(kernel, monkeypatch):
    def gone(*arguments, **options):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    monkeypatch.setattr("sys.stderr", open("/dev/null", "w", encoding="ascii"))  # noqa: SIM115  - main closes it
    assert main(["option", "listing"]) == 141


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["attach", "--cgroup", "x", "--pin", "y"]]
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["option", *arguments])
    assert caught.value.code == 2
    assert "usage: pysmc option" in capsys.readouterr().err


def test_the_real_status(capsys):
    """Whatever this machine has: the exit code is what a socket says."""
    code, out, _ = option(capsys, "status", "--json")
    report = json.loads(out)
    assert report["here"] is (code == 0)
    assert report["abi"] == sockets.installed_abi()
