"""The event loop: asyncio's own, whose TCP connections move to SMC-R where they can.

Decides where in a connection's life the two ways part: after the connect or accept, and
before there is a transport. Everything else is the stock loop's, and so is the
transport of every connection that stays on TCP.

A connection that is not marked costs one system call at the client and one at the
server, and no wait. A socket that the program uses itself (sock_recv, sock_sendall and
so on) is settled as TCP at once, without making the peer wait.

Source: asyncio/selector_events.py and base_events.py of CPython 3.11 to 3.13; the
private names are listed in `pysmc.aio.cpython`. Kernel counterpart: af_smc.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import weakref
from typing import TYPE_CHECKING, Any, Self

from pysmc.aio import cpython
from pysmc.aio.driver import INET, NOT_MARKED, Driver, is_tcp
from pysmc.aio.negotiation import (
    Outcome,
    begin,
    begun,
    negotiate_client,
    negotiate_server,
)
from pysmc.aio.raw_sockets import Found, RawSocketLoop
from pysmc.aio.selector import FabricSelector
from pysmc.aio.sendfile import can_send, send_file
from pysmc.aio.tls import make_tls_transport, start_tls
from pysmc.aio.transport import SmcTransport
from pysmc.config import Config
from pysmc.discovery import OptionMark
from pysmc.discovery.findings import PEER_NO_SMC
from pysmc.discovery.mark import read_mark
from pysmc.discovery.order import Way
from pysmc.discovery.static import StaticPeers
from pysmc.errors import Declined, HandshakeTimeout, SmcError
from pysmc.reasons import Reason

if TYPE_CHECKING:
    import ssl
    from collections.abc import Coroutine

    from pysmc.discovery import Announcement, Mark
    from pysmc.fabric.base import Device
    from pysmc.info import ConnectionInfo

__all__ = ["Loop", "log_lost", "new_event_loop", "run"]

log = logging.getLogger("pysmc")

IPPROTO_TCP = int(socket.IPPROTO_TCP)


class Loop(RawSocketLoop):
    """asyncio's selector loop with SMC-R beneath its TCP connections.

    Args:
        config: How to take part; from the environment by default.

    Raises:
        ValueError: A value of the configuration is not allowed.
    """

    # Not in the instance's dictionary: CPython shares the keys of at most 30 attributes
    # between instances, and beyond that every attribute of the loop, stock ones too,
    # takes longer to look up. The stock loop has almost as many.
    __slots__ = (
        "_announcements",
        "_driver",
        "_fabric_selector",
        "_outcomes",
        "_plain_client",
        "_plain_server",
        "config",
    )

    config: Config
    """How the loop takes part."""

    def __new__(cls, config: Config | None = None) -> Self:
        """Check the configuration while no loop exists that would need closing."""
        config = Config.from_env() if config is None else config
        StaticPeers(config.peers)  # complain now, not at the first connection
        loop = super().__new__(cls)
        loop.config = config
        return loop

    def __init__(self, config: Config | None = None) -> None:
        del config  # kept by __new__
        self._driver: Driver | None = None
        # What connections to and from plain peers are told, if such may be.
        self._plain_client: ConnectionInfo | None = None
        self._plain_server: ConnectionInfo | None = None
        self._found = {}
        # Outcomes on their way from a negotiation to the transport that is made next.
        self._outcomes: dict[socket.socket, Outcome] = {}
        # By descriptor as well: a program may close a listener behind our back, and the
        # next one gets its number.
        self._announcements: dict[
            int, tuple[weakref.ref[socket.socket], Announcement]
        ] = {}
        self._backlogs: weakref.WeakKeyDictionary[socket.socket, int] = (
            weakref.WeakKeyDictionary()
        )
        self._fabric_selector = self._make_selector()
        super().__init__(self._fabric_selector)

    def _make_selector(self) -> FabricSelector:
        """Make the selector; a loop of another world gives it another kernel."""
        return FabricSelector(self.config.busy_poll_us)

    @property
    def driver(self) -> Driver:
        """The driver; made on first use."""
        driver = self._driver
        if driver is None:
            if self.is_closed():
                message = "Event loop is closed"
                raise RuntimeError(message)
            driver = self._driver = self._make_driver()
            if self.config.fallback == "allow":
                absent = driver.presence.absent
                self._plain_client = driver.on_tcp("client", absent).info
                self._plain_server = driver.on_tcp("server", absent).info
        return driver

    def _make_driver(self) -> Driver:
        """Make the driver; a loop of another world gives it another opener."""
        return Driver(
            self, self.config, self._watch_device, unwatch=self._unwatch_device
        )

    def _watch_device(self, driver: Driver, device: Device) -> None:
        self.add_reader(device.fileno(), driver.pump, device)
        self._fabric_selector.add_device(device, driver)

    def _unwatch_device(self, driver: Driver, device: Device) -> None:
        del driver
        self._fabric_selector.remove_device(device)
        self.remove_reader(device.fileno())

    def close(self) -> None:
        """Close the loop: peers are told, and every descriptor of ours is closed."""
        driver = self._driver
        try:
            if driver is not None and not self.is_running() and not self.is_closed():
                self._close_driver(driver)
        finally:
            super().close()

    def _close_driver(self, driver: Driver) -> None:
        with contextlib.ExitStack() as rest:  # also where something is interrupted
            rest.callback(driver.close)
            for _, announcement in self._announcements.values():
                rest.callback(announcement.close)
            self._announcements.clear()
            for device in driver.devices:
                self._fabric_selector.remove_device(device)
                if not driver.is_forked:
                    self.remove_reader(device.fileno())

    # The client

    def sock_connect(
        self, sock: socket.socket, address: Any
    ) -> Coroutine[Any, Any, None]:
        """Connect a socket, marked when a listener of pysmc is there.

        Raises:
            ForkedError: In a forked child.
        """
        # Most connections are plain: for them there is no coroutine of ours around the
        # stock loop's, and as few calls as possible, each of which costs a microsecond
        # where it is not in the processor's cache.
        driver = self._driver
        if (
            driver is not None
            and driver.lookup is not None
            and sock.proto == IPPROTO_TCP
            and type(address) is tuple
            and type(address[1]) is int
            and self.time() < driver.presence.absent_until
            and not driver.lookup.has_port(address[1])
        ):
            self._found[sock.fileno()] = Found(
                weakref.ref(sock), driver.presence.absent, self._plain_client
            )
            return super().sock_connect(sock, address)
        if not is_tcp(sock):
            return super().sock_connect(sock, address)
        return self._prepare_and_connect(sock, address)

    async def _prepare_and_connect(self, sock: socket.socket, address: Any) -> None:
        # Nothing is marked before this runs: a task may be cancelled before it begins.
        found = self.driver.prepare(sock, address)
        if isinstance(found, Reason) and found.name == "SETUP_MISSING":
            found = await self._prepare_by_name(sock, address, found)
        discovery = self.driver.discovery
        try:
            await super().sock_connect(sock, address)
        except BaseException:
            if not isinstance(found, Reason):
                discovery.settle_tcp(found)
                if isinstance(found, OptionMark) and found.is_late:
                    self._remember(sock, found)
            raise
        if not isinstance(found, Reason):
            discovery.connected(found)
        self._remember(sock, found)

    async def _prepare_by_name(
        self, sock: socket.socket, address: Any, found: Reason
    ) -> Mark | OptionMark | Reason:
        """Try again with the numeric address; only direct callers give a host name."""
        numeric = await self._resolve(sock, address)
        return found if numeric is None else self.driver.prepare(sock, numeric)

    async def _resolve(self, sock: socket.socket, address: Any) -> Any:
        """Find the numeric address that the stock loop will use for a host name."""
        if not (isinstance(address, tuple) and isinstance(address[0], str)):
            return None
        if _is_numeric(address[0]):
            return None  # no need to ask, in a thread at that
        try:
            found = await self.getaddrinfo(
                *address[:2], family=sock.family, type=sock.type, proto=sock.proto
            )
        except OSError:
            return None  # the stock loop raises its own error
        numeric = found[0][4]
        return None if numeric[:2] == address[:2] else numeric

    def _create_connection_transport(
        self,
        sock: socket.socket,
        protocol_factory: Any,
        ssl: Any,
        server_hostname: str | None,
        server_side: bool = False,  # noqa: FBT001, FBT002  # asyncio's signature
        **options: Any,
    ) -> Coroutine[Any, Any, tuple[Any, Any]]:
        if not server_side and self._plain_client is not None:
            entry = self._found.get(sock.fileno())
            if entry and entry.plain is not None and entry.sock() is sock:
                return super()._create_connection_transport(  # type: ignore[misc,no-any-return]
                    sock, protocol_factory, ssl, server_hostname, **options
                )
        return self._negotiate_and_make(
            sock,
            protocol_factory,
            ssl,
            server_hostname,
            server_side=server_side,
            **options,
        )

    async def _negotiate_and_make(
        self, sock: socket.socket, *args: Any, server_side: bool, **options: Any
    ) -> tuple[Any, Any]:
        if is_tcp(sock):
            self.driver.check_owner()
            sock.setblocking(False)  # noqa: FBT003  # a program may give any
            if server_side:
                found_there = self.driver.inspect(sock, is_given=True)
                self._outcomes[sock] = await self._settle_accepted(sock, found_there)
            else:
                found = self._recall(sock) or NOT_MARKED
                self._found.pop(sock.fileno(), None)
                outcome = await negotiate_client(self.driver, sock, found)
                self._outcomes[sock] = outcome
        try:
            return await super()._create_connection_transport(  # type: ignore[misc,no-any-return]
                sock, *args, server_side=server_side, **options
            )
        finally:
            if sock in self._outcomes:
                self._drop_outcome(sock)

    # The server

    async def create_server(
        self, *args: Any, start_serving: bool = True, **options: Any
    ) -> asyncio.Server:
        """Serve TCP; whoever is cancelled meanwhile leaves no listener behind."""
        # asyncio's would go on to serve: it waits a turn after it has begun.
        server = await super().create_server(*args, start_serving=False, **options)
        try:
            for listener in server.sockets:
                self._opt_in(listener)
            if start_serving:
                await server.start_serving()
        except BaseException:
            server.close()
            raise
        return server

    def _opt_in(self, listener: Any) -> None:
        """Let a listener show the TCP option, which it can only before it listens."""
        driver = self.driver
        driver.opt_in(listener)
        is_known = driver.discovery.serves_option or driver.presence.is_here()
        if is_known and self._plain_server is not None:
            self._plain_server = driver.on_tcp("server", PEER_NO_SMC).info

    def _start_serving(
        self, protocol_factory: Any, sock: socket.socket, *args: Any, **kwargs: Any
    ) -> None:
        entry = self._announcements.get(sock.fileno())
        if (entry is None or entry[0]() is not sock) and is_tcp(sock):
            if entry is not None:
                entry[1].close()
                del self._announcements[sock.fileno()]
            announcement = self.driver.announce(sock)
            if announcement is not None:
                self._announcements[sock.fileno()] = (weakref.ref(sock), announcement)
        super()._start_serving(protocol_factory, sock, *args, **kwargs)  # type: ignore[misc]

    def _stop_serving(self, sock: socket.socket) -> None:
        entry = self._announcements.pop(sock.fileno(), None)
        if entry is not None:
            entry[1].close()
        super()._stop_serving(sock)  # type: ignore[misc]

    def _accept_connection(
        self,
        protocol_factory: Any,
        sock: socket.socket,
        sslcontext: Any = None,
        server: Any = None,
        backlog: int = 100,
        *args: Any,
    ) -> None:
        # The stock loop takes as many in a turn as the listener's backlog holds, and
        # after a pause for want of descriptors as many as in the turn before it.
        backlog = self._backlogs.setdefault(sock, backlog)
        if self._driver is not None:
            granted = self._driver.accepts(sock, backlog or cpython.ACCEPTED_BEYOND)
            if not granted:
                return
            backlog = granted - cpython.ACCEPTED_BEYOND
        super()._accept_connection(  # type: ignore[misc]
            protocol_factory, sock, sslcontext, server, backlog, *args
        )

    def _accept_connection2(
        self,
        protocol_factory: Any,
        conn: socket.socket,
        extra: dict[str, Any],
        sslcontext: Any = None,
        server: Any = None,
        *args: Any,
    ) -> Coroutine[Any, Any, None]:
        # A listener that the program made itself has no protocol number, nor have they.
        if conn.proto == IPPROTO_TCP or is_tcp(conn):
            # The SYN can be read only once, and here no task exists yet.
            driver = self._driver or self.driver
            driver.accepted()
            marked: bool | None = None
            if (
                driver.lookup is not None
                and self._announcements
                and not driver.discovery.serves_option
            ):
                try:  # contextlib.suppress would cost as much as the look
                    marked = read_mark(conn)
                except OSError:
                    marked = None
            found: Way | Reason = PEER_NO_SMC
            if marked is not False:
                found = Way.LOCAL if marked else driver.discovery.inspect(conn)
            if found is not PEER_NO_SMC or self._plain_server is None:
                judged = driver.judge(found)
                return begin(
                    self._negotiate_and_accept(
                        judged, protocol_factory, conn, extra, sslcontext, server, *args
                    )
                )
            is_told_absent = self._plain_server.reason is driver.presence.absent
            if is_told_absent and self.time() >= driver.presence.absent_until:
                self._plain_server = driver.plain("server")
            extra["smc"] = self._plain_server
        return self._accept_settled(
            protocol_factory, conn, extra, sslcontext, server, *args
        )

    async def _accept_settled(
        self,
        protocol_factory: Any,
        conn: socket.socket,
        extra: dict[str, Any],
        sslcontext: Any,
        server: Any,
        *args: Any,
    ) -> None:
        if _is_closed(server):
            # Stock asyncio would find out when it makes the transport, and leave the
            # socket to the garbage collector.
            conn.close()
            return
        await super()._accept_connection2(  # type: ignore[misc]
            protocol_factory, conn, extra, sslcontext, server, *args
        )

    async def _negotiate_and_accept(
        self,
        found: Way | Reason,
        protocol_factory: Any,
        conn: socket.socket,
        extra: dict[str, Any],
        sslcontext: Any,
        server: Any,
        *args: Any,
    ) -> None:
        try:
            await begun()
            outcome = await self._settle_accepted(conn, found)
        except (SmcError, OSError) as error:
            log_lost(error, extra.get("peername"))
            return
        except BaseException:
            conn.close()
            raise
        if _is_closed(server) and outcome.negotiation is not None:
            outcome.negotiation.drop()  # the peer is told before TCP ends
        else:
            self._outcomes[conn] = outcome
        try:
            await self._accept_settled(
                protocol_factory, conn, extra, sslcontext, server, *args
            )
        finally:
            if conn in self._outcomes:
                self._drop_outcome(conn)

    def _settle_accepted(
        self, conn: socket.socket, found: Way | Reason
    ) -> Coroutine[Any, Any, Outcome]:
        if isinstance(found, Reason):
            return self._stay_tcp(conn, found)
        conn.setblocking(False)  # noqa: FBT003
        return negotiate_server(self.driver, conn, found)

    async def _stay_tcp(self, conn: socket.socket, why: Reason) -> Outcome:
        try:
            return self.driver.on_tcp("server", why)
        except Declined:
            conn.close()
            raise

    # Where transports are made

    def _make_socket_transport(
        self,
        sock: socket.socket,
        protocol: Any,
        waiter: Any = None,
        *,
        extra: dict[str, Any] | None = None,
        server: Any = None,
    ) -> Any:
        if extra is None or "smc" not in extra:
            entry = self._found.get(sock.fileno())
            if entry and entry.plain is not None and entry.sock() is sock:
                extra = {"smc": entry.plain}
                return super()._make_socket_transport(  # type: ignore[misc]
                    sock, protocol, waiter, extra=extra, server=server
                )
            outcome = self._outcomes.pop(sock, None)
            if outcome is not None and outcome.negotiation is not None:
                return SmcTransport(
                    self.driver,
                    sock,
                    protocol,
                    outcome,
                    waiter=waiter,
                    extra=extra,
                    server=server,
                )
            extra = _with_info(extra, outcome)
        return super()._make_socket_transport(  # type: ignore[misc]
            sock, protocol, waiter, extra=extra, server=server
        )

    def _make_ssl_transport(
        self,
        rawsock: socket.socket,
        protocol: Any,
        sslcontext: Any,
        waiter: Any = None,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        extra: dict[str, Any] | None = None,
        server: Any = None,
        **timeouts: Any,
    ) -> Any:
        outcome = self._outcomes.pop(rawsock, None)
        if outcome is None:
            entry = self._found.get(rawsock.fileno())
            if entry and entry.plain is not None and entry.sock() is rawsock:
                outcome = Outcome(entry.plain)
        if outcome is not None and outcome.negotiation is not None:
            return make_tls_transport(
                self.driver,
                rawsock,
                protocol,
                sslcontext,
                outcome,
                waiter=waiter,
                server_side=server_side,
                server_hostname=server_hostname,
                extra=extra,
                server=server,
                **timeouts,
            )
        extra = _with_info(extra, outcome)
        return super()._make_ssl_transport(  # type: ignore[misc]
            rawsock,
            protocol,
            sslcontext,
            waiter,
            server_side=server_side,
            server_hostname=server_hostname,
            extra=extra,
            server=server,
            **timeouts,
        )

    def _drop_outcome(self, sock: socket.socket) -> None:
        """No transport took it: the protocol's factory raised."""
        outcome = self._outcomes.pop(sock)
        if outcome.negotiation is not None:
            outcome.negotiation.drop()
            sock.close()

    async def start_tls(
        self, transport: Any, protocol: Any, sslcontext: ssl.SSLContext, **options: Any
    ) -> asyncio.Transport:
        """Upgrade a connection to TLS; its protocol is told of every end."""
        return await start_tls(self, transport, protocol, sslcontext, **options)

    async def sendfile(
        self,
        transport: asyncio.WriteTransport,
        file: Any,
        offset: int = 0,
        count: int | None = None,
        *,
        fallback: bool = True,
    ) -> int:
        """Send a file over a transport; over SMC-R without asyncio's thread."""
        if isinstance(transport, SmcTransport) and not transport.is_closing():
            cpython.check_sendfile(self, transport, file, offset, count)
            if not fallback:
                message = "sendfile syscall is not supported over SMC-R"
                raise asyncio.SendfileNotAvailableError(message)
            if can_send(file):
                return await send_file(transport, file, offset, count)
        return await super().sendfile(transport, file, offset, count, fallback=fallback)


def _with_info(
    extra: dict[str, Any] | None, outcome: Outcome | None
) -> dict[str, Any] | None:
    if outcome is None:
        return extra
    extra = {} if extra is None else extra
    extra["smc"] = outcome.info
    return extra


def _is_numeric(host: str) -> bool:
    for family in INET:
        try:
            socket.inet_pton(family, host.partition("%")[0])
        except (OSError, ValueError):
            continue
        return True
    return False


def _is_closed(server: Any) -> bool:
    return server is not None and not server.sockets


def log_lost(error: Exception, peer: Any) -> None:
    """Say why an accepted connection never reached the application."""
    level = (
        logging.WARNING
        if isinstance(error, HandshakeTimeout | Declined)
        else logging.DEBUG
    )
    log.log(level, "connection from %s was closed: %s", peer, error)


def _is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def new_event_loop(config: Config | None = None) -> Loop:
    """Make a loop; a factory for asyncio.Runner, uvicorn's ``--loop`` and others.

    Args:
        config: How to take part; from the environment by default.

    Raises:
        ValueError: A value of the configuration is not allowed.
    """
    return Loop(config)


def run(
    main: Coroutine[Any, Any, Any],
    *,
    config: Config | None = None,
    debug: bool | None = None,
) -> Any:
    """Run a coroutine on a new pysmc loop, as asyncio.run does on a stock one.

    Args:
        main: The program's coroutine.
        config: How to take part; from the environment by default.
        debug: asyncio's debug mode.

    Returns:
        What the coroutine returns.

    Raises:
        TypeError, ValueError: main is no coroutine (as asyncio of this version says).
        RuntimeError: A loop runs already in this thread.
    """
    if _is_running():
        message = "pysmc.run() cannot be called from a running event loop"
        raise RuntimeError(message)
    with asyncio.Runner(
        debug=debug, loop_factory=lambda: new_event_loop(config)
    ) as runner:
        return runner.run(main)
