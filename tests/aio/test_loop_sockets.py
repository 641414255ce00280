"""Sockets that a program makes itself and then hands over to the loop."""

from __future__ import annotations

import asyncio
import socket

import pytest


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
