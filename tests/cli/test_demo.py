"""``pysmc demo``: real files over SMC-R, and what it says when that cannot be."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pysmc.cli.demo import environment

pytestmark = pytest.mark.slow

KEYS = {
    "mode", "fabric", "version", "files", "bytes", "seconds", "tcp_seconds",
    "sha256_equal", "connections", "reasons",
}  # fmt: skip
SIZES = (0, 1, 1000, 65_536, 65_537, 3_000_000)


@pytest.fixture
def files(tmp_path: Path):
    folder = tmp_path / "files"
    (folder / "below").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        name = "below/with blank é%.bin" if number % 2 else "plain"
        (folder / f"{name}{number}").write_bytes(random.Random(size).randbytes(size))
    (folder / "link").symlink_to("plain0")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "left_out.pyc").write_bytes(b"x")
    return folder


def test_json_has_the_promised_keys(pysmc, files):
    done = pysmc("demo", "--path", files, "--connections", 3, "--json", "--require")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert set(report) == KEYS
    assert report["mode"] == "smcr"
    assert (report["fabric"], report["version"]) == ("shm", "2.1")
    assert (report["files"], report["bytes"]) == (len(SIZES), sum(SIZES))
    assert report["sha256_equal"] is True
    assert 1 <= report["connections"] <= 3
    assert report["reasons"] == {}
    assert report["seconds"] > 0
    assert report["tcp_seconds"] > 0


@pytest.mark.parametrize("hosts", ["127.0.0.1,127.0.0.2", "::1"])
def test_the_addresses_and_the_fabric_are_the_users(pysmc, files, hosts):
    options = ("--path", files / "plain0", "--json", "--require", "--fabric", "shm")
    done = pysmc("demo", *options, "--hosts", hosts)
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert (report["mode"], report["fabric"]) == ("smcr", "shm")
    assert report["sha256_equal"] is True


def settings(made: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in made.items() if name.startswith("PYSMC_")}


def test_over_verbs_both_ends_know_of_each_other(monkeypatch):
    for name in settings(dict(os.environ)):
        monkeypatch.delenv(name)
    assert settings(environment(None, ["10.0.0.1"])) == {}
    assert settings(environment("shm", ["10.0.0.1"])) == {"PYSMC_FABRICS": "shm"}
    assert settings(environment("verbs", ["10.0.0.1", "fd00::2"])) == {
        "PYSMC_FABRICS": "verbs",
        "PYSMC_DISCOVERY": "static",
        "PYSMC_PEERS": "10.0.0.1,[fd00::2]",
        "PYSMC_UEIDS": "PYSMC.DEMO",
    }
    monkeypatch.setenv("PYSMC_DISCOVERY", "local")
    monkeypatch.setenv("PYSMC_UEIDS", "MINE")
    assert settings(environment("verbs", ["10.0.0.1"])) == {
        "PYSMC_FABRICS": "verbs",
        "PYSMC_DISCOVERY": "local",
        "PYSMC_UEIDS": "MINE",
    }


def test_in_words(pysmc, files):
    done = pysmc("demo", "--path", files / "plain0")
    assert done.code == 0
    rows = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert rows["connections"].rstrip() == "1, SMC-R version 2.1 over shm"
    assert rows["SHA-256"].rstrip() == "all equal"
    assert rows["EID"].startswith("PYSMC-SHM-")
    assert "TCP" in rows
    assert "SMC-R" in rows
    assert "Traceback" not in done.err


def test_over_tcp_it_says_why(pysmc, files):
    env = {"PYSMC_DISCOVERY": ""}
    done = pysmc("demo", "--path", files, "--connections", 1, "--json", env=env)
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert (report["mode"], report["fabric"], report["version"]) == ("tcp", None, None)
    assert report["sha256_equal"] is True
    assert report["reasons"] == {"DISABLED": 1}


def test_over_tcp_it_says_why_in_words(pysmc, files):
    done = pysmc("demo", "--path", files / "plain0", env={"PYSMC_FABRICS": ""})
    assert done.code == 0
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert lines[0].split() == ["connections", "1,", "tcp"]
    assert lines[1].startswith("plain TCP")
    assert "1 connections: DISABLED. No fabric or no discovery" in lines[1]


def test_a_bad_setting_is_named_once(pysmc, files):
    done = pysmc("demo", "--path", files, "--json", env={"PYSMC_RMBE_BYTES": "3"})
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "pysmc demo: rmbe_bytes is 3; allowed is a power of two from 16384"
        " to 536870912\n"
    )


def test_a_server_that_does_not_start_is_told(pysmc, files):
    """The client is there by then, and waits for its job."""
    done = pysmc("demo", "--path", files, "--json", "--hosts", "192.0.2.1")
    assert (done.code, done.out) == (1, "")
    last = done.err.splitlines()[-1]
    assert last == "pysmc demo: the server did not start, exit code 1"
    assert "demo_client" not in done.err


def test_where_smc_is_required_it_says_what_is_missing(pysmc, files):
    env = {"PYSMC_DISCOVERY": ""}
    done = pysmc("demo", "--path", files, "--require", "--json", env=env)
    assert (done.code, done.out) == (1, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("pysmc demo: no connection to the server: SMC-R is required")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--connections", "0"), 2, "--connections wants a number from 1 to 250"),
        (("--connections", "251"), 2, "--connections wants a number from 1 to 250"),
        (("--connections", "x"), 2, "invalid int value: 'x'"),
        (("--hosts", "localhost"), 2, "--hosts wants one or two IP addresses"),
        (("--hosts", "::1,::1,::1"), 2, "--hosts wants one or two IP addresses"),
        (("--fabric", "sim"), 2, "invalid choice: 'sim'"),
        (("--path", "missing"), 1, "there is no file or directory"),
        (("--path", "empty"), 1, "there is no readable file below"),
    ],
)
def test_mistakes_are_named(pysmc, tmp_path, arguments, code, words):
    (tmp_path / "empty").mkdir()
    done = pysmc("demo", *arguments)
    assert (done.code, done.out) == (code, "")
    assert words in done.err
    assert "Traceback" not in done.err


def test_what_is_not_installed_is_named(environment, tmp_path):
    code = (
        "import importlib.util, sys\n"
        "importlib.util.find_spec = lambda name: None\n"
        "from pysmc.cli import main\n"
        "sys.exit(main(['demo']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "pysmc demo: aiohttp and rich is missing; install it with"
        " pip install 'pysmcr[demo]'\n"
    )


def children(pid: int) -> list[int]:
    """Give the processes that a process has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def is_running(pid: int) -> bool:
    """Tell whether there is such a process, other than one that nobody waited for."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_ctrl_c_in_the_middle_leaves_nothing(environment, tmp_path):
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 30)
    with subprocess.Popen(
        [sys.executable, "-m", "pysmc", "demo", "--path", str(tmp_path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as process:
        while len(started := children(process.pid)) < 2:
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert not any(is_running(pid) for pid in started)
