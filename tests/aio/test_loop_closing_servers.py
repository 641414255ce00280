"""A server that is closed in the turn of the loop in which it accepts."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

HOST = "127.0.0.1"


@pytest.mark.parametrize("mode", ["tcp", "smcr"])
@pytest.mark.parametrize("is_debugged", [True, False])
def test_the_newcomer_is_closed_at_once(kit, mode, is_debugged) -> None:
    """Stock asyncio reports an AssertionError, and the socket stays open meanwhile."""
    served: list[Any] = []

    def serve() -> Any:
        served.append(kit.Recorder())
        return served[-1]

    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        loop.set_debug(is_debugged)
        server = await loop.create_server(serve, HOST, 0)
        address = server.sockets[0].getsockname()
        accepted = loop.driver.accepted

        def count_and_close() -> None:
            accepted()
            loop.call_soon(server.close)  # before the newcomer's task has begun

        loop.driver.accepted = count_and_close
        if mode == "smcr":
            _, client = await loop.create_connection(kit.Recorder, *address)
            await client.until_call("lost")
            assert client.info_when_made.mode == "smcr"
        else:
            with socket.create_connection(address) as sock:
                sock.setblocking(False)
                assert await loop.sock_recv(sock, 1) == b""
        await server.wait_closed()
        assert served == []

    kit.run(scenario)
