"""The few pieces of a kernel that the option's programs meet, and a TCP handshake.

Written from the kernel's documentation of the helpers; independent of `programs`.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.discovery.option.interpreter import Machine, Refused, Region

if TYPE_CHECKING:
    from collections.abc import Callable

SOCKETS, LISTENERS = 7, 8
"""Descriptors of the two maps."""
SMC = bytes.fromhex("fe06e2d4c3d9")
WRITE_FLAG = 1 << 6
SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10
CLOSE, LISTEN = 7, 10
CONNECT_CB, ACTIVE_CB, PASSIVE_CB, LISTEN_CB, LENGTH_CB, WRITE_CB = 3, 4, 5, 11, 14, 15
KEY_BYTES = 56
LEVEL = int.from_bytes(b"SMCR", "big")


@dataclass(eq=False)
class Sock:
    """A socket as far as the programs see it."""

    port: int = 0
    address: str = "127.0.0.1"
    protocol: int = socket.IPPROTO_TCP
    state: int = CLOSE
    callback_flags: int = 0
    storage: dict[int, Region] = field(default_factory=dict)
    saves_syn: bool = False
    saved_syn: bytes | None = None
    """The options of the SYN that was kept."""

    @property
    def family(self) -> int:
        return int(socket.AF_INET6 if ":" in self.address else socket.AF_INET)

    def bits(self, kernel: Kernel, instance: int = 0) -> int | None:
        """What an instance of the programs keeps with it; None if nothing."""
        region = self.storage.get(instance)
        return (
            None if region is None else int.from_bytes(region.bytes(), kernel.byteorder)
        )


def options_of(text: bytes) -> list[bytes]:
    """Cut TCP options: NOP and END have one byte."""
    found = []
    at = 0
    while at < len(text) and text[at] != 0:
        length = 1 if text[at] == 1 else text[at + 1]
        found.append(text[at : at + length])
        at += length
    return found


@dataclass
class Kernel:
    """Runs the programs of one or more instances; ``programs[n]`` is one of them."""

    byteorder: Any
    programs: list[dict[str, bytes]]
    namespace: int = 0x1122334455667788
    now: int = 5_000_000_000_000
    """Nanoseconds."""
    listeners: list[dict[bytes, int]] = field(default_factory=list)
    calls: int = 0
    """Of sock_ops programs."""
    has_memory: bool = True
    """Whether a state can be made for a socket."""

    def __post_init__(self) -> None:
        self.listeners = [{} for _ in self.programs]

    def pack(self, layout: str, *values: Any) -> bytes:
        order = "<" if self.byteorder == "little" else ">"
        return struct.pack(order + layout, *values)

    # --- socket options ----------------------------------------------------------

    def setsockopt(
        self, sock: Sock, value: bytes, level: int = LEVEL, name: int = 1
    ) -> int | str:
        """Give 0, an errno's name, or what the kernel itself would be asked."""
        length = len(value)
        for instance in range(len(self.programs)):
            answer, length, _, _ = self._sockopt(
                "setsockopt", instance, sock, level, name, value, length, 0
            )
            if answer == 0:
                return "EPERM"
        if length == -1:
            return 0
        return f"kernel({length})"

    def getsockopt(
        self, sock: Sock, room: int = 4, level: int = LEVEL, name: int = 1
    ) -> bytes | str:
        """Give the value, an errno's name, or what the kernel's own answer was."""
        length, result, value = room, -errno.ENOPROTOOPT, bytes(room)
        for instance in range(len(self.programs)):
            answer, length, value, result = self._sockopt(
                "getsockopt", instance, sock, level, name, value, length, result
            )
            if answer == 0:
                return "EPERM"
        if result:
            return f"kernel({length}, {result})"
        return value[:length] if length <= room else "EFAULT"

    def _sockopt(
        self, which: str, instance: int, sock: Sock, level: int, name: int,
        value: bytes, length: int, result: int,
    ) -> tuple[int, int, bytes, int]:  # fmt: skip
        machine = self._machine(instance, None, sock)
        # However short the caller's buffer is, the program's has 16 bytes at least.
        shown = Region.of("value", value[:4096].ljust(16, b"\0"))
        start = machine.address(shown)
        context = Region.of(
            "sockopt",
            self.pack("QQQ", machine.address(self._as_seen(sock)), start,
                      start + len(shown.data))
            + self.pack("Iiii", level & 0xFFFFFFFF, name, length, result),
        )  # fmt: skip
        answer = machine.run(self.programs[instance][which], context)
        length, result = struct.unpack(
            ("<" if self.byteorder == "little" else ">") + "ii", context.bytes()[32:40]
        )
        return answer, length, shown.bytes()[: len(value)], result

    # --- sock_ops ----------------------------------------------------------------

    def call(
        self, op: int, sock: Sock | None, *, tcp_flags: int = 0, argument: int = 0,
        local: Sock | None = None, flags_of: Sock | None = None,
        skb: bytes | None = None, room: int = 40, saved_syn: bytes | None = None,
    ) -> bytes:  # fmt: skip
        """Run all instances for one reason; gives the options that were stored.

        Args:
            op: The reason.
            sock: None while a SYN is answered: then there is no full socket.
            tcp_flags: Of the segment; 0 when there is none yet.
            argument: Of the reason.
            local: Has the local address, where there is no full socket.
            flags_of: Whose callback flags count, where there is no full socket.
            skb: Options of the segment that is processed.
            room: Bytes left for options.
            saved_syn: Options of the SYN, where there is no full socket.
        """
        owner = sock or flags_of
        assert owner is not None
        written: list[bytes] = []
        reserved: list[int] = []
        for instance in range(len(self.programs)):
            self.calls += 1
            context = bytearray(224)
            self._put(context, 0, "I", op)
            self._put(context, 4, "I", argument)
            self._put_address(context, sock or local or owner)
            self._put(context, 84, "I", owner.callback_flags)
            self._put(context, 212, "I", tcp_flags)
            event = _Event(
                op, owner, skb, sock.saved_syn if sock else saved_syn, room,
                written, reserved,
            )  # fmt: skip
            machine = self._machine(instance, event, sock)
            if sock is not None:
                seen = machine.address(self._as_seen(sock))
                self._put(context, 184, "Q", seen)
            before = bytes(context)
            region = Region.of("sock_ops", before)
            event.context = region
            assert machine.run(self.programs[instance]["sock_ops"], region) == 1
            after = bytearray(region.bytes())
            after[84:88] = before[84:88]
            assert bytes(after) == before, "the reply was written"
        if op == LENGTH_CB:
            return bytes(sum(reserved))
        return b"".join(written)

    def _put_address(self, context: bytearray, of: Sock) -> None:
        """Write family, local address and port; what is not of the family is junk."""
        context[28:32], context[48:64] = b"\xab" * 4, b"\xcd" * 16
        self._put(context, 20, "I", of.family)
        if of.family == socket.AF_INET:
            context[28:32] = socket.inet_pton(socket.AF_INET, of.address)
        else:
            context[48:64] = socket.inet_pton(socket.AF_INET6, of.address)
        self._put(context, 68, "I", of.port)

    def _put(self, context: bytearray, offset: int, layout: str, value: int) -> None:
        data = self.pack(layout, value)
        context[offset : offset + len(data)] = data

    def _as_seen(self, sock: Sock) -> Region:
        """Give struct bpf_sock of a socket: the same region each time."""
        region: Region | None = getattr(sock, "_seen", None)
        if region is None:
            region = Region.of("sock", bytes(80))
            sock._seen = region  # type: ignore[attr-defined]
        data = bytearray(80)
        self._put(data, 12, "I", sock.protocol)
        self._put(data, 72, "I", sock.state)
        region.data[:] = data
        return region

    def _machine(
        self, instance: int, event: _Event | None, sock: Sock | None
    ) -> Machine:
        machine = Machine(self.byteorder)
        helpers = _Helpers(self, machine, instance, event, sock)
        machine.helpers = {
            1: helpers.map_lookup, 2: helpers.map_update, 5: helpers.time,
            107: helpers.storage_get,
        }  # fmt: skip
        if event is not None:
            machine.helpers |= {
                49: helpers.setsockopt, 59: helpers.flags_set, 122: helpers.cookie,
                142: helpers.load_option, 143: helpers.store_option,
                144: helpers.reserve,
            }  # fmt: skip
        return machine


@dataclass
class _Event:
    op: int
    owner: Sock
    skb: bytes | None
    saved_syn: bytes | None
    room: int
    written: list[bytes]
    reserved: list[int]
    context: Region | None = None


@dataclass
class _Helpers:
    """The kernel's functions, for one run of one program."""

    kernel: Kernel
    machine: Machine
    instance: int
    event: _Event | None
    sock: Sock | None

    def _table(self, descriptor: int) -> dict[bytes, int]:
        if descriptor != LISTENERS:
            raise Refused(f"map {descriptor} is no hash")
        return self.kernel.listeners[self.instance]

    def map_lookup(self, table, key, *_: Any) -> int:
        found = self._table(table).get(self.machine.read(key, KEY_BYTES))
        if found is None:
            return 0
        return self.machine.address(Region.of("entry", self.kernel.pack("Q", found)))

    def map_update(self, table, key, value, flags, *_: Any) -> int:
        assert flags in (0, 1)
        entries, place = self._table(table), self.machine.read(key, KEY_BYTES)
        if flags and place in entries:
            return -errno.EEXIST
        entries[place] = self.machine.number(value, 8)
        return 0

    def time(self, *_: Any) -> int:
        return self.kernel.now

    def storage_get(self, table, sock, value, flags, *_: Any) -> int:
        if table != SOCKETS or value != 0 or self.sock is None:
            raise Refused("sk_storage_get")
        assert self.machine.find(sock) == (self.kernel._as_seen(self.sock), 0)
        storage = self.sock.storage
        if self.instance not in storage:
            if not flags & 1 or not self.kernel.has_memory:
                return 0
            storage[self.instance] = Region.of("state", bytes(4))
        return self.machine.address(storage[self.instance])

    def cookie(self, context, *_: Any) -> int:
        assert self.event is not None
        assert self.machine.find(context) == (self.event.context, 0)
        return self.kernel.namespace

    def setsockopt(self, context, level, name, value, length) -> int:
        assert self.sock is not None
        assert (level, name, length) == (6, 27, 4)
        self.sock.saves_syn = self.machine.number(value, 4) == 1
        return 0

    def flags_set(self, context, flags, *_: Any) -> int:
        event = self.event
        assert event is not None
        assert event.context is not None
        if self.sock is None:
            return -errno.EINVAL
        if event.op == LISTEN_CB:
            assert self.sock.saves_syn, "a client that comes now would be answered"
        self.sock.callback_flags = flags
        self.machine.write(
            self.machine.address(event.context) + 84, self.kernel.pack("I", flags)
        )
        return 0

    def load_option(self, context, buffer, length, flags, *_: Any) -> int:
        event = self.event
        assert event is not None
        assert flags in (0, 1)
        text = event.saved_syn if flags else event.skb
        if text is None:
            return -errno.ENOENT if flags else -errno.EINVAL
        if length < 2:
            return -errno.EINVAL
        wanted = self.machine.read(buffer, 2)
        magic = b""
        if wanted[0] in (253, 254):
            if wanted[1] not in (4, 6):
                return -errno.EINVAL
            magic = self.machine.read(buffer + 2, wanted[1] - 2)
        elif wanted[1]:
            return -errno.EINVAL
        for option in options_of(text):
            if option[0] == wanted[0] and option[2:].startswith(magic):
                self.machine.write(buffer, option[:length])
                return len(option) if len(option) <= length else -errno.ENOSPC
        return -errno.ENOMSG

    def reserve(self, context, length, flags, *_: Any) -> int:
        event = self.event
        assert event is not None
        assert flags == 0
        if event.op != LENGTH_CB:
            return -errno.EPERM
        if length > event.room - sum(event.reserved):
            return -errno.ENOSPC
        event.reserved.append(length)
        return 0

    def store_option(self, context, buffer, length, flags, *_: Any) -> int:
        event = self.event
        assert event is not None
        assert flags == 0
        if event.op != WRITE_CB:
            return -errno.EPERM
        option = self.machine.read(buffer, length)
        if option in event.written:
            return -errno.EEXIST
        event.written.append(option)
        return 0


# --- a TCP handshake ----------------------------------------------------------


def listen(kernel: Kernel, sock: Sock, port: int) -> None:
    sock.port, sock.state = port, LISTEN
    kernel.call(LISTEN_CB, sock)


def header(kernel: Kernel, sock: Sock, tcp_flags: int) -> bytes:
    """Build a segment of a full socket; gives what the programs added."""
    if not sock.callback_flags & WRITE_FLAG:
        return b""
    length = kernel.call(LENGTH_CB, sock, tcp_flags=tcp_flags)
    return _written(length, lambda: kernel.call(WRITE_CB, sock, tcp_flags=tcp_flags))


def _written(length: bytes, write: Callable[[], bytes]) -> bytes:
    if not length:
        return b""
    written = write()
    assert len(written) <= len(length), "more was stored than reserved"
    return written


def connect(kernel: Kernel, sock: Sock) -> bytes:
    """Begin to connect; gives what the SYN carries by the programs."""
    kernel.call(CONNECT_CB, sock)
    sock.state = 2
    # The kernel asks ahead for the room in later segments.
    if sock.callback_flags & WRITE_FLAG:
        assert kernel.call(LENGTH_CB, sock, tcp_flags=0) == b""
    return header(kernel, sock, SYN)


def answer(
    kernel: Kernel, listener: Sock, syn: bytes, *, cookie: bool = False, to: str = ""
) -> bytes:
    """Answer a SYN: there is only a request yet; gives what the SYN-ACK carries.

    Args:
        kernel: Runs the programs.
        listener: Whose request it is.
        syn: The options of the SYN.
        cookie: Whether a SYN cookie is sent.
        to: The address, where the listener has all.
    """
    if not listener.callback_flags & WRITE_FLAG:
        return b""
    facts: dict[str, Any] = {
        "tcp_flags": SYN_ACK, "argument": 2 if cookie else 0,
        "local": Sock(port=listener.port, address=to or listener.address),
        "flags_of": listener,
        "saved_syn": syn,
    }  # fmt: skip
    length = kernel.call(LENGTH_CB, None, **facts)
    return _written(length, lambda: kernel.call(WRITE_CB, None, **facts))


def accept(
    kernel: Kernel, listener: Sock, syn: bytes, *, kept: bool = True, to: str = ""
) -> Sock:
    """Establish a connection at the server: the child begins as its listener is."""
    child = Sock(
        port=listener.port,
        address=to or listener.address,
        state=1,
        callback_flags=listener.callback_flags,
    )
    child.storage = {
        instance: Region("state", list(region.data))
        for instance, region in listener.storage.items()
    }
    child.saved_syn = syn if kept and listener.saves_syn else None
    kernel.call(PASSIVE_CB, child)
    return child


def established(kernel: Kernel, client: Sock, syn_ack: bytes) -> None:
    client.state = 1
    kernel.call(ACTIVE_CB, client, skb=syn_ack)
