"""The Unix endpoint of the shm fabric: who may call, and the first words exchanged.

An active queue pair calls the endpoint of the process that owns the passive one. The
kernel vouches for the user at the other end before a byte is believed; then one hello
each way names both queue pairs and brings the descriptors. Decides who is refused and
why, and keeps the callers whose queue pair is not ready yet. Knows nothing of what is
in the memory that the descriptors lead to.

The messages of the socket, one in each packet:

* hello: magic, geometry, the queue pairs at both ends with their packet sequence
  numbers, and the descriptors (control arena, data arenas);
* arena: the next data arena, with its descriptor;
* bell: there is news for one who sleeps;
* refusal: one byte that says why, after which the socket is closed.

A hello is only looked at until its queue pair waits: what came along stays in the
kernel, on the caller's account and not in our descriptor table.

Source: unix(7) on abstract names, SO_PEERCRED and SCM_RIGHTS; the numbers exchanged are
those of RFC 7609's CLC messages (A.2.2, A.2.3), so that no stranger can guess them.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.disposal import close_elsewhere, has_room
from pysmc.errors import FabricError
from pysmc.fabric.base import Status
from pysmc.fabric.shm_arena import ARENAS_MAX, closes_quickly, is_shortage
from pysmc.fabric.shm_ring import GEOMETRY

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.fabric.shm_link import ShmQueuePair

__all__ = ["Endpoint", "Hello", "Packet", "endpoint_name", "peer_uid", "receive"]

HELLO, ARENA, BELL, REFUSAL = 1, 2, 3, 4
"""First byte of each message."""

REFUSALS = {
    1: (Status.FOREIGN_USER, "foreign user"),
    2: (Status.UNREACHABLE, "unknown queue pair"),
    3: (Status.NO_MEMORY, "busy: too many callers wait"),
    4: (Status.NO_MEMORY, "no memory or no descriptors"),
    5: (Status.BROKEN_RULE, "broken rule"),
}
"""The byte of a refusal, and what it says."""
FOREIGN_USER, UNKNOWN_QUEUE_PAIR, BUSY, NO_MEMORY, BROKEN_RULE = REFUSALS

CALLERS_MAX = 64
"""Callers of permitted users that wait for their queue pair."""
FOREIGN_CALLERS_MAX = 16
"""The same of other users, so that they cannot crowd out the permitted."""
_ACCEPTS_AT_ONCE = 16
_BACKLOG = 1024
HELLO_DESCRIPTORS_MAX = 1 + ARENAS_MAX
"""Descriptors that come with a hello: the control arena and the data arenas."""
_SCM_MAX_FD = 253
"""Most descriptors in one message, by the kernel's will."""
_PACKET_BYTES = 256
_MAGIC = b"PSH2"
_HELLO = struct.Struct("!B4s5I8s4IHB")
_ARENA = struct.Struct("!BB")
_UCRED = struct.Struct("3i")
# Plain ints: each rings or wakes somebody, and an IntFlag is made by a Python call.
_QUIETLY = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC | socket.MSG_TRUNC)


def endpoint_name(peer_id: bytes) -> str:
    """Tell the abstract name of a peer's endpoint.

    Args:
        peer_id: 8 bytes.
    """
    return f"\0pysmc/shm/1/{peer_id.hex()}"


def peer_uid(connection: socket.socket) -> int:
    """Tell the user at the other end, as the kernel recorded it."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(raw)
    return int(uid)


def overflow_uid() -> int:
    """Tell the user ID that stands for everybody unknown to this user namespace."""
    try:
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 65534  # the kernel's default, where /proc is not to be seen


class Hello(NamedTuple):
    """What each end says first."""

    peer_id: bytes
    """8 bytes, the sender's."""
    number: int
    """The sender's queue pair, 24 bits."""
    psn: int
    """The sender's first packet sequence number, 24 bits."""
    wanted_number: int
    """The queue pair that the sender wants to reach."""
    wanted_psn: int
    """The packet sequence number that the sender was told for it."""
    arenas: int = 0
    """Data arenas whose descriptors come along."""
    refusal: int = 0
    """0, or why the sender does not want to be connected after all."""

    def build(self) -> bytes:
        """Make the message."""
        return _HELLO.pack(HELLO, _MAGIC, *GEOMETRY, *self)

    @classmethod
    def parse(cls, data: bytes) -> Hello:
        """Read the message.

        Raises:
            ValueError: It is none, or of another geometry.
        """
        if len(data) != _HELLO.size:
            text = f"a hello of {len(data)} bytes, {_HELLO.size} expected"
            raise ValueError(text)
        kind, magic, *rest = _HELLO.unpack(data)
        if kind != HELLO or magic != _MAGIC or tuple(rest[:5]) != GEOMETRY:
            text = "not a hello of this layout of shared memory"
            raise ValueError(text)
        hello = cls(*rest[5:])
        if hello.arenas > ARENAS_MAX or hello.refusal not in (0, *REFUSALS):
            text = f"{hello.arenas} arenas with refusal {hello.refusal} in a hello"
            raise ValueError(text)
        return hello


class Packet(NamedTuple):
    """One message as it came."""

    data: bytes
    descriptors: list[int]
    truncated: bool
    """Some descriptors were lost, for want of room here or there."""
    is_foreign: bool = False
    """Another user's, who may have a slow close in mind."""

    def close(self) -> None:
        """Close the descriptors that came."""
        while self.descriptors:
            descriptor = self.descriptors.pop()
            is_quick = not self.is_foreign or closes_quickly(descriptor)
            if is_quick or not close_elsewhere(descriptor):
                os.close(descriptor)


def receive(
    connection: socket.socket, descriptors: int = HELLO_DESCRIPTORS_MAX
) -> Packet:
    """Receive one message without waiting.

    Args:
        connection: The socket.
        descriptors: How many may come, at least 1; the kernel closes what is more.

    Returns:
        The message; empty data means that the other end has closed.

    Raises:
        BlockingIOError: There is none.
    """
    data, ancillary, flags, _ = _take(connection, _space(descriptors), _QUIETLY)
    truncated = flags & _TRUNCATED != 0
    if not ancillary:
        return Packet(data, [], truncated)
    received = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            usable = len(content) - len(content) % received.itemsize
            received.frombytes(content[:usable])
    is_foreign = descriptors == _SCM_MAX_FD  # as `room_for` says it
    return Packet(data, list(received), truncated, is_foreign)


@cache
def _space(descriptors: int) -> int:
    return socket.CMSG_SPACE(4 * descriptors)


def look(connection: socket.socket) -> bytes:
    """Read a message without taking it, or a descriptor of it.

    Returns:
        The message; empty when the other end has closed.

    Raises:
        BlockingIOError: There is none.
    """
    message, *_ = _take(connection, 0, _QUIETLY | socket.MSG_PEEK)
    return bytes(message)


def _take(connection: socket.socket, space: int, flags: int) -> Any:
    try:
        return connection.recvmsg(_PACKET_BYTES, space, flags)
    except ConnectionResetError:
        # The peer closed with something of ours unread. What it said before is still
        # there to be read.
        try:
            return connection.recvmsg(_PACKET_BYTES, space, flags)
        except ConnectionResetError:
            return b"", [], 0, None


def send(connection: socket.socket, data: bytes, descriptors: list[int]) -> None:
    """Send one message without waiting.

    Raises:
        OSError: It could not be sent.
    """
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    rights = array.array("i", descriptors)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
    connection.sendmsg([data], ancillary, flags)


def send_refusal(connection: socket.socket, reason: int) -> None:
    """Say why, if the other end still listens, and close."""
    try:
        send(connection, bytes((REFUSAL, reason)), [])
    except OSError:
        pass  # the caller is gone or floods us: either way it will not read this
    finally:
        close(connection)


def close(connection: socket.socket) -> None:
    """Close a connection, with whatever lies in it unread.

    Another user's is closed by another thread: it may hold descriptors whose last close
    takes long. A process of our own user needs no such means to stop us.
    """
    if is_foreign(connection) and close_elsewhere(connection.fileno()):
        connection.detach()
    else:
        connection.close()


def is_foreign(connection: socket.socket) -> bool:
    """Tell whether another user is at the other end."""
    return peer_uid(connection) != os.geteuid()


def room_for(count: int, connection: socket.socket) -> int:
    """Tell how many descriptors to receive where so many are expected.

    What the kernel finds no room for it closes in our thread, so that from another user
    all are taken that can come in one message.
    """
    return _SCM_MAX_FD if is_foreign(connection) else count


class Caller:
    """Somebody who called and has not found its queue pair yet."""

    __slots__ = ("connection", "hello", "refusal")

    def __init__(self, connection: socket.socket, refusal: int) -> None:
        self.connection = connection
        self.refusal = refusal
        """0, or why it will not be connected, whatever it says."""
        self.hello: Hello | None = None


class Endpoint:
    """The listener and the callers that wait."""

    def __init__(
        self,
        peer_id: bytes,
        allowed_uids: tuple[int, ...],
        find: Callable[[int], ShmQueuePair | None],
        watch: Callable[[int, int, Callable[[], None]], None],
        unwatch: Callable[[int], None],
    ) -> None:
        """Bind and listen.

        Args:
            peer_id: Ours, 8 bytes.
            allowed_uids: Users beside our own who may connect.
            find: Finds one of our queue pairs by its number.
            watch: Has a function called when a descriptor is ready.
            unwatch: Ends that.

        Raises:
            OSError: There is no descriptor left, or the name is taken.
        """
        self._allowed_uids = allowed_uids
        self._find = find
        self._watch = watch
        self._unwatch = unwatch
        self._callers: dict[int, Caller] = {}
        self._paused = False
        kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._listener = socket.socket(socket.AF_UNIX, kind)
        try:
            self._listener.bind(endpoint_name(peer_id))
            self._listener.listen(_BACKLOG)
            # Given up for a moment when descriptors run out, to refuse a caller.
            self._reserve = os.dup(self._listener.fileno())
        except OSError:
            self._listener.close()
            raise
        watch(self._listener.fileno(), select.EPOLLIN, self.accept)

    def accept(self) -> None:
        """Take the callers that knock, a bounded number of them."""
        for _ in range(_ACCEPTS_AT_ONCE):
            if not has_room():
                # Of the next caller, too, we might not get rid at once.
                self._pause()
                return
            try:
                connection, _address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as exc:
                if not is_shortage(exc):
                    raise
                self._turn_away()
                return
            connection.settimeout(0)
            allowed = is_allowed(peer_uid(connection), self._allowed_uids)
            self._admit(Caller(connection, 0 if allowed else FOREIGN_USER))

    def _turn_away(self) -> None:
        """Refuse one caller although there is no descriptor for it.

        Without this the listener stays readable and the loop spins.
        """
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1
            try:
                connection, _address = self._listener.accept()
                send_refusal(connection, NO_MEMORY)
            except OSError as exc:
                if not is_shortage(exc) and exc.errno != errno.EAGAIN:
                    raise
        try:
            self._reserve = os.dup(self._listener.fileno())
        except OSError:
            # Somebody else took the last one. `resume` tries again.
            self._pause()

    def _pause(self) -> None:
        self._unwatch(self._listener.fileno())
        self._paused = True

    def resume(self) -> None:
        """Listen again after a pause, if what was short is there again."""
        if self._paused and has_room():
            if self._reserve < 0:
                try:
                    self._reserve = os.dup(self._listener.fileno())
                except OSError:
                    return
            self._paused = False
            self._watch(self._listener.fileno(), select.EPOLLIN, self.accept)

    def takes_callers(self) -> bool:
        """Tell whether who knocks now would be let in."""
        self.resume()
        return not self._paused and has_room()

    def _admit(self, caller: Caller) -> None:
        most = FOREIGN_CALLERS_MAX if caller.refusal else CALLERS_MAX
        alike = [
            other
            for other in self._callers.values()
            if bool(other.refusal) == bool(caller.refusal)
        ]
        if len(alike) >= most:
            # The oldest that has not even said hello goes first, else the newcomer.
            silent = next((other for other in alike if other.hello is None), caller)
            self._drop(silent, caller.refusal or BUSY)
            if silent is caller:
                return
        descriptor = caller.connection.fileno()
        try:
            self._watch(descriptor, select.EPOLLIN, lambda: self._heard(caller))
        except FabricError:
            send_refusal(caller.connection, NO_MEMORY)
            return
        self._callers[descriptor] = caller
        self._heard(caller)

    def _heard(self, caller: Caller) -> None:
        """Look at a caller's hello."""
        try:
            caller.hello = hello = Hello.parse(look(caller.connection))
        except BlockingIOError:
            return
        except ValueError:
            self._drop(caller, caller.refusal or BROKEN_RULE)
            return
        queue_pair = self._find(hello.wanted_number)
        if queue_pair is None or not queue_pair.may_be_called:
            self._drop(caller, caller.refusal or UNKNOWN_QUEUE_PAIR)
        elif queue_pair.is_waiting:
            self._introduce(caller, queue_pair)
        elif caller.refusal or hello.refusal:
            # It may leave; the verdict stays for the queue pair.
            self._unwatch(caller.connection.fileno())
        else:
            # What it says next is for the link; that it leaves is for us.
            descriptor = caller.connection.fileno()
            self._watch(descriptor, select.EPOLLRDHUP, lambda: self._gave_up(caller))

    def _gave_up(self, caller: Caller) -> None:
        self._drop(caller, UNKNOWN_QUEUE_PAIR)

    def introduce_to(self, queue_pair: ShmQueuePair) -> None:
        """Let a queue pair that began to wait have the caller that came before."""
        for caller in list(self._callers.values()):
            hello = caller.hello
            if hello is not None and hello.wanted_number == queue_pair.number:
                self._introduce(caller, queue_pair)

    def _introduce(self, caller: Caller, queue_pair: ShmQueuePair) -> None:
        hello = caller.hello
        assert hello is not None
        if not queue_pair.is_waiting or not queue_pair.expects(hello):
            # Somebody who does not know the numbers learns nothing and harms nobody.
            self._drop(caller, caller.refusal or UNKNOWN_QUEUE_PAIR)
            return
        refusal = caller.refusal or hello.refusal
        if refusal:
            by = "we do not allow the peer's user" if caller.refusal else "by the peer"
            status, text = REFUSALS[refusal]
            self._drop(caller, refusal)
            queue_pair.refuse(status, f"{text} ({by})")
            return
        self._forget(caller)
        most = room_for(1 + hello.arenas, caller.connection)
        packet = receive(caller.connection, most)
        queue_pair.accept(caller.connection, hello, packet)

    def drop_callers_of(self, number: int) -> None:
        """Refuse those who wait for a queue pair that is no more."""
        for caller in list(self._callers.values()):
            hello = caller.hello
            if hello is not None and hello.wanted_number == number:
                self._drop(caller, caller.refusal or UNKNOWN_QUEUE_PAIR)

    def _drop(self, caller: Caller, reason: int) -> None:
        self._forget(caller)
        send_refusal(caller.connection, reason)

    def _forget(self, caller: Caller) -> None:
        descriptor = caller.connection.fileno()
        if self._callers.get(descriptor) is caller:
            del self._callers[descriptor]
            self._unwatch(descriptor)

    def close(self) -> None:
        """Refuse who waits and stop listening. Idempotent."""
        for caller in list(self._callers.values()):
            self._drop(caller, UNKNOWN_QUEUE_PAIR)
        if self._listener.fileno() >= 0 and not self._paused:
            self._unwatch(self._listener.fileno())
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close without a word: all that a forked child may do. Idempotent."""
        for caller in self._callers.values():
            caller.connection.close()
        self._callers.clear()
        self._listener.close()
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1


def is_allowed(uid: int, allowed_uids: tuple[int, ...]) -> bool:
    """Tell whether a user may share memory with us.

    The overflow user never may: in a user namespace it stands for every user that is
    not mapped there, so that it names nobody.
    """
    return uid != overflow_uid() and (uid == os.geteuid() or uid in allowed_uids)


def call(peer_id: bytes) -> socket.socket:
    """Call a peer's endpoint.

    Args:
        peer_id: Whose, 8 bytes.

    Raises:
        FabricError: Status ``UNREACHABLE`` or ``NO_MEMORY``.
    """
    kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    operation = "call the peer's endpoint"
    try:
        connection = socket.socket(socket.AF_UNIX, kind)
    except OSError as exc:
        raise _call_failed(operation, exc) from exc
    try:
        connection.connect(endpoint_name(peer_id))
    except OSError as exc:
        connection.close()
        raise _call_failed(operation, exc) from exc
    return connection


def _call_failed(operation: str, exc: OSError) -> FabricError:
    name = errno.errorcode.get(exc.errno or 0, "errno unknown")
    full = exc.errno in {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
    status = Status.NO_MEMORY if full else Status.UNREACHABLE
    return FabricError(operation, status.name, f"{name}: {exc.strerror}")
