"""Two cores back to back, without a socket, a fabric or a clock.

`CorePair` plays both drivers: it carries out the orders of two `Endpoint`s, moves TCP
bytes, messages and updates between them one at a time, and lets its own time pass.
Everything that a test may want to go wrong has a hook: what is on its way can be held,
dropped or delivered in any order, orders can fail or stay unanswered, links and TCP
connections can be cut. After every step both endpoints check their own invariants.

It decides nothing about the protocol, and needs no test framework::

    pair = CorePair()
    client, server = pair.establish()
    pair.write(pair.client, client, b"hello")
    pair.drive()
    assert pair.read(pair.server, server, 100) == b"hello"

Source: the contract in `pysmc.core.endpoint`; RFC 7609 section 3.5.5.1 (the order of
first contact).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.config import KIB, Config
from pysmc.core import actions
from pysmc.core.endpoint import Endpoint, FabricOffer, Identity
from pysmc.core.events import ConnectionLost, Established, Failed, FellBack, News
from smcproto import clc, llc
from smcproto.errors import DecodeError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from pysmc.core.actions import Action
    from pysmc.core.connection import Connection, Update
    from pysmc.core.events import Event
    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup
    from pysmc.core.rmb import Rmb

__all__ = [
    "CorePair",
    "CountingTokens",
    "Delivery",
    "PairEnd",
    "QueuePairStub",
    "Region",
    "TcpEnd",
]

SMALL = Config(rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB)
"""The configuration of both ends unless told otherwise: small buffers are full soon."""


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
        return f"{self.kind} -> {self.end.name} {self.place or ''}".rstrip()


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

    def __str__(self) -> str:
        return f"qp {self.number}"


class PairEnd:
    """One end: an endpoint and what its driver would hold.

    Args:
        name: "client" or "server", after what it is in `CorePair.connect`.
        endpoint: Its core.
    """

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        self.name = name
        self.endpoint = endpoint
        self.queue_pairs: dict[int, QueuePairStub] = {}
        self.domains: list[Domain] = []
        self.tcp: list[TcpEnd] = []
        self.answers: deque[tuple[str, Callable[[], None]]] = deque()
        self.events: list[Event] = []
        self.lost: list[ConnectionLost] = []
        """Established connections that were lost, with why."""
        self.failures: deque[tuple[type[Action], str, str]] = deque()

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


class CorePair:
    """Two endpoints and everything between them.

    Args:
        config: Of both ends.
        server_config: Of the server, where it differs.
        newest_only: True for a fabric that delivers only the newest update of a
            connection, False for one that delivers every one.
        publish_later: True when a publish completes later instead of at once.
        silent_close: True when nobody is told that a queue pair was closed (RDMA);
            False when the other one goes down (shared memory).
        offers: Devices of both ends; None is one that both share.
        server_offers: Devices of the server, where they differ.
        loopback: One endpoint plays both ends, as in a process that talks to itself.
    """

    def __init__(
        self,
        config: Config = SMALL,
        server_config: Config | None = None,
        *,
        newest_only: bool = False,
        publish_later: bool = False,
        silent_close: bool = False,
        offers: Sequence[FabricOffer] | None = None,
        server_offers: Sequence[FabricOffer] | None = None,
        loopback: bool = False,
    ) -> None:
        self.newest_only = newest_only
        self.publish_later = publish_later
        self.silent_close = silent_close
        self.now = 0.0
        self.trace: list[str] = []
        """One line for everything that happened."""
        self.faults: list[str] = []
        """Writes outside the peer's memory; each broke its link."""
        self.news: dict[Connection, int] = {}
        """All `News` of a connection since it was last looked at here."""
        self.checking = True
        """Whether invariants are checked after every step."""
        self.server_first = False
        """Whose timer runs first when both are due at the same time."""
        self._held: set[tuple[str, str]] = set()
        self._withheld: set[tuple[str, type[Action]]] = set()
        self._numbers = count(0x100)
        self._turn = 0
        shared = offers or (_offer(1),)
        self.client = PairEnd("client", _endpoint(1, shared, config))
        self.server = self.client
        if not loopback:
            shared = server_offers or offers or (_offer(2),)
            self.server = PairEnd(
                "server", _endpoint(2, shared, server_config or config)
            )

    # Who is who

    @property
    def ends(self) -> tuple[PairEnd, ...]:
        """Both ends; one of them in loopback."""
        if self.client is self.server:
            return (self.client,)
        return (self.client, self.server)

    def other(self, end: PairEnd) -> PairEnd:
        """Give the other end."""
        return self.server if end is self.client else self.client

    def peer_of(self, end: PairEnd, connection: Connection) -> Connection:
        """Give the connection at the other end.

        Raises:
            KeyError: It is not there any more.
        """
        for group in self.other(end).endpoint.groups:
            found = group.connections.get(connection.peer_token)
            if found is not None and found.peer_token == connection.alert_token:
                return found
        raise KeyError(connection)

    # Handshakes

    def connect(
        self, opener: PairEnd | None = None, peer_key: Hashable = "host"
    ) -> tuple[Handshake, Handshake]:
        """Begin a handshake on a new TCP connection; nothing is delivered yet.

        Args:
            opener: Who opens it; the client by default.
            peer_key: What both ends are told of who is at the other end.

        Returns:
            The opener's handshake and the other end's.
        """
        opener = opener or self.client
        accepter = self.other(opener)
        number = next(self._numbers)
        there, here = TcpEnd(number, opener), TcpEnd(number, accepter)
        there._peer, here._peer = here, there  # noqa: SLF001 - both are made here
        opener.tcp.append(there)
        accepter.tcp.append(here)
        server = accepter.endpoint.accept(peer_key, self.now)
        here._handshake, server.handle = server, here  # noqa: SLF001
        client = opener.endpoint.connect(peer_key, self.now)
        there._handshake, client.handle = client, there  # noqa: SLF001
        self.settle(opener)
        self.settle(accepter)
        return client, server

    def establish(
        self, opener: PairEnd | None = None, peer_key: Hashable = "host"
    ) -> tuple[Connection, Connection]:
        """Connect and drive until both ends have a connection.

        Returns:
            The opener's connection and the other end's.

        Raises:
            AssertionError: A handshake did not end well; the trace says how.
        """
        client, server = self.connect(opener, peer_key)
        self.drive()
        return self.connection(client), self.connection(server)

    def connection(self, handshake: Handshake) -> Connection:
        """Give the connection of a handshake that ended well.

        Raises:
            AssertionError: It did not, or not yet.
        """
        verdict = self.verdict(handshake)
        assert isinstance(verdict, Established), self.explain(verdict)
        return verdict.connection

    def verdict(self, handshake: Handshake) -> Event | None:
        """Tell how a handshake ended, None while it has not."""
        tcp: TcpEnd = handshake.handle
        return tcp.verdict

    def explain(self, verdict: object) -> str:
        """Put a verdict and the trace into a text for a failing test."""
        return "\n".join([f"the verdict is {verdict}", *self.trace])

    def abandon(self, handshake: Handshake) -> None:
        """Give up a handshake as a cancelled task does; its TCP connection is cut."""
        tcp: TcpEnd = handshake.handle
        self._note(f"{tcp.end.name}: abandons {tcp}")
        tcp.end.endpoint.abandon(handshake, self.now)
        tcp.is_deaf = True
        tcp.peer.is_cut = True
        self.settle(tcp.end)

    # The application's side

    def write(self, end: PairEnd, connection: Connection, data: bytes) -> int:
        """Write as many bytes as there is room for, and publish them.

        Returns:
            How many bytes were written.
        """
        done = 0
        while spans := connection.claim(len(data) - done):
            for address, length in spans:
                self._place(end, connection, address, data[done : done + length])
                done += length
            self.publish(end, connection)
            if done == len(data):
                break
        self.publish(end, connection)
        self._note(f"{end.name}: wrote {done} of {len(data)}")
        return done

    def read(self, end: PairEnd, connection: Connection, limit: int) -> bytes:
        """Read up to ``limit`` bytes that arrived, and publish what is due."""
        region: Region = connection.rmb.handle
        data = bytearray()
        while len(data) < limit:
            offset, length = connection.peek(limit - len(data))
            if length == 0:
                break
            data += region.memory[offset : offset + length]
            connection.consume(length)
        self.publish(end, connection)
        self._note(f"{end.name}: read {len(data)} of {limit}")
        return bytes(data)

    def shutdown_write(self, end: PairEnd, connection: Connection) -> None:
        """Say that no more bytes will be written."""
        connection.shutdown_write()
        self._end_of(end, connection, "done")

    def close(self, end: PairEnd, connection: Connection) -> None:
        """Close a connection."""
        connection.close()
        self._end_of(end, connection, "closes")

    def abort(self, end: PairEnd, connection: Connection) -> None:
        """Abort a connection."""
        connection.abort()
        self._end_of(end, connection, "aborts")

    def _end_of(self, end: PairEnd, connection: Connection, what: str) -> None:
        self._note(f"{end.name}: {what} {connection.alert_token:08x}")
        self.publish(end, connection)
        end.endpoint.reap(connection, self.now)
        self.settle(end)

    def publish(self, end: PairEnd, connection: Connection) -> None:
        """Publish a connection's state if that is due."""
        if not connection.update_due:
            return
        pair: QueuePairStub = connection.link.handle
        update = connection.take_update()
        there = pair.peer
        if pair.is_closed or there is None or there.is_closed:
            self._note(f"{end.name}: {pair} is gone, update lost")
            return
        if self.newest_only:
            older = [kept for kept in there.updates if kept[1] == update[1]]
            for kept in older:
                there.updates.remove(kept)
        there.updates.append(update)
        self._note(f"{end.name}: publishes {_words(update)}")
        connection.published(not self.publish_later)
        if self.publish_later:
            pair.completions.append(connection.alert_token)

    def _place(
        self, end: PairEnd, connection: Connection, address: int, data: bytes
    ) -> None:
        pair: QueuePairStub = connection.link.handle
        there = pair.peer
        if pair.is_closed or there is None or there.is_closed:
            return
        domain: Domain = there.link.group.handle
        region = domain.regions.get(connection.remote_rkey)
        start = 0 if region is None else address - region.address
        if region is None or not 0 <= start <= len(region.memory) - len(data):
            self.faults.append(
                f"{end.name} wrote {len(data)} bytes at {address:x} with rkey"
                f" {connection.remote_rkey:x}"
            )
            self.break_link(connection.link, "remote access")
            return
        region.memory[start : start + len(data)] = data

    # What goes wrong

    def hold(self, kind: str, end: PairEnd) -> None:
        """Deliver nothing of a kind to an end until `release`.

        Args:
            kind: See `Delivery.kind`.
            end: Where it would arrive.
        """
        self._held.add((kind, end.name))

    def release(self, kind: str, end: PairEnd) -> None:
        """Deliver again what `hold` held back."""
        self._held.discard((kind, end.name))

    def withhold(self, end: PairEnd, order: type[Action]) -> None:
        """Leave orders of a kind unanswered until `answer`.

        Args:
            end: Whose orders.
            order: CreateQueuePair, ConnectQueuePair or RegisterMemory.
        """
        self._withheld.add((end.name, order))

    def answer(self, end: PairEnd, order: type[Action]) -> None:
        """Answer orders of a kind from now on, the withheld ones first."""
        self._withheld.discard((end.name, order))

    def fail_next(
        self, end: PairEnd, order: type[Action], status: str, detail: str = ""
    ) -> None:
        """Let the next order of a kind fail.

        Args:
            end: Whose order.
            order: CreateQueuePair, ConnectQueuePair or RegisterMemory.
            status: Value of the fabric's status.
            detail: A sentence for people.
        """
        end.failures.append((order, status, detail))

    def drop(self, kind: str, end: PairEnd) -> int:
        """Lose what is on its way to an end.

        Args:
            kind: "tcp", "send" or "update".
            end: Where it would have arrived.

        Returns:
            How many bytes, messages or updates were lost.
        """
        queues: list[Any] = []
        if kind == "tcp":
            queues += [tcp.transit for tcp in end.tcp]
        for pair in end.queue_pairs.values():
            if kind in {"send", "update"}:
                queues.append(pair.sends if kind == "send" else pair.updates)
        lost = sum(len(queue) for queue in queues)
        for queue in queues:
            queue.clear()
        self._note(f"dropped: {lost} {kind} to {end.name}")
        return lost

    def send_tcp(self, handshake: Handshake, data: bytes) -> None:
        """Send bytes on the TCP connection of a handshake, as its end might."""
        tcp: TcpEnd = handshake.handle
        tcp.peer.transit += data

    def send_message(self, link: Link, payload: bytes) -> None:
        """SEND bytes on a link, as its end might."""
        pair: QueuePairStub = link.handle
        assert pair.peer is not None, "the link is not connected"
        pair.peer.sends.append(payload)

    def send_update(self, connection: Connection, **changes: int) -> None:
        """Publish an update that says other than what is true.

        Args:
            connection: In whose name.
            changes: ``sequence``, ``token``, ``producer``, ``consumer`` or ``flags``
                in place of what the connection would have said.
        """
        pair: QueuePairStub = connection.link.handle
        assert pair.peer is not None, "the link is not connected"
        names = ("sequence", "token", "producer", "consumer", "flags")
        said = dict(zip(names, connection.take_update(), strict=True))
        sequence, token, producer, consumer, flags = (said | changes).values()
        pair.peer.updates.append((sequence, token, producer, consumer, flags))

    def cut_tcp(self, handshake: Handshake, *ends: PairEnd) -> None:
        """End a handshake's TCP connection behind the bytes that are on their way.

        Args:
            handshake: Of either end.
            ends: Who sees the EOF; both by default.
        """
        tcp: TcpEnd = handshake.handle
        for place in (tcp, tcp.peer):
            if not ends or place.end in ends:
                place.is_cut = True
        self._note(f"cut: {tcp}")

    def break_link(
        self, link: Link, status: str = "peer gone", *ends: PairEnd, detail: str = ""
    ) -> None:
        """Let a link's queue pairs go down.

        Args:
            link: Of either end.
            status: Value of the fabric's status.
            ends: Who notices; both by default.
            detail: A sentence for people.
        """
        pair: QueuePairStub = link.handle
        for place in (pair, pair.peer):
            if place is not None and (not ends or place.end in ends):
                place.down = (status, detail)
        self._note(f"cut: {pair} {status}")

    # Time and steps

    def next_timer(self) -> float | None:
        """Tell when the next timer of either end is due."""
        times = [end.endpoint.next_timer() for end in self.ends]
        return min((when for when in times if when is not None), default=None)

    def advance(self, seconds: float) -> None:
        """Let time pass; timers run at their moments, and all is delivered."""
        until = self.now + seconds
        self.drive()
        while (when := self.next_timer()) is not None and when <= until:
            self.now = max(self.now, when)
            self.run_timers()
            self.drive()
        self.now = until

    def run_timers(self) -> None:
        """Run what is due now, once for each end, and deliver nothing."""
        for end in self.ends[:: -1 if self.server_first else 1]:
            when = end.endpoint.next_timer()
            if when is not None and when <= self.now:
                self._note(f"{end.name}: timer")
                end.endpoint.handle_timer(self.now)
                self.settle(end)

    def pending(self) -> list[Delivery]:
        """List what can happen next, in a fixed order."""
        return [
            delivery
            for end in self.ends
            for delivery in self._pending_at(end)
            if (delivery.kind, end.name) not in self._held
        ]

    def _pending_at(self, end: PairEnd) -> Iterator[Delivery]:
        if any(self._may_answer(end, order) for order, _ in end.answers):
            yield Delivery("answer", end, None)
        for tcp in end.tcp:
            if self._is_tcp_due(tcp):
                yield Delivery("tcp", end, tcp)
        for pair in end.queue_pairs.values():
            if pair.connected is not None:
                yield Delivery("connected", end, pair)
                continue
            if pair.sends:
                yield Delivery("send", end, pair)
            if pair.updates:
                yield Delivery("update", end, pair)
            if pair.completions:
                yield Delivery("publish", end, pair)
            if pair.down is not None and not pair.sends and not pair.updates:
                yield Delivery("down", end, pair)

    def _may_answer(self, end: PairEnd, order: str) -> bool:
        return not any(
            name == end.name and kind.__name__ == order for name, kind in self._withheld
        )

    @staticmethod
    def _is_tcp_due(tcp: TcpEnd) -> bool:
        if tcp.transit:
            return True
        if tcp.is_deaf or not tcp.handshake.wanted:
            return False
        return bool(tcp.arrived) or tcp.is_cut

    def step(self, delivery: Delivery | None = None) -> bool:
        """Let one thing happen.

        Args:
            delivery: One of `pending`; None takes them in turn.

        Returns:
            False when there was nothing.
        """
        if delivery is None:
            choices = self.pending()
            if not choices:
                return False
            self._turn += 1
            delivery = choices[self._turn % len(choices)]
        kind, end, place = delivery
        self._note(f"deliver: {delivery}")
        match kind:
            case "answer":
                self._deliver_answer(end)
            case "tcp":
                self._deliver_tcp(place)
            case "connected":
                self._deliver_connected(end, place)
            case "send":
                payload = place.sends.popleft()
                end.endpoint.receive_message(place.link, payload, self.now)
            case "update":
                self._deliver_update(end, place)
            case "publish":
                self._deliver_completion(end, place)
            case _:
                status, detail = place.down
                self._forget(end, place)
                end.endpoint.link_down(place.link, status, detail, self.now)
        self.settle(end)
        return True

    def drive(self) -> int:
        """Step until nothing can happen any more; gives the number of steps.

        Raises:
            AssertionError: There is no end to it.
        """
        return self.drive_bounded(100_000)

    def drive_bounded(self, most: int) -> int:
        """Step until nothing can happen any more; gives the number of steps.

        Raises:
            AssertionError: More than ``most`` steps were not enough: a livelock.
        """
        for steps in range(most + 1):
            if not self.step():
                return steps
        tail = "\n".join(self.trace[-30:])
        message = f"no end after {most} steps; the last ones:\n{tail}"
        raise AssertionError(message)

    # Deliveries

    def _deliver_answer(self, end: PairEnd) -> None:
        for position, (order, give) in enumerate(end.answers):
            if self._may_answer(end, order):
                del end.answers[position]
                give()
                return

    def _deliver_tcp(self, tcp: TcpEnd) -> None:
        tcp.arrived += tcp.transit
        tcp.transit.clear()
        if not tcp.is_deaf:
            self._read_tcp(tcp)

    def _read_tcp(self, tcp: TcpEnd) -> bool:
        """Read once, as much as is wanted; False when there was nothing."""
        endpoint, wanted = tcp.end.endpoint, tcp.handshake.wanted
        if not wanted:
            return False
        if tcp.arrived:
            data = bytes(tcp.arrived[:wanted])
            del tcp.arrived[:wanted]
            endpoint.receive_tcp(tcp.handshake, data, self.now)
            return True
        if tcp.is_cut and not tcp.transit:
            tcp.is_deaf = True
            endpoint.tcp_lost(tcp.handshake, self.now, None)
            return True
        return False

    def _deliver_connected(self, end: PairEnd, pair: QueuePairStub) -> None:
        assert pair.connected is not None
        (status, detail), pair.connected = pair.connected, None
        if status:
            end.endpoint.pair_failed(pair.link, status, detail, self.now)
        else:
            end.endpoint.pair_connected(pair.link, self.now)

    def _deliver_update(self, end: PairEnd, pair: QueuePairStub) -> None:
        update = pair.updates.popleft()
        found = end.endpoint.receive_update(pair.link, update, self.now)
        if found is None:
            return
        connection, news = found
        self.news[connection] = self.news.get(connection, 0) | news
        if news & News.ABORTED:
            connection.abort()
        self.publish(end, connection)
        if news & (News.CLOSED | News.ABORTED):
            end.endpoint.reap(connection, self.now)

    def _deliver_completion(self, end: PairEnd, pair: QueuePairStub) -> None:
        token = pair.completions.popleft()
        connection = end.endpoint.connection_of(pair.link, token)
        if connection is not None:
            news = connection.publish_completed()
            self.news[connection] = self.news.get(connection, 0) | news

    # Orders and news

    def settle(self, end: PairEnd) -> None:
        """Carry out an end's orders, take its news, and check the invariants."""
        endpoint = end.endpoint
        while True:
            ordered, events = endpoint.take_actions(), endpoint.take_events()
            if not ordered and not events:
                break
            for action in ordered:
                self._carry_out(end, action)
            for event in events:
                self._tell(end, event)
        if self.checking:
            self.check()

    def _carry_out(self, end: PairEnd, action: Action) -> None:
        match action:
            case actions.SendClc(handshake, data):
                self._send_clc(end, handshake, data)
            case actions.CheckTcp(handshake):
                if not self._read_tcp(handshake.handle):
                    end.endpoint.tcp_quiet(handshake, self.now)
            case actions.CreateQueuePair(link):
                self._create_pair(end, link)
            case actions.ConnectQueuePair(link):
                self._connect_pair(end, action)
            case actions.CloseQueuePair(link):
                self._close_pair(end, link)
            case actions.CloseGroup(group):
                domain = self._domain(end, group)
                domain.is_closed = True
                domain.regions.clear()
                end.domains.remove(domain)
            case actions.RegisterMemory(rmb):
                self._register(end, rmb)
            case actions.ClearMemory(rmb):
                assert not rmb.group.handle.is_closed, "cleared after its group"
                rmb.handle.memory[:] = bytes(rmb.length)
            case actions.DeregisterMemory(rmb):
                assert not rmb.group.handle.is_closed, "deregistered after its group"
                del rmb.group.handle.regions[rmb.handle.rkey]
            case actions.PostSend(link, payload):
                self._post_send(end, link, payload)
            case actions.PublishUpdate(connection):
                self.publish(end, connection)

    def _tell(self, end: PairEnd, event: Event) -> None:
        end.events.append(event)
        match event:
            case Established(handshake) | FellBack(handshake) | Failed(handshake):
                tcp: TcpEnd = handshake.handle
                assert tcp.verdict is None, "a handshake ended twice"
                tcp.verdict = event
                self._note(f"{end.name}: {tcp} {_words(event)}")
                if isinstance(event, Failed):
                    tcp.is_deaf = True
                    tcp.peer.is_cut = True
            case ConnectionLost(connection, error):
                end.lost.append(event)
                self._note(f"{end.name}: lost {connection.alert_token:08x}: {error}")

    def _send_clc(self, end: PairEnd, handshake: Handshake, data: bytes) -> None:
        tcp: TcpEnd = handshake.handle
        self._note(f"{end.name}: {tcp} sends {clc.parse(data)}")
        tcp.peer.transit += data

    def _answer(
        self, end: PairEnd, order: type[Action], give: Callable[[], None]
    ) -> None:
        if (end.name, order) in self._withheld:
            end.answers.append((order.__name__, give))
        else:
            give()

    def _failure(self, end: PairEnd, order: type[Action]) -> tuple[str, str] | None:
        for position, (kind, status, detail) in enumerate(end.failures):
            if kind is order:
                del end.failures[position]
                return status, detail
        return None

    def _domain(self, end: PairEnd, group: LinkGroup) -> Domain:
        if group.handle is None:
            group.handle = Domain()
            end.domains.append(group.handle)
        domain: Domain = group.handle
        assert not domain.is_closed, "an order for a group that was closed"
        return domain

    def _create_pair(self, end: PairEnd, link: Link) -> None:
        order, now = actions.CreateQueuePair, self.now
        self._domain(end, link.group)
        failure = self._failure(end, order)
        if failure is not None:
            status, detail = failure
            self._answer(
                end, order, lambda: end.endpoint.pair_failed(link, status, detail, now)
            )
            return
        pair = QueuePairStub(next(self._numbers), end, link)
        link.handle = end.queue_pairs[pair.number] = pair
        self._answer(
            end, order, lambda: end.endpoint.pair_created(link, pair.number, self.now)
        )

    def _connect_pair(self, end: PairEnd, action: actions.ConnectQueuePair) -> None:
        order, link = actions.ConnectQueuePair, action.link
        pair: QueuePairStub = link.handle
        failure = self._failure(end, order)
        if failure is not None:
            status, detail = failure
            self._answer(
                end,
                order,
                lambda: end.endpoint.pair_failed(link, status, detail, self.now),
            )
            return
        pair.remote_number = action.remote.qp_number
        there = self.other(end).queue_pairs.get(pair.remote_number)
        if there is None:
            pair.connected = ("unreachable", "there is no such queue pair")
        elif there.remote_number == pair.number:
            pair.peer, there.peer = there, pair
            pair.connected = there.connected = ("", "")
        self._answer(end, order, lambda: end.endpoint.pair_connecting(link, self.now))

    def _close_pair(self, end: PairEnd, link: Link) -> None:
        pair: QueuePairStub | None = link.handle
        if pair is None or pair.is_closed:
            return
        self._forget(end, pair)
        there = pair.peer
        if self.silent_close:
            return
        if there is not None:
            there.down = there.down or ("peer gone", "")
        else:
            waiting = self.other(end).queue_pairs.get(pair.remote_number)
            if waiting is not None:
                waiting.connected = ("peer gone", "")

    def _forget(self, end: PairEnd, pair: QueuePairStub) -> None:
        pair.is_closed = True
        end.queue_pairs.pop(pair.number, None)

    def _register(self, end: PairEnd, rmb: Rmb) -> None:
        order = actions.RegisterMemory
        domain = self._domain(end, rmb.group)
        failure = self._failure(end, order)
        if failure is not None:
            status, detail = failure
            self._answer(
                end,
                order,
                lambda: end.endpoint.memory_failed(rmb, status, detail, self.now),
            )
            return
        number = next(self._numbers)
        region = Region(number << 32, number, bytearray(rmb.length))
        rmb.handle = domain.regions[region.rkey] = region
        self._answer(
            end,
            order,
            lambda: end.endpoint.memory_registered(
                rmb, region.address, region.rkey, self.now
            ),
        )

    def _post_send(self, end: PairEnd, link: Link, payload: bytes) -> None:
        pair: QueuePairStub = link.handle
        there = pair.peer
        self._note(f"{end.name}: {pair} sends {_message(payload)}")
        if not pair.is_closed and there is not None and not there.is_closed:
            there.sends.append(payload)

    # Checks

    def check(self) -> None:
        """Check what must hold at any time.

        Raises:
            AssertionError: Something does not; the text says what.
        """
        for end in self.ends:
            end.endpoint.check(self.now)
            living = {id(group.handle) for group in end.endpoint.groups}
            for domain in end.domains:
                assert id(domain) in living, f"{end.name}: memory of a group that ended"

    def check_released(self) -> None:
        """Check that nothing is left of anything.

        Raises:
            AssertionError: Something is; the text says what.
        """
        for end in self.ends:
            endpoint = end.endpoint
            left = {
                "groups": endpoint.groups,
                "handshakes": endpoint.handshake_count,
                "timer": endpoint.next_timer(),
                "queue pairs": end.queue_pairs,
                "domains": end.domains,
            }
            found = {name: what for name, what in left.items() if what}
            assert not found, f"{end.name}: left over: {found}"

    def shutdown(self) -> None:
        """Close both ends as their loops would, and check that nothing is left."""
        for end in self.ends:
            end.endpoint.shutdown(self.now)
            self.settle(end)
        self.drive()
        self.check_released()

    def _note(self, line: str) -> None:
        self.trace.append(f"{self.now:9.3f} {line}")


def _offer(number: int) -> FabricOffer:
    return FabricOffer(
        fabric="sim",
        eids=("PAIR",),
        gid=bytes(15) + bytes((number,)),
        mac=bytes((2, 0, 0, 0, 0, number)),
        mtu_code=3,
    )


def _endpoint(number: int, offers: Sequence[FabricOffer], config: Config) -> Endpoint:
    identity = Identity(bytes((0, number, 2, 0, 0, 0, 0, number)), f"host{number}")
    return Endpoint(identity, offers, config, CountingTokens(number << 16))


def _message(payload: bytes) -> str:
    try:
        return str(llc.parse(payload))
    except DecodeError as error:
        return f"{len(payload)} bytes: {error}"


def _words(what: object) -> str:
    match what:
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
