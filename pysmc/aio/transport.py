"""What the application holds on SMC-R: an asyncio transport over one connection.

Decides when bytes leave and what the peer's news comes to. Where bytes may go is the
core's business; what arrives stands in `transport_reading`, how it ends in
`transport_end`. It needs nothing of the loop but call_soon, call_later, add_reader and
remove_reader, so it works on every loop.

One copy: from the application's buffer into the peer's memory.

Reference: RFC 7609 sections 4.7 and 4.8; kernel counterparts: smc_tx.c, smc_close.c.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Any

from pysmc.aio import cpython
from pysmc.aio.tcp_watch import TcpWatch
from pysmc.aio.transport_reading import ReadingTransport
from pysmc.aio.write_queue import SLICE_BYTES, Buffer
from pysmc.core.events import News
from pysmc.errors import ConnectionReset, FabricError

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Iterable

    from pysmc.aio.driver import Driver
    from pysmc.aio.negotiation import Outcome

__all__ = ["SmcTransport"]

log = logging.getLogger("asyncio")

LOST_WRITES_BEFORE_WARNING = 5
"""asyncio's own threshold for writes to a connection that is gone."""

_DATA, _SPACE, _PUBLISH = News.DATA, News.SPACE, News.PUBLISH
_DONE, _CLOSED, _ABORTED = News.DONE, News.CLOSED, News.ABORTED
_NOT_CALM = ~(_DATA | _SPACE)
_NOT_SPACE = ~_SPACE


class SmcTransport(ReadingTransport):
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
        super().__init__(driver, sock, protocol, outcome, extra, server)
        self._eof = False  # write_eof() was called
        if self._released:
            # Lost between the verdict and now: give back what it may still hold.
            driver.end(self._connection, abort=True)
        driver.transports[self] = None
        loop = self._loop
        loop.call_soon(protocol.connection_made, self)
        loop.call_soon(self._start)
        if waiter is not None:
            loop.call_soon(_set_result, waiter)

    # What the application asks

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
                self._hold()
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
        if self._refused:
            assert self._over is not None
            self._force_close(self._told(self._over))
            return False
        # TCP sends it, is answered with a reset, and complains when asked again.
        self._refused = True
        if self._over is None:
            message = "the peer has closed the connection; it reads no more"
            self._give_up(ConnectionReset(message))
            if size > self._connection.peer_rmbe_bytes:
                # More than TCP would have taken: what is left over meets the reset.
                self._over_now = True
                self._loop.call_soon(self._go_on_ending)
            elif self._reading:
                self._schedule_delivery()
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
        if self._refused:
            # What shutdown() says of a TCP socket whose reset nobody has met yet.
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if not self._queue.size:
            self._say_done()

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
        closes_on_us = news & _CLOSED and self._queue.size
        if news & _DONE and not closes_on_us and self._over is None:
            # A close while bytes wait here is a reset, and no end of file before it. No
            # end comes behind a loss: what came since then is delivered to nobody.
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

    # What waits

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
        self._hold()
        if self._closing:
            self._close_now()
        elif self._eof:
            self._say_done()

    def _say_done(self) -> None:
        if not self._released:
            self._connection.shutdown_write()
            self._publish()

    def _start(self) -> None:
        """connection_made was called: deliver what has come, and watch TCP."""
        self._started = True
        if self._conn_lost or self._driver.is_forked:
            return
        self._reading = self.is_reading()  # it may have closed already
        self._hold()
        if self._over is not None:
            self._go_on_ending()
            return
        connection = self._connection
        assert self._sock is not None
        self._tcp = TcpWatch(
            self._loop, self._sock, lambda: connection.peer_done, self._loose.end_of_tcp
        )
        # News from before there was a transport.
        news = _DONE if connection.peer_done else 0
        news |= _CLOSED if connection.peer_closed else 0
        news |= _ABORTED if connection.peer_aborted else 0
        self.receive_news(news | _DATA | _PUBLISH)


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
