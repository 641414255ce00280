"""bpf(2): maps, programs, and their place in a cgroup.

Decides the bytes of each request, and what an error of the kernel means in words. Does
not know what the programs are for. Everything goes through one callable, `Call`, which
a test replaces.

Source: bpf(2), include/uapi/linux/bpf.h (union bpf_attr), Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Mapping
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Final, NamedTuple

from pysmc.discovery.option.machine import this_machine

if TYPE_CHECKING:
    from pysmc.discovery.option.assembler import ByteOrder

__all__ = [
    "AttachType",
    "Bpf",
    "BpfError",
    "Call",
    "Capability",
    "Command",
    "MapType",
    "ProgramInfo",
    "ProgramType",
    "btf_of_u32",
    "system_call",
]

Call = Callable[[int, bytearray], int]
"""Carries out one command with its attributes; gives its result or raises OSError."""

LICENSE: Final = b"MIT\0"
LOG_BYTES: Final = 1 << 20
LOG_LINES: Final = 12
"""So many lines of the verifier's log are shown; the last ones have the cause."""
NAME_BYTES: Final = 16
PROGRAMS_MOST: Final = 64
"""The kernel's limit for one type in one cgroup (BPF_CGROUP_MAX_PROGS)."""


class Command(IntEnum):
    """The commands of bpf(2) that are used."""

    MAP_CREATE = 0
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_ATTACH = 8
    PROG_DETACH = 9
    PROG_GET_FD_BY_ID = 13
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    BTF_LOAD = 18


class MapType(IntEnum):
    """Kinds of maps."""

    LRU_HASH = 9
    SK_STORAGE = 24


class ProgramType(IntEnum):
    """Kinds of programs."""

    SOCK_OPS = 13
    CGROUP_SOCKOPT = 25


class AttachType(IntEnum):
    """Places of a cgroup."""

    CGROUP_SOCK_OPS = 3
    CGROUP_GETSOCKOPT = 21
    CGROUP_SETSOCKOPT = 22


NO_PREALLOC: Final = 1 << 0
CLONE: Final = 1 << 9
"""SK_STORAGE: a connection begins with what its listener has."""
ALLOW_MULTI: Final = 1 << 1
EFFECTIVE: Final = 1 << 0


class Capability(IntFlag):
    """Rights that a step may need, as in CapEff of /proc/self/status."""

    NET_ADMIN = 1 << 12
    SYS_ADMIN = 1 << 21
    BPF = 1 << 39


BOTH: Final = Capability.BPF | Capability.NET_ADMIN
NEEDS: Final[Mapping[Command, Capability]] = {
    Command.PROG_QUERY: Capability.NET_ADMIN,
    Command.PROG_GET_FD_BY_ID: Capability.SYS_ADMIN,
}
"""What a command needs if it is not `BOTH`."""


class BpfError(OSError):
    """A step of bpf(2) failed.

    Attributes:
        step: What was tried, in words.
        command: The command that failed.
        log: The end of the verifier's log; empty when the kernel wrote none.
    """

    def __init__(self, number: int, step: str, command: Command) -> None:
        super().__init__(number, os.strerror(number))
        self.step = step
        self.command = command
        self.log = ""

    @property
    def needs(self) -> Capability:
        """The capabilities without which the command is forbidden."""
        return NEEDS.get(self.command, BOTH)

    @property
    def symbol(self) -> str:
        """The errno's name, for example ``EPERM``."""
        number = self.errno or 0
        return errno.errorcode.get(number, str(number))

    def __str__(self) -> str:
        return f"{self.step}: {self.symbol} ({self.strerror})"


class ProgramInfo(NamedTuple):
    """What the kernel says of a program."""

    type: int
    id: int
    tag: str
    """16 digits: a hash of the instructions."""
    name: str


def system_call(command: int, attributes: bytearray) -> int:
    """Make the system call.

    Raises:
        OSError: It failed; ENOSYS also where its number is not known.
    """
    number = this_machine().system_call
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    library = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    function = library.syscall
    function.restype = ctypes.c_long
    result = function(
        ctypes.c_long(number),
        ctypes.c_long(command),
        ctypes.byref(buffer),
        ctypes.c_long(len(attributes)),
    )
    if result < 0:
        failed = ctypes.get_errno()
        raise OSError(failed, os.strerror(failed))
    return int(result)


def btf_of_u32(byteorder: ByteOrder) -> bytes:
    """Describe one type, ``u32``: a map that is kept with sockets must have types."""
    order = "<" if byteorder == "little" else ">"
    names = b"\0u32\0"
    kind_int, bits = 1, 32
    types = struct.pack(f"{order}IIII", 1, kind_int << 24, 4, bits)
    layout = f"{order}HBBIIIII"
    size = struct.calcsize(layout)
    offsets = (0, len(types), len(types), len(names))
    return struct.pack(layout, 0xEB9F, 1, 0, size, *offsets) + types + names


class Bpf:
    """The kernel's side; what it gives are descriptors, which the caller closes."""

    def __init__(self, call: Call = system_call) -> None:
        self._call = call

    def _ask(self, step: str, command: Command, attributes: bytearray) -> int:
        try:
            return self._call(command, attributes)
        except OSError as error:
            raise BpfError(error.errno or 0, step, command) from error

    def load_btf(self, data: bytes) -> int:
        """Load a description of types."""
        pointed = _Pointed(data)
        attributes = bytearray(struct.pack("=QQII", pointed.address, 0, len(data), 0))
        return self._ask("load the types (BTF)", Command.BTF_LOAD, attributes)

    def create_socket_storage(self, name: str, btf: int) -> int:
        """Create a map of 4 bytes kept with each socket, described by `btf_of_u32`."""
        flags = NO_PREALLOC | CLONE
        return self._create_map(name, MapType.SK_STORAGE, 4, 4, 0, flags, btf)

    def create_lru_hash(self, name: str, key_bytes: int, entries: int) -> int:
        """Create a map of 8-byte values that forgets what was not used longest."""
        return self._create_map(name, MapType.LRU_HASH, key_bytes, 8, entries, 0, 0)

    def _create_map(
        self, name: str, kind: MapType, key: int, value: int, entries: int, flags: int,
        btf: int,
    ) -> int:  # fmt: skip
        head = struct.pack("=7I", kind, key, value, entries, flags, 0, 0)
        types = (btf, 1, 1) if btf else (0, 0, 0)
        tail = struct.pack("=5I", 0, *types, 0)
        attributes = bytearray(head + _name(name) + tail)
        return self._ask(f"create the map {name}", Command.MAP_CREATE, attributes)

    def load_program(
        self, name: str, kind: ProgramType, attach_type: AttachType, code: bytes
    ) -> int:
        """Have the kernel check a program and take it.

        Raises:
            BpfError: It was refused; with the end of the verifier's log, if any.
        """
        instructions, license_ = _Pointed(code), _Pointed(LICENSE)

        def attributes(log: _Pointed | None) -> bytearray:
            address, size = (log.address, LOG_BYTES) if log else (0, 0)
            packed = struct.pack(
                "=IIQQIIQII", kind, len(code) // 8, instructions.address,
                license_.address, 1 if log else 0, size, address, 0, 0,
            )  # fmt: skip
            packed += _name(name) + struct.pack("=II", 0, attach_type)
            return bytearray(packed)

        step = f"load the program {name}"
        try:
            return self._ask(step, Command.PROG_LOAD, attributes(None))
        except BpfError as error:
            if error.errno not in {errno.EACCES, errno.EINVAL}:
                raise
            log = _Pointed(bytes(LOG_BYTES))
            try:
                return self._ask(step, Command.PROG_LOAD, attributes(log))
            except BpfError:
                error.log = "\n".join(log.text().splitlines()[-LOG_LINES:])
                error.add_note(error.log)
                raise error from None

    def attach(self, cgroup: int, program: int, attach_type: AttachType) -> None:
        """Attach a program to a cgroup, beside others that are there."""
        attributes = struct.pack("=4I", cgroup, program, attach_type, ALLOW_MULTI)
        step = f"attach to the cgroup ({attach_type.name})"
        self._ask(step, Command.PROG_ATTACH, bytearray(attributes))

    def detach(self, cgroup: int, program: int, attach_type: AttachType) -> None:
        """Detach a program from a cgroup."""
        attributes = struct.pack("=4I", cgroup, program, attach_type, 0)
        step = f"detach from the cgroup ({attach_type.name})"
        self._ask(step, Command.PROG_DETACH, bytearray(attributes))

    def query(
        self, cgroup: int, attach_type: AttachType, *, effective: bool = False
    ) -> tuple[int, ...]:
        """List the ids of a cgroup's programs.

        Args:
            cgroup: Its directory's descriptor.
            attach_type: Of which place.
            effective: Those of its parents too.
        """
        room = 4 * PROGRAMS_MOST * (8 if effective else 1)
        ids = _Pointed(bytes(room))
        attributes = bytearray(
            struct.pack(
                "=IIIIQIIQ", cgroup, attach_type, EFFECTIVE if effective else 0, 0,
                ids.address, room // 4, 0, 0,
            )
        )  # fmt: skip
        step = f"list the programs of the cgroup ({attach_type.name})"
        self._ask(step, Command.PROG_QUERY, attributes)
        (count,) = struct.unpack_from("=I", attributes, 24)
        return struct.unpack_from(f"={count}I", ids.bytes())

    def program_by_id(self, number: int) -> int:
        """Open a program that somebody loaded; needs CAP_SYS_ADMIN."""
        attributes = bytearray(struct.pack("=III", number, 0, 0))
        step = f"open program {number}"
        return self._ask(step, Command.PROG_GET_FD_BY_ID, attributes)

    def program_info(self, program: int) -> ProgramInfo:
        """Read id, tag and name of an open program."""
        size = 80
        info = _Pointed(bytes(size))
        attributes = bytearray(struct.pack("=IIQ", program, size, info.address))
        step = "read a program's name"
        self._ask(step, Command.OBJ_GET_INFO_BY_FD, attributes)
        data = info.bytes()
        kind, number, tag = struct.unpack_from("=II8s", data)
        name = data[64:80].split(b"\0")[0].decode("ascii", "replace")
        return ProgramInfo(kind, number, tag.hex(), name)

    def open_pin(self, path: str) -> int:
        """Open what is pinned in a BPF file system."""
        pointed = _Pointed(os.fsencode(path) + b"\0")
        attributes = bytearray(struct.pack("=QII", pointed.address, 0, 0))
        return self._ask(f"open {path}", Command.OBJ_GET, attributes)

    def pin(self, path: str, program: int) -> None:
        """Give a program a name in a BPF file system."""
        pointed = _Pointed(os.fsencode(path) + b"\0")
        attributes = bytearray(struct.pack("=QII", pointed.address, program, 0))
        self._ask(f"pin the program as {path}", Command.OBJ_PIN, attributes)


class _Pointed:
    """Bytes that the kernel reads or writes by their address."""

    def __init__(self, data: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(data, len(data))
        self.address = ctypes.addressof(self._buffer)

    def bytes(self) -> bytes:
        return self._buffer.raw

    def text(self) -> str:
        return self._buffer.value.decode("utf-8", "replace")


def _name(name: str) -> bytes:
    return name.encode("ascii")[: NAME_BYTES - 1].ljust(NAME_BYTES, b"\0")
