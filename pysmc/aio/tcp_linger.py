"""TCP sockets of closed connections, until the peer has had what was posted.

Decides when the TCP connection beneath a closed one ends: not before the peer's device
has taken the last publish. A FIN that comes a second before the close itself looks like
a process that died, and over RDMA a megabyte may well be on its way for so long. Where
a publish completes at once, TCP ends at once.

Reference: RFC 7609 section 4.8.2; kernel counterpart: smc_close_stream_wait().
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    import socket

    from pysmc.core.connection import Connection

__all__ = ["Lingering"]


class Lingering:
    """The sockets that wait for it.

    Args:
        loop: The running loop.
        wait: Seconds that a socket waits at most.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, wait: float) -> None:
        self._loop = loop
        self._wait = wait
        self._waiting: dict[Connection, tuple[socket.socket, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def descriptors(self) -> set[int]:
        """Name the descriptors that wait; the program has closed them."""
        return {sock.fileno() for sock, _ in self._waiting.values()}

    def close_after(self, connection: Connection, sock: socket.socket) -> None:
        """Close a socket, once nothing of its connection is on its way any more."""
        if not _is_underway(connection):
            sock.close()
            return
        timer = self._loop.call_later(self._wait, self._close, connection)
        self._waiting[connection] = (sock, timer)

    def completed(self, connection: Connection) -> None:
        """A publish of a connection has completed; it may have been the last."""
        if connection in self._waiting and not _is_underway(connection):
            self._close(connection)

    def sweep(self) -> None:
        """Close those whose last publish never completes: they, or the link, ended."""
        for connection in [each for each in self._waiting if not _is_underway(each)]:
            self._close(connection)

    def close(self) -> None:
        """Close all, whatever is on its way. Idempotent."""
        for connection in list(self._waiting):
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        sock, timer = self._waiting.pop(connection)
        timer.cancel()
        sock.close()


def _is_underway(connection: Connection) -> bool:
    """Tell whether a completion of the connection is still to come.

    Once both ends have closed it is in no table, and the peer waits for nothing.
    """
    found = connection.group.connections.get(connection.alert_token)
    return found is connection and connection.oldest_post is not None
