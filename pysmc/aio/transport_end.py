"""How a connection ends for its protocol: once, whoever ends it.

Decides what close, abort, a failure of the protocol and a refused post come to, who
is told, and in which order everything of a connection is given back. It holds what both
directions share; how bytes arrive and leave stands in the classes derived from it.

Reference: RFC 7609 sections 4.8.1 and 4.8.2; kernel counterpart: smc_close.c.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import warnings
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from pysmc.aio import cpython
from pysmc.aio.write_queue import WriteQueue
from pysmc.errors import ConnectionAborted, FabricError, SmcError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from pysmc.aio.driver import Driver
    from pysmc.aio.negotiation import Outcome
    from pysmc.aio.tcp_watch import TcpWatch
    from pysmc.core.connection import Connection

__all__ = ["EndingTransport"]

log = logging.getLogger("asyncio")

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class EndingTransport(cpython.FlowControlMixin):
    """The state of a transport, and its end.

    Args:
        driver: Of the loop.
        sock: The TCP socket of the connection; it belongs to the transport from now on.
        outcome: What the negotiation of this socket ended with.
        extra: For get_extra_info, beside "smc", "socket", "peername", "sockname".
        server: The `asyncio.Server` that accepted it.

    Source: the asyncio documentation, "Transports and Protocols".
    """

    _sock: socket.socket | None = None

    def __init__(
        self,
        driver: Driver,
        sock: socket.socket,
        outcome: Outcome,
        extra: dict[str, Any] | None,
        server: Any,
    ) -> None:
        super().__init__(extra, driver.loop)
        assert outcome.negotiation is not None, "this connection is plain TCP"
        negotiation = outcome.negotiation
        connection = negotiation.take()
        self._driver = driver
        self._connection = connection
        self._pair = connection.link.handle
        # It may be over already: a peer that is quick wrote, closed and left.
        self._over = negotiation.error  # it is lost; bytes may still be owed
        self._salvaged: deque[memoryview] = negotiation.salvaged or deque()
        self._released = self._over is not None  # our side of it has ended
        self._memory: Any = None
        self._view: Any = None
        self._base = 0
        if not self._released:
            region = connection.rmb.handle
            self._memory, self._view = region.memory, region.view
            self._base = region.offset
        self._queue = WriteQueue(connection, self._pair)
        self._extra["smc"] = outcome.info
        self._extra["socket"] = cpython.transport_socket(sock)
        self._extra["sockname"] = _name(sock.getsockname)
        if "peername" not in self._extra:
            self._extra["peername"] = _name(sock.getpeername)
        with contextlib.suppress(OSError):
            # Nothing is sent over it, but programs look.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._fd = sock.fileno()
        cpython.own_descriptor(self._loop, self._fd, self)
        self._tcp: TcpWatch | None = None

        self._reading = False  # started, not paused, not closing, no EOF yet
        self._open = not self._released  # write() may go straight on
        self._closing = False
        self._conn_lost = 0
        self._over_now = False  # it is lost, and somebody waits for room
        self._refused = self._released  # as TCP is after a reset that nobody has met
        self._close_timer: asyncio.TimerHandle | None = None
        self._size_before = -1
        self._protocol: Any = None
        self._server: Any = None
        if server is not None:
            cpython.attach(server, self)  # refuses when it was closed meanwhile
            self._server = server
        self._held = True
        self._loose = LooseHandle(self)
        connection.handle = self

    def __repr__(self) -> str:
        words = [type(self).__name__]
        if self._sock is None:
            words.append("closed")
        elif self._closing:
            words.append("closing")
        words.append(f"fd={self._fd}")
        words.append("read=" + ("polling" if self._reading else "idle"))
        size = self._queue.size
        words.append(f"write=<{'polling' if size else 'idle'}, bufsize={size}>")
        return f"<{' '.join(words)}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if self._sock is None:
            return
        if self._driver.is_forked:
            self._sock.close()
            return
        try:
            _warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
        finally:  # a filter may turn the warning into an error
            self._end_unclosed(self._sock)

    def _end_unclosed(self, sock: socket.socket) -> None:
        """Nobody can close it any more: end it as the kernel ends a dropped socket."""
        if self._server is not None:
            cpython.detach(self._server, self)
        if self._released or self._loop.is_closed():
            sock.close()
            return
        # Objects die in any thread, and between any two lines.
        self._loop.call_soon_threadsafe(
            _bury, self._driver, self._connection, self._tcp, sock
        )

    # What the application asks

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Give the current protocol."""
        return cast("asyncio.BaseProtocol", self._protocol)

    def is_closing(self) -> bool:
        """Tell whether it is closing or closed."""
        return self._closing

    def get_write_buffer_size(self) -> int:
        """Tell how many bytes wait for room in the peer's memory."""
        return self._queue.size

    def close(self) -> None:
        """Send what waits, then end the connection; nothing more is delivered.

        Without progress for `Config.close_wait` the rest is given up.
        """
        self._driver.check_owner()
        if self._closing:
            return
        self._closing = True
        self._open = False
        self._reading = False
        if self._queue.size:
            self._watch_close()
        elif not self._over_now:
            self._close_now()

    def abort(self) -> None:
        """End the connection now; what waits is lost.

        The peer gets an end of file, as over TCP, unless something was lost: then it is
        a reset, so that nobody takes a part for the whole.
        """
        self._driver.check_owner()
        self._force_close(None)

    def _hold(self) -> None:
        """Be kept alive exactly while something is to come, as asyncio does.

        A transport that neither reads nor writes belongs to the program alone, which
        may forget it: then the connection ends.
        """
        held = self._reading or self._queue.size > 0
        if held is not self._held and not self._conn_lost:
            self._held = held
            self._connection.handle = self if held else self._loose

    # What the driver asks

    def leave(self) -> None:
        """The loop is closing: end our side as a socket that is closed would."""
        # A delivery may be due: its memory goes, and while the driver answers peers
        # that close, nobody is to be called.
        self._conn_lost += 1
        self._open = False
        self._reading = False
        self._release(abort=self._queue.size > 0)
        self._queue.clear()
        self._stop_waiting()

    def disown(self) -> None:
        """In a forked child: let every later use raise, and touch nothing."""
        self._open = False
        self._reading = False

    # The end

    def _publish(self) -> None:
        connection = self._connection
        if not connection.update_due:
            return
        pair = self._pair
        try:
            connection.published(pair.publish(*connection.take_post()))
            pair.flush()
        except FabricError as error:
            self._fail(error)

    def _close_now(self) -> None:
        self._conn_lost += 1
        self._release(abort=False)
        self._loop.call_soon(self._call_connection_lost, None)

    def _watch_close(self) -> None:
        """Give up a close whose last bytes find no room for too long."""
        self._close_timer = None
        size = self._queue.size
        if self._conn_lost or not size:
            return
        wait = self._driver.config.close_wait
        if size == self._size_before:
            message = f"{size} bytes found no room at the peer for {wait:g} s of close"
            self._force_close(ConnectionAborted(message))
            return
        self._size_before = size
        self._close_timer = self._loop.call_later(wait, self._watch_close)

    def _call(self, name: str, *args: Any) -> Any:
        """Call the protocol; what it raises ends the connection, as in asyncio."""
        try:
            return getattr(self._protocol, name)(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  # asyncio's rule
            self._fatal(name, error)
            return None

    def _fatal(self, name: str, error: BaseException) -> None:
        """A method of the protocol raised: it is reported, and the connection ends."""
        if not isinstance(error, OSError):
            self._loop.call_exception_handler(
                {
                    "message": f"Fatal error: protocol.{name}() call failed.",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )
        elif self._loop.get_debug():
            message = "%r: Fatal error: protocol.%s() call failed."
            log.debug(message, self, name, exc_info=error)
        self._force_close(error)

    def _fail(self, error: FabricError) -> None:
        """A post was refused: what the peer said about its memory is not true."""
        failed = ConnectionAborted(str(error))
        failed.__cause__ = error
        self._force_close(failed)

    def _force_close(self, error: BaseException | None) -> None:
        if self._conn_lost:
            return
        is_bad = self._queue.size > 0 or isinstance(error, SmcError)
        self._queue.clear()
        self._salvaged.clear()
        self._closing = True
        self._open = False
        self._reading = False
        self._conn_lost += 1
        self._release(abort=is_bad)
        if is_bad and self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE
                )
        self._loop.call_soon(self._call_connection_lost, error)

    def _release(self, *, abort: bool) -> None:
        """End our side of the connection; its memory is not touched afterwards."""
        if not self._released:
            self._released = True
            self._view = self._memory = None
            self._driver.end(self._connection, abort=abort)

    def _stop_waiting(self) -> None:
        if self._tcp is not None:
            self._tcp.stop()
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None

    def _call_connection_lost(self, error: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._stop_waiting()
            self._driver.transports.pop(self, None)
            if self._sock is not None:
                if error is None:
                    self._driver.lingering.close_after(self._connection, self._sock)
                else:
                    self._sock.close()
                self._sock = None
            self._protocol = None
            server, self._server = self._server, None
            if server is not None:
                cpython.detach(server, self)


class LooseHandle:
    """Passes on what is told to a transport, without keeping it alive.

    Args:
        transport: Whom to tell while it lives.
    """

    __slots__ = ("_transport",)

    def __init__(self, transport: Any) -> None:
        self._transport = weakref.ref(transport)

    def receive_news(self, news: int) -> None:
        """Pass on what an update of the peer brought."""
        transport = self._transport()
        if transport is not None:
            transport.receive_news(news)

    def salvage(self) -> None:
        """Pass on that the memory is about to go."""
        transport = self._transport()
        if transport is not None:
            transport.salvage()

    def lose(self, error: SmcError) -> None:
        """Pass on that the connection is lost."""
        transport = self._transport()
        if transport is not None:
            transport.lose(error)

    def end_of_tcp(self, error: SmcError) -> None:
        """Pass on what happened on TCP."""
        transport = self._transport()
        if transport is not None:
            transport.end_of_tcp(error)


def _bury(
    driver: Driver, connection: Connection, tcp: TcpWatch | None, sock: socket.socket
) -> None:
    """End what a transport that nobody closed has left."""
    if tcp is not None:
        tcp.stop()
    if driver.is_closed:
        sock.close()
    else:
        driver.end(connection, abort=False)
        driver.lingering.close_after(connection, sock)


def _name(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except OSError:
        return None
