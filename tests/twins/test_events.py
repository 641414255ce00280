"""Twins of test_events.UnixEventLoopTestsMixin: connections and servers of the loop."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from typing import Any
from unittest import mock

import pytest

from tests.twins.scenarios import accepted_by_hand


def unused_port(host: str = "127.0.0.1") -> int:
    """Find a port of this moment that a socket can be bound to."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
    return port


async def ask(lane, visitor, address, **options) -> Any:
    """Connect, get the page, and check what the original checks of both objects."""
    transport, protocol = await lane.loop.create_connection(
        visitor, *address, **options
    )
    assert isinstance(transport, asyncio.Transport)
    assert issubclass(type(protocol), asyncio.Protocol)
    assert protocol.transport is transport
    assert transport.get_extra_info("sockname") is not None
    await protocol.done
    assert len(protocol.data) > 0
    return transport


def check_tls_info(transport, peername, peercert) -> None:
    assert transport.get_extra_info("sockname") is not None
    assert transport.get_extra_info("peername") == peername
    name, protocol, bits = transport.get_extra_info("cipher")
    assert (type(name), type(protocol), type(bits)) == (str, str, int)
    tls = transport.get_extra_info("ssl_object")
    assert transport.get_extra_info("cipher") == tls.cipher()
    assert transport.get_extra_info("compression") == tls.compression()
    assert transport.get_extra_info("peercert") == tls.getpeercert() == peercert


# --- create_connection


def test_create_connection(lane, visitor) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            transport = await ask(lane, visitor, address)
            transport.close()

    lane.run(scenario)


def test_create_ssl_connection(lane, visitor) -> None:
    """By a context, by ssl=True with the default replaced, and with the real one."""

    async def answer(peer) -> None:
        try:
            await peer.start_tls(lane.tls.server(), server_side=True)
        except (ssl.SSLError, ConnectionError):
            return  # the last visitor does not trust us
        await peer.recv_until(b"\r\n\r\n")
        await peer.send(b"HTTP/1.0 200 OK\r\n\r\nTest message")

    async def ask_by_tls(address, context) -> None:
        transport, protocol = await lane.loop.create_connection(
            visitor, *address, ssl=context
        )
        assert isinstance(transport, asyncio.Transport)
        assert issubclass(type(protocol), asyncio.Protocol)
        assert "ssl" in type(transport).__name__.lower()
        check_tls_info(transport, address, {})
        await protocol.done
        assert len(protocol.data) > 0
        transport.close()

    async def scenario() -> None:
        async with lane.serve(answer) as address:
            await ask_by_tls(address, lane.tls.client())
            with mock.patch(
                "ssl.create_default_context", side_effect=lambda *_, **__: trusting
            ) as made:
                await ask_by_tls(address, True)
            assert made.call_count == 1
            with pytest.raises(ssl.SSLError) as caught:
                await ask_by_tls(address, True)
            assert caught.value.reason == "CERTIFICATE_VERIFY_FAILED"

    trusting = lane.tls.client()
    lane.run(scenario, connections=3)


def test_create_connection_local_addr(lane, visitor) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            port = unused_port()
            transport, protocol = await lane.loop.create_connection(
                visitor, *address, local_addr=(address[0], port)
            )
            assert protocol.transport.get_extra_info("sockname")[1] == port
            transport.close()
            await protocol.done

    lane.run(scenario)


def test_create_connection_local_addr_in_use(lane, visitor) -> None:
    """The server's own address; afterwards another connection moves as ever."""

    async def scenario() -> None:
        async with lane.http_server() as address:
            with pytest.raises(OSError, match="assign|in use|while attempting") as info:
                await lane.loop.create_connection(visitor, *address, local_addr=address)
            assert info.value.errno == errno.EADDRINUSE
            assert str(address) in str(info.value.strerror)
            transport = await ask(lane, visitor, address)
            transport.close()

    lane.run(scenario)


# --- connect_accepted_socket


def test_connect_accepted_socket(lane, visitor) -> None:
    accepted_by_hand(lane, visitor, None, None)


def test_ssl_connect_accepted_socket(lane, visitor) -> None:
    accepted_by_hand(lane, visitor, lane.tls.server(), lane.tls.client())


# --- create_server


def quiet(visitor) -> Any:
    return visitor(greeting=b"")


def test_create_server(lane, visitor) -> None:
    async def client(peer) -> None:
        await peer.send(b"xxx")
        assert await peer.recv(1) == b""

    async def scenario() -> None:
        protocol = quiet(visitor)
        server = await lane.loop.create_server(lambda: protocol, "0.0.0.0", 0)
        assert len(server.sockets) == 1
        host, port = server.sockets[0].getsockname()
        assert host == "0.0.0.0"
        visit = lane.visit(client, ("127.0.0.1", port))
        await protocol.made
        assert protocol.calls[0] == "made"
        await lane.until(lambda: protocol.data)
        assert len(protocol.data) == 3
        assert protocol.transport.get_extra_info("sockname") is not None
        assert protocol.transport.get_extra_info("peername")[0] == "127.0.0.1"
        protocol.transport.close()
        await protocol.done
        assert protocol.calls[-1] == "lost"
        await visit
        server.close()
        await server.wait_closed()

    lane.run(scenario)


def test_create_server_sock(lane, visitor) -> None:
    """A listening socket of the program's own."""

    async def client(peer) -> None:
        await peer.send(b"xxx")

    async def scenario() -> None:
        protocol = quiet(visitor)
        own = socket.create_server(("0.0.0.0", 0))
        server = await lane.loop.create_server(lambda: protocol, sock=own)
        assert server.sockets[0].fileno() == own.fileno()
        host, port = server.sockets[0].getsockname()
        assert host == "0.0.0.0"
        await lane.visit(client, ("127.0.0.1", port))
        await protocol.done
        assert protocol.data == b"xxx"
        server.close()
        await server.wait_closed()

    lane.run(scenario)


def test_create_server_dual_stack(lane, visitor) -> None:
    async def client(peer) -> None:
        await peer.send(b"xxx")
        assert await peer.recv(1) == b""

    async def scenario() -> None:
        made: list[Any] = []

        def make() -> Any:
            made.append(quiet(visitor))
            return made[-1]

        server = await serve_everywhere(lane.loop, make)
        port = server.sockets[0].getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            visit = lane.visit(client, (host, port))
            await lane.until(lambda: made and made[0].data)
            made.pop().transport.close()
            await visit
        server.close()
        await server.wait_closed()

    lane.run(scenario, connections=2)


async def serve_everywhere(loop, make) -> Any:
    """Listen at one port of both families; somebody may take it in between."""
    for left in range(5, 0, -1):
        try:
            return await loop.create_server(make, host=None, port=unused_port())
        except OSError as error:
            if error.errno != errno.EADDRINUSE or left == 1:
                raise
    raise AssertionError


def test_server_close(lane, visitor) -> None:
    """A connection that the server has got goes on; later ones are refused."""

    async def client(peer) -> None:
        await peer.send(b"xxx")

    async def scenario() -> None:
        protocol = quiet(visitor)
        server = await lane.loop.create_server(lambda: protocol, "0.0.0.0", 0)
        port = server.sockets[0].getsockname()[1]
        await lane.visit(client, ("127.0.0.1", port))
        await protocol.made
        server.close()
        with pytest.raises(ConnectionRefusedError):
            await lane.visit(client, ("127.0.0.1", port))
        await protocol.done
        assert protocol.data == b"xxx"

    lane.run(scenario)
