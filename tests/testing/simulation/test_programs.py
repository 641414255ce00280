"""Programs of several kinds in a world: TLS, protocols, generators, more processes."""

from __future__ import annotations

import asyncio
import datetime
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.testing.authority import Authority
from tests.testing.simulation.kit import PLAIN, SMALL, begin, mode_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LENGTH = 60_000


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    now = datetime.datetime.now(datetime.UTC)
    return Authority(tmp_path_factory.mktemp("authority"), now)


@pytest.mark.parametrize(("client", "mode"), [(SMALL, "smcr"), (PLAIN, "tcp")])
@pytest.mark.parametrize("upgrades", [False, True])
def test_tls(authority, client, mode, upgrades) -> None:
    """From the beginning, and in the middle of a stream."""
    for seed in range(3):
        kit = begin(seed, client=client)
        listener: Any = kit.server.listen(443)
        trusted = authority.client_context()
        own = authority.server_context()

        async def serve(reader, writer, own=own) -> None:
            if upgrades:
                writer.write(b"go")
                await writer.start_tls(own)
            writer.write(await reader.readexactly(LENGTH))
            await writer.drain()
            writer.close()

        async def start(
            listener=listener, serve=serve, own=own, kit=kit
        ) -> asyncio.Server:
            context = None if upgrades else own
            return await asyncio.start_server(serve, sock=listener, ssl=context)

        async def talk(listener=listener, trusted=trusted, kit=kit) -> tuple[str, bool]:
            options: dict[str, Any] = {"ssl": trusted, "server_hostname": "localhost"}
            reader, writer = await kit.client.open_connection(
                listener, **({} if upgrades else options)
            )
            if upgrades:
                assert await reader.readexactly(2) == b"go"
                await writer.start_tls(trusted, server_hostname="localhost")
            data = kit.world.rng.randbytes(LENGTH)
            writer.write(data)
            echoed = await reader.readexactly(LENGTH)
            mode = mode_of(writer)
            writer.close()
            return mode, echoed == data

        server = kit.play(kit.server, start())
        assert kit.run(talk()) == (mode, True)
        server.close()
        assert kit.close() == []
        assert kit.world.errors == []


@pytest.mark.parametrize(("client", "mode"), [(SMALL, "smcr"), (PLAIN, "tcp")])
def test_protocols(client, mode) -> None:
    content = bytes(range(256)) * 200
    for seed in range(3):
        kit = begin(seed, client=client)

        class Collector(asyncio.Protocol):
            def __init__(self, done: asyncio.Future[bytes]) -> None:
                self.done, self.data = done, b""

            def data_received(self, data: bytes) -> None:
                self.data += data

            def eof_received(self) -> bool:
                return False

            def connection_lost(self, exc: Exception | None) -> None:
                self.done.set_result(self.data)

        async def talk(kit=kit, collector=Collector) -> tuple[str, bytes]:
            loop: Any = asyncio.get_running_loop()
            sock = await kit.client.dial(kit.listener)
            done = loop.create_future()
            transport, _ = await loop.create_connection(
                lambda: collector(done), sock=sock
            )
            transport.writelines([content[:1], content[1:]])
            transport.write_eof()
            return transport.get_extra_info("smc").mode, await done

        assert kit.run(talk()) == (mode, content)
        assert kit.close() == []
        assert kit.world.errors == []


def test_an_async_generator_that_is_dropped_ends_in_its_loop() -> None:
    kit = begin(1)
    ended: list[Any] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(10):
                yield number
        finally:
            ended.append(asyncio.get_running_loop())

    async def take_one() -> int:
        async for number in numbers():
            return number
        return -1

    assert kit.run(take_one()) == 0
    kit.world.run(until=kit.world.now + 1)
    assert ended == [kit.client.loop]
    assert kit.close() == []


def test_three_processes_share_groups_of_their_own() -> None:
    kit = begin(1)
    other = kit.world.process("other", SMALL)

    async def talk(process) -> tuple[str, int]:
        reader, writer = await process.open_connection(kit.listener)
        writer.write(b"x")
        writer.write_eof()
        await reader.read()
        writer.close()
        info = writer.get_extra_info("smc")
        return info.mode, info.link_group

    tasks = [p.start(talk(p)) for p in (kit.client, other, kit.client)]
    kit.world.run(until=lambda: all(task.done() for task in tasks))
    assert [task.result()[0] for task in tasks] == ["smcr"] * 3
    assert len(kit.server.driver.endpoint.groups) == 2
    assert kit.close() == []
