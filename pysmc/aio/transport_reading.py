"""What arrived on its way to the protocol: when it is delivered, and how much at once.

* One copy: out of our memory into what the protocol gets.
* A transport delivers a bounded number of slices, then others get their turn.
* What arrived before the end is delivered, also when the memory goes before the
  protocol reads: it is copied out then (`salvage`).

Reference: RFC 7609 section 4.7; kernel counterpart: smc_rx.c.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from pysmc.aio.negotiation import as_connection_error, unread_bytes
from pysmc.aio.transport_end import EndingTransport
from pysmc.aio.write_queue import SLICE_BYTES
from pysmc.errors import ConnectionAborted, ConnectionReset, PeerClosed

if TYPE_CHECKING:
    import socket

    from pysmc.aio.driver import Driver
    from pysmc.aio.negotiation import Outcome
    from pysmc.errors import SmcError

__all__ = ["ReadingTransport"]

log = logging.getLogger("asyncio")

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
        self._delivery_scheduled = False
        self._buffered = False  # the protocol gives its own buffers
        self.set_protocol(protocol)

    # What the application asks

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Give what arrives from now on to this protocol."""
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)
        self._protocol = protocol

    def is_reading(self) -> bool:
        """Tell whether the protocol gets data."""
        return not self._closing and not self._paused

    def pause_reading(self) -> None:
        """Deliver nothing until resume_reading; the peer's window fills. Idempotent."""
        if self.is_reading():
            self._paused = True
            self._reading = False
            self._hold()
            if self._loop.get_debug():
                log.debug("%r pauses reading", self)

    def resume_reading(self) -> None:
        """Deliver again. Idempotent."""
        if self._closing or not self._paused:
            return
        self._driver.check_owner()
        self._paused = False
        self._reading = self._started
        self._eof_received = False  # asyncio says it again after each resume
        self._hold()
        self._schedule_delivery()
        if self._loop.get_debug():
            log.debug("%r resumes reading", self)

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
            self._force_close(self._told(error))
            return
        # As with TCP, whoever reads or waits for room learns it now, and nobody else
        # before it does so.
        self._over_now = self._queue.size > 0
        self._refused = not self._connection.peer_closed
        self._queue.clear()
        self._give_up(error)
        if self._started:
            self._go_on_ending()

    def _give_up(self, error: SmcError) -> None:
        self.salvage()
        self._over = error
        self._open = False
        self._release(abort=True)
        self._hold()

    def _told(self, error: SmcError) -> Exception:
        """Give the error that TCP would have for it: after the peer's end EPIPE."""
        if self._peer_done and isinstance(error, ConnectionReset):
            return PeerClosed(
                str(error), fabric=error.fabric, diagnosis=error.diagnosis
            )
        return as_connection_error(error)

    # Delivery

    def _schedule_delivery(self) -> None:
        if not self._delivery_scheduled:
            self._delivery_scheduled = True
            self._loop.call_soon(self._deliver_again)

    def _deliver_again(self) -> None:
        self._delivery_scheduled = False
        if self._reading and not self._driver.is_forked:
            self._deliver(may_end=True)

    def _deliver(self, *, may_end: bool = False) -> None:
        """Give the protocol what has arrived, up to a bound, then the end if it is due.

        The protocol may pause, close, abort or be replaced in each of its methods. The
        end has a turn of its own, as on TCP: whom the last data woke may still answer.
        """
        if self._over is not None:
            self._go_on_ending()
            return
        connection, memory, base = self._connection, self._memory, self._base
        for _ in range(SLICES_PER_TURN):
            offset, length = connection.peek(SLICE_BYTES)
            if not length:
                break
            may_end = False
            if not self._buffered:
                start = base + offset
                data = memory[start : start + length]
                if connection.consume(length):
                    self._publish()
                self._call("data_received", data)
            else:
                self._fill_buffer()
            if not self._reading:
                return
        else:
            self._schedule_delivery()
            return
        if self._peer_done and not self._eof_received:
            if may_end:
                self._deliver_end()
            else:
                self._schedule_delivery()

    def _deliver_end(self) -> None:
        if self._over is not None:
            self._go_on_ending()  # a write in between has met the peer's end
        else:
            self._deliver_eof()

    def _fill_buffer(self) -> None:
        """Copy into the protocol's own buffer, as much as it has room for."""
        buffer = self._call("get_buffer", -1)
        if self._conn_lost:
            return
        try:
            view = _bytes_of(buffer)
        except (TypeError, RuntimeError) as error:
            self._fatal("get_buffer", error)
            return
        with view:
            copy = self._copy_salvaged if self._over is not None else self._copy_unread
            count = copy(view)
        if not self._conn_lost:
            self._call("buffer_updated", count)

    def _copy_unread(self, room: memoryview) -> int:
        """Copy out of our memory, slice by slice: the peer may write on meanwhile."""
        connection, count, size = self._connection, 0, len(room)
        while count < size and not self._conn_lost:
            offset, length = connection.peek(min(SLICE_BYTES, size - count))
            if not length:
                break
            room[count : count + length] = self._view[offset : offset + length]
            count += length
            if connection.consume(length):
                self._publish()
        return count

    def _copy_salvaged(self, room: memoryview) -> int:
        """Copy out of what was saved before the memory went."""
        piece = self._salvaged.popleft()
        count = min(len(room), len(piece))
        room[:count] = piece[:count]
        if count < len(piece):
            self._salvaged.appendleft(piece[count:])
        return count

    def _deliver_eof(self) -> None:
        """Every byte was delivered, and the peer said that no more will come."""
        self._eof_received = True
        self._reading = False
        self._hold()
        if self._loop.get_debug():
            log.debug("%r received EOF", self)
        keep_open = self._call("eof_received")
        if not keep_open and not self._closing:
            self.close()

    # What is still owed after a loss

    def _go_on_ending(self) -> None:
        """Deliver what is still owed, then end.

        Whoever neither reads nor waits for room is not told: as with TCP, the next
        write meets the loss, and close() ends the connection without an error.
        """
        may_end = not self._delivery_scheduled or self._over_now
        while self._salvaged and self._reading:
            may_end = self._over_now
            if not self._buffered:
                self._call("data_received", bytes(self._salvaged.popleft()))
            else:
                self._fill_buffer()
        if self._reading and not may_end:
            self._schedule_delivery()
            return
        if self._reading and self._peer_done:
            self._deliver_eof()
        if (self._reading or self._over_now) and not self._conn_lost:
            assert self._over is not None
            self._force_close(self._told(self._over))

    def end_of_tcp(self, error: SmcError) -> None:
        """Take what happened on TCP, after what came before it over the fabric."""
        self._driver.pump_all()
        if isinstance(error, ConnectionAborted):
            self._force_close(error)
        else:
            self.lose(error)


def _bytes_of(buffer: Any) -> memoryview:
    """Give what get_buffer() returned as bytes that can be written.

    Raises:
        TypeError: It is no such thing, or its bytes do not lie in one piece.
        RuntimeError: It has no room.
    """
    view = memoryview(buffer)
    if view.readonly:
        message = f"get_buffer() returned {type(buffer).__name__}, which is read-only"
        raise TypeError(message)
    if not view.nbytes:
        message = "get_buffer() returned an empty buffer"
        raise RuntimeError(message)
    return view.cast("B")
