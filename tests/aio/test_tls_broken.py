"""What goes wrong with TLS: each end is told what it would be told over TCP."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

import pytest

from tests.aio.tls_kit import (
    HOST,
    MIB,
    TCP,
    WORLDS,
    Server,
    Stream,
    Tap,
    World,
    pattern,
    raw_of,
    serving,
    story,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(params=[name for name in WORLDS if name not in {"swapped", "tcp"}])
def world(request) -> World:
    return WORLDS[request.param]


@pytest.fixture
def tap(monkeypatch) -> Tap:
    return Tap(monkeypatch)


_over_tcp: dict[str, Any] = {}


@pytest.fixture
def same_as_tcp(kit, world, request) -> Any:
    """Runs a scenario here and over TCP, and gives what both told."""
    given = {**request.node.callspec.params, "world": None}
    key = f"{request.function.__name__} {given}"

    def run(tell: Any) -> Any:
        told = kit.run(tell, world, factory=world.factory)
        if key not in _over_tcp:
            _over_tcp[key] = kit.run(tell, TCP, factory=TCP.factory)
        assert told == _over_tcp[key]
        return told

    return run


def limit(context: ssl.SSLContext, version: str) -> ssl.SSLContext:
    context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    return context


VERSIONS = ["TLSv1.2", "TLSv1.3"]

# --- Certificates


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("expired", "certificate has expired"),
        ("not-yet-valid", "certificate is not yet valid"),
        ("wrong-name", "Hostname mismatch"),
        ("unknown", "unable to get local issuer certificate"),
    ],
)
def test_wrong_servers(same_as_tcp, authority, tap, kind, why) -> None:
    async def tell(where: World) -> Any:
        async with serving(where, authority.server_context(kind)) as served:
            try:
                await served.connect(authority.client_context())
            except ssl.SSLCertVerificationError as error:
                return str(error), error.verify_code, served.streams.qsize()

    text, _, streams = same_as_tcp(tell)
    assert why in text
    assert streams == 0
    assert len(tap.smcr) == 2


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [None, "unknown", "expired"])
def test_wrong_clients(same_as_tcp, authority, tap, kind, version) -> None:
    """With TLS 1.3 the client believes in the connection until it reads."""

    async def tell(where: World) -> Any:
        context = limit(authority.server_context(ask_client=True), version)
        async with serving(where, context) as served:
            told = await story(visit(served, authority.client_context(kind)))
            return told, served.streams.qsize()

    async def visit(served: Server, context: ssl.SSLContext) -> str:
        here = await served.connect(context)
        return (await here.reader.read()).decode()

    told, streams = same_as_tcp(tell)
    assert streams == 0
    assert told == ("ConnectionResetError" if version == "TLSv1.2" else "''"), told
    assert len(tap.smcr) == 2


# --- Ends that do not agree


def test_plain_client_at_a_tls_server(same_as_tcp, authority, tap) -> None:
    async def tell(where: World) -> Any:
        async with serving(where, authority.server_context()) as served:
            here = await served.connect()
            here.writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            told = await story(here.reader.read())
            return told, await here.end(), served.streams.qsize()

    assert same_as_tcp(tell)[2] == 0
    assert len(tap.smcr) == 1


def test_tls_client_at_a_plain_server(same_as_tcp, authority, tap) -> None:

    async def answer(served: Server) -> bytes:
        there = await served.take()
        hello = await there.reader.readexactly(3)
        there.writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        return hello

    async def tell(where: World) -> Any:
        async with serving(where) as served:
            attempt = story(served.connect(authority.client_context()))
            return await asyncio.gather(attempt, answer(served))

    told, hello = same_as_tcp(tell)
    assert "WRONG_VERSION_NUMBER" in told
    assert hello == b"\x16\x03\x01"  # and no byte of CLC before it
    assert len(tap.smcr) == 1


def test_no_common_version(same_as_tcp, authority) -> None:
    async def tell(where: World) -> Any:
        client = authority.client_context()
        client.minimum_version = ssl.TLSVersion.TLSv1_3
        context = limit(authority.server_context(), "TLSv1.2")
        async with serving(where, context) as served:
            return await story(served.connect(client)), served.streams.qsize()

    assert same_as_tcp(tell)[1] == 0


def test_no_common_cipher(same_as_tcp, authority) -> None:
    async def tell(where: World) -> Any:
        server = limit(authority.server_context(), "TLSv1.2")
        server.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        client = limit(authority.client_context(), "TLSv1.2")
        client.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384")
        async with serving(where, server) as served:
            return await story(served.connect(client)), served.streams.qsize()

    assert same_as_tcp(tell)[1] == 0


# --- Bytes that are changed on their way


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flip,
    "first byte": lambda data: b"\xff" + data[1:],
    "length": lambda data: data[:3] + b"\xff\xff" + data[5:],
    "twice": lambda data: data + data,
    "cut": lambda data: data[:-1],
}


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("sender", ["client", "server"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("world", ["pysmc", "uvloop"], indirect=True)
def test_changed_records(same_as_tcp, authority, tap, change, sender, version) -> None:
    """Nothing that was changed is delivered, and the reader never hangs."""
    armed = False

    def change_one(side: str, _: int, data: bytes) -> bytes:
        nonlocal armed
        if side == sender and armed:
            armed = False
            return CHANGES[change](data)
        return data

    tap.on_write = change_one

    async def tell(where: World) -> Any:
        nonlocal armed
        context = limit(authority.server_context(), version)
        async with serving(where, context) as served:
            ends = await served.pair(authority.client_context())
            writer, reader = ends if sender == "client" else ends[::-1]
            reader.writer.write(b"greeting")
            await writer.reader.readexactly(8)
            writer.writer.write(b"first")
            assert await reader.reader.readexactly(5) == b"first"
            armed = True
            writer.writer.write(pattern(100))
            writer.writer.write(b"second")
            told = [await story(reader.reader.readexactly(101))]
            told.append(await story(reader.reader.read()))
            told.append(await story(writer.reader.read()))
            told.append(await reader.end())
            return told

    told = same_as_tcp(tell)
    assert told[0].startswith("SSLError: "), told
    assert len(tap.smcr) == 2


@pytest.mark.parametrize("sender", ["client", "server"])
def test_a_changed_handshake(same_as_tcp, authority, tap, sender) -> None:
    tap.on_write = lambda side, count, data: (
        flip(data) if side == sender and count == 1 else data
    )

    async def tell(where: World) -> Any:
        async with serving(where, authority.server_context()) as served:
            client = authority.client_context()
            attempt = story(served.connect(client, ssl_handshake_timeout=1.0))
            return await attempt, served.streams.qsize()

    told, streams = same_as_tcp(tell)
    assert streams == 0
    assert told.startswith(("SSLError", "ConnectionResetError"))
    assert len(tap.smcr) == 2


# --- Ends beneath TLS


@pytest.mark.parametrize("closer", ["client", "server"])
@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("version", VERSIONS)
def test_ragged_ends(same_as_tcp, authority, how, closer, version) -> None:
    """The transport beneath ends without close_notify."""

    async def tell(where: World) -> Any:
        context = limit(authority.server_context(), version)
        async with serving(where, context) as served:
            ends = await served.pair(authority.client_context())
            quitter, other = ends if closer == "client" else ends[::-1]
            quitter.writer.write(b"the beginning")
            assert await other.reader.readexactly(13) == b"the beginning"
            getattr(raw_of(quitter), how)()
            told = [
                await story(other.reader.read()),
                await story(quitter.reader.read()),
            ]
            return [*told, await other.end(), await quitter.end()]

    same_as_tcp(tell)


def test_the_end_within_a_record(same_as_tcp, authority, tap) -> None:
    cut = False

    def cut_one(side: str, _: int, data: bytes) -> bytes:
        return data[: len(data) // 2] if side == "client" and cut else data

    tap.on_write = cut_one

    async def tell(where: World) -> Any:
        nonlocal cut
        cut = False
        async with serving(where, authority.server_context()) as served:
            here, there = await served.pair(authority.client_context())
            here.writer.write(b"whole")
            assert await there.reader.readexactly(5) == b"whole"
            cut = True
            here.writer.write(pattern(1000))
            raw_of(here).close()
            return await story(there.reader.read()), await there.end()

    told, _ = same_as_tcp(tell)
    assert len(told) < 100  # nothing of the half record was delivered
    assert len(tap.smcr) == 2


def test_bytes_after_close_notify(same_as_tcp, authority) -> None:
    async def tell(where: World) -> Any:
        async with serving(where, authority.server_context()) as served:
            here, there = await served.pair(authority.client_context())
            raw = raw_of(here)
            raw_of(there).pause_reading()
            here.writer.write(b"last")
            here.writer.close()
            raw.write(b"\x17\x03\x03\x00\x02no")
            raw_of(there).resume_reading()
            told = [await story(there.reader.read()), await there.end()]
            return [*told, await story(here.writer.wait_closed())]

    assert same_as_tcp(tell)[0] == "b'last'"


@pytest.mark.parametrize("closer", ["client", "server"])
def test_close_while_the_peer_writes(same_as_tcp, authority, closer) -> None:
    """Whoever closes is told no error, and the other one finds out in the end."""
    data = pattern(4 * MIB)

    async def write(stream: Stream) -> None:
        while True:
            stream.writer.write(data[:65536])
            await stream.writer.drain()
            await asyncio.sleep(0)

    async def tell(where: World) -> Any:
        async with serving(where, authority.server_context()) as served:
            ends = await served.pair(authority.client_context())
            quitter, other = ends if closer == "client" else ends[::-1]
            writing = asyncio.ensure_future(story(write(other)))
            await quitter.reader.readexactly(100_000)
            quitter.writer.close()
            told = await writing
            return told in {"ConnectionResetError", "BrokenPipeError"}

    assert same_as_tcp(tell) is True


# --- Before the handshake is over


def test_server_that_aborts_the_handshake(same_as_tcp, authority) -> None:
    async def quit_at_once(served: Server) -> None:
        there = await served.take()
        await there.reader.readexactly(3)
        there.writer.transport.abort()

    async def tell(where: World) -> Any:
        async with serving(where) as served:
            attempt = story(served.connect(authority.client_context()))
            return (await asyncio.gather(attempt, quit_at_once(served)))[0]

    assert same_as_tcp(tell) == "ConnectionResetError"


def test_client_that_leaves_the_handshake(same_as_tcp, authority, tap) -> None:
    """The server tells nobody of a connection that never came to be."""

    async def tell(where: World) -> Any:
        async with serving(where, authority.server_context()) as served:
            here = await served.connect()
            here.writer.write(b"\x16\x03\x01\x02")
            while not tap.transports["server"]:
                await asyncio.sleep(0)
            await here.end()
            raw = tap.transports["server"].pop()
            while raw.get_extra_info("socket").fileno() >= 0:
                await asyncio.sleep(0)
            return served.streams.qsize()

    assert same_as_tcp(tell) == 0


def test_cancelled_handshake(same_as_tcp, authority, tap) -> None:
    """The peer learns it, and nothing is left."""

    async def tell(where: World) -> Any:
        async with serving(where) as served:
            attempt = asyncio.ensure_future(served.connect(authority.client_context()))
            there = await served.take()
            assert await there.reader.readexactly(3) == b"\x16\x03\x01"
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt
            (await there.reader.read())
            return await there.end()

    assert same_as_tcp(tell) == "None"
    assert len(tap.smcr) == 1


def test_server_that_closes_during_handshakes(same_as_tcp, authority) -> None:
    async def tell(where: World) -> Any:
        async with serving(where, authority.server_context()) as served:
            here = await served.connect()
            here.writer.write(b"\x16\x03\x01\x02")
            served.server.close()
            here.writer.write(b"\x00")
            here.writer.transport.abort()
            return served.streams.qsize()

    assert same_as_tcp(tell) == 0


def test_the_host_is_a_wrong_name(same_as_tcp, authority) -> None:
    """Without server_hostname the host must be in the certificate."""

    async def tell(where: World) -> Any:
        context = authority.server_context("wrong-name")
        async with serving(where, context) as served:
            client = authority.client_context()
            return await story(where.open_connection(HOST, served.port, ssl=client))

    assert "IP address mismatch" in same_as_tcp(tell)
