"""What lies between the two ends of a `CorePair`: TCP, queue pairs, memory, time.

Plain records with queues: a `TcpEnd` and a `QueuePairStub` hold what is on its way to
their end, a `Wire` the time and the trace. They decide nothing.

Source: the contract in `pysmc.core.actions`; RFC 7609 section 3.5.5.1.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pysmc.core.events import Established, Failed, FellBack
from smcproto.decode import decode
from smcproto.errors import DecodeError

if TYPE_CHECKING:
    from pysmc.core.connection import Connection, Update
    from pysmc.core.events import Event
    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link
    from pysmc.testing.pair_ends import PairEnd

__all__ = [
    "CountingTokens",
    "Delivery",
    "Domain",
    "Numbers",
    "QueuePairStub",
    "Region",
    "TcpEnd",
    "Wire",
    "words",
]


class Numbers:
    """One number after another; unlike `itertools.count` it can be copied.

    Args:
        first: Where to begin.
    """

    def __init__(self, first: int) -> None:
        self._next = first

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        number = self._next
        self._next += 1
        return number


class CountingTokens:
    """A `TokenSource` without chance: every number is one more than the last.

    Args:
        first: Where to begin, 1 to 2**24 - 1.
    """

    def __init__(self, first: int = 1) -> None:
        self._numbers = Numbers(first)

    def psn(self) -> int:
        """Give the next number, 24 bits."""
        return next(self._numbers) & 0xFFFFFF

    def alert_token(self) -> int:
        """Give the next number, 32 bits, not 0."""
        return next(self._numbers) & 0xFFFFFFFF

    def user_id(self) -> int:
        """Give the next number, 32 bits."""
        return next(self._numbers) & 0xFFFFFFFF


KINDS = ("answer", "tcp", "connected", "send", "update", "publish", "down")
"""What can be delivered."""


class Delivery(NamedTuple):
    """Something that can happen next."""

    kind: str
    """One of `KINDS`."""
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
        if not (self.arrived or self.is_cut) or self.is_deaf:
            return False
        return self.handshake.wanted > 0

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
    numbers: Numbers = field(default_factory=lambda: Numbers(0x100))

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
