"""`open_connection` on any running loop.

On our own loop it connects as asyncio does. On a foreign one it connects by public
calls of the loop, negotiates, and then makes our transport or lets the loop make its
own on the same socket. Decides which addresses are tried and in which order; the rest
is `pysmc.aio.negotiation`.

Source: the asyncio documentation, "Streams"; kernel counterpart: af_smc.c.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from typing import TYPE_CHECKING, Any

from pysmc.aio.driver import NOT_MARKED, is_tcp
from pysmc.aio.foreign import foreign_driver, uses_own_loop
from pysmc.aio.negotiation import negotiate_client
from pysmc.aio.streams import (
    STREAM_LIMIT,
    StreamReader,
    StreamWriter,
    client_protocol,
)
from pysmc.aio.tls import check_client_tls, make_transport
from pysmc.reasons import Reason

if TYPE_CHECKING:
    from pysmc.aio.driver import Driver
    from pysmc.config import Config
    from pysmc.discovery import Mark, OptionMark

__all__ = ["open_connection"]

TLS_OPTIONS = (
    "ssl",
    "server_hostname",
    "ssl_handshake_timeout",
    "ssl_shutdown_timeout",
)


async def open_connection(
    host: str | None = None,
    port: int | str | None = None,
    *,
    limit: int = STREAM_LIMIT,
    config: Config | None = None,
    **kwargs: Any,
) -> tuple[StreamReader, StreamWriter]:
    """Open a stream, over SMC-R where the peer can, on any running loop.

    Args:
        host: Name or numeric address.
        port: Port number or service name.
        limit: See `StreamReader`.
        config: How to take part; from the environment by default. On a pysmc loop it
            is the loop's.
        **kwargs: On a pysmc loop everything that asyncio.open_connection takes; on a
            foreign one family, proto, flags, local_addr, sock, ssl, server_hostname,
            ssl_handshake_timeout and ssl_shutdown_timeout.

    Returns:
        Reader and writer; ``writer.get_extra_info("smc")`` is a `ConnectionInfo`.

    Raises:
        Declined: SMC-R is required and not possible.
        HandshakeTimeout: The peer speaks SMC, but did not answer in time.
        OSError: The connection could not be made, or TLS not begun (ssl.SSLError).
        ValueError: Arguments that do not go together.
    """
    loop: Any = asyncio.get_running_loop()
    transport: Any
    if uses_own_loop(config):
        reader, protocol = client_protocol(loop, limit)
        transport, _ = await loop.create_connection(
            lambda: protocol, host, port, **kwargs
        )
        info = transport.get_extra_info("smc")
        return reader, StreamWriter(transport, protocol, reader, loop, info)
    given = {name: kwargs.pop(name) for name in TLS_OPTIONS if name in kwargs}
    tls = check_client_tls(host, **given)
    driver = await foreign_driver(config)
    reader, protocol = client_protocol(loop, limit)  # raises before anything is open
    sock, found = await _connect(driver, host, port, **kwargs)
    outcome = await negotiate_client(driver, sock, found)
    if outcome.negotiation is None:
        transport = await _stay_tcp(loop, sock, protocol, tls)
    else:
        transport = await make_transport(driver, sock, protocol, outcome, **tls)
    return reader, StreamWriter(transport, protocol, reader, loop, outcome.info)


async def _stay_tcp(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    protocol: asyncio.BaseProtocol,
    tls: dict[str, Any],
) -> Any:
    """Let the loop make its own transport.

    When a connection ends while TLS begins, uvloop (0.23) closes the descriptor and
    leaves its number in the socket, which would close whatever gets that number next.
    """
    inode = os.fstat(sock.fileno()).st_ino
    try:
        transport, _ = await loop.create_connection(lambda: protocol, sock=sock, **tls)
    except BaseException:
        if sock.fileno() >= 0 and _inode_of(sock) != inode:
            sock.detach()
        raise
    return transport


def _inode_of(sock: socket.socket) -> int | None:
    try:
        return os.fstat(sock.fileno()).st_ino
    except OSError:
        return None


async def _connect(
    driver: Driver,
    host: str | None,
    port: int | str | None,
    *,
    sock: socket.socket | None = None,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
    local_addr: tuple[str, int] | None = None,
) -> tuple[socket.socket, Mark | OptionMark | Reason]:
    if sock is not None:
        if host is not None or port is not None:
            message = "host/port and sock can not be specified at the same time"
            raise ValueError(message)
        sock.setblocking(False)  # noqa: FBT003
        return sock, NOT_MARKED
    if host is None and port is None:
        message = "host and port was not specified and no sock specified"
        raise ValueError(message)
    loop = driver.loop
    resolve = functools.partial(
        loop.getaddrinfo,
        family=family,
        type=socket.SOCK_STREAM,
        proto=proto,
        flags=flags,
    )
    there = await resolve(host, port)
    here = None if local_addr is None else await resolve(*local_addr)
    errors: list[OSError] = []
    for info in there:
        try:
            return await _connect_to(driver, info, here)
        except OSError as error:
            errors.append(error)
    if not errors:
        message = "getaddrinfo() returned empty list"
        raise OSError(message)
    if len({str(error) for error in errors}) == 1:
        raise errors[0]
    message = f"Multiple exceptions: {', '.join(str(error) for error in errors)}"
    raise OSError(message)


async def _connect_to(
    driver: Driver, info: Any, here: list[Any] | None
) -> tuple[socket.socket, Mark | OptionMark | Reason]:
    family, kind, proto, _, address = info
    sock = socket.socket(family, kind, proto)
    found: Mark | OptionMark | Reason | None = None
    try:
        sock.setblocking(False)  # noqa: FBT003
        if here is not None:
            _bind(sock, here)
        found = driver.prepare(sock, address) if is_tcp(sock) else NOT_MARKED
        await driver.loop.sock_connect(sock, address)
    except BaseException:
        if found is not None and not isinstance(found, Reason):
            driver.discovery.settle_tcp(found)
        sock.close()
        raise
    if not isinstance(found, Reason):
        driver.discovery.connected(found)
    return sock, found


def _bind(sock: socket.socket, addresses: list[Any]) -> None:
    for family, _, _, _, address in addresses:
        if family == sock.family:
            sock.bind(address)
            return
    message = f"no matching local address with {sock.family!r} found"
    raise OSError(message)
