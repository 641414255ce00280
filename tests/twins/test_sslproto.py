"""Twins of test_sslproto.BaseStartTLS: start_tls, and handshakes that go wrong.

The other end's TLS is OpenSSL's alone, over the bytes of a pysmc connection, as it was
over a blocking socket's. It ends the connection without a goodbye.
"""

from __future__ import annotations

from tests.twins import scenarios
from tests.twins.scenarios import HELLO, just_close, stay_silent


def test_start_tls_client_reg_proto_1(lane) -> None:
    scenarios.upgraded_client(lane, just_close)


def test_create_connection_memory_leak(lane) -> None:
    scenarios.tls_client(lane, just_close)


def test_start_tls_client_buf_proto_1(lane) -> None:
    scenarios.buffered_client(lane, just_close)


def test_start_tls_slow_client_cancel(lane) -> None:
    scenarios.impatient_client(lane)


def test_start_tls_server_1(lane) -> None:
    async def client(peer) -> bytes:
        assert len(await peer.recv_all(len(HELLO))) == len(HELLO)
        await peer.start_tls(lane.tls.client())
        await peer.send(HELLO)
        answer: bytes = await peer.recv_all(6)
        return answer

    scenarios.upgraded_server(lane, client, b"answer")


def test_handshake_timeout(lane) -> None:
    scenarios.cancelled_handshake(
        lane, stay_silent, server_hostname="", ssl_handshake_timeout=lane.patience
    )


def test_create_connection_ssl_slow_handshake(lane) -> None:
    scenarios.slow_handshake(lane)


def test_create_connection_ssl_failed_certificate(lane) -> None:
    scenarios.failed_certificate(lane)


def test_start_tls_client_corrupted_ssl(lane) -> None:
    scenarios.corrupted_records(lane)
