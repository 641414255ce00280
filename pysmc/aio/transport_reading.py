"""What arrived on its way to the protocol: when it is delivered, and how much at once.

* One copy: out of our memory into what the protocol gets.
* A transport delivers a bounded number of slices, then others get their turn.
* What arrived before the end is delivered, also when the memory goes before the
  protocol reads: it is copied out then (`salvage`).

Reference: RFC 7609 section 4.7; kernel counterpart: smc_rx.c.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from pysmc.aio.negotiation import as_connection_error, unread_bytes
from pysmc.aio.transport_end import EndingTransport
from pysmc.aio.write_queue import SLICE_BYTES
from pysmc.errors import ConnectionAborted

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from pysmc.aio.driver import Driver
    from pysmc.aio.negotiation import Outcome
    from pysmc.errors import SmcError

__all__ = ["ReadingTransport"]

SLICES_PER_TURN = 16
"""Slices that one transport delivers before others get their turn."""


class ReadingTransport(EndingTransport):
    """A transport as far as it receives.

    Args:
        driver: Of the loop.
        sock: The TCP socket of the connection; it belongs to the transport from now on.
        protocol: Gets what arrives.
        outcome: What the negotiation of this socket ended with.
        extra: For get_extra_info.
        server: The `asyncio.Server` that accepted it.

    Source: the asyncio documentation, "Transports and Protocols".
    """

    def __init__(
        self,
        driver: Driver,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        outcome: Outcome,
        extra: dict[str, Any] | None,
        server: Any,
    ) -> None:
        super().__init__(driver, sock, outcome, extra, server)
        assert outcome.negotiation is not None, "this connection is plain TCP"
        self._peer_done = outcome.negotiation.peer_done
        self._started = False  # connection_made was called
        self._paused = False
        self._eof_received = False
        self._over_now = False  # the end does not wait for a paused protocol
        self._delivery_scheduled = False
        self._get_buffer: Callable[[int], Any] | None = None
        self.set_protocol(protocol)

    # What the application asks

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Give what arrives from now on to this protocol."""
        buffered = isinstance(protocol, asyncio.BufferedProtocol)
        self._protocol = protocol
        self._get_buffer = self._protocol.get_buffer if buffered else None

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

    # What the driver tells

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

    # Delivery

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

    def _deliver_eof(self) -> None:
        """Every byte was delivered, and the peer said that no more will come."""
        self._eof_received = True
        self._reading = False
        keep_open = self._call("eof_received")
        if not keep_open and not self._closing:
            self.close()

    # What is still owed after a loss

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

    def _on_tcp_end(self, error: SmcError) -> None:
        if isinstance(error, ConnectionAborted):
            self._force_close(error)
        else:
            self.lose(error)
