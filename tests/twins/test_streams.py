"""Twins of test_streams.StreamTests: streams to a server that was a raw one."""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import Any

import pytest

GET = b"GET / HTTP/1.0\r\n\r\n"


async def ask(reader: Any, writer: Any) -> None:
    """Get the page, as most of the originals do."""
    writer.write(GET)
    assert await reader.readline() == b"HTTP/1.0 200 OK\r\n"
    assert (await reader.read()).endswith(b"\r\n\r\nTest message")


# --- open_connection


def test_open_connection(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            reader, writer = await asyncio.open_connection(*address)
            await ask(reader, writer)
            writer.close()

    lane.run(scenario)


def test_open_connection_no_loop_ssl(lane) -> None:
    async def answer(peer) -> None:
        await peer.start_tls(lane.tls.server(), server_side=True)
        await peer.recv_until(b"\r\n\r\n")
        await peer.send(b"HTTP/1.0 200 OK\r\n\r\nTest message")

    async def scenario() -> None:
        async with lane.serve(answer) as address:
            reader, writer = await asyncio.open_connection(
                *address, ssl=lane.tls.client()
            )
            asyncio.set_event_loop(None)
            await ask_all(reader, writer)
            writer.close()
            await writer.wait_closed()

    async def ask_all(reader, writer) -> None:
        writer.write(GET)
        assert (await reader.read()).endswith(b"\r\n\r\nTest message")

    lane.run(scenario)


def test_open_connection_error(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            reader, writer = await asyncio.open_connection(*address)
            protocol: Any = writer.transport.get_protocol()
            protocol.connection_lost(ZeroDivisionError())
            with pytest.raises(ZeroDivisionError):
                await reader.read()
            writer.close()
            await asyncio.sleep(0)

    lane.run(scenario)


# --- drain and wait_closed


def test_drain_raises(lane) -> None:
    """A writer that never waits for anything else learns that its peer has closed."""

    async def close_at_once(peer) -> None:
        peer.close()

    async def write_for_ever(writer) -> None:
        while True:
            writer.write(b"foo\n" * 1024)
            await writer.drain()

    async def scenario() -> None:
        async with lane.serve(close_at_once) as address:
            _, writer = await asyncio.open_connection(*address)
            with pytest.raises(
                (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
            ):
                await write_for_ever(writer)

    lane.run(scenario)


def test_wait_closed_on_close(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            reader, writer = await asyncio.open_connection(*address)
            await ask(reader, writer)
            assert not writer.is_closing()
            writer.close()
            assert writer.is_closing()
            await writer.wait_closed()

    lane.run(scenario)


def test_wait_closed_on_close_with_unread_data(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(GET)
            assert await reader.readline() == b"HTTP/1.0 200 OK\r\n"
            writer.close()
            await writer.wait_closed()

    lane.run(scenario)


def test_async_writer_api(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            reader, writer = await asyncio.open_connection(*address)
            await ask(reader, writer)
            writer.close()
            await writer.wait_closed()

    lane.run(scenario)


def test_async_writer_api_exception_after_close(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            reader, writer = await asyncio.open_connection(*address)
            await ask(reader, writer)
            writer.close()
            writer.write(b"data")
            with pytest.raises(ConnectionResetError):
                await writer.drain()

    lane.run(scenario)


def test_eof_feed_when_closing_writer(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.close()
            await writer.wait_closed()
            assert reader.at_eof()
            assert await reader.read() == b""

    lane.run(scenario)


# --- writers that nobody closed


def forget(held: list[Any]) -> None:
    """Let go of what is in the list, and of cycles that hold it."""
    held.clear()
    gc.collect()


def unclosed(warned) -> list[str]:
    """What was said, but for the transport's own words about the same matter."""
    said = [str(warning.message) for warning in warned]
    return [text for text in said if not text.startswith("unclosed transport")]


def test_unclosed_resource_warnings(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            reader, writer = await asyncio.open_connection(*address)
            await ask(reader, writer)
            held = [writer]
            del writer
            with pytest.warns(ResourceWarning) as warned:
                forget(held)
            assert len(warned) == 1
            assert str(warned[0].message).startswith("unclosed <StreamWriter")

    lane.run(scenario)


def test_loop_is_closed_resource_warnings(lane) -> None:
    """The loop is stopped under a coroutine, and closed before its writer goes."""
    gate = asyncio.Event()

    async def inner() -> Any:
        async with lane.http_server() as address:
            reader, writer = await asyncio.open_connection(*address)
            await ask(reader, writer)
            lane.loop.stop()
            await gate.wait()
        return writer

    with lane.opened() as loop:
        task = loop.create_task(inner())
        with pytest.raises(RuntimeError, match="stopped before Future completed"):
            loop.run_until_complete(task)
        gate.set()
        loop.run_until_complete(task)
    held = [task]
    del task, loop
    with pytest.warns(ResourceWarning) as warned:
        forget(held)
    said = [text for text in unclosed(warned) if "socket" not in text]
    assert said == ["loop is closed"]
    assert lane.problems == []
    lane.check(1)


if sys.version_info >= (3, 13):  # before, a server's protocol keeps its writer

    def test_unclosed_server_resource_warnings(lane) -> None:
        async def connect(peer) -> None:
            assert await peer.recv(1) == b""

        async def scenario() -> None:
            said = lane.loop.create_future()

            async def inner(reader, writer) -> None:
                held = [writer]
                del writer
                with pytest.warns(ResourceWarning) as warned:
                    forget(held)
                said.set_result([str(warning.message) for warning in warned])

            server = await asyncio.start_server(inner, lane.host, 0)
            async with server:
                visit = lane.visit(connect, server.sockets[0].getsockname())
                (text,) = await said
                assert text.startswith("unclosed <StreamWriter")
                await visit

        lane.run(scenario)
