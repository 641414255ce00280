"""Twins of test_sendfile.SendfileTestsBase.

There one end is a socket that the test connects by a blocking call, or on which it uses
sock_sendfile. Here the loop connects it, and it becomes a transport. The originals make
the sockets' buffers small, so that a file does not fit; here a file is bigger than the
peer's memory instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from asyncio import base_events
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

DATA = bytes(range(256)) * 1024 + b"x"
"""256 KiB and one byte: no multiple of any block."""
MANY = DATA * 12
"""More than what fits into the peer's memory and the transport's buffer."""


class Ends(NamedTuple):
    """The protocols of both ends."""

    server: Any
    client: Any


@pytest.fixture
def file() -> Iterator[Any]:
    with tempfile.TemporaryFile() as made:
        made.write(DATA)
        made.seek(0)
        yield made


def receiver(visitor, close_after: int = 0) -> Any:
    """Make a protocol that closes after it has got a number of bytes."""

    class Receiver(visitor):  # type: ignore[misc]
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if close_after and len(self.data) >= close_after:
                self.transport.close()

    return Receiver(greeting=b"")


@contextlib.asynccontextmanager
async def connected(
    lane, visitor, *, close_after: int = 0, tls: bool = False
) -> AsyncIterator[Ends]:
    """A listener and a socket of the test's own, and a transport on either side."""
    loop = lane.loop
    server_end = receiver(visitor, close_after)
    listener = socket.socket()
    listener.bind((lane.host, 0))
    server = await loop.create_server(
        lambda: server_end, sock=listener, ssl=lane.tls.server() if tls else None
    )
    sock = socket.socket()
    sock.setblocking(False)
    await loop.sock_connect(sock, listener.getsockname())
    _, client_end = await loop.create_connection(
        lambda: visitor(greeting=b""),
        sock=sock,
        ssl=lane.tls.client() if tls else None,
        server_hostname=lane.host if tls else None,
    )
    await server_end.made
    try:
        yield Ends(server_end, client_end)
    finally:
        for end in (server_end, client_end):
            end.transport.close()
        async with asyncio.timeout(lane.patience):
            await server_end.done
            await client_end.done
        server.close()
        await server.wait_closed()


def without_native(loop) -> None:
    """Make the loop say that it cannot send files itself, as the originals do."""

    def sendfile_native(transport, file, offset, count) -> Any:
        base: Any = base_events.BaseEventLoop
        return base._sendfile_native(loop, transport, file, offset, count)

    loop._sendfile_native = sendfile_native


# --- what sock_sendfile sends


def send_by_socket(lane, visitor, file, *args, before=b"", after=b"") -> Any:
    """Send a file between two writes; gives the result and what has arrived."""

    async def scenario() -> tuple[int, bytes]:
        async with connected(lane, visitor) as ends:
            transport = ends.client.transport
            transport.write(before)
            sent = await lane.loop.sendfile(transport, file, *args)
            transport.write(after)
            transport.close()
            await ends.server.done
            return sent, bytes(ends.server.data)

    return lane.run(scenario)


def test_sock_sendfile_success(lane, visitor, file) -> None:
    sent, data = send_by_socket(lane, visitor, file)
    assert sent == len(DATA)
    assert data == DATA
    assert file.tell() == len(DATA)


def test_sock_sendfile_with_offset_and_count(lane, visitor, file) -> None:
    sent, data = send_by_socket(lane, visitor, file, 1000, 2000)
    assert sent == 2000
    assert data == DATA[1000:3000]
    assert file.tell() == 3000


def test_sock_sendfile_zero_size(lane, visitor) -> None:
    with tempfile.TemporaryFile() as empty:
        sent, data = send_by_socket(lane, visitor, empty, 0, None)
        assert sent == 0
        assert data == b""
        assert empty.tell() == 0


def test_sock_sendfile_mix_with_regular_send(lane, visitor, file) -> None:
    other = b"mix_regular_send" * 4096
    sent, data = send_by_socket(lane, visitor, file, before=other, after=other)
    assert sent == len(DATA)
    assert data == other + DATA + other
    assert file.tell() == len(DATA)


# --- sendfile


def send(lane, visitor, file, *args, prepare=None, **options) -> tuple[int, Ends]:
    """Send a file, close, and wait until the other end has it all."""

    async def scenario() -> tuple[int, Ends]:
        if prepare is not None:
            prepare(lane.loop)
        async with connected(lane, visitor, **options) as ends:
            sent = await lane.loop.sendfile(ends.client.transport, file, *args)
            ends.client.transport.close()
            await ends.server.done
            return sent, ends

    result: tuple[int, Ends] = lane.run(scenario)
    return result


def assert_all_sent(sent: int, ends: Ends, file) -> None:
    assert sent == len(DATA)
    assert len(ends.server.data) == len(DATA)
    assert ends.server.data == DATA
    assert file.tell() == len(DATA)


def test_sendfile(lane, visitor, file) -> None:
    assert_all_sent(*send(lane, visitor, file), file)


def test_sendfile_force_fallback(lane, visitor, file) -> None:
    assert_all_sent(*send(lane, visitor, file, prepare=without_native), file)


def test_sendfile_force_unsupported_native(lane, visitor, file) -> None:
    async def scenario() -> None:
        without_native(lane.loop)
        async with connected(lane, visitor) as ends:
            transport = ends.client.transport
            with pytest.raises(
                asyncio.SendfileNotAvailableError, match="not supported"
            ):
                await lane.loop.sendfile(transport, file, fallback=False)
            transport.close()
            await ends.server.done
            assert ends.server.data == b""
            assert file.tell() == 0

    lane.run(scenario)


def test_sendfile_ssl(lane, visitor, file) -> None:
    assert_all_sent(*send(lane, visitor, file, tls=True), file)


def test_sendfile_for_closing_transp(lane, visitor, file) -> None:
    async def scenario() -> None:
        async with connected(lane, visitor) as ends:
            ends.client.transport.close()
            with pytest.raises(RuntimeError, match="is closing"):
                await lane.loop.sendfile(ends.client.transport, file)
            await ends.server.done
            assert ends.server.data == b""
            assert file.tell() == 0

    lane.run(scenario)


def send_between(lane, visitor, file, before, after, *, tls) -> None:
    async def scenario() -> None:
        async with connected(lane, visitor, tls=tls) as ends:
            transport = ends.client.transport
            transport.write(before)
            sent = await lane.loop.sendfile(transport, file)
            transport.write(after)
            transport.close()
            await ends.server.done
            assert sent == len(DATA)
            assert ends.server.data == before + DATA + after
            assert file.tell() == len(DATA)

    lane.run(scenario)


def test_sendfile_pre_and_post_data(lane, visitor, file) -> None:
    send_between(lane, visitor, file, b"PREFIX__" * 1024, b"--SUFFIX" * 1024, tls=False)


def test_sendfile_ssl_pre_and_post_data(lane, visitor, file) -> None:
    before, after = b"zxcvbnm" * 1024, b"0987654321" * 1024
    send_between(lane, visitor, file, before, after, tls=True)


def send_a_part(lane, visitor, file, *, tls) -> None:
    sent, ends = send(lane, visitor, file, 1000, 100, tls=tls)
    assert sent == 100
    assert len(ends.server.data) == 100
    assert ends.server.data == DATA[1000:1100]
    assert file.tell() == 1100


def test_sendfile_partial(lane, visitor, file) -> None:
    send_a_part(lane, visitor, file, tls=False)


def test_sendfile_ssl_partial(lane, visitor, file) -> None:
    send_a_part(lane, visitor, file, tls=True)


def test_sendfile_close_peer_after_receiving(lane, visitor, file) -> None:
    assert_all_sent(*send(lane, visitor, file, close_after=len(DATA)), file)


def test_sendfile_ssl_close_peer_after_receiving(lane, visitor, file) -> None:
    sent, ends = send(lane, visitor, file, close_after=len(DATA), tls=True)
    assert_all_sent(sent, ends, file)


def close_in_the_middle(lane, visitor, file, prepare=None) -> None:
    file.write(MANY)
    file.seek(0)

    async def scenario() -> None:
        if prepare is not None:
            prepare(lane.loop)
        async with connected(lane, visitor, close_after=1024) as ends:
            with pytest.raises(ConnectionError):
                await lane.loop.sendfile(ends.client.transport, file)
            await ends.server.done
            assert 1024 <= len(ends.server.data) < len(MANY)
            assert MANY.startswith(bytes(ends.server.data))
            assert 1024 <= file.tell() < len(MANY)
            assert ends.client.transport.is_closing()

    lane.run(scenario)


def test_sendfile_close_peer_in_the_middle_of_receiving(lane, visitor, file) -> None:
    close_in_the_middle(lane, visitor, file)


def test_sendfile_fallback_close_peer_in_the_middle_of_receiving(
    lane, visitor, file
) -> None:
    close_in_the_middle(lane, visitor, file, without_native)


def test_sendfile_prevents_bare_write(lane, visitor, file) -> None:
    file.write(MANY)
    file.seek(0)

    async def scenario() -> None:
        async with connected(lane, visitor) as ends:
            # It takes several turns: the peer does not read before the attempt.
            ends.server.transport.pause_reading()
            begun = lane.loop.create_future()

            async def send_file() -> int:
                begun.set_result(None)
                sent: int = await lane.loop.sendfile(ends.client.transport, file)
                return sent

            task = lane.loop.create_task(send_file())
            await begun
            with pytest.raises(RuntimeError, match="sendfile is in progress"):
                ends.client.transport.write(b"data")
            ends.server.transport.resume_reading()
            assert await task == len(MANY)

    lane.run(scenario)
