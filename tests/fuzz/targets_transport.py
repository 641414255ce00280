"""The fuzz target for what an application holds: calls and a peer's updates, any order.

``transport`` is an `SmcTransport` over two connections of the core, back to back, on a
loop that only queues. The input chooses what the application calls, also from within
its protocol's methods, what the peer writes, reads and says, and when anything arrives;
also what no honest peer says. What a protocol gets is what the other side wrote, from
the beginning, in one piece; `connection_made` comes first and `connection_lost` last,
each exactly once; `pause_writing` and `resume_writing` take turns; nothing is left.
"""

from __future__ import annotations

import functools
import mmap
from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from pysmc.aio.tcp_linger import Lingering
from pysmc.aio.transport import SmcTransport
from pysmc.config import Config
from pysmc.core.connection import Connection
from pysmc.core.events import News
from pysmc.core.rmb import RToken
from pysmc.core.roles import Role
from pysmc.core.tuning import Tuning
from pysmc.errors import ConnectionReset, FabricError, LocalProtocolError
from pysmc.fabric.base import Status
from tests.fuzz.target import Bytes, Target

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TARGETS"]

ELEMENT = 256
"""Bytes of both elements: soon full, and soon wrapped."""
CODE = bytes((n * 7 + n // 256) & 0xFF for n in range(1 << 15))
"""What both sides write: byte n says where it is, as far as a byte can."""
CONFIG = Config()
EDGES = (0, 1, 2, 127, 128, 129, ELEMENT - 1, ELEMENT, ELEMENT + 1, 2 * ELEMENT, 1000)


class Loop:
    """A loop that does nothing until it is told to."""

    def __init__(self) -> None:
        self.ready: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.timers: list[Timer] = []
        self.now = 0.0
        self.reader: Callable[[], None] | None = None
        self.reports: list[dict[str, Any]] = []

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        """Queue a call."""
        self.ready.append((callback, args))

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., None], *args: Any
    ) -> Timer:
        """Queue a timer."""
        timer = Timer(self.now + delay, functools.partial(callback, *args))
        self.timers.append(timer)
        return timer

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Note what a program would have seen in its log."""
        self.reports.append(context)

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Watch the one socket."""
        del fd
        self.reader = callback

    def remove_reader(self, fd: int) -> None:
        """Watch it no more."""
        del fd
        self.reader = None

    def get_debug(self) -> bool:
        """Say no."""
        return False

    is_closed = is_running = get_debug

    def turn(self) -> None:
        """Do what was ready at the beginning of the turn."""
        for _ in range(len(self.ready)):
            callback, args = self.ready.popleft()
            callback(*args)

    def pass_time(self, seconds: float) -> None:
        """Let timers run that are due then."""
        self.now += seconds
        for timer in [each for each in self.timers if each.when <= self.now]:
            self.timers.remove(timer)
            if timer.callback is not None:
                timer.callback()


class Timer:
    """A timer that can be cancelled."""

    def __init__(self, when: float, callback: Callable[..., None]) -> None:
        self.when = when
        self.callback: Callable[..., None] | None = callback

    def cancel(self) -> None:
        """Forget it."""
        self.callback = None


class Socket:
    """The TCP socket beneath: silent, unless the input says otherwise."""

    def __init__(self) -> None:
        self.says: bytes | OSError | None = None
        self.is_closed = False

    def fileno(self) -> int:
        """Give a descriptor that is nobody's."""
        return 1 << 20

    def getsockname(self) -> tuple[str, int]:
        """Give an address."""
        return ("192.0.2.1", 1)

    getpeername = getsockname

    def setsockopt(self, *what: Any) -> None:
        """Take an option."""

    def recv(self, size: int) -> bytes:
        """Give what the input says."""
        del size
        if self.says is None:
            raise BlockingIOError
        if isinstance(self.says, OSError):
            raise self.says
        return self.says

    def close(self) -> None:
        """Close."""
        self.is_closed = True


class Region:
    """Registered memory."""

    offset = 0

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 1 << 14)
        self.view = memoryview(self.memory)


class Pair:
    """The queue pair as one side posts on it."""

    def __init__(self, memory: mmap.mmap, arrives: deque[Any]) -> None:
        self._memory, self._arrives = memory, arrives
        self.refuses = False

    def post_write(self, rkey: int, address: int, data: bytes | memoryview) -> None:
        """Write into the other side's memory."""
        self._refuse()
        start = address - (rkey << 32)
        assert 0 <= start <= start + len(data) <= ELEMENT, "outside of the element"
        self._memory[start : start + len(data)] = data

    def publish(self, rkey: int, wr_id: int, *update: int) -> bool:
        """Put an update on its way."""
        del rkey, wr_id
        self._refuse()
        self._arrives.append(update)
        return True

    def _refuse(self) -> None:
        if self.refuses:
            raise FabricError("post", Status.REMOTE_ACCESS.name, "the region is gone")

    def flush(self) -> None:
        """Nothing was held back."""

    def newest_consumer(self, region: Region, alert_token: int) -> int:
        """No mailbox is kept."""
        del region, alert_token
        return -1


class Driver:
    """What a transport needs of the driver."""

    is_forked = is_closed = False
    config = CONFIG

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.transports: dict[Any, None] = {}
        self.lingering = Lingering(cast("Any", loop), CONFIG.close_wait)
        self.ended = 0

    def check_owner(self) -> None:
        """Always the right thread."""

    def pump_all(self) -> None:
        """Nothing waits."""

    def publish(self, connection: Connection) -> None:
        """Publish if that is due."""
        if connection.update_due:
            pair = connection.link.handle
            try:
                connection.published(pair.publish(*connection.take_post()))
            except FabricError:
                return  # the real one logs it

    def end(self, connection: Connection, *, abort: bool) -> None:
        """Close or abort, and tell the peer."""
        self.ended += 1
        connection.abort() if abort else connection.close()
        self.publish(connection)


class Protocol:
    """Notes what it is told, and does in between what the input says."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.got = 0
        self.calls: list[str] = []
        self.is_paused = False
        self.hooks: dict[str, int] = {}
        self.keep_open = False

    def connection_made(self, transport: SmcTransport) -> None:
        """It begins."""
        assert not self.calls, "connection_made is first"
        self._note("made")
        assert transport is self.stage.transport

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self._alive()
        assert type(data) is bytes
        assert data, "no bytes are no news"
        stage = self.stage
        if not stage.is_lied_to:
            wanted = CODE[self.got : self.got + len(data)]
            assert data == wanted, f"byte {self.got} and on: not what was written"
            assert self.got + len(data) <= stage.peer_written
        self.got += len(data)
        self._hook("data")

    def eof_received(self) -> bool:
        """No more will come."""
        self._alive()
        if not self.stage.is_lied_to:
            assert self.got == self.stage.peer_written, "an end of file too early"
            assert self.stage.peer_done, "an end of file that nobody wrote"
        self._note("eof")
        self._hook("eof")
        return self.keep_open

    def pause_writing(self) -> None:
        """The buffer is full."""
        self._alive()
        assert not self.is_paused, "paused twice"
        self.is_paused = True
        self._hook("pause")

    def resume_writing(self) -> None:
        """There is room."""
        self._alive()
        assert self.is_paused, "resumed before it was paused"
        self.is_paused = False
        self._hook("resume")

    def connection_lost(self, error: BaseException | None) -> None:
        """It is over."""
        self._alive()
        assert error is None or isinstance(error, OSError), repr(error)
        self._note("lost")
        self._hook("lost")

    def _alive(self) -> None:
        assert self.calls, "something before connection_made"
        assert "lost" not in self.calls, "something after connection_lost"

    def _note(self, what: str) -> None:
        self.calls.append(what)

    def _hook(self, where: str) -> None:
        choice = self.hooks.pop(where, 0)
        if choice:
            self.stage.call(choice)


_REGIONS = (Region(), Region())
_EMPTY = bytes(2 * ELEMENT)


def _connection(pair: Pair, region: Region, token: int, wrap: int) -> Connection:
    stub: Any = SimpleNamespace
    group = stub(fabric="sim", connections={})
    made = group.connections[token] = Connection(
        role=Role.CLIENT,
        group=group,
        link=stub(handle=pair),
        rmb=stub(handle=region, length=1 << 14),
        alert_token=token,
        sndbuf_bytes=1 << 14,
        tuning=Tuning(ELEMENT, wrap, 65530),
    )
    return made


class Stage:
    """A transport, its protocol, and the peer.

    Args:
        wrap: Of the cursors at the beginning.
    """

    def __init__(self, wrap: int) -> None:
        ours, theirs = _REGIONS
        for region in _REGIONS:
            region.memory[: len(_EMPTY)] = _EMPTY
        self.loop, self.socket = Loop(), Socket()
        self.to_us: deque[Any] = deque()
        self.to_peer: deque[Any] = deque()
        self.pair = Pair(theirs.memory, self.to_peer)
        self.peer_pair = Pair(ours.memory, self.to_us)
        self.mine = _connection(self.pair, ours, 1, wrap)
        self.peer = _connection(self.peer_pair, theirs, 2, wrap)
        self.mine.attach_peer(
            token=RToken(2, 2 << 32), alert_token=2, rmbe_bytes=ELEMENT
        )
        self.peer.attach_peer(
            token=RToken(1, 1 << 32), alert_token=1, rmbe_bytes=ELEMENT
        )
        self.written = self.peer_written = self.peer_read = 0
        self.peer_done = self.is_lied_to = False
        self.driver = Driver(self.loop)
        self.protocol = Protocol(self)
        negotiation = SimpleNamespace(
            take=lambda: self.mine, error=None, salvaged=deque(), peer_done=False
        )
        self.mine.is_established = True
        outcome: Any = SimpleNamespace(negotiation=negotiation, info="info")
        self.transport = SmcTransport(
            cast("Any", self.driver),
            cast("Any", self.socket),
            cast("Any", self.protocol),
            outcome,
        )

    # The application

    def call(self, choice: int) -> None:  # noqa: C901  # flat
        """Call a method of the transport; what it may raise is documented."""
        transport, protocol = self.transport, self.protocol
        amount = EDGES[choice // 16 % len(EDGES)]
        if not protocol.calls:
            return  # nobody has it before connection_made
        try:
            match choice % 16:
                case 0 | 1 | 2 | 3:
                    self._write(amount)
                case 4:
                    half = amount // 2
                    data = CODE[self.written : self.written + amount]
                    if len(data) == amount and not transport.is_closing():
                        transport.writelines([data[:half], memoryview(data)[half:]])
                        self.written += amount
                case 5:
                    transport.pause_reading()
                case 6 | 7:
                    transport.resume_reading()
                case 8:
                    transport.write_eof()
                case 9:
                    transport.close()
                case 10:
                    transport.abort()
                case 11:
                    transport.set_write_buffer_limits(amount, amount // 4)
                case 12:
                    protocol.hooks["data" if amount % 2 else "eof"] = choice // 16
                case 13:
                    protocol.hooks["pause" if amount % 2 else "resume"] = choice // 16
                case 14:
                    protocol.keep_open = not protocol.keep_open
                case _:
                    assert transport.get_write_buffer_size() >= 0
                    assert repr(transport)
        except (RuntimeError, OSError):
            # write() or write_eof() after the end, in asyncio's and the kernel's words.
            return

    def _write(self, amount: int) -> None:
        data = CODE[self.written : self.written + amount]
        if len(data) < amount:
            return
        transport = self.transport
        closing, before = transport.is_closing(), transport.get_write_buffer_size()
        transport.write(bytearray(data) if amount % 2 else data)
        # While a close waits for room it takes more, as asyncio's own does.
        if not closing or transport.get_write_buffer_size() > before:
            self.written += amount

    # The peer

    def peer_does(self, choice: int) -> None:
        """Write, read, or say something."""
        peer = self.peer
        amount = EDGES[choice // 8 % len(EDGES)]
        if peer.error is not None:
            return
        try:
            match choice % 8:
                case 0 | 1 | 2:
                    self._peer_writes(amount)
                case 3 | 4:
                    self._peer_reads(amount)
                case 5:
                    peer.shutdown_write()
                    self.peer_done = True
                case 6:
                    peer.close()
                    self.peer_done = True
                case _:
                    peer.abort()
        except LocalProtocolError:
            return  # it wrote after it had closed
        self.driver.publish(peer)

    def _peer_writes(self, amount: int) -> None:
        data = CODE[self.peer_written : self.peer_written + amount]
        for address, length in self.peer.claim(len(data)):
            piece, data = data[:length], data[length:]
            self.peer_pair.post_write(1, address, piece)
            self.peer_written += length

    def _peer_reads(self, amount: int) -> None:
        peer, memory = self.peer, _REGIONS[1].memory
        while amount:
            offset, length = peer.peek(amount)
            if not length:
                return
            data = memory[offset : offset + length]
            if not self.is_lied_to:
                wanted = CODE[self.peer_read : self.peer_read + length]
                assert data == wanted, f"byte {self.peer_read}: not what was written"
            self.peer_read += length
            amount -= length
            peer.consume(length)

    # What arrives

    def deliver(self) -> None:
        """Let an update of the peer arrive."""
        if not self.to_us:
            return
        _, *rest = update = self.to_us.popleft()
        del rest
        news = self.mine.receive_update(update)
        if self.mine.handle is not None:
            self.mine.handle.receive_news(news)

    def deliver_to_peer(self) -> None:
        """Let an update of ours arrive."""
        if self.to_peer:
            news = self.peer.receive_update(self.to_peer.popleft())
            if news & News.PUBLISH:
                self.driver.publish(self.peer)

    def lie(self, source: Bytes) -> None:
        """An update that is not true."""
        self.is_lied_to = True
        mine = self.mine
        produced = (
            mine._rx_produced + EDGES[source.byte() % len(EDGES)] + source.signed()
        )
        acked = mine._tx_acked + EDGES[source.byte() % len(EDGES)] + source.signed()
        ring = mine._ring
        sequence = mine._peer_sequence + source.signed() & 0xFFFF
        flags = (source.byte() << 8 | source.byte()) & 0xF8E0
        packed = (ring.pack(max(0, produced)), ring.pack(max(0, acked)))
        news = mine.receive_update((sequence, 1, *packed, flags))
        if mine.handle is not None:
            mine.handle.receive_news(news)

    def lose_link(self) -> None:
        """The link goes down, as the driver tells it."""
        error = ConnectionReset("the link to the peer is lost")
        mine, handle = self.mine, self.mine.handle
        if mine.error is not None or mine.we_ended or handle is None:
            return
        handle.salvage()
        mine.link_lost(error)
        self.pair.refuses = True
        handle.lose(error)

    def tcp(self, choice: int) -> None:
        """TCP beneath says something."""
        says = (b"", b"x", ConnectionResetError("reset"), None)
        self.socket.says = says[choice % 4]
        if self.loop.reader is not None:
            self.loop.reader()

    def step(self, source: Bytes) -> None:  # noqa: C901  # flat
        """Do one thing."""
        match source.byte() % 16:
            case 0 | 1 | 2:
                self.call(source.byte())
            case 3 | 4 | 5:
                self.peer_does(source.byte())
            case 6 | 7 | 8:
                self.deliver()
            case 9 | 10:
                self.deliver_to_peer()
            case 11 | 12:
                self.loop.turn()
            case 13:
                choice = source.byte()
                if choice < 200:
                    self.loop.pass_time(CONFIG.close_wait if choice & 1 else 0.1)
                elif choice < 220:
                    self.pair.refuses = True
                else:
                    self.tcp(choice)
            case 14:
                self.lose_link()
            case _:
                self.lie(source)
        if self.mine.error is None:
            self.mine.check()

    def finish(self) -> None:
        """End it whatever happened, and see that nothing is left."""
        self.protocol.hooks.clear()
        self.transport.abort()
        for _ in range(20):
            self.loop.turn()
        assert not self.loop.ready, "it never comes to rest"
        calls = self.protocol.calls
        assert calls[0] == "made"
        assert calls[-1] == "lost"
        assert calls.count("lost") == calls.count("made") == 1
        assert self.driver.ended == 1, "its side of the connection ends once"
        assert self.socket.is_closed
        assert self.loop.reader is None
        assert not self.driver.transports
        assert all(timer.callback is None for timer in self.loop.timers)
        assert not self.loop.reports, self.loop.reports


def _transport(data: bytes) -> None:
    source = Bytes(data)
    stage = Stage(0xFFFF if source.byte() & 1 else 0)
    while source:
        stage.step(source)
    stage.finish()


def _seeds() -> list[bytes]:
    """An echo, a full window, and each way in which it may end."""
    begin = bytes((0, 11))
    echo = bytes((3, 24, 6, 11, 0, 48, 9, 3, 27, 6, 11))
    full = bytes((0, 144, 0, 144, 9, 3, 75, 6, 11, 9, 3, 75, 6, 11))
    ends = [
        (0, 8, 11, 9), (0, 9, 11), (0, 10, 11), (3, 5, 6, 11, 11), (3, 6, 6, 11, 11),
        (3, 7, 6, 11), (14, 11), (13, 200, 0, 16), (13, 221, 11), (13, 222, 11),
        (15, 1, 0, 1, 0, 1, 0, 0, 11), (0, 5, 3, 24, 6, 11, 14, 0, 6, 11, 11),
        (0, 12, 3, 24, 6, 11), (0, 9, 13, 1, 13, 1, 11),
    ]  # fmt: skip
    seeds = [begin + echo + bytes(end) for end in ends]
    seeds += [b"\1" + begin[1:] + full + bytes(end) for end in ends]
    return seeds


TARGETS = [Target("transport", _transport, _seeds, 96)]
