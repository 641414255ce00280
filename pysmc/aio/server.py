"""`start_server` on any running loop.

On our own loop it serves as asyncio does. On a foreign one `SmcServer` listens and
accepts by public calls of the loop; each accepted socket is negotiated and then gets
our transport or the loop's own. Decides how many connections are accepted in one turn
and what happens when descriptors run out.

Source: the asyncio documentation, "Streams" and "Server Objects"; kernel counterpart:
af_smc.c.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import TYPE_CHECKING, Any, cast

from pysmc.aio import cpython
from pysmc.aio.client import TLS_OPTIONS
from pysmc.aio.driver import NOT_MARKED, is_tcp
from pysmc.aio.foreign import foreign_driver, uses_own_loop
from pysmc.aio.loop import log_lost
from pysmc.aio.negotiation import begin, begun, negotiate_server
from pysmc.aio.streams import STREAM_LIMIT, StreamReader, StreamWriter, serve_with
from pysmc.aio.tls import check_server_tls, make_transport
from pysmc.errors import SmcError
from pysmc.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pysmc.aio.driver import Driver
    from pysmc.aio.negotiation import Outcome
    from pysmc.config import Config
    from pysmc.discovery import Announcement
    from pysmc.info import ConnectionInfo

__all__ = ["SmcServer", "start_server"]

log = logging.getLogger("pysmc")

ACCEPT_PAUSE = 1.0
"""Seconds without accepting after the descriptors ran out, as asyncio does."""
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


async def start_server(
    client_connected_cb: Callable[[StreamReader, StreamWriter], Any],
    host: str | Sequence[str] | None = None,
    port: int | str | None = None,
    *,
    limit: int = STREAM_LIMIT,
    config: Config | None = None,
    **kwargs: Any,
) -> asyncio.AbstractServer:
    """Serve streams, over SMC-R for clients that can, on any running loop.

    Args:
        client_connected_cb: Called with reader and writer of each connection; may be a
            coroutine function.
        host: Name, numeric address, or several of them; None for all.
        port: Port number or service name; 0 chooses one.
        limit: See `StreamReader`.
        config: How to take part; from the environment by default. On a pysmc loop it
            is the loop's.
        **kwargs: On a pysmc loop everything that asyncio.start_server takes; on a
            foreign one family, flags, sock, backlog, reuse_address, reuse_port,
            start_serving, ssl, ssl_handshake_timeout and ssl_shutdown_timeout.

    Returns:
        The server.

    Raises:
        OSError: The address could not be bound.
        TypeError: `ssl` is a bool.
        ValueError: Arguments that do not go together.
    """
    if uses_own_loop(config):
        loop: Any = asyncio.get_running_loop()
        callback = serve_with(client_connected_cb)

        def make() -> asyncio.StreamReaderProtocol:
            reader = StreamReader(limit=limit, loop=loop)
            return asyncio.StreamReaderProtocol(reader, callback, loop=loop)

        return cast(
            "asyncio.Server", await loop.create_server(make, host, port, **kwargs)
        )
    given = {name: kwargs.pop(name) for name in TLS_OPTIONS if name in kwargs}
    tls = check_server_tls(**given)
    start_serving = kwargs.pop("start_serving", True)
    backlog = kwargs.pop("backlog", 100)
    driver = await foreign_driver(config)
    sockets = await _listeners(driver.loop, host, port, **kwargs)
    server = SmcServer(driver, sockets, client_connected_cb, limit, backlog, tls)
    if start_serving:
        try:
            await server.start_serving()
        except BaseException:  # somebody else may listen there since we bound
            server.close()
            raise
    return server


async def _listeners(
    loop: asyncio.AbstractEventLoop,
    host: str | Sequence[str] | None,
    port: int | str | None,
    *,
    sock: socket.socket | None = None,
    family: int = socket.AF_UNSPEC,
    flags: int = socket.AI_PASSIVE,
    reuse_address: bool | None = None,
    reuse_port: bool | None = None,
) -> list[socket.socket]:
    if sock is not None:
        if host is not None or port is not None:
            message = "host/port and sock can not be specified at the same time"
            raise ValueError(message)
        sock.setblocking(False)  # noqa: FBT003
        return [sock]
    hosts: Iterable[str | None] = [host] if isinstance(host, str | None) else host
    infos: dict[Any, None] = {}
    for one in hosts:
        found = await loop.getaddrinfo(
            one or None, port, family=family, type=socket.SOCK_STREAM, flags=flags
        )
        infos.update(dict.fromkeys(found))
    sockets: list[socket.socket] = []
    try:
        for info in infos:
            listener = socket.socket(*info[:3])
            sockets.append(listener)
            listener.setblocking(False)  # noqa: FBT003
            if reuse_address in {None, True}:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if info[0] == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            _bind(listener, info[4])
    except BaseException:
        for listener in sockets:
            listener.close()
        raise
    return sockets


def _bind(listener: socket.socket, address: Any) -> None:
    try:
        listener.bind(address)
    except OSError as error:
        # As in asyncio, and of several addresses nobody else would know which.
        why = str(error.strerror or error).lower()
        message = f"error while attempting to bind on address {address!r}: {why}"
        raise OSError(error.errno, message) from None


class _ServedProtocol(asyncio.StreamReaderProtocol):
    """A stream's protocol that tells its server when it begins and ends."""

    def __init__(self, server: SmcServer, info: ConnectionInfo) -> None:
        loop = server.get_loop()
        reader = StreamReader(limit=server.limit, loop=loop)
        super().__init__(reader, serve_with(server.callback, info), loop=loop)
        self._server = server
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self.transport = cast("asyncio.Transport", transport)
        self._server.clients.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._server.client_gone(self)


class SmcServer(asyncio.AbstractServer):
    """A server on a foreign loop, made by `start_server`.

    Args:
        driver: Of the loop.
        sockets: Bound, non-blocking; they belong to the server.
        callback: See `start_server`.
        limit: Of each reader in bytes.
        backlog: Of the listeners, and the most that is accepted in one turn; see
            `Driver.accepts`.
        tls: What `check_server_tls` gave.
    """

    def __init__(
        self,
        driver: Driver,
        sockets: list[socket.socket],
        callback: Callable[[StreamReader, StreamWriter], Any],
        limit: int,
        backlog: int,
        tls: dict[str, Any] | None = None,
    ) -> None:
        self._driver = driver
        self._sockets: list[socket.socket] | None = sockets
        self.callback = callback
        self.limit = limit
        self._backlog = backlog
        self._tls = tls or {}
        self._serving = False
        self._announcements: list[Announcement] = []
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.clients: set[_ServedProtocol] = set()
        self._waiters: list[asyncio.Future[None]] = []
        self._forever: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<SmcServer sockets={self.sockets!r}>"

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Give the loop that it serves on."""
        return self._driver.loop

    def is_serving(self) -> bool:
        """Tell whether it accepts connections."""
        return self._serving

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The listening sockets; none once closed."""
        if self._sockets is None:
            return ()
        return tuple(cpython.transport_socket(sock) for sock in self._sockets)

    async def start_serving(self) -> None:
        """Begin to accept. Idempotent.

        Raises:
            RuntimeError: The server is closed.
        """
        if self._sockets is None:
            message = f"server {self!r} is closed"
            raise RuntimeError(message)
        if self._serving:
            return
        self._serving = True
        loop = self._driver.loop
        for sock in self._sockets:
            self._driver.opt_in(sock)
            sock.listen(self._backlog)
            announcement = self._driver.announce(sock)
            if announcement is not None:
                self._announcements.append(announcement)
            loop.add_reader(sock.fileno(), self._accept, sock)

    async def serve_forever(self) -> None:
        """Accept until cancelled, then close.

        Raises:
            RuntimeError: It is closed, or serve_forever() was called before.
        """
        if self._forever is not None:
            message = f"server {self!r} is already being awaited on serve_forever()"
            raise RuntimeError(message)
        await self.start_serving()
        self._forever = self._driver.loop.create_future()
        try:
            await self._forever
        finally:
            self._forever = None
            self.close()
        await self.wait_closed()

    def close(self) -> None:
        """Stop to accept; connections that are open go on. Idempotent."""
        sockets, self._sockets = self._sockets, None
        if sockets is None:
            return
        self._serving = False
        for announcement in self._announcements:
            announcement.close()
        for timer in self._pauses.values():
            timer.cancel()
        for sock in sockets:
            self._driver.loop.remove_reader(sock.fileno())
            sock.close()
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()
        self._wake()

    def close_clients(self) -> None:
        """Close every connection, also those whose handshake goes on."""
        for task in list(self._tasks):
            task.cancel()
        for client in list(self.clients):
            if client.transport is not None:
                client.transport.close()

    def abort_clients(self) -> None:
        """Abort every connection, also those whose handshake goes on."""
        for task in list(self._tasks):
            task.cancel()
        for client in list(self.clients):
            if client.transport is not None:
                client.transport.abort()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and its connections have ended."""
        if self._sockets is not None or self.clients or self._tasks:
            waiter = self._driver.loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def client_gone(self, client: _ServedProtocol) -> None:
        """Forget a connection that has ended."""
        self.clients.discard(client)
        self._wake()

    def _wake(self) -> None:
        if self._sockets is None and not self.clients and not self._tasks:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()

    # Accepting

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(self._driver.accepts(listener, max(1, self._backlog))):
            if self._sockets is None:
                return
            try:
                conn, peer = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                self._pause(listener, error)
                return
            conn.setblocking(False)  # noqa: FBT003
            self._driver.accepted()
            task = self._driver.loop.create_task(begin(self._serve(conn, peer)))
            self._tasks.add(task)
            task.add_done_callback(self._served)

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        """A listener stays readable while nothing can be accepted: look later."""
        loop = self._driver.loop
        loop.call_exception_handler(
            {
                "message": "socket.accept() out of system resource",
                "exception": error,
                "socket": cpython.transport_socket(listener),
            }
        )
        loop.remove_reader(listener.fileno())
        self._pauses[listener] = loop.call_later(ACCEPT_PAUSE, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        del self._pauses[listener]
        self._driver.loop.add_reader(listener.fileno(), self._accept, listener)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._driver.loop.call_exception_handler(
                {
                    "message": "Error on transport creation for incoming connection",
                    "exception": task.exception(),
                    "task": task,
                }
            )
        self._wake()

    async def _serve(self, conn: socket.socket, peer: Any) -> None:
        driver = self._driver
        try:
            await begun()
            outcome = await self._negotiate(conn)
        except BaseException as error:
            conn.close()
            if not isinstance(error, SmcError | OSError):
                raise
            log_lost(error, peer)
            return
        if self._sockets is None:
            if outcome.negotiation is not None:
                outcome.negotiation.drop()
            conn.close()
            return
        try:
            await self._begin(conn, peer, outcome)
        except OSError as error:
            # As in asyncio: a client that fails at TLS is a matter for debugging.
            log_lost(error, peer)
            if driver.loop.get_debug():
                raise

    async def _begin(self, conn: socket.socket, peer: Any, outcome: Outcome) -> None:
        driver, protocol = self._driver, _ServedProtocol(self, outcome.info)
        if outcome.negotiation is None:
            await driver.loop.connect_accepted_socket(
                lambda: protocol, conn, **self._tls
            )
            return
        side = {"server_side": True} if self._tls else {}
        extra = {"peername": peer}
        await make_transport(
            driver, conn, protocol, outcome, extra=extra, **side, **self._tls
        )

    async def _negotiate(self, conn: socket.socket) -> Outcome:
        driver = self._driver
        found = driver.inspect(conn) if is_tcp(conn) else NOT_MARKED
        if isinstance(found, Reason):
            return driver.on_tcp("server", found)
        return await negotiate_server(driver, conn, found)
