"""Requests and errors of bpf(2); the fake checks every byte of the attributes."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

import pytest

from pysmc.discovery.option import bpf as module
from pysmc.discovery.option.bpf import (
    AttachType,
    Bpf,
    BpfError,
    Capability,
    Command,
    ProgramType,
    btf_of_u32,
    system_call,
)
from pysmc.discovery.option.machine import Machine

EXIT = bytes.fromhex("b7000000010000009500000000000000")


def load(bpf, name="pysmc1_try"):
    return bpf.load_program(
        name, ProgramType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS, EXIT
    )


@pytest.fixture
def program(bpf):
    number = load(bpf)
    yield number
    os.close(number)


def test_the_description_of_a_u32():
    little = "9feb01001800000000000000100000001000000005000000"
    little += "010000000000000104000000200000000075333200"
    assert btf_of_u32("little").hex() == little
    big = btf_of_u32("big")
    assert struct.unpack(">HBBIIIII", big[:24]) == (0xEB9F, 1, 0, 24, 0, 16, 16, 5)
    assert struct.unpack(">IIII", big[24:40]) == (1, 1 << 24, 4, 32)
    assert big[40:] == b"\0u32\0"


def test_a_program(bpf, program):
    info = bpf.program_info(program)
    assert (info.name, info.type) == ("pysmc1_try", ProgramType.SOCK_OPS)
    again = bpf.program_by_id(info.id)
    assert bpf.program_info(again) == info
    os.close(again)


def test_a_name_is_cut_to_what_the_kernel_keeps(bpf):
    number = load(bpf, "a_name_that_is_far_too_long")
    assert bpf.program_info(number).name == "a_name_that_is_"
    os.close(number)


def test_a_program_in_a_cgroup(fake, bpf, cgroup, program):
    place = AttachType.CGROUP_SOCK_OPS
    directory = os.open(cgroup, os.O_RDONLY)
    assert bpf.query(directory, place) == ()
    bpf.attach(directory, program, place)
    assert bpf.query(directory, place) == (bpf.program_info(program).id,)
    assert bpf.query(directory, AttachType.CGROUP_GETSOCKOPT) == ()
    bpf.detach(directory, program, place)
    with pytest.raises(BpfError, match=r"detach from .*CGROUP_SOCK_OPS.*ENOENT"):
        bpf.detach(directory, program, place)
    os.close(directory)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL])
def test_the_verifiers_log_is_read_in_a_second_try(fake, bpf, number):
    fake.fails["PROG_LOAD"] = [number, number]
    fake.log = b"\n".join(b"line %d" % n for n in range(40))
    with pytest.raises(BpfError) as caught:
        load(bpf)
    assert caught.value.errno == number
    assert caught.value.log.splitlines() == [f"line {n}" for n in range(28, 40)]


def test_a_second_try_that_succeeds(fake, bpf):
    fake.fails["PROG_LOAD"] = [errno.EACCES]
    fake.log = b"not looked at"
    os.close(load(bpf))


def test_other_errors_of_a_load_have_no_log(fake, bpf):
    fake.fails["PROG_LOAD"] = [errno.EPERM]
    with pytest.raises(BpfError) as caught:
        load(bpf)
    assert (caught.value.log, fake.calls) == ("", ["PROG_LOAD"])


def test_an_error_says_its_step_and_what_it_needs():
    error = BpfError(errno.EPERM, "attach it", Command.PROG_ATTACH)
    assert str(error) == "attach it: EPERM (Operation not permitted)"
    assert error.needs == Capability.BPF | Capability.NET_ADMIN
    assert BpfError(1, "", Command.PROG_QUERY).needs == Capability.NET_ADMIN
    assert BpfError(1, "", Command.PROG_GET_FD_BY_ID).needs == Capability.SYS_ADMIN
    assert BpfError(524, "count", Command.PROG_LOAD).symbol == "524"


# --- the system call itself -------------------------------------------------------


class Library:
    """The C library; keeps what was asked."""

    def __init__(self, result=-1):
        self.asked = None
        self.result = result

        def syscall(number, command, pointer, size):
            self.asked = (number.value, command.value, size.value)
            if self.result < 0:
                ctypes.set_errno(errno.EPERM)
            return self.result

        self.syscall = syscall


@pytest.fixture
def library(monkeypatch):
    made = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: made)
    return made


def use(monkeypatch, name):
    machine = Machine(name, 64, "little", 4096)
    monkeypatch.setattr(module, "this_machine", lambda: machine)


@pytest.mark.parametrize(("name", "number"), [("x86_64", 321), ("s390x", 351)])
def test_the_number_is_the_machines(monkeypatch, library, name, number):
    use(monkeypatch, name)
    library.result = 5
    assert system_call(16, bytearray(40)) == 5
    assert library.asked == (number, 16, 40)


def test_an_error_of_the_call(monkeypatch, library):
    use(monkeypatch, "x86_64")
    with pytest.raises(PermissionError):
        system_call(16, bytearray(40))


def test_a_machine_without_a_number(monkeypatch, library):
    use(monkeypatch, "pdp11")
    with pytest.raises(OSError, match="not implemented") as caught:
        system_call(16, bytearray(40))
    assert caught.value.errno == errno.ENOSYS
    assert library.asked is None


def test_the_kernel_of_this_machine_answers():
    """Whatever it answers to nonsense, it is an error and no crash."""
    with pytest.raises(BpfError, match="load the types"):
        Bpf().load_btf(b"nonsense")
