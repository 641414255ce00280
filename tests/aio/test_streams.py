"""Our StreamReader and StreamWriter: what they keep, give and wait for."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from typing import Any

import pytest

import pysmc
from pysmc.aio import streams
from tests.aio.streams_player import SETTLED_TURNS, FakeTransport

KIB = 1024


def run(scenario) -> Any:
    with asyncio.Runner() as runner:
        return runner.run(scenario)


async def settle() -> None:
    for _ in range(SETTLED_TURNS):
        await asyncio.sleep(0)


def make(limit: int = streams.STREAM_LIMIT) -> tuple[Any, Any]:
    reader = pysmc.StreamReader(limit=limit)
    transport = FakeTransport(can_pause=True)
    reader.set_transport(transport)
    return reader, transport


def test_they_are_of_asyncio() -> None:
    assert issubclass(pysmc.StreamReader, asyncio.StreamReader)
    assert issubclass(pysmc.StreamWriter, asyncio.StreamWriter)


def test_a_chunk_that_is_read_whole_is_not_copied() -> None:
    async def scenario() -> None:
        reader, _ = make()
        chunks = [bytes(64 * KIB) for _ in range(3)]
        for chunk in chunks:
            reader.feed_data(chunk)
        assert await reader.read(64 * KIB) is chunks[0]
        assert await reader.readexactly(64 * KIB) is chunks[1]
        reader.feed_eof()
        assert await reader.read() is chunks[2]
        assert await reader.read() == b""

    run(scenario())


def splits(data: bytes) -> list[list[bytes]]:
    """Cut data into pieces in every way there is."""
    found = []
    for count in range(len(data)):
        for cuts in itertools.combinations(range(1, len(data)), count):
            edges = (0, *cuts, len(data))
            found.append([data[a:b] for a, b in itertools.pairwise(edges)])
    return found


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("small", [0, streams.SMALL_BYTES])
@pytest.mark.parametrize(
    ("separator", "line"),
    [
        (b"\n", b"aa;a;b\n"),
        (b";a;", b"aa;a;"),
        (b"a;b\n", b"aa;a;b\n"),
        ((b";", b"a;"), b"aa;"),
        ((b"\n", b"a;b", b"x"), b"aa;a;b"),
    ],
)
def test_separators_that_are_cut_in_every_way(
    monkeypatch, waits, small, separator, line
) -> None:
    monkeypatch.setattr(streams, "SMALL_BYTES", small)
    whole = b"aa;a;b\nxy"

    async def scenario() -> None:
        for pieces in splits(whole):
            reader, _ = make()
            reader.feed_data(b"gone")
            reader.feed_data(b"!" + pieces[0])
            assert await reader.readexactly(5) == b"gone!"
            task = asyncio.ensure_future(reader.readuntil(separator))
            for piece in pieces[1:]:
                if waits:
                    await settle()
                reader.feed_data(piece)
            reader.feed_eof()
            assert await task == line, pieces
            assert await reader.read() == whole[len(line) :]

    run(scenario())


def test_of_two_that_end_together_the_shorter_counts() -> None:
    async def scenario() -> None:
        reader, _ = make(limit=3)
        reader.feed_data(b"xxxa\n")
        with pytest.raises(asyncio.LimitOverrunError) as caught:
            await reader.readuntil((b"a\n", b"\n"))
        assert caught.value.consumed == 4
        assert await reader.readuntil((b"a\n", b"?")) == b"xxxa\n"

    run(scenario())


@pytest.mark.parametrize(("separator", "text"), [(b"", "one-byte"), ((), "element")])
def test_separators_that_are_none(separator, text) -> None:
    async def scenario() -> None:
        reader, _ = make()
        reader.feed_data(b"data")
        with pytest.raises(ValueError, match=text):
            await reader.readuntil(separator)

    run(scenario())


@pytest.mark.parametrize(
    ("limit", "above"), [(streams.STREAM_LIMIT, 512 * KIB), (10, 20), (3000, 6000)]
)
def test_when_the_transport_is_paused(limit, above) -> None:
    async def scenario() -> None:
        reader, transport = make(limit)
        reader.feed_data(bytes(above))
        assert not transport.is_paused
        reader.feed_data(b"x")
        assert transport.is_paused
        assert "paused" in repr(reader)
        await reader.readexactly(above // 2)
        assert transport.is_paused
        await reader.readexactly(1)
        assert not transport.is_paused

    run(scenario())


def test_lines_are_as_long_as_asyncio_allows() -> None:
    async def scenario() -> None:
        reader, _ = make()
        reader.feed_data(bytes(64 * KIB) + b"\n")
        assert len(await reader.readline()) == 64 * KIB + 1
        reader.feed_data(bytes(64 * KIB + 1) + b"\n")
        with pytest.raises(ValueError, match="longer than limit"):
            await reader.readline()
        assert reader._buffer == b""

    run(scenario())


@pytest.mark.parametrize("wanted", [100, -1])
def test_who_waits_for_much_wakes_once_and_stops_nobody(wanted) -> None:
    async def scenario() -> None:
        reader, transport = make(limit=4)
        asked = reader.readexactly(wanted) if wanted > 0 else reader.read()
        task = asyncio.ensure_future(asked)
        await settle()
        waiter = reader._waiter
        for _ in range(10):
            assert reader._waiter is waiter
            reader.feed_data(bytes(10))
            await settle()
        assert transport.calls == []
        reader.feed_eof()
        assert await task == bytes(100)

    run(scenario())


def test_a_transport_that_was_paused_goes_on_for_who_waits() -> None:
    async def scenario() -> None:
        reader, transport = make(limit=4)
        reader.feed_data(bytes(9))
        task = asyncio.ensure_future(reader.readexactly(12))
        await settle()
        assert transport.calls == ["pause", "resume"]
        reader.feed_data(bytes(3))
        assert await task == bytes(12)
        assert transport.calls == ["pause", "resume"]

    run(scenario())


def test_who_gave_up_leaves_what_had_come() -> None:
    async def scenario() -> None:
        for ask in ("read", "readline", "readexactly"):
            reader, transport = make(limit=40)
            arguments = (50,) if ask == "readexactly" else ()
            task = asyncio.ensure_future(getattr(reader, ask)(*arguments))
            await settle()
            reader.feed_data(b"kept")
            await settle()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            reader.feed_data(b" all" * 20)
            assert transport.is_paused, "nobody waits any more"
            assert await reader.readexactly(84) == b"kept" + b" all" * 20

    run(scenario())


def test_who_was_woken_learns_that_the_connection_was_lost() -> None:
    """asyncio's reader waits for ever: it looks at the error only when asked."""

    async def scenario() -> None:
        for ask in ("readline", "readexactly"):
            reader, _ = make()
            arguments = (50,) if ask == "readexactly" else ()
            task = asyncio.ensure_future(getattr(reader, ask)(*arguments))
            await settle()
            reader.feed_data(b"half")
            reader.set_exception(ConnectionResetError("gone"))
            with pytest.raises(ConnectionResetError, match="gone"):
                await asyncio.wait_for(task, 5)

    run(scenario())


def test_whose_bytes_another_took_waits_on() -> None:
    """asyncio's reader gives the first no bytes, as if the stream had ended."""

    async def scenario() -> None:
        reader, _ = make()
        first = asyncio.ensure_future(reader.read(1))
        await settle()
        second = asyncio.ensure_future(reader.read(1))
        reader.feed_data(b"2")
        assert await second == b"2"
        await settle()
        reader.feed_data(b"1")
        assert await asyncio.wait_for(first, 5) == b"1"

    run(scenario())


def test_the_second_of_two_who_wait_is_not_forgotten() -> None:
    """asyncio's first one, once woken, forgets the waiter of the second."""

    async def scenario() -> None:
        reader, _ = make()
        first = asyncio.ensure_future(reader.read(1))
        await settle()
        second = asyncio.ensure_future(reader.readexactly(2))
        reader.feed_data(b"1")
        await settle()
        assert await first == b"1"
        reader.feed_data(b"22")
        assert await asyncio.wait_for(second, 5) == b"22"

    run(scenario())


def test_small_pieces_grow_together() -> None:
    async def scenario() -> None:
        reader, _ = make()
        for _ in range(100_000):
            reader.feed_data(b"xy")
        assert len(reader._chunks) < 20
        large = bytes(64 * KIB)
        reader.feed_data(large)
        assert await reader.readexactly(200_000) == b"xy" * 100_000
        assert await reader.read(64 * KIB) is large

    run(scenario())


@pytest.mark.parametrize("data", [bytearray(b"abc"), memoryview(b"abc"), [97, 98, 99]])
def test_other_kinds_of_data_are_copied(data) -> None:
    async def scenario() -> None:
        reader, _ = make()
        reader.feed_data(data)
        if isinstance(data, bytearray):
            data[:] = b"xxx"
        found = await reader.read(10)
        assert type(found) is bytes
        assert found == b"abc"

    run(scenario())


@pytest.mark.parametrize("data", ["text", 5, [1000]])
def test_what_is_no_data_is_refused_as_by_asyncio(data) -> None:
    async def scenario(cls) -> tuple[type, str, bytes]:
        reader = cls()
        with pytest.raises((TypeError, ValueError)) as caught:
            reader.feed_data(data)
        return type(caught.value), str(caught.value), bytes(reader._buffer)

    assert run(scenario(pysmc.StreamReader)) == run(scenario(asyncio.StreamReader))


def test_who_looks_at_the_buffer_sees_it_and_can_only_clear_it() -> None:
    async def scenario() -> None:
        reader, _ = make()
        assert not reader._buffer
        reader.feed_data(b"a\n")
        reader.feed_data(bytes(2000))
        await reader.readline()
        assert len(reader._buffer) == 2000
        with pytest.raises(TypeError):
            del reader._buffer[:10]
        with pytest.raises(AttributeError):
            reader._buffer.extend(b"more")
        assert reader._buffer == bytes(2000)
        # As asyncio's start_tls does with what belongs to TLS, in its latest releases.
        tls = ssl.MemoryBIO()
        buffer = reader._buffer
        tls.write(buffer)
        buffer.clear()
        assert tls.read() == bytes(2000)
        assert not reader._buffer
        reader.feed_data(b"next")
        assert await reader.read(10) == b"next"

    run(scenario())


def test_a_transport_that_cannot_be_paused_is_asked_once() -> None:
    async def scenario() -> None:
        reader = pysmc.StreamReader(limit=1)
        reader.set_transport(FakeTransport(can_pause=False))
        with pytest.raises(AssertionError, match="already set"):
            reader.set_transport(FakeTransport(can_pause=False))
        reader.feed_data(b"abc")
        assert reader._transport is None
        reader.feed_data(b"def")
        assert await reader.read(10) == b"abcdef"

    run(scenario())


def test_who_was_paused_stays_so_with_tls_between() -> None:
    async def scenario() -> None:
        reader, _ = make(limit=1)
        for data in (b"a", b"bcd"):
            reader.feed_data(data)
            over = FakeTransport(can_pause=True)
            reader.replace_transport(over)
            assert over.is_paused is (data == b"bcd")
        assert await reader.read(10) == b"abcd"
        assert not over.is_paused

    run(scenario())


def test_nothing_comes_after_the_end() -> None:
    async def scenario() -> None:
        reader, _ = make()
        reader.feed_eof()
        with pytest.raises(AssertionError, match="feed_data after feed_eof"):
            reader.feed_data(b"x")
        assert reader.at_eof()
        assert [line async for line in reader] == []

    run(scenario())


def test_lines_in_a_loop() -> None:
    async def scenario() -> None:
        reader, _ = make()
        reader.feed_data(b"one\ntwo\n" + bytes(2000))
        reader.feed_data(b"\nlast")
        reader.feed_eof()
        lines = [line async for line in reader]
        assert lines == [b"one\n", b"two\n", bytes(2000) + b"\n", b"last"]

    run(scenario())


def test_it_looks_like_asyncio_s() -> None:
    async def looks(cls) -> list[str]:
        reader = cls(limit=5)
        seen = [repr(reader)]
        reader.feed_data(b"abc")
        seen.append(repr(reader))
        transport = FakeTransport(can_pause=True)
        reader.set_transport(transport)
        reader.feed_data(bytes(10))
        seen.append(repr(reader))
        task = asyncio.ensure_future(reader.readexactly(20))
        await settle()
        seen.append(repr(reader).split(" cb=")[0])
        reader.set_exception(OSError("it broke"))
        with pytest.raises(OSError, match="it broke"):
            await task
        with pytest.raises(OSError, match="it broke"):
            await reader.readexactly(1)
        reader.feed_eof()
        return [*seen, repr(reader)]

    assert run(looks(pysmc.StreamReader)) == run(looks(asyncio.StreamReader))
