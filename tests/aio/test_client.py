"""`open_connection` and `start_server` on our loops and on others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import pytest
import uvloop

import pysmc
from pysmc.aio import foreign as foreign_loops
from pysmc.config import Config
from pysmc.errors import Declined

HOST = "127.0.0.1"
LOOPS = {
    "pysmc": pysmc.new_event_loop,
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture(params=LOOPS)
def factory(request):
    return LOOPS[request.param]


@pytest.fixture(params=["asyncio", "uvloop"])
def foreign(request):
    return LOOPS[request.param]


async def echo(reader, writer) -> None:
    info = writer.get_extra_info("smc")
    writer.write(f"{info.mode} {info.role}\n".encode())
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def exchange(port: int, data: bytes, **options):
    reader, writer = await pysmc.open_connection(HOST, port, **options)
    said = (await reader.readline()).decode().split()
    writer.write(data)
    writer.write_eof()
    assert await reader.read() == data
    info = writer.get_extra_info("smc")
    assert writer.get_extra_info("peername")[1] == port
    writer.close()
    await writer.wait_closed()
    return info.mode, said[0]


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_echo_on_any_loop(kit, factory, size) -> None:
    data = os.urandom(size)

    async def scenario() -> None:
        async with await pysmc.start_server(echo, HOST, 0) as server:
            assert server.is_serving()
            port = server.sockets[0].getsockname()[1]
            for _ in range(3):
                assert await exchange(port, data) == ("smcr", "smcr")
        await server.wait_closed()
        assert not server.is_serving()

    kit.run(scenario, factory=factory)
    assert not foreign_loops._drivers


def test_fallback_on_a_foreign_loop(kit, foreign) -> None:
    off = Config(discovery=())

    async def scenario() -> None:
        async with (
            await pysmc.start_server(echo, HOST, 0) as smc,
            await pysmc.start_server(echo, HOST, 0, config=off) as tcp,
        ):
            smc_port, tcp_port = (
                server.sockets[0].getsockname()[1] for server in (smc, tcp)
            )
            data = os.urandom(200_000)
            assert await exchange(tcp_port, data) == ("tcp", "tcp")
            assert await exchange(smc_port, data, config=off) == ("tcp", "tcp")
            assert await exchange(smc_port, data) == ("smcr", "smcr")
            with pytest.raises(Declined):
                await pysmc.open_connection(
                    HOST, tcp_port, config=Config(fallback="require")
                )

    kit.run(scenario, factory=foreign)
    assert not foreign_loops._drivers


def test_a_foreign_client_and_our_server(kit, foreign) -> None:
    async def client(port: int):
        return await exchange(port, b"across loops")

    def run(port: int):
        with asyncio.Runner(loop_factory=foreign) as runner:
            return runner.run(client(port))

    async def scenario() -> None:
        server = await asyncio.start_server(echo, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(run, port) == ("smcr", "smcr")
        server.close()
        await server.wait_closed()

    kit.run(scenario)


def test_arguments_of_a_foreign_loop(kit, foreign) -> None:
    async def scenario() -> None:
        async with await pysmc.start_server(echo, HOST, 0) as server:
            port = server.sockets[0].getsockname()[1]
            sock = socket.create_connection((HOST, port))
            reader, writer = await pysmc.open_connection(sock=sock)
            assert writer.get_extra_info("smc").reason.name == "NOT_MARKED"
            writer.close()
            await writer.wait_closed()
            reader, writer = await pysmc.open_connection(
                "localhost", port, local_addr=(HOST, 0), family=socket.AF_INET
            )
            assert writer.get_extra_info("smc").mode == "smcr"
            assert await reader.readline() == b"smcr server\n"
            writer.close()
            await writer.wait_closed()
            with pytest.raises(ValueError, match="only meaningful with ssl"):
                await pysmc.open_connection(HOST, port, server_hostname="other")
            with pytest.raises(TypeError):
                await pysmc.open_connection(HOST, port, happy_eyeballs_delay=1)
            with pytest.raises(ValueError, match="same time"):
                await pysmc.open_connection(HOST, port, sock=sock)
            with pytest.raises(ValueError, match="not specified"):
                await pysmc.open_connection()
            with pytest.raises(OSError, match="no matching local address"):
                await pysmc.open_connection(HOST, port, local_addr=("::1", 0))
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                await pysmc.open_connection(HOST, port)
        with pytest.raises(OSError, match="Multiple|refused|Connect"):
            await pysmc.open_connection("localhost", port)

    kit.run(scenario, factory=foreign)


def test_a_bad_limit_opens_nothing(kit, factory) -> None:
    async def scenario() -> None:
        async with await pysmc.start_server(print, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ValueError, match="Limit cannot be <= 0"):
                await pysmc.open_connection("127.0.0.1", port, limit=0)

    kit.run(scenario, factory=factory)


def test_unix_sockets_on_a_foreign_loop(kit, foreign) -> None:
    async def scenario() -> None:
        left, right = socket.socketpair()
        with left:
            _, writer = await pysmc.open_connection(sock=right)
            writer.write(b"hello")
            await writer.drain()
            assert left.recv(5) == b"hello"
            writer.close()
            await writer.wait_closed()

    kit.run(scenario, factory=foreign)


def test_the_configuration_of_our_own_loop_stands(kit) -> None:
    async def scenario() -> None:
        other = Config(rmbe_bytes=16384)
        with pytest.raises(ValueError, match="loop factory|new_event_loop"):
            await pysmc.open_connection(HOST, 1, config=other)
        with pytest.raises(ValueError, match="new_event_loop"):
            await pysmc.start_server(echo, HOST, 0, config=other)
        async with await pysmc.start_server(echo, HOST, 0, config=Config()) as server:
            port = server.sockets[0].getsockname()[1]
            assert await exchange(port, b"x", config=Config()) == ("smcr", "smcr")

    kit.run(scenario)


def test_cancelling_on_a_foreign_loop(kit, foreign) -> None:
    async def scenario() -> None:
        async with await pysmc.start_server(echo, HOST, 0) as server:
            port = server.sockets[0].getsockname()[1]
            await exchange(port, b"first")
            for turns in range(1, 60):
                task = asyncio.ensure_future(pysmc.open_connection(HOST, port))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    _, writer = await task
                except asyncio.CancelledError:
                    continue
                writer.close()
                await writer.wait_closed()
        await server.wait_closed()

    kit.run(scenario, factory=foreign)
