"""TLS on streams in every world: what arrives, and what both ends know."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest

from tests.aio.tls_kit import (
    HOST,
    MIB,
    NAME,
    WORLDS,
    Stream,
    Tap,
    World,
    pattern,
    raw_of,
    serving,
    story,
)


@pytest.fixture(params=WORLDS)
def world(request) -> World:
    return WORLDS[request.param]


def contexts(authority, version: str = "TLSv1.3", **asked: Any):
    server = authority.server_context(**asked)
    server.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    return server, authority.client_context()


async def echo_back(stream: Stream, size: int) -> None:
    sent = 0
    while sent < size:
        data = await stream.reader.read(65536)
        sent += len(data)
        stream.writer.write(data)
        await stream.writer.drain()


# --- What arrives


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_small_messages(kit, authority, world, version) -> None:
    server, client = contexts(authority, version)

    async def scenario() -> None:
        async with serving(world, server) as served:
            here, there = await served.pair(client)
            for number in range(200):
                message = pattern(1 + number, number)
                here.writer.write(message)
                there.writer.write(await there.reader.readexactly(len(message)))
                assert await here.reader.readexactly(len(message)) == message
            for stream in (here, there):
                assert stream.info("ssl_object").version() == version
            assert await here.end() == "None"
            assert await there.reader.read() == b""

    kit.run(scenario, factory=world.factory)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_large_both_ways(kit, authority, world, version) -> None:
    server, client = contexts(authority, version)
    size = 4 * MIB

    async def send(stream: Stream, data: bytes) -> None:
        for begin in range(0, len(data), 100_000):
            stream.writer.write(data[begin : begin + 100_000])
            await stream.writer.drain()

    async def scenario() -> None:
        async with serving(world, server) as served:
            here, there = await served.pair(client)
            one, other = pattern(size, 1), pattern(size, 2)
            _, _, at_client, at_server = await asyncio.gather(
                send(here, one),
                send(there, other),
                here.reader.readexactly(size),
                there.reader.readexactly(size),
            )
            assert at_server == one
            assert at_client == other

    kit.run(scenario, factory=world.factory)


def test_one_write_of_many_mib(kit, authority, world) -> None:
    server, client = contexts(authority)
    data = pattern(3 * MIB + 1)

    async def scenario() -> None:
        async with serving(world, server) as served:
            here, there = await served.pair(client)
            here.writer.write(data)
            received, _ = await asyncio.gather(
                there.reader.readexactly(len(data)), here.writer.drain()
            )
            assert received == data

    kit.run(scenario, factory=world.factory)


def test_writelines_and_empty_writes(kit, authority, world) -> None:
    server, client = contexts(authority)

    async def scenario() -> None:
        async with serving(world, server) as served:
            here, there = await served.pair(client)
            here.writer.writelines([b"a", bytearray(b"bc"), memoryview(b"def")])
            here.writer.write(b"")
            here.writer.write(b"g")
            assert await there.reader.readexactly(7) == b"abcdefg"
            with pytest.raises(TypeError):
                here.writer.write("text")

    kit.run(scenario, factory=world.factory)


@pytest.mark.slow
def test_many_at_the_same_time(kit, authority, world) -> None:
    server, client = contexts(authority)
    count, size = 60, 20_000

    async def visit(served, number: int) -> bool:
        here = await served.connect(client)
        here.writer.write(pattern(size, number))
        received = await here.reader.readexactly(size)
        assert await here.end() == "None"
        return bool(received == pattern(size, number))

    async def scenario() -> None:
        async with serving(world, server) as served:
            visits = [asyncio.create_task(visit(served, n)) for n in range(count)]
            echoes = [
                asyncio.create_task(echo_back(await served.take(), size))
                for _ in range(count)
            ]
            await asyncio.gather(*echoes)
            assert await asyncio.gather(*visits) == [True] * count

    kit.run(scenario, factory=world.factory)


@pytest.mark.slow
def test_a_slow_reader_holds_the_writer(kit, authority, world) -> None:
    """Limits hold beneath TLS, within it and in the stream above it."""
    server, client = contexts(authority)
    data = pattern(MIB)
    written = 0

    async def write(stream: Stream) -> None:
        nonlocal written
        for _ in range(32):
            stream.writer.write(data)
            await stream.writer.drain()
            written += 1

    async def scenario() -> None:
        async with serving(world, server) as served:
            here, there = await served.pair(client)
            writing = asyncio.ensure_future(write(here))
            await there.reader.readexactly(1)
            await until_calm(lambda: written)
            assert written < 20
            assert here.writer.transport.get_write_buffer_size() > 0
            assert data[:1] + await there.reader.readexactly(MIB - 1) == data
            for _ in range(31):
                assert await there.reader.readexactly(MIB) == data
            await writing

    kit.run(scenario, factory=world.factory)


async def until_calm(look: Any) -> None:
    """Wait until something has not changed for many turns of the loop."""
    before, calm = look(), 0
    while calm < 200:
        await asyncio.sleep(0)
        now = look()
        before, calm = now, calm + 1 if now == before else 0


# --- What both ends know


def test_extra_info(kit, authority, world) -> None:
    server, client = contexts(authority)

    async def scenario() -> None:
        async with serving(world, server) as served:
            here, there = await served.pair(client)
            assert here.info("sslcontext") is client
            assert there.info("sslcontext") is server
            assert dict(here.info("peercert")["subject"][0])["commonName"] == "server"
            assert not there.info("peercert")
            for stream in (here, there):
                assert isinstance(stream.info("ssl_object"), ssl.SSLObject)
                assert stream.info("cipher") == stream.info("ssl_object").cipher()
                assert stream.info("compression") is None
                assert stream.writer.get_extra_info("none", 3) == 3
                sock = stream.info("socket")  # as uvicorn asks
                assert sock.getpeername() == stream.info("peername")
                assert sock.getsockname() == stream.info("sockname")
                assert isinstance(stream.info("peername"), tuple)
            assert here.info("peername") == there.info("sockname")
            assert there.info("peername") == here.info("sockname")

    kit.run(scenario, factory=world.factory)


def test_mutual(kit, authority, world) -> None:
    server = authority.server_context("intermediate", ask_client=True)
    client = authority.client_context("client")

    async def scenario() -> None:
        async with serving(world, server) as served:
            here, there = await served.pair(client)
            ends = {"intermediate": here, "client": there}
            for kind, stream in ends.items():
                der = stream.info("ssl_object").getpeercert(True)
                assert der == authority.issue(kind).der

    kit.run(scenario, factory=world.factory)


def test_alpn(kit, authority, world) -> None:
    server, client = contexts(authority)
    server.set_alpn_protocols(["h2", "http/1.1"])
    client.set_alpn_protocols(["http/1.1", "other"])

    async def scenario() -> None:
        async with serving(world, server) as served:
            for stream in await served.pair(client):
                chosen = stream.info("ssl_object").selected_alpn_protocol()
                assert chosen == "http/1.1"

    kit.run(scenario, factory=world.factory)


def test_a_context_for_each_name(kit, authority, world) -> None:
    server, client = contexts(authority)
    other = authority.server_context("wrong-name")
    asked: list[Any] = []

    def choose(ssl_object, name, context):
        asked.append(name)
        if name == "elsewhere.invalid":
            ssl_object.context = other
        elif name != NAME:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        return None

    server.sni_callback = choose

    async def scenario() -> None:
        async with serving(world, server) as served:
            for name in (NAME, "elsewhere.invalid"):
                here, _ = await served.pair(client, server_hostname=name)
                peercert = here.info("peercert")
                assert (("DNS", name) in peercert["subjectAltName"]) is True
            told = await story(served.connect(client, server_hostname="who.invalid"))
            # asyncio ends the connection before the alert is on its way.
            assert told == "ConnectionResetError"

    kit.run(scenario, factory=world.factory)
    assert asked == [NAME, "elsewhere.invalid", "who.invalid"]


class ResumingContext(ssl.SSLContext):
    """A client's context that offers the session that it was given."""

    offered: ssl.SSLSession | None = None

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        return super().wrap_bio(*args, **options, session=self.offered)


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_sessions_are_resumed(kit, authority, world, version) -> None:
    server, _ = contexts(authority, version)
    client = ResumingContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(authority.root)

    async def scenario() -> list[bool]:
        reused: list[bool] = []
        async with serving(world, server) as served:
            for _ in range(3):
                here, there = await served.pair(client)
                there.writer.write(b"ticket")
                assert await here.reader.readexactly(6) == b"ticket"
                ends = {s.info("ssl_object").session_reused for s in (here, there)}
                reused.extend(ends)
                client.offered = here.info("ssl_object").session
                await here.end()
        return reused

    assert kit.run(scenario, factory=world.factory) == [False, True, True]


# --- The end


def test_close_notify_each_way(kit, authority, world) -> None:
    server, client = contexts(authority)

    async def scenario() -> None:
        async with serving(world, server) as served:
            for closer in (0, 1):
                ends = await served.pair(client)
                closing, other = ends[closer], ends[1 - closer]
                closing.writer.write(b"last words")
                closing.writer.close()
                assert await other.reader.read() == b"last words"
                assert other.reader.at_eof()
                assert await story(closing.writer.wait_closed()) == "None"
                assert await other.end() == "None"

    kit.run(scenario, factory=world.factory)


@pytest.mark.parametrize("world", ["pysmc", "asyncio", "uvloop"], indirect=True)
def test_how_it_ran_is_known_after_the_end(kit, authority, world) -> None:
    """By our writers: asyncio's own ask TLS, which has forgotten."""
    server, client = contexts(authority)

    async def scenario() -> None:
        async with serving(world, server) as served:
            ends = await served.pair(client)
            for stream in ends:
                stream.writer.close()
            for stream in ends:
                await stream.end()
                assert stream.info("smc").mode == "smcr"

    kit.run(scenario, factory=world.factory)


def test_no_half_close(kit, authority, world) -> None:
    server, client = contexts(authority)

    async def scenario() -> None:
        async with serving(world, server) as served:
            for stream in await served.pair(client):
                assert stream.writer.can_write_eof() is False
                with pytest.raises(NotImplementedError):
                    stream.writer.write_eof()

    kit.run(scenario, factory=world.factory)


def test_silent_peer_at_shutdown(kit, authority, world, monkeypatch) -> None:
    """One that never answers close_notify."""
    server, client = contexts(authority)
    tap = Tap(monkeypatch)

    async def scenario() -> str:
        async with serving(world, server) as served:
            here, there = await served.pair(client, ssl_shutdown_timeout=0.05)
            raw_of(there).pause_reading()
            return await here.end()

    assert kit.run(scenario, factory=world.factory) == "TimeoutError"
    assert len(tap.smcr) == 2 * world.smcr


def test_silent_server_at_handshake(kit, authority, world) -> None:
    async def scenario() -> str:
        async with serving(world) as served:
            attempt = served.connect(
                authority.client_context(), ssl_handshake_timeout=0.05
            )
            told = await story(attempt)
            there = await served.take()
            hello = await there.reader.readexactly(3)
            assert hello == b"\x16\x03\x01"  # and no byte of CLC before it
            return told

    assert kit.run(scenario, factory=world.factory) == "ConnectionAbortedError"


def test_silent_client_at_handshake(kit, authority, world) -> None:
    server, _ = contexts(authority)

    async def scenario() -> str:
        async with serving(world, server, ssl_handshake_timeout=0.05) as served:
            here = await served.connect()
            told = await story(here.reader.read())
            assert served.streams.empty()
            return told

    kit.run(scenario, factory=world.factory)


# --- Arguments


@pytest.mark.slow
def test_arguments_that_do_not_go_together(kit, authority, world) -> None:
    client = authority.client_context()

    async def scenario() -> None:
        async with serving(world, authority.server_context()) as served:
            for options in (
                {"server_hostname": NAME},
                {"ssl_handshake_timeout": 1.0},
                {"ssl_shutdown_timeout": 1.0},
            ):
                with pytest.raises(ValueError, match="only meaningful with ssl"):
                    await world.open_connection(HOST, served.port, **options)
                if "server_hostname" not in options:
                    with pytest.raises(ValueError, match="only meaningful with ssl"):
                        await serving(world, **options).__aenter__()
            # asyncio itself leaves the socket behind then.
            names = ["ssl_handshake_timeout", "ssl_shutdown_timeout"] * world.smcr
            for name in names:
                with pytest.raises(ValueError, match="positive number"):
                    await served.connect(client, **{name: 0})
            with pytest.raises(TypeError, match="SSLContext or None"):
                await serving(world, True).__aenter__()
            # Nobody trusts this authority by default, and True is the default.
            told = await story(served.connect(True))
            assert "CERTIFICATE_VERIFY_FAILED" in told
            # The host itself is the name, and the certificate has it.
            here = await served.connect(client, server_hostname=None)
            assert here.info("ssl_object").server_hostname == HOST

    kit.run(scenario, factory=world.factory)


def test_a_socket_needs_a_name(kit, authority, world) -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="must set server_hostname"):
            await world.open_connection(sock=object(), ssl=authority.client_context())

    kit.run(scenario, factory=world.factory)
