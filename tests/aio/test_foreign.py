"""Which driver serves a foreign loop, and when it ends."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

import pysmc
from pysmc.aio import foreign, transport_reading
from pysmc.config import Config
from pysmc.errors import ForkedError

MIB = 1 << 20


def test_one_driver_for_each_configuration(kit) -> None:
    seen: list[Any] = []

    async def scenario() -> None:
        first = await foreign.foreign_driver(None)
        assert await foreign.foreign_driver(Config.from_env()) is first
        other = await foreign.foreign_driver(Config(rmbe_bytes=16384))
        assert other is not first
        assert not first.is_closed
        seen.extend((first, other))

    kit.run(scenario, factory=asyncio.new_event_loop)
    assert len(seen) == 2
    assert all(driver.is_closed for driver in seen)
    assert not foreign._drivers


def test_loops_that_were_closed_without_ceremony_are_forgotten(kit) -> None:
    async def scenario():
        return await foreign.foreign_driver(None)

    before = kit.count_descriptors()
    loop = asyncio.new_event_loop()
    driver = loop.run_until_complete(scenario())
    loop.close()
    assert not driver.is_closed
    with asyncio.Runner() as runner:
        runner.run(scenario())
    assert driver.is_closed
    assert not foreign._drivers
    assert kit.count_descriptors() == before


def test_a_delivery_that_is_due_when_the_driver_ends(kit, monkeypatch) -> None:
    """A loop runs on for some turns after its asynchronous generators were finished."""
    monkeypatch.setattr(transport_reading, "SLICES_PER_TURN", 1)
    accepted: list[Any] = []

    async def scenario() -> None:
        async def serve(_: Any, writer: Any) -> None:
            accepted.append(writer)

        server = await pysmc.start_server(serve, kit.host, 0, limit=MIB)
        address = server.sockets[0].getsockname()
        reader, writer = await pysmc.open_connection(*address, limit=MIB)
        async with asyncio.timeout(20):
            while not accepted:
                await asyncio.sleep(0)
        accepted[0].write(bytes(MIB // 2))
        driver = await foreign.foreign_driver(None)
        driver.pump_all()
        assert 0 < len(reader._buffer) < MIB // 2, "there must be more to deliver"
        await asyncio.get_running_loop().shutdown_asyncgens()
        assert driver.is_closed
        await asyncio.sleep(0)
        server.close()
        for one in (writer, *accepted):
            one.close()
            await one.wait_closed()
        accepted.clear()

    kit.run(scenario, factory=asyncio.new_event_loop)


def test_uses_own_loop(kit) -> None:
    async def scenario() -> bool:
        return foreign.uses_own_loop(None)

    assert kit.run(scenario) is True
    assert kit.run(scenario, factory=asyncio.new_event_loop) is False


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_is_refused(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        await foreign.foreign_driver(None)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                asyncio._set_running_loop(loop)
                await foreign.foreign_driver(None)
            except ForkedError:
                status = 7
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    kit.run(scenario, factory=asyncio.new_event_loop)


def test_the_writer_always_knows(kit) -> None:
    async def serve(reader, writer) -> None:
        writer.close()

    async def scenario() -> None:
        async with await pysmc.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await pysmc.open_connection("127.0.0.1", port)
            assert isinstance(writer, pysmc.StreamWriter)
            assert writer.get_extra_info("smc").mode == "smcr"
            assert writer.get_extra_info("peername") == ("127.0.0.1", port)
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            assert writer.get_extra_info("smc").mode == "smcr"
        await server.wait_closed()

    kit.run(scenario, factory=asyncio.new_event_loop)
