"""TCP ends after what was posted has arrived, and at last in any case."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from pysmc.aio.tcp_linger import Lingering
from pysmc.testing.loops import SimLoop


@dataclass(eq=False)
class FakeGroup:
    connections: dict[int, Any] = field(default_factory=dict)


@dataclass(eq=False)
class FakeConnection:
    group: FakeGroup
    alert_token: int
    oldest_post: tuple[int, int] | None = (1, 1)

    def __post_init__(self) -> None:
        self.group.connections[self.alert_token] = self


@pytest.fixture
def group() -> FakeGroup:
    return FakeGroup()


def linger(wait: float, *connections: Any) -> tuple[Lingering, list[socket.socket]]:
    lingering = Lingering(asyncio.get_running_loop(), wait)
    socks = [socket.socket() for _ in connections]
    for connection, sock in zip(connections, socks, strict=True):
        lingering.close_after(connection, sock)
    return lingering, socks


def are_open(socks: list[socket.socket]) -> list[bool]:
    return [sock.fileno() >= 0 for sock in socks]


async def test_what_has_completed_ends_at_once(group: FakeGroup) -> None:
    lingering, socks = linger(60.0, FakeConnection(group, 1, None))
    assert are_open(socks) == [False]
    assert not lingering


async def test_it_waits_for_the_last_completion_or_the_peers_close(
    group: FakeGroup,
) -> None:
    completes, is_closed, waits = (FakeConnection(group, n) for n in range(3))
    lingering, socks = linger(60.0, completes, is_closed, waits)
    lingering.sweep()
    lingering.completed(completes)
    lingering.completed(FakeConnection(group, 9, None))
    assert are_open(socks) == [True] * 3
    completes.oldest_post = None
    lingering.completed(completes)
    lingering.completed(completes)
    assert are_open(socks) == [False, True, True]
    del group.connections[1]
    lingering.sweep()
    assert are_open(socks) == [False, False, True]
    group.connections[2] = completes  # another connection has the token by now
    lingering.sweep()
    assert are_open(socks) == [False] * 3
    assert not lingering


async def test_it_does_not_wait_for_ever(group: FakeGroup) -> None:
    lingering, socks = linger(0.0, FakeConnection(group, 1))
    assert are_open(socks) == [True]
    async with asyncio.timeout(10):
        while lingering:
            await asyncio.sleep(0)
    assert are_open(socks) == [False]


async def test_at_the_end_all_are_closed(group: FakeGroup) -> None:
    lingering, socks = linger(60.0, FakeConnection(group, 1), FakeConnection(group, 2))
    assert len(lingering) == 2
    assert lingering.descriptors() == {sock.fileno() for sock in socks}
    lingering.close()
    lingering.close()
    assert are_open(socks) == [False] * 2


def test_a_close_that_is_held_up_is_no_loss_to_the_peer() -> None:
    """The peer would take a FIN before the close for a process that died."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        accepted: asyncio.Queue[Any] = asyncio.Queue()

        async def serve(*streams: Any) -> None:
            await accepted.put(streams)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        there = server.sockets[0].getsockname()
        _, client = await asyncio.open_connection(*there)
        reader, writer = await accepted.get()
        assert client.get_extra_info("smc").mode == "smcr"
        pair = client.transport._connection.link.handle
        loop.network.hold(pair)
        client.write(b"all that there is")
        client.close()
        await client.wait_closed()
        assert len(loop.driver.lingering) == 1
        assert reader._transport._tcp._timer is None, "no FIN came"
        loop.network.hold(pair, held=False)
        loop.network.advance(0)
        assert await reader.read() == b"all that there is"
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(10):
            while loop.driver.lingering:
                await asyncio.sleep(0)
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=SimLoop) as runner:
        runner.run(scenario())
