"""Sockets that a program uses itself, by the calls that a loop has for them.

Decides that such a socket is TCP from then on, before the call does anything. What was
found out about a socket when it was connected is kept here; how it is settled is the
business of discovery.

Source: the asyncio documentation, "Working with socket objects directly".
"""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.reasons import Reason, reason

if TYPE_CHECKING:
    import socket

    from pysmc.aio.driver import Driver
    from pysmc.discovery import Mark, OptionMark
    from pysmc.info import ConnectionInfo

__all__ = ["USED_RAW", "Found", "RawSocketLoop"]

USED_RAW = reason("NOT_MARKED", "local", "The program used the socket itself before.")


class Found(NamedTuple):
    """What discovery said about a socket that was connected here."""

    sock: weakref.ref[socket.socket]
    """Tells whether the descriptor is still that socket's."""
    found: Mark | OptionMark | Reason
    """A mark, or why it is TCP."""
    plain: ConnectionInfo | None = None
    """What the application is told, where nothing is left to be decided."""


class RawSocketLoop(asyncio.SelectorEventLoop):
    """asyncio's selector loop, which settles as TCP what the program uses itself."""

    __slots__ = ("_found",)

    _found: dict[int, Found]
    """By descriptor."""

    @property
    def driver(self) -> Driver:
        """The driver."""
        raise NotImplementedError

    def _remember(self, sock: socket.socket, found: Mark | OptionMark | Reason) -> None:
        self._found[sock.fileno()] = Found(weakref.ref(sock), found)

    def _recall(self, sock: socket.socket) -> Mark | OptionMark | Reason | None:
        entry = self._found.get(sock.fileno())
        return entry.found if entry is not None and entry.sock() is sock else None

    def _used_raw(self, sock: socket.socket) -> None:
        found = self._recall(sock)
        if found is None or found is USED_RAW:
            return
        self._remember(sock, USED_RAW)
        if not isinstance(found, Reason):
            self.driver.discovery.settle_tcp(found)

    async def sock_recv(self, sock: socket.socket, nbytes: int) -> bytes:
        """Receive from a socket, which stays TCP."""
        if self._found:
            self._used_raw(sock)
        return await super().sock_recv(sock, nbytes)

    async def sock_recv_into(self, sock: socket.socket, buf: Any) -> int:
        """Receive into a buffer from a socket, which stays TCP."""
        if self._found:
            self._used_raw(sock)
        return await super().sock_recv_into(sock, buf)

    async def sock_recvfrom(self, sock: socket.socket, bufsize: int) -> Any:
        """Receive a datagram, or bytes of a socket that stays TCP."""
        if self._found:
            self._used_raw(sock)
        return await super().sock_recvfrom(sock, bufsize)

    async def sock_recvfrom_into(
        self, sock: socket.socket, buf: Any, nbytes: int = 0
    ) -> Any:
        """Receive a datagram, or bytes of a socket that stays TCP, into a buffer."""
        if self._found:
            self._used_raw(sock)
        return await super().sock_recvfrom_into(sock, buf, nbytes)

    async def sock_sendall(self, sock: socket.socket, data: Any) -> None:
        """Send over a socket, which stays TCP."""
        if self._found:
            self._used_raw(sock)
        await super().sock_sendall(sock, data)

    async def sock_sendto(self, sock: socket.socket, data: Any, address: Any) -> int:
        """Send a datagram, or bytes over a socket that stays TCP."""
        if self._found:
            self._used_raw(sock)
        return await super().sock_sendto(sock, data, address)

    async def sock_sendfile(
        self,
        sock: socket.socket,
        file: Any,
        offset: int = 0,
        count: int | None = None,
        *,
        fallback: bool | None = True,
    ) -> int:
        """Send a file over a socket, which stays TCP."""
        if self._found:
            self._used_raw(sock)
        return await super().sock_sendfile(sock, file, offset, count, fallback=fallback)
