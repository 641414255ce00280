"""start_tls: from plain bytes to TLS on the same connection, in every world."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import pytest
import uvloop

from pysmc.aio import tls
from pysmc.errors import ConnectionReset
from tests.aio.tls_kit import (
    HOST,
    MIB,
    NAME,
    OWN,
    STOCK,
    SWAPPED,
    TCP,
    UVLOOP,
    WORLDS,
    Stream,
    Tap,
    World,
    check_carrier,
    pattern,
    raw_of,
    serving,
    story,
)


@pytest.fixture(params=WORLDS)
def world(request) -> World:
    return WORLDS[request.param]


async def upgrade(here: Stream, there: Stream, authority, **options: Any) -> None:
    """Let both ends go on with TLS."""
    await asyncio.gather(
        here.writer.start_tls(
            authority.client_context(), server_hostname=NAME, **options
        ),
        there.writer.start_tls(authority.server_context()),
    )


def test_plain_bytes_both_ways_before(kit, authority, world, monkeypatch) -> None:
    tap = Tap(monkeypatch)

    async def scenario() -> None:
        async with serving(world) as served:
            here, there = await served.pair()
            here.writer.write(b"STARTTLS\r\n")
            assert await there.reader.readline() == b"STARTTLS\r\n"
            there.writer.write(b"ready\r\n")
            assert await here.reader.readline() == b"ready\r\n"
            await upgrade(here, there, authority)
            data = pattern(MIB)
            here.writer.write(data)
            assert await there.reader.readexactly(MIB) == data
            there.writer.write(data)
            assert await here.reader.readexactly(MIB) == data
            for stream in (here, there):
                check_carrier(world, stream)
                assert stream.info("ssl_object").version() == "TLSv1.3"
                assert stream.info("peername") is not None
            assert here.info("peercert")["subject"]
            assert await here.end() == "None"
            assert await there.reader.read() == b""

    kit.run(scenario, factory=world.factory)
    assert len(tap.smcr) == 2 * world.smcr


@pytest.mark.parametrize("is_smcr", [True, False], ids=["smcr", "fallback"])
@pytest.mark.parametrize("world", [OWN, STOCK, UVLOOP], ids=lambda w: w.name)
def test_a_client_that_does_not_wait(kit, authority, world, is_smcr) -> None:
    """Its first TLS bytes lie behind the request, and the server has them already."""
    hello = client_hello(authority)

    async def scenario() -> None:
        async with serving(world) as served:
            if is_smcr:
                here, there = await served.pair()
            else:
                sock = socket.create_connection((HOST, served.port))
                here = Stream(*await world.open_connection(sock=sock))
                there = await served.streams.get()
                served.opened.append(here)
                assert there.info("smc").mode == "tcp"
            here.writer.write(b"STARTTLS\r\n" + hello.outgoing.read())
            assert await there.reader.readline() == b"STARTTLS\r\n"
            upgrading = asyncio.ensure_future(
                there.writer.start_tls(authority.server_context())
            )
            while not await hello.turn(here):
                continue
            await upgrading
            there.writer.write(b"secret")
            assert await hello.read(here) == b"secret"

    kit.run(scenario, factory=world.factory)


@pytest.mark.parametrize("world", [OWN, STOCK, UVLOOP], ids=lambda w: w.name)
def test_what_was_slipped_in_before_is_not_trusted(kit, authority, world) -> None:
    """Plain bytes behind the request must not look as if they came through TLS."""

    async def scenario() -> tuple[str, str]:
        async with serving(world) as served:
            here, there = await served.pair()
            here.writer.write(b"STARTTLS\r\nDELETE everything\r\n")
            assert await there.reader.readline() == b"STARTTLS\r\n"
            told = await asyncio.gather(
                story(there.writer.start_tls(authority.server_context())),
                story(
                    here.writer.start_tls(
                        authority.client_context(), server_hostname=NAME
                    )
                ),
            )
            assert await story(there.reader.read()) in {"b''", told[0]}
            return told[0].partition(" (_ssl.c")[0], told[1]

    assert kit.run(scenario, factory=world.factory) == (
        "SSLError: [SSL: WRONG_VERSION_NUMBER] wrong version number",
        "ConnectionResetError",
    )


class client_hello:  # noqa: N801  # reads as the function that it is
    """A TLS client in memory, which can send its first bytes when it likes."""

    def __init__(self, authority: Any) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = authority.client_context().wrap_bio(
            self.incoming, self.outgoing, server_hostname=NAME
        )
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.do_handshake()

    async def turn(self, stream: Stream) -> bool:
        """Go on with what has come; True once the handshake is complete."""
        self.incoming.write(await stream.reader.read(65536))
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        finally:
            stream.writer.write(self.outgoing.read())
        return True

    async def read(self, stream: Stream) -> bytes:
        while True:
            try:
                return bytes(self.tls.read(65536))
            except ssl.SSLWantReadError:
                self.incoming.write(await stream.reader.read(65536))


def test_a_wrong_name_is_refused_after_plain_bytes(kit, authority, world) -> None:
    def run(where: World) -> Any:
        async def scenario() -> tuple[str, str]:
            async with serving(where) as served:
                here, there = await served.pair()
                return await asyncio.gather(
                    story(
                        here.writer.start_tls(
                            authority.client_context(), server_hostname="no.invalid"
                        )
                    ),
                    story(there.writer.start_tls(authority.server_context())),
                )

        return kit.run(scenario, factory=where.factory)

    told = run(world)
    assert told == run(TCP)
    assert "Hostname mismatch" in told[0]


def test_twice(kit, authority, world) -> None:
    """TLS within TLS: nobody needs it, and it works as with asyncio."""

    async def scenario() -> None:
        async with serving(world) as served:
            here, there = await served.pair()
            await upgrade(here, there, authority)
            await upgrade(here, there, authority)
            here.writer.write(pattern(100_000))
            assert await there.reader.readexactly(100_000) == pattern(100_000)
            for stream in (here, there):
                check_carrier(world, stream)

    kit.run(scenario, factory=world.factory)


def test_silence_after_the_request(kit, authority, world) -> None:
    async def scenario() -> str:
        async with serving(world) as served:
            here, _ = await served.pair()
            return await story(
                here.writer.start_tls(
                    authority.client_context(),
                    server_hostname=NAME,
                    ssl_handshake_timeout=0.05,
                )
            )

    assert kit.run(scenario, factory=world.factory) == "ConnectionAbortedError"


def test_cancelled_in_the_middle(kit, authority, world) -> None:
    async def scenario() -> None:
        async with serving(world) as served:
            here, there = await served.pair()
            upgrading = asyncio.ensure_future(
                here.writer.start_tls(authority.client_context(), server_hostname=NAME)
            )
            assert (await there.reader.readexactly(3)) == b"\x16\x03\x01"
            upgrading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await upgrading
            assert (await there.reader.read())[:2] == b"\x02\x00"

    kit.run(scenario, factory=world.factory)


@pytest.mark.parametrize("how", ["reset", "timeout", "cancelled", "closed"])
@pytest.mark.parametrize("world", [OWN, STOCK, UVLOOP], ids=lambda w: w.name)
def test_a_broken_upgrade_ends_the_stream(kit, authority, world, how) -> None:
    """Whatever ends the handshake: wait_closed comes back, and the reader knows."""

    async def scenario() -> tuple[str, str]:
        async with serving(world) as served:
            here, there = await served.pair()
            upgrading = asyncio.ensure_future(
                here.writer.start_tls(
                    authority.client_context(),
                    server_hostname=NAME,
                    ssl_handshake_timeout=0.05 if how == "timeout" else None,
                )
            )
            assert (await there.reader.readexactly(3)) == b"\x16\x03\x01"
            if how == "reset":
                lost = ConnectionReset("as by a peer that was killed")
                raw_of(there)._force_close(lost)
            elif how == "cancelled":
                upgrading.cancel()
            elif how == "closed":
                raw_of(here).close()
            await asyncio.wait([upgrading])
            told = "CancelledError" if how == "cancelled" else await story(upgrading)
            here.writer.close()
            return told, await story(here.writer.wait_closed())

    assert (
        kit.run(scenario, factory=world.factory)
        == {
            "reset": ("ConnectionResetError", "ConnectionResetError"),
            "timeout": ("ConnectionAbortedError", "ConnectionAbortedError"),
            "cancelled": ("CancelledError", "None"),
            "closed": ("ConnectionAbortedError", "None"),
        }[how]
    )


def test_what_is_no_context(kit, world) -> None:
    async def scenario() -> None:
        async with serving(world) as served:
            here, there = await served.pair()
            with pytest.raises(TypeError, match="SSLContext"):
                await here.writer.start_tls(True)
            here.writer.write(b"as before")
            assert await there.reader.readexactly(9) == b"as before"

    kit.run(scenario, factory=world.factory)


# --- Without streams


class Upgraded(asyncio.Protocol):
    """Keeps what arrives, and how it ended."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.calls: list[str] = []
        self.transport: Any = None
        self.changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._note("made")

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.changed.set()

    def eof_received(self) -> None:
        self._note("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self._note(f"lost {exc}")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.changed.set()

    async def until(self, done: Any) -> None:
        async with asyncio.timeout(10):
            while not done():
                self.changed.clear()
                await self.changed.wait()


@pytest.mark.parametrize("world", [SWAPPED, TCP], ids=lambda w: w.name)
def test_loop_start_tls(kit, authority, world) -> None:
    made: list[Upgraded] = []

    def make() -> Upgraded:
        made.append(Upgraded())
        return made[-1]

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(make, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        plain, here = await loop.create_connection(Upgraded, "127.0.0.1", port)
        plain.write(b"plain")
        await here.until(lambda: made)
        there = made[0]
        await there.until(lambda: there.data == b"plain")
        at_client, at_server = await asyncio.gather(
            loop.start_tls(
                plain, here, authority.client_context(), server_hostname=NAME
            ),
            loop.start_tls(
                there.transport, there, authority.server_context(), server_side=True
            ),
        )
        for transport in (at_client, at_server):
            check_carrier(world, Stream(None, transport))
            assert transport.can_write_eof() is False
        at_client.write(b" secret")
        await there.until(lambda: there.data == b"plain secret")
        at_server.close()
        await asyncio.gather(
            *(
                end.until(lambda end=end: "lost" in end.calls[-1])
                for end in (here, there)
            )
        )
        assert here.calls == ["made", "eof", "lost None"]
        assert there.calls == ["made", "eof", "lost None"]
        server.close()
        await server.wait_closed()

    kit.run(scenario, factory=world.factory)


def test_uvloop_itself_refuses_our_transports(kit, authority) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with serving(UVLOOP) as served:
            here, there = await served.pair()
            with pytest.raises(TypeError, match="not supported by start_tls"):
                await loop.start_tls(
                    here.writer.transport,
                    here.writer.transport.get_protocol(),
                    authority.client_context(),
                    server_hostname=NAME,
                )
            at_client, at_server = await asyncio.gather(
                tls.start_tls(
                    loop,
                    here.writer.transport,
                    here.writer.transport.get_protocol(),
                    authority.client_context(),
                    server_hostname=NAME,
                ),
                tls.start_tls(
                    loop,
                    there.writer.transport,
                    there.writer.transport.get_protocol(),
                    authority.server_context(),
                    server_side=True,
                ),
            )
            at_client.write(b"above")
            assert await there.reader.readexactly(5) == b"above"
            at_server.abort()

    kit.run(scenario, factory=uvloop.new_event_loop)
