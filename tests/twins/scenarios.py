"""What twins of several modules share: the same scenario, ended in two ways.

test_sslproto's peers leave without a goodbye, test_ssl's end TLS first.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import weakref
from typing import Any

import pytest

HELLO = b"1" * (1024 * 100)

End = Any
"""``async def end(peer)``: how the other end leaves."""


async def just_close(peer: Any) -> None:
    peer.close()


async def unwrap_and_close(peer: Any) -> None:
    await peer.unwrap()
    peer.close()


class Client(asyncio.Protocol):
    """Tells of one answer and of the end; is told only once that it is connected."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.made = 0
        self.transport: Any = None
        self.on_data = loop.create_future()
        self.on_eof = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # as users do
        self.made += 1
        assert self.made == 1

    def data_received(self, data: bytes) -> None:
        self.on_data.set_result(data)

    def eof_received(self) -> None:
        self.on_eof.set_result(True)


class OneByte(asyncio.BufferedProtocol):
    """Receives one byte, into a buffer of its own."""

    def __init__(self) -> None:
        self.made = 0
        self.buffer = bytearray(1)
        self.on_data = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        del transport
        self.made += 1

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        assert nbytes == 1
        self.on_data.set_result(bytes(self.buffer))


def is_garbage(held: list[Any]) -> bool:
    """Let go of what the list holds, and tell whether nobody else has it."""
    reference = weakref.ref(held.pop())
    gc.collect()
    return reference() is None


class Server(asyncio.Protocol):
    """Greets in plain text, and collects what comes after the upgrade."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.transport: Any = None
        self.data = b""
        self.on_made = loop.create_future()
        self.on_hello = loop.create_future()
        self.on_lost = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.on_made.set_result(transport)

    def data_received(self, data: bytes) -> None:
        self.data += data
        if len(self.data) >= len(HELLO):
            self.on_hello.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_lost.set_result(exc)


def upgraded_client(lane: Any, end: End) -> None:
    """Plain bytes, then TLS; the context is garbage afterwards."""

    async def serve(peer: Any) -> None:
        assert len(await peer.recv_all(len(HELLO))) == len(HELLO)
        await peer.start_tls(lane.tls.server(), server_side=True)
        await peer.send(b"O")
        assert len(await peer.recv_all(len(HELLO))) == len(HELLO)
        await end(peer)

    async def scenario() -> None:
        async with lane.serve(serve) as address:
            transport, protocol = await lane.loop.create_connection(Client, *address)
            transport.write(HELLO)
            upgraded = await lane.loop.start_tls(transport, protocol, contexts[0])
            assert await protocol.on_data == b"O"
            upgraded.write(HELLO)
            await protocol.on_eof
            upgraded.close()

    contexts = [lane.tls.client()]
    lane.run(scenario)
    assert is_garbage(contexts)


def tls_client(lane: Any, end: End) -> None:
    """TLS from the beginning; the context is garbage although a protocol has it."""

    async def serve(peer: Any) -> None:
        await peer.start_tls(lane.tls.server(), server_side=True)
        await peer.send(b"O")
        assert len(await peer.recv_all(len(HELLO))) == len(HELLO)
        await end(peer)

    async def scenario() -> None:
        async with lane.serve(serve) as address:
            transport, protocol = await lane.loop.create_connection(
                Client, *address, ssl=contexts[0]
            )
            assert await protocol.on_data == b"O"
            transport.write(HELLO)
            await protocol.on_eof
            transport.close()

    contexts = [lane.tls.client()]
    lane.run(scenario)
    assert is_garbage(contexts)


def buffered_client(lane: Any, end: End) -> None:
    """A buffered protocol, then another one by set_protocol."""

    async def serve(peer: Any) -> None:
        assert len(await peer.recv_all(len(HELLO))) == len(HELLO)
        await peer.start_tls(lane.tls.server(), server_side=True)
        for answer in (b"O", b"2"):
            await peer.send(answer)
            assert len(await peer.recv_all(len(HELLO))) == len(HELLO)
        await end(peer)

    async def scenario() -> None:
        loop = lane.loop
        async with lane.serve(serve) as address:
            transport, first = await loop.create_connection(OneByte, *address)
            transport.write(HELLO)
            upgraded = await loop.start_tls(transport, first, lane.tls.client())
            assert await first.on_data == b"O"
            second = Client()
            upgraded.set_protocol(second)
            upgraded.write(HELLO)
            assert await second.on_data == b"2"
            upgraded.write(HELLO)
            await second.on_eof
            upgraded.close()
            # start_tls and set_protocol do not tell a protocol that it is connected.
            assert (first.made, second.made) == (1, 0)

    lane.run(scenario)


def impatient_client(lane: Any) -> None:
    """The server never answers the handshake; who gives up leaves nothing behind."""

    async def serve(peer: Any) -> None:
        assert len(await peer.recv_all(len(HELLO))) == len(HELLO)
        lane.tell(waits.set)
        await stay_silent(peer)

    async def scenario() -> None:
        loop = lane.loop
        async with lane.serve(serve) as address:
            transport, protocol = await loop.create_connection(Client, *address)
            transport.write(HELLO)
            await waits.wait()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(
                    loop.start_tls(transport, protocol, lane.tls.client()), 0.05
                )
            assert protocol.made == 1

    waits = asyncio.Event()
    lane.run(scenario)


def upgraded_server(lane: Any, client: Any, answer: bytes | None) -> None:
    """The twin's server greets in plain text, then upgrades.

    Args:
        lane: Where.
        client: Program of the other end; what it returns must be the answer.
        answer: Sent after the client's greeting, if any.
    """

    async def scenario() -> None:
        loop = lane.loop
        protocol = Server()
        server = await loop.create_server(lambda: protocol, lane.host, 0)
        visit = lane.visit(client, server.sockets[0].getsockname())
        transport = await protocol.on_made
        transport.write(HELLO)
        assert protocol.data == b""
        upgraded = await loop.start_tls(
            transport, protocol, lane.tls.server(), server_side=True,
            ssl_handshake_timeout=lane.patience,
        )  # fmt: skip
        await protocol.on_hello
        if answer is not None:
            upgraded.write(answer)
        assert await protocol.on_lost is None
        assert protocol.data == HELLO
        upgraded.close()
        server.close()
        await server.wait_closed()
        assert await visit == answer

    lane.run(scenario)


# --- handshakes that come to nothing


async def stay_silent(peer: Any) -> None:
    """Read until the client gives up."""
    with pytest.raises((ConnectionAbortedError, ConnectionResetError)):
        await peer.recv_all(1024 * 1024)


def cancelled_handshake(
    lane: Any, program: Any, end: Any = None, **options: Any
) -> None:
    """Cancelled, not failed: nothing is raised elsewhere, nothing logged or kept.

    Args:
        lane: Where.
        program: Of the server, which does not answer.
        end: Coroutine function that lets the program end, if it has to be told.
        **options: Of create_connection.
    """

    async def scenario() -> None:
        async with lane.serve(program) as address:
            task = lane.loop.create_task(
                lane.loop.create_connection(
                    asyncio.Protocol, *address, ssl=contexts[0], **options
                )
            )
            await lane.until(lambda: len(lane.seen) == 2)  # now TLS begins
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.02)
            del task
            if end is not None:
                await lane.there(end())

    contexts = [lane.tls.client()]
    lane.run(scenario)
    assert is_garbage(contexts)


def slow_handshake(lane: Any) -> None:
    async def scenario() -> None:
        async with lane.serve(stay_silent) as address:
            with pytest.raises(
                ConnectionAbortedError, match="SSL handshake.*is taking longer"
            ):
                await asyncio.open_connection(
                    *address,
                    ssl=lane.tls.client(),
                    server_hostname="",
                    ssl_handshake_timeout=0.05,
                )

    lane.run(scenario)


def failed_certificate(lane: Any) -> None:
    async def serve(peer: Any) -> None:
        with pytest.raises((ssl.SSLError, OSError)):
            await peer.start_tls(lane.tls.server(), server_side=True)

    async def scenario() -> None:
        async with lane.serve(serve) as address:
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.open_connection(
                    *address,
                    ssl=lane.tls.client(verify=True),
                    server_hostname="",
                    ssl_handshake_timeout=lane.patience,
                )

    lane.run(scenario)


def corrupted_records(lane: Any) -> None:
    async def serve(peer: Any) -> None:
        await peer.start_tls(lane.tls.server(), server_side=True)
        await peer.send(b"A\n")
        await peer.recv_all(1)
        await peer.plain.send(b"please corrupt the SSL connection")

    async def scenario() -> None:
        async with lane.serve(serve) as address:
            reader, writer = await asyncio.open_connection(
                *address, ssl=lane.tls.client(), server_hostname=""
            )
            assert await reader.readline() == b"A\n"
            writer.write(b"B")
            with pytest.raises(ssl.SSLError):
                await reader.readline()
            writer.close()
            with pytest.raises(ssl.SSLError):
                await writer.wait_closed()

    lane.run(scenario)


# --- sockets that were accepted by hand


def accepted_by_hand(lane: Any, visitor: Any, server_tls: Any, client_tls: Any) -> None:
    """connect_accepted_socket, on a listener that clients are told of."""

    class Answering(visitor):  # type: ignore[misc]
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.write(b"roger")

    async def client(peer: Any) -> bytes:
        if client_tls is not None:
            await peer.start_tls(client_tls)
        await peer.send(b"test data")
        answer: bytes = await peer.recv(99)
        return answer

    async def scenario() -> None:
        loop = lane.loop
        server = await loop.create_server(visitor, lane.host, 0)
        listener = server.sockets[0]
        loop.remove_reader(listener.fileno())
        visit = lane.visit(client, listener.getsockname())
        with listener.dup() as own:
            own.setblocking(False)
            conn, _ = await loop.sock_accept(own)
        protocol = Answering(greeting=b"")
        transport, made = await loop.connect_accepted_socket(
            lambda: protocol, conn, ssl=server_tls
        )
        assert made is protocol
        assert transport.get_extra_info("smc").role == "server"
        if server_tls is not None:
            assert "SSL" in type(transport).__name__
        assert await visit == b"roger"
        await protocol.done
        protocol.transport.close()
        assert protocol.calls[-1] == "lost"
        assert len(protocol.data) == len(b"test data")
        server.close()
        await server.wait_closed()

    lane.run(scenario)
