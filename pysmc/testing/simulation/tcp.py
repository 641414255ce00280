"""Simulated TCP: what is on its way between sockets, and what can happen to it there.

Decides what arrives when. Every direction of a connection is a `Pipe`, in which things
keep their order; between pipes everything may interleave. A SYN, each piece of data, an
end of file and a reset arrive by a step of their own, which the world chooses.

What can happen: a delay, pieces as small as one byte, held back, a reset out of nowhere
(`TcpConnection.reset`), silence for ever (`TcpConnection.kill`: the path forgets the
connection and tells nobody), a mark that is taken off on the way
(`TcpNetwork.strips_marks`), SYNs that find a full backlog.

Source: RFC 9293 sections 3.5 and 3.6, RFC 6298 section 5; kernel counterparts:
tcp_timer.c (retries), tcp_minisocks.c (a full backlog).
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from typing import TYPE_CHECKING

from pysmc.discovery.mark import TCP_SAVE_SYN
from pysmc.testing.simulation.sockets import (
    CLOSED,
    CONNECTED,
    CONNECTING,
    ENDED,
    KernelSocket,
    SimSocket,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from pysmc.testing.simulation.sockets import Address, Descriptors

__all__ = ["Channel", "Pipe", "TcpConnection", "TcpNetwork"]

FIRST_PORT = 40_000
"""Of those that a connecting socket gets."""
RETRIES_SECONDS = 924.6
"""How long Linux sends unanswered bytes again (tcp_retries2 = 15)."""
SYN_RETRIES = 6
SYN_RETRIES_SECONDS = 2.0 ** (SYN_RETRIES + 1) - 1
"""The same for a SYN: after 1, 2, 4 seconds and so on."""
BUFFER_BYTES = 256 * 1024
_SAVE_SYN = (socket.IPPROTO_TCP, TCP_SAVE_SYN)
JOIN_BYTES = 4096
"""Small pieces that wait are joined up to this size."""


def _patience(kind: str) -> float:
    """Seconds until a sender gives up what is never answered."""
    return SYN_RETRIES_SECONDS if kind.startswith("SYN") else RETRIES_SECONDS


class Pipe:
    """One direction of a connection.

    Args:
        network: To which it belongs.
        source: Who sends.
        name: For the trace.
    """

    def __init__(self, network: TcpNetwork, source: KernelSocket, name: str) -> None:
        self.network = network
        self.source = source
        self.sink: KernelSocket | None = None
        """Who receives; None until the SYN has arrived."""
        self.name = name
        self.size = 0
        """Bytes on their way."""
        self.delay = 0.0
        """Seconds that what is sent from now on takes."""
        self.piece_bytes = 0
        """Most bytes of a piece that arrives at once; 0 is all that waits."""
        self.send_bytes = 0
        """Most bytes that one send takes; 0 is all that there is room for."""
        self.is_held = False
        """Nothing arrives while this is true."""
        self.is_dead = False
        """What is sent from now on never arrives."""
        self._items: deque[tuple[float, str, bytes | memoryview]] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def room(self) -> int:
        """How many bytes a send may take now."""
        room = self.network.sndbuf_bytes - self.size
        return min(room, self.send_bytes) if self.send_bytes else room

    def put(self, kind: str, data: bytes = b"", delay: float = 0.0) -> None:
        """Send something."""
        network, items = self.network, self._items
        due = network.now() + self.delay + delay
        if self.is_dead:
            if kind == "RST":
                return  # nobody sends it again
            due += _patience(kind)
        if items:
            last_due, last_kind, last = items[-1]
            due = max(due, last_due)
            is_more = kind == last_kind == "data" and due == last_due
            if is_more and len(last) + len(data) <= JOIN_BYTES:
                items[-1] = (due, kind, b"".join((last, data)))
                self.size += len(data)
                return
        items.append((due, kind, data))
        self.size += len(data)
        network.active[self] = None

    def clear(self) -> None:
        """Lose what is on its way."""
        self._items.clear()
        self.size = 0
        self.network.active.pop(self, None)

    def reset(self) -> None:
        """Lose a part of what is on its way, and send a reset after the rest."""
        items = self._items
        for _ in range(self.network.choose(len(items) + 1)):
            self.size -= len(items.pop()[2])
        if not items:
            self.network.active.pop(self, None)
        self.put("RST")

    def kill(self) -> None:
        """Let nothing arrive any more, and nobody know."""
        self.is_dead = True
        if self._items:
            _, kind, data = self._items[0]
            self._items[0] = (self.network.now() + _patience(kind), kind, data)

    def is_ready(self, now: float) -> bool:
        """Whether something can arrive now."""
        due, kind, _ = self._items[0]
        if due > now or self.is_held:
            return False
        return kind != "data" or self.is_dead or self._window() > 0

    def next_due(self) -> float | None:
        """When something can arrive, None while only others can change that."""
        due, kind, _ = self._items[0]
        if self.is_held or (kind == "data" and not self.is_dead and not self._window()):
            return None
        return due

    def _window(self) -> int:
        sink = self.sink
        if sink is None or sink.state is not CONNECTED:
            return BUFFER_BYTES
        return max(0, self.network.rcvbuf_bytes - len(sink.inbox))

    def step(self) -> None:
        """Let the next thing arrive."""
        due, kind, data = self._items.popleft()
        if self.is_dead:
            self.network.note(f"{self.name} timed out")
            self.clear()
            self.source.end(errno.ETIMEDOUT)
            if kind == "SYN-ACK" and self.sink is not None:
                self.sink.end(errno.ETIMEDOUT)  # its SYNs were never answered
            return
        if kind == "data":
            most = self._window()
            if self.piece_bytes:
                most = min(most, 1 + self.network.choose(self.piece_bytes))
            if len(data) > most:
                data = memoryview(data)
                self._items.appendleft((due, kind, data[most:]))
                data = data[:most]
            self.size -= len(data)
        if not self._items:
            self.network.active.pop(self, None)
        if self.network.is_tracing:
            detail = f" {len(data)}" if kind == "data" else ""
            self.network.note(f"{self.name} {kind}{detail}")
        self._arrive(kind, data)
        if kind == "data":
            self.source.touch()  # there is room again

    def _arrive(self, kind: str, data: bytes | memoryview) -> None:
        if kind == "SYN":
            self.network.arrive_syn(self, bytes(data))
            return
        sink = self.sink
        if sink is None:
            return
        if kind == "data":
            sink.arrive(data)
        elif kind == "FIN":
            sink.arrive_fin()
            self.source.fin_arrived()
        elif kind == "RST":
            sink.end(errno.ECONNRESET)
        elif kind == "SYN-ACK":
            self.network.arrive_syn_ack(self, sink)
        else:
            self.network.arrive_ack(sink)


class Channel:
    """Things beside TCP that happen one after the other, each by a step of its own.

    Args:
        network: To which it belongs.
        name: For the trace.
    """

    def __init__(self, network: TcpNetwork, name: str) -> None:
        self.network = network
        self.name = name
        self._items: deque[tuple[float, str, Callable[[], None]]] = deque()

    def put(self, text: str, effect: Callable[[], None], delay: float = 0.0) -> None:
        """Let something happen later."""
        self._items.append((self.network.now() + delay, text, effect))
        self.network.active[self] = None

    def is_ready(self, now: float) -> bool:
        """Whether it can happen now."""
        return self._items[0][0] <= now

    def next_due(self) -> float | None:
        """When it can happen."""
        return self._items[0][0]

    def step(self) -> None:
        """Let the next thing happen."""
        _, text, effect = self._items.popleft()
        if not self._items:
            self.network.active.pop(self, None)
        self.network.note(f"{self.name} {text}")
        effect()


class TcpConnection:
    """A connection as the network sees it, from its SYN on.

    Args:
        client: Who connects.
        there: The pipe from it.
        back: The pipe to it.
    """

    def __init__(self, client: KernelSocket, there: Pipe, back: Pipe) -> None:
        self.client = client
        self.server: KernelSocket | None = None
        """The other end, None until the SYN has arrived."""
        self.there = there
        self.back = back
        self.meeting: object = None
        """What the two processes say to each other about it beside TCP."""
        self.syns = 0
        """SYNs that found no room."""

    def __repr__(self) -> str:
        return f"<TcpConnection {self.there.name}>"

    @property
    def is_over(self) -> bool:
        """Whether neither end nor anything on its way is left."""
        ends = (self.client, self.server)
        gone = all(end is None or end.state in {CLOSED, ENDED} for end in ends)
        return gone and not (self.there or self.back)

    def delay(self, seconds: float) -> None:
        """Have what is sent from now on take a time, both ways."""
        self.there.delay = self.back.delay = seconds

    def cut(self, piece_bytes: int, send_bytes: int = 0) -> None:
        """Let data arrive in pieces, each of 1 to so many bytes.

        Args:
            piece_bytes: Most bytes of a piece; 0 is no limit.
            send_bytes: Most bytes that one send takes; 0 is no limit.
        """
        for pipe in (self.there, self.back):
            pipe.piece_bytes, pipe.send_bytes = piece_bytes, send_bytes

    def hold(self, *, held: bool = True) -> None:
        """Let nothing arrive, until called with ``held=False``."""
        self.there.is_held = self.back.is_held = held

    def reset(self) -> None:
        """End both ends with a reset, as something on the path does."""
        self.client.network.note(f"{self.there.name} reset on the path")
        for pipe, end in ((self.there, self.client), (self.back, self.server)):
            pipe.clear()
            if end is not None and end.state in {CONNECTED, CONNECTING}:
                end.end(errno.ECONNRESET)
            if end is not None and end.listener is not None:
                end.touch()

    def kill(self) -> None:
        """Let nothing arrive from now on, and nobody know."""
        self.client.network.note(f"{self.there.name} dies silently")
        self.there.kill()
        self.back.kill()


class TcpNetwork:
    """All sockets of a world.

    Args:
        now: Tells the time.
        rng: Decides what is open here.
        note: Takes a line of the trace.
        is_tracing: Whether anybody reads it.
    """

    def __init__(
        self,
        now: Callable[[], float],
        rng: random.Random,
        note: Callable[[str], None],
        *,
        is_tracing: bool = True,
    ) -> None:
        self.now = now
        self.note = note
        self.is_tracing = is_tracing
        self.sndbuf_bytes = BUFFER_BYTES
        """Bytes of a direction that may be on their way."""
        self.rcvbuf_bytes = BUFFER_BYTES
        """Bytes that wait to be read; what is beyond stays on its way."""
        self.delay = 0.0
        """Seconds of delay of connections made from now on."""
        self.strips_marks = False
        """Whether something on the path takes the mark off."""
        self.connections: list[TcpConnection] = []
        """Those that are not over, in the order of their SYNs."""
        self.on_connection: Callable[[TcpConnection], None] | None = None
        """Told of every connection before its SYN is sent."""
        self.active: dict[Pipe | Channel, None] = {}
        """Where something is on its way."""
        self._rng = rng
        self._listeners: dict[Address, KernelSocket] = {}
        self._ports = FIRST_PORT
        self._by_socket: dict[KernelSocket, TcpConnection] = {}

    def choose(self, count: int) -> int:
        """Choose one of so many."""
        return int(self._rng.random() * count)

    def socket(self, descriptors: Descriptors, host: str, port: int = 0) -> SimSocket:
        """Make a socket that is bound to an address.

        Args:
            descriptors: Of its process.
            host: The process's address.
            port: 0 takes a free one.
        """
        if not port:
            self._ports += 1
            port = self._ports
        return SimSocket(KernelSocket(self, descriptors, (host, port)))

    def ready(self, now: float) -> list[Pipe | Channel]:
        """Tell where a step can be made."""
        return [each for each in self.active if each.is_ready(now)]

    def next_due(self) -> float | None:
        """Tell when the next step can be made, None when time alone makes none."""
        dues = [each.next_due() for each in self.active]
        return min((due for due in dues if due is not None), default=None)

    def is_listening(self, address: Address) -> bool:
        """Whether somebody accepts connections there."""
        return address in self._listeners

    def is_announced(self, port: int, host: str | None = None) -> bool:
        """Whether a listener at a port is known to take part; of any host for None."""
        return any(
            sock.is_announced
            for (at, number), sock in self._listeners.items()
            if number == port and host in {None, at}
        )

    def connection_of(self, sock: SimSocket) -> TcpConnection | None:
        """Find the connection of a socket."""
        return self._by_socket.get(sock.kernel)

    def tidy(self) -> None:
        """Forget the connections that are over."""
        left = [each for each in self.connections if not each.is_over]
        if len(left) < len(self.connections):
            self.connections, living = left, set(left)
            self._by_socket = {
                sock: each for sock, each in self._by_socket.items() if each in living
            }

    # What sockets ask

    def listen(self, sock: KernelSocket) -> None:
        """Begin to accept.

        Raises:
            OSError: EADDRINUSE.
        """
        if sock.name in self._listeners:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        self._listeners[sock.name] = sock

    def unlisten(self, sock: KernelSocket) -> None:
        """Accept no more."""
        del self._listeners[sock.name]

    def connect(self, sock: KernelSocket, syn: bytes) -> None:
        """Send a SYN."""
        assert sock.peer_name is not None
        host, port = sock.peer_name
        there = Pipe(self, sock, f"tcp {sock.label} > {host}:{port}")
        back = Pipe(self, sock, f"tcp {host}:{port} > {sock.label}")
        back.sink = sock
        sock.out = there
        connection = TcpConnection(sock, there, back)
        connection.delay(self.delay)
        self.tidy()
        self.connections.append(connection)
        self._by_socket[sock] = connection
        if self.on_connection is not None:
            self.on_connection(connection)
        there.put("SYN", syn)

    def arrive_syn(self, pipe: Pipe, syn: bytes) -> None:
        """Answer a SYN: with a SYN-ACK, with a reset, or not at all."""
        connection = self._by_socket.get(pipe.source)
        assert connection is not None
        assert pipe.source.peer_name is not None
        listener = self._listeners.get(pipe.source.peer_name)
        if listener is None:
            connection.back.put("RST")
            return
        if listener.half_open > listener.backlog:
            # It is not answered, so it comes again, and at last no more.
            if connection.syns < SYN_RETRIES:
                pipe.put("SYN", syn, 2.0**connection.syns)
                connection.syns += 1
            else:
                pipe.source.end(errno.ETIMEDOUT)
            return
        made = KernelSocket(self, None, listener.name)
        made.peer_name = pipe.source.name
        if listener.options.get(_SAVE_SYN):
            made.syn = syn[:1] + b"\0" + syn[2:] if self.strips_marks else syn
        made.listener = listener
        made.state = CONNECTING
        listener.half_open += 1
        made.out, pipe.sink = connection.back, made
        connection.server = connection.back.source = made
        self._by_socket[made] = connection
        connection.back.put("SYN-ACK")

    def arrive_syn_ack(self, pipe: Pipe, sink: KernelSocket) -> None:
        """Complete a connect, unless its socket was closed."""
        assert sink.out is not None
        del pipe
        if sink.state is CONNECTING:
            sink.come_up()
            sink.out.put("ACK")
        else:
            sink.out.put("RST")

    def arrive_ack(self, sink: KernelSocket) -> None:
        """Let a connection be accepted, unless nobody listens any more."""
        listener = sink.listener
        if sink.state is not CONNECTING or listener is None:
            return
        sink.come_up()
        if listener.fileno() < 0:
            sink.abandon()
            return
        listener.queue.append(sink)
        listener.touch()
