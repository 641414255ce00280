"""What the application holds on SMC-R: an asyncio transport over one connection.

Decides when bytes move and how a connection ends for its protocol. Where bytes may go
is the core's business. It needs nothing of the loop but call_soon, call_later,
add_reader and remove_reader, so it works on every loop.

* One copy a direction: from the application's buffer into the peer's memory, out of
  our memory into what the protocol gets.
* A transport delivers a bounded number of slices, then others get their turn.
* What arrived before the end is delivered, also when the memory goes before the
  protocol reads: it is copied out then (`salvage`).

Reference: RFC 7609 sections 4.7 and 4.8; kernel counterparts: smc_tx.c, smc_rx.c,
smc_close.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import warnings
from typing import TYPE_CHECKING, Any, cast

from pysmc.aio import cpython
from pysmc.aio.negotiation import as_connection_error, unread_bytes
from pysmc.aio.tcp_watch import TcpWatch
from pysmc.aio.write_queue import SLICE_BYTES, Buffer, WriteQueue
from pysmc.core.events import News
from pysmc.errors import ConnectionAborted, ConnectionReset, FabricError, SmcError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pysmc.aio.driver import Driver
    from pysmc.aio.negotiation import Outcome

__all__ = ["SmcTransport"]

log = logging.getLogger("asyncio")

SLICES_PER_TURN = 16
"""Slices that one transport delivers before others get their turn."""
LOST_WRITES_BEFORE_WARNING = 5
"""asyncio's own threshold for writes to a connection that is gone."""

_DATA, _SPACE, _PUBLISH = News.DATA, News.SPACE, News.PUBLISH
_DONE, _CLOSED, _ABORTED = News.DONE, News.CLOSED, News.ABORTED
_NOT_CALM = ~(_DATA | _SPACE)
_NOT_SPACE = ~_SPACE
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class SmcTransport(cpython.FlowControlMixin):
    """A transport whose bytes go through the peer's memory.

    Every method that changes something raises `ForkedError` in a forked child.

    Args:
        driver: Of the loop.
        sock: The TCP socket of the connection; it belongs to the transport from now on.
        protocol: Gets connection_made soon.
        outcome: What the negotiation of this socket ended with.
        waiter: Future that is set after connection_made.
        extra: For get_extra_info, beside "smc", "socket", "peername", "sockname".
        server: The `asyncio.Server` that accepted it.

    Reference: the asyncio documentation, "Transports and Protocols".
    """

    _start_tls_compatible = True
    _sendfile_compatible = cpython.sendfile_by_fallback()

    _sock: socket.socket | None = None

    def __init__(
        self,
        driver: Driver,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        outcome: Outcome,
        *,
        waiter: asyncio.Future[Any] | None = None,
        extra: dict[str, Any] | None = None,
        server: Any = None,
    ) -> None:
        super().__init__(extra, driver.loop)
        assert outcome.negotiation is not None, "this connection is plain TCP"
        negotiation = outcome.negotiation
        connection = negotiation.take()
        self._driver = driver
        self._connection = connection
        self._pair = connection.link.handle
        self._memory: Any = None
        self._view: Any = None
        self._base = 0
        # It may be over already: a peer that is quick wrote, closed and left.
        self._over = negotiation.error  # it is lost; bytes may still be owed
        self._salvaged = negotiation.salvaged
        self._released = self._over is not None  # our side of it has ended
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
        self._sock = sock
        self._fd = sock.fileno()
        self._tcp: TcpWatch | None = None

        self._started = False  # connection_made was called
        self._paused = False
        self._reading = False  # started, not paused, not closing, no EOF yet
        self._open = not self._released  # write() may go straight on
        self._eof = False  # write_eof() was called
        self._eof_received = False
        self._peer_done = negotiation.peer_done
        self._closing = False
        self._conn_lost = 0
        self._over_now = False  # the end does not wait for a paused protocol
        self._delivery_scheduled = False
        self._close_timer: asyncio.TimerHandle | None = None
        self._size_before = -1

        self._protocol: Any = None
        self._get_buffer: Callable[[int], Any] | None = None
        self.set_protocol(protocol)
        self._server = server
        if server is not None:
            cpython.attach(server, self)

        connection.handle = self
        if self._released:
            # Lost between the verdict and now: give back what it may still hold.
            driver.end(connection, abort=True)
        driver.transports.add(self)
        loop = self._loop
        loop.call_soon(protocol.connection_made, self)
        loop.call_soon(self._start)
        if waiter is not None:
            loop.call_soon(_set_result, waiter)

    def __repr__(self) -> str:
        words = [type(self).__name__]
        if self._sock is None:
            words.append("closed")
        elif self._closing:
            words.append("closing")
        words.append(f"fd={self._fd}")
        words.append("read=" + ("on" if self._reading else "off"))
        words.append(f"write=<bufsize={self._queue.size}>")
        return f"<{' '.join(words)}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if self._sock is not None:
            if not self._driver.is_forked:
                _warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
            self._sock.close()

    # What the application asks

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Give the current protocol."""
        return cast("asyncio.BaseProtocol", self._protocol)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Give what arrives from now on to this protocol."""
        buffered = isinstance(protocol, asyncio.BufferedProtocol)
        self._protocol = protocol
        self._get_buffer = self._protocol.get_buffer if buffered else None

    def is_closing(self) -> bool:
        """Tell whether it is closing or closed."""
        return self._closing

    def is_reading(self) -> bool:
        """Tell whether the protocol gets data."""
        return not self._closing and not self._paused

    def pause_reading(self) -> None:
        """Deliver nothing until resume_reading; the peer's window fills. Idempotent."""
        if self.is_reading():
            self._paused = True
            self._reading = False

    def resume_reading(self) -> None:
        """Deliver again. Idempotent."""
        if self._closing or not self._paused:
            return
        self._driver.check_owner()
        self._paused = False
        self._reading = self._started and not self._eof_received
        self._schedule_delivery()

    def get_write_buffer_size(self) -> int:
        """Tell how many bytes wait for room in the peer's memory."""
        return self._queue.size

    def can_write_eof(self) -> bool:
        """Half close works both ways."""
        return True

    def write(self, data: Buffer) -> None:
        """Send bytes, or keep them until there is room.

        Args:
            data: Not kept by reference, unless it is bytes.

        Raises:
            TypeError: data is not a buffer of bytes.
            RuntimeError: write_eof() was called.
        """
        if type(data) is not bytes:
            data = _plain(data)
        if not self._open and not self._may_wait(len(data)):
            return
        if not data:
            return
        try:
            if self._queue.write(data):
                self._maybe_pause_protocol()
        except FabricError as error:
            self._fail(error)

    def _may_wait(self, size: int) -> bool:
        """Sort out why a write cannot go straight on; True when it joins the queue."""
        self._driver.check_owner()
        if self._eof:
            message = "Cannot call write() after write_eof()"
            raise RuntimeError(message)
        if not size:
            return False
        if self._conn_lost:
            if self._conn_lost >= LOST_WRITES_BEFORE_WARNING:
                log.warning("write to an SMC-R connection that is gone")
            self._conn_lost += 1
            return False
        if self._closing:
            return True
        message = "the peer has closed the connection; it reads no more"
        self._force_close(ConnectionReset(message))
        return False

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        """Send several buffers; small ones go out together."""
        pieces = [d if type(d) is bytes else _plain(d) for d in list_of_data]
        if sum(map(len, pieces)) <= SLICE_BYTES:
            self.write(b"".join(pieces))
        else:
            for piece in pieces:
                self.write(piece)

    def write_eof(self) -> None:
        """Say that no more bytes will come, after those that still wait."""
        self._driver.check_owner()
        if self._closing or self._eof:
            return
        self._eof = True
        self._open = False
        if not self._queue.size:
            self._say_done()

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
        else:
            self._close_now()

    def abort(self) -> None:
        """End the connection now; what waits is lost."""
        self._driver.check_owner()
        self._force_close(None)

    # What the driver tells

    def receive_news(self, news: int) -> None:
        """Take what an update of the peer brought (bits of `News`)."""
        if news & _SPACE and self._queue.size:
            self._send_waiting()
        if news & _NOT_CALM:
            self._take_state(news)
        if self._reading and news & _NOT_SPACE:
            self._deliver()
        if news & _PUBLISH:
            self._publish()

    def _take_state(self, news: int) -> None:
        fabric = self._connection.group.fabric
        if news & _DONE:
            self._peer_done = True
        if news & _CLOSED:
            self._open = False
            if self._queue.size:
                # It will never read them: TCP would answer with a reset.
                message = "the peer closed while bytes were on their way to it"
                self.lose(ConnectionReset(message, fabric=fabric))
        if news & _ABORTED:
            error = self._connection.error
            if error is None:
                message = "the peer ended the connection abnormally"
                error = ConnectionReset(message, fabric=fabric)
            self.lose(error)

    def salvage(self) -> None:
        """Copy out what arrived: the memory is about to go."""
        if not (self._closing or self._released or self._eof_received):
            self._salvaged += unread_bytes(self._connection)

    def lose(self, error: SmcError) -> None:
        """The connection is over, but for the bytes that already arrived."""
        if self._conn_lost or self._over is not None:
            return
        if self._closing:
            self._force_close(as_connection_error(error))
            return
        # Somebody may wait for the queue to drain, which will not happen any more: then
        # the end must not wait until the protocol reads on.
        self._over_now = self._queue.size > 0
        self._queue.clear()
        self.salvage()
        self._over = error
        self._open = False
        self._release(abort=True)
        if self._started:
            self._go_on_ending()

    def leave(self) -> None:
        """The loop is closing: end our side as a socket that is closed would."""
        if not self._released:
            self._conn_lost += 1
            self._release(abort=self._queue.size > 0)
        self._stop_waiting()

    def disown(self) -> None:
        """In a forked child: let every later use raise, and touch nothing."""
        self._open = False
        self._reading = False

    # Writing

    def _publish(self) -> None:
        connection = self._connection
        if not connection.update_due:
            return
        pair = self._pair
        try:
            connection.published(
                pair.publish(
                    connection.remote_rkey,
                    connection.alert_token,
                    *connection.take_update(),
                )
            )
            pair.flush()
        except FabricError as error:
            self._fail(error)

    def _send_waiting(self) -> None:
        """There is room: send on, tell the protocol, and end what waited for it."""
        try:
            self._queue.send()
        except FabricError as error:
            self._fail(error)
            return
        self._maybe_resume_protocol()
        if self._queue.size or self._conn_lost:
            return
        if self._closing:
            self._close_now()
        elif self._eof:
            self._say_done()

    def _say_done(self) -> None:
        if not self._released:
            self._connection.shutdown_write()
            self._publish()

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

    # Reading

    def _start(self) -> None:
        """connection_made was called: deliver what has come, and watch TCP."""
        self._started = True
        if self._conn_lost or self._driver.is_forked:
            return
        self._reading = not self._paused
        if self._over is not None:
            self._go_on_ending()
            return
        connection = self._connection
        assert self._sock is not None
        self._tcp = TcpWatch(
            self._loop, self._sock, lambda: connection.peer_done, self._on_tcp_end
        )
        # News from before there was a transport.
        news = _DONE if connection.peer_done else 0
        news |= _CLOSED if connection.peer_closed else 0
        news |= _ABORTED if connection.peer_aborted else 0
        self.receive_news(news | _DATA | _PUBLISH)

    def _schedule_delivery(self) -> None:
        if not self._delivery_scheduled:
            self._delivery_scheduled = True
            self._loop.call_soon(self._deliver_again)

    def _deliver_again(self) -> None:
        self._delivery_scheduled = False
        if self._reading and not self._driver.is_forked:
            self._deliver()

    def _deliver(self) -> None:
        """Give the protocol what has arrived, up to a bound, then the end if it is due.

        The protocol may pause, close, abort or be replaced in each of its methods.
        """
        if self._over is not None:
            self._go_on_ending()
            return
        connection, memory, base = self._connection, self._memory, self._base
        for _ in range(SLICES_PER_TURN):
            offset, length = connection.peek(SLICE_BYTES)
            if not length:
                break
            if self._get_buffer is None:
                start = base + offset
                data = memory[start : start + length]
                if connection.consume(length):
                    self._publish()
                self._call("data_received", data)
            else:
                self._fill_buffer(self._view[offset : offset + length])
            if not self._reading:
                return
        else:
            self._schedule_delivery()
            return
        if self._peer_done and not self._eof_received:
            self._deliver_eof()

    def _fill_buffer(self, piece: memoryview) -> None:
        """Copy into the protocol's own buffer, as much as it has room for."""
        try:
            buffer = self._call("get_buffer", -1)
            if self._conn_lost:
                return
            count = min(len(buffer), len(piece))
            if not count:
                message = "get_buffer() returned an empty buffer"
                self._fatal("get_buffer", RuntimeError(message))
                return
            memoryview(buffer)[:count] = piece[:count]
            if self._over is not None:
                if count < len(piece):
                    self._salvaged.appendleft(piece[count:])
            elif self._connection.consume(count):
                self._publish()
        finally:
            piece.release()
        self._call("buffer_updated", count)

    def _go_on_ending(self) -> None:
        """Deliver what is still owed, then end."""
        while self._salvaged and self._reading:
            piece = self._salvaged.popleft()
            if self._get_buffer is None:
                self._call("data_received", bytes(piece))
            else:
                self._fill_buffer(piece)
        if self._closing:
            return
        error = self._over
        assert error is not None
        if not self._over_now:
            if self._salvaged:
                return  # until resume_reading
            if self._peer_done and not self._eof_received:
                if not self._reading:
                    return
                self._deliver_eof()
            if self._connection.peer_closed and not self._closing:
                # It had closed both ways, so nothing more was to come: as with TCP,
                # only a write meets the loss, and close() ends it without an error.
                return
        self._force_close(as_connection_error(error))

    def _deliver_eof(self) -> None:
        """Every byte was delivered, and the peer said that no more will come."""
        self._eof_received = True
        self._reading = False
        keep_open = self._call("eof_received")
        if not keep_open and not self._closing:
            self.close()

    def _call(self, name: str, *args: Any) -> Any:
        """Call the protocol; what it raises ends the connection, as in asyncio."""
        try:
            return getattr(self._protocol, name)(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  # asyncio's rule
            self._fatal(name, error)
            return None

    # The end

    def _on_tcp_end(self, error: SmcError) -> None:
        if isinstance(error, ConnectionAborted):
            self._force_close(error)
        else:
            self.lose(error)

    def _fail(self, error: FabricError) -> None:
        """A post was refused: what the peer said about its memory is not true."""
        failed = ConnectionAborted(str(error))
        failed.__cause__ = error
        self._force_close(failed)

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
            log.debug("%r: protocol.%s() failed: %s", self, name, error)
        self._force_close(error)

    def _force_close(self, error: BaseException | None) -> None:
        if self._conn_lost:
            return
        self._queue.clear()
        self._salvaged.clear()
        self._closing = True
        self._open = False
        self._reading = False
        self._conn_lost += 1
        self._release(abort=True)
        if self._sock is not None:
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
            self._driver.transports.discard(self)
            if self._sock is not None:
                self._sock.close()
                self._sock = None
            self._protocol = None
            self._get_buffer = None
            server, self._server = self._server, None
            if server is not None:
                cpython.detach(server, self)


def _name(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except OSError:
        return None


def _plain(data: object) -> Buffer:
    """Make sure that a buffer counts in bytes and lies in one piece."""
    if isinstance(data, bytes | bytearray):
        return data
    if not isinstance(data, memoryview):
        kind = type(data).__name__
        message = f"data argument must be a bytes-like object, not {kind!r}"
        raise TypeError(message)
    if data.itemsize != 1 or data.ndim != 1 or not data.c_contiguous:
        return data.tobytes()
    return data


def _set_result(waiter: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_result(None)
