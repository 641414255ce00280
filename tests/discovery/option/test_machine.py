"""The table of system calls, and this machine in it."""

from __future__ import annotations

import os
import sys

import pytest

from pysmc.discovery.option.machine import SYSTEM_CALLS, Machine, this_machine


@pytest.mark.parametrize(
    ("name", "bits", "number"),
    [
        ("x86_64", 64, 321),
        ("aarch64", 64, 280),
        ("riscv64", 64, 280),
        ("loongarch64", 64, 280),
        ("s390x", 64, 351),
        ("ppc64le", 64, 361),
        ("ppc64", 64, 361),
        ("i686", 32, 357),
        ("i386", 32, 357),
        ("armv7l", 32, 386),
        ("armv8l", 32, 386),
        # A process of 32 bits on a kernel of 64 has the numbers of the small machine.
        ("x86_64", 32, 357),
        ("aarch64", 32, 386),
    ],
)
def test_the_table(name, bits, number):
    assert Machine(name, bits, "little", 4096).system_call == number


def test_every_row_is_tested():
    assert len(SYSTEM_CALLS) == 13


def test_an_unknown_machine():
    assert Machine("pdp11", 64, "big", 4096).system_call is None


def test_this_machine():
    here = this_machine()
    assert here.name == os.uname().machine
    assert here.byteorder == sys.byteorder
    assert here.bits == (64 if sys.maxsize > 1 << 32 else 32)
    assert here.page_bytes == os.sysconf("SC_PAGESIZE")
