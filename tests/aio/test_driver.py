"""The driver: what it opens and when, what it allows, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import os

import pytest

from pysmc.aio import driver as driver_module
from pysmc.aio.driver import Driver, is_tcp
from pysmc.config import Config
from pysmc.errors import Declined
from pysmc.reasons import reason


def test_nothing_is_opened_before_it_is_needed(kit) -> None:
    async def scenario() -> None:
        driver = Driver(asyncio.get_running_loop(), Config())
        assert driver.devices == []
        assert "Driver" in repr(driver)
        with pytest.raises(AssertionError):
            _ = driver.endpoint
        assert driver.open() is None
        assert driver.open() is None
        assert [device.fabric for device in driver.devices] == ["shm"]
        driver.close()
        driver.close()
        assert "closed" in repr(driver)

    kit.run(scenario)


def test_outcomes_on_tcp_are_shared(kit) -> None:
    async def scenario() -> None:
        driver = Driver(asyncio.get_running_loop(), Config())
        why = reason("PEER_NO_SMC", "peer")
        assert driver.on_tcp("client", why) is driver.on_tcp("client", why)
        assert driver.on_tcp("server", why).info.role == "server"
        for number in range(200):
            driver.on_tcp("client", reason("LIMIT", "local", str(number)))
        assert len(driver._tcp_outcomes) <= 64
        driver.close()
        required = Driver(asyncio.get_running_loop(), Config(fallback="require"))
        with pytest.raises(Declined):
            required.on_tcp("client", why)
        required.close()

    kit.run(scenario)


def test_limits_of_negotiations(kit) -> None:
    async def scenario() -> None:
        driver = Driver(asyncio.get_running_loop(), Config(max_handshakes=1))
        assert driver.has_room()
        with driver.negotiating():
            assert not driver.has_room()
            assert "max_handshakes is 1" in driver.limit_reason().text
        assert driver.has_room()
        driver.close()

    kit.run(scenario)


# --- the end


def test_closing_a_driver_ends_its_connections(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        other = Driver(loop, Config())
        assert other.open() is None
        assert other.time() > 0
        other.close()
        assert other.is_closed
        other.pump_armed(None)  # a callback that was scheduled before

    kit.run(scenario)


def test_what_is_tcp() -> None:
    import socket

    kinds = [
        (socket.AF_INET, socket.SOCK_STREAM, True),
        (socket.AF_INET6, socket.SOCK_STREAM, True),
        (socket.AF_INET, socket.SOCK_DGRAM, False),
        (socket.AF_UNIX, socket.SOCK_STREAM, False),
    ]
    for family, kind, expected in kinds:
        with socket.socket(family, kind) as sock:
            assert is_tcp(sock) is expected


@pytest.mark.load
@pytest.mark.slow
def test_nothing_grows(kit) -> None:
    """Connect, echo, close, many times: descriptors, objects and tables stay."""

    class Echo(asyncio.Protocol):
        def connection_made(self, transport) -> None:
            self.transport = transport

        def data_received(self, data) -> None:
            self.transport.write(data)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        driver = loop.driver

        async def cycles(port: int, count: int) -> None:
            for _ in range(count):
                _, protocol = await loop.create_connection(kit.Recorder, kit.host, port)
                protocol.transport.write(b"hello")
                await protocol.until_bytes(5)
                protocol.transport.close()
                await protocol.until_call("lost")

        def state() -> tuple[int, ...]:
            gc.collect()
            groups = driver.endpoint.groups
            return (
                kit.count_descriptors(),
                len(gc.get_objects()) // 300,
                len(driver.transports),
                len(driver.negotiations),
                sum(len(group.connections) for group in groups),
                len(groups),
                len(asyncio.all_tasks()),
            )

        async with kit.serving(Echo) as port:
            await cycles(port, 100)
            async with asyncio.timeout(5):
                while driver.transports:
                    await asyncio.sleep(0.001)
            before = state()
            await cycles(port, 400)
            async with asyncio.timeout(5):
                while state()[2:] != before[2:] or state()[0] != before[0]:
                    await asyncio.sleep(0.001)
            assert abs(state()[1] - before[1]) <= 1

    kit.run(scenario)


@pytest.mark.load
@pytest.mark.slow
def test_a_thousand_connections(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        served = []

        def make():
            served.append(kit.Recorder())
            return served[-1]

        async with kit.serving(make, backlog=1000) as port:
            made = []
            for _ in range(10):
                pairs = await asyncio.gather(
                    *(
                        loop.create_connection(kit.Recorder, kit.host, port)
                        for _ in range(100)
                    )
                )
                made += [protocol for _, protocol in pairs]
            assert {p.info_when_made.mode for p in made} == {"smcr"}
            for number, protocol in enumerate(made):
                protocol.transport.write(b"%04d" % number)
            for protocol in served:
                await protocol.until_bytes(4)
            assert {bytes(p.data) for p in served} == {b"%04d" % n for n in range(1000)}
            for protocol in made:
                protocol.transport.close()
            for protocol in made + served:
                await protocol.until_call("lost")
        assert not loop.driver.transports

    kit.run(scenario)


def test_a_closed_driver_does_nothing_more(kit) -> None:
    async def scenario() -> None:
        driver = Driver(asyncio.get_running_loop(), Config())
        assert driver.open() is None
        device = driver.devices[0]
        driver.close()
        assert driver.pump(device) is False
        driver._ring()
        driver._arm_timer()
        assert driver.lookup is None

    kit.run(scenario)


def test_without_a_descriptor_there_is_no_quick_look_up(monkeypatch) -> None:
    def none_left():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(driver_module, "Lookup", none_left)
    assert driver_module._quick_lookup(Config()) is None
    assert driver_module._quick_lookup(Config(discovery=())) is None


@pytest.mark.filterwarnings("ignore:This process")
def test_a_driver_of_the_parent_is_only_closed_in_the_child(kit) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            await check(asyncio.get_running_loop().driver, ends)

    async def check(driver, ends) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                driver.close()
                driver._ring()
                status = 7 if driver.is_closed else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        ends.client.transport.write(b"unharmed")
        await ends.server.until_bytes(8)

    kit.run(scenario, config=Config())
