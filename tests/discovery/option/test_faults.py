"""Every failure of the set-up in words: step, cause, remedy, kernel, capabilities."""

from __future__ import annotations

import errno
import os

import pytest

from pysmc.discovery.option.bpf import BpfError, Command
from pysmc.discovery.option.faults import Process, explain, this_process

ALL = 0x1FFFFFFFFFF
TWO = 1 << 39 | 1 << 12
ROOT = Process("6.1.0", ALL, in_user_namespace=False)
INSIDE = Process("6.1.0", ALL, in_user_namespace=True)


def failed(number, command=Command.PROG_LOAD, process=ROOT, log=""):
    error = BpfError(number, "do it", command)
    error.log = log
    return explain(error, process)


@pytest.mark.parametrize(
    ("number", "command", "process", "cause", "remedy"),
    [
        (errno.ENOSYS, Command.BTF_LOAD, ROOT, "no bpf", "CONFIG_BPF_SYSCALL"),
        (errno.EPERM, Command.PROG_LOAD, INSIDE, "user namespace", "on the host"),
        (errno.EPERM, Command.PROG_LOAD, ROOT, "seccomp", "on the host"),
        (errno.EPERM, Command.PROG_ATTACH, ROOT, "no other beside it", "multi"),
        (errno.EPERM, Command.OBJ_PIN, ROOT, "BPF file system", "mount -t bpf"),
        (errno.EINVAL, Command.MAP_CREATE, ROOT, "does not know", "newer kernel"),
        (errno.EBADF, Command.PROG_QUERY, ROOT, "not a cgroup", "findmnt"),
        (errno.E2BIG, Command.PROG_ATTACH, ROOT, "64 programs", "Detach"),
        (errno.ENOMEM, Command.MAP_CREATE, ROOT, "no memory", "Free some"),
        (errno.EEXIST, Command.OBJ_PIN, ROOT, "there already", "Try again"),
        (errno.EIO, Command.OBJ_PIN, ROOT, "did not do it", "bpf(2)"),
    ],
)
def test_causes(number, command, process, cause, remedy):
    trouble = failed(number, command, process)
    assert cause in trouble.cause
    assert remedy in trouble.remedy
    assert errno.errorcode[number] in trouble.step
    for sentence in (trouble.cause, trouble.remedy):
        assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("capabilities", "command", "missing"),
    [
        (0, Command.PROG_LOAD, "CAP_BPF and CAP_NET_ADMIN"),
        (1 << 12, Command.BTF_LOAD, "CAP_BPF"),
        (1 << 39, Command.PROG_LOAD, "CAP_NET_ADMIN"),
        (1 << 39, Command.PROG_QUERY, "CAP_NET_ADMIN"),
        (TWO, Command.PROG_GET_FD_BY_ID, "CAP_SYS_ADMIN"),
    ],
)
def test_what_is_missing_is_named(capabilities, command, missing):
    process = Process("6.1.0", capabilities, in_user_namespace=False)
    trouble = failed(errno.EPERM, command, process)
    assert trouble.cause == f"This process lacks {missing}."
    assert trouble.facts.endswith(f"CapEff {capabilities:016x} (without {missing})")


def test_sys_admin_stands_for_the_other_two():
    process = Process("6.1.0", 1 << 21, in_user_namespace=False)
    trouble = failed(errno.EPERM, process=process)
    assert "seccomp" in trouble.cause
    assert "without" not in trouble.facts


def test_the_verifiers_log_is_shown():
    trouble = failed(errno.EACCES, log="R1 invalid\nprocessed 3 insns")
    assert "verifier refused" in trouble.cause
    assert str(trouble).splitlines() == [
        "do it: EACCES (Permission denied)",
        f"  cause: {trouble.cause}",
        f"  remedy: {trouble.remedy}",
        f"  Linux 6.1.0, CapEff {ALL:016x}",
        "  the verifier said:",
        "  R1 invalid",
        "  processed 3 insns",
    ]


def test_this_process(tmp_path):
    (tmp_path / "status").write_text("Name:\tx\nCapEff:\t0000008000001000\n")
    (tmp_path / "uid_map").write_text("         0          0 4294967295\n")
    release = os.uname().release
    assert this_process(tmp_path) == Process(release, TWO, in_user_namespace=False)
    (tmp_path / "uid_map").write_text("0 1000 1\n")
    assert this_process(tmp_path).in_user_namespace
    nowhere = this_process(tmp_path / "nowhere")
    assert nowhere == Process(release, 0, in_user_namespace=False)
