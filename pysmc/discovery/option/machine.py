"""What differs between machines for eBPF: byte order, pages, number of bpf(2).

Source: the kernel's table of system calls of each architecture (syscall_*.tbl,
include/uapi/asm-generic/unistd.h). Only x86_64 has been run.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pysmc.discovery.option.assembler import ByteOrder

__all__ = ["SYSTEM_CALLS", "Machine", "this_machine"]

SYSTEM_CALLS: Final[Mapping[tuple[str, int], int]] = {
    ("x86_64", 64): 321,
    ("aarch64", 64): 280,
    ("riscv64", 64): 280,
    ("loongarch64", 64): 280,
    ("s390x", 64): 351,
    ("ppc64", 64): 361,
    ("ppc64le", 64): 361,
    # A process of 32 bits, also on a kernel of 64:
    ("i386", 32): 357,
    ("i686", 32): 357,
    ("x86_64", 32): 357,
    ("armv7l", 32): 386,
    ("armv8l", 32): 386,
    ("aarch64", 32): 386,
}
"""The number of bpf(2), by the kernel's name of the machine and the process's bits."""


class Machine(NamedTuple):
    """One kind of machine."""

    name: str
    """As uname(2) says it."""
    bits: int
    """Of a pointer in this process."""
    byteorder: ByteOrder
    page_bytes: int

    @property
    def system_call(self) -> int | None:
        """The number of bpf(2); None when this table does not know the machine."""
        return SYSTEM_CALLS.get((self.name, self.bits))


def this_machine() -> Machine:
    """Describe the machine that this process runs on."""
    bits = 8 * struct.calcsize("P")
    return Machine(os.uname().machine, bits, sys.byteorder, mmap.PAGESIZE)
