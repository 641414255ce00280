"""The DSCP on the SYN: set, seen by the server, and taken off again."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from pysmc.discovery.mark import (
    MARK_TOS,
    keeps_syn,
    read_mark,
    save_syn,
    set_mark,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

REFUSED = r"not supported|not available"
V4 = (socket.IPPROTO_IP, socket.IP_TOS)
V6 = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)

KINDS = [
    pytest.param((socket.AF_INET, "127.0.0.1", "127.0.0.1"), id="ipv4"),
    pytest.param((socket.AF_INET6, "::1", "::1"), id="ipv6"),
    pytest.param((socket.AF_INET6, "::", "::ffff:127.0.0.1"), id="mapped"),
    pytest.param((socket.AF_INET, "::", "127.0.0.1"), id="ipv4-to-dual-stack"),
]


class Pair:
    """A listener that keeps SYNs, and a socket that will connect to it."""

    def __init__(self, family: int, bound: str, dialled: str) -> None:
        inner = socket.AF_INET6 if ":" in bound else socket.AF_INET
        self.listener = socket.socket(inner)
        if inner == socket.AF_INET6:
            self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.listener.bind((bound, 0))
        self.listener.listen()
        self.client = socket.socket(family)
        self.address = (dialled, self.listener.getsockname()[1])
        self.is_ipv4 = "." in dialled
        self.conn: socket.socket | None = None

    def connect(self) -> socket.socket:
        self.client.connect(self.address)
        self.conn, _ = self.listener.accept()
        return self.conn

    def close(self) -> None:
        for sock in (self.listener, self.client, self.conn):
            if sock is not None:
                sock.close()


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(*request.param)
    yield made
    made.close()


def test_mark_is_seen_once_and_taken_off(pair: Pair) -> None:
    save_syn(pair.listener)
    level, option = V4 if pair.is_ipv4 else V6
    marked = set_mark(pair.client, ipv4=pair.is_ipv4)
    assert marked is not None
    assert pair.client.getsockopt(level, option) == MARK_TOS
    conn = pair.connect()
    marked.clear(pair.client)
    assert pair.client.getsockopt(level, option) == 0
    assert read_mark(conn) is True
    assert read_mark(conn) is None, "the kernel forgets it once it is read"
    assert keeps_syn(conn)


def test_unmarked_connection(pair: Pair) -> None:
    save_syn(pair.listener)
    assert read_mark(pair.connect()) is False


def test_listener_that_keeps_no_syn(pair: Pair) -> None:
    marked = set_mark(pair.client, ipv4=pair.is_ipv4)
    assert marked is not None
    conn = pair.connect()
    assert read_mark(conn) is None
    assert not keeps_syn(conn)


def test_another_dscp_is_no_mark(pair: Pair) -> None:
    save_syn(pair.listener)
    level, option = V4 if pair.is_ipv4 else V6
    pair.client.setsockopt(level, option, 0x28)
    assert read_mark(pair.connect()) is False


def test_the_applications_own_tos_stays(pair: Pair) -> None:
    save_syn(pair.listener)
    level, option = V4 if pair.is_ipv4 else V6
    pair.client.setsockopt(level, option, 0x10)
    assert set_mark(pair.client, ipv4=pair.is_ipv4) is None
    assert pair.client.getsockopt(level, option) == 0x10


def test_the_applications_own_priority_is_put_back(pair: Pair) -> None:
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 5)
    marked = set_mark(pair.client, ipv4=pair.is_ipv4)
    assert marked is not None
    pair.connect()
    marked.clear(pair.client)
    assert pair.client.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to set a high priority")
def test_a_priority_that_could_not_be_put_back_forbids_the_mark() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 7)
        assert set_mark(sock, ipv4=True) is None
        assert sock.getsockopt(*V4) == 0
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 7


def test_a_closed_socket_has_nothing_to_put_back() -> None:
    sock = socket.socket()
    marked = set_mark(sock, ipv4=True)
    sock.close()
    assert marked is not None
    marked.clear(sock)
    assert sock.fileno() == -1


def test_sockets_that_are_not_tcp() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        with pytest.raises(OSError, match=REFUSED):
            save_syn(sock)
        with pytest.raises(OSError, match=REFUSED):
            read_mark(sock)
        assert not keeps_syn(sock)


def test_ipv6_mark_on_an_ipv4_socket_is_an_error() -> None:
    with (
        socket.socket(socket.AF_INET) as sock,
        pytest.raises(OSError, match=REFUSED),
    ):
        set_mark(sock, ipv4=False)
