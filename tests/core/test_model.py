"""Two cores against a queue of bytes, in whatever order things happen.

The stream is coded by position: byte n of a direction follows from n, so a byte that is
lost, doubled or moved shows at once. The model knows nothing of cursors: it counts what
was written, what was read, and who said that it had finished.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pysmc.errors import LocalProtocolError
from pysmc.testing.pair import CorePair, PairEnd

if TYPE_CHECKING:
    from pysmc.core.connection import Connection

SIDES = st.sampled_from([0, 1])
SIZES = st.integers(1, 40_000) | st.sampled_from([1, 2047, 2048, 8192, 16383, 16384])


PERIOD = 65521
CODED = bytes((n * 7 + (n >> 8) * 13) & 0xFF for n in range(PERIOD)) * 3
MIRRORED = bytes(255 - byte for byte in CODED)


def stream(side: int, start: int, count: int) -> bytes:
    """Give bytes ``start`` to ``start + count`` of what a side writes."""
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
    """Rules for both ends and for what is between them."""

    newest_only = False
    publish_later = False

    @initialize()
    def connect(self) -> None:
        self.pair = CorePair(
            newest_only=self.newest_only, publish_later=self.publish_later
        )
        self.streams: list[Stream] = []
        self.open_another(0)

    def end(self, side: int) -> PairEnd:
        return self.pair.ends[side]

    def pick(self, which: int) -> Stream:
        return self.streams[which % len(self.streams)]

    @precondition(lambda self: len(self.streams) < 4)
    @rule(opener=SIDES)
    def open_another(self, opener: int) -> None:
        # What is broken has to be known, or the handshake may meet it half way.
        self.pair.drive_bounded(5000)
        opened = self.pair.establish(self.end(opener))
        first, second = opened if opener == 0 else opened[::-1]
        self.streams.append(Stream((first, second)))

    @rule(which=st.integers(0, 3), side=SIDES, size=SIZES)
    def write(self, which: int, side: int, size: int) -> None:
        it = self.pick(which)
        mine, connection = it.sides[side], it.connections[side]
        data = stream(side, mine.written, size)
        peer_ended = connection.peer_closed or connection.peer_aborted
        if peer_ended:
            assert self.pair.write(self.end(side), connection, data) == 0
            return
        if mine.done or connection.we_ended:
            with pytest.raises(LocalProtocolError):
                self.pair.write(self.end(side), connection, data)
            return
        count = self.pair.write(self.end(side), connection, data)
        mine.written += count
        note(f"{side} wrote {count} of {size}")

    @rule(which=st.integers(0, 3), side=SIDES, size=SIZES)
    def read(self, which: int, side: int, size: int) -> None:
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
        for _ in range(count):
            choices = self.pair.pending()
            if not choices:
                return
            self.pair.step(choices[data.draw(st.integers(0, len(choices) - 1))])

    @rule()
    def deliver_all(self) -> None:
        self.pair.drive_bounded(2000)

    @rule(seconds=st.sampled_from([0.1, 2.0, 11.0, 35.0]))
    def wait(self, seconds: float) -> None:
        self.pair.advance(seconds)

    @rule(which=st.integers(0, 3), side=SIDES)
    def shutdown_write(self, which: int, side: int) -> None:
        it = self.pick(which)
        it.sides[side].done = True
        self.pair.shutdown_write(self.end(side), it.connections[side])

    @rule(which=st.integers(0, 3), side=SIDES)
    def close(self, which: int, side: int) -> None:
        it = self.pick(which)
        mine, connection = it.sides[side], it.connections[side]
        if connection.readable or connection.peer_aborted:
            it.is_broken = True
        mine.done = mine.over = True
        self.pair.close(self.end(side), connection)

    @rule(which=st.integers(0, 3), side=SIDES)
    def abort(self, which: int, side: int) -> None:
        it = self.pick(which)
        it.is_broken = True
        it.sides[side].done = it.sides[side].over = True
        self.pair.abort(self.end(side), it.connections[side])

    @rule(which=st.integers(0, 3), side=st.sampled_from([0, 1, None]))
    def cut_link(self, which: int, side: int | None) -> None:
        connection = self.pick(which).connections[side or 0]
        ends = () if side is None else (self.end(side),)
        group = connection.group
        self.pair.cut_link(connection.link, *ends)
        for it in self.streams:
            if it.connections[side or 0].group is group:
                it.is_broken = True

    @invariant()
    def nothing_is_written_outside(self) -> None:
        assert self.pair.faults == []

    @invariant()
    def unread_bytes_fit(self) -> None:
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


@pytest.mark.parametrize("newest_only", [False, True], ids=["every", "newest"])
@pytest.mark.parametrize("publish_later", [False, True], ids=["at once", "later"])
def test_two_cores_and_a_queue_of_bytes(newest_only: bool, publish_later: bool) -> None:
    class Machine(TwoCores):
        pass

    Machine.newest_only = newest_only
    Machine.publish_later = publish_later
    run_state_machine_as_test(
        Machine,
        settings=settings(
            stateful_step_count=25, deadline=None, report_multiple_bugs=False
        ),
    )
