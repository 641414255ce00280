"""One end of a `CorePair`: what a driver would hold, and how it carries out orders.

`PairEnd` answers its endpoint's orders and delivers to it what arrived; the queues of
a `TcpEnd` and a `QueuePairStub` hold what is on its way to that end. What is delivered
when, and what goes wrong, `CorePair` decides.

Source: the contract in `pysmc.core.actions`; RFC 7609 section 3.5.5.1.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.core import actions
from pysmc.core.events import ConnectionLost, Established, Failed, FellBack, News
from smcproto.decode import decode
from smcproto.errors import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pysmc.core.actions import Action
    from pysmc.core.connection import Connection, Update
    from pysmc.core.endpoint import Endpoint
    from pysmc.core.events import Event
    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup

__all__ = [
    "CountingTokens",
    "Delivery",
    "Domain",
    "PairEnd",
    "QueuePairStub",
    "Region",
    "TcpEnd",
    "Wire",
]


class CountingTokens:
    """A `TokenSource` without chance: every number is one more than the last.

    Args:
        first: Where to begin, 1 to 2**24 - 1.
    """

    def __init__(self, first: int = 1) -> None:
        self._numbers = count(first)

    def psn(self) -> int:
        """Give the next number, 24 bits."""
        return next(self._numbers) & 0xFFFFFF

    def alert_token(self) -> int:
        """Give the next number, 32 bits, not 0."""
        return next(self._numbers) & 0xFFFFFFFF

    def user_id(self) -> int:
        """Give the next number, 32 bits."""
        return next(self._numbers) & 0xFFFFFFFF


class Delivery(NamedTuple):
    """Something that can happen next."""

    kind: str
    """"answer", "tcp", "connected", "send", "update", "publish" or "down"."""
    end: PairEnd
    """Where it arrives."""
    place: Any
    """The TCP end or the queue pair that it arrives at; None for an answer."""

    def __str__(self) -> str:
        return f"{self.kind} -> {self.end.name} {self.place or ''}"


@dataclass(slots=True, eq=False)
class TcpEnd:
    """One end of a TCP connection; the handle of its handshake."""

    number: int
    end: PairEnd
    transit: bytearray = field(default_factory=bytearray)
    """Bytes on their way to this end."""
    arrived: bytearray = field(default_factory=bytearray)
    """Bytes that arrived and were not read: once the handshake is over, exactly what
    the application would read from TCP."""
    is_cut: bool = False
    """EOF follows the bytes on their way."""
    is_deaf: bool = False
    """EOF was delivered, or the handshake was abandoned."""
    verdict: Event | None = None
    """How the handshake ended."""
    _peer: TcpEnd | None = None
    _handshake: Handshake | None = None

    def join(self, peer: TcpEnd, handshake: Handshake) -> None:
        """Tell it its other end and its handshake."""
        self._peer, self._handshake = peer, handshake
        handshake.handle = self

    @property
    def peer(self) -> TcpEnd:
        """The other end."""
        assert self._peer is not None
        return self._peer

    @property
    def handshake(self) -> Handshake:
        """Whose TCP connection it is."""
        assert self._handshake is not None
        return self._handshake

    @property
    def is_due(self) -> bool:
        """Whether bytes, or their end, can be delivered here."""
        if self.transit:
            return True
        if self.is_deaf or not self.handshake.wanted:
            return False
        return bool(self.arrived) or self.is_cut

    def __str__(self) -> str:
        return f"tcp {self.number}"


@dataclass(slots=True, eq=False)
class Region:
    """Registered memory; the handle of an RMB."""

    address: int
    rkey: int
    memory: bytearray


@dataclass(slots=True, eq=False)
class Domain:
    """The memory of one link group; its handle."""

    regions: dict[int, Region] = field(default_factory=dict)
    is_closed: bool = False


@dataclass(slots=True, eq=False)
class QueuePairStub:
    """A queue pair; the handle of its link. Queues hold what arrives at it."""

    number: int
    end: PairEnd
    link: Link
    remote_number: int = 0
    peer: QueuePairStub | None = None
    connected: tuple[str, str] | None = None
    """(status, detail) of a connection attempt that has ended; "" is success."""
    sends: deque[bytes] = field(default_factory=deque)
    updates: deque[Update] = field(default_factory=deque)
    completions: deque[int] = field(default_factory=deque)
    down: tuple[str, str] | None = None
    """(status, detail) when it will be gone."""
    is_closed: bool = False

    @property
    def reaches(self) -> QueuePairStub | None:
        """The other queue pair, while both are there."""
        if self.is_closed or self.peer is None or self.peer.is_closed:
            return None
        return self.peer

    def __str__(self) -> str:
        return f"qp {self.number}"


@dataclass(slots=True)
class Wire:
    """What both ends share: the time, the trace, and how the fabric behaves."""

    newest_only: bool
    """Only the newest update of a connection is delivered."""
    publish_later: bool
    """A publish completes later, not at once."""
    silent_close: bool
    """Nobody is told that the other queue pair was closed."""
    now: float = 0.0
    notes: list[tuple[float, str, bytes | Update]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    news: dict[Connection, int] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: count(0x100))

    def note(self, line: str, what: bytes | Update = b"") -> None:
        """Add a line to the trace; ``what`` becomes words when somebody reads it."""
        self.notes.append((self.now, line, what))

    @property
    def trace(self) -> list[str]:
        """One line for everything that happened."""
        return [
            f"{now:9.3f} {line} {words(what) if what else ''}".rstrip()
            for now, line, what in self.notes
        ]


class PairEnd:
    """One end: an endpoint and what its driver would hold.

    Args:
        name: "client" or "server", after what it is in `CorePair.connect`.
        endpoint: Its core.
        wire: What it shares with the other end.
    """

    def __init__(self, name: str, endpoint: Endpoint, wire: Wire) -> None:
        self.name = name
        self.endpoint = endpoint
        self.peer = self
        self.queue_pairs: dict[int, QueuePairStub] = {}
        self.domains: list[Domain] = []
        self.tcp: list[TcpEnd] = []
        self.events: list[Event] = []
        """All news, in order."""
        self.lost: list[ConnectionLost] = []
        """Established connections that were lost, with why."""
        self.failures: list[tuple[type[Action], str, str]] = []
        """(order, status, detail): the next such order fails."""
        self.withheld: set[type[Action]] = set()
        """Orders that are not answered for now."""
        self._answers: list[tuple[type[Action], Callable[[], None]]] = []
        self._wire = wire
        self._orders: dict[type[Action], Callable[[Any], None]] = {
            actions.SendClc: self._send_clc,
            actions.CheckTcp: self._check_tcp,
            actions.CreateQueuePair: self._create_pair,
            actions.ConnectQueuePair: self._connect_pair,
            actions.CloseQueuePair: self._close_pair,
            actions.CloseGroup: self._close_group,
            actions.RegisterMemory: self._register,
            actions.ClearMemory: self._clear,
            actions.DeregisterMemory: self._deregister,
            actions.PostSend: self._post_send,
            actions.PublishUpdate: self._publish_update,
        }

    def __repr__(self) -> str:
        return f"<PairEnd {self.name}>"

    @property
    def memory_bytes(self) -> int:
        """Bytes of registered memory."""
        return sum(
            len(region.memory)
            for domain in self.domains
            for region in domain.regions.values()
        )

    # Orders and news

    def settle(self) -> None:
        """Carry out the endpoint's orders and take its news, until there are none."""
        endpoint = self.endpoint
        while True:
            ordered, events = endpoint.take_actions(), endpoint.take_events()
            if not ordered and not events:
                break
            for action in ordered:
                self._orders[type(action)](action)
            for event in events:
                self._tell(event)

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, ConnectionLost):
            self.lost.append(event)
            connection = event.connection
            self._wire.note(
                f"{self.name}: lost {connection.alert_token:08x}: {event.error}"
            )
            self._leave(connection)
            return
        tcp: TcpEnd = event.handshake.handle
        assert tcp.verdict is None, "a handshake ended twice"
        tcp.verdict = event
        self._wire.note(f"{self.name}: {tcp} {words(event)}")
        if isinstance(event, Established):
            self._greet(event.connection)
        elif isinstance(event, Failed):
            tcp.is_deaf = True
            tcp.peer.is_cut = True

    def _greet(self, connection: Connection) -> None:
        """Look at what a connection that was handed out has seen before."""
        if connection.readable:
            self._add_news(connection, News.DATA)
        if connection.peer_aborted:
            self._add_news(connection, News.ABORTED)
            self._leave(connection)

    def _leave(self, connection: Connection) -> None:
        """Do what an application does with a connection that is lost."""
        connection.abort()
        self.publish(connection)
        self.endpoint.reap(connection, self._wire.now)

    def _add_news(self, connection: Connection, news: int) -> None:
        seen = self._wire.news
        seen[connection] = seen.get(connection, 0) | news

    def _send_clc(self, action: actions.SendClc) -> None:
        tcp: TcpEnd = action.handshake.handle
        self._wire.note(f"{self.name}: {tcp} sends", action.data)
        tcp.peer.transit += action.data

    def _check_tcp(self, action: actions.CheckTcp) -> None:
        if not self._read_tcp(action.handshake.handle):
            self.endpoint.tcp_quiet(action.handshake, self._wire.now)

    def _answer(self, order: type[Action], give: Callable[[], None]) -> None:
        if order in self.withheld:
            self._answers.append((order, give))
        else:
            give()

    def _fails(self, order: type[Action]) -> tuple[str, str] | None:
        for position, (kind, status, detail) in enumerate(self.failures):
            if kind is order:
                del self.failures[position]
                self._wire.note(f"{self.name}: {order.__name__} fails: {status}")
                return status, detail
        return None

    def _domain(self, group: LinkGroup) -> Domain:
        if group.handle is None:
            group.handle = Domain()
            self.domains.append(group.handle)
        domain: Domain = group.handle
        assert not domain.is_closed, "an order for a group that was closed"
        return domain

    def _create_pair(self, action: actions.CreateQueuePair) -> None:
        link, order, endpoint = action.link, actions.CreateQueuePair, self.endpoint
        self._domain(link.group)
        failure = self._fails(order)
        if failure is not None:
            self._answer(
                order, lambda: endpoint.pair_failed(link, *failure, self._wire.now)
            )
            return
        pair = QueuePairStub(next(self._wire.numbers), self, link)
        link.handle = self.queue_pairs[pair.number] = pair
        self._answer(
            order, lambda: endpoint.pair_created(link, pair.number, self._wire.now)
        )

    def _connect_pair(self, action: actions.ConnectQueuePair) -> None:
        link, order, endpoint = action.link, actions.ConnectQueuePair, self.endpoint
        pair: QueuePairStub = link.handle
        failure = self._fails(order)
        if failure is not None:
            self._answer(
                order, lambda: endpoint.pair_failed(link, *failure, self._wire.now)
            )
            return
        pair.remote_number = action.remote.qp_number
        there = self.peer.queue_pairs.get(pair.remote_number)
        if there is None:
            pair.connected = ("unreachable", "there is no such queue pair")
        elif there.remote_number == pair.number:
            pair.peer, there.peer = there, pair
            pair.connected = there.connected = ("", "")
        self._answer(order, lambda: endpoint.pair_connecting(link, self._wire.now))

    def _close_pair(self, action: actions.CloseQueuePair) -> None:
        pair: QueuePairStub | None = action.link.handle
        if pair is None or pair.is_closed:
            return
        pair.is_closed = True
        self.queue_pairs.pop(pair.number, None)
        if self._wire.silent_close:
            return
        for there in self.peer.queue_pairs.values():
            if there.remote_number != pair.number:
                continue
            if there.peer is None:
                there.connected = ("peer gone", "")
            elif there.down is None:
                there.down = ("peer gone", "")

    def _close_group(self, action: actions.CloseGroup) -> None:
        domain = self._domain(action.group)
        domain.is_closed = True
        domain.regions.clear()
        self.domains.remove(domain)

    def _register(self, action: actions.RegisterMemory) -> None:
        rmb, order, endpoint = action.rmb, actions.RegisterMemory, self.endpoint
        domain = self._domain(rmb.group)
        failure = self._fails(order)
        if failure is not None:
            self._answer(
                order, lambda: endpoint.memory_failed(rmb, *failure, self._wire.now)
            )
            return
        number = next(self._wire.numbers)
        region = Region(number << 32, number, bytearray(rmb.length))
        rmb.handle = domain.regions[region.rkey] = region
        self._answer(
            order,
            lambda: endpoint.memory_registered(
                rmb, region.address, region.rkey, self._wire.now
            ),
        )

    def _clear(self, action: actions.ClearMemory) -> None:
        self._domain(action.rmb.group)
        action.rmb.handle.memory[: action.count] = bytes(action.count)

    def _deregister(self, action: actions.DeregisterMemory) -> None:
        del self._domain(action.rmb.group).regions[action.rmb.handle.rkey]

    def _post_send(self, action: actions.PostSend) -> None:
        pair: QueuePairStub = action.link.handle
        self._wire.note(f"{self.name}: {pair} sends", action.payload)
        if pair.reaches is not None:
            pair.reaches.sends.append(action.payload)

    def _publish_update(self, action: actions.PublishUpdate) -> None:
        self.publish(action.connection)

    # The data path

    def publish(self, connection: Connection) -> None:
        """Publish a connection's state if that is due."""
        if not connection.update_due:
            return
        pair: QueuePairStub = connection.link.handle
        update = connection.take_update()
        there = pair.reaches
        if there is None:
            self._wire.note(f"{self.name}: {pair} is gone, an update is lost")
            return
        if self._wire.newest_only:
            kept = [older for older in there.updates if older[1] != update[1]]
            there.updates = deque(kept)
        there.updates.append(update)
        self._wire.note(f"{self.name}: publishes", update)
        connection.published(not self._wire.publish_later)
        if self._wire.publish_later:
            pair.completions.append(connection.alert_token)

    def place(self, connection: Connection, address: int, data: bytes) -> None:
        """Write into the peer's memory, or break the link where that is not allowed."""
        pair: QueuePairStub = connection.link.handle
        there = pair.reaches
        if there is None:
            return
        domain: Domain = there.link.group.handle
        region = domain.regions.get(connection.remote_rkey)
        start = -1 if region is None else address - region.address
        if region is None or not 0 <= start <= len(region.memory) - len(data):
            fault = (
                f"{self.name} wrote {len(data)} bytes at {address:x}"
                f" with rkey {connection.remote_rkey:x}"
            )
            self._wire.faults.append(fault)
            pair.down = there.down = ("remote access", fault)
            return
        region.memory[start : start + len(data)] = data

    # What arrives

    def pending(self) -> Iterator[Delivery]:
        """Give what can be delivered here, in a fixed order."""
        if any(order not in self.withheld for order, _ in self._answers):
            yield Delivery("answer", self, None)
        for tcp in self.tcp:
            if tcp.is_due:
                yield Delivery("tcp", self, tcp)
        for pair in self.queue_pairs.values():
            if pair.connected is not None:
                yield Delivery("connected", self, pair)
                continue
            if pair.sends:
                yield Delivery("send", self, pair)
            if pair.updates:
                yield Delivery("update", self, pair)
            if pair.completions:
                yield Delivery("publish", self, pair)
            if pair.down is not None and not pair.sends and not pair.updates:
                yield Delivery("down", self, pair)

    def deliver(self, kind: str, place: Any) -> None:
        """Let one thing of `pending` happen."""
        match kind:
            case "answer":
                self._deliver_answer()
            case "tcp":
                self._deliver_tcp(place)
            case "connected":
                self._deliver_connected(place)
            case "send":
                payload = place.sends.popleft()
                self.endpoint.receive_message(place.link, payload, self._wire.now)
            case "update":
                self._deliver_update(place)
            case "publish":
                self._deliver_completion(place)
            case _:
                status, detail = place.down
                # Nothing more arrives; the order to close it tells the other end.
                del self.queue_pairs[place.number]
                self.endpoint.link_down(place.link, status, detail, self._wire.now)
        self.settle()

    def _deliver_answer(self) -> None:
        for position, (order, give) in enumerate(self._answers):
            if order not in self.withheld:
                del self._answers[position]
                give()
                return

    def _deliver_tcp(self, tcp: TcpEnd) -> None:
        tcp.arrived += tcp.transit
        tcp.transit.clear()
        self._read_tcp(tcp)

    def _read_tcp(self, tcp: TcpEnd) -> bool:
        """Read once, as much as is wanted; False when there was nothing."""
        wanted = 0 if tcp.is_deaf else tcp.handshake.wanted
        if wanted and tcp.arrived:
            data = bytes(tcp.arrived[:wanted])
            del tcp.arrived[:wanted]
            self.endpoint.receive_tcp(tcp.handshake, data, self._wire.now)
            return True
        if wanted and tcp.is_cut and not tcp.transit:
            tcp.is_deaf = True
            self.endpoint.tcp_lost(tcp.handshake, self._wire.now, None)
            return True
        return False

    def _deliver_connected(self, pair: QueuePairStub) -> None:
        assert pair.connected is not None
        (status, detail), pair.connected = pair.connected, None
        if status:
            self.endpoint.pair_failed(pair.link, status, detail, self._wire.now)
        else:
            self.endpoint.pair_connected(pair.link, self._wire.now)

    def _deliver_update(self, pair: QueuePairStub) -> None:
        update = pair.updates.popleft()
        found = self.endpoint.receive_update(pair.link, update, self._wire.now)
        if found is None:
            return
        connection, news = found
        self._add_news(connection, news)
        if news & News.ABORTED:
            self._leave(connection)
            return
        self.publish(connection)
        if news & News.CLOSED:
            self.endpoint.reap(connection, self._wire.now)

    def _deliver_completion(self, pair: QueuePairStub) -> None:
        token = pair.completions.popleft()
        connection = self.endpoint.connection_of(pair.link, token)
        if connection is not None:
            self._add_news(connection, connection.publish_completed())


def _message(data: bytes) -> str:
    try:
        return str(decode(data)[1])
    except DecodeError as error:
        return f"{len(data)} bytes: {error}"


def words(what: object) -> str:
    """Put an event, an update or the bytes of a message into words."""
    match what:
        case bytes():
            return _message(what)
        case Established(_, connection):
            return f"established {connection.alert_token:08x}"
        case FellBack(_, reason):
            return f"fell back: {reason}"
        case Failed(_, error):
            return f"failed: {error}"
        case (sequence, token, producer, consumer, flags):
            return (
                f"update {sequence} to {token:08x} producer={producer:012x}"
                f" consumer={consumer:012x} flags={flags:04x}"
            )
    return str(what)
