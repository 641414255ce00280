"""What the checks see of a machine."""

from __future__ import annotations

import os
import resource

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
