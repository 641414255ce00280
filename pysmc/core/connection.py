"""One SMC connection: two cursors out, two cursors in.

`Connection` decides how much may be written where, what the peer has to be told, and
what an update of the peer brings. It never touches the memory: it hands out addresses
and offsets, and the driver copies. It does not know states of links or timers; how its
two ends close is in `pysmc.core.connection_end`.

This is the data path, so its methods give plain tuples and not actions. Invariants:

* ``rx_reported <= rx_consumed <= rx_produced <= rx_reported + capacity``
* ``tx_acked <= tx_produced <= tx_acked + peer capacity``
* positions only grow, whatever the peer sends.

The alert token in our updates is the peer's, the one in the peer's is ours.

Reference: RFC 7609 section 4.7 and A.4; kernel counterparts: smc_cdc.c, smc_tx.c,
smc_rx.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pysmc.core.close import CloseInput, Side
from pysmc.core.connection_end import (
    ABORTED,
    BLOCKED,
    CLOSED,
    DONE,
    EndingConnection,
    Update,
)
from pysmc.core.cursor import Ring
from pysmc.core.events import News
from pysmc.errors import LocalProtocolError, RemoteProtocolError
from smcproto.constants import ProducerFlags

if TYPE_CHECKING:
    from pysmc.core.rmb import RToken

__all__ = ["POSTS_MAX", "Connection", "Update", "split_wr_id"]

POSTS_MAX: Final = 64
"""Updates of a connection that a fabric has at once before writes wait for it. Small
ones are put together meanwhile, where each would be two requests to the device."""

_REQUESTED = int(ProducerFlags.CONSUMER_UPDATE_REQUESTED) << 8
_FAILOVER = int(ProducerFlags.FAILOVER_VALIDATION) << 8
_URGENT = int(ProducerFlags.URGENT_PRESENT) << 8
_PROMPT = BLOCKED | _REQUESTED | _URGENT
"""Whatever is consumed is reported at once: a kernel that has sent an urgent byte sends
nothing more until it knows that all was read. It is an ordinary byte of the stream."""
_LASTING = DONE | CLOSED | ABORTED | _URGENT
"""Once said, always so. The kernel takes the mark of an urgent byte back with its next
update, before that byte was read."""


def split_wr_id(wr_id: int) -> tuple[int, int]:
    """Take a publish's wr_id apart, as a completion brings it back.

    Returns:
        (our alert token, sequence of the update).
    """
    return wr_id & 0xFFFFFFFF, wr_id >> 32


class Connection(EndingConnection):
    """The producer and the consumer side of one SMC connection.

    Its arguments are those of `EndingConnection`.
    """

    __slots__ = ()

    def attach_peer(
        self, *, token: RToken, alert_token: int, rmbe_bytes: int, rmbe_index: int = 1
    ) -> None:
        """Learn where the peer's element is; nothing can be written before.

        Args:
            token: The peer's RMB on our link.
            alert_token: What our updates have to carry, 32 bits.
            rmbe_bytes: Size of the peer's element in bytes.
            rmbe_index: Which element of the RMB, counted from 1.

        An update that came earlier counts from now on. Look at the properties
        afterwards: no news is given for it.

        Reference: RFC 7609 section 3.5.2.4 and A.2.2.
        """
        tuning = self._tuning
        self._peer_ring = ring = Ring(tuning.element(rmbe_bytes))
        begin = tuning.first_wrap * ring.capacity
        self._tx_produced = self._tx_acked = self._tx_completed = begin
        self._tx_announced = begin
        self._producer = self._peer_consumer = ring.pack(begin)
        # With less than this free at once, and more on its way, a claim waits.
        self._least_claim = min(ring.capacity, self._sndbuf_bytes) >> 1
        self.peer_token = alert_token
        self.remote_rkey = token.rkey
        self.remote_address = token.virtual_address + rmbe_bytes * (rmbe_index - 1)
        if self._early is not None:
            early, self._early = self._early, None
            self.receive_update(early)

    # Out

    def claim(self, waiting: int, limit: int = 1 << 62) -> tuple[tuple[int, int], ...]:
        """Take space in the peer's element and advance the producer cursor over it.

        Write the bytes, then publish: the update announces them. Claim again only
        after that.

        Args:
            waiting: How many bytes wait to be written in all; decides whether the peer
                is told that the writer is blocked.
            limit: Most bytes to take now.

        Returns:
            At most two (remote address, length) pairs, in order; none when there is
            no space, or too little to be worth an announcement of its own, or
            `POSTS_MAX` updates have yet to complete.

        Raises:
            LocalProtocolError: We have said that we finished writing, to a peer that
                is still there. One that has ended takes nothing, whoever ended it: its
                connections are told of a lost link one after another.

        Reference: RFC 7609 section 4.7.3; kernel counterpart: smc_tx_should_cork().
        """
        ring = self._peer_ring
        if ring is None or self._peer_ended:
            return ()
        if not self._may_write:
            message = "write after the write side was closed"
            raise LocalProtocolError(message, section="RFC 7609 section 4.8.1")
        produced = self._tx_produced
        space = ring.capacity - (produced - self._tx_acked)
        count = self._sndbuf_bytes - (produced - self._tx_completed)
        if space < count:
            count = space
        if waiting < count:
            count = waiting
        if limit < count:
            count = limit
        if waiting >= space:
            # Said as soon as it is so: a receiver may otherwise stay silent until half
            # its buffer is used (Linux does).
            if not self._flags & BLOCKED:
                self._flags |= BLOCKED
                self.update_due = True
        else:
            self._flags &= ~BLOCKED
        if (
            count <= 0
            or len(self._posted) >= POSTS_MAX
            or (count < waiting and count < limit and count < self._least_claim)
        ):
            # Half of what may be on its way still is, or that many updates: so news is
            # sure to come, and a few large pieces cost less than many small ones.
            return ()
        self._tx_produced = produced + count
        self.update_due = True
        address = self.remote_address
        start = produced % ring.capacity
        first = ring.capacity - start
        if count <= first:
            return ((address + ring.base + start, count),)
        return (
            (address + ring.base + start, first),
            (address + ring.base, count - first),
        )

    # In

    def peek(self, limit: int) -> tuple[int, int]:
        """Tell where the next unread bytes are.

        Args:
            limit: Most bytes wanted.

        Returns:
            (offset in the RMB, length) of one contiguous piece; length 0 for nothing.
        """
        ring = self._ring
        start = self._rx_consumed % ring.capacity
        unread = self._rx_produced - self._rx_consumed
        return (
            start + ring.base,
            min(unread, limit, ring.capacity - start),
        )

    def consume(self, count: int) -> bool:
        """Record that the application has taken bytes out of our element.

        Args:
            count: Number of bytes, 0 to `readable`.

        Returns:
            True when an update is due.

        Reference: RFC 7609 section 4.7.2; kernel counterpart: smc_tx_consumer_update.
        """
        consumed = self._rx_consumed + count
        assert consumed <= self._rx_produced, "more consumed than was there"
        self._rx_consumed = consumed
        unreported = consumed - self._rx_reported
        if self._peer is Side.OPEN and (
            unreported >= self._update_step
            or (unreported and self._peer_flags & _PROMPT)
        ):
            self._want_update()
        return self.update_due

    def forget_unread(self) -> None:
        """Give up what was not read: the memory goes to somebody else."""
        self._rx_consumed = self._rx_produced

    # Updates

    def take_post(self) -> tuple[int, int, int, int, int, int, int]:
        """Give the arguments of `QueuePair.publish`; post them at once.

        Returns:
            (rkey, wr_id, sequence, alert token, producer, consumer, flags). The wr_id
            names this very publish: `split_wr_id` takes it apart.

        Call `published` afterwards.
        """
        ring = self._peer_ring
        assert ring is not None, "nothing can be published before the peer is known"
        self.update_due = False
        self._sequence = sequence = (self._sequence + 1) & 0xFFFF
        consumed, produced = self._rx_consumed, self._tx_produced
        if consumed != self._rx_reported:
            self._rx_reported = consumed
            self._consumer = self._ring.pack(consumed)
        if produced != self._tx_announced:
            self._tx_announced = produced
            self._producer = ring.pack(produced)
        if self._ours_ended:
            self._final_taken = True
        return (
            self.remote_rkey,
            sequence << 32 | self.alert_token,
            sequence,
            self.peer_token,
            self._producer,
            self._consumer,
            self._flags,
        )

    def take_update(self) -> Update:
        """Give the five fields of `take_post` that the peer gets."""
        return self.take_post()[2:]

    def published(self, completed: bool) -> None:  # noqa: FBT001 - publish()'s answer
        """Record how the publish went.

        Args:
            completed: True when it completed at once; else `publish_completed` follows.
        """
        if completed:
            # Those before it have completed too, whatever is still to be told of them.
            self._tx_completed = self._tx_produced
        else:
            self._posted.append((self._sequence, self._tx_produced))

    def publish_completed(self, sequence: int | None = None) -> int:
        """Record that a publish has completed.

        Those before it have completed too, whether that was told or not. What is told
        twice, or was never posted, is ignored: drivers have such faults.

        Args:
            sequence: Which one, 16 bits; None for the oldest that is open.
        """
        posted = self._posted
        if not posted:
            return News.NOTHING
        before, was_full = self.writable, len(posted) >= POSTS_MAX
        if sequence is not None and posted[0][0] != sequence:
            if all(entry[0] != sequence for entry in posted):
                return News.NOTHING
            while posted[0][0] != sequence:
                posted.popleft()
        self._tx_completed = max(self._tx_completed, posted.popleft()[1])
        # A claim may be waiting for more, though there was a little.
        grew = before <= self._least_claim and self.writable > before
        is_free = was_full and len(posted) < POSTS_MAX and self.writable > 0
        return News.SPACE if grew or is_free else News.NOTHING

    def receive_update(self, update: Update) -> int:
        """Follow what the peer says.

        Every number is checked against our own state before it is used. A peer that
        breaks a rule has its connection aborted: `error` says which rule.

        Returns:
            What it brought. With `News.PUBLISH` an update of ours is due.

        Reference: RFC 7609 section 4.7 and A.4; kernel counterpart: smc_cdc.c.
        """
        if self._peer_ring is None:
            # The peer may write as soon as it has sent its Confirm, which we may not
            # have parsed yet. A newer update replaces an older one completely.
            if self._early is None or self._is_newer(update, self._early):
                self._early = update
            return News.NOTHING
        if self._peer_ended:
            return News.NOTHING
        sequence, _, producer, consumer, flags = update
        try:
            if flags & _FAILOVER:
                self._validate_failover(sequence)
                return News.NOTHING
            news = self._follow_cursors(producer, consumer)
            if not news and (sequence - self._peer_sequence) & 0xFFFF >= 0x8000:
                # Older than what we know. The cursors decide first, because a mailbox
                # may have skipped more updates than 16 bits can tell apart.
                return News.NOTHING
            self._peer_sequence = sequence
            if flags != self._peer_flags:
                self._peer_flags = flags | self._peer_flags & _LASTING
                news |= self._follow_flags(flags)
        except RemoteProtocolError as error:
            self.peer_lost(error)
            return News.ABORTED | News.PUBLISH if self.update_due else News.ABORTED
        if not news:
            self.empty_updates += 1
        if (
            self._peer_flags & _PROMPT
            and self._rx_consumed != self._rx_reported
            and self._peer is Side.OPEN
        ):
            self._want_update()
        return news | News.PUBLISH if self.update_due else news

    def follow_consumer(self, consumer: int) -> bool:
        """Follow the peer's consumer cursor ahead of the update that carries it.

        Args:
            consumer: 48 bits. One that breaks a rule is left for that update.

        Returns:
            True when there is more room now. No news will tell of it again.
        """
        ring = self._peer_ring
        if ring is None or self._peer_ended or consumer == self._peer_consumer:
            return False
        allowed = self._tx_produced - self._tx_acked
        try:
            position = ring.advance(self._tx_acked, consumer, allowed, "consumer")
        except RemoteProtocolError:
            return False
        if position == self._tx_acked:
            return False
        self._tx_acked = position
        self._peer_consumer = consumer
        return True

    def _is_newer(self, update: Update, early: Update) -> bool:
        """Tell which of two updates counts, of a peer that is not known yet.

        Devices repeat what they have delivered. As later on, cursors decide first.
        """
        before, now = (self._early_bytes(each) for each in (early, update))
        if before is None or now is None:
            return before is not None
        return now > before or (
            now == before and (update[0] - early[0]) & 0xFFFF < 0x8000
        )

    def _early_bytes(self, update: Update) -> int | None:
        """Tell how far a peer that is not known yet has written; None if it lies.

        A lie stays, so that the peer is told as soon as it is known.
        """
        begin, capacity = self._rx_produced, self._ring.capacity
        try:
            return self._ring.advance(begin, update[2], capacity, "producer")
        except RemoteProtocolError:
            return None

    def _follow_cursors(self, producer: int, consumer: int) -> int:
        news = News.NOTHING
        if producer != self._peer_producer:
            allowed = self._rx_reported + self._ring.capacity - self._rx_produced
            position = self._ring.advance(
                self._rx_produced, producer, allowed, "producer"
            )
            if position != self._rx_produced:
                if self._peer is not Side.OPEN:
                    message = "peer wrote after it had said that it finished writing"
                    raise RemoteProtocolError(message, section="RFC 7609 section 4.8.1")
                self._rx_produced = position
                self._peer_producer = producer
                news = News.DATA
        if consumer != self._peer_consumer:
            ring = self._peer_ring
            assert ring is not None
            allowed = self._tx_produced - self._tx_acked
            position = ring.advance(self._tx_acked, consumer, allowed, "consumer")
            if position != self._tx_acked:
                self._tx_acked = position
                self._peer_consumer = consumer
                news |= News.SPACE
        return news

    def _follow_flags(self, flags: int) -> int:
        if flags & ABORTED:
            # Flags accumulate, and the update that said D alone may have been skipped.
            self._peer_says(CloseInput.ABORTED)
            return News.ABORTED | News.DONE if flags & DONE else News.ABORTED
        if flags & CLOSED:
            self._peer_says(CloseInput.CLOSED)
            return News.DONE | News.CLOSED
        if flags & DONE and self._peer is Side.OPEN:
            self._peer_says(CloseInput.DONE)
            return News.DONE
        return News.NOTHING

    def _validate_failover(self, sequence: int) -> None:
        """Check that nothing was lost with the link that the peer has left.

        Reference: RFC 7609 section 4.6.1. There is one link, so only a peer that lost
        an update can get here; replay belongs to the failover that is not built yet.
        """
        if 0 < (sequence - self._peer_sequence) & 0xFFFF < 0x8000:
            message = (
                f"peer moved to this link after update {sequence}, which never came;"
                f" the last one was {self._peer_sequence}"
            )
            raise RemoteProtocolError(message, section="RFC 7609 section 4.6.1")
