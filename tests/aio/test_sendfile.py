from __future__ import annotations

import asyncio
import hashlib
import io
from typing import IO, TYPE_CHECKING, Any

import pytest

import pysmc
from pysmc.config import Config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

SIZE = 5_000_001


@pytest.fixture
def file(tmp_path: Path) -> IO[bytes]:
    path = tmp_path / "file"
    path.write_bytes(bytes(i * 7 % 251 for i in range(256)) * (SIZE // 256 + 1))
    with path.open("r+b") as opened:
        opened.truncate(SIZE)
    return path.open("rb")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    pysmc.run(asyncio.wait_for(scenario, 20))


class Pair:
    """A transport over SMC-R, and what arrived at its other end."""

    def __init__(self, transport: asyncio.WriteTransport, received: bytearray) -> None:
        self.transport = transport
        self.received = received
        self.done = asyncio.Event()


async def connect() -> AsyncIterator[Pair]:
    received = bytearray()
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(1 << 16):
            received.extend(block)
        writer.close()
        await writer.wait_closed()
        done.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        assert writer.get_extra_info("smc").mode == "smcr"
        pair = Pair(writer.transport, received)
        pair.done = done
        yield pair
        writer.close()
        await writer.wait_closed()
        await done.wait()


@pytest.mark.parametrize(
    ("offset", "count"),
    [(0, None), (0, SIZE), (4096, 1_000_000), (SIZE - 1, 100), (SIZE, None), (7, 1)],
)
def test_every_byte_of_the_piece_arrives(
    file: IO[bytes], offset: int, count: int | None
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        stop = SIZE if count is None else min(SIZE, offset + count)
        async for pair in connect():
            sent = await loop.sendfile(pair.transport, file, offset, count)
            assert sent == stop - offset
            if sent:
                assert file.tell() == stop
            pair.transport.close()
            await pair.done.wait()
            file.seek(offset)
            expected = hashlib.sha256(file.read(sent)).digest()
            assert hashlib.sha256(pair.received).digest() == expected

    with file:
        run(scenario())


def test_what_was_written_before_and_after_keeps_its_place(file: IO[bytes]) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async for pair in connect():
            pair.transport.write(b"head")
            await loop.sendfile(pair.transport, file, 0, 100)
            pair.transport.write(b"tail")
            pair.transport.close()
            await pair.done.wait()
            assert pair.received[:4] == b"head"
            assert pair.received[-4:] == b"tail"
            assert len(pair.received) == 108

    with file:
        run(scenario())


def test_other_tasks_get_their_turn(file: IO[bytes]) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        turns = 0

        def tick() -> None:
            nonlocal turns
            turns += 1
            handle[0] = loop.call_soon(tick)

        async for pair in connect():
            handle = [loop.call_soon(tick)]
            await loop.sendfile(pair.transport, file)
            handle[0].cancel()
            assert turns >= SIZE // (16 * 64 * 1024)

    with file:
        run(scenario())


def test_a_file_without_a_descriptor_goes_asyncios_way() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async for pair in connect():
            assert await loop.sendfile(pair.transport, io.BytesIO(b"memory")) == 6
            pair.transport.close()
            await pair.done.wait()
            assert pair.received == b"memory"

    run(scenario())


def test_a_closing_transport_is_refused(file: IO[bytes]) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async for pair in connect():
            pair.transport.close()
            with pytest.raises(RuntimeError, match="closing"):
                await loop.sendfile(pair.transport, file)

    with file:
        run(scenario())


def test_the_end_of_the_connection_is_an_error(file: IO[bytes]) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        async def hang_up(_: Any, writer: asyncio.StreamWriter) -> None:
            writer.transport.abort()

        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            _, writer = await asyncio.open_connection("127.0.0.1", port)

            async def send_on() -> None:
                while True:
                    await loop.sendfile(writer.transport, file)

            with pytest.raises(ConnectionError):
                await send_on()
            writer.close()

    with file:
        run(scenario())


def test_nobody_writes_into_the_middle_of_a_file(kit, tmp_path) -> None:
    """As over TCP: neither bytes nor a second file, until the first one has gone."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4_000_000))

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.connected() as ends:
            transport = ends.client.transport
            with path.open("rb") as file, path.open("rb") as other:
                task = loop.create_task(loop.sendfile(transport, file))
                await asyncio.sleep(0)
                assert not task.done()
                for refused in (
                    lambda: transport.write(b"x"),
                    lambda: transport.writelines([b"x", b"y"]),
                ):
                    with pytest.raises(RuntimeError, match="sendfile is in progress"):
                        refused()
                with pytest.raises(RuntimeError, match="sendfile is in progress"):
                    await loop.sendfile(transport, other)
                assert await task == 4_000_000
            transport.write(b"end")
            await ends.server.until_bytes(4_000_003)
            assert ends.server.data == bytes(4_000_000) + b"end"

    kit.run(scenario)


def test_without_a_fallback_there_is_no_way(kit, tmp_path) -> None:
    """Memory is written; there is no call of the kernel that takes a file."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.connected() as ends:
            with path.open("rb") as file:
                with pytest.raises(asyncio.SendfileNotAvailableError):
                    await loop.sendfile(ends.client.transport, file, fallback=False)
                assert file.tell() == 0
                assert await loop.sendfile(ends.client.transport, file) == 100

    kit.run(scenario)


@pytest.mark.parametrize(
    ("offset", "count"),
    [(-1, None), (1.0, None), (None, None), (0, 0), (0, -1), (0, 1.5)],
)
def test_what_cannot_be_sent_is_refused_as_over_tcp(kit, file, offset, count) -> None:
    async def scenario() -> str:
        loop = asyncio.get_running_loop()
        async with kit.connected() as ends:
            with pytest.raises((TypeError, ValueError)) as caught:
                await loop.sendfile(ends.client.transport, file, offset, count)
            assert not ends.server.data
            return f"{caught.type.__name__}: {caught.value}"

    with file:
        over_smcr = kit.run(scenario)
        assert over_smcr == kit.run(scenario, config=Config(discovery=()))


def test_a_text_file_is_refused_as_over_tcp(kit, config, tmp_path) -> None:
    path = tmp_path / "text"
    path.write_text("not bytes")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.connected() as ends:
            with pytest.raises(ValueError, match="opened in binary mode"):
                await loop.sendfile(ends.client.transport, file)

    with path.open() as file:
        kit.run(scenario, config=config)


async def begin_to_send(kit, file, ends) -> asyncio.Task[int]:
    """Send a file until the peer's memory is full."""
    client, server = ends.transports
    server.pause_reading()
    sending = asyncio.ensure_future(
        asyncio.get_running_loop().sendfile(client, file, 0, None)
    )
    while not client.get_write_buffer_size():
        await asyncio.sleep(0)
    return sending


@pytest.mark.parametrize("first", ["cancel", "abort"])
def test_the_end_is_told_when_sending_is_cancelled_with_it(kit, file, first) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            sending = await begin_to_send(kit, file, ends)
            steps = [sending.cancel, ends.client.transport.abort]
            for step in steps if first == "cancel" else steps[::-1]:
                step()
            with pytest.raises(asyncio.CancelledError):
                await sending
            await ends.client.until_call("lost")
            assert ends.client.calls[-1] == "lost"

    kit.run(scenario)
    file.close()


def test_nothing_is_told_after_the_end(kit, file) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            client, server = ends.transports
            server.pause_reading()
            client.write(bytes(3 << 20))
            assert ends.client.calls == ["made", "pause_writing"]
            loop = asyncio.get_running_loop()
            sending = asyncio.ensure_future(loop.sendfile(client, file, 0, None))
            await asyncio.sleep(0)
            server.abort()
            with pytest.raises(ConnectionError):
                await sending
            await ends.client.until_call("lost")
            assert ends.client.calls == ["made", "pause_writing", "lost"]

    kit.run(scenario)
    file.close()


def test_a_protocol_learns_of_what_a_cancelled_file_left(kit, file) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            sending = await begin_to_send(kit, file, ends)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert ends.client.calls == ["made", "pause_writing"]
            ends.server.transport.resume_reading()
            await ends.client.until_call("resume_writing")

    kit.run(scenario)
    file.close()


class Room(asyncio.BufferedProtocol):
    """Gives 1000 bytes of room at a time."""

    def __init__(self) -> None:
        self.room, self.data = bytearray(1000), bytearray()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.room

    def buffer_updated(self, nbytes: int) -> None:
        self.data += self.room[:nbytes]


@pytest.mark.parametrize("kind", ["protocol", "buffered"])
def test_who_sends_a_file_may_read_on(kit, file, kind) -> None:
    async def scenario() -> None:
        make = Room if kind == "buffered" else kit.Recorder
        async with kit.connected(client=make) as ends:
            client, server = ends.transports
            sending = await begin_to_send(kit, file, ends)
            client.resume_reading()
            server.write(bytes(range(250)) * 10)
            server.write_eof()
            while len(ends.client.data) < 2500:
                await asyncio.sleep(0)
            assert ends.client.data == bytes(range(250)) * 10
            sending.cancel()
            with pytest.raises((asyncio.CancelledError, ConnectionError)):
                await sending
            client.abort()

    kit.run(scenario)
    file.close()
