"""Deliver any message to an endpoint in any state, and look at what it does.

`EndpointIn` is an endpoint in a named state of `pysmc.testing.states.STATES`; `deliver`
lets one thing arrive there and gives a record of the state before and after, of the
orders and the news, and of what was said on the wire::

    endpoint = EndpointIn("client/await-link")
    (request,) = endpoint.awaited                       # what the peer has sent
    seen = endpoint.deliver(replace(request, qp_number=7))
    assert seen.after.handshake == "FELL_BACK"          # the client declines
    assert [type(message).__name__ for message in seen.said] == ["Decline"]

What is delivered is a message of smcproto, or one of the records below for bytes that
are none, and for everything else that can happen. The orders are carried out as a
driver does it; the peer does nothing. After each delivery the endpoint checks its
invariants. It is deterministic, and needs no test framework.

Source: the contract in `pysmc.core.endpoint`.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from pysmc.core.actions import Action, PostSend, SendClc
from pysmc.core.events import Event
from pysmc.core.link import LinkState
from pysmc.testing.pair import SMALL
from pysmc.testing.pair_wire import words
from pysmc.testing.states import STATES
from smcproto import cdc, clc, llc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pysmc.config import Config
    from pysmc.core.connection import Connection, Update
    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link
    from pysmc.testing.states import Scene

__all__ = [
    "Answer",
    "Delivered",
    "EndpointIn",
    "Input",
    "LinkLost",
    "Look",
    "OnLink",
    "OnTcp",
    "PairConnected",
    "PublishCompleted",
    "TcpLost",
    "TimePasses",
    "deliver",
]


@dataclass(frozen=True, slots=True)
class OnTcp:
    """Bytes on the handshake's TCP connection, whatever they are."""

    data: bytes


@dataclass(frozen=True, slots=True)
class OnLink:
    """A SEND on the link, whatever it is: an update if its first byte is FE."""

    data: bytes


@dataclass(frozen=True, slots=True)
class TcpLost:
    """TCP ends: an EOF, or an error with this text."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The link's queue pair is gone."""

    status: str = "peer gone"
    """Value of the fabric's status."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PairConnected:
    """The connection attempt of the queue pair has ended; "" is success."""

    status: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to the order that is open longest; see `EndpointIn.unanswered`."""

    status: str = ""
    """Value of the fabric's status; "" is success."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PublishCompleted:
    """The oldest publish of the connection has completed."""


@dataclass(frozen=True, slots=True)
class TimePasses:
    """Nothing arrives for so long; timers run at their moments."""

    seconds: float


Message: TypeAlias = clc.ClcMessage | llc.LlcMessage | cdc.CdcMessage

Input: TypeAlias = (
    Message
    | OnTcp
    | OnLink
    | TcpLost
    | LinkLost
    | PairConnected
    | Answer
    | PublishCompleted
    | TimePasses
)
"""What can be delivered."""


@dataclass(frozen=True, slots=True)
class Look:
    """What an endpoint looks like from outside, at one moment."""

    handshake: str = ""
    """Name of the handshake's state; empty while there is none."""
    link: str = ""
    """Name of the link's state."""
    connection: str = ""
    """The RFC's name of the connection's joint state."""
    memory: str = ""
    """Name of the state of the connection's RMB."""
    readable: int = 0
    """Bytes that can be read."""
    writable: int = 0
    """Bytes that can be written."""
    error: str = ""
    """Type of the error that the connection ended with."""
    groups: int = 0
    """Link groups of the endpoint."""
    connections: int = 0
    """Connections that updates find, of all groups."""
    handshakes: int = 0
    """Handshakes in progress."""
    timer: float | None = None
    """Seconds until the next timer; None for never."""

    def __str__(self) -> str:
        parts = [
            self.handshake,
            self.link and f"link {self.link}",
            self.connection,
            self.memory and f"memory {self.memory}",
            f"{self.readable} readable" if self.readable else "",
            self.error and f"error {self.error}",
            f"{self.groups} groups, {self.connections} connections",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Delivered:
    """What one delivery did."""

    what: Input
    before: Look
    after: Look
    actions: tuple[Action, ...]
    """The orders, as they were given; those that followed from the answers too."""
    events: tuple[Event, ...]
    """The news."""
    said: tuple[Message, ...]
    """What was sent to the peer: CLC on TCP, LLC on the link, updates."""
    left: bytes
    """Bytes on TCP that were not read. After a fallback the application reads them."""

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders' names."""
        return tuple(type(action).__name__ for action in self.actions)

    @property
    def news(self) -> tuple[str, ...]:
        """The events' names."""
        return tuple(type(event).__name__ for event in self.events)

    @property
    def changed(self) -> bool:
        """Whether anything is different now, or was said."""
        return self.before != self.after or bool(self.actions or self.said)

    def __str__(self) -> str:
        lines = [f"{self.what}", f"  before: {self.before}", f"  after:  {self.after}"]
        lines += [f"  orders: {', '.join(self.orders)}"] if self.actions else []
        lines += [f"  news:   {words(event)}" for event in self.events]
        lines += [f"  said:   {message}" for message in self.said]
        lines += [f"  left:   {self.left.hex()}"] if self.left else []
        return "\n".join(lines)


class EndpointIn:
    """An endpoint in a named state.

    Args:
        state: Key of `STATES`.
        config: Of both ends.
        bystanders: Whether the endpoint has further connections, which no delivery may
            touch: one of somebody else, and one on the same group where there is one.

    Attributes:
        scene: The two cores, for whoever wants to go on from there.
        awaited: What the peer has sent already and has not arrived: the genuine
            messages, in order. `deliver` them, or something else in their place.
    """

    def __init__(
        self, state: str, config: Config = SMALL, *, bystanders: bool = False
    ) -> None:
        self.state = state
        copied = pickle.loads(_template(state, config, bystanders))
        self.scene: Scene = copied[0]
        self.awaited: tuple[Message, ...] = copied[1]

    def __repr__(self) -> str:
        return f"<EndpointIn {self.state!r}: {self.look()}>"

    # What it is

    @property
    def handshake(self) -> Handshake | None:
        """The handshake that CLC messages arrive at."""
        return self.scene.handshake

    @property
    def link(self) -> Link | None:
        """The link that LLC messages and updates arrive on."""
        return self.scene.link

    @property
    def connection(self) -> Connection | None:
        """The connection that updates are for; it may have ended."""
        scene = self.scene
        if scene.connection is None and scene.handshake is not None:
            return scene.handshake.connection
        return scene.connection

    @property
    def unanswered(self) -> tuple[str, ...]:
        """Names of the orders that wait for an `Answer`."""
        orders = self.scene.me.unanswered()
        return tuple(type(order).__name__ for order in orders)

    def takes(self, kind: type[Any]) -> bool:
        """Whether something of this kind can arrive here at all.

        Args:
            kind: A class of `Input`.
        """
        link, connection = self.link, self.connection
        if kind is Answer:
            return bool(self.unanswered)
        if kind is PairConnected:
            # Nobody connects what was not asked for.
            return link is not None and link.state is LinkState.ACTIVATING
        if kind is LinkLost:
            return link is not None and link.handle is not None
        if kind is PublishCompleted:
            return connection is not None
        if kind in {OnTcp, TcpLost} or issubclass(kind, _CLC):
            return self.handshake is not None
        if kind is OnLink or issubclass(kind, (cdc.CdcMessage, *_LLC)):
            return link is not None
        return kind is TimePasses

    def look(self) -> Look:
        """Look at it."""
        endpoint = self.scene.me.endpoint
        handshake, link, connection = self.handshake, self.link, self.connection
        rmb = None
        if connection is not None:
            rmb = connection.rmb
        elif handshake is not None:
            rmb = handshake.rmb
        error = None if connection is None else connection.error
        groups, timer = endpoint.groups, endpoint.next_timer()
        return Look(
            handshake="" if handshake is None else handshake.state.name,
            link="" if link is None else link.state.name,
            connection="" if connection is None else connection.state,
            memory="" if rmb is None else rmb.state.name,
            readable=0 if connection is None else connection.readable,
            writable=0 if connection is None else connection.writable,
            error="" if error is None else type(error).__name__,
            groups=len(groups),
            connections=sum(len(group.connections) for group in groups),
            handshakes=endpoint.handshake_count,
            timer=None if timer is None else round(timer - self.scene.pair.now, 6),
        )

    # What arrives

    def deliver(self, what: Input) -> Delivered:
        """Let one thing arrive.

        Args:
            what: A message, or one of this module's records.

        Raises:
            ValueError: It cannot arrive here: there is no link yet, for example.
            EncodeError: A value of the message does not fit into its field.
            AssertionError: An invariant of the endpoint does not hold.
        """
        if not self.takes(type(what)):
            message = f"{type(what).__name__} cannot arrive in state {self.state}"
            raise ValueError(message)
        me = self.scene.me
        before = self.look()
        record: list[Action | Event | Update] = []
        me.record = record
        try:
            self._arrive(what)
            me.settle()
        finally:
            me.record = None
        self.scene.pair.check()
        return Delivered(
            what=what,
            before=before,
            after=self.look(),
            actions=tuple(each for each in record if isinstance(each, _ACTIONS)),
            events=tuple(each for each in record if isinstance(each, _EVENTS)),
            said=_said(record),
            left=self._left(),
        )

    def _arrive(self, what: Input) -> None:
        me, now = self.scene.me, self.scene.pair.now
        match what:
            case TimePasses(seconds):
                self._wait(seconds)
            case Answer(status, detail):
                me.answer_oldest(status, detail)
            case OnTcp(data):
                self._arrive_on_tcp(data)
            case TcpLost(text):
                assert self.handshake is not None
                error = ConnectionResetError(text) if text else None
                me.endpoint.tcp_lost(self.handshake, now, error)
            case PublishCompleted():
                assert self.connection is not None
                self.connection.publish_completed()
            case _ if isinstance(what, _CLC):
                self._arrive_on_tcp(what.build())
            case _:
                assert self.link is not None
                self._arrive_on_link(self.link, what)

    def _arrive_on_link(self, link: Link, what: Input) -> None:
        me, now = self.scene.me, self.scene.pair.now
        match what:
            case LinkLost(status, detail):
                me.feed_loss(link, status, detail)
            case PairConnected(""):
                me.endpoint.pair_connected(link, now)
            case PairConnected(status):
                me.endpoint.pair_failed(link, status, "", now)
            case OnLink(data) if data[:1] != b"\xfe":
                me.feed_message(link, data)
            case OnLink(data):
                me.feed_update(link, cdc.unpack(data))
            case cdc.CdcMessage():
                me.feed_update(link, cdc.unpack(what.build()))
            case _:
                assert isinstance(what, _LLC)
                me.feed_message(link, what.build())

    def _arrive_on_tcp(self, data: bytes) -> None:
        assert self.handshake is not None
        me, tcp = self.scene.me, self.scene.pair.tcp(self.handshake)
        me.feed_tcp(tcp, data)
        me.settle()
        left = -1
        while tcp.arrived and len(tcp.arrived) != left:
            left = len(tcp.arrived)
            me.feed_tcp(tcp, b"")
            me.settle()

    def _wait(self, seconds: float) -> None:
        """Let time pass for this endpoint alone."""
        me, wire = self.scene.me, self.scene.pair.wire
        until = wire.now + seconds
        while (when := me.endpoint.next_timer()) is not None and when <= until:
            wire.now = max(wire.now, when)
            me.endpoint.handle_timer(wire.now)
            me.settle()
        wire.now = until

    def _left(self) -> bytes:
        if self.handshake is None:
            return b""
        return bytes(self.scene.pair.tcp(self.handshake).arrived)


_CLC: tuple[type[clc.ClcMessage], ...] = get_args(clc.ClcMessage)
_LLC: tuple[type[llc.LlcMessage], ...] = get_args(llc.LlcMessage)
_ACTIONS: tuple[type[Action], ...] = get_args(Action)
_EVENTS: tuple[type[Event], ...] = get_args(Event)


@lru_cache(maxsize=512)
def _template(state: str, config: Config, bystanders: bool) -> bytes:  # noqa: FBT001
    """Bring an endpoint into a state once; every other one is a copy."""
    scene = STATES[state].scene(config, bystanders=bystanders)
    awaited = _take_awaited(scene)
    scene.pair.wire.notes.clear()
    return pickle.dumps((scene, awaited), pickle.HIGHEST_PROTOCOL)


def _take_awaited(scene: Scene) -> tuple[Message, ...]:
    """Take what is on its way to the endpoint off the wire."""
    messages: list[Message] = []
    if scene.handshake is not None:
        transit = scene.pair.tcp(scene.handshake).transit
        while transit:
            length = clc.parse_header(bytes(transit[:8])).length
            messages.append(clc.parse(bytes(transit[:length])))
            del transit[:length]
    for stub in scene.me.queue_pairs.values():
        messages += [llc.parse(payload) for payload in stub.sends]
        messages += [_as_message(update) for update in stub.updates]
        stub.sends.clear()
        stub.updates.clear()
    return tuple(messages)


def _as_message(update: Update) -> cdc.CdcMessage:
    return cdc.CdcMessage.parse(cdc.pack(*update))


def _said(record: Sequence[Action | Event | Update]) -> tuple[Message, ...]:
    said: list[Message] = []
    for each in record:
        match each:
            case SendClc(_, data):
                said.append(clc.parse(data))
            case PostSend(_, payload):
                said.append(llc.parse(payload))
            case tuple():
                said.append(_as_message(each))
            case _:
                pass
    return tuple(said)


def deliver(
    state: str, *what: Input, config: Config = SMALL, bystanders: bool = False
) -> tuple[Delivered, ...]:
    """Deliver one thing after another to a fresh endpoint in a state.

    Args:
        state: Key of `STATES`.
        what: What arrives, in order.
        config: Of both ends.
        bystanders: See `EndpointIn`.

    Returns:
        What each delivery did.

    Raises:
        KeyError: There is no such state.
        ValueError: Something cannot arrive there.
    """
    endpoint = EndpointIn(state, config, bystanders=bystanders)
    return tuple(endpoint.deliver(each) for each in what)
