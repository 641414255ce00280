"""Limits of a loop, with peers that really stall: what fits, and one too many."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import pysmc
from pysmc.aio import admission as admission_module
from pysmc.aio import cpython
from pysmc.aio import driver as driver_module
from pysmc.aio import loop as loop_module
from pysmc.config import Config
from pysmc.discovery import Discovery, Mark
from pysmc.fabric import shm_endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

HOST = "127.0.0.1"


@contextlib.asynccontextmanager
async def stalled(port: int, count: int) -> AsyncIterator[list[socket.socket]]:
    """Let clients agree on SMC-R, and then say nothing."""
    discovery = Discovery(asyncio.get_running_loop(), Config())
    socks: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.socket()
            socks.append(sock)
            mark = discovery.prepare(sock, (HOST, port))
            assert isinstance(mark, Mark)
            sock.connect((HOST, port))
            sock.setblocking(False)
            discovery.connected(mark)
            assert (await discovery.wait_confirmed(mark)).smc
        yield socks
    finally:
        for sock in socks:
            sock.close()
        discovery.close()


async def until(done: Callable[[], object]) -> None:
    """Let the loop go on until something is so."""
    async with asyncio.timeout(5):
        while not done():
            await asyncio.sleep(0)


async def connect(kit: Any, port: int) -> Any:
    """Connect and let go; give what the client is told."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(kit.Recorder, HOST, port)
    await client.until_bytes(1)
    client.transport.abort()
    await client.until_call("lost")
    return client.info_when_made


async def modes(kit: Any, port: int, served: list[Any]) -> tuple[Any, Any]:
    """Connect from a loop of its own; give what both ends are told."""
    begun, config = len(served), asyncio.get_running_loop().config
    client = await asyncio.to_thread(
        pysmc.run, connect(kit, port), config=replace(config, max_handshakes=1024)
    )
    await until(lambda: len(served) > begun and served[-1].transport is not None)
    await served[-1].until_call("lost")
    return client, served[-1].info_when_made


def serving(kit: Any) -> tuple[Any, list[Any]]:
    served: list[Any] = []

    class Greeter(kit.Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write(b"!")

    def make() -> Any:
        served.append(Greeter())
        return served[-1]

    return kit.serving(make), served


def test_handshakes_in_progress(kit, caplog) -> None:
    """The client is told, so that it need not wait for a confirmation."""

    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        server, served = serving(kit)
        async with server as port:
            async with stalled(port, 4):
                await until(lambda: len(driver.admission) == 4)
                for info in await modes(kit, port, served):
                    assert info.mode == "smcr"
            assert driver.excess == {}
            await until(lambda: len(driver.admission) == 0)
            async with stalled(port, 5):
                await until(lambda: len(driver.admission) == 5)
                began = time.monotonic()
                client, there = await modes(kit, port, served)
                took = time.monotonic() - began
            assert client.reason.name == "LIMIT"
            assert client.reason.side == "peer"
            assert there.reason.name == "LIMIT"
            assert there.reason.side == "local"
            assert "max_handshakes is 5." in there.reason.text
            assert took < driver.config.discovery_wait / 2
            assert driver.excess == {"max_handshakes": 1}
            assert "max_handshakes+1" in repr(driver)

    kit.run(scenario, config=Config(max_handshakes=5))
    said = [record for record in caplog.records if "max_handshakes" in record.message]
    assert len(said) == 1


def test_a_server_that_nobody_can_call_says_so_at_once(kit, monkeypatch) -> None:
    """Else every client would wait three seconds for CONFIRM LINK to time out."""

    async def scenario() -> None:
        monkeypatch.setattr(shm_endpoint, "has_room", lambda: False)
        server, served = serving(kit)
        # The endpoint opens with the first domain.
        async with server as port:
            driver = asyncio.get_running_loop().driver
            driver.devices[0].create_domain()
            began = time.monotonic()
            client, there = await modes(kit, port, served)
            took = time.monotonic() - began
        assert "NO_MEMORY" in client.reason.text
        assert there.reason.side == "local"
        assert "strangers wait" in there.reason.text
        assert took < driver.config.confirm_link_server_wait / 2

    kit.run(scenario)


def test_so_many_that_they_are_not_even_told(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server, served = serving(kit)
        async with server as port:
            async with stalled(port, 1):
                socks = []
                for _ in range(3):
                    # Marked, and without a rendezvous.
                    sock = socket.socket()
                    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x2C)
                    sock.connect((HOST, port))
                    socks.append(sock)
                await until(lambda: served and served[0].transport)
                assert len(loop.driver.admission) == 2
                assert served[0].info_when_made.reason.name == "LIMIT"
                for sock in socks:
                    sock.close()
                await until(lambda: len(loop.driver.admission) == 1)
                await until(lambda: len(served) == 3 and served[2].transport)
            for each in served:
                await each.until_call("lost")

    kit.run(scenario, config=Config(max_handshakes=1))


def test_a_client_that_has_no_room_says_so(kit, monkeypatch) -> None:
    """There was room before the connect, and it was taken meanwhile."""
    real = loop_module.negotiate_client

    async def crowded(driver: Any, sock: Any, found: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(driver, "has_room", lambda: False)
            return await real(driver, sock, found)

    monkeypatch.setattr(loop_module, "negotiate_client", crowded)

    async def scenario() -> None:
        server, served = serving(kit)
        async with server as port:
            client, there = await modes(kit, port, served)
        assert (client.reason.name, client.reason.side) == ("LIMIT", "local")
        assert (there.reason.name, there.reason.side) == ("LIMIT", "peer")

    kit.run(scenario)


@pytest.mark.parametrize("is_here", [True, False])
def test_handshakes_with_one_address(kit, monkeypatch, is_here: bool) -> None:
    """Listed peers speak CLC in any case: one too many gets a Decline."""
    monkeypatch.setattr(admission_module, "is_local", lambda _: is_here)

    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        server, served = serving(kit)
        async with server as port:
            silent = [socket.create_connection((HOST, port)) for _ in range(2)]
            await until(lambda: len(driver.admission) == 2)
            over = await modes(kit, port, served)
            silent.pop().close()
            await until(lambda: len(driver.admission) == 1)
            fits = await modes(kit, port, served)
            silent.pop().close()
        assert [info.mode for info in fits] == ["smcr", "smcr"]
        if is_here:
            assert [info.mode for info in over] == ["smcr", "smcr"]
            return
        assert over[0].reason.name == "PEER_DECLINED"
        assert over[1].reason.name == "LIMIT"
        assert "max_handshakes_per_peer is 2." in over[1].reason.text
        assert driver.excess == {"max_handshakes_per_peer": 1}

    config = Config(discovery=("static",), peers=(HOST,), max_handshakes_per_peer=2)
    kit.run(scenario, config=config)


def test_one_address_beyond_twice_the_limit(kit, monkeypatch) -> None:
    """Not even a Decline is affordable then; it is counted all the same."""
    monkeypatch.setattr(admission_module, "is_local", lambda _: False)

    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        server, _ = serving(kit)
        async with server as port:
            silent = [socket.create_connection((HOST, port)) for _ in range(2)]
            await until(lambda: len(driver.admission) == 2)
            assert driver.excess == {"max_handshakes_per_peer": 1}
            late = socket.create_connection((HOST, port))
            await until(lambda: driver.excess == {"max_handshakes_per_peer": 2})
            late.settimeout(10)
            assert await asyncio.to_thread(late.recv, 1) == b""
            for sock in (*silent, late):
                sock.close()

    config = Config(discovery=("static",), peers=(HOST,), max_handshakes_per_peer=1)
    kit.run(scenario, config=config)


def test_nothing_is_registered_before_the_proposal_is_there(kit) -> None:
    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        server, _ = serving(kit)
        async with server as port, stalled(port, 20):
            await until(lambda: len(driver.negotiations) == 20)
            assert driver.endpoint.groups == []
            (device,) = driver.devices
            assert not device.domains
            assert not device.queue_pairs

    kit.run(scenario)


def be_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let asyncio accept one more in a turn than it is told, as newer versions do."""
    real = asyncio.SelectorEventLoop._accept_connection

    def accept(
        self: Any,
        factory: Any,
        sock: Any,
        context: Any = None,
        server: Any = None,
        backlog: int = 100,
        *rest: Any,
    ) -> None:
        real(self, factory, sock, context, server, backlog + 1, *rest)

    before = cpython.accepted_beyond()
    monkeypatch.setattr(asyncio.SelectorEventLoop, "_accept_connection", accept)
    monkeypatch.setattr(cpython, "ACCEPTED_BEYOND", cpython.accepted_beyond(accept))
    assert before + 1 == cpython.ACCEPTED_BEYOND


@pytest.mark.parametrize(
    ("is_foreign", "is_newer"), [(False, False), (False, True), (True, False)]
)
@pytest.mark.parametrize("has_smc", [False, True])
def test_newcomers_take_turns_with_who_is_there(
    kit, monkeypatch, has_smc, is_foreign, is_newer
) -> None:
    """A flood at a listener leaves open connections their share of the loop."""
    if is_newer:
        be_newer(monkeypatch)
    monkeypatch.setattr(driver_module, "NEWCOMERS_AT_ONCE", 1)
    monkeypatch.setattr(driver_module, "NEWCOMERS_PER_SECOND", 0)

    async def scenario() -> None:
        served: list[Any] = []
        streams: list[Any] = []

        async def serve(reader: Any, writer: Any) -> None:
            served.append(loop.time())
            streams.append(writer)

        loop = asyncio.get_running_loop()
        server = await pysmc.start_server(serve, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        if has_smc:
            _, writer = await pysmc.open_connection(HOST, port)
            streams.append(writer)
            assert writer.get_extra_info("smc").mode == "smcr"
            await until(lambda: len(served) == 1)
        served.clear()
        crowd = [socket.create_connection((HOST, port)) for _ in range(20)]
        turns, most, before = 0, 0, 0
        while len(served) < 20:
            await asyncio.sleep(0)
            turns += 1
            most = max(most, len(served) - before)
            before = len(served)
        if has_smc:
            assert most <= 2  # of two turns at most
            assert turns >= 2 * (20 - 1)  # in every second one
        else:
            assert most > 2
        for sock in crowd:
            sock.close()
        for stream in streams:
            stream.transport.abort()
        server.close()
        await server.wait_closed()
        await until(lambda: len(asyncio.all_tasks()) == 1)

    factory = asyncio.SelectorEventLoop if is_foreign else None
    kit.run(scenario, factory=factory)


@pytest.mark.parametrize("is_foreign", [False, True])
def test_without_a_backlog_one_is_served_at_a_time(
    kit, monkeypatch, is_foreign
) -> None:
    """Newer versions of asyncio do so, older ones serve nobody."""
    be_newer(monkeypatch)

    async def scenario() -> None:
        async def serve(reader: Any, writer: Any) -> None:
            writer.write(await reader.read(1))
            writer.close()

        server = await pysmc.start_server(serve, HOST, 0, backlog=0)
        port = server.sockets[0].getsockname()[1]
        async with asyncio.timeout(5):
            for _ in range(2):
                reader, writer = await pysmc.open_connection(HOST, port)
                writer.write(b"x")
                assert await reader.read() == b"x"
                writer.close()
                await writer.wait_closed()
        server.close()
        await server.wait_closed()
        await until(lambda: len(asyncio.all_tasks()) == 1)

    kit.run(scenario, factory=asyncio.SelectorEventLoop if is_foreign else None)


def test_a_pause_of_the_listener_leaves_its_backlog_alone(kit, monkeypatch) -> None:
    """asyncio goes on with the number of newcomers of the turn that failed."""
    monkeypatch.setattr(asyncio.constants, "ACCEPT_RETRY_DELAY", 0)

    class Short(socket.socket):
        def accept(self) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)
        asked: list[int] = []

        def accepts(listener: socket.socket, backlog: int) -> int:
            assert listener.fileno() >= 0
            asked.append(backlog)
            return 1

        monkeypatch.setattr(loop.driver, "accepts", accepts)
        listener = Short()
        listener.bind((HOST, 0))
        server = await loop.create_server(kit.Recorder, sock=listener, backlog=7)
        with socket.create_connection(listener.getsockname()):
            await until(lambda: len(asked) > 2)
        assert set(asked) == {7}
        server.close()
        await server.wait_closed()

    kit.run(scenario)


def test_a_burst_of_newcomers_is_taken_at_once(kit) -> None:
    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        async with kit.connected():
            with socket.socket() as listener:
                assert driver.accepts(listener, 100) == 100
                for _ in range(driver_module.NEWCOMERS_AT_ONCE):
                    driver.accepted()
                assert driver.accepts(listener, 100) < 100
        assert driver.accepts(listener, 100) == 100

    kit.run(scenario)


def test_of_a_flood_each_listener_takes_one_in_every_second_turn(kit) -> None:
    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        driver.time = lambda: 1.0
        async with kit.connected():
            for _ in range(driver_module.NEWCOMERS_AT_ONCE):
                driver.accepted()
            with socket.socket() as one, socket.socket() as two:
                taken = [[driver.accepts(it, 9) for it in (one, two)] for _ in range(4)]
                assert taken == [[0, 0], [1, 1], [0, 0], [1, 1]]
                assert [driver.accepts(one, 0) for _ in range(2)] == [0, 0]

    kit.run(scenario)
