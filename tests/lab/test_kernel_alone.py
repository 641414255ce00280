"""The kernel's SMC at both ends: what it can do here before we take part."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab.kernel_smc import smc_socket
from tests.lab.smc_netlink import smc_diag

if TYPE_CHECKING:
    import socket

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
            assert data, f"the stream ended {left} bytes too soon"
            accepted.sendall(data)
            left -= len(data)
        assert accepted.recv(1) == b""


def receive(client: socket.socket, count: int) -> bytes:
    """Receive exactly so many bytes."""
    received = b""
    while len(received) < count:
        data = client.recv(min(count - len(received), 1 << 16))
        assert data, f"the stream ended after {len(received)} bytes"
        received += data
    return received


def connect(tell: Any, port: int, count: int) -> None:
    """Send and receive; half way, when both ends are connected, ask for their views."""
    sent = hashlib.sha256(b"abc").digest() * (count // 32)
    with smc_socket() as client:
        client.bind((CLIENT, 0))
        client.connect((SERVER, port))
        mine = client.getsockname()[1]
        client.sendall(sent[: count // 2])
        received = receive(client, count // 2)
        views = [one for one in smc_diag() if mine in {one.port, one.peer_port}]
        tell(views=sorted((one.role, one.mode, one.device) for one in views))
        client.sendall(sent[count // 2 :])
        received += receive(client, count - len(received))
        tell(is_equal=received == sent)


@pytest.mark.lab(seconds=40)
def test_kernel_to_kernel(kernel) -> None:
    """A control: where this fails, nothing of ours is to blame."""
    server = kernel.start("server", serve, COUNT)
    port = server.fact()["port"]
    client = kernel.start("client", connect, port, COUNT)
    views = client.fact()["views"]
    assert client.fact()["is_equal"]
    assert [end.wait() for end in (server, client)] == [0, 0]
    assert views == [["client", "smcr", "rxe1"], ["server", "smcr", "rxe0"]]
    kernel.wait_until_gone()
