"""The kernel's SMC at both ends: what it can do here before we take part."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from tests.lab.kernel_smc import smc_socket

SERVER, CLIENT = "10.0.0.1", "10.0.0.2"
COUNT = 256 * 1024


def serve(tell: Any, count: int) -> None:
    """Send back what comes, then wait for the end."""
    with smc_socket() as listener:
        listener.bind((SERVER, 0))
        listener.listen()
        tell(port=listener.getsockname()[1])
        accepted, _ = listener.accept()
    with accepted:
        accepted.settimeout(30)
        left = count
        while left:
            data = accepted.recv(1 << 16)
            accepted.sendall(data)
            left -= len(data)
        assert accepted.recv(1) == b""


def connect(tell: Any, port: int, count: int) -> None:
    """Send and receive, stay connected until told so by the server's port."""
    sent = hashlib.sha256(b"abc").digest() * (count // 32)
    with smc_socket() as client:
        client.bind((CLIENT, 0))
        client.connect((SERVER, port))
        tell(port=client.getsockname()[1])
        client.sendall(sent[: count // 2])
        received = b""
        while len(received) < count // 2:
            received += client.recv(1 << 16)
        client.sendall(sent[count // 2 :])
        while len(received) < count:
            received += client.recv(1 << 16)
        tell(is_equal=received == sent)


@pytest.mark.lab(seconds=40)
def test_kernel_to_kernel(kernel) -> None:
    """A control: where this fails, nothing of ours is to blame."""
    server = kernel.start("server", serve, COUNT)
    port = server.fact()["port"]
    client = kernel.start("client", connect, port, COUNT)
    port = client.fact()["port"]
    found = kernel.sockets(port=port) + kernel.sockets(peer_port=port)
    assert client.fact()["is_equal"]
    assert [end.wait() for end in (server, client)] == [0, 0]
    views = [(one.mode, one.device, one.role) for one in found]
    assert views == [("smcr", "rxe1", "client"), ("smcr", "rxe0", "server")]
    kernel.wait_until_gone()
