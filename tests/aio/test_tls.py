"""Who puts TLS on a transport, and TLS where a connection stays on TCP."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

import pysmc
from pysmc.aio import tls
from pysmc.config import Config
from tests.aio.tls_kit import HOST, NAME, STOCK, UVLOOP, Stream, pattern, serving, story

FOREIGN = {"asyncio": STOCK, "uvloop": UVLOOP}
PLAIN = Config(discovery=())


@pytest.fixture(params=FOREIGN)
def world(request):
    return FOREIGN[request.param]


def test_stock_transports_on_uvloop_are_uvloops_business(kit, authority) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(TypeError, match="not supported by start_tls"):
            await tls.start_tls(
                loop, SimpleNamespace(), kit.Recorder(), authority.client_context()
            )

    kit.run(scenario, factory=uvloop.new_event_loop)


def test_what_was_not_given_is_left_out(authority) -> None:
    context = authority.client_context()
    assert tls.check_client_tls(None) == {}
    assert tls.check_client_tls("host", ssl=context) == {
        "ssl": context,
        "server_hostname": "host",
    }
    assert tls.check_client_tls("host", ssl=True, server_hostname="") == {
        "ssl": True,
        "server_hostname": "",
    }
    assert tls.check_server_tls() == {}
    assert tls.check_server_tls(ssl=context, ssl_shutdown_timeout=2.0) == {
        "ssl": context,
        "ssl_shutdown_timeout": 2.0,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"server_hostname": "name"},
        {"ssl_handshake_timeout": 1.0},
        {"ssl": False, "ssl_shutdown_timeout": 1.0},
    ],
    ids=lambda options: list(options)[-1],
)
def test_options_without_tls(options) -> None:
    with pytest.raises(ValueError, match="only meaningful with ssl"):
        tls.check_client_tls("host", **options)


def test_names_without_a_host() -> None:
    with pytest.raises(ValueError, match="must set server_hostname"):
        tls.check_client_tls(None, ssl=True)
    with pytest.raises(TypeError, match="SSLContext or None"):
        tls.check_server_tls(ssl=False)


# --- Connections that stay on TCP


async def echo(reader: Any, writer: Any) -> None:
    writer.write(await reader.readexactly(100_000))
    writer.close()
    await story(writer.wait_closed())


def test_fallback(kit, authority, world) -> None:
    """The loop does it all by itself, and both ends say why it is TCP."""
    infos: list[Any] = []

    async def serve(reader: Any, writer: Any) -> None:
        infos.append(writer.get_extra_info("smc"))
        await echo(reader, writer)

    async def scenario() -> None:
        server = await pysmc.start_server(
            serve, HOST, 0, ssl=authority.server_context(), ssl_handshake_timeout=10.0
        )
        reader, writer = await pysmc.open_connection(
            HOST,
            server.sockets[0].getsockname()[1],
            config=PLAIN,
            ssl=authority.client_context(),
            server_hostname=NAME,
            ssl_shutdown_timeout=10.0,
        )
        infos.append(writer.get_extra_info("smc"))
        assert writer.get_extra_info("cipher")
        writer.write(pattern(100_000))
        assert await reader.read() == pattern(100_000)
        writer.close()
        await story(writer.wait_closed())
        server.close()
        await server.wait_closed()

    kit.run(scenario, factory=world.factory)
    assert [info.mode for info in infos] == ["tcp", "tcp"]
    assert {info.role for info in infos} == {"server", "client"}
    assert {info.reason.name for info in infos} == {"PEER_NO_SMC", "DISABLED"}


def test_fallback_of_an_upgrade(kit, authority, world) -> None:
    """On uvloop it is uvloop's TLS, in asyncio's way."""

    async def serve(reader: Any, writer: Any) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go\n")
        await writer.start_tls(authority.server_context())
        await echo(reader, writer)

    async def scenario() -> None:
        server = await pysmc.start_server(serve, HOST, 0, config=PLAIN)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await pysmc.open_connection(HOST, port, config=PLAIN)
        writer.write(b"STARTTLS\n")
        assert await reader.readline() == b"go\n"
        await writer.start_tls(authority.client_context(), server_hostname=NAME)
        writer.write(pattern(100_000))
        assert await reader.read() == pattern(100_000)
        assert writer.get_extra_info("smc").mode == "tcp"
        writer.close()
        await story(writer.wait_closed())
        server.close()
        await server.wait_closed()

    kit.run(scenario, factory=world.factory)


def test_wrong_certificates_on_fallback(kit, authority, world) -> None:
    async def scenario() -> None:
        context = authority.server_context("unknown")
        async with serving(world, context, config=PLAIN) as served:
            attempt = served.connect(authority.client_context(), config=PLAIN)
            assert "CERTIFICATE_VERIFY_FAILED" in await story(attempt)

    kit.run(scenario, factory=world.factory)


# --- A server on a foreign loop


def test_a_client_that_fails_is_told_of_when_debugging(
    kit, authority, world, caplog
) -> None:
    async def scenario(*, debug: bool) -> int:
        asyncio.get_running_loop().set_debug(debug)
        async with serving(world, authority.server_context("unknown")) as served:
            attempt = served.connect(authority.client_context())
            assert "CERTIFICATE_VERIFY_FAILED" in await story(attempt)
            served.server.close()
            await served.server.wait_closed()
            return len(served.failed)

    with caplog.at_level(logging.DEBUG, "pysmc"):
        assert kit.run(lambda: scenario(debug=False), factory=world.factory) == 0
    assert "was closed" in caplog.text
    assert kit.run(lambda: scenario(debug=True), factory=world.factory) == 1


@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
def test_handshakes_end_with_the_servers_clients(kit, authority, world, how) -> None:
    async def scenario() -> None:
        async with serving(world, authority.server_context()) as served:
            here = await served.connect()
            here.writer.write(b"\x16\x03\x01")
            while not served.server._tasks:
                await asyncio.sleep(0)
            served.server.close()
            getattr(served.server, how)()
            await served.server.wait_closed()
            assert await story(here.reader.read()) in {"b''", "ConnectionResetError"}

    kit.run(scenario, factory=world.factory)


def test_a_socket_that_is_connected(kit, authority, world) -> None:
    async def scenario() -> None:
        async with serving(world, authority.server_context()) as served:
            sock = socket.create_connection((HOST, served.port))
            here = Stream(
                *await world.open_connection(
                    sock=sock, ssl=authority.client_context(), server_hostname=NAME
                )
            )
            served.opened.append(here)
            assert here.info("smc").reason.name == "NOT_MARKED"
            here.writer.write(b"over TCP")
            there = await served.streams.get()
            assert await there.reader.readexactly(8) == b"over TCP"

    kit.run(scenario, factory=world.factory)


# --- What the page on TLS says that loops refuse


def test_files(kit, authority, world, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(pattern(300_000))

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with serving(world, authority.server_context()) as served:
            here, there = await served.pair(authority.client_context())
            with path.open("rb") as file:
                if world is UVLOOP:
                    with pytest.raises(NotImplementedError):
                        await loop.sendfile(here.writer.transport, file)
                    return
                await loop.sendfile(here.writer.transport, file)
                with pytest.raises(RuntimeError, match="fallback is disabled"):
                    await loop.sendfile(here.writer.transport, file, fallback=False)
            assert await there.reader.readexactly(300_000) == pattern(300_000)

    kit.run(scenario, factory=world.factory)


def test_calls_of_the_loop_itself_are_tcp(kit, authority, world) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with serving(world, authority.server_context()) as served:
            transport, here = await loop.create_connection(
                kit.Recorder,
                HOST,
                served.port,
                ssl=authority.client_context(),
                server_hostname=NAME,
            )
            there = await served.streams.get()
            assert there.info("smc").reason.name == "PEER_NO_SMC"
            assert transport.get_extra_info("smc") is None
            transport.abort()
            await here.until_call("lost")

    kit.run(scenario, factory=world.factory)
