"""Somebody between two good peers changes what one says to the other.

`play` lets two cores shake hands while a `Change` happens to one of their messages,
on TCP or on the link, and then lets both applications write, whatever became of it.
What they read must be what the other one wrote, from the beginning: `Outcome` says so.

A change of TCP bytes that adds some cannot be told from what the other application
writes, once the last CLC message was read: TCP itself would deliver them. Those bytes
are the outcome's `stray`, exactly as they were added; without such a change there are
none, and never a byte of what the peer itself said.
"""

from __future__ import annotations

import itertools
import pickle
import random
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.config import KIB, Config
from pysmc.core import actions
from pysmc.core.events import Established, Failed, FellBack
from pysmc.reasons import reason
from pysmc.testing.pair import CorePair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pysmc.core.connection import Connection
    from pysmc.testing.pair_ends import PairEnd
    from pysmc.testing.pair_wire import TcpEnd

__all__ = ["SCENES", "Change", "Outcome", "messages", "play"]

ELEMENT = 16 * KIB
PAYLOAD_BYTES = 2 * ELEMENT + 1234
GREETING_BYTES = 64
"""What each application writes first, before it fills the other's element."""
PATIENCE = 100.0
"""Simulated seconds after which something that did not happen never will: more than
all waits of a handshake and TEST LINK together."""
NAMES = ("client", "server")
DECLINE = 4
"""Type of the CLC message."""


@cache
def payload(name: str) -> bytes:
    """Give what the application at an end writes; no piece of it comes twice."""
    return random.Random(f"payload of {name}").randbytes(PAYLOAD_BYTES)


class DiceTokens:
    """A `TokenSource` whose numbers are as far from each other as real ones.

    Args:
        seed: Decides.
    """

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)

    def psn(self) -> int:
        """Give 24 bits."""
        return self._dice.getrandbits(24)

    def alert_token(self) -> int:
        """Give 32 bits, not 0."""
        return self._dice.getrandbits(32) or 1

    def user_id(self) -> int:
        """Give 32 bits."""
        return self._dice.getrandbits(32)


class Place(NamedTuple):
    """A message: who says it, where, and which one in order."""

    sender: str
    """"client" or "server"."""
    plane: str
    """"tcp" or "link"."""
    number: int = 0


class Change(NamedTuple):
    """Something that happens to one message."""

    place: Place
    kind: str
    """Key of `KINDS`."""
    first: int = 0
    second: int = 0
    """What they mean depends on the kind."""

    @property
    def adds(self) -> bool:
        """Whether bytes may arrive behind the last message that nobody sent there."""
        return self.kind in {"repeat", "insert", "overtake"} and self.is_on_tcp

    @property
    def is_on_tcp(self) -> bool:
        """Whether it happens to a CLC message."""
        return self.place.plane == "tcp"


Pieces = list[tuple[float, bytes]]
"""What arrives of a message: after how many seconds, and which bytes."""
EOF = b"EOF is no message"


def _flip(data: bytes, first: int, second: int) -> Pieces:
    """One bit, counted from the first byte's most significant one."""
    del second
    changed = bytearray(data)
    at = first % (8 * len(data))
    changed[at // 8] ^= 0x80 >> at % 8
    return [(0, bytes(changed))]


def _put(data: bytes, first: int, second: int) -> Pieces:
    """Another value in one byte."""
    changed = bytearray(data)
    changed[first % len(data)] = second & 0xFF
    return [(0, bytes(changed))]


def _swap(data: bytes, first: int, second: int) -> Pieces:
    """Two bytes change places."""
    changed, one, two = bytearray(data), first % len(data), second % len(data)
    changed[one], changed[two] = changed[two], changed[one]
    return [(0, bytes(changed))]


def _cut(data: bytes, first: int, second: int) -> Pieces:
    """The rest is lost; with an odd second number the connection ends there."""
    kept = data[: first % len(data)]
    return [(0, kept), (0, EOF)] if second % 2 else [(0, kept)]


def _lose(data: bytes, first: int, second: int) -> Pieces:
    """Some bytes in the middle are lost."""
    at = first % len(data)
    return [(0, data[:at] + data[at + 1 + second % 8 :])]


def _repeat(data: bytes, first: int, second: int) -> Pieces:
    """A piece comes twice, or all of it."""
    start, end = sorted((first % (len(data) + 1), second % (len(data) + 1)))
    return [(0, data[:end] + data[start:])]


def _insert(data: bytes, first: int, second: int) -> Pieces:
    """Some bytes that nobody sent."""
    at = first % (len(data) + 1)
    new = random.Random(second).randbytes(1 + second % 16)
    return [(0, data[:at] + new + data[at:])]


def _delay(data: bytes, first: int, second: int) -> Pieces:
    """All of it comes late, by up to 12 seconds."""
    del second
    return [(first % 120 / 10, data)]


def _drip(data: bytes, first: int, second: int) -> Pieces:
    """Two pieces, with a pause between."""
    at = first % len(data)
    return [(0, data[:at]), (second % 120 / 10, data[at:])]


def _overtake(data: bytes, first: int, second: int) -> Pieces:
    """As late, and what is sent after it comes before it."""
    del second
    return [(first % 120 / 10, data)]


KINDS: dict[str, Callable[[bytes, int, int], Pieces]] = {
    "flip": _flip,
    "put": _put,
    "swap": _swap,
    "cut": _cut,
    "lose": _lose,
    "repeat": _repeat,
    "insert": _insert,
    "delay": _delay,
    "overtake": _overtake,
    "drip": _drip,
}


def _element(message: bytes) -> bytes:
    """Give the bytes of an Accept or Confirm that say where the element is."""
    if len(message) <= 68 or message[4] not in (2, 3):
        return b""
    return message[41:46] + message[50:51] + message[52:60]


# Scenes


class Scene(NamedTuple):
    """How a handshake goes when nobody changes anything."""

    config: Config
    reuse: bool = False
    """There is a link group already, with a connection on it."""
    refuses: str = ""
    """Which end cannot do SMC-R."""


_PLAIN = Config(rmbe_bytes=ELEMENT, sndbuf_bytes=ELEMENT)
SCENES = {
    "first contact": Scene(_PLAIN),
    "reuse": Scene(_PLAIN, reuse=True),
    "first contact, version 2.0": Scene(
        Config(rmbe_bytes=ELEMENT, sndbuf_bytes=ELEMENT, release=0)
    ),
    "first contact, large element": Scene(
        Config(rmbe_bytes=2 * ELEMENT, sndbuf_bytes=ELEMENT)
    ),
    "the server declines": Scene(_PLAIN, refuses="server"),
    "the client declines": Scene(_PLAIN, refuses="client"),
}


@cache
def _stage(name: str) -> bytes:
    """Make what is there before the handshake, ready to be copied."""
    scene = SCENES[name]
    pair = CorePair(scene.config)
    for seed, end in enumerate(pair.ends):
        end.endpoint._context.tokens = DiceTokens(seed)
    ends = pair.establish() if scene.reuse else None
    pair.wire.notes.clear()
    return pickle.dumps((pair, ends))


# What came of it


@dataclass
class Outcome:
    """How it ended for both."""

    modes: dict[str, str]
    """"smc", "tcp", "error" or "never" for each end's name."""
    errors: dict[str, str] = field(default_factory=dict)
    """What an application was told, at the ends that were."""
    got: dict[str, int] = field(default_factory=dict)
    """How many bytes of the other one's payload each application read."""
    wrong: list[str] = field(default_factory=list)
    """What an application read and nobody wrote."""
    foreign: bool = False
    """Whether there was anything among it but zeros and what the peer wrote."""
    stray: dict[str, bytes] = field(default_factory=dict)
    """Bytes that the change added, and that an application read on TCP."""
    bystander: str = ""
    """What became of the connection that was there before; empty: it works."""
    crossed: bool = False
    """Whether both ends declined after the Confirm, without knowing of each other."""
    misled: bool = False
    """Whether an end was told of another place in memory than the peer's element."""
    seconds: float = 0.0
    """Simulated time until both ends knew."""

    @property
    def ending(self) -> str:
        """Say in a word or two how it ended."""
        if self.wrong:
            return "wrong data"
        modes = {self.modes[name] for name in NAMES}
        if modes <= {"smc", "tcp"} and len(modes) == 1 and not self.errors:
            (mode,) = modes
            full = all(self.got[name] == PAYLOAD_BYTES for name in NAMES)
            return mode if full else f"{mode}, and silence"
        told = bool(self.errors) or "error" in modes
        return "error" if told else "/".join(sorted(modes)) + ", and silence"


class Journey:
    """One handshake on its way, with somebody in between."""

    def __init__(self, scene: str, changes: Iterable[Change]) -> None:
        pair, before = pickle.loads(_stage(scene))
        self.pair: CorePair = pair
        self.before: tuple[Connection, Connection] | None = before
        self.pair.checking = False
        self.said: dict[Place, bytes] = {}
        self.changes: dict[Place, list[Change]] = {}
        for change in changes:
            self.changes.setdefault(change.place, []).append(change)
        self._late: list[tuple[float, int, TcpEnd | Any, bytes]] = []
        self._adds = dict.fromkeys(NAMES, False)
        self._misled = False
        self._order: dict[int, float] = {}
        self._count = itertools.count()
        for end in pair.ends:
            end._orders[actions.SendClc] = self._sends_clc
            end._orders[actions.PostSend] = self._sends_llc
        no_device = reason("NO_DEVICE", "local")
        refuses = SCENES[scene].refuses
        self.tcp: dict[str, TcpEnd] = {}
        client, server = pair.connect(
            client_refusal=no_device if refuses == "client" else None,
            server_refusal=no_device if refuses == "server" else None,
        )
        self.tcp = {"client": pair.tcp(client), "server": pair.tcp(server)}

    # In between

    def _sends_clc(self, action: actions.SendClc) -> None:
        tcp: TcpEnd = action.handshake.handle
        self._pass_on(tcp.end.name, "tcp", tcp.peer, action.data)

    def _sends_llc(self, action: actions.PostSend) -> None:
        stub = action.link.handle
        self._pass_on(stub.end.name, "link", stub, action.payload)

    def _pass_on(self, sender: str, plane: str, where: Any, data: bytes) -> None:
        number = sum(place[:2] == (sender, plane) for place in self.said)
        place = Place(sender, plane, number)
        self.said[place] = data
        pieces: Pieces = [(0.0, data)]
        for change in self.changes.get(place, ()):
            pieces = [
                (before + after, part)
                for before, piece in pieces
                for after, part in (
                    KINDS[change.kind](piece, change.first, change.second)
                    if piece and piece is not EOF
                    else [(0.0, piece)]
                )
            ]
            self._adds[self._other(sender)] |= change.adds
        arrives = b"".join(piece for _, piece in pieces if piece is not EOF)
        self._misled |= plane == "tcp" and _element(arrives) != _element(data)
        overtaken = any(each.kind == "overtake" for each in self.changes.get(place, ()))
        for seconds, piece in pieces:
            due = self.pair.now + seconds
            if not overtaken:
                # Both TCP and a queue pair keep the order.
                due = max(due, self._order.get(id(where), 0.0))
                self._order[id(where)] = due
            if due > self.pair.now:
                self._late.append((due, next(self._count), where, piece))
            else:
                self._arrive(where, piece)

    def _arrive(self, where: Any, piece: bytes) -> None:
        if hasattr(where, "transit"):
            if piece is EOF:
                where.is_cut = where.peer.is_cut = True
            else:
                where.transit += piece
        elif piece and piece is not EOF and where.reaches is not None:
            where.reaches.sends.append(piece)

    @staticmethod
    def _other(name: str) -> str:
        return NAMES[name == "client"]

    # Until both know

    def shake_hands(self) -> None:
        """Let time pass until both handshakes are over, or nothing can happen."""
        pair, until = self.pair, self.pair.now + PATIENCE
        while True:
            pair.drive_bounded(2000)
            verdicts = [tcp.verdict for tcp in self.tcp.values()]
            if None not in verdicts and not self._late:
                return
            due = [when for when, *_ in self._late]
            timer = pair.next_timer()
            due += [timer] if timer is not None else []
            if not due or min(due) > until:
                return
            pair.wire.now = max(pair.now, min(due))
            for late in sorted(each for each in self._late if each[0] <= pair.now):
                self._late.remove(late)
                self._arrive(late[2], late[3])
            pair.run_timers()

    def connection(self, name: str) -> Connection | None:
        """Give the connection that an end's application holds."""
        verdict = self.tcp[name].verdict
        return verdict.connection if isinstance(verdict, Established) else None

    def end(self, name: str) -> PairEnd:
        """Give an end by its name."""
        return self.pair.ends[name == "server"]

    # The applications

    def exchange(self) -> Outcome:
        """Let both write, and read whatever arrives."""
        outcome = Outcome({name: self._mode(name) for name in NAMES})
        outcome.seconds, outcome.misled = self.pair.now, self._misled
        outcome.crossed = all(
            any(
                data[4] == DECLINE and place[:2] == (name, "tcp") and place.number
                for place, data in self.said.items()
            )
            for name in NAMES
        )
        sent, read = dict.fromkeys(NAMES, 0), {name: bytearray() for name in NAMES}
        for name in NAMES:
            if outcome.modes[name] == "tcp":
                self.tcp[name].peer.transit += payload(name)
        for turn in range(64):
            moved = 0
            for name in NAMES:
                connection = self.connection(name)
                if connection is None or connection.error or connection.is_ended:
                    continue
                until = PAYLOAD_BYTES if turn else GREETING_BYTES
                end, waiting = self.end(name), payload(name)[sent[name] : until]
                wrote = self.pair.write(end, connection, waiting) if waiting else 0
                sent[name] += wrote
                moved += wrote
            self.pair.drive_bounded(2000)
            for name in NAMES:
                piece = self._read(name)
                read[name] += piece
                moved += len(piece)
            self.pair.drive_bounded(2000)
            if not moved:
                break
        for name in NAMES:
            self._judge(name, bytes(read[name]), outcome)
        outcome.bystander = self._look_at_bystander()
        return outcome

    def _mode(self, name: str) -> str:
        match self.tcp[name].verdict:
            case Established():
                return "smc"
            case FellBack():
                return "tcp"
            case Failed():
                return "error"
        return "never"

    def _read(self, name: str) -> bytes:
        connection, tcp = self.connection(name), self.tcp[name]
        if connection is not None:
            if connection.error is not None:
                return b""
            return self.pair.read(self.end(name), connection, PAYLOAD_BYTES)
        if not isinstance(tcp.verdict, FellBack):
            return b""
        data = bytes(tcp.arrived)
        tcp.arrived.clear()
        return data

    def _judge(self, name: str, read: bytes, outcome: Outcome) -> None:
        """Hold what an application read against what the other one wrote."""
        connection, tcp = self.connection(name), self.tcp[name]
        verdict, wanted = tcp.verdict, payload(self._other(name))
        if isinstance(verdict, Failed):
            outcome.errors[name] = str(verdict.error)
        elif connection is not None and connection.error is not None:
            outcome.errors[name] = str(connection.error)
        elif connection is not None and (tcp.arrived or tcp.transit):
            # The transport watches TCP beneath, and aborts (pysmc.aio.tcp_watch).
            outcome.errors[name] = "peer sent a TCP byte on SMC-R"
        elif connection is None and tcp.is_cut:
            outcome.errors[name] = "EOF on TCP"
        at = read.find(wanted[:32]) if len(read) >= 32 else -1
        if isinstance(verdict, FellBack) and self._adds[name] and at > 0:
            outcome.stray[name], read = read[:at], read[at:]
        elif isinstance(verdict, FellBack) and self._adds[name] and at < 0:
            outcome.stray[name], read = read, b""
        outcome.got[name] = len(read)
        if not wanted.startswith(read):
            good = next(
                n for n in range(len(read)) if wanted[n : n + 1] != read[n : n + 1]
            )
            text = f"{name} read {len(read)} bytes, wrong from {good}"
            foreign = _foreign(read, wanted)
            outcome.wrong.append(text + (f": {foreign.hex()}" if foreign else ""))
            outcome.foreign |= bool(foreign)

    def _look_at_bystander(self) -> str:
        """See whether the connection that was there before still carries bytes."""
        if self.before is None:
            return ""
        pair = self.pair
        for number, name in enumerate(NAMES):
            writer, reader = self.before[number], self.before[1 - number]
            if writer.error or reader.error or not writer.is_open:
                return f"ended: {writer.error or reader.error}"
            pair.write(self.end(name), writer, payload(name)[:100])
            pair.drive_bounded(2000)
            data = pair.read(self.end(self._other(name)), reader, 1000)
            if data != payload(name)[:100]:
                return f"wrong data: {len(data)} bytes, {data[:16].hex()}"
            pair.drive_bounded(2000)
        return ""


def _foreign(read: bytes, wanted: bytes) -> bytes:
    """Find a piece that is neither empty memory nor from what the peer wrote."""
    size = 16
    for start in range(0, len(read) - size, size):
        piece = read[start : start + size].strip(b"\0")
        if piece not in wanted:
            return piece
    return b""


def play(scene: str, changes: Iterable[Change], *, check: bool = True) -> Outcome:
    """Play one handshake.

    Args:
        scene: Key of `SCENES`.
        changes: What happens to its messages.
        check: Whether the endpoints' invariants are checked at the end.
    """
    journey = Journey(scene, changes)
    journey.shake_hands()
    outcome = journey.exchange()
    if check:
        journey.pair.check()
    return outcome


@cache
def messages(scene: str) -> dict[Place, bytes]:
    """Give what both ends say when nobody changes anything."""
    journey = Journey(scene, ())
    journey.shake_hands()
    return dict(journey.said)
