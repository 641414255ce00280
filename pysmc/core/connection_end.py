"""What a connection knows of its two ends, and how each of them closes.

Decides what may still be said and expected once an end has finished, closed, aborted or
was lost; the tables are those of `pysmc.core.close`. How bytes move is the business of
`pysmc.core.connection`, which builds on this.

Reference: RFC 7609 section 4.8; kernel counterpart: smc_close.c.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from pysmc.core.close import ENDED, JOINT, SIDE, CloseInput, Side
from pysmc.core.cursor import Ring
from pysmc.core.tuning import AS_SPECIFIED
from smcproto.constants import ConnectionStateFlags, ProducerFlags

if TYPE_CHECKING:
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup
    from pysmc.core.rmb import Rmb
    from pysmc.core.roles import Role
    from pysmc.core.tuning import Tuning
    from pysmc.errors import SmcError

__all__ = ["ABORTED", "BLOCKED", "CLOSED", "DONE", "EndingConnection", "Update"]

Update = tuple[int, int, int, int, int]
"""(sequence, alert token, producer, consumer, flags): `pysmc.fabric.base.Update`."""

# Plain ints: IntFlag arithmetic costs microseconds, and this runs for every update.
BLOCKED = int(ProducerFlags.WRITER_BLOCKED) << 8
DONE = int(ConnectionStateFlags.SENDING_DONE)
CLOSED = int(ConnectionStateFlags.CLOSED)
ABORTED = int(ConnectionStateFlags.ABNORMAL_CLOSE)


class EndingConnection:
    """What both ends of a connection know of each other, and how each closes.

    Args:
        role: Which end of the TCP connection we are.
        group: The link group that carries it.
        link: The link that carries it now.
        rmb: Our memory; one connection each, as Linux does it.
        alert_token: What the peer has to put into its updates, 32 bits, not 0.
        sndbuf_bytes: Most bytes that may be published but not completed.
        tuning: Where counters begin, and how small elements are.
    """

    __slots__ = (
        "__weakref__",
        "_consumer",
        "_early",
        "_final_taken",
        "_flags",
        "_least_claim",
        "_may_write",
        "_ours",
        "_ours_ended",
        "_peer",
        "_peer_consumer",
        "_peer_ended",
        "_peer_flags",
        "_peer_producer",
        "_peer_ring",
        "_peer_sequence",
        "_posted",
        "_producer",
        "_ring",
        "_rx_consumed",
        "_rx_produced",
        "_rx_reported",
        "_sequence",
        "_sndbuf_bytes",
        "_tuning",
        "_tx_acked",
        "_tx_announced",
        "_tx_completed",
        "_tx_produced",
        "_update_step",
        "alert_token",
        "empty_updates",
        "error",
        "group",
        "handle",
        "is_established",
        "is_loss_told",
        "link",
        "peer_token",
        "remote_address",
        "remote_rkey",
        "rmb",
        "role",
        "suspect",
        "update_due",
    )

    def __init__(
        self,
        *,
        role: Role,
        group: LinkGroup,
        link: Link,
        rmb: Rmb,
        alert_token: int,
        sndbuf_bytes: int,
        tuning: Tuning = AS_SPECIFIED,
    ) -> None:
        self.role = role
        self.group = group
        self.link = link
        self.rmb = rmb
        self.handle: Any = None
        self.alert_token = alert_token
        self.error: SmcError | None = None
        # Handed out to the application; before that nobody is told of its end.
        self.is_established = False
        # An event has told that it is lost: no other end tells that once more.
        self.is_loss_told = False
        # True when the peer broke a rule: it may go on writing into our memory.
        self.suspect = False

        self._tuning = tuning
        self._ring = Ring(tuning.element(rmb.length))
        begin = tuning.first_wrap * self._ring.capacity
        # Tell the peer of read bytes when an eighth of the element is free again: it
        # never runs dry, and few updates are needed (performance: flat from 1/2 on).
        self._update_step = max(1, self._ring.capacity >> 3)
        self._rx_produced = begin
        self._rx_consumed = begin
        self._rx_reported = begin

        self._peer_ring: Ring | None = None
        self.peer_token = 0
        self.remote_rkey = 0
        self.remote_address = 0
        self._sndbuf_bytes = sndbuf_bytes
        self._tx_produced = 0
        self._tx_acked = 0
        self._tx_completed = 0
        # (sequence, position) of the publishes whose completion is to come.
        self._posted: deque[tuple[int, int]] = deque()

        self.update_due = False
        self._sequence = tuning.first_sequence
        self._flags = 0
        self._final_taken = False
        self._peer_sequence = tuning.first_sequence
        self._peer_producer = self._ring.pack(begin)
        self._peer_consumer = 0
        self._peer_flags = 0
        self._early: Update | None = None
        # Updates that brought neither bytes, nor space, nor an end.
        self.empty_updates = 0
        # The cursors as they were announced last, packed: usually one of them stands.
        self._tx_announced = 0
        self._producer = 0
        self._consumer = self._ring.pack(begin)
        self._least_claim = 0
        self._ours = Side.OPEN
        self._peer = Side.OPEN
        # What follows from the two sides. Looking up an Enum in a set costs more than
        # all the rest of a claim.
        self._may_write = True
        self._ours_ended = False
        self._peer_ended = False

    def __repr__(self) -> str:
        empty = f" empty_updates={self.empty_updates}" if self.empty_updates else ""
        return (
            f"<Connection {self.alert_token:08x} {self.state}"
            f" unread={self.readable} unacked={self._tx_produced - self._tx_acked}"
            f"{empty}>"
        )

    # What is there

    @property
    def rmbe_bytes(self) -> int:
        """Size of our element in bytes."""
        return self._ring.size

    @property
    def peer_rmbe_bytes(self) -> int:
        """Size of the peer's element in bytes, 0 while it is unknown."""
        return 0 if self._peer_ring is None else self._peer_ring.size

    @property
    def state(self) -> str:
        """The RFC's name of the joint close state."""
        return JOINT[self._ours, self._peer]

    @property
    def dirty_bytes(self) -> int:
        """Bytes from the beginning of our RMB that the peer has written."""
        return (
            self._ring.size
            if self.suspect
            else min(self._rx_produced + self._ring.base, self._ring.size)
        )

    @property
    def readable(self) -> int:
        """Unread bytes in our element."""
        return self._rx_produced - self._rx_consumed

    @property
    def writable(self) -> int:
        """Bytes that can be claimed now."""
        ring = self._peer_ring
        if ring is None or self._peer_ended or not self._may_write:
            return 0
        produced = self._tx_produced
        space = ring.capacity - (produced - self._tx_acked)
        unsent = self._sndbuf_bytes - (produced - self._tx_completed)
        return space if space < unsent else unsent

    @property
    def oldest_post(self) -> tuple[int, int] | None:
        """What names the oldest publish that has not completed, if there is one."""
        return self._posted[0] if self._posted else None

    @property
    def peer_done(self) -> bool:
        """Whether the peer said that no more bytes will come, whatever came after."""
        return self._peer in {Side.DONE, Side.CLOSED} or self._peer_flags & DONE > 0

    @property
    def peer_closed(self) -> bool:
        """Whether the peer has closed both ways: what we write goes nowhere."""
        return self._peer is Side.CLOSED

    @property
    def peer_aborted(self) -> bool:
        """Whether the peer gave up, or is lost."""
        return self._peer is Side.ABORTED

    @property
    def we_ended(self) -> bool:
        """Whether we have closed or aborted."""
        return self._ours_ended

    @property
    def is_open(self) -> bool:
        """Whether neither end has closed or aborted."""
        return not self._ours_ended and not self._peer_ended

    @property
    def is_ended(self) -> bool:
        """Whether both ends have closed or aborted and ours was said."""
        return self._ours_ended and self._peer_ended and self._final_taken

    # The end

    def shutdown_write(self) -> None:
        """Say that no more bytes will come (D). Publish afterwards. Idempotent.

        Reference: RFC 7609 section 4.8.1.
        """
        self._we_say(CloseInput.DONE)
        if self._ours is Side.DONE and not self._flags & DONE:
            self._flags = self._flags & ~BLOCKED | DONE
            self._want_update()

    def close(self) -> None:
        """Close both ways (C); with unread bytes it is an abort, as TCP resets then.

        Publish afterwards, then let `Endpoint.reap` look. Idempotent.

        Reference: RFC 7609 section 4.8.1; kernel counterpart: smc_close.c.
        """
        if self.readable or self._peer is Side.ABORTED:
            self.abort()
            return
        self._end(CloseInput.CLOSED, CLOSED)

    def abort(self) -> None:
        """End it abnormally (A). Publish afterwards, then let `Endpoint.reap` look.

        Reference: RFC 7609 section 4.8.2.
        """
        self._end(CloseInput.ABORTED, ABORTED)

    def peer_lost(self, error: SmcError) -> None:
        """Abort, and expect nothing more of a peer that broke a rule.

        Publish afterwards. The memory is not used again, because the peer may go on
        writing into it.
        """
        self.error = error
        self.suspect = True
        self._peer_says(CloseInput.ABORTED)
        self.abort()

    def link_lost(self, error: SmcError) -> None:
        """Record that no link is left: nothing can be said any more."""
        if self.error is None:
            self.error = error
        self._we_say(CloseInput.ABORTED)
        self._peer_says(CloseInput.ABORTED)
        self._final_taken = True
        self.update_due = False
        self._posted.clear()

    def _end(self, happened: CloseInput, flag: int) -> None:
        if self._ours_ended:
            return
        self._we_say(happened)
        self._flags = self._flags & ~BLOCKED | flag
        if self._peer_ring is None:
            # The peer has no name for this connection yet: there is nobody to tell.
            self._final_taken = True
            return
        self._want_update()

    def _we_say(self, happened: CloseInput) -> None:
        self._ours = SIDE.after(self._ours, happened)
        self._may_write = self._ours is Side.OPEN
        self._ours_ended = self._ours in ENDED

    def _peer_says(self, happened: CloseInput) -> None:
        self._peer = SIDE.after(self._peer, happened)
        self._peer_ended = self._peer in ENDED

    def _want_update(self) -> None:
        # Who has ended reads no more of ours, and its memory may be withdrawn already;
        # only our own end is still said.
        if not self._final_taken and (self._ours_ended or not self._peer_ended):
            self.update_due = True

    def check(self) -> None:
        """Check the invariants that the class names.

        Raises:
            AssertionError: One does not hold; a fault of ours.
        """
        reported, consumed = self._rx_reported, self._rx_consumed
        assert reported <= consumed <= self._rx_produced, self
        assert self._rx_produced - reported <= self._ring.capacity, self
        assert self._tx_acked <= self._tx_produced, self
        assert self._tx_completed <= self._tx_produced, self
        if self._peer_ring is not None:
            unread = self._tx_produced - self._tx_acked
            assert unread <= self._peer_ring.capacity, self
