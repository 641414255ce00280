"""The model of the data path: two real connections, and everything that can happen.

Every interleaving of writing, reading, publishing, delivering, closing and dying is
explored breadth first; a state that was seen before is not entered again. Wrap numbers
have two bits here, so that passing the last of them happens all the time; otherwise the
code is the library's. What is compared with it is a model of the cursors that was
written from the wire format alone: a pair (wrap, count) that advances by its rule.

What holds in every state: a byte is read once, in order, from where it was written, and
nothing unread is written over (P-A); the end of the stream is told only after the last
byte, and only if the peer said so (P-B); whoever waits is woken; memory is given back
only when nobody writes to it any more; no honest peer is taken for a liar.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pysmc.core.close import Side
from pysmc.core.connection import Connection
from pysmc.core.events import News
from pysmc.core.rmb import Rmb, RToken
from pysmc.core.roles import Role
from pysmc.core.tuning import AS_SPECIFIED, Tuning
from pysmc.errors import ConnectionReset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup

State = tuple[Any, ...]
Action = tuple["Callable[..., None]", int, int]
"""What happens, at which end, and how many bytes."""
Cursor = tuple[int, int]
SIDES = tuple(Side)


# The independent model: cursors as the wire has them


class Element(NamedTuple):
    """The cursors of one element."""

    size: int
    wrap_bits: int

    @property
    def period(self) -> int:
        """Positions that the cursors can tell apart."""
        return self.size << self.wrap_bits

    def advance(self, at: Cursor, count: int) -> Cursor:
        """Advance a cursor: passing the end adds one to the wrap number."""
        wrap, offset = at
        offset += count
        if offset >= self.size:
            offset -= self.size
            wrap = (wrap + 1) % (1 << self.wrap_bits)
        return wrap, offset

    def distance(self, old: Cursor, new: Cursor) -> int:
        """Tell how many bytes lie between two cursors, at most one element."""
        if old[0] == new[0]:
            return new[1] - old[1]
        return self.size - old[1] + new[1]


def unpacked(packed: int) -> Cursor:
    return packed >> 32, packed & 0xFFFFFFFF


@dataclass(slots=True)
class End:
    """What the model knows of one end; its fields are part of the state."""

    written: Cursor = (0, 0)
    """The next byte that this end writes at the other."""
    read: Cursor = (0, 0)
    """The next byte that this end reads."""
    heard: Cursor = (0, 0)
    """How far the peer has written, as far as this end was told."""
    acked: Cursor = (0, 0)
    """How far the peer has read, as far as this end was told."""
    pending: int = 0
    """Bytes of a write that found no room; tried again when there is news of some."""
    said: int = 0
    """The state flags that it said last."""
    is_dead: bool = False
    """Its process is gone."""


class Mode(NamedTuple):
    """What is explored."""

    size: int = 4
    """Bytes of an element."""
    wrap_bits: int = 1
    """Bits of a wrap number; the wire has 16."""
    newest_only: bool = False
    """A fabric that keeps only the newest update."""
    queue: int = 1
    """Updates on their way to one end; with more, an end waits before it says more."""
    writes: tuple[int, ...] = (1, 2, 3, 4)
    reads: tuple[int, ...] = (1, 2, 3, 4)
    waits: bool = True
    """Writers also write more than there is room for, and wait with the rest."""
    closes: bool = True
    """Ends finish, close, abort and die."""
    writers: tuple[int, ...] = (0, 1)
    later: bool = False
    """A publish completes later."""
    sndbuf: int = 1 << 20
    """Most bytes that may be published and not completed."""
    doubles: bool = False
    """An update may be delivered, and delivered once more."""


# Two real connections, and how their state is taken out and put back

LOST = ConnectionReset("the other end died")


PLAIN_NAMES = (
    "_flags", "_peer_flags", "_producer", "_consumer", "_peer_producer",
    "_peer_consumer", "update_due", "_final_taken", "_may_write", "_ours_ended",
    "_peer_ended",
)  # fmt: skip
_PLAIN = attrgetter(*PLAIN_NAMES)
_END = attrgetter("written", "read", "heard", "acked", "pending", "said", "is_dead")
CONSTANT = {
    "__weakref__", "_early", "_least_claim", "_peer_ring", "_ring", "_sndbuf_bytes",
    "_tuning", "_update_step", "alert_token", "group", "handle", "is_established",
    "is_loss_told", "link", "peer_token", "remote_address", "remote_rkey", "rmb",
    "role", "suspect", "empty_updates",
}  # fmt: skip
"""Attributes of a connection that stay as they are here."""


def bare(mode: Mode, tuning: Tuning) -> Connection:
    group = cast("LinkGroup", None)
    connection = Connection(
        role=Role.CLIENT,
        group=group,
        link=cast("Link", None),
        rmb=Rmb(group, mode.size),
        alert_token=7,
        sndbuf_bytes=mode.sndbuf,
        tuning=tuning,
    )
    connection.attach_peer(token=RToken(1, 0), alert_token=7, rmbe_bytes=mode.size)
    connection.is_established = True
    return connection


class Broken(AssertionError):
    """A promise is broken; the text says which, and the path says how."""


def require(holds: object, what: str) -> None:
    if not holds:
        raise Broken(what)


class Model:
    """Two ends, and everything that can happen next."""

    def __init__(self, mode: Mode, tuning: Tuning = AS_SPECIFIED) -> None:
        self.mode = mode
        self.element = Element(mode.size, mode.wrap_bits)
        self.ends = (End(), End())
        self.real = (bare(mode, tuning), bare(mode, tuning))
        for each in self.real:
            for ring in (each._ring, each._peer_ring):
                assert ring is not None
                ring.modulus = ring.capacity << mode.wrap_bits
        self.queues: tuple[deque[Any], deque[Any]] = (deque(), deque())
        """Updates on their way to each end."""
        first = (tuning.first_wrap % (1 << mode.wrap_bits), 0)
        for end in self.ends:
            end.written = end.read = end.heard = end.acked = first

    # States

    def take_out(self) -> State:
        """Give the state, with positions modulo what cursors can tell apart."""
        one, other = self._side(0), self._side(1)
        if len(self.mode.writers) > 1 and other < one:
            # The two ends are alike, so a state and its mirror image are one.
            return other, one
        return one, other

    def _side(self, side: int) -> State:
        mine, peer, end = self.real[side], self.real[1 - side], self.ends[side]
        period = self.element.period
        tx = mine._tx_acked // period * period
        rx = peer._tx_acked // period * period
        sequence = mine._sequence
        behind = (sequence - peer._peer_sequence) & 0xFFFF
        if self.mode.newest_only:
            # Only who is newer counts; how many updates were skipped has no end.
            behind = min(behind, 1)
        ahead = tuple(
            ((update[0] - sequence) & 0xFFFF, *update[2:])
            for update in self.queues[1 - side]
        )
        return (
            mine._tx_acked - tx,
            mine._tx_completed - tx,
            mine._tx_announced - tx,
            mine._tx_produced - tx,
            mine._rx_produced - rx,
            mine._rx_consumed - rx,
            mine._rx_reported - rx,
            *_PLAIN(mine),
            SIDES.index(mine._ours),
            SIDES.index(mine._peer),
            mine.error is not None,
            behind,
            tuple(
                ((each[0] - sequence) & 0xFFFF, each[1] - tx) for each in mine._posted
            ),
            ahead,
            _END(end),
        )

    def put_back(self, state: State) -> None:
        for side, values in enumerate(state):
            mine, end = self.real[side], self.ends[side]
            (
                mine._tx_acked, mine._tx_completed, mine._tx_announced,
                mine._tx_produced, mine._rx_produced, mine._rx_consumed,
                mine._rx_reported, mine._flags, mine._peer_flags, mine._producer,
                mine._consumer, mine._peer_producer, mine._peer_consumer,
                mine.update_due, mine._final_taken, mine._may_write, mine._ours_ended,
                mine._peer_ended, ours, peers, has_error, behind, posted, ahead,
                (
                    end.written, end.read, end.heard, end.acked, end.pending,
                    end.said, end.is_dead,
                ),
            ) = values  # fmt: skip
            mine._ours, mine._peer = SIDES[ours], SIDES[peers]
            mine.error = LOST if has_error else None
            mine.suspect = False
            # So those before it are 0xFFFF and less: every comparison passes the wrap.
            mine._sequence = 0
            self.real[1 - side]._peer_sequence = -behind & 0xFFFF
            mine._posted.clear()
            mine._posted.extend(posted)
            queue = self.queues[1 - side]
            queue.clear()
            for number, *rest in ahead:
                queue.append((number, 7, *rest))

    # What can happen

    def actions(self) -> Iterator[Action]:
        for side in (0, 1):
            end, real = self.ends[side], self.real[side]
            if self.queues[side] and not end.is_dead:
                yield self.deliver, side, 0
                if self.mode.doubles and not self._is_known(side):
                    yield self.repeat, side, 0
            if end.is_dead:
                continue
            if real._posted:
                yield self.complete, side, 0
            if self.ends[1 - side].is_dead and not real.is_ended:
                yield self.lose_link, side, 0
            if len(self.queues[1 - side]) < self.mode.queue or self.mode.newest_only:
                yield from self._of_application(side)

    def _of_application(self, side: int) -> Iterator[Action]:
        yield from self._of_writer(side)
        if self.mode.closes:
            yield from self._of_closer(side)

    def _of_writer(self, side: int) -> Iterator[Action]:
        end, real, mode = self.ends[side], self.real[side], self.mode
        if real.update_due and len(real._posted) < 2:
            yield self.publish, side, 0
        if not real.we_ended:
            for count in mode.reads:
                if count <= real.readable:
                    yield self.read, side, count
            can_write = end.pending == 0 and real.is_open and real._ours is Side.OPEN
            if can_write and side in mode.writers:
                most = 1 << 62 if mode.waits else real.writable
                for count in mode.writes:
                    if count <= most:
                        yield self.write, side, count

    def _of_closer(self, side: int) -> Iterator[Action]:
        end, real = self.ends[side], self.real[side]
        if not real.we_ended:
            yield self.abort, side, 0
            if end.pending == 0:
                yield self.close, side, 0
                if real._ours is Side.OPEN:
                    yield self.shut_down, side, 0
        if not self.ends[1 - side].is_dead:
            yield self.die, side, 0

    def write(self, side: int, count: int) -> None:
        self.ends[side].pending = count
        self._send(side)

    def _send(self, side: int) -> None:
        """Write what waits, as far as there is room, as a driver does it."""
        end, real = self.ends[side], self.real[side]
        while end.pending:
            before = real._tx_produced
            spans = real.claim(end.pending)
            self._check_spans(side, spans)
            end.pending -= real._tx_produced - before
            if real.update_due:
                self.publish(side)
            if not spans and not self._look_for_room(side):
                return

    def _look_for_room(self, side: int) -> bool:
        """Look at the newest consumer cursor where a fabric shows it early."""
        if not self.mode.newest_only or not self.queues[side]:
            return False
        newest = self.queues[side][-1]
        if not self.real[side].follow_consumer(newest[3]):
            return False
        self.ends[side].acked = unpacked(newest[3])
        return True

    def _check_spans(self, side: int, spans: tuple[tuple[int, int], ...]) -> None:
        end, peer = self.ends[side], self.ends[1 - side]
        for address, length in spans:
            require(address == end.written[1], "written elsewhere than the cursor says")
            require(address + length <= self.mode.size, "written beyond the element")
            unread = self.element.distance(peer.read, end.written)
            require(unread + length <= self.mode.size, "unread bytes were written over")
            end.written = self.element.advance(end.written, length)
        if spans:
            require(not self.real[1 - side].is_ended, "written to memory given back")

    def read(self, side: int, count: int) -> None:
        end, real = self.ends[side], self.real[side]
        left = count
        while left:
            offset, length = real.peek(left)
            require(offset == end.read[1], "read elsewhere than the cursor says")
            require(length > 0, "fewer bytes than were promised")
            there = self.element.distance(end.read, self.ends[1 - side].written)
            require(length <= there, "bytes were read that nobody wrote")
            real.consume(length)
            end.read = self.element.advance(end.read, length)
            left -= length

    def publish(self, side: int) -> None:
        end, real = self.ends[side], self.real[side]
        update = real.take_update()
        real.published(not self.mode.later)
        require(unpacked(update[2]) == end.written, "the producer cursor is wrong")
        require(unpacked(update[3]) == end.read, "the consumer cursor is wrong")
        require(not end.said & 0x60, "an update after the last one")
        require(update[4] & 0xE0 & end.said == end.said, "a state flag was taken back")
        end.said = update[4] & 0xE0
        queue = self.queues[1 - side]
        if self.mode.newest_only:
            queue.clear()
        queue.append(update)

    def complete(self, side: int) -> None:
        if self.real[side].publish_completed() & News.SPACE:
            self._send(side)

    def _is_known(self, side: int) -> bool:
        """Tell whether the next update to an end was delivered to it before."""
        return bool(self.queues[side][0][0] == self.real[side]._peer_sequence)

    def repeat(self, side: int) -> None:
        """Deliver an update, and let it come once more."""
        update = self.queues[side][0]
        self.deliver(side)
        self.queues[side].appendleft(update)

    def _take_again(self, real: Connection, update: Any) -> None:
        """Deliver what is known: at most an answer that was asked for becomes due."""
        before, was_due = self.take_out(), real.update_due
        news = real.receive_update(update)
        require(not news & ~News.PUBLISH, "the same news are told twice")
        is_due, real.update_due = real.update_due, was_due
        require(before == self.take_out(), "an update that comes twice changes things")
        real.update_due = is_due

    def deliver(self, side: int) -> None:
        end, real = self.ends[side], self.real[side]
        is_known = self._is_known(side)
        update = self.queues[side].popleft()
        if real.is_ended:
            return  # no table finds it any more
        if is_known:
            self._take_again(real, update)
            return
        if real._peer_ended:
            require(False, "something was said after the end")
        had, done = real.readable, real.peer_done
        news = real.receive_update(update)
        require(real.error is None, f"an honest peer is a liar: {real.error}")
        real.check()
        end.heard, end.acked = unpacked(update[2]), unpacked(update[3])
        unread = self.element.distance(end.read, end.heard)
        require(real.readable == unread, "not what was written")
        window = real._tx_produced - real._tx_acked
        unacked = self.element.distance(end.acked, end.written)
        require(window == unacked, "not what was read")
        require(bool(news & News.DATA) == (real.readable > had), "nobody told of data")
        require(bool(news & News.DONE) >= (real.peer_done > done), "nobody told of EOF")
        if news & News.ABORTED:
            self.abort(side)
        elif news & News.CLOSED:
            end.pending = 0  # the writer is told that it writes to nobody
        elif news & News.SPACE:
            self._send(side)

    def shut_down(self, side: int) -> None:
        self.real[side].shutdown_write()

    def close(self, side: int) -> None:
        self.real[side].close()

    def abort(self, side: int) -> None:
        self.ends[side].pending = 0
        self.real[side].abort()

    def die(self, side: int) -> None:
        self.ends[side].is_dead = True
        self.queues[side].clear()

    def lose_link(self, side: int) -> None:
        """The other end is dead, and now this one is told.

        What was on its way is lost now, or was delivered before.
        """
        self.real[side].link_lost(LOST)
        self.ends[side].pending = 0
        self.queues[side].clear()

    # What must hold

    def check(self) -> None:
        for side in (0, 1):
            real, peer = self.real[side], self.real[1 - side]
            end, other = self.ends[side], self.ends[1 - side]
            real.check()
            if end.is_dead:
                continue
            alive = not other.is_dead
            if real.is_ended and alive and real.error is None:
                require(peer.we_ended, "memory was given back to a peer that writes")
            eof = real.peer_done and not real.readable and not real.peer_aborted
            if eof and not real.we_ended and real.error is None:
                require(other.said & 0xC0, "an EOF that nobody said")
                require(end.read == other.written, "an EOF before the last byte")
        self._check_rest()

    def _check_rest(self) -> None:
        """Nothing more happens by itself: then nobody may be waiting for anything."""
        if any(self.queues) or any(end.is_dead for end in self.ends):
            return
        if any(each.update_due or each._posted for each in self.real):
            return
        for side in (0, 1):
            end, real, peer = self.ends[side], self.real[side], self.real[1 - side]
            if peer.we_ended or real.we_ended:
                require(not peer.we_ended or real._peer_ended, "an end was not told")
                continue
            require(real.peer_done == (peer._ours is not Side.OPEN), "EOF was not told")
            if real._ours is not Side.OPEN:
                continue
            if not peer.readable:
                require(end.pending == 0, "a writer waits for room that is there")
                require(end.acked == end.written, "bytes were read and not reported")
            room = min(self.mode.size - peer.readable, self.mode.sndbuf)
            require(real.writable == room, "room was lost")


def explore(model: Model, most: int = 1 << 62, steps: int = 1 << 62) -> tuple[int, int]:
    """Enter every state that can be reached.

    States that were seen are known by their hash: among a million of them, two share
    their 64 bits once in forty million explorations.

    Args:
        model: At its beginning.
        most: Give up after so many states.
        steps: Go no further than so many steps from the beginning.

    Returns:
        (states, transitions).

    Raises:
        Broken: A promise is broken in one of them.
    """
    first = model.take_out()
    parents: dict[int, tuple[int, str]] = {hash(first): (0, "")}
    layer = [first]
    transitions = 0
    while layer and len(parents) <= most and steps:
        steps -= 1
        following: list[State] = []
        for state in layer:
            key = hash(state)
            model.put_back(state)
            for act, side, count in list(model.actions()):
                model.put_back(state)
                transitions += 1
                try:
                    act(side, count) if count else act(side)
                    model.check()
                except AssertionError as error:
                    way = path(parents, key, step(act, side, count))
                    raise Broken(f"{error}\n{way}") from error
                after = model.take_out()
                if hash(after) not in parents:
                    parents[hash(after)] = (key, step(act, side, count))
                    following.append(after)
        layer = following
    return len(parents), transitions


def step(act: Callable[..., None], side: int, count: int) -> str:
    return f"{act.__name__} {'ab'[side]} {count or ''}"


def path(parents: dict[int, tuple[int, str]], key: int, last: str) -> str:
    """Tell how it came to this; a and b change places where a mirror image was met."""
    steps = [last]
    while key in parents:
        key, happened = parents[key]
        steps.append(happened)
    return "\n".join(reversed(steps))
