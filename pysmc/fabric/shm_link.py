"""The queue pair of the shm fabric: how a link comes up, carries and goes down.

Decides when a link is connected and when it is gone; the words that it carries are in
`pysmc.fabric.shm_ring`, the callers in `pysmc.fabric.shm_endpoint`.

The link's socket stays open for life. Its end tells of the peer's, in whatever way the
peer died, and is looked at only after everything that the peer published was taken.

The doorbell is a message on that socket. An eventfd or a pipe would cost a little less,
but what the peer has a share in it can make us wait for: it can clear O_NONBLOCK and
fill an eventfd, and it can hold the lock of a pipe. Each end of a socket is its owner's
alone, and a send with MSG_DONTWAIT never waits.

Source: RFC 7609 section 4.5.1 (queue pairs of a link); kernel counterpart: smc_ib.c.
"""

from __future__ import annotations

import select
import socket
from enum import Enum
from typing import TYPE_CHECKING

from pysmc.disposal import unmap_elsewhere
from pysmc.errors import FabricError, LocalProtocolError
from pysmc.fabric import shm_endpoint as endpoint
from pysmc.fabric.base import (
    Completion,
    CompletionKind,
    QueuePair,
    RemoteQueuePair,
    Status,
)
from pysmc.fabric.shm_arena import (
    ARENAS_MAX,
    Arena,
    is_shortage,
    map_peer_arena,
    no_memory,
    unmap,
)
from pysmc.fabric.shm_ring import (
    CONTROL_BYTES,
    DESCRIPTOR,
    MAILBOX_WORDS,
    MAILBOXES,
    SEND_BYTES_MAX,
    SLOTS,
    Inbox,
    Outbox,
    Window,
    refused,
    unpack_descriptor,
)

if TYPE_CHECKING:
    import mmap

    from pysmc.fabric.base import MemoryRegion
    from pysmc.fabric.shm import ShmDomain

__all__ = ["ShmQueuePair"]

_MESSAGES_AT_ONCE = 512
"""More than a socket's send buffer holds; a peer that sends meanwhile is cut off."""
_UNMAPPED_HERE_BYTES = 64 << 20
"""A peer's memory that is unmapped at once: it takes 15 ms when all of it is filled."""
_BELL = bytes((endpoint.BELL,))
_QUIETLY = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class LinkState(Enum):
    """Where a queue pair is in its life; it only moves downwards here."""

    NEW = "new"
    WAITING = "waiting for the peer to call"
    CALLING = "waiting for the peer's answer"
    UP = "up"
    DOWN = "down"
    CLOSED = "closed"


class ShmQueuePair(QueuePair):
    """One link to one peer."""

    def __init__(self, domain: ShmDomain, number: int) -> None:
        """Get the control arena.

        Args:
            domain: Whose memory the peer may write.
            number: 24 bits, unique in the device.

        Raises:
            FabricError: Status ``NO_MEMORY``.
        """
        self.number = number
        self.is_up = False
        self.state = LinkState.NEW
        self.domain = domain
        self.device = domain.device
        self.ending: tuple[Status, str] | None = None
        self._remote: RemoteQueuePair | None = None
        self._psn = 0
        self._socket: socket.socket | None = None
        self._outbox: Outbox | None = None
        self._peer_control: mmap.mmap | None = None
        self._peer_arenas: list[mmap.mmap | None] = []
        self._room = 1  # for descriptors that come with one message
        self._control = Arena(CONTROL_BYTES)
        self.inbox = Inbox(self._control.memory, self, self._ring)

    def newest_consumer(self, region: MemoryRegion, alert_token: int) -> int:
        """Look into a mailbox; see `QueuePair.newest_consumer`."""
        slot = region.rkey_on(self) & 0xFFFF
        return self.inbox.consumer_of(slot, alert_token) if self.is_up else -1

    def names_element(self, rkey: int, address: int, length: int) -> bool:
        """Ask the peer's descriptor words; see `QueuePair.names_element`."""
        outbox, slot = self._outbox, rkey & 0xFFFF
        if outbox is None or self.ending is not None:
            return True  # the link is gone, which is told in another way
        if slot >= SLOTS:
            return False
        word = outbox.words[MAILBOXES + slot * MAILBOX_WORDS + DESCRIPTOR]
        named, arena, offset, size = unpack_descriptor(word)
        return (named, arena + 1 << 32 | offset, size) == (rkey, address, length)

    # --- coming up -----------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        """Whether the peer may call now."""
        return self.state is LinkState.WAITING

    @property
    def may_be_called(self) -> bool:
        """Whether the peer may call now or, as far as we know, later."""
        return self.state in (LinkState.NEW, LinkState.WAITING)

    def expects(self, hello: endpoint.Hello) -> bool:
        """Tell whether a caller is the one that the CLC messages spoke of."""
        remote = self._remote
        return (
            remote is not None
            and hello.peer_id == remote.peer_id
            and (hello.number, hello.psn) == (remote.number, remote.psn)
            and (hello.wanted_number, hello.wanted_psn) == (self.number, self._psn)
        )

    def connect(self, remote: RemoteQueuePair, psn: int, *, passive: bool) -> None:
        """Call the peer, or let it call; see `QueuePair.connect`."""
        self.device.refuse_if_forked()
        if self.state is not LinkState.NEW:
            text = f"queue pair {self.number} was connected before ({self.state.value})"
            raise LocalProtocolError(text)
        self._remote, self._psn = remote, psn
        if passive:
            self.state = LinkState.WAITING
            self.device.introduce_callers(self)
            return
        self.state = LinkState.CALLING
        try:
            self._call(remote)
        except FabricError as exc:
            self.refuse(Status[exc.status], str(exc))

    def _call(self, remote: RemoteQueuePair) -> None:
        connection = endpoint.call(remote.peer_id)
        hello = self._hello()
        uid = endpoint.peer_uid(connection)
        is_allowed = endpoint.is_allowed(uid, self.device.allowed_uids)
        try:
            if is_allowed:
                endpoint.send(connection, hello.build(), self._descriptors())
            else:
                # Its queue pair need not wait until its handshake times out.
                hello = hello._replace(arenas=0, refusal=endpoint.FOREIGN_USER)
                endpoint.send(connection, hello.build(), [])
        except OSError as exc:
            endpoint.close(connection)
            raise _sending_failed(exc, "say hello to the peer") from exc
        if not is_allowed:
            endpoint.close(connection)
            text = f"the endpoint belongs to user {uid}, who is not in allowed_uids"
            name = Status.FOREIGN_USER.name
            operation = "check the peer's user"
            raise FabricError(operation, name, text)
        self._socket = connection
        self.device.watch(connection.fileno(), select.EPOLLIN, self._answered)

    def _hello(self) -> endpoint.Hello:
        remote = self._remote
        assert remote is not None
        return endpoint.Hello(
            peer_id=self.device.peer_id,
            number=self.number,
            psn=self._psn,
            wanted_number=remote.number,
            wanted_psn=remote.psn,
            arenas=len(self.domain.arenas),
        )

    def _descriptors(self) -> list[int]:
        arenas = [arena.descriptor for arena in self.domain.arenas]
        return [self._control.descriptor, *arenas]

    def _inodes(self) -> frozenset[int]:
        """Tell which memory this link's peer has from us."""
        arenas = (arena.inode for arena in self.domain.arenas)
        return frozenset((self._control.inode, *arenas))

    def _answered(self) -> None:
        """Read what the called peer says to our hello."""
        connection = self._socket
        assert connection is not None
        try:
            most = endpoint.room_for(endpoint.HELLO_DESCRIPTORS_MAX, connection)
            packet = endpoint.receive(connection, most)
        except BlockingIOError:
            return
        data = packet.data
        if not data:
            packet.close()
            self.refuse(Status.PEER_GONE, "the peer closed its endpoint")
        elif data[0] == endpoint.REFUSAL and len(data) == 2:
            packet.close()
            unknown = (Status.BROKEN_RULE, f"refusal {data[1]} of the peer")
            status, text = endpoint.REFUSALS.get(data[1], unknown)
            self.refuse(status, f"{text} (by the peer)")
        else:
            self._read_answer(packet)

    def _read_answer(self, packet: endpoint.Packet) -> None:
        try:
            hello = endpoint.Hello.parse(packet.data)
            assert self._socket is not None
            self._open(hello, packet, self._socket)
        except ValueError as exc:
            packet.close()
            self.refuse(Status.BROKEN_RULE, str(exc))
        except FabricError as exc:
            packet.close()
            self.refuse(Status[exc.status], str(exc))
        else:
            self._go_up()

    def accept(
        self, connection: socket.socket, hello: endpoint.Hello, packet: endpoint.Packet
    ) -> None:
        """Take a caller that `expects` approved.

        Args:
            connection: Its socket, from now on ours.
            hello: What it said.
            packet: The descriptors that came along.
        """
        try:
            self._open(hello, packet, connection)
            self._answer(connection)
        except ValueError as exc:
            reason, status, text = endpoint.BROKEN_RULE, Status.BROKEN_RULE, str(exc)
        except FabricError as exc:
            reason, status, text = endpoint.NO_MEMORY, Status[exc.status], str(exc)
        else:
            self._socket = connection
            self._go_up()
            return
        packet.close()
        self.device.unwatch(connection.fileno())
        endpoint.send_refusal(connection, reason)
        self.refuse(status, text)

    def _answer(self, connection: socket.socket) -> None:
        try:
            endpoint.send(connection, self._hello().build(), self._descriptors())
        except OSError as exc:
            raise _sending_failed(exc, "answer the peer's hello") from exc

    def refuse(self, status: Status, text: str) -> None:
        """End an attempt to connect: CONNECTED with a status that says why."""
        self.state = LinkState.DOWN
        self._release()
        self.device.complete(
            Completion(CompletionKind.CONNECTED, self, status, payload=text)
        )

    def _open(
        self, hello: endpoint.Hello, packet: endpoint.Packet, connection: socket.socket
    ) -> None:
        """Map what the peer's hello brought, and watch for what comes."""
        if not self.expects(hello) or hello.refusal:
            text = "the peer answered for another queue pair"
            raise ValueError(text)
        descriptors = packet.descriptors
        expected = 1 + hello.arenas
        if packet.truncated and len(descriptors) < expected:
            text = f"{len(descriptors)} of {expected} descriptors arrived (EMFILE)"
            raise no_memory(text, "receive the peer's memory")
        if packet.truncated or len(descriptors) != expected:
            text = f"{len(descriptors)} descriptors came, {expected} announced"
            raise ValueError(text)
        try:
            ours = self._inodes()
            control = map_peer_arena(descriptors[0], CONTROL_BYTES, ours=ours)
            self._peer_control = control
            for descriptor in descriptors[1:]:
                self._peer_arenas.append(map_peer_arena(descriptor, ours=ours))
        except OSError as exc:
            raise no_memory(exc, "map the peer's memory") from exc
        self._room = endpoint.room_for(1, connection)
        self._outbox = Outbox(control, self._ring, self._resolve, self.fail)
        packet.close()
        self.device.watch(connection.fileno(), select.EPOLLIN, self._hear_one)

    def _go_up(self) -> None:
        connection, outbox = self._socket, self._outbox
        assert connection is not None
        assert outbox is not None
        device = self.device
        self._control.close_descriptor()
        self.state = LinkState.UP
        self.is_up = True
        # Straight to the closures: a method that passes seven arguments on would cost
        # as much as the whole publish.
        self.__dict__["publish"] = outbox.publish
        self.__dict__["post_write"] = outbox.post_write
        self.__dict__["flush"] = outbox.flush
        device.add_link(self)
        device.complete(Completion(CompletionKind.CONNECTED, self))

    # --- up ------------------------------------------------------------------------

    def post_send(self, payload: bytes) -> None:
        """SEND; see `QueuePair.post_send`."""
        self._refuse_before_up()
        if not 1 <= len(payload) <= SEND_BYTES_MAX:
            text = f"a SEND of {len(payload)} bytes; 1 to {SEND_BYTES_MAX} are possible"
            raise LocalProtocolError(text)
        if self._outbox is not None and self.ending is None:
            self._outbox.send(payload)

    def post_write(self, rkey: int, address: int, data: memoryview | bytes) -> None:
        """Do nothing: a link that is up has its own function for it."""
        del rkey, address, data
        self._refuse_before_up()

    def publish(
        self,
        rkey: int,
        wr_id: int,
        sequence: int,
        alert_token: int,
        producer: int,
        consumer: int,
        flags: int,
    ) -> bool:
        """Do nothing: a link that is up has its own function for it."""
        del rkey, wr_id, sequence, alert_token, producer, consumer, flags
        self._refuse_before_up()
        return False

    def _refuse_before_up(self) -> None:
        self.device.refuse_if_forked()
        if self.state in (LinkState.NEW, LinkState.WAITING, LinkState.CALLING):
            text = f"queue pair {self.number} is not connected ({self.state.value})"
            raise LocalProtocolError(text)

    def flush(self) -> None:
        """Do nothing: a link that is up has its own function for it."""
        self.device.refuse_if_forked()

    def send_arena(self, arena: Arena) -> bool:
        """Give the peer the next data arena.

        Returns:
            False when there is no peer yet: its hello will bring the arena.

        Raises:
            OSError: It could not be sent.
        """
        if self._socket is None:
            return False
        data = bytes((endpoint.ARENA, len(self.domain.arenas)))
        endpoint.send(self._socket, data, [arena.descriptor])
        return True

    def _resolve(self, rkey: int) -> Window:
        """Find the peer's memory for an rkey; the peer's words are checked here."""
        slot = rkey & 0xFFFF
        outbox = self._outbox
        assert outbox is not None
        if slot >= SLOTS:
            raise refused(rkey, "post_write", f"the peer has only {SLOTS} regions")
        index = MAILBOXES + slot * MAILBOX_WORDS + DESCRIPTOR
        word = outbox.words[index]
        named, number, offset, length = unpack_descriptor(word)
        if named != rkey:
            raise refused(rkey, "post_write", "the peer has no such region")
        if number >= len(self._peer_arenas):
            # The rkey came by another way and was faster than the arena's descriptor.
            self._hear_all()
        if number >= len(self._peer_arenas):
            raise refused(rkey, "post_write", f"the peer has no arena {number}")
        memory = self._peer_arenas[number]
        if memory is None:
            text = f"rkey {rkey:#x}: its descriptor or mapping could not be had"
            raise no_memory(text, "post_write")
        if offset + length > len(memory):
            raise refused(rkey, "post_write", f"it ends outside of arena {number}")
        first = number + 1 << 32 | offset
        return index, word, memory, offset - first, first, first + length

    def _hear_all(self) -> None:
        """Read the link's socket until there is nothing, or the peer is gone."""
        for _ in range(_MESSAGES_AT_ONCE):
            if not self._hear():
                return

    def _hear_one(self) -> None:
        """Read what made the link's socket ready; more makes it ready again."""
        self._hear()

    def _hear(self) -> bool:
        """Read one message of the link's socket.

        Returns:
            False when there was none, or the link ends.
        """
        if self._socket is None or self.ending is not None:
            return False
        try:
            packet = endpoint.receive(self._socket, self._room)
        except BlockingIOError:
            return False
        try:
            self._understand(packet)
        except ValueError as exc:
            self.fail(Status.BROKEN_RULE, str(exc))
        finally:
            packet.close()
        return True

    def _understand(self, packet: endpoint.Packet) -> None:
        """Do what a message on the link's socket says.

        Raises:
            ValueError: No honest peer sends it.
        """
        data, descriptors = packet.data, packet.descriptors
        number = len(self._peer_arenas)
        if not data:
            self.fail(Status.PEER_GONE, "the peer has closed its end")
        elif data == _BELL and not descriptors and not packet.truncated:
            if self._outbox is not None:
                self._outbox.flush()
        elif data == bytes((endpoint.ARENA, number)) and number < ARENAS_MAX:
            self._peer_arenas.append(_map_next_arena(packet, self._inodes()))
        else:
            text = f"message {data[:8].hex()} with {len(descriptors)} descriptors"
            raise ValueError(text)

    def _ring(self) -> None:
        if self._socket is not None:
            try:
                self._socket.send(_BELL, _QUIETLY)
            except OSError:
                # The queue is full, so that the peer has something to wake it; or the
                # peer is gone, which the socket tells.
                return

    # --- going down ----------------------------------------------------------------

    def fail(self, status: Status, text: str) -> None:
        """Begin to go down; the next poll ends it. The first reason counts."""
        if self.ending is None and self.state is LinkState.UP:
            self.ending = (status, text)
            self._stop_posts()
            self.device.link_ends(self)

    def end(self) -> Completion:
        """Go down, after everything that arrived was taken."""
        assert self.ending is not None
        status, text = self.ending
        self.state = LinkState.DOWN
        self._release()
        return Completion(CompletionKind.DOWN, self, status, payload=text)

    def _stop_posts(self) -> None:
        self.__dict__.pop("publish", None)
        self.__dict__.pop("post_write", None)
        self.__dict__.pop("flush", None)

    def _release(self) -> None:
        """Give back everything of this link but our own control arena."""
        self.is_up = False
        self._stop_posts()
        device = self.device
        device.remove_link(self)
        if not device.forked and self._socket is not None:
            device.unwatch(self._socket.fileno())
        self._close_descriptors()
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None
        self._unmap_peers()

    def _unmap_peers(self) -> None:
        """Give up the peer's memory; if we are the last, its pages are freed by us."""
        every = (*self._peer_arenas, self._peer_control)
        peers = [memory for memory in every if memory is not None]
        self._peer_arenas.clear()
        self._peer_control = None
        is_large = sum(map(len, peers)) > _UNMAPPED_HERE_BYTES
        for memory in peers:
            if not (is_large and unmap_elsewhere(memory)):
                is_unmapped = unmap(memory)
                # Nobody but this link ever had a view of the peer's memory.
                assert is_unmapped

    def _close_descriptors(self) -> None:
        if self._socket is not None:
            endpoint.close(self._socket)
            self._socket = None

    def close(self, *, linger: bool = False) -> None:
        """Close; the peer gets DOWN. Idempotent; see `QueuePair.close`."""
        del linger  # nothing is tried again here
        if self.state is LinkState.CLOSED:
            return
        if self._outbox is not None and self.ending is None and not self.device.forked:
            self._outbox.send_held()
        self.state = LinkState.CLOSED
        self._release()
        self.inbox.close()
        self._control.close()
        self.domain.forget_queue_pair(self)

    def after_fork_in_child(self) -> None:
        """Let go of what would hide the parent's death from its peer."""
        self._stop_posts()
        self.is_up = False
        self._close_descriptors()


def _map_next_arena(packet: endpoint.Packet, ours: frozenset[int]) -> mmap.mmap | None:
    """Map the arena of an arena message; None when we have not the means.

    Then only the connections suffer that use this arena.
    """
    count = len(packet.descriptors)
    if packet.truncated and count == 0:
        return None  # no descriptor was left for it
    if packet.truncated or count != 1:
        text = f"{count} descriptors with an arena message"
        raise ValueError(text)
    try:
        return map_peer_arena(packet.descriptors[0], ours=ours)
    except OSError:
        return None


def _sending_failed(exc: OSError, operation: str) -> FabricError:
    if is_shortage(exc):
        return no_memory(exc, operation)
    return FabricError(operation, Status.PEER_GONE.name, str(exc))
