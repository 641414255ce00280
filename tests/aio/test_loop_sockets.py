"""Sockets that a program makes itself and then hands over to the loop."""

from __future__ import annotations

import asyncio
import socket

import pytest

from pysmc.aio.loop import Loop
from pysmc.reasons import reason


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_blocking_socket_blocks_no_negotiation(kit, timeout) -> None:
    """asyncio makes it non-blocking too late: when the verdict is there."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = kit.Recorder()
        async with kit.serving(lambda: server) as port:
            sock = socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, (kit.host, port))
            sock.settimeout(timeout)
            client = kit.Recorder()
            await loop.create_connection(lambda: client, sock=sock)
            assert client.info_when_made.mode == "smcr"
            client.transport.write(b"word")
            await server.until_bytes(4)
            client.transport.close()
            await server.until_call("lost")
            await client.until_call("lost")

    kit.run(scenario)


def test_a_connect_that_never_began_leaves_no_mark(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.serving(kit.Recorder) as port:
            with socket.socket() as sock:
                sock.setblocking(False)
                connecting = loop.create_task(loop.sock_connect(sock, (kit.host, port)))
                connecting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await connecting
                assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0

    kit.run(scenario)


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1%lo")]
)
def test_a_numeric_address_is_not_looked_up(kit, monkeypatch, family, host) -> None:
    """Even if discovery cannot do anything with it: that would cost a thread."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        missing = reason("SETUP_MISSING", "local", "as the test says")
        monkeypatch.setattr(loop.driver, "prepare", lambda sock, address: missing)
        asked = []

        async def getaddrinfo(host, port, **options):
            asked.append(host)
            raise OSError("nobody answers")

        monkeypatch.setattr(Loop, "getaddrinfo", staticmethod(getaddrinfo))
        with socket.socket(family) as sock:
            assert await loop._prepare_by_name(sock, (host, 1), missing) is missing
            assert asked == []
            await loop._prepare_by_name(sock, ("localhost", 1), missing)
            assert asked == ["localhost"]
        monkeypatch.undo()

    kit.run(scenario)


def test_a_listener_with_the_number_of_a_closed_one_is_announced(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        first = socket.create_server((kit.host, 0))
        number = first.fileno()
        gone = await loop.create_server(kit.Recorder, sock=first)
        loop.remove_reader(number)
        first.close()
        second = socket.create_server((kit.host, 0))
        assert second.fileno() == number
        server = await loop.create_server(kit.Recorder, sock=second)
        client = kit.Recorder()
        await loop.create_connection(lambda: client, *second.getsockname())
        assert client.info_when_made.mode == "smcr"
        client.transport.abort()
        await client.until_call("lost")
        server.close()
        await server.wait_closed()
        del gone

    kit.run(scenario)


def test_a_server_that_closes_while_a_client_is_declined(kit, monkeypatch) -> None:
    """The client's end comes at once, and not when the garbage is collected."""
    declined = reason("NO_DEVICE", "peer", "as the test says")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(kit.Recorder, kit.host, 0)

        async def settle(conn, why):
            server.close()
            return loop.driver.on_tcp("server", declined)

        monkeypatch.setattr(Loop, "_settle_accepted", staticmethod(settle))
        monkeypatch.setattr(type(loop.driver), "judge", lambda driver, found: declined)
        monkeypatch.setattr(loop, "_plain_server", None)
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, server.sockets[0].getsockname())
            async with asyncio.timeout(20):
                assert await loop.sock_recv(sock, 1) == b""

    kit.run(scenario)
