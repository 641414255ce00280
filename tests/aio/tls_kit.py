"""Both ends of TLS connections, over SMC-R on each loop and over TCP as the oracle.

A scenario runs in a world: on a pysmc loop through pysmc's functions and through
asyncio's, over shm and over the simulated fabric, on a stock loop and on uvloop through
pysmc's, and on a stock loop over TCP. What happens must be the same in all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from asyncio import sslproto
from typing import TYPE_CHECKING, Any, NamedTuple

import uvloop

import pysmc
from pysmc.aio.transport import SmcTransport
from pysmc.config import Config
from pysmc.testing.loops import new_sim_loop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    import pytest

HOST = "127.0.0.1"
NAME = "localhost"
MIB = 1024 * 1024
PATIENCE = 20.0


class World(NamedTuple):
    """A loop, and how streams are made on it."""

    name: str
    factory: Callable[[], asyncio.AbstractEventLoop]
    open_connection: Callable[..., Coroutine[Any, Any, Any]]
    start_server: Callable[..., Coroutine[Any, Any, Any]]
    smcr: bool = True


def _own_loop() -> asyncio.AbstractEventLoop:
    return pysmc.new_event_loop(Config())


OWN = World("pysmc", _own_loop, pysmc.open_connection, pysmc.start_server)
SWAPPED = World("swapped", _own_loop, asyncio.open_connection, asyncio.start_server)
SIM = World("sim", new_sim_loop, asyncio.open_connection, asyncio.start_server)
STOCK = World(
    "asyncio", asyncio.new_event_loop, pysmc.open_connection, pysmc.start_server
)
UVLOOP = World(
    "uvloop", uvloop.new_event_loop, pysmc.open_connection, pysmc.start_server
)
TCP = World(
    "tcp",
    asyncio.new_event_loop,
    asyncio.open_connection,
    asyncio.start_server,
    smcr=False,
)
WORLDS = {world.name: world for world in (OWN, SWAPPED, SIM, STOCK, UVLOOP, TCP)}


class Stream(NamedTuple):
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def info(self, name: str) -> Any:
        return self.writer.get_extra_info(name)

    async def end(self) -> str:
        """Close, and say how that went."""
        self.writer.close()
        return await story(self.writer.wait_closed())


class Server:
    """Accepts streams of one world; each end waits to be taken."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()
        self.opened: list[Stream] = []
        self.failed: list[str] = []
        """What a loop in debug mode told of clients that failed at TLS."""
        self.server: Any = None
        self.port = 0

    def _on_stream(self, reader: Any, writer: Any) -> None:
        stream = Stream(reader, writer)
        self.opened.append(stream)
        self.streams.put_nowait(stream)

    def _listen_to_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        others: Any = loop.get_exception_handler()

        def hear(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            error = context.get("exception")
            message = "Error on transport creation for incoming connection"
            if context["message"] == message and isinstance(error, OSError):
                self.failed.append(str(error))  # itself it holds much
            else:
                others(loop, context)

        loop.set_exception_handler(hear)

    async def take(self) -> Stream:
        async with asyncio.timeout(PATIENCE):
            stream = await self.streams.get()
        check_carrier(self.world, stream)
        return stream

    async def connect(self, context: Any = None, **options: Any) -> Stream:
        if context is not None:
            options = {"ssl": context, "server_hostname": NAME, **options}
        async with asyncio.timeout(PATIENCE):
            stream = Stream(
                *await self.world.open_connection(HOST, self.port, **options)
            )
        self.opened.append(stream)
        check_carrier(self.world, stream)
        return stream

    async def pair(self, context: Any = None, **options: Any) -> tuple[Stream, Stream]:
        """Connect, and give the client's end and the server's."""
        client = await self.connect(context, **options)
        return client, await self.take()


def check_carrier(world: World, stream: Stream) -> None:
    """Every single connection must be what the test is about."""
    info = stream.info("smc")
    if world.smcr:
        assert info is not None
        assert info.mode == "smcr", info.reason
        assert info.fabric == ("sim" if world.name == "sim" else "shm")
    else:
        assert info is None


@contextlib.asynccontextmanager
async def serving(
    world: World, context: Any = None, **options: Any
) -> AsyncIterator[Server]:
    """Serve in the running loop; afterwards whatever is open is aborted."""
    made = Server(world)
    made._listen_to_loop(asyncio.get_running_loop())
    if context is not None:
        options["ssl"] = context
    made.server = await world.start_server(made._on_stream, HOST, 0, **options)
    made.port = made.server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        made.server.close()
        for stream in made.opened:
            stream.writer.transport.abort()
        # Not wait_closed(): after a start_tls that failed, asyncio may never tell.
        for _ in range(5):
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            await made.server.wait_closed()


async def story(action: Coroutine[Any, Any, Any]) -> str:
    """Say how an action went: what it gave, or the kind of error and its text.

    An error of ours counts as the built-in one that it is: code that was written for
    TCP catches that, and its text is the only thing that may differ.
    """
    try:
        async with asyncio.timeout(PATIENCE):
            result = await action
    except ssl.SSLError as error:
        return f"{type(error).__name__}: {error}"
    except OSError as error:
        kinds = [kind for kind in type(error).__mro__ if kind.__module__ == "builtins"]
        return kinds[0].__name__
    return repr(result)


def raw_of(end: Any) -> Any:
    """Give the transport beneath TLS."""
    transport = end.writer.transport if isinstance(end, Stream) else end
    while isinstance(transport, sslproto._SSLProtocolTransport):
        transport = transport._ssl_protocol._transport
    return transport


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes in which no part repeats another."""
    return random.Random(seed).randbytes(size)


class Tap:
    """Stands between TLS and its transport, from the first byte on.

    Args:
        monkeypatch: Puts everything back.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.transports: dict[str, list[Any]] = {"client": [], "server": []}
        self.smcr: list[SmcTransport] = []
        self.on_write: Callable[[str, int, bytes], bytes | None] | None = None
        """Gets the end, the number of the write, and the bytes; gives others."""
        made = sslproto.SSLProtocol.connection_made
        tap = self

        def connection_made(protocol: Any, transport: Any) -> None:
            side = "server" if protocol._server_side else "client"
            tap.transports[side].append(transport)
            if isinstance(transport, SmcTransport):
                tap.smcr.append(transport)
            if tap.on_write is not None:
                tap._stand_in(side, transport)
            made(protocol, transport)

        monkeypatch.setattr(sslproto.SSLProtocol, "connection_made", connection_made)

    def _stand_in(self, side: str, transport: Any) -> None:
        write, count = transport.write, 0

        def changed(data: Any) -> None:
            nonlocal count
            count += 1
            assert self.on_write is not None
            others = self.on_write(side, count, bytes(data))
            if others is not None:
                write(others)

        transport.write = changed
