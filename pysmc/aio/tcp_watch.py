"""The TCP connection beneath SMC-R: it carries nothing, but its end means something.

Decides what happens on it: a byte breaks the protocol, a reset is the end, and a FIN
alone means only that the peer's close is about to come, unless it does not.

Reference: RFC 7609 sections 4.8.2 and 4.8.3; kernel counterpart: smc_close.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysmc.aio import cpython
from pysmc.errors import ConnectionAborted, ConnectionReset

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable

    from pysmc.errors import SmcError

__all__ = ["TcpWatch"]

FIN_GRACE = 1.0
"""Seconds that the peer's close may come after the end of its TCP stream."""


class TcpWatch:
    """Watches one TCP socket beneath a connection.

    Args:
        loop: The running loop.
        sock: The socket; it stays the caller's.
        is_done: Tells whether the peer has said that it finished writing.
        on_end: Called once, when TCP says that the connection is over.
    """

    __slots__ = ("_is_done", "_loop", "_on_end", "_sock", "_timer", "_watching")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        is_done: Callable[[], bool],
        on_end: Callable[[SmcError], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._is_done = is_done
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        self._watching = True
        cpython.watch(loop, sock.fileno(), self._on_readable)

    def stop(self) -> None:
        """Watch no more; to be called before the socket closes. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watching:
            self._watching = False
            if not self._loop.is_closed():
                cpython.unwatch(self._loop, self._sock.fileno())

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.stop()
            reset = ConnectionReset(f"TCP ended beneath the connection: {error}")
            reset.__cause__ = error
            self._on_end(reset)
            return
        self.stop()
        if data:
            message = "peer sent a TCP byte on a connection that runs over SMC-R"
            self._on_end(ConnectionAborted(message))
        elif not self._is_done():
            self._timer = self._loop.call_later(FIN_GRACE, self._on_fin_alone)

    def _on_fin_alone(self) -> None:
        self._timer = None
        if not self._is_done():
            message = "the peer's TCP ended, and it never closed the connection"
            self._on_end(ConnectionReset(message))
