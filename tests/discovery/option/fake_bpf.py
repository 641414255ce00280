"""A strict bpf(2): keeps maps, programs, cgroups and pins; refuses what is malformed.

It reads the attributes by its own layouts (include/uapi/linux/bpf.h), through the same
pointers as the kernel. Descriptors are real ones, so that a leak is seen.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import struct
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

NET_ADMIN, SYS_ADMIN, BPF = 1 << 12, 1 << 21, 1 << 39
NAMES = {
    0: "MAP_CREATE", 5: "PROG_LOAD", 6: "OBJ_PIN", 7: "OBJ_GET", 8: "PROG_ATTACH",
    9: "PROG_DETACH", 13: "PROG_GET_FD_BY_ID", 15: "OBJ_GET_INFO_BY_FD",
    16: "PROG_QUERY", 18: "BTF_LOAD",
}  # fmt: skip
ALLOW_MULTI = 2
FITTING = {3: (13, 3), 21: (25, 21), 22: (25, 22)}
"""Place of a cgroup: the program's type, and the attach type it was loaded for."""


@dataclass(eq=False)
class Object:
    """What a descriptor stands for."""

    kind: str
    id: int = 0
    name: str = ""
    type: int = 0
    place: int = 0
    code: bytes = b""

    @property
    def tag(self) -> str:
        return hashlib.sha1(self.code, usedforsecurity=False).hexdigest()[:16]


def text_at(address: int, length: int) -> bytes:
    return ctypes.string_at(address, length)


@dataclass
class FakeBpf:
    """The callable in the place of the system call."""

    capabilities: int = SYS_ADMIN
    fails: dict[str, list[int | None]] = field(default_factory=dict)
    """By command: the errno of each call in turn; None lets it through."""
    log: bytes = b""
    """What the verifier says when PROG_LOAD fails and a buffer was given."""
    calls: list[str] = field(default_factory=list)
    moves: list[tuple[str, int]] = field(default_factory=list)
    """What was attached to and detached from which place, in order."""
    _open: dict[int, Object] = field(default_factory=dict)
    _all: list[Object] = field(default_factory=list)
    _attached: dict[int, dict[int, list[Object]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    parents: dict[int, int] = field(default_factory=dict)
    """Inode of a cgroup: that of its parent."""
    _pins: dict[str, Object] = field(default_factory=dict)

    def __call__(self, command: int, attributes: bytearray) -> int:
        name = NAMES[command]
        self.calls.append(name)
        turns = self.fails.get(name)
        if turns:
            number = turns.pop(0)
            if number:
                if name == "PROG_LOAD":
                    self._write_log(attributes)
                raise OSError(number, os.strerror(number))
        self._check_right(name)
        method = getattr(self, f"_{name.lower()}")
        result = method(attributes)
        assert isinstance(result, int)
        return result

    def _check_right(self, name: str) -> None:
        needs = {"PROG_QUERY": NET_ADMIN, "PROG_GET_FD_BY_ID": SYS_ADMIN}
        wanted = needs.get(name, BPF | NET_ADMIN)
        if name not in {"OBJ_GET", "OBJ_GET_INFO_BY_FD"} and (
            not self.capabilities & SYS_ADMIN and wanted & ~self.capabilities
        ):
            raise PermissionError(errno.EPERM, "Operation not permitted")

    def _write_log(self, attributes: bytearray) -> None:
        level, size, address = struct.unpack_from("=IIQ", attributes, 24)
        if level:
            assert 0 < len(self.log) < size
            ctypes.memmove(address, self.log, len(self.log))

    # --- descriptors ---------------------------------------------------------

    def _descriptor(self, thing: Object) -> int:
        number = os.memfd_create("fake-bpf")
        self._open[number] = thing
        return number

    def _new(self, **facts: Any) -> int:
        thing = Object(id=len(self._all) + 1, **facts)
        self._all.append(thing)
        return self._descriptor(thing)

    def _object(self, number: int, kind: str) -> Object:
        os.fstat(number)
        thing = self._open[number]
        assert thing.kind == kind
        return thing

    def leaked(self) -> list[Object]:
        """Tell what is still open."""
        return [
            thing
            for number, thing in self._open.items()
            if os.path.exists(f"/proc/self/fd/{number}")
            and "fake-bpf" in os.readlink(f"/proc/self/fd/{number}")
        ]

    # --- commands ------------------------------------------------------------

    def _btf_load(self, attributes: bytearray) -> int:
        address, log, size, log_size = struct.unpack("=QQII", attributes)
        assert (log, log_size) == (0, 0)
        data = text_at(address, size)
        magic, version, flags, header = struct.unpack_from("=HBBI", data)
        assert (magic, version, flags, header) == (0xEB9F, 1, 0, 24)
        at, types, strings_at, strings = struct.unpack_from("=4I", data, 8)
        assert (at, strings_at) == (0, types)
        assert header + types + strings == size
        name, info, length, bits = struct.unpack_from("=4I", data, header)
        assert (info >> 24, length, bits) == (1, 4, 32)
        names = data[header + types :]
        assert names[0] == names[-1] == 0
        assert names[name:].split(b"\0")[0] == b"u32"
        return self._new(kind="btf")

    def _map_create(self, attributes: bytearray) -> int:
        assert len(attributes) == 64
        kind, key, value, most, flags, inner, numa = struct.unpack_from(
            "=7I", attributes
        )
        device, btf, key_type, value_type, _ = struct.unpack_from("=5I", attributes, 44)
        assert (inner, numa, device) == (0, 0, 0)
        if kind == 24:  # SK_STORAGE
            assert (key, value, most, flags) == (4, 4, 0, 1 | 1 << 9)
            self._object(btf, "btf")
            assert (key_type, value_type) == (1, 1)
        else:
            assert (kind, value, flags, btf) == (9, 8, 0, 0)
            assert most > 0
            assert key == 56
        return self._new(kind="map", name=self._name(attributes, 28), type=kind)

    def _name(self, attributes: bytearray, at: int) -> str:
        raw = bytes(attributes[at : at + 16])
        name, _, rest = raw.partition(b"\0")
        assert len(name) <= 15
        assert not any(rest)
        assert name.replace(b"_", b"").isalnum()
        return name.decode()

    def _prog_load(self, attributes: bytearray) -> int:
        assert len(attributes) == 72
        kind, count, code, license_ = struct.unpack_from("=IIQQ", attributes)
        version, flags = struct.unpack_from("=II", attributes, 40)
        device, place = struct.unpack_from("=II", attributes, 64)
        assert (version, flags, device) == (0, 0, 0)
        assert FITTING[place] == (kind, place)
        assert ctypes.string_at(license_) == b"MIT"
        instructions = bytearray(text_at(code, count * 8))
        for at in range(0, len(instructions), 8):
            if instructions[at] == 0x18 and instructions[at + 1] >> 4 == 1:
                (number,) = struct.unpack_from("=I", instructions, at + 4)
                self._object(number, "map")
                instructions[at + 4 : at + 8] = bytes(4)
        return self._new(
            kind="program", name=self._name(attributes, 48), type=kind, place=place,
            code=bytes(instructions),
        )  # fmt: skip

    def _prog_attach(self, attributes: bytearray) -> int:
        directory, number, place, flags = struct.unpack("=4I", attributes)
        assert flags == ALLOW_MULTI
        program = self._object(number, "program")
        assert FITTING[place] == (program.type, program.place)
        there = self._attached[os.fstat(directory).st_ino][place]
        assert program not in there
        self.moves.append(("attach", place))
        there.append(program)
        return 0

    def _prog_detach(self, attributes: bytearray) -> int:
        directory, number, place, flags = struct.unpack("=4I", attributes)
        assert flags == 0
        there = self._attached[os.fstat(directory).st_ino][place]
        program = self._object(number, "program")
        if program not in there:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        self.moves.append(("detach", place))
        there.remove(program)
        return 0

    def _prog_query(self, attributes: bytearray) -> int:
        directory, place, flags, _, ids, room = struct.unpack_from(
            "=IIIIQI", attributes
        )
        assert flags in (0, 1)
        inode: int | None = os.fstat(directory).st_ino
        found: list[Object] = []
        while inode is not None:
            found += self._attached[inode][place]
            inode = self.parents.get(inode) if flags else None
        assert len(found) <= room
        data = struct.pack(f"={len(found)}I", *(one.id for one in found))
        ctypes.memmove(ids, data, len(data))
        struct.pack_into("=I", attributes, 24, len(found))
        return 0

    def _prog_get_fd_by_id(self, attributes: bytearray) -> int:
        number, following, flags = struct.unpack("=3I", attributes)
        assert (following, flags) == (0, 0)
        return self._descriptor(self._all[number - 1])

    def _obj_get_info_by_fd(self, attributes: bytearray) -> int:
        number, size, address = struct.unpack("=IIQ", attributes)
        program = self._object(number, "program")
        data = struct.pack(
            "=II8s", program.type, program.id, bytes.fromhex(program.tag)
        )
        data = data.ljust(64, b"\0") + program.name.encode().ljust(16, b"\0")
        ctypes.memmove(address, data, min(size, len(data)))
        return 0

    def _obj_pin(self, attributes: bytearray) -> int:
        address, number, flags = struct.unpack("=QII", attributes)
        assert flags == 0
        path = ctypes.string_at(address).decode()
        # The file is there for `unlink`; what it stands for is here.
        with open(path, "x", encoding="ascii"):
            self._pins[path] = self._object(number, "program")
        return 0

    def _obj_get(self, attributes: bytearray) -> int:
        address, number, flags = struct.unpack("=QII", attributes)
        assert (number, flags) == (0, 0)
        path = ctypes.string_at(address).decode()
        os.stat(path)
        return self._descriptor(self._pins[path])

    # --- for tests -----------------------------------------------------------

    def attach_foreign(self, cgroup: Any, name: str, place: int = 3) -> int:
        """Attach somebody else's program; gives its id."""
        kind = FITTING[place][0]
        thing = Object("program", len(self._all) + 1, name, kind, place, b"foreign")
        self._all.append(thing)
        self._attached[os.stat(cgroup).st_ino][place].append(thing)
        return thing.id

    def names_at(self, cgroup: Any) -> list[str]:
        """Tell what is attached to a cgroup."""
        places = self._attached[os.stat(cgroup).st_ino]
        return sorted(one.name for there in places.values() for one in there)
