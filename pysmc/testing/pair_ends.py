"""One end of a `CorePair`: what a driver would hold, and how it carries out orders.

`PairEnd` answers its endpoint's orders and delivers to it what arrived; `pair_wire` has
what lies between two of them. What is delivered when, and what goes wrong, `CorePair`
decides.

Source: the contract in `pysmc.core.actions`; RFC 7609 section 3.5.5.1.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.core import actions
from pysmc.core.events import (
    ConnectionLost,
    Established,
    Failed,
    LimitReached,
    News,
)
from pysmc.testing.pair_wire import (
    Delivery,
    Domain,
    QueuePairStub,
    Region,
    TcpEnd,
    Wire,
    words,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pysmc.core.actions import Action
    from pysmc.core.connection import Connection, Update
    from pysmc.core.endpoint import Endpoint
    from pysmc.core.events import Event
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup

__all__ = ["PairEnd", "Withheld"]


class Withheld(NamedTuple):
    """An order that was carried out, and whose answer waits."""

    order: Action
    give: Callable[[float], None]
    """Gives the answer; its argument is the time."""


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
        self.record: list[Action | Event | Update] | None = None
        """What the endpoint orders, tells and publishes, in order, while somebody wants
        to know: set it to a list."""
        self._answers: list[Withheld] = []
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
            if self.record is not None:
                self.record += [*ordered, *events]
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
        if isinstance(event, LimitReached):
            self._wire.note(f"{self.name}: {event.name} is {event.limit}: reached")
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
        self._answer(action, partial(self._look_at_tcp, action.handshake.handle))

    def _look_at_tcp(self, tcp: TcpEnd, now: float) -> None:
        if not self._read_tcp(tcp):
            self.endpoint.tcp_quiet(tcp.handshake, now)

    def _answer(self, order: Action, give: Callable[[float], None]) -> None:
        if type(order) in self.withheld:
            self._answers.append(Withheld(order, give))
        else:
            give(self._wire.now)

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
        link, endpoint = action.link, self.endpoint
        self._domain(link.group)
        failure = self._fails(actions.CreateQueuePair)
        if failure is not None:
            self._answer(action, partial(endpoint.pair_failed, link, *failure))
            return
        pair = QueuePairStub(next(self._wire.numbers), self, link)
        link.handle = self.queue_pairs[pair.number] = pair
        self._answer(action, partial(endpoint.pair_created, link, pair.number))

    def _connect_pair(self, action: actions.ConnectQueuePair) -> None:
        link, endpoint = action.link, self.endpoint
        pair: QueuePairStub = link.handle
        failure = self._fails(actions.ConnectQueuePair)
        if failure is not None:
            self._answer(action, partial(endpoint.pair_failed, link, *failure))
            return
        pair.remote_number = action.remote.qp_number
        there = self.peer.queue_pairs.get(pair.remote_number)
        if there is None:
            pair.connected = ("unreachable", "there is no such queue pair")
        elif there.remote_number == pair.number:
            pair.peer, there.peer = there, pair
            pair.connected = there.connected = ("", "")
        self._answer(action, partial(endpoint.pair_connecting, link))

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
        rmb, endpoint = action.rmb, self.endpoint
        domain = self._domain(rmb.group)
        failure = self._fails(actions.RegisterMemory)
        if failure is not None:
            self._answer(action, partial(endpoint.memory_failed, rmb, *failure))
            return
        number = next(self._wire.numbers)
        region = Region(number << 32, number, bytearray(rmb.length))
        rmb.handle = domain.regions[region.rkey] = region
        self._answer(
            action,
            partial(endpoint.memory_registered, rmb, region.address, region.rkey),
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
        if self.record is not None:
            self.record.append(update)
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
        answers = self._answers
        if answers and any(type(order) not in self.withheld for order, _ in answers):
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
                self.feed_message(place.link, place.sends.popleft())
            case "update":
                self.feed_update(place.link, place.updates.popleft())
            case "publish":
                self._deliver_completion(place)
            case _:
                status, detail = place.down
                self.feed_loss(place.link, status, detail)
        self.settle()

    # What arrives, whether it was on its way or not

    def feed_tcp(self, tcp: TcpEnd, data: bytes) -> None:
        """Let bytes arrive on TCP, and read once, as much as is wanted."""
        tcp.arrived += data
        self._read_tcp(tcp)

    def feed_message(self, link: Link, payload: bytes) -> None:
        """Let a SEND arrive."""
        self.endpoint.receive_message(link, payload, self._wire.now)

    def feed_update(self, link: Link, update: Update) -> None:
        """Let an update arrive, and do what a driver does with its news."""
        found = self.endpoint.receive_update(link, update, self._wire.now)
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

    def feed_loss(self, link: Link, status: str, detail: str) -> None:
        """Let a link's queue pair be gone."""
        # Nothing more arrives; the order to close it tells the other end.
        pair: QueuePairStub | None = link.handle
        if pair is not None:
            self.queue_pairs.pop(pair.number, None)
        self.endpoint.link_down(link, status, detail, self._wire.now)

    def _deliver_answer(self) -> None:
        for position, (order, give) in enumerate(self._answers):
            if type(order) not in self.withheld:
                del self._answers[position]
                give(self._wire.now)
                return

    def unanswered(self) -> tuple[Action, ...]:
        """Give the orders whose answers are withheld, the oldest first."""
        return tuple(order for order, _ in self._answers)

    def answer_oldest(self, status: str = "", detail: str = "") -> None:
        """Answer the oldest withheld order now.

        Args:
            status: Value of the fabric's status with which it fails; "" is success.
            detail: A sentence for people.
        """
        order, give = self._answers.pop(0)
        now = self._wire.now
        match order:
            case actions.RegisterMemory(rmb) if status:
                domain: Domain = rmb.group.handle
                domain.regions.pop(rmb.handle.rkey, None)
                self.endpoint.memory_failed(rmb, status, detail, now)
            case actions.CreateQueuePair(link) | actions.ConnectQueuePair(link) if (
                status
            ):
                self.endpoint.pair_failed(link, status, detail, now)
            case _:
                give(now)
        self.settle()

    def _deliver_tcp(self, tcp: TcpEnd) -> None:
        data = bytes(tcp.transit)
        tcp.transit.clear()
        self.feed_tcp(tcp, data)

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

    def _deliver_completion(self, pair: QueuePairStub) -> None:
        token = pair.completions.popleft()
        connection = self.endpoint.connection_of(pair.link, token)
        if connection is not None:
            self._add_news(connection, connection.publish_completed())
