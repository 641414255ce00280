"""A cgroup whose programs speak SMC without knowing it, by the kernel's own means.

The kernel asks `update_socket_protocol` for the protocol of every new socket, and lets
a program answer in its place. Ours says IPPROTO_SMC for each TCP socket of the cgroup;
whatever else is asked for goes on as ever. So Debian's programs become SMC peers, as
their administrator could make them: nothing of them is changed.

Needs Linux 6.5 (and BTF). Where the kernel has no SMC every socket() of such a cgroup
would fail; so that is tried before anything is attached.

Source: kernel net/socket.c (update_socket_protocol), Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import subprocess
import sys
import time
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pysmc.discovery.option.assembler import Assembler, Field, Register
from pysmc.discovery.option.bpf import system_call

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["NoSmcError", "SmcCgroup", "function_id"]

IPPROTO_SMC = 256
TYPES = Path("/sys/kernel/btf/vmlinux")
FUNCTION = "update_socket_protocol"
PROG_LOAD, RAW_TRACEPOINT_OPEN = 5, 17
TRACING, MODIFY_RETURN = 26, 26
LICENSE = b"Dual MIT/GPL\0"
LOG_BYTES = 1 << 16
KILL_WAIT = 10.0
SOCK_TYPE_MASK = 0xF
FAMILY, TYPE, PROTOCOL = (
    Field(n, 8 * i, 8) for i, n in enumerate(("family", "type", "protocol"))
)
FUNC = 12
"""The kind of BTF that describes a function."""
HEADER = struct.Struct("<HBBIIIII")
ENTRY = struct.Struct("<III")
MORE_BYTES = {1: (4, 0), 3: (12, 0), 14: (4, 0), 17: (4, 0)} | {
    kind: (0, size)
    for kind, size in {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}.items()
}
"""By kind: bytes that follow an entry, and as many again for each member."""


class NoSmcError(Exception):
    """This kernel makes no sockets of IPPROTO_SMC."""


class Helper(IntEnum):
    """The functions of the kernel that the program calls."""

    GET_CURRENT_ANCESTOR_CGROUP_ID = 123


def function_id(types: bytes, name: str) -> int:
    """Find the number of a function in BTF.

    Args:
        types: All of it, in little endian.
        name: Of the function.

    Raises:
        LookupError: It is not there.
    """
    _, _, _, header, start, length, strings, _ = HEADER.unpack_from(types)
    place, number = header + start, 0
    wanted = types.find(b"\0" + name.encode() + b"\0", header + strings)
    offset = wanted + 1 - header - strings
    while wanted >= 0 and place < header + start + length:
        number += 1
        said, info, _ = ENTRY.unpack_from(types, place)
        kind, members = info >> 24 & 0x1F, info & 0xFFFF
        if kind == FUNC and said == offset:
            return number
        fixed, each = MORE_BYTES.get(kind, (0, 0))
        place += ENTRY.size + fixed + each * members
    message = f"this kernel has no function {name} for BPF"
    raise LookupError(message)


def assemble(cgroup: int, level: int) -> bytes:
    """Write the program.

    Args:
        cgroup: Its id: the number of its folder.
        level: How deep it is; the root is 0.
    """
    r0, r1, r2, r6, r7 = (Register(n) for n in (0, 1, 2, 6, 7))
    text = Assembler(sys.byteorder)
    text.move(r6, r1)
    text.rule("TCP of IPv4 or IPv6, asked for by name or as the default.")
    text.load(r7, r6, FAMILY)
    text.jump_if(r7, "==", socket.AF_INET, "type", bits=32)
    text.jump_if(r7, "!=", socket.AF_INET6, "as ever", bits=32)
    text.label("type")
    text.load(r7, r6, TYPE)
    text.bit_and(r7, SOCK_TYPE_MASK)
    text.jump_if(r7, "!=", socket.SOCK_STREAM, "as ever")
    text.load(r7, r6, PROTOCOL)
    text.jump_if(r7, "==", 0, "who", bits=32)
    text.jump_if(r7, "!=", socket.IPPROTO_TCP, "as ever", bits=32)
    text.rule("Asked by a process of the cgroup, or of one below it.")
    text.label("who")
    text.move(r1, level)
    text.call(Helper.GET_CURRENT_ANCESTOR_CGROUP_ID)
    text.load_bytes(r2, cgroup.to_bytes(8, sys.byteorder))
    text.jump_if(r0, "!=", r2, "as ever")
    text.move(r0, IPPROTO_SMC)
    text.leave()
    text.label("as ever")
    text.move(r0, 0)
    text.leave()
    return text.program().code({})


def load(code: bytes) -> int:
    """Have the kernel take the program, for the function; gives its descriptor."""
    target = function_id(TYPES.read_bytes(), FUNCTION)
    log = ctypes.create_string_buffer(LOG_BYTES)
    held = [ctypes.create_string_buffer(data, len(data)) for data in (code, LICENSE)]
    instructions, license_ = map(ctypes.addressof, held)
    head = struct.pack(
        "=IIQQIIQII", TRACING, len(code) // 8, instructions, license_,
        1, LOG_BYTES, ctypes.addressof(log), 0, 0,
    )  # fmt: skip
    name = b"lab_smc".ljust(16, b"\0")
    # Interface, place, BTF of its own: its descriptor, and thrice size and place.
    tail = struct.pack("=II I IQI IQI I", 0, MODIFY_RETURN, 0, 0, 0, 0, 0, 0, 0, target)
    try:
        return system_call(PROG_LOAD, bytearray(head + name + tail))
    except OSError as error:
        error.add_note(log.value.decode())
        raise


class SmcCgroup:
    """A cgroup whose TCP sockets are the kernel's SMC sockets, for as long as it lasts.

    Args:
        parent: The folder of the cgroup in which it is made.
    """

    def __init__(self, parent: Path) -> None:
        self.folder = parent / "smc"
        self._link = -1
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        """Make it, and let the kernel ask the program.

        Raises:
            NoSmcError: The kernel has no SMC, and would refuse every socket in it.
        """
        try:
            socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SMC).close()
        except OSError as error:
            message = f"no sockets of IPPROTO_SMC here: {error}"
            raise NoSmcError(message) from error
        self.attach()
        return self

    def attach(self) -> None:
        """Make it, whatever becomes of its sockets."""
        self.folder.mkdir()
        mount = Path("/sys/fs/cgroup")
        level = len(self.folder.relative_to(mount).parts)
        program = load(assemble(self.folder.stat().st_ino, level))
        try:
            attributes = bytearray(struct.pack("=QII", 0, program, 0))
            self._link = system_call(RAW_TRACEPOINT_OPEN, attributes)
        finally:
            os.close(program)

    def start(self, words: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start a program in it."""
        enter = f'echo $$ >{self.folder}/cgroup.procs && exec "$@"'
        process = subprocess.Popen(
            ["sh", "-c", enter, "sh", *words], text=True, **options
        )
        self._started.append(process)
        return process

    def _where(self) -> str:
        """Say where in the kernel those are that do not end."""
        words = ["a process of the cgroup does not end:"]
        for number in (self.folder / "cgroup.threads").read_text().split():
            place = Path("/proc", number)
            words += [(place / name).read_text() for name in ("comm", "stack")]
        return "\n".join(words)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End what is in it, and let the kernel ask nobody any more."""
        self.close()

    def close(self) -> None:
        """End what is in it, and let the kernel ask nobody any more."""
        if self._link >= 0:
            os.close(self._link)
            self._link = -1
        (self.folder / "cgroup.kill").write_text("1", encoding="ascii")
        end = time.monotonic() + KILL_WAIT
        events = self.folder / "cgroup.events"
        while "populated 1" in events.read_text(encoding="ascii"):
            assert time.monotonic() < end, self._where()
            select.select([], [], [], 0.01)
        for process in self._started:
            with process:  # waits, and closes pipes that nobody has read
                pass
        self.folder.rmdir()
