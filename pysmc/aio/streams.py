"""Our StreamReader and StreamWriter: asyncio's, without its limit of speed.

Decides how what arrives is kept until somebody reads it: as the very objects that
arrived, in a row. asyncio's reader copies everything into one bytearray and out of it
again, and stops the transport every 128 KiB, which holds every transport down to some
2 GB/s. Everything that a program sees is asyncio's, but for five things, all of them
to its good:

* With the default limit the transport is paused above 512 KiB. Lines are as long as
  asyncio allows.
* `readexactly` and `read(-1)` wake when what they want is there, and the transport is
  not paused before.
* A cancelled ``read(-1)`` loses nothing.
* A cancelled `wait_closed` does not cancel those who wait after it.
* A read that finds out after it was woken that the connection is lost raises, and does
  not wait for ever.

The protocol between transport and streams is asyncio's own, so who keeps a server's
writer and how errors of its callback are reported is as in the running version.

Source: asyncio/streams.py of CPython 3.11 to 3.13; the asyncio documentation,
"Streams".
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from pysmc.aio import cpython, tls

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from pysmc.info import ConnectionInfo

__all__ = [
    "STREAM_LIMIT",
    "StreamReader",
    "StreamWriter",
    "client_protocol",
    "serve_with",
]

STREAM_LIMIT = 2**16
"""asyncio's own default of a reader's limit in bytes."""
PAUSE_BYTES = 512 * 1024
"""Unread bytes above which the transport is paused with the default limit.

asyncio's 128 KiB are two slices of SMC-R: the reader then runs dry in every turn of the
loop, which halves the throughput.
"""
SMALL_BYTES = 1024
"""What arrives in pieces below this, and is not read at once, grows together."""
GROWN_BYTES = 16 * 1024
"""Size at which such a piece is left alone."""

Chunk = bytes | bytearray


class _Unread(bytes):
    """A copy of what a reader has; it can be cleared, for asyncio's own start_tls.

    Patch releases from 2026 on write a server's unread bytes to TLS, and clear them.
    """

    reader: StreamReader

    def clear(self) -> None:
        """Take everything that is unread out of the reader."""
        self.reader.take_unread()


class StreamReader(asyncio.StreamReader):
    """Keeps what arrives until it is read.

    Args:
        limit: Longest line, and longest result of `readuntil`, in bytes without the
            separator. The transport is paused above twice as many unread bytes (with
            the default limit above 512 KiB), unless somebody waits for more than that.
        loop: The running one by default.

    Raises:
        ValueError: The limit is not positive.

    Reference: the asyncio documentation, "Streams".
    """

    _loop: asyncio.AbstractEventLoop
    _limit: int
    _eof: bool
    _waiter: asyncio.Future[None] | None
    _exception: BaseException | None
    _transport: Any
    _paused: bool

    def __init__(
        self, limit: int = STREAM_LIMIT, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(limit, loop)
        self._chunks: deque[Chunk] = deque()
        self._start = 0  # of what is unread in the first chunk
        self._size = 0  # unread bytes
        self._wanted = 0  # a waiter sleeps while there are fewer, and will take so many
        self._pause_above = PAUSE_BYTES if limit == STREAM_LIMIT else 2 * limit

    def __repr__(self) -> str:
        words = [type(self).__name__]
        if self._size:
            words.append(f"{self._size} bytes")
        if self._eof:
            words.append("eof")
        if self._limit != STREAM_LIMIT:
            words.append(f"limit={self._limit}")
        if self._waiter:
            words.append(f"waiter={self._waiter!r}")
        if self._exception:
            words.append(f"exception={self._exception!r}")
        if self._transport:
            words.append(f"transport={self._transport!r}")
        if self._paused:
            words.append("paused")
        return f"<{' '.join(words)}>"

    @property
    def _buffer(self) -> bytes:
        """What is unread, for programs that look where they should not.

        A copy, and one that cannot be changed: they may look, and clear it; they fail
        loudly when they try to take out a part.
        """
        unread = _Unread(b"".join(self._chunks)[self._start :])
        unread.reader = self
        return unread

    @_buffer.setter
    def _buffer(self, value: object) -> None:
        """Let asyncio's constructor have its way."""

    # What the protocol says

    def set_transport(self, transport: asyncio.BaseTransport) -> None:
        """Say which transport is to be paused."""
        assert self._transport is None, "Transport already set"
        self._transport = transport

    def replace_transport(self, transport: asyncio.BaseTransport) -> None:
        """Say which transport is to be paused from now on, with TLS between."""
        self._transport = transport
        if self._paused:
            self._transport.pause_reading()

    def exception(self) -> Any:
        """Give what set_exception set."""
        return self._exception

    def set_exception(self, exc: BaseException) -> None:
        """End the stream with an error."""
        self._exception = exc
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.cancelled():
            waiter.set_exception(exc)

    def feed_eof(self) -> None:
        """Say that no more will come."""
        self._eof = True
        self._wake()

    def feed_data(self, data: Any) -> None:
        """Keep what arrived; bytes as the object that they are."""
        assert not self._eof, "feed_data after feed_eof"
        if not data:
            return
        if type(data) is not bytes:
            data, given = bytearray(), data
            data.extend(given)
        self._size += len(data)
        chunks = self._chunks
        if chunks and len(data) < SMALL_BYTES:
            self._append_small(data)
        else:
            chunks.append(data)
        if self._waiter is not None:
            if self._size < self._wanted:
                return
            self._wake()
        if (
            self._size > self._pause_above + self._wanted
            and not self._paused
            and self._transport is not None
        ):
            self._pause()

    def _append_small(self, data: Chunk) -> None:
        """Put small pieces together: each object costs more than its bytes."""
        last = self._chunks[-1]
        if type(last) is bytearray and len(last) < GROWN_BYTES:
            last += data
        else:
            self._chunks.append(bytearray(data))

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.cancelled():
            waiter.set_result(None)

    def _pause(self) -> None:
        try:
            self._transport.pause_reading()
        except NotImplementedError:
            self._transport = None  # it cannot: do not ask it again
        else:
            self._paused = True

    def take_unread(self) -> bytes:
        """Take everything that nobody has read: it is not for the program."""
        return self._take(self._size)

    # What the program asks

    def at_eof(self) -> bool:
        """Tell whether everything was read and no more will come."""
        return self._eof and not self._size

    async def read(self, n: int = -1) -> bytes:
        """Read what is there, or everything until the end.

        Args:
            n: Most bytes; negative for all until the end of the stream.

        Returns:
            At least one byte, unless the stream is at its end or `n` is 0.

        Raises:
            Exception: Whatever ended the connection.
        """
        if self._exception is not None:
            raise self._exception
        if n == 0:
            return b""
        if n < 0:
            while not self._eof:
                await self._wait_for_data("read", sys.maxsize)
            return self._take(self._size)
        while not self._size and not self._eof:
            await self._wait_for_data("read")
        return self._take(min(n, self._size))

    async def readexactly(self, n: int) -> bytes:
        """Read exactly n bytes.

        Args:
            n: Bytes; not negative. May be more than the limit.

        Raises:
            ValueError: n is negative.
            asyncio.IncompleteReadError: The stream ended before; what there was is
                in its `partial`.
            Exception: Whatever ended the connection.
        """
        if n < 0:
            message = "readexactly size can not be less than zero"
            raise ValueError(message)
        if self._exception is not None:
            raise self._exception
        while self._size < n:
            if self._eof:
                raise asyncio.IncompleteReadError(self._take(self._size), n)
            await self._wait_for_data("readexactly", n)
        return self._take(n)

    async def readline(self) -> bytes:
        r"""Read until ``\n``, which is part of the result.

        Returns:
            A line; without ``\n`` only at the end of the stream, where it may be empty.

        Raises:
            ValueError: The line is longer than the limit; it was dropped, or as much of
                it as was there.
            Exception: Whatever ended the connection.
        """
        line = self._take_through(b"\n")
        if line is not None:
            return line
        try:
            return await self.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return error.partial
        except asyncio.LimitOverrunError as error:
            # One byte further when the separator was found.
            self._take(min(error.consumed + 1, self._size))
            raise ValueError(error.args[0]) from error

    async def readuntil(self, separator: Any = b"\n") -> bytes:
        """Read until a separator, which is part of the result.

        Args:
            separator: At least one byte; or a tuple of separators, of which the one
                that ends first counts.

        Raises:
            ValueError: A separator is empty, or there is none.
            asyncio.LimitOverrunError: There are more than `limit` bytes before it;
                nothing was taken.
            asyncio.IncompleteReadError: The stream ended before; what there was is
                in its `partial`.
            Exception: Whatever ended the connection.
        """
        if type(separator) is bytes:
            data = self._take_through(separator)
            if data is not None:
                return data
        separators = _sorted_separators(separator)
        if self._exception is not None:
            raise self._exception
        begin, end = await self._search(separators)
        if begin > self._limit:
            message = "Separator is found, but chunk is longer than limit"
            raise asyncio.LimitOverrunError(message, begin)
        return self._take(end)

    async def _search(self, separators: Sequence[bytes]) -> tuple[int, int]:
        """Wait until a separator is there; gives where it begins and ends."""
        shortest, longest = len(separators[0]), len(separators[-1])
        offset = 0  # no separator begins before this
        while True:
            if self._size - offset >= shortest:
                found = self._find(separators, longest, offset)
                if found is not None:
                    return found
                offset = max(0, self._size + 1 - longest)
                if offset > self._limit:
                    message = "Separator is not found, and chunk exceed the limit"
                    raise asyncio.LimitOverrunError(message, offset)
            if self._eof:
                raise asyncio.IncompleteReadError(self._take(self._size), None)
            await self._wait_for_data("readuntil")

    async def _wait_for_data(self, caller: str, wanted: int = 0) -> None:
        """Wait until more bytes are there, or so many in all, or the end.

        Raises:
            RuntimeError: Somebody waits already.
            Exception: Whatever ended the connection.
        """
        if self._waiter is not None:
            message = (
                f"{caller}() called while another coroutine is "
                f"already waiting for incoming data"
            )
            raise RuntimeError(message)
        if self._exception is not None:
            raise self._exception
        assert not self._eof, "_wait_for_data after EOF"
        if self._paused:  # what is waited for could not come
            self._paused = False
            self._transport.resume_reading()
        self._wanted = wanted
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._wanted = 0
            if self._waiter is waiter:
                self._waiter = None

    # What is unread

    def _find(
        self, separators: Sequence[bytes], longest: int, offset: int
    ) -> tuple[int, int] | None:
        """Find where the separator begins and ends that ends first.

        Args:
            separators: The shortest first.
            longest: Bytes of the longest.
            offset: Unread bytes before which none begins.
        """
        chunks = self._chunks
        index, base = 0, -self._start
        if offset:  # all but what is new was searched
            index, base = len(chunks), self._size
            while base > offset:
                index -= 1
                base -= len(chunks[index])
        while index < len(chunks):
            chunk = chunks[index]
            start = max(offset - base, 0)
            found = _first(chunk, separators, start)
            if found is None and longest > 1 and index + 1 < len(chunks):
                # It may lie across the edge.
                start = max(start, len(chunk) - longest + 1)
                edge = chunk[start:] + self._after(index, longest - 1)
                found = _first(edge, separators, 0)
                base += start if found else 0
            if found is not None:
                return base + found[0], base + found[1]
            base += len(chunk)
            index += 1
        return None

    def _after(self, index: int, count: int) -> Chunk:
        """Give the first bytes behind a chunk, or as many as there are."""
        after = bytearray()
        while len(after) < count and index + 1 < len(self._chunks):
            index += 1
            after += self._chunks[index][: count - len(after)]
        return after

    def _take(self, count: int) -> bytes:
        """Take unread bytes out, as one object; let the transport go on if it may.

        A chunk that is taken whole is not copied, and others only once.
        """
        chunks, start = self._chunks, self._start
        end = start + count
        self._size -= count
        data: Chunk
        if chunks and end <= (whole := len(chunks[0])):
            data = chunks[0][start:end]
            if end == whole:
                chunks.popleft()
                end = 0
            self._start = end
            if type(data) is not bytes:
                data = bytes(data)
        else:
            data = self._take_several(count)
        if self._paused and self._size <= self._pause_above // 2:
            self._paused = False
            self._transport.resume_reading()
        return data

    def _take_several(self, count: int) -> bytes:
        chunks, start = self._chunks, self._start
        pieces: list[Any] = []
        while count:
            chunk = chunks[0]
            size = len(chunk) - start
            if size > count:
                pieces.append(memoryview(chunk)[start : start + count])
                start += count
                break
            pieces.append(memoryview(chunk)[start:] if start else chunk)
            chunks.popleft()
            count -= size
            start = 0
        self._start = start
        return b"".join(pieces)

    def _take_through(self, separator: bytes) -> bytes | None:
        """Take what ends with a separator, if that is whole in the first chunk.

        The quick way of most lines; `_find` knows the others.
        """
        if not self._size or not separator or self._exception is not None:
            return None
        start = self._start
        begin = self._chunks[0].find(separator, start) - start
        if not 0 <= begin <= self._limit:
            return None
        return self._take(begin + len(separator))


def _sorted_separators(separator: Any) -> Sequence[bytes]:
    """Give the shortest first: of two that end at the same place it is the match."""
    several = isinstance(separator, tuple)
    separators = sorted(separator, key=len) if several else [separator]
    if not separators:
        message = "Separator should contain at least one element"
        raise ValueError(message)
    if len(separators[0]) == 0:
        message = "Separator should be at least one-byte string"
        raise ValueError(message)
    return separators


def _first(
    chunk: Chunk, separators: Sequence[bytes], start: int
) -> tuple[int, int] | None:
    """Find the separator that ends first."""
    best: tuple[int, int] | None = None
    for separator in separators:
        begin = chunk.find(separator, start)
        if begin >= 0:
            end = begin + len(separator)
            if best is None or end < best[1]:
                best = begin, end
    return best


class StreamWriter(asyncio.StreamWriter):
    """Writes to a connection; ``get_extra_info("smc")`` always knows how it runs.

    Args:
        transport: What carries the bytes.
        protocol: The stream's protocol.
        reader: The stream's reader.
        loop: The running loop.
        info: What ``get_extra_info("smc")`` answers; the transport's by default.

    Reference: the asyncio documentation, "Streams".
    """

    _loop: asyncio.AbstractEventLoop
    _protocol: asyncio.StreamReaderProtocol
    _reader: asyncio.StreamReader | None
    _info: ConnectionInfo | None = None

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        protocol: asyncio.BaseProtocol,
        reader: asyncio.StreamReader | None,
        loop: asyncio.AbstractEventLoop,
        info: ConnectionInfo | None = None,
    ) -> None:
        super().__init__(transport, protocol, reader, loop)
        self._info = info

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Tell about the connection."""
        if name == "smc" and self._info is not None:
            return self._info
        return super().get_extra_info(name, default)

    async def wait_closed(self) -> None:
        """Wait until the connection has ended.

        Raises:
            OSError: It did not end in order.
        """
        # The future belongs to everybody who waits, also to those who come later.
        await asyncio.shield(cpython.close_waiter(self, self._protocol))

    async def start_tls(
        self,
        sslcontext: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> None:
        """Go on with TLS; a stream of a server as TLS's server.

        What a client sent before it knew, and nobody has read, belongs to TLS.

        Args:
            sslcontext: With the certificates.
            server_hostname: The name that the server's certificate must have.
            ssl_handshake_timeout: Seconds; 60 by default.
            ssl_shutdown_timeout: Seconds; 30 by default.

        Raises:
            ssl.SSLError: The handshake failed; the connection is closed.
            ConnectionError: It took too long, or the peer left; likewise.
        """
        await self.drain()
        own = self._reader if isinstance(self._reader, StreamReader) else None
        is_served = cpython.is_served(self._protocol)
        transport = await tls.start_tls(
            self._loop,
            self.transport,
            self._protocol,
            sslcontext,
            server_side=is_served,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
            take_early=own.take_unread if own is not None and is_served else None,
        )
        cpython.replace_transport(self, self._protocol, transport)
        if own is not None:
            own.replace_transport(transport)


def client_protocol(
    loop: asyncio.AbstractEventLoop, limit: int
) -> tuple[StreamReader, asyncio.StreamReaderProtocol]:
    """Make the reader of a client's stream and its protocol.

    Args:
        loop: The running loop.
        limit: See `StreamReader`.
    """
    reader = StreamReader(limit=limit, loop=loop)
    return reader, asyncio.StreamReaderProtocol(reader, loop=loop)


def serve_with(
    callback: Callable[[StreamReader, StreamWriter], Any],
    info: ConnectionInfo | None = None,
) -> Callable[[Any, Any], Any]:
    """Make a server's callback get our writer from asyncio's protocol.

    Args:
        callback: Of the program.
        info: See `StreamWriter`.
    """
    return functools.partial(_call_with_own_writer, callback, info)


def _call_with_own_writer(
    callback: Callable[[StreamReader, StreamWriter], Any],
    info: ConnectionInfo | None,
    reader: StreamReader,
    writer: asyncio.StreamWriter,
) -> Any:
    # The protocol made this writer, and keeps it or not as its version does. A second
    # one beside it would outlive it, and in 3.13 the first closes the connection when
    # nobody refers to it: so it becomes ours.
    writer.__class__ = StreamWriter
    assert isinstance(writer, StreamWriter)
    # TLS's transport forgets what is beneath it when the connection ends.
    writer._info = info or writer.get_extra_info("smc")  # noqa: SLF001
    return callback(reader, writer)
