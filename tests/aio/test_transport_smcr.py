"""What the transport has to do because it is not TCP: loss, hostile peers, TLS."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl

import pytest

from pysmc.aio import tcp_watch, transport_reading
from pysmc.config import Config
from pysmc.errors import ConnectionAborted, ConnectionReset

MIB = 1 << 20


class Echo(asyncio.Protocol):
    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


# --- only over SMC-R


def _close_rudely(sock) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def test_a_reset_of_tcp_ends_the_connection(kit) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            _close_rudely(socket.socket(fileno=os.dup(ends.server.transport._fd)))
            # A descriptor of the same socket closes nothing; the socket itself does.
            server = ends.server.transport
            server._tcp.stop()
            _close_rudely(server._sock)
            await ends.client.until_call("lost")
            assert isinstance(ends.client.error, ConnectionReset)
            server.abort()
            await ends.server.until_call("lost")

    kit.run(scenario)


def test_a_byte_on_tcp_is_a_breach_of_protocol(kit) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            ends.server.transport._sock.send(b"!")
            await ends.client.until_call("lost")
            assert isinstance(ends.client.error, ConnectionAborted)
            await ends.server.until_call("lost")
            assert isinstance(ends.server.error, ConnectionResetError)

    kit.run(scenario)


def test_the_end_of_tcp_alone_is_a_reset_after_a_grace(kit, monkeypatch) -> None:
    monkeypatch.setattr(tcp_watch, "FIN_GRACE", 0.02)

    async def scenario() -> None:
        async with kit.connected() as ends:
            ends.server.transport._sock.shutdown(socket.SHUT_WR)
            await ends.client.until_call("lost")
            assert isinstance(ends.client.error, ConnectionReset)

    kit.run(scenario)


def test_the_end_of_tcp_after_the_peers_eof_means_nothing(kit, monkeypatch) -> None:
    monkeypatch.setattr(tcp_watch, "FIN_GRACE", 0.0)

    async def scenario() -> None:
        async with kit.connected(client=lambda: kit.Recorder(keep_open=True)) as ends:
            ends.server.transport.write_eof()
            await ends.client.until_call("eof")
            ends.server.transport._sock.shutdown(socket.SHUT_WR)
            for _ in range(10):
                await asyncio.sleep(0.001)
            ends.client.transport.write(b"still here")
            await ends.server.until_bytes(10)
            assert "lost" not in ends.client.calls

    kit.run(scenario)


def test_close_is_bounded(kit) -> None:
    async def scenario() -> None:
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            ends.client.transport.write(bytes(4 * MIB))
            ends.client.transport.close()
            await ends.client.until_call("lost")
            assert isinstance(ends.client.error, ConnectionAborted)
            assert "0.05 s" in str(ends.client.error)
            ends.server.transport.resume_reading()
            await ends.server.until_call("lost")
            assert isinstance(ends.server.error, ConnectionReset)
            assert len(ends.server.data) == Config().rmbe_bytes

    kit.run(scenario, config=Config(close_wait=0.05))


def test_what_arrived_is_delivered_after_the_loss(kit) -> None:
    """The peer finished, closed and vanished while the protocol was paused."""

    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            client, server = ends.transports
            data = os.urandom(200_000)
            client.write(data)
            client.close()
            await ends.client.until_call("lost")
            # Both ends are in this loop: losing all links is what a dead peer does.
            for link in list(driver._links.values()):
                driver.endpoint.link_down(link, "peer gone", "test", driver.time())
            driver.settle()
            assert "lost" not in ends.server.calls
            server.resume_reading()
            await ends.server.until_call("lost")
            assert ends.server.data == data
            assert ends.server.calls == ["made", "data", "eof", "lost"]
            assert ends.server.error is None

    kit.run(scenario)


def test_a_loss_while_somebody_waits_for_room_is_told_at_once(kit) -> None:
    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        async with kit.connected(
            lambda: kit.Recorder(pause=True), lambda: kit.Recorder(pause=True)
        ) as ends:
            ends.client.transport.write(bytes(4 * MIB))
            ends.server.transport.write(b"unread")
            await asyncio.sleep(0.01)
            for link in list(driver._links.values()):
                driver.endpoint.link_down(link, "peer gone", "test", driver.time())
            driver.settle()
            await ends.client.until_call("lost")
            assert isinstance(ends.client.error, ConnectionReset)

    kit.run(scenario)


def test_delivery_is_fair(kit, monkeypatch) -> None:
    monkeypatch.setattr(transport_reading, "SLICES_PER_TURN", 1)
    turns = []

    class Counter(kit.Recorder):
        def data_received(self, data) -> None:
            super().data_received(data)
            turns.append(len(data))

    async def scenario() -> None:
        async with kit.connected(server=Counter) as ends:
            data = os.urandom(MIB)
            ends.client.transport.write(data)
            await ends.server.until_bytes(MIB)
            assert ends.server.data == data
            assert max(turns) <= 64 * 1024

    kit.run(scenario)


# --- TLS


@pytest.fixture(scope="session")
def contexts(tmp_path_factory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server's, client's), with a certificate for localhost made here."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "pair.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    client = ssl.create_default_context(cafile=path)
    return server, client


def test_tls(kit, config, mode, contexts) -> None:
    async def scenario() -> None:
        async with kit.serving(Echo, ssl=contexts[0]) as port:
            reader, writer = await asyncio.open_connection(
                kit.host, port, ssl=contexts[1], server_hostname="localhost"
            )
            assert writer.get_extra_info("smc").mode == mode
            assert writer.get_extra_info("cipher") is not None
            data = os.urandom(MIB)
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            writer.close()
            await writer.wait_closed()

    kit.run(scenario, config=config)


def test_start_tls(kit, config, mode, contexts) -> None:
    async def serve(reader, writer) -> None:
        await reader.readexactly(5)
        writer.write(b"ready")
        await writer.start_tls(contexts[0])
        writer.write(await reader.readexactly(6))
        writer.close()

    async def scenario() -> None:
        server = await asyncio.start_server(serve, kit.host, 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection(kit.host, port)
        writer.write(b"hello")
        await reader.readexactly(5)
        await writer.start_tls(contexts[1], server_hostname="localhost")
        writer.write(b"secret")
        assert await reader.readexactly(6) == b"secret"
        assert writer.get_extra_info("smc").mode == mode
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    kit.run(scenario, config=config)
