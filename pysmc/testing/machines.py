"""A hypothesis state machine: two cores against a queue of bytes, in any order.

`TwoCores` writes, reads, delivers, waits, finishes, closes, aborts and cuts links at
both ends of several connections, as hypothesis chooses. The stream is coded by
position: byte n of a direction follows from n, so a byte that is lost, doubled or moved
shows at once. The model knows nothing of cursors: it counts what was written, what was
read, and who said that it had finished. Needs ``hypothesis``::

    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(TwoCores)

Subclass it to change the pair, or to add rules of your own.

Source: RFC 7609 section 4.7 (data) and 4.8 (close).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pysmc.errors import LocalProtocolError
from pysmc.testing.pair import CorePair, PairEnd

if TYPE_CHECKING:
    from pysmc.core.connection import Connection

__all__ = ["Side", "Stream", "TwoCores", "stream"]

SIDES = st.sampled_from([0, 1])
SIZES = st.integers(1, 40_000) | st.sampled_from([1, 2047, 2048, 8192, 16383, 16384])


PERIOD = 65521
CODED = bytes((n * 7 + (n >> 8) * 13) & 0xFF for n in range(PERIOD)) * 3
MIRRORED = bytes(255 - byte for byte in CODED)


def stream(side: int, start: int, count: int) -> bytes:
    """Give what a side writes at some place of its stream.

    Args:
        side: 0 or 1.
        start: Number of the first byte.
        count: How many, up to 128 KiB.
    """
    at = start % PERIOD
    return (MIRRORED if side else CODED)[at : at + count]


@dataclass(slots=True)
class Side:
    """What the model knows of one end."""

    written: int = 0
    read: int = 0
    done: bool = False
    """Said that it finished writing."""
    over: bool = False
    """Closed, aborted, or lost its link: what follows no longer counts."""


@dataclass(slots=True)
class Stream:
    """One connection: its two ends in the core and in the model."""

    connections: tuple[Connection, Connection]
    sides: tuple[Side, Side] = field(default_factory=lambda: (Side(), Side()))
    is_broken: bool = False
    """The link was cut, or somebody aborted: only a prefix is promised."""


class TwoCores(RuleBasedStateMachine):
    """Rules for both ends and for what is between them.

    Attributes:
        newest_only: Whether the fabric delivers only the newest update.
        publish_later: Whether a publish completes later.
    """

    newest_only = False
    publish_later = False

    def make_pair(self) -> CorePair:
        """Make the two cores; override it for others."""
        return CorePair(newest_only=self.newest_only, publish_later=self.publish_later)

    @initialize()
    def connect(self) -> None:
        """Begin with one connection."""
        self.pair = self.make_pair()
        self.streams: list[Stream] = []
        self.open_another(0)

    def end(self, side: int) -> PairEnd:
        """Give one of the two ends."""
        return self.pair.ends[side]

    def pick(self, which: int) -> Stream:
        """Give one of the connections."""
        return self.streams[which % len(self.streams)]

    @precondition(lambda self: len(self.streams) < 4)
    @rule(opener=SIDES)
    def open_another(self, opener: int) -> None:
        """Connect once more, from either end."""
        # What is broken has to be known, or the handshake may meet it half way.
        self.pair.drive_bounded(5000)
        opened = self.pair.establish(self.end(opener))
        first, second = opened if opener == 0 else opened[::-1]
        self.streams.append(Stream((first, second)))

    @rule(which=st.integers(0, 3), side=SIDES, size=SIZES)
    def write(self, which: int, side: int, size: int) -> None:
        """Write as much as there is room for."""
        it = self.pick(which)
        mine, connection = it.sides[side], it.connections[side]
        data = stream(side, mine.written, size)
        peer_ended = connection.peer_closed or connection.peer_aborted
        if peer_ended:
            assert self.pair.write(self.end(side), connection, data) == 0
            return
        if mine.done or connection.we_ended:
            try:
                self.pair.write(self.end(side), connection, data)
            except LocalProtocolError:
                return
            message = "a write after the end of writing was taken"
            raise AssertionError(message)
        count = self.pair.write(self.end(side), connection, data)
        mine.written += count
        note(f"{side} wrote {count} of {size}")

    @rule(which=st.integers(0, 3), side=SIDES, size=SIZES)
    def read(self, which: int, side: int, size: int) -> None:
        """Read, and compare with what was written there."""
        it = self.pick(which)
        mine, connection = it.sides[side], it.connections[side]
        data = self.pair.read(self.end(side), connection, size)
        assert data == stream(1 - side, mine.read, len(data))
        mine.read += len(data)
        assert mine.read <= it.sides[1 - side].written
        promised = not it.is_broken and not mine.over
        if connection.peer_done and not connection.readable and promised:
            assert it.sides[1 - side].done
            assert mine.read == it.sides[1 - side].written

    @rule(count=st.integers(1, 6), data=st.data())
    def deliver(self, count: int, data: st.DataObject) -> None:
        """Deliver some of what is on its way, in any order."""
        for _ in range(count):
            choices = self.pair.pending()
            if not choices:
                return
            self.pair.step(choices[data.draw(st.integers(0, len(choices) - 1))])

    @rule()
    def deliver_all(self) -> None:
        """Deliver everything."""
        self.pair.drive_bounded(2000)

    @rule(seconds=st.sampled_from([0.1, 2.0, 11.0, 35.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.pair.advance(seconds)

    @rule(which=st.integers(0, 3), side=SIDES)
    def shutdown_write(self, which: int, side: int) -> None:
        """Finish writing."""
        it = self.pick(which)
        it.sides[side].done = True
        self.pair.shutdown_write(self.end(side), it.connections[side])

    @rule(which=st.integers(0, 3), side=SIDES)
    def close(self, which: int, side: int) -> None:
        """Close both ways."""
        it = self.pick(which)
        mine, connection = it.sides[side], it.connections[side]
        if connection.readable or connection.peer_aborted:
            it.is_broken = True
        mine.done = mine.over = True
        self.pair.close(self.end(side), connection)

    @rule(which=st.integers(0, 3), side=SIDES)
    def abort(self, which: int, side: int) -> None:
        """Abort."""
        it = self.pick(which)
        it.is_broken = True
        it.sides[side].done = it.sides[side].over = True
        self.pair.abort(self.end(side), it.connections[side])

    @rule(which=st.integers(0, 3), side=st.sampled_from([0, 1, None]))
    def cut_link(self, which: int, side: int | None) -> None:
        """Let the link under a connection fail, for one end or both."""
        connection = self.pick(which).connections[side or 0]
        ends = () if side is None else (self.end(side),)
        group = connection.group
        self.pair.cut_link(connection.link, *ends)
        for it in self.streams:
            if it.connections[side or 0].group is group:
                it.is_broken = True

    @invariant()
    def nothing_is_written_outside(self) -> None:
        """No write leaves the peer's memory."""
        assert self.pair.faults == []

    @invariant()
    def unread_bytes_fit(self) -> None:
        """No more is unread than the element holds, and nobody is called a liar."""
        for it in self.streams:
            for side, connection in zip(it.sides, it.connections, strict=True):
                assert 0 <= connection.readable <= connection.rmbe_bytes
                if not it.is_broken and not side.over:
                    assert connection.error is None

    def teardown(self) -> None:
        """Read everything that can still come; what was promised has to be there."""
        self.pair.drive_bounded(5000)
        for it in self.streams:
            for side, connection in enumerate(it.connections):
                mine, theirs = it.sides[side], it.sides[1 - side]
                while data := self.pair.read(self.end(side), connection, 1 << 20):
                    assert data == stream(1 - side, mine.read, len(data))
                    mine.read += len(data)
                    self.pair.drive_bounded(5000)
                if not it.is_broken and not mine.over:
                    assert mine.read == theirs.written
                    assert connection.peer_done == theirs.done
        self.pair.shutdown()
