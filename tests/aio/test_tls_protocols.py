"""TLS beneath protocols: the order of callbacks, flow control, files, keys.

Each scenario runs through asyncio's own create_server and create_connection, on a pysmc
loop over SMC-R and on a stock loop over TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import socket
import ssl
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.aio.tls_kit import (
    HOST,
    MIB,
    NAME,
    SWAPPED,
    TCP,
    Stream,
    World,
    check_carrier,
    pattern,
    raw_of,
    story,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BOTH = {"smcr": SWAPPED, "tcp": TCP}


@pytest.fixture(params=BOTH)
def world(request) -> World:
    return BOTH[request.param]


@contextlib.asynccontextmanager
async def ends(
    kit,
    authority,
    world: World,
    client: Any = None,
    server: Any = None,
    *,
    version: str = "TLSv1.3",
) -> AsyncIterator[tuple[Any, Any]]:
    """Connect two protocols; afterwards whatever is open is aborted."""
    client, server = client or kit.Recorder, server or kit.Recorder
    context = authority.server_context()
    context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    accepted: asyncio.Queue[Any] = asyncio.Queue()

    class Accepted(server):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            accepted.put_nowait(self)

    loop = asyncio.get_running_loop()
    async with kit.serving(Accepted, ssl=context) as port:
        transport, here = await loop.create_connection(
            client,
            HOST,
            port,
            ssl=authority.client_context(),
            server_hostname=NAME,
        )
        async with asyncio.timeout(10):
            there = await accepted.get()
        for end in (transport, there.transport):
            check_carrier(world, Stream(None, end))
        try:
            yield here, there
        finally:
            transport.abort()
            there.transport.abort()


def kind_of(error: BaseException | None) -> str:
    """Name the built-in kind of an error."""
    if error is None or isinstance(error, ssl.SSLError):
        return str(error)
    return next(k.__name__ for k in type(error).__mro__ if k.__module__ == "builtins")


# --- The end, as the protocol sees it


def reset(end: Any) -> None:
    """Lose the connection beneath, as when the peer's machine says no."""
    raw_of(end.transport)._force_close(ConnectionResetError("lost"))


ENDINGS: dict[str, Any] = {
    "client closes": lambda here, there: here.transport.close(),
    "server closes": lambda here, there: there.transport.close(),
    "both close": lambda here, there: (here.transport.close(), there.transport.close()),
    "close twice": lambda here, there: [here.transport.close() for _ in range(2)],
    "client aborts": lambda here, there: here.transport.abort(),
    "server aborts": lambda here, there: there.transport.abort(),
    "abort after close": lambda here, there: (
        here.transport.close(),
        here.transport.abort(),
    ),
    "close with bytes": lambda here, there: (
        here.transport.write(pattern(300_000)),
        here.transport.close(),
    ),
    "close against bytes": lambda here, there: (
        there.transport.write(b"crossing"),
        here.transport.close(),
    ),
    "closed beneath": lambda here, there: raw_of(here.transport).close(),
    "aborted beneath": lambda here, there: raw_of(there.transport).abort(),
    "lost beneath": lambda here, there: reset(here),
}


def tell_ending(kit, authority, world: World, how: str) -> Any:
    async def scenario() -> Any:
        async with ends(kit, authority, world) as (here, there):
            here.transport.write(b"hello")
            await there.until_bytes(5)
            ENDINGS[how](here, there)
            told = []
            for end in (here, there):
                await end.until_call("lost")
            for _ in range(10):  # whatever would come once more comes now
                await asyncio.sleep(0)
            for end in (here, there):
                told.append((end.calls, len(end.data), kind_of(end.error)))
                assert end.calls.count("lost") == end.calls.count("made") == 1
                if how != "close twice":  # asyncio's transport breaks then
                    end.transport.write(b"nobody hears this")
            return told

    return kit.run(scenario, factory=world.factory)


@pytest.mark.parametrize("how", ENDINGS)
def test_how_it_ends(kit, authority, how) -> None:
    told = tell_ending(kit, authority, SWAPPED, how)
    assert told == tell_ending(kit, authority, TCP, how)


def test_eof_received_cannot_keep_it_open(kit, authority, world, caplog) -> None:
    class Stubborn(kit.Recorder):
        def eof_received(self) -> bool:
            super().eof_received()
            return True

    async def scenario() -> None:
        async with ends(kit, authority, world, server=Stubborn) as (here, there):
            here.transport.close()
            await there.until_call("lost")
            assert there.calls == ["made", "eof", "lost"]

    with caplog.at_level(logging.WARNING, "asyncio"):
        kit.run(scenario, factory=world.factory)
    assert "has no effect when using ssl" in caplog.text


def test_a_protocol_that_raises(kit, authority, world) -> None:
    class Failing(kit.Recorder):
        def data_received(self, data: bytes) -> None:
            message = "cannot read"
            raise LookupError(message)

    async def scenario() -> Any:
        async with ends(kit, authority, world, server=Failing) as (here, there):
            here.transport.write(b"hello")
            await there.until_call("lost")
            await here.until_call("lost")
            assert isinstance(there.error, LookupError)
            assert "Fatal error on SSL protocol" in kit.problems[0]["message"]

    kit.run(scenario, factory=world.factory, problems=1)


def test_an_end_that_is_forgotten(kit, authority, world) -> None:
    """As with TCP it goes on while its transport has something to wait for."""

    async def scenario() -> None:
        async with ends(kit, authority, world) as (here, there):
            here.transport = None
            gc.collect()
            there.transport.write(b"still there")
            await here.until_bytes(11)
            there.transport.close()
            await here.until_call("lost")

    kit.run(scenario, factory=world.factory)


# --- Flow control


def test_writers_are_paused_and_resumed(kit, authority, world) -> None:
    data = pattern(MIB)

    async def scenario() -> None:
        async with ends(kit, authority, world) as (here, there):
            there.transport.pause_reading()
            count = 0
            while "pause_writing" not in here.calls:
                here.transport.write(data)
                count += 1
                await asyncio.sleep(0)
                assert count < 64
            assert here.transport.get_write_buffer_size() > 0
            assert "resume_writing" not in here.calls
            there.transport.resume_reading()
            await here.until_call("resume_writing")
            await there.until_bytes(count * MIB)
            assert there.data == data * count
            assert here.transport.get_write_buffer_size() == 0

    kit.run(scenario, factory=world.factory)


def test_a_paused_reader_gets_nothing(kit, authority, world) -> None:
    async def scenario() -> None:
        async with ends(kit, authority, world) as (here, there):
            here.transport.write(b"one")
            await there.until_bytes(3)
            there.transport.pause_reading()
            assert not there.transport.is_reading()
            here.transport.write(b"two")
            await asyncio.to_thread(int)  # the loop turns, and asks the kernel
            for _ in range(20):
                await asyncio.sleep(0)
            assert there.data == b"one"
            there.transport.resume_reading()
            assert there.transport.is_reading()
            await there.until_bytes(6)
            assert there.data == b"onetwo"

    kit.run(scenario, factory=world.factory)


def test_limits(kit, authority, world) -> None:
    async def scenario() -> None:
        async with ends(kit, authority, world) as (here, _):
            here.transport.set_write_buffer_limits(high=1000, low=10)
            assert here.transport.get_write_buffer_limits() == (10, 1000)
            here.transport.set_read_buffer_limits(high=2000, low=20)
            assert here.transport.get_read_buffer_limits() == (20, 2000)
            with pytest.raises(ValueError, match="must be >= low"):
                here.transport.set_write_buffer_limits(high=1, low=2)

    kit.run(scenario, factory=world.factory)


# --- Other protocols


class Buffered(asyncio.BufferedProtocol):
    """Gets what arrives in a small buffer of its own."""

    def __init__(self, size: int = 5000) -> None:
        self.buffer = bytearray(size)
        self.data = bytearray()
        self.transport: Any = None
        self.changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self.buffer)

    def buffer_updated(self, nbytes: int) -> None:
        self.data += self.buffer[:nbytes]
        self.changed.set()

    async def until_bytes(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.data) < count:
                self.changed.clear()
                await self.changed.wait()


def test_buffered_protocols(kit, authority, world) -> None:
    data = pattern(MIB)

    async def scenario() -> None:
        async with ends(kit, authority, world, Buffered, Buffered) as (here, there):
            here.transport.write(data)
            there.transport.write(data[::-1])
            await there.until_bytes(MIB)
            await here.until_bytes(MIB)
            assert there.data == data
            assert here.data == data[::-1]

    kit.run(scenario, factory=world.factory)


def test_another_protocol_takes_over(kit, authority, world) -> None:
    async def scenario() -> None:
        async with ends(kit, authority, world) as (here, there):
            here.transport.write(b"first")
            await there.until_bytes(5)
            second, third = Buffered(), kit.Recorder()
            there.transport.set_protocol(second)
            assert there.transport.get_protocol() is second
            here.transport.write(pattern(20_000))
            await second.until_bytes(20_000)
            assert second.data == pattern(20_000)
            there.transport.set_protocol(third)
            here.transport.write(b"third")
            await third.until_bytes(5)
            here.transport.close()
            await third.until_call("lost")
            assert third.calls == ["data", "eof", "lost"]
            assert there.data == b"first"
            assert there.calls == ["made", "data"]

    kit.run(scenario, factory=world.factory)


def test_sendfile(kit, authority, world, tmp_path) -> None:
    data = pattern(2 * MIB + 17)
    path = tmp_path / "file"
    path.write_bytes(data)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with ends(kit, authority, world) as (here, there):
            here.transport.write(b"head")
            with path.open("rb") as file:
                sent = await loop.sendfile(here.transport, file)
                assert sent == file.tell() == len(data)
                sent = await loop.sendfile(here.transport, file, 10, 1000)
                assert sent == 1000
                with pytest.raises(RuntimeError, match="fallback is disabled"):
                    await loop.sendfile(here.transport, file, fallback=False)
            here.transport.write(b"tail")
            await there.until_bytes(len(data) + 1008)
            assert there.data == b"head" + data + data[10:1010] + b"tail"

    kit.run(scenario, factory=world.factory)


# --- Other ways to a connection


def test_connected_and_accepted_sockets(kit, authority, world) -> None:
    """SMC-R needs a connect and an accept of the loop; TLS runs either way."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server((HOST, 0)) as listener:
            listener.setblocking(False)
            client = socket.socket()
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            accepted, _ = await loop.sock_accept(listener)
            (at_client, here), (at_server, there) = await asyncio.gather(
                loop.create_connection(
                    kit.Recorder,
                    sock=client,
                    ssl=authority.client_context(),
                    server_hostname=NAME,
                ),
                loop.connect_accepted_socket(
                    kit.Recorder, accepted, ssl=authority.server_context()
                ),
            )
            at_client.write(b"there")
            await there.until_bytes(5)
            at_server.close()
            await here.until_call("lost")
            await there.until_call("lost")
            assert here.calls == ["made", "eof", "lost"]

    kit.run(scenario, factory=world.factory)


def test_a_server_that_closes_keeps_its_connections(kit, authority, world) -> None:
    async def scenario() -> None:
        async with ends(kit, authority, world) as (here, there):
            pass
        assert await story(here.until_call("lost")) == "None"
        assert await story(there.until_call("lost")) == "None"

    kit.run(scenario, factory=world.factory)


# --- Keys that change while the connection lives


def native(end: Any) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """Give OpenSSL's own library, and its object of a connection.

    The ssl module has no call for new keys. In every CPython up to 3.13 the object
    keeps the pointer behind its head and one reference.
    """
    held = end.transport.get_extra_info("ssl_object")._sslobj
    library = ctypes.CDLL(sys.modules["_ssl"].__file__)
    pointer = ctypes.c_void_p.from_address(id(held) + object.__basicsize__ + 8)
    library.SSL_get_version.argtypes = [ctypes.c_void_p]
    library.SSL_get_version.restype = ctypes.c_char_p
    assert library.SSL_get_version(pointer).decode() == held.version()
    return library, pointer


@pytest.mark.parametrize("asks", ["client", "server"])
def test_new_keys(kit, authority, world, asks) -> None:
    """A KeyUpdate of TLS 1.3 that asks for one of the peer's, under way."""

    async def scenario() -> None:
        async with ends(kit, authority, world) as (here, there):
            one, other = (here, there) if asks == "client" else (there, here)
            library, pointer = native(one)
            for round_ in range(3):
                assert library.SSL_key_update(pointer, 1) == 1
                data = pattern(100_000, round_)
                one.transport.write(data)
                await other.until_bytes(len(data) * (round_ + 1))
                assert other.data.endswith(data)
                other.transport.write(data)
                await one.until_bytes(len(data) * (round_ + 1))
                assert one.data.endswith(data)

    kit.run(scenario, factory=world.factory)


def test_renegotiation(kit, authority, world) -> None:
    """A TLS 1.2 server wants to shake hands anew; clients may not in OpenSSL 3."""

    async def scenario() -> None:
        async with ends(kit, authority, world, version="TLSv1.2") as (here, there):
            library, pointer = native(there)
            count = 10  # SSL_CTRL_GET_NUM_RENEGOTIATIONS
            assert library.SSL_renegotiate(pointer) == 1
            there.transport.write(b"under new keys")
            await here.until_bytes(14)
            here.transport.write(b"and back")
            await there.until_bytes(8)
            assert library.SSL_ctrl(pointer, count, 0, None) == 1

    kit.run(scenario, factory=world.factory)
