"""Addresses in one form, the identity of a connection, and what is local."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.discovery import address
from pysmc.discovery.address import (
    Endpoint,
    bound_device,
    connection_id,
    dialled,
    endpoint,
    is_local,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOOPBACK6 = bytes(15) + b"\x01"


@pytest.mark.parametrize(
    ("sockaddr", "expected"),
    [
        (("127.0.0.1", 80), Endpoint(b"\x7f\0\0\1", 80)),
        (("::1", 80), Endpoint(LOOPBACK6, 80)),
        (("::1", 80, 0, 0), Endpoint(LOOPBACK6, 80)),
        (("::ffff:10.0.0.1", 80, 0, 0), Endpoint(b"\n\0\0\1", 80)),
        (("::ffff:a00:1", 80, 0, 0), Endpoint(b"\n\0\0\1", 80)),
        (("fe80::1%7", 80), Endpoint(b"\xfe\x80" + bytes(13) + b"\1", 80, 7)),
        (("fe80::1%lo", 80), Endpoint(b"\xfe\x80" + bytes(13) + b"\1", 80, 1)),
        (("fe80::1", 80, 0, 3), Endpoint(b"\xfe\x80" + bytes(13) + b"\1", 80, 3)),
        (("fe80::1%9", 80, 0, 3), Endpoint(b"\xfe\x80" + bytes(13) + b"\1", 80, 3)),
        (("localhost", 80), None),
        (("", 80), None),
        (("::1::2", 80), None),
        (("fe80::1%nosuchdevice", 80), None),
        (("127.1", 80), None),
        ("/run/socket", None),
        (b"\0name", None),
        (("127.0.0.1",), None),
        ((1, 2), None),
        (("lo", "x"), None),
    ],
)
def test_endpoint(sockaddr: Any, expected: Endpoint | None) -> None:
    assert endpoint(sockaddr) == expected


def test_link_local() -> None:
    for host, expected in (
        ("fe80::1", True),
        ("febf::1", True),
        ("fec0::1", False),
        ("::1", False),
        ("169.254.0.1", False),
    ):
        found = endpoint((host, 1))
        assert found is not None
        assert found.is_link_local is expected


def test_unspecified_address_leads_to_loopback() -> None:
    assert dialled(Endpoint(bytes(4), 1)) == Endpoint(b"\x7f\0\0\1", 1)
    assert dialled(Endpoint(bytes(16), 1)) == Endpoint(LOOPBACK6, 1)
    assert dialled(Endpoint(b"\n\0\0\1", 1)) == Endpoint(b"\n\0\0\1", 1)


class Connection:
    def __init__(self, bound: str, host: str) -> None:
        inner = socket.AF_INET6 if ":" in bound else socket.AF_INET
        outer = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(inner) as listener:
            if inner == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((bound, 0))
            listener.listen()
            self.client = socket.socket(outer)
            self.client.connect((host, listener.getsockname()[1]))
            self.server, _ = listener.accept()

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture(
    params=[
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("::", "127.0.0.1"),
        ("::", "::ffff:127.0.0.1"),
        ("0.0.0.0", "::ffff:127.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
    ],
    ids="-to-".join,
)
def connection(request: pytest.FixtureRequest) -> Iterator[Connection]:
    made = Connection(*request.param)
    yield made
    made.close()


def test_both_ends_have_the_same_identity(connection: Connection) -> None:
    seen = connection_id(connection.client, client=True)
    assert seen == connection_id(connection.server, client=False)
    assert len(seen) in {24, 48}
    assert seen != connection_id(connection.client, client=False), "the order matters"


def test_connections_differ_in_identity() -> None:
    first, second = (Connection("127.0.0.1", "127.0.0.1") for _ in range(2))
    assert connection_id(first.client, client=True) != connection_id(
        second.client, client=True
    )
    first.close()
    second.close()


def test_a_connection_that_was_reset_has_no_identity(connection: Connection) -> None:
    linger = b"\1\0\0\0\0\0\0\0"  # closing resets the connection
    connection.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.client.close()
    with pytest.raises(OSError, match="not connected"):
        connection_id(connection.server, client=False)


def test_other_sockets_have_no_identity() -> None:
    left, right = socket.socketpair()
    with left, right, pytest.raises(OSError, match="not a connected TCP socket"):
        connection_id(left, client=True)


class OldKernel:
    """A socket without the newer options."""

    def __init__(self, sock: socket.socket) -> None:
        self.getpeername = sock.getpeername
        self.getsockname = sock.getsockname

    def getsockopt(self, *_: int) -> bytes:
        raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))


def test_older_kernels_lack_namespace_and_device(connection: Connection) -> None:
    client: Any = OldKernel(connection.client)
    server: Any = OldKernel(connection.server)
    seen = connection_id(client, client=True)
    assert seen == connection_id(server, client=False)
    assert seen[:12] == bytes(12)
    assert bound_device(client) == 0


CASES = [
    ("127.0.0.1", True),
    ("127.9.8.7", True),
    ("::1", True),
    ("192.0.2.1", False),
    ("2001:db8::1", False),
]


@pytest.mark.parametrize(("host", "expected"), CASES)
def test_is_local(host: str, expected: bool) -> None:
    found = endpoint((host, 80))
    assert found is not None
    assert is_local(found) is expected


@pytest.mark.parametrize(("host", "expected"), CASES)
def test_routing_table_is_asked_where_any_address_can_be_bound(
    host: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Freebind(socket.socket):
        def bind(self, _: Any, /) -> None:
            return

    monkeypatch.setattr(address, "_binds_anywhere", lambda _: True)
    monkeypatch.setattr(socket, "socket", Freebind)
    found = endpoint((host, 80))
    assert found is not None
    assert is_local(found) is expected


def test_without_routing_table_nothing_is_local(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> socket.socket:
        raise PermissionError(errno.EPERM, "no netlink here")

    monkeypatch.setattr(address, "_binds_anywhere", lambda _: True)
    found = Endpoint(b"\x7f\0\0\1", 80)
    real = socket.socket

    def only_inet(family: int, *rest: int) -> socket.socket:
        return refuse() if family == socket.AF_NETLINK else real(family, *rest)

    monkeypatch.setattr(socket, "socket", only_inet)
    assert not is_local(found)


@pytest.mark.parametrize(
    ("text", "expected"), [("0\n", False), ("1\n", True), (None, False)]
)
def test_sysctl(
    text: str | None,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "ip_nonlocal_bind"
    if text is not None:
        path.write_text(text, encoding="ascii")
    monkeypatch.setitem(address.NONLOCAL_BIND, socket.AF_INET, str(path))
    before = len(os.listdir("/proc/self/fd"))
    assert address._binds_anywhere(socket.AF_INET) is expected
    assert len(os.listdir("/proc/self/fd")) == before


def test_scope_goes_into_the_question() -> None:
    # fe80::/64 belongs to no device here: not local, whatever the device's number.
    target = Endpoint(b"\xfe\x80" + bytes(13) + b"\x99", 80, 1)
    assert not address._is_routed_locally(target)
