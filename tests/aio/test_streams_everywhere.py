"""Streams of pysmc on every loop, over SMC-R and TCP: as asyncio's own over TCP.

Each story notes what a program sees. It is told once with asyncio's functions on the
stock loop, and then with ours in every world; the notes have to be the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import uvloop

import pysmc
from pysmc.config import Config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

HOST = "127.0.0.1"
PATIENCE = 10.0
KIB = 1024
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "pysmc": pysmc.new_event_loop,
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


class World(NamedTuple):
    """Where streams come from, and what is to carry them."""

    streams: Any
    loop: str
    mode: str | None

    @property
    def options(self) -> dict[str, Any]:
        off = self.mode == "tcp" and self.loop != "pysmc"
        return {"config": Config(discovery=())} if off else {}

    def factory(self) -> asyncio.AbstractEventLoop:
        if self.mode == "tcp" and self.loop == "pysmc":
            return pysmc.new_event_loop(Config(discovery=()))
        return LOOPS[self.loop]()


REFERENCE = World(asyncio, "asyncio", None)
WORLDS = [World(pysmc, loop, mode) for loop in LOOPS for mode in ("smcr", "tcp")]


@pytest.fixture(params=WORLDS, ids=lambda world: f"{world.loop}-{world.mode}")
def world(request) -> Any:
    return request.param


class Ends:
    """Both ends of a stream; the server's run a callback or are handed out."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.problems: list[str] = []
        self.accepted: asyncio.Queue[Any] = asyncio.Queue()
        self.given: list[Any] = []

    def note_problem(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.problems.append(f"{context['message'].split('(')[0]}: {error!r}")

    async def hand_out(self, reader: Any, writer: Any) -> None:
        self.given.append(writer)
        self.accepted.put_nowait((reader, writer))

    @contextlib.asynccontextmanager
    async def connected(
        self, callback: Any = None, limit: int = 64 * KIB
    ) -> AsyncIterator[tuple[Any, Any]]:
        """Connect; gives the client's reader and writer."""
        streams, options = self.world.streams, self.world.options
        asyncio.get_running_loop().set_exception_handler(self.note_problem)
        server = await streams.start_server(
            callback or self.hand_out, HOST, 0, limit=limit, **options
        )
        port = server.sockets[0].getsockname()[1]
        reader, writer = await streams.open_connection(
            HOST, port, limit=limit, **options
        )
        if self.world.mode is not None:
            assert type(reader) is pysmc.StreamReader
            assert type(writer) is pysmc.StreamWriter
            assert writer.get_extra_info("smc").mode == self.world.mode
        try:
            yield reader, writer
        finally:
            server.close()
            writer.transport.abort()
            for back in self.given:
                back.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            await server.wait_closed()


def tell(story: Any, world: World) -> list[Any]:
    async def main() -> list[Any]:
        async with asyncio.timeout(PATIENCE):
            notes: list[Any] = await story(Ends(world))
            return notes

    with asyncio.Runner(loop_factory=world.factory) as runner:
        return runner.run(main())


@cache
def reference(story: Any) -> list[Any]:
    return tell(story, REFERENCE)


async def outcome(awaitable: Any) -> Any:
    """Give a result, or what kind of error it was."""
    try:
        return await awaitable
    except ConnectionResetError:
        return "reset"
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        return [type(error).__name__, str(error), error.args]
    except (ValueError, RuntimeError) as error:
        return [type(error).__name__, str(error)]


async def every_way_of_reading(ends: Ends) -> list[Any]:
    data = bytes(range(256)) * (4 * KIB)
    async with ends.connected() as (reader, writer):
        there, back = await ends.accepted.get()
        back.writelines([b"one\n", bytearray(b"two\r\nthree;;"), memoryview(b"four")])
        notes = [await reader.readline(), await reader.readuntil(b"\r\n")]
        notes += [await reader.readuntil(b";;"), await reader.readexactly(4)]
        assert back.can_write_eof()

        async def send() -> None:
            for start in range(0, len(data), 100_000):
                writer.write(data[start : start + 100_000])
                await writer.drain()
            writer.write_eof()

        sending = asyncio.ensure_future(send())
        exact = await there.readexactly(300_000)
        rest = await there.read()
        await sending
        assert exact + rest == data
        notes += [there.at_eof(), await there.read(5), await there.readline()]
        back.write(b"a\nb\nc")
        back.close()
        notes.append([line async for line in reader])
        notes += [back.is_closing(), writer.is_closing(), reader.at_eof()]
        return notes


async def lines_that_are_too_long(ends: Ends) -> list[Any]:
    async with ends.connected(limit=100) as (reader, _):
        _, back = await ends.accepted.get()
        back.write(bytes(150) + b"\n" + b"good\n" + bytes(90))
        notes = [await outcome(reader.readuntil(b"good\n"))]
        notes.append(await outcome(reader.readline()))
        notes.append(await outcome(reader.readline()))
        back.write_eof()
        notes.append(await outcome(reader.readexactly(91)))
        notes.append(await outcome(reader.readuntil(b"x")))
        return notes


async def giving_up(ends: Ends) -> list[Any]:
    async with ends.connected() as (reader, _):
        _, back = await ends.accepted.get()
        notes = []
        for ask in (reader.read(9), reader.readexactly(9), reader.readline()):
            task = asyncio.ensure_future(ask)
            await asyncio.sleep(0)
            notes.append(await outcome(reader.readuntil(b"x")))
            task.cancel()
            await asyncio.wait([task])
            notes.append(task.cancelled())
        back.write(b"all is well\n")
        notes.append(await reader.readline())
        return notes


async def writers_that_wait(ends: Ends) -> list[Any]:
    """Several drain one stream, and all go on when the reader reads."""
    async with ends.connected() as (_, writer):
        there, _ = await ends.accepted.get()
        data = os.urandom(KIB) * (32 * KIB)
        writer.write(data)
        drains = [asyncio.ensure_future(writer.drain()) for _ in range(3)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert not any(drain.done() for drain in drains)
        writer.write_eof()
        assert await there.read() == data
        return [await drain for drain in drains]


async def a_peer_that_aborts(ends: Ends) -> list[Any]:
    async with ends.connected() as (reader, writer):
        _, back = await ends.accepted.get()
        reading = asyncio.ensure_future(outcome(reader.readexactly(10)))
        writer.write(bytes(32 * KIB * KIB))
        draining = asyncio.ensure_future(outcome(writer.drain()))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not draining.done()
        back.transport.abort()
        notes = [await reading, await draining, await outcome(writer.drain())]
        notes += [await outcome(reader.read()), await outcome(writer.wait_closed())]
        return [*notes, writer.is_closing()]


async def writing_after_close(ends: Ends) -> list[Any]:
    async with ends.connected() as (_, writer):
        writer.close()
        turns: list[int] = []
        asyncio.get_running_loop().call_soon(turns.append, 1)
        notes = [await outcome(writer.drain()), turns]
        await writer.wait_closed()
        return [*notes, await outcome(writer.drain()), writer.is_closing()]


async def a_callback_that_fails(ends: Ends) -> list[Any]:
    async def fail(reader: Any, writer: Any) -> None:
        await reader.readline()
        raise LookupError("a mistake")

    async with ends.connected(fail) as (reader, writer):
        writer.write(b"go\n")
        notes = [await outcome(reader.read())]
    return [*notes, ends.problems]


async def a_callback_that_is_cancelled(ends: Ends) -> list[Any]:
    tasks: list[Any] = []

    async def stop(reader: Any, writer: Any) -> None:
        tasks.append((asyncio.current_task(), writer))
        await reader.readline()

    async with ends.connected(stop):
        while not tasks:
            await asyncio.sleep(0)
        task, writer = tasks[0]
        task.cancel()
        await asyncio.wait([task])
        for _ in range(5):
            await asyncio.sleep(0)
        # What becomes of the connection differs between the versions of Python.
        notes = [len(ends.problems), writer.is_closing()]
        writer.transport.abort()
    return notes


async def a_callback_that_keeps_nothing(ends: Ends) -> list[Any]:
    """Whether the protocol keeps the writer differs between the versions."""
    transports = []

    def forget(reader: Any, writer: Any) -> None:
        transports.append(writer.transport)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with ends.connected(forget):
            while not transports:
                await asyncio.sleep(0)
            gc.collect()
            notes = [transports[0].is_closing()]
            transports[0].abort()
        gc.collect()
    unclosed = [w for w in caught if "unclosed <StreamWriter" in str(w.message)]
    return [*notes, len(unclosed)]


async def a_client_that_forgets_its_streams(ends: Ends) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with ends.connected():
            _, back = await ends.accepted.get()
            streams, options = ends.world.streams, ends.world.options
            port = back.get_extra_info("sockname")[1]
            pair = await streams.open_connection(HOST, port, **options)
            there, _ = await ends.accepted.get()
            transport = pair[1].transport
            del pair
            gc.collect()
            notes = [transport.is_closing()]
            transport.abort()
            notes.append(await outcome(there.read()) in {b"", "reset"})
    unclosed = [w for w in caught if "unclosed <StreamWriter" in str(w.message)]
    return [*notes, len(unclosed)]


async def what_is_known(ends: Ends) -> list[Any]:
    async with ends.connected() as (_, writer):
        _, back = await ends.accepted.get()
        notes = []
        for end in (writer, back):
            notes.append(end.get_extra_info("no such thing", 7))
            notes.append(end.get_extra_info("peername")[0])
            notes.append(end.transport.is_closing())
            notes.append(type(end).__name__ in repr(end))
        mirrored = writer.get_extra_info("sockname") == back.get_extra_info("peername")
        return [*notes, mirrored]


STORIES = [
    every_way_of_reading, lines_that_are_too_long, giving_up, writers_that_wait,
    a_peer_that_aborts, writing_after_close, a_callback_that_fails,
    a_callback_that_is_cancelled, a_callback_that_keeps_nothing,
    a_client_that_forgets_its_streams, what_is_known,
]  # fmt: skip


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_it_is_as_with_asyncio_over_tcp(world, story) -> None:
    assert tell(story, world) == reference(story)


def test_both_ends_know_how_they_are_connected(world) -> None:
    async def story(ends: Ends) -> list[Any]:
        async with ends.connected() as (_, writer):
            _, back = await ends.accepted.get()
            return [end.get_extra_info("smc") for end in (writer, back)]

    client, server = tell(story, world)
    assert (client.mode, client.role) == (world.mode, "client")
    assert (server.mode, server.role) == (world.mode, "server")
