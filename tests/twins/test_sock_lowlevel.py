"""Twins of test_sock_lowlevel.BaseSockTestsMixin.

In the originals both ends are raw. Here a socket is connected and accepted by the
loop's calls as there, and then both ends become transports of pysmc; what was
sock_recv and sock_sendall are the reads and writes of streams and protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from itertools import cycle, islice
from typing import Any

import pytest

GET = b"GET / HTTP/1.0\r\n\r\n"
SIZE = 1_000_000
DIGITS = b"0123456789"


def digits(count: int) -> bytes:
    return bytes(islice(cycle(DIGITS), count))


def new_socket() -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    return sock


async def open_on(loop, sock, address) -> tuple[Any, Any]:
    """Connect a socket, then make streams on it."""
    await loop.sock_connect(sock, address)
    return await asyncio.open_connection(sock=sock)


class Filling(asyncio.BufferedProtocol):
    """Receives into one buffer, from its start to its end."""

    def __init__(self, size: int) -> None:
        self.buffer = bytearray(size)
        self.count = 0
        self.made = False
        self.some = asyncio.Event()
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        del transport
        self.made = True

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self.buffer)[self.count :]

    def buffer_updated(self, nbytes: int) -> None:
        self.count += nbytes
        self.some.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(exc)


async def one_good_connection(lane) -> None:
    """Where the original makes none: what failed before does no harm."""
    async with lane.http_server() as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(GET)
        assert (await reader.read()).endswith(b"Test message")
        writer.close()
        await writer.wait_closed()


# --- clients


def test_sock_client_ops(lane) -> None:
    async def refused_while_blocking(loop, address) -> None:
        """In debug mode, socket operations fail if the socket may block."""
        loop.set_debug(True)
        with socket.socket() as sock:
            for call in (
                lambda: loop.sock_connect(sock, address),
                lambda: loop.sock_sendall(sock, GET),
                lambda: loop.sock_recv(sock, 1024),
                lambda: loop.sock_recv_into(sock, bytearray()),
                lambda: loop.sock_accept(sock),
            ):
                with pytest.raises(ValueError, match="the socket must be non-blocking"):
                    await call()

    async def scenario() -> None:
        loop = lane.loop
        async with lane.http_server() as address:
            await refused_while_blocking(loop, address)
            reader, writer = await open_on(loop, new_socket(), address)
            writer.write(GET)
            data = await reader.read(1024)
            assert data.startswith(b"HTTP/1.0 200 OK")
            writer.close()
            await writer.wait_closed()

            sock = new_socket()
            await loop.sock_connect(sock, address)
            transport, protocol = await loop.create_connection(
                lambda: Filling(1024), sock=sock
            )
            transport.write(GET)
            await protocol.done
            assert protocol.buffer.startswith(b"HTTP/1.0 200 OK")

    lane.run(scenario, connections=2)


def test_sock_client_racing(lane) -> None:
    """A read and a write that are cancelled leave the next ones alone."""

    async def cancelled_read(address, read) -> None:
        reader, writer = await open_on(lane.loop, new_socket(), address)
        task = asyncio.create_task(read(reader))
        await asyncio.sleep(0)
        task.cancel()
        writer.write(GET)
        with pytest.raises(asyncio.CancelledError):
            await task  # a stream has one reader at a time
        data = await read(reader)
        assert data.startswith(b"HTTP/1.0 200 OK")
        writer.close()
        await writer.wait_closed()

    async def cancelled_write() -> None:
        async with lane.serve(sink) as address:
            _, writer = await open_on(lane.loop, new_socket(), address)
            transport = writer.transport
            # Fill the peer's memory, then the buffer up to its mark.
            while transport.get_write_buffer_size() <= 2**16:
                writer.write(b" " * 2**16)
            writer.write(b"hello")
            task = asyncio.create_task(writer.drain())
            await asyncio.sleep(0)
            assert not task.done()
            task.cancel()
            await lane.there(set_event(go_on))
            writer.write(b"world")
            await writer.drain()
            writer.write_eof()
            with pytest.raises(asyncio.CancelledError):
                await task
            await lane.until(lambda: received)
            assert received[0].endswith(b"world")
            writer.close()
            await writer.wait_closed()

    async def set_event(event: asyncio.Event) -> None:
        event.set()

    async def sink(peer) -> None:
        peer.transport.pause_reading()
        await go_on.wait()
        peer.transport.resume_reading()
        data = b""
        while piece := await peer.recv(2**16):
            data += piece.strip()
        received.append(data)

    async def scenario() -> None:
        async with lane.http_server() as address:
            await cancelled_read(address, lambda reader: reader.read(1024))
            await cancelled_read(address, lambda reader: reader.readexactly(20))
        await cancelled_write()

    go_on = asyncio.Event()
    received: list[bytes] = []
    lane.run(scenario, connections=3)


def test_sock_client_connect_racing(lane) -> None:
    """A connect that was cancelled before anybody listened can be tried again."""

    async def scenario() -> None:
        loop = lane.loop
        with socket.socket() as listener:
            listener.bind((lane.host, 0))
            address = listener.getsockname()
            sock = new_socket()
            task = loop.create_task(loop.sock_connect(sock, address))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionRefusedError):
                await task
            own = listener.dup()
            async with lane.http_server(host=None, port=None, sock=own):
                for _ in range(128):
                    with contextlib.suppress(ConnectionRefusedError):
                        await loop.sock_connect(sock, address)
                        break
                reader, writer = await asyncio.open_connection(sock=sock)
                writer.write(GET)
                assert (await reader.read()).endswith(b"Test message")
                writer.close()
                await writer.wait_closed()

    lane.run(scenario)


def test_huge_content(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            reader, writer = await open_on(lane.loop, new_socket(), address)
            writer.write(b"POST /loop HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % SIZE)
            writer.write(digits(SIZE))
            task = asyncio.create_task(writer.drain())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.0 200 OK")
            data = await reader.read()
            assert len(data) == SIZE
            assert data == digits(SIZE)
            await task
            writer.close()
            await writer.wait_closed()

    lane.run(scenario)


def test_huge_content_recvinto(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            sock = new_socket()
            await lane.loop.sock_connect(sock, address)
            transport, protocol = await lane.loop.create_connection(
                lambda: Filling(SIZE + 1024), sock=sock
            )
            transport.write(b"POST /loop HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % SIZE)
            transport.write(digits(SIZE))
            assert await protocol.done is None
            received = bytes(protocol.buffer[: protocol.count])
            head, _, data = received.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.0 200 OK")
            assert len(data) == SIZE
            assert data == digits(SIZE)

    lane.run(scenario)


def test_sock_client_fail(lane) -> None:
    async def scenario() -> None:
        async with lane.http_server() as address:
            pass  # somebody of pysmc was there, and is not any more
        with new_socket() as sock, pytest.raises(ConnectionRefusedError):
            await lane.loop.sock_connect(sock, address)
        await one_good_connection(lane)

    lane.run(scenario)


def test_create_connection_sock(lane, visitor) -> None:
    async def scenario() -> None:
        loop = lane.loop
        async with lane.http_server() as address:
            infos = await loop.getaddrinfo(*address, type=socket.SOCK_STREAM)
            for family, kind, proto, _, numeric in infos:
                sock = socket.socket(family, kind, proto)
                sock.setblocking(False)
                await loop.sock_connect(sock, numeric)
                break
            transport, protocol = await loop.create_connection(visitor, sock=sock)
            assert isinstance(transport, asyncio.Transport)
            assert issubclass(type(protocol), asyncio.Protocol)
            await protocol.done
            assert len(protocol.data) > 0
            transport.close()

    lane.run(scenario)


# --- accepting


async def listen(loop: Any) -> tuple[Any, socket.socket]:
    """Give a listener that clients are told of, while we accept from it ourselves."""
    server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
    loop.remove_reader(server.sockets[0].fileno())
    listener = server.sockets[0].dup()
    listener.setblocking(False)
    return server, listener


def test_sock_accept(lane) -> None:
    async def client(peer) -> Any:
        names = [peer.transport.get_extra_info(n) for n in ("sockname", "peername")]
        assert await peer.recv(1) == b""
        return names

    async def scenario() -> None:
        loop = lane.loop
        server, listener = await listen(loop)
        with listener:
            visit = lane.visit(client, listener.getsockname())
            conn, address = await loop.sock_accept(listener)
            assert conn.gettimeout() == 0
            transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, conn)
            transport.close()
            assert await visit == [address, listener.getsockname()]
        server.close()
        await server.wait_closed()

    lane.run(scenario)


def test_cancel_sock_accept(lane) -> None:
    async def scenario() -> None:
        loop = lane.loop
        server, listener = await listen(loop)
        address = listener.getsockname()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(loop.sock_accept(listener), 0.01)
        listener.close()
        server.close()
        await server.wait_closed()
        with new_socket() as sock, pytest.raises(ConnectionRefusedError):
            await loop.sock_connect(sock, address)
        await one_good_connection(lane)

    lane.run(scenario)
