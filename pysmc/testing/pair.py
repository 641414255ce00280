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

from typing import TYPE_CHECKING, Any

from pysmc.config import KIB, Config
from pysmc.core.endpoint import Endpoint, FabricOffer, Identity
from pysmc.core.events import Established
from pysmc.core.handshake import NOTHING_ABSENT
from pysmc.testing.pair_ends import PairEnd
from pysmc.testing.pair_wire import (
    KINDS,
    CountingTokens,
    Delivery,
    QueuePairStub,
    Region,
    TcpEnd,
    Wire,
)
from smcproto import clc

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from pysmc.core.actions import Action
    from pysmc.core.connection import Connection
    from pysmc.core.events import Event
    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link
    from pysmc.reasons import Reason

__all__ = [
    "SMALL",
    "CorePair",
    "CountingTokens",
    "Delivery",
    "PairEnd",
    "QueuePairStub",
    "Region",
    "TcpEnd",
    "make_offer",
]

SMALL = Config(rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB)
"""The configuration of both ends unless told otherwise: small buffers are full soon."""


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
        self.wire = Wire(newest_only, publish_later, silent_close)
        self.checking = True
        """Whether invariants are checked after every step."""
        self.server_first = False
        """Whose timer runs first when both are due at the same time."""
        self._held: set[tuple[str, PairEnd]] = set()
        self._turn = 0
        core = _endpoint(1, offers or (make_offer(1),), config)
        self.client = self.server = PairEnd("client", core, self.wire)
        if not loopback:
            there = server_offers or offers or (make_offer(2),)
            core = _endpoint(2, there, server_config or config)
            self.server = PairEnd("server", core, self.wire)
            self.client.peer, self.server.peer = self.server, self.client

    # What can be looked at

    @property
    def now(self) -> float:
        """The time in seconds."""
        return self.wire.now

    @property
    def trace(self) -> list[str]:
        """One line for everything that happened."""
        return self.wire.trace

    @property
    def faults(self) -> list[str]:
        """Writes outside the peer's memory; each broke its link."""
        return self.wire.faults

    @property
    def news(self) -> dict[Connection, int]:
        """All `News` of each connection; remove what was seen."""
        return self.wire.news

    @property
    def ends(self) -> tuple[PairEnd, ...]:
        """Both ends; one in loopback."""
        if self.client is self.server:
            return (self.client,)
        return (self.client, self.server)

    def peer_of(self, end: PairEnd, connection: Connection) -> Connection | None:
        """Give the connection at the other end, None when it is not there any more."""
        for group in end.peer.endpoint.groups:
            found = group.connections.get(connection.peer_token)
            if found is not None and found.peer_token == connection.alert_token:
                return found
        return None

    # Handshakes

    def connect(
        self,
        opener: PairEnd | None = None,
        peer_key: Hashable = "host",
        *,
        client_refusal: Reason | None = None,
        server_refusal: Reason | None = None,
        offers: Sequence[FabricOffer] | None = None,
        absent: Mapping[str, Reason] = NOTHING_ABSENT,
        server_offers: Sequence[FabricOffer] | None = None,
        server_absent: Mapping[str, Reason] = NOTHING_ABSENT,
    ) -> tuple[Handshake, Handshake]:
        """Begin a handshake on a new TCP connection; nothing is delivered yet.

        Args:
            opener: Who opens it; the client by default.
            peer_key: What both ends are told of who is at the other end.
            client_refusal: Why the opener cannot do SMC-R.
            server_refusal: Why the other end cannot.
            offers: The opener's devices for this connection; None is those of all.
            absent: Why EIDs of the opener do not count for this connection.
            server_offers: As `offers`, of the other end.
            server_absent: As `absent`, of the other end.

        Returns:
            The opener's handshake and the other end's.
        """
        opener = opener or self.client
        accepter = opener.peer
        number = next(self.wire.numbers)
        there, here = TcpEnd(number, opener), TcpEnd(number, accepter)
        opener.tcp.append(there)
        accepter.tcp.append(here)
        server = accepter.endpoint.accept(
            peer_key, self.now, server_refusal, server_offers, server_absent
        )
        here.join(there, server)
        client = opener.endpoint.connect(
            peer_key, self.now, client_refusal, offers, absent
        )
        there.join(here, client)
        self.settle(opener)
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
        if isinstance(verdict, Established):
            return verdict.connection
        text = "\n".join([f"the verdict is {verdict}", *self.trace])
        raise AssertionError(text)

    def verdict(self, handshake: Handshake) -> Event | None:
        """Tell how a handshake ended, None while it has not."""
        return self.tcp(handshake).verdict

    def tcp(self, handshake: Handshake) -> TcpEnd:
        """Give a handshake's end of its TCP connection."""
        tcp: TcpEnd = handshake.handle
        return tcp

    def abandon(self, handshake: Handshake) -> None:
        """Give up a handshake as a cancelled task does; its TCP connection is cut."""
        tcp = self.tcp(handshake)
        self.wire.note(f"{tcp.end.name}: abandons {tcp}")
        tcp.is_deaf = tcp.peer.is_cut = True
        tcp.end.endpoint.abandon(handshake, self.now)
        self.settle(tcp.end)

    # The application's side

    def write(self, end: PairEnd, connection: Connection, data: bytes) -> int:
        """Write as many bytes as there is room for, and publish them.

        Returns:
            How many bytes were written.
        """
        done = 0
        while done < len(data):
            spans = connection.claim(len(data) - done)
            for address, length in spans:
                end.place(connection, address, data[done : done + length])
                done += length
            end.publish(connection)
            if not spans:
                break
        self.wire.note(f"{end.name}: wrote {done} of {len(data)}")
        return done

    def read(self, end: PairEnd, connection: Connection, limit: int) -> bytes:
        """Read up to ``limit`` bytes that arrived, and publish what is due."""
        region: Region = connection.rmb.handle
        data = bytearray()
        while True:
            offset, length = connection.peek(limit - len(data))
            if length == 0:
                break
            data += region.memory[offset : offset + length]
            connection.consume(length)
        end.publish(connection)
        self.wire.note(f"{end.name}: read {len(data)} of {limit}")
        return bytes(data)

    def shutdown_write(self, end: PairEnd, connection: Connection) -> None:
        """Say that no more bytes will be written."""
        connection.shutdown_write()
        self._said(end, connection, "has done")

    def close(self, end: PairEnd, connection: Connection) -> None:
        """Close a connection."""
        connection.close()
        self._said(end, connection, "closes")

    def abort(self, end: PairEnd, connection: Connection) -> None:
        """Abort a connection."""
        connection.abort()
        self._said(end, connection, "aborts")

    def _said(self, end: PairEnd, connection: Connection, what: str) -> None:
        self.wire.note(f"{end.name}: {what} {connection.alert_token:08x}")
        end.publish(connection)
        end.endpoint.reap(connection, self.now)
        self.settle(end)

    # What goes wrong

    def hold(self, kind: str, *ends: PairEnd) -> None:
        """Deliver nothing of a kind until `release`.

        Args:
            kind: See `Delivery`.
            ends: Where it would arrive; both by default.

        Raises:
            ValueError: There is no such kind.
        """
        if kind not in KINDS:
            text = f"no kind {kind!r} of delivery; there are {', '.join(KINDS)}"
            raise ValueError(text)
        self._held |= {(kind, end) for end in ends or self.ends}

    def release(self, kind: str, *ends: PairEnd) -> None:
        """Deliver again what `hold` held back."""
        self._held -= {(kind, end) for end in ends or self.ends}

    def withhold(self, end: PairEnd, order: type[Action]) -> None:
        """Leave orders of a kind unanswered until `answer`.

        Args:
            end: Whose orders.
            order: CreateQueuePair, ConnectQueuePair or RegisterMemory.
        """
        end.withheld.add(order)

    def answer(self, end: PairEnd, order: type[Action]) -> None:
        """Answer orders of a kind from now on, the withheld ones first."""
        end.withheld.discard(order)

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
        pairs = end.queue_pairs.values()
        queues: dict[str, list[Any]] = {
            "tcp": [tcp.transit for tcp in end.tcp],
            "send": [pair.sends for pair in pairs],
            "update": [pair.updates for pair in pairs],
        }
        lost = 0
        for queue in queues[kind]:
            lost += len(queue)
            queue.clear()
        self.wire.note(f"dropped: {lost} of {kind} to {end.name}")
        return lost

    def send_tcp(self, handshake: Handshake, data: bytes) -> None:
        """Send bytes on the TCP connection of a handshake, as its end might."""
        self.tcp(handshake).peer.transit += data

    def rewrite(
        self, handshake: Handshake, change: Callable[[Any], clc.ClcMessage]
    ) -> None:
        """Change the one CLC message that is on its way to a handshake's end."""
        transit = self.tcp(handshake).transit
        transit[:] = change(clc.parse(bytes(transit))).build()

    def send_message(self, link: Link, payload: bytes) -> None:
        """SEND bytes on a link, as its end might."""
        self._reached(link).sends.append(payload)

    def send_update(self, connection: Connection, **changes: int) -> None:
        """Publish an update that says other than what is true.

        Args:
            connection: In whose name.
            changes: ``sequence``, ``token``, ``producer``, ``consumer`` or ``flags``
                in place of what the connection would have said.
        """
        names = ("sequence", "token", "producer", "consumer", "flags")
        said = dict(zip(names, connection.take_update(), strict=True))
        sequence, token, producer, consumer, flags = (said | changes).values()
        update = (sequence, token, producer, consumer, flags)
        self._reached(connection.link).updates.append(update)

    def _reached(self, link: Link) -> QueuePairStub:
        pair: QueuePairStub = link.handle
        assert pair.reaches is not None, "the link is not connected"
        return pair.reaches

    def cut_tcp(self, handshake: Handshake, *ends: PairEnd) -> None:
        """End a handshake's TCP connection behind the bytes that are on their way.

        Args:
            handshake: Of either end.
            ends: Who sees the EOF; both by default.
        """
        tcp = self.tcp(handshake)
        for place in (tcp, tcp.peer):
            if not ends or place.end in ends:
                place.is_cut = True
        self.wire.note(f"cut: {tcp}")

    def cut_link(
        self, link: Link, *ends: PairEnd, status: str = "peer gone", detail: str = ""
    ) -> None:
        """Let a link's queue pairs go down, behind what is on its way.

        Args:
            link: Of either end.
            ends: Who notices; both by default.
            status: Value of the fabric's status.
            detail: A sentence for people.
        """
        pair: QueuePairStub = link.handle
        for place in (pair, pair.peer):
            if place is not None and (not ends or place.end in ends):
                place.down = (status, detail)
        self.wire.note(f"cut: {pair} {status}")

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
            self.wire.now = max(self.now, when)
            self.run_timers()
            self.drive()
        self.wire.now = until

    def run_timers(self) -> None:
        """Run what is due now at both ends, and deliver nothing."""
        for end in self.ends[:: -1 if self.server_first else 1]:
            when = end.endpoint.next_timer()
            if when is not None and when <= self.now:
                self.wire.note(f"{end.name}: timer")
                end.endpoint.handle_timer(self.now)
                self.settle(end)

    def pending(self) -> list[Delivery]:
        """List what can happen next, in a fixed order."""
        held = self._held
        found = [delivery for end in self.ends for delivery in end.pending()]
        if held:
            found = [each for each in found if (each.kind, each.end) not in held]
        return found

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
        self.wire.note(f"deliver: {delivery}")
        delivery.end.deliver(delivery.kind, delivery.place)
        self._check_if_asked()
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
        for steps in range(most):
            if not self.step():
                return steps
        if not self.pending():
            return most
        tail = "\n".join(self.trace[-30:])
        message = f"no end after {most} steps; the last ones:\n{tail}"
        raise AssertionError(message)

    def drive_until(self, condition: Callable[[], bool]) -> None:
        """Step until something is so.

        Raises:
            AssertionError: It never was.
        """
        while not condition():
            if not self.step():
                text = "\n".join(["it never came to that", *self.trace])
                raise AssertionError(text)

    def settle(self, end: PairEnd) -> None:
        """Carry out an end's orders and take its news."""
        end.settle()
        self._check_if_asked()

    # Checks

    def _check_if_asked(self) -> None:
        if self.checking:
            self.check()

    def check(self) -> None:
        """Check what must hold at any time.

        Raises:
            AssertionError: Something does not; the text says what.
        """
        for end in self.ends:
            end.endpoint.check()
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
                "memory": end.memory_bytes,
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


def make_offer(number: int, fabric: str = "sim", *eids: str) -> FabricOffer:
    """Make a device.

    Args:
        number: Distinguishes its addresses, 1 to 255.
        fabric: Name of its fabric.
        eids: EIDs that select it; "PAIR" by default.
    """
    return FabricOffer(
        fabric=fabric,
        eids=eids or ("PAIR",),
        gid=bytes(15) + bytes((number,)),
        mac=bytes((2, 0, 0, 0, 0, number)),
        mtu_code=3,
    )


def _endpoint(number: int, offers: Sequence[FabricOffer], config: Config) -> Endpoint:
    identity = Identity(bytes((0, number, 2, 0, 0, 0, 0, number)), f"host{number}")
    return Endpoint(identity, offers, config, CountingTokens(number << 16))
