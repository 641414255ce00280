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

if TYPE_CHECKING:
    import socket
    import ssl

    from pysmc.aio.driver import Driver
    from pysmc.aio.negotiation import Outcome

__all__ = ["make_tls_transport", "start_tls"]


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
) -> asyncio.Transport:
    """Upgrade a connection to TLS, as ``loop.start_tls`` does, on any loop.

    uvloop's own start_tls refuses every transport that it did not make; those of
    asyncio's kind get asyncio's TLS there.

    Args:
        loop: The running loop.
        transport: Ours, or one of the loop's own; not used any more afterwards.
        protocol: Of the application; connection_made is not called again.
        sslcontext: With the certificates.
        server_side: Whether this end is TLS's server.
        server_hostname: The name that the server's certificate must have.
        ssl_handshake_timeout: Seconds; 60 by default.
        ssl_shutdown_timeout: Seconds; 30 by default.

    Returns:
        The transport that the protocol has to use from now on.

    Raises:
        TypeError: sslcontext is no context, or no loop can do it on this transport.
        ssl.SSLError: The handshake failed; the connection is closed.
        ConnectionAbortedError: The handshake took too long; likewise.
        ConnectionResetError: The peer ended the connection instead; likewise.
    """
    begin: Any = loop.start_tls
    if not isinstance(loop, asyncio.BaseEventLoop) and cpython.is_of_asyncio(transport):
        begin = cpython.start_tls_of_asyncio(loop)
    upgraded: asyncio.Transport = await begin(
        transport,
        protocol,
        sslcontext,
        server_side=server_side,
        server_hostname=server_hostname,
        ssl_handshake_timeout=ssl_handshake_timeout,
        ssl_shutdown_timeout=ssl_shutdown_timeout,
    )
    return upgraded


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
