"""Twins of test_ssl.TestSSL: TLS from the first byte on, and how it ends.

The other end's TLS is OpenSSL's alone, over the bytes of a pysmc connection, as it was
over a blocking socket's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from tests.twins import scenarios
from tests.twins.scenarios import HELLO, is_garbage, stay_silent, unwrap_and_close

CLIENTS = 25
A_DATA = b"A" * 1024 * 1024
B_DATA = b"B" * 1024 * 1024
CHUNK, CHUNKS = 128 * 1024, 32


async def wait_closed(writer) -> None:
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


# --- many connections


async def handle_client(reader, writer) -> None:
    assert await reader.readexactly(len(A_DATA)) == A_DATA
    writer.write(b"OK")
    assert await reader.readexactly(len(B_DATA)) == B_DATA
    writer.writelines([b"SP", bytearray(b"A"), memoryview(b"M")])
    await writer.drain()
    writer.close()


async def talk(peer, context) -> None:
    await peer.start_tls(context)
    await peer.send(A_DATA)
    assert await peer.recv_all(2) == b"OK"
    await peer.send(B_DATA)
    assert await peer.recv_all(4) == b"SPAM"


async def visit_often(lane, server, program) -> None:
    address = server.sockets[0].getsockname()
    try:
        await asyncio.gather(*(lane.visit(program, address) for _ in range(CLIENTS)))
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.slow
def test_create_server_ssl_1(lane) -> None:
    async def scenario() -> None:
        context = lane.tls.client()
        server = await asyncio.start_server(
            handle_client,
            lane.host,
            0,
            family=socket.AF_INET,
            ssl=lane.tls.server(),
            ssl_handshake_timeout=lane.patience,
        )
        await visit_often(lane, server, lambda peer: talk(peer, context))

    lane.run(scenario, connections=CLIENTS)


@pytest.mark.slow
def test_create_server_ssl_over_ssl(lane) -> None:
    """A second TLS within the first one, on both sides."""

    class Upgrading(asyncio.StreamReaderProtocol):
        """Puts on the second layer before the stream learns of the connection."""

        def connection_made(self, transport: Any) -> None:
            begin = super().connection_made
            transport.pause_reading()
            task = lane.loop.create_task(
                lane.loop.start_tls(transport, self, inner, server_side=True)
            )
            task.add_done_callback(lambda task: begin(task.result()))

    def make() -> asyncio.StreamReaderProtocol:
        return Upgrading(asyncio.StreamReader(), handle_client)

    async def client(peer) -> None:
        await peer.start_tls(outer_client)
        await talk(peer, inner_client)
        assert await peer.recv(1) == b""
        with contextlib.suppress(OSError):
            await peer.unwrap()

    async def scenario() -> None:
        server = await lane.loop.create_server(
            make, lane.host, 0, family=socket.AF_INET, ssl=outer
        )
        await visit_often(lane, server, client)

    outer, inner = lane.tls.server(), lane.tls.server()
    outer_client, inner_client = lane.tls.client(), lane.tls.client()
    lane.run(scenario, connections=CLIENTS)


@pytest.mark.slow
def test_create_connection_ssl_1(lane) -> None:
    """By address, and with a socket that was connected before."""

    async def serve(peer) -> None:
        await peer.start_tls(server_context, server_side=True)
        assert await peer.recv_all(len(A_DATA)) == A_DATA
        await peer.send(b"OK")
        assert await peer.recv_all(len(B_DATA)) == B_DATA
        await peer.send(b"SPAM")

    async def client(address, sock) -> None:
        where: dict[str, Any] = {"ssl": context, "server_hostname": ""}
        if sock is None:
            where["host"], where["port"] = address
        else:
            sock.setblocking(False)
            await lane.loop.sock_connect(sock, address)
            where["sock"] = sock
        reader, writer = await asyncio.open_connection(**where)
        writer.write(A_DATA)
        assert await reader.readexactly(2) == b"OK"
        writer.write(B_DATA)
        assert await reader.readexactly(4) == b"SPAM"
        writer.close()
        await wait_closed(writer)

    async def scenario(make_socket) -> None:
        async with lane.serve(serve, backlog=CLIENTS) as address:
            clients = [client(address, make_socket()) for _ in range(CLIENTS)]
            await asyncio.gather(*clients)

    server_context, context = lane.tls.server(), lane.tls.client()
    lane.run(scenario, lambda: None, connections=CLIENTS)
    lane.run(scenario, socket.socket, connections=CLIENTS)


# --- how TLS ends


@pytest.mark.slow
def test_shutdown_cleanly(lane) -> None:
    async def serve(peer) -> None:
        await peer.start_tls(server_context, server_side=True)
        assert await peer.recv_all(len(A_DATA)) == A_DATA
        await peer.send(b"OK")
        await peer.unwrap()

    async def client(address) -> None:
        reader, writer = await asyncio.open_connection(
            *address,
            ssl=context,
            server_hostname="",
            ssl_handshake_timeout=lane.patience,
        )
        writer.write(A_DATA)
        assert await reader.readexactly(2) == b"OK"
        assert await reader.read() == b""
        writer.close()
        await wait_closed(writer)

    async def scenario() -> None:
        async with lane.serve(serve, backlog=CLIENTS) as address:
            await asyncio.gather(*(client(address) for _ in range(CLIENTS)))

    server_context, context = lane.tls.server(), lane.tls.client()
    lane.run(scenario, connections=CLIENTS)


async def begin(lane, address) -> tuple[Any, Any]:
    """Open TLS streams, and see that both ends are there."""
    reader, writer = await asyncio.open_connection(
        *address, ssl=lane.tls.client(), server_hostname=""
    )
    writer.write(b"ping")
    assert await reader.readexactly(4) == b"pong"
    return reader, writer


async def answer_ping(lane, peer) -> None:
    """Then read nothing more: what the client sends stays where it is."""
    await peer.start_tls(lane.tls.server(), server_side=True)
    assert await peer.recv_all(4) == b"ping"
    peer.transport.pause_reading()
    await peer.send(b"pong")


def test_flush_before_shutdown(lane) -> None:
    """What was written while the transport was paused arrives before the goodbye."""

    async def serve(peer) -> None:
        await answer_ping(lane, peer)
        await go_on.wait()
        peer.transport.resume_reading()
        data = await peer.recv_all(CHUNK * CHUNKS)
        assert len(data) == CHUNK * CHUNKS
        received.append(data)

    async def set_event() -> None:
        go_on.set()

    async def scenario() -> None:
        async with lane.serve(serve) as address:
            reader, writer = await begin(lane, address)
            tls = writer.transport._ssl_protocol
            tls.pause_writing()
            for _ in range(CHUNKS):
                writer.write(b"x" * CHUNK)
            writer.close()
            tls.resume_writing()
            await lane.there(set_event())
            await wait_closed(writer)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        assert received == [b"x" * (CHUNK * CHUNKS)]

    go_on, received = asyncio.Event(), list[bytes]()
    lane.run(scenario)


@pytest.mark.parametrize("end", ["close_notify", "eof"])
def test_remote_shutdown_receives_trailing_data(lane, end) -> None:
    """Who says that no more will come still gets all that was on its way."""

    async def serve(peer) -> None:
        await answer_ping(lane, peer)
        await go_on.wait()
        peer.transport.resume_reading()
        if end == "eof":
            peer.shutdown_write()
            assert len(await peer.recv_all(CHUNK * CHUNKS)) == CHUNK * CHUNKS
        else:
            await peer.top.say_goodbye()
            size = 0
            while data := await peer.recv(16384):
                size += len(data)
            assert size == CHUNK * CHUNKS
            await peer.unwrap()  # their close_notify has come
        lane.tell(done.set)

    async def set_event() -> None:
        go_on.set()

    async def scenario() -> None:
        async with lane.serve(serve) as address:
            reader, writer = await begin(lane, address)
            for _ in range(CHUNKS):
                writer.transport._test__append_write_backlog(b"x" * CHUNK)
            await lane.there(set_event())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                assert await reader.read() == b""
            async with asyncio.timeout(lane.patience):
                await done.wait()
            writer.close()
            await wait_closed(writer)

    go_on, done = asyncio.Event(), asyncio.Event()
    lane.run(scenario)


def test_shutdown_timeout_handler_leak(lane) -> None:
    async def serve(peer) -> None:
        await peer.start_tls(lane.tls.server(), server_side=True)
        await peer.recv(32)

    class Protocol(asyncio.Protocol):
        def __init__(self) -> None:
            self.lost = asyncio.get_running_loop().create_future()

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set_result(None)

    async def scenario() -> None:
        async with lane.serve(serve) as address:
            transport, protocol = await lane.loop.create_connection(
                Protocol, *address, ssl=contexts[0]
            )
            transport.close()
            await protocol.lost

    contexts = [lane.tls.client()]
    lane.run(scenario)
    assert is_garbage(contexts)


def test_shutdown_timeout_handler_not_set(lane) -> None:
    """Bytes and the end came while the protocol had paused: it gets both, in order."""

    async def serve(peer) -> None:
        await peer.start_tls(lane.tls.server(), server_side=True)
        await peer.send(b"hello")
        assert await peer.recv(1024) == b"world"
        await peer.send(b"extra bytes")
        peer.shutdown_write()
        lane.tell(eof.set)
        assert await peer.recv(1024) == b""

    class Protocol(asyncio.Protocol):
        transport: Any = None
        extra: bytes | None = None

        def __init__(self) -> None:
            self.lost = asyncio.get_running_loop().create_future()

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            if data == b"hello":
                self.transport.write(b"world")
                self.transport.pause_reading()
            else:
                self.extra = data

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set_result(exc)

    async def scenario() -> None:
        async with lane.serve(serve) as address:
            transport, protocol = await lane.loop.create_connection(
                Protocol, *address, ssl=lane.tls.client()
            )
            await eof.wait()
            transport.resume_reading()
            assert await protocol.lost is None
            transport.close()
            assert protocol.extra == b"extra bytes"

    eof = asyncio.Event()
    lane.run(scenario)


# --- handshakes that come to nothing


def test_ssl_handshake_connection_lost(lane) -> None:
    """A protocol that was never told of a connection is not told of its end either."""

    async def serve(peer) -> None:
        await peer.recv(1024)  # and leave in the middle of the handshake

    calls: list[str] = []

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            calls.append("made")

        def connection_lost(self, exc: Exception | None) -> None:
            calls.append("lost")

    async def scenario() -> None:
        async with lane.serve(serve) as address:
            with pytest.raises(ConnectionResetError):
                await lane.loop.create_connection(
                    Protocol, *address, ssl=lane.tls.client(), server_hostname=""
                )

    lane.run(scenario)
    assert calls == []


def test_handshake_timeout_handler_leak(lane) -> None:
    """The server accepts and does nothing at all, not even read."""

    async def serve(peer) -> None:
        peer.transport.pause_reading()
        async with asyncio.timeout(lane.patience):
            await left.wait()
        peer.transport.resume_reading()

    async def end() -> None:
        left.set()

    left = asyncio.Event()
    scenarios.cancelled_handshake(lane, serve, end)


def test_ssl_handshake_timeout(lane) -> None:
    scenarios.cancelled_handshake(
        lane, stay_silent, server_hostname="", ssl_handshake_timeout=10.0
    )


def test_create_connection_ssl_slow_handshake(lane) -> None:
    scenarios.slow_handshake(lane)


def test_create_connection_ssl_failed_certificate(lane) -> None:
    scenarios.failed_certificate(lane)


# --- what test_sslproto has too, here with a goodbye at the end


def test_connect_accepted_socket(lane, visitor) -> None:
    scenarios.accepted_by_hand(lane, visitor, None, None)


def test_start_tls_client_corrupted_ssl(lane) -> None:
    scenarios.corrupted_records(lane)


def test_start_tls_client_reg_proto_1(lane) -> None:
    scenarios.upgraded_client(lane, unwrap_and_close)


def test_create_connection_memory_leak(lane) -> None:
    scenarios.tls_client(lane, unwrap_and_close)


def test_start_tls_client_buf_proto_1(lane) -> None:
    scenarios.buffered_client(lane, unwrap_and_close)


def test_start_tls_slow_client_cancel(lane) -> None:
    scenarios.impatient_client(lane)


def test_start_tls_server_1(lane) -> None:
    async def client(peer) -> None:
        assert len(await peer.recv_all(len(HELLO))) == len(HELLO)
        await peer.start_tls(lane.tls.client())
        await peer.send(HELLO)
        await peer.unwrap()

    scenarios.upgraded_server(lane, client, None)
