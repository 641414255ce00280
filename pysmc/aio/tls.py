"""TLS over SMC-R: asyncio's own SSLProtocol above our transport, on every loop.

Decides who puts TLS on a transport: the loop where it can, else asyncio's SSLProtocol,
which needs nothing of a loop but call_soon, call_later and create_future. TLS sees a
transport like any other; a record that was changed beneath it fails the connection and
never reaches the application.

Source: asyncio/sslproto.py and base_events.py of CPython 3.11 to 3.13.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from pysmc.aio import cpython
from pysmc.aio.transport import SmcTransport
from pysmc.errors import ConnectionAborted

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable

    from pysmc.aio.driver import Driver
    from pysmc.aio.negotiation import Outcome

__all__ = [
    "check_client_tls",
    "check_server_tls",
    "make_tls_transport",
    "make_transport",
    "start_tls",
]


def check_client_tls(
    host: str | None,
    *,
    ssl: Any = None,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
) -> dict[str, Any]:
    """Check a client's arguments before anything is connected, as asyncio does.

    Args:
        host: What the client connects to; the server's name if no other is given.
        ssl: A context, True for the default one; falsy for no TLS.
        server_hostname: The name that the server's certificate must have; empty to
            compare none.
        ssl_handshake_timeout: Seconds; 60 by default.
        ssl_shutdown_timeout: Seconds; 30 by default.

    Returns:
        Arguments for `make_transport`, and for the loop's own create_connection.

    Raises:
        ValueError: Arguments that do not go together.
    """
    options = _of_tls_only(
        ssl,
        server_hostname=server_hostname,
        ssl_handshake_timeout=ssl_handshake_timeout,
        ssl_shutdown_timeout=ssl_shutdown_timeout,
    )
    if ssl and server_hostname is None:
        if not host:
            message = "You must set server_hostname when using ssl without a host"
            raise ValueError(message)
        options["server_hostname"] = host
    return options


def check_server_tls(
    *,
    ssl: Any = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
) -> dict[str, Any]:
    """Check a server's arguments before it listens, as asyncio does.

    Args:
        ssl: A context; None for no TLS.
        ssl_handshake_timeout: Seconds; 60 by default.
        ssl_shutdown_timeout: Seconds; 30 by default.

    Returns:
        Arguments for `make_transport`, and for the loop's connect_accepted_socket.

    Raises:
        TypeError: `ssl` is a bool: a server has no default certificate.
        ValueError: Arguments that do not go together.
    """
    if isinstance(ssl, bool):
        message = "ssl argument must be an SSLContext or None"
        raise TypeError(message)
    return _of_tls_only(
        ssl,
        ssl_handshake_timeout=ssl_handshake_timeout,
        ssl_shutdown_timeout=ssl_shutdown_timeout,
    )


def _of_tls_only(ssl: Any, **options: Any) -> dict[str, Any]:
    """Leave out what was not given, so that a loop which does not know it may serve."""
    given = {name: value for name, value in options.items() if value is not None}
    if not ssl:
        for name in given:
            message = f"{name} is only meaningful with ssl"
            raise ValueError(message)
        return {}
    return {"ssl": ssl, **given}


async def make_transport(
    driver: Driver,
    sock: socket.socket,
    protocol: asyncio.BaseProtocol,
    outcome: Outcome,
    *,
    ssl: Any = None,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> asyncio.Transport:
    """Make the transport of a connection on SMC-R, and wait for connection_made.

    Args:
        driver: Of the running loop.
        sock: The TCP socket of the connection; it belongs to the transport from now on.
        protocol: Of the application.
        outcome: What the negotiation of this socket ended with: a connection.
        ssl: A context, True for the client's default; falsy for no TLS.
        extra: See `SmcTransport`.
        **options: Of `make_tls_transport`, for TLS.

    Raises:
        ValueError: An argument is not allowed; the connection is ended.
        ssl.SSLError: The handshake failed; likewise.
        ConnectionAbortedError: The handshake took too long; likewise.
        ConnectionResetError: The peer ended the connection instead; likewise.
    """
    waiter = driver.loop.create_future()
    transport: asyncio.Transport
    if ssl:
        context = None if isinstance(ssl, bool) else ssl
        transport = make_tls_transport(
            driver,
            sock,
            protocol,
            context,
            outcome,
            waiter=waiter,
            extra=extra,
            **options,
        )
    else:
        transport = SmcTransport(
            driver, sock, protocol, outcome, waiter=waiter, extra=extra
        )
    try:
        await waiter
    except BaseException:
        transport.close()
        raise
    return transport


async def start_tls(
    loop: asyncio.AbstractEventLoop,
    transport: asyncio.WriteTransport,
    protocol: asyncio.BaseProtocol,
    sslcontext: ssl.SSLContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    take_early: Callable[[], bytes] | None = None,
) -> asyncio.Transport:
    """Upgrade a connection to TLS, as ``loop.start_tls`` does, on any loop.

    uvloop's own start_tls refuses every transport that it did not make; those of
    asyncio's kind get asyncio's TLS there. In one thing it is better than asyncio's: a
    connection that is lost in the middle of the handshake ends for its protocol too.

    Args:
        loop: The running loop.
        transport: Ours, or one of the loop's own; not used any more afterwards.
        protocol: Of the application; connection_made is not called again.
        sslcontext: With the certificates.
        server_side: Whether this end is TLS's server.
        server_hostname: The name that the server's certificate must have.
        ssl_handshake_timeout: Seconds; 60 by default.
        ssl_shutdown_timeout: Seconds; 30 by default.
        take_early: Gives what has arrived and was not read. It belongs to TLS: a client
            may send its first TLS bytes right behind the request for it, and whatever
            else is there must not look as if it had come through TLS.

    Returns:
        The transport that the protocol has to use from now on.

    Raises:
        TypeError: sslcontext is no context, or no loop can do it on this transport.
        ssl.SSLError: The handshake failed; the connection is closed.
        ConnectionAbortedError: The handshake took too long; likewise.
        ConnectionResetError: The peer ended the connection instead; likewise.
        ConnectionAborted: It was closed here before, or in the meantime.
    """
    is_closing = getattr(transport, "is_closing", None)
    if is_closing is not None and is_closing():
        # asyncio would wait for a handshake that nobody answers.
        message = "the connection was closed before TLS could begin"
        raise ConnectionAborted(message)
    if isinstance(loop, asyncio.BaseEventLoop) or cpython.is_of_asyncio(transport):
        begin = cpython.start_tls_of_asyncio(loop)
    else:
        begin = loop.start_tls
    # Runs before TLS begins, which the loop schedules as well.
    prepare = loop.call_soon(_prepare, transport, take_early)
    try:
        upgraded: asyncio.Transport | None = await begin(
            transport,
            protocol,
            sslcontext,
            server_side=server_side,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )
    finally:
        prepare.cancel()
    if upgraded is None:
        message = "the connection was closed here in the middle of the TLS handshake"
        raise ConnectionAborted(message)
    return upgraded


def _prepare(
    transport: asyncio.WriteTransport, take_early: Callable[[], bytes] | None
) -> None:
    # Every loop puts its TLS protocol in place before it waits for the first time.
    tls: Any = transport.get_protocol()
    cpython.tell_of_every_end(tls)
    if take_early is None:
        return
    early = memoryview(take_early())
    while early:
        room = tls.get_buffer(len(early))
        count = min(len(room), len(early))
        room[:count] = early[:count]
        tls.buffer_updated(count)
        early = early[count:]


def make_tls_transport(
    driver: Driver,
    sock: socket.socket,
    protocol: asyncio.BaseProtocol,
    sslcontext: ssl.SSLContext | None,
    outcome: Outcome,
    *,
    waiter: asyncio.Future[Any] | None = None,
    server_side: bool = False,
    server_hostname: str | None = None,
    extra: dict[str, Any] | None = None,
    server: Any = None,
    **timeouts: float | None,
) -> asyncio.Transport:
    """Begin TLS on a connection that has just moved to SMC-R.

    Args:
        driver: Of the loop.
        sock: The TCP socket of the connection; it belongs to the transport from now on.
        protocol: Of the application; gets connection_made after the handshake.
        sslcontext: With the certificates; None for the client's default.
        outcome: What the negotiation of this socket ended with: a connection.
        waiter: Future that is set after connection_made, or to what went wrong.
        server_side: Whether this end is TLS's server.
        server_hostname: The name that the server's certificate must have.
        extra: See `SmcTransport`.
        server: The `asyncio.Server` that accepted it.
        **timeouts: ssl_handshake_timeout and ssl_shutdown_timeout in seconds.

    Returns:
        The application's transport.

    Raises:
        ValueError: An argument is not allowed; the connection is ended.
        ssl.SSLError: Likewise.
    """
    assert outcome.negotiation is not None, "this connection is plain TCP"
    try:
        tls, transport = cpython.tls_protocol(
            driver.loop,
            protocol,
            sslcontext,
            waiter,
            server_side=server_side,
            server_hostname=server_hostname,
            **timeouts,
        )
    except BaseException:
        outcome.negotiation.drop()
        sock.close()
        raise
    SmcTransport(driver, sock, tls, outcome, extra=extra, server=server)
    return transport
