"""Who owns the other end of a connection on this host."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.discovery import owner as owner_module
from pysmc.discovery.owner import owner_of_peer

if TYPE_CHECKING:
    from collections.abc import Iterator

STRANGER = 65533


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, ...]]:
    """A connection: listener's address and what is dialled, client and server."""
    bound, to = getattr(request, "param", ("127.0.0.1", "127.0.0.1"))
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    dual = bound == "::"
    with socket.create_server((bound, 0), family=family, dualstack_ipv6=dual) as there:
        client = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET)
        client.connect((to, there.getsockname()[1]))
        server, _ = there.accept()
    with client, server:
        yield client, server


@pytest.mark.parametrize(
    "pair",
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("::", "127.0.0.1"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
    ],
    indirect=True,
)
def test_our_own_socket(pair: Any) -> None:
    for end in pair:
        assert owner_of_peer(end) == os.geteuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_socket_of_another_user(pair: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        client = socket.socket()
        os.fchown(client.fileno(), STRANGER, -1)
        with client:
            client.connect(there.getsockname())
            server, _ = there.accept()
            with server:
                assert owner_of_peer(server) == STRANGER
                assert owner_of_peer(client) == 0


def test_who_has_no_owner_here(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = pair
    client.close()
    assert owner_of_peer(server) is None, "nobody's, once it is closed"
    assert owner_of_peer(client) is None
    left, right = socket.socketpair()
    with left, right:
        assert owner_of_peer(left) is None
    monkeypatch.setattr(owner_module, "NETLINK_SOCK_DIAG", 31)
    assert owner_of_peer(server) is None


class FarConnection:
    """A peer of another host, whose source port is a service's here."""

    def __init__(self, port: int) -> None:
        self._port = port

    def getpeername(self) -> tuple[str, int]:
        return "127.9.9.9", self._port

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 1


def test_a_listener_owns_nobody_s_connection() -> None:
    with socket.create_server(("", 0)) as there:
        far: Any = FarConnection(there.getsockname()[1])
        assert owner_of_peer(far) is None


def test_an_answer_that_is_an_error(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "SOCK_DIAG_BY_FAMILY", 99)
    assert owner_of_peer(pair[1]) is None
