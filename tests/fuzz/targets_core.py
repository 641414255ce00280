"""Fuzz targets for the core: one endpoint, and two with somebody between them.

``core-messages`` brings an endpoint into one of the named states of
`pysmc.testing.states` and lets anything arrive there: bytes, genuine messages with a
few bytes changed, cursors near every bound, lost links, passing time, and what the
application may do. Nothing is raised but what is documented, the invariants hold after
each step, and connections that others have with it are left alone.

``core-pair`` plays two good ends; the input chooses what happens next and changes what
is on its way. Bytes of a stream that nobody touched are read as they were written.
"""

from __future__ import annotations

import io
import pickle
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

from pysmc.core.actions import Action
from pysmc.core.events import ConnectionLost, Established, Failed, FellBack
from pysmc.core.link import LinkState
from pysmc.errors import LocalProtocolError
from pysmc.testing.deliver import (
    Answer,
    EndpointIn,
    LinkLost,
    OnLink,
    OnTcp,
    PairConnected,
    PublishCompleted,
    TcpLost,
    TimePasses,
)
from pysmc.testing.messages import genuine
from pysmc.testing.pair import SMALL, CorePair
from pysmc.testing.states import STATES
from smcproto import cdc, clc
from smcproto.errors import DecodeError
from tests.fuzz.target import Bytes, Kept, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pysmc.core.connection import Connection
    from pysmc.core.handshake import Handshake
    from pysmc.core.link_group import LinkGroup
    from pysmc.testing.pair_ends import PairEnd
    from pysmc.testing.pair_wire import TcpEnd

__all__ = ["TARGETS"]

NAMES = tuple(STATES)
SECONDS = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 6.0, 31.0, 700.0)
MOST_BYTES = 96
HISTORY_BYTES = 1024


# One endpoint


@cache
def _genuine(state: str) -> tuple[list[bytes], list[bytes]]:
    """Give the bytes of genuine messages, for TCP and for the link."""
    endpoint = EndpointIn(state, bystanders=True)
    found = [*endpoint.awaited, *genuine(endpoint).values()]
    of_clc = [each.build() for each in found if hasattr(type(each), "SMCD")]
    others = [each.build() for each in found if not hasattr(type(each), "SMCD")]
    return of_clc or [clc.Decline(2, False, bytes(8), 0).build()], others


class Frozen:
    """Something that can be had again and again, as it is now.

    What never changes is shared by all copies: to make frozen records anew takes as
    long as all the rest.

    Args:
        thing: It is not kept.
    """

    def __init__(self, thing: Any) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(thing)
        self._bytes, self._shared = file.getvalue(), pickler.shared

    def thaw(self) -> Any:
        """Give a copy."""
        unpickler: Any = pickle.Unpickler(io.BytesIO(self._bytes))
        unpickler.persistent_load = self._shared.__getitem__
        return unpickler.load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.shared: list[Any] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, part: Any) -> int | None:
        """Number what all copies share."""
        kind = type(part)
        if not issubclass(kind, Enum):
            parameters = getattr(kind, "__dataclass_params__", None)
            if parameters is None or not parameters.frozen or kind in _NOT_SHARED:
                return None
        number = self._numbers.setdefault(id(part), len(self.shared))
        if number == len(self.shared):
            self.shared.append(part)
        return number


# Frozen, and yet they lead to what changes.
_NOT_SHARED = {Established, FellBack, Failed, ConnectionLost, *get_args(Action)}


@cache
def _frozen(number: int) -> tuple[str, Frozen]:
    """Make an endpoint in a state, with or without others' connections."""
    state = NAMES[number % len(NAMES)]
    endpoint = EndpointIn(state, bystanders=number // len(NAMES) == 1)
    endpoint.scene.pair.checking = False
    return state, Frozen(endpoint)


class Play:
    """One endpoint in a state, and an input that says what arrives."""

    def __init__(self, number: int) -> None:
        self.state, frozen = _frozen(number)
        self.endpoint: EndpointIn = frozen.thaw()
        others, link = self.endpoint.scene.bystanders, self.endpoint.link
        # Whom nothing may happen to; somebody on the same link goes with it.
        self.stranger = None
        if others and others[0].is_open:
            shared = link is not None and link.group is others[0].group
            self.stranger = None if shared else others[0]

    def go_on(self, source: Bytes) -> None:
        """Do what the input says, and check after each step."""
        scene = self.endpoint.scene
        while source:
            choice = source.byte()
            self._STEPS[choice % len(self._STEPS)](self, source)
            scene.me.settle()
            scene.pair.wire.notes.clear()
            scene.me.endpoint.check()
            if self.stranger is not None:
                assert self.stranger.is_open, "somebody else's connection ended"

    @property
    def is_over(self) -> bool:
        """Whether nothing much can happen any more."""
        endpoint = self.endpoint
        link, connection = endpoint.link, endpoint.connection
        handshake = endpoint.handshake
        if connection is not None:
            return connection.error is not None or connection.is_ended
        return handshake is None or handshake.is_over or link is None

    def _arrive(self, what: Any) -> None:
        if self.endpoint.takes(type(what)):
            self.endpoint._arrive(what)

    def _tcp(self, source: Bytes) -> None:
        self._arrive(OnTcp(source.take(source.byte() % 48)))

    def _clc(self, source: Bytes) -> None:
        known = _genuine(self.state)[0]
        data = source.patch(known[source.byte() % len(known)])
        self._arrive(OnTcp(data))

    def _link(self, source: Bytes) -> None:
        self._on_link(source.take(source.byte() % 73))

    def _llc(self, source: Bytes) -> None:
        known = _genuine(self.state)[1]
        if known:
            self._on_link(source.patch(known[source.byte() % len(known)]))

    def _on_link(self, data: bytes) -> None:
        if data[:1] == b"\xfe":
            try:
                cdc.unpack(data)
            except DecodeError:
                return  # the fabric's business
        if data:
            self._arrive(OnLink(data))

    def _update(self, source: Bytes) -> None:
        """An update near what would be true."""
        connection, link = self.endpoint.connection, self.endpoint.link
        if connection is None or link is None:
            return
        produced = connection._ring.pack(
            max(0, connection._rx_produced + _step(source))
        )
        consumed = connection._rx_reported
        ring = connection._peer_ring
        if ring is not None:
            consumed = ring.pack(max(0, connection._tx_acked + _step(source)))
        sequence = connection._peer_sequence + source.signed() & 0xFFFF
        flags = (source.byte() << 8 | source.byte()) & 0xF8E0
        update = (sequence, connection.alert_token, produced, consumed, flags)
        self.endpoint.scene.me.feed_update(link, update)

    def _time(self, source: Bytes) -> None:
        seconds = SECONDS[source.byte() % len(SECONDS)]
        if seconds:
            self.stranger = None  # the stranger's peer answers nothing either
        self._arrive(TimePasses(seconds))

    def _answer(self, source: Bytes) -> None:
        status = ("", "", "no memory", "unreachable")[source.byte() % 4]
        self._arrive(Answer(status, "ENOMEM" if status else ""))

    def _connected(self, source: Bytes) -> None:
        status, link = ("", "", "unreachable")[source.byte() % 3], self.endpoint.link
        if link is not None and link.state is LinkState.ACTIVATING:
            self._arrive(PairConnected(status))

    def _lost(self, source: Bytes) -> None:
        if source.byte() % 2:
            self._arrive(LinkLost())
        else:
            self._arrive(TcpLost(("", "reset")[source.byte() % 2]))

    def _published(self, source: Bytes) -> None:
        del source
        connection = self.endpoint.connection
        if connection is not None and connection._posted:
            self._arrive(PublishCompleted())

    def _application(self, source: Bytes) -> None:
        connection, scene = self.endpoint.connection, self.endpoint.scene
        verdict = connection is not None and connection.is_established
        if connection is None or not verdict or connection.error is not None:
            return
        _use(scene.pair, scene.me, connection, source)

    _STEPS: tuple[Callable[[Play, Bytes], None], ...] = (
        _tcp, _clc, _clc, _link, _llc, _llc, _update, _update,
        _time, _answer, _connected, _lost, _published, _application,
    )  # fmt: skip


def _step(source: Bytes) -> int:
    """A distance: small, or near a bound of the element."""
    choice, by = source.byte(), source.signed()
    return (0, 1, 16 << 10, 32 << 10, 1 << 16, 1 << 31)[choice % 6] + by


def _use(pair: CorePair, end: PairEnd, connection: Connection, source: Bytes) -> None:
    """What an application does."""
    choice, amount = source.byte() % 6, 1 << source.byte() % 16
    try:
        if choice == 0:
            pair.write(end, connection, bytes(amount))
        elif choice <= 2:
            pair.read(end, connection, amount)
        elif choice == 3:
            pair.shutdown_write(end, connection)
        elif choice == 4:
            pair.close(end, connection)
        else:
            pair.abort(end, connection)
    except LocalProtocolError:
        return  # it wrote after it had closed


_plays = Kept(Play, HISTORY_BYTES)


def _messages(data: bytes) -> None:
    if not data:
        return
    number = data[0]
    play = _plays.take(number, data[1:])
    play.go_on(Bytes(data[1:]))
    if play.is_over:
        _plays.drop(number)


def _message_seeds() -> list[bytes]:
    """One input for each state: each genuine message, then time."""
    seeds = []
    for number, state in enumerate(NAMES):
        of_clc, others = _genuine(state)
        body = bytearray()
        for index in range(min(4, len(others))):
            body += bytes((4, index, 0))
        for index in range(min(2, len(of_clc))):
            body += bytes((1, index, 0))
        seeds.append(bytes((number,)) + bytes(body) + bytes((8, 4, 13, 1, 9)))
    return seeds


# Two ends


class Stream:
    """What one application writes and the other one reads.

    Args:
        first: Where in the pattern it begins; no two streams begin alike.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self.written = 0
        self.read = 0

    def at(self, place: int, count: int) -> bytes:
        """Give the bytes of a place."""
        start = (self._first + place) % 251
        return PATTERN[start : start + count]


PATTERN = bytes(range(251)) * 300


class Duel:
    """Two ends, and somebody who decides what is delivered, and changed, when."""

    def __init__(self, number: int) -> None:
        self.pair: CorePair = _duel(number % 4).thaw()
        self.pair.checking = False
        self.tainted: set[int] = set()
        """Numbers of TCP connections: what is read there may be anything."""
        self.tainted_groups: set[LinkGroup] = set()
        """The same for all that is on a group."""
        self.opened: list[tuple[Handshake, Handshake]] = []
        self.streams: dict[tuple[int, int], Stream] = {}

    def go_on(self, source: Bytes) -> None:
        """Do what the input says, and check who took part after each step."""
        notes = self.pair.wire.notes
        while source:
            choice = source.byte()
            ends = self._STEPS[choice % len(self._STEPS)](self, source)
            notes.clear()
            for end in ends:
                end.endpoint.check()

    @property
    def is_over(self) -> bool:
        """Whether too much has been changed to go on."""
        return len(self.opened) > 6

    # Each step gives the ends that took part.

    def _connect(self, source: Bytes) -> Sequence[PairEnd]:
        if len(self.opened) >= 4:
            return ()
        opener = self.pair.ends[source.byte() % 2]
        self.opened.append(self.pair.connect(opener))
        return self.pair.ends

    def _deliver(self, source: Bytes) -> Sequence[PairEnd]:
        choices = self.pair.pending()
        if not choices:
            return ()
        chosen = choices[source.byte() % len(choices)]
        self.pair.step(chosen)
        return (chosen.end,)

    def _drive(self, source: Bytes) -> Sequence[PairEnd]:
        for _ in range(source.byte() % 32):
            if not self.pair.step():
                break
        return self.pair.ends

    def _time(self, source: Bytes) -> Sequence[PairEnd]:
        self.pair.advance(SECONDS[source.byte() % (len(SECONDS) - 1)])
        return self.pair.ends

    def _change(self, source: Bytes) -> Sequence[PairEnd]:
        """Change something that is on its way."""
        end = self.pair.ends[source.byte() % 2]
        kind = source.byte() % 3
        if kind == 0:
            moving = [tcp for tcp in end.tcp if tcp.transit]
            if moving:
                tcp = moving[source.byte() % len(moving)]
                self.tainted.add(tcp.number)
                tcp.transit[:] = source.patch(bytes(tcp.transit))
            return ()
        for stub in end.queue_pairs.values():
            if kind == 1 and stub.sends:
                stub.sends[0] = source.patch(stub.sends[0])
                self.tainted_groups.add(stub.link.group)
                if stub.peer is not None:
                    self.tainted_groups.add(stub.peer.link.group)
            elif kind == 2 and stub.updates:
                before = stub.updates[0]
                self._taint_token(stub.link.group, before[1])
                packed = source.patch(cdc.pack(*before))
                try:
                    stub.updates[0] = after = cdc.unpack(packed)
                except DecodeError:
                    stub.updates.popleft()
                else:
                    self._taint_token(stub.link.group, after[1])
        return ()

    def _taint_token(self, group: LinkGroup, token: int) -> None:
        """Trust no more what an end reads whose connection has this token."""
        for both in self.opened:
            for handshake in both:
                known = handshake.connection
                if known is None:
                    verdict = self.pair.tcp(handshake).verdict
                    known = getattr(verdict, "connection", None)
                if known is None or known.group is not group:
                    continue
                if known.alert_token == token:
                    self.tainted.add(self.pair.tcp(handshake).number)

    def _taint_named(self) -> None:
        """Trust no connection that a changed CLC message names in place of its own.

        The tokens of this pair are small numbers: with one bit flipped, that of one is
        another one's. Live ones have 32 bits of chance.
        """
        for tcp, end, connection in self._connections():
            if tcp.number in self.tainted:
                there = end.peer.endpoint.groups
                for group in there:
                    self._taint_token(group, connection.peer_token)

    def _application(self, source: Bytes) -> Sequence[PairEnd]:
        found = self._connections()
        if not found:
            return ()
        tcp, end, connection = found[source.byte() % len(found)]
        if connection.error is not None or connection.we_ended:
            return ()
        mine, theirs = self._stream(tcp, end), self._stream(tcp, end.peer)
        choice, amount = source.byte() % 8, 1 << source.byte() % 15
        try:
            if choice <= 2:
                data = mine.at(mine.written, amount)
                mine.written += self.pair.write(end, connection, data)
            elif choice <= 5:
                data = self.pair.read(end, connection, amount)
                self._compare(tcp.number, connection, data, theirs)
            elif choice == 6:
                self.pair.shutdown_write(end, connection)
            else:
                self.pair.close(end, connection)
        except LocalProtocolError:
            pass  # it wrote after it had closed
        return (end,)

    def _stream(self, tcp: TcpEnd, writer: PairEnd) -> Stream:
        key = (tcp.number, writer is self.pair.client)
        if key not in self.streams:
            self.streams[key] = Stream(31 * len(self.streams))
        return self.streams[key]

    def _compare(
        self, number: int, connection: Connection, data: bytes, stream: Stream
    ) -> None:
        at = stream.read
        stream.read += len(data)
        if self.tainted:
            self._taint_named()
        if number in self.tainted or connection.group in self.tainted_groups:
            return
        assert stream.read <= stream.written, "read before it was written"
        assert data == stream.at(at, len(data)), "read something else"

    def _connections(self) -> list[tuple[Any, PairEnd, Connection]]:
        found = []
        for both in self.opened:
            for handshake in both:
                tcp = self.pair.tcp(handshake)
                if isinstance(tcp.verdict, Established):
                    found.append((tcp, tcp.end, tcp.verdict.connection))
                elif isinstance(tcp.verdict, FellBack):
                    is_tainted = tcp.number in self.tainted or self.tainted_groups
                    if not is_tainted:
                        text = "CLC bytes are left to the application"
                        assert not tcp.arrived, text
        return found

    def _cut(self, source: Bytes) -> Sequence[PairEnd]:
        if not self.opened:
            return ()
        handshake = self.opened[source.byte() % len(self.opened)][source.byte() % 2]
        choice = source.byte() % 4
        if choice == 0:
            self.pair.cut_tcp(handshake)
        elif choice == 1 and not handshake.is_over:
            self.pair.abandon(handshake)
        elif choice == 2 and handshake.link is not None and handshake.link.handle:
            self.pair.cut_link(handshake.link)
        return self.pair.ends

    _STEPS: tuple[Callable[[Duel, Bytes], Sequence[PairEnd]], ...] = (
        _connect, _deliver, _deliver, _drive, _drive, _time, _change, _change,
        _application, _application, _application, _cut,
    )  # fmt: skip


@cache
def _duel(number: int) -> Frozen:
    pair = CorePair(SMALL, newest_only=bool(number & 1), publish_later=bool(number & 2))
    return Frozen(pair)


_duels = Kept(Duel, HISTORY_BYTES)


def _pair(data: bytes) -> None:
    if not data:
        return
    number = data[0] % 4
    duel = _duels.take(number, data[1:])
    duel.go_on(Bytes(data[1:]))
    if duel.is_over:
        _duels.drop(number)


def _pair_seeds() -> list[bytes]:
    """A good connection with an echo, and one for each kind of change."""
    echo = bytes((0, 0, 3, 31, 8, 0, 0, 9, 3, 31, 8, 1, 3, 9, 3, 31))
    seeds = [bytes((number,)) + echo for number in range(4)]
    for steps in range(10):
        for kind in range(3):
            for end in range(2):
                body = bytes((0, 0, 3, steps, 6, end, kind, 0, 1, 20, 1))
                seeds.append(b"\0" + body + echo[2:])
    return seeds


TARGETS = [
    Target("core-messages", _messages, _message_seeds, MOST_BYTES, _plays.told),
    Target("core-pair", _pair, _pair_seeds, MOST_BYTES, _duels.told),
]
