"""What the kernel says of routes, neighbours and addresses, asked for real."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from pysmc.fabric.netlink import (
    NEIGHBOUR_FAILED,
    NEIGHBOUR_VALID,
    Neighbour,
    NeighbourEvents,
    Netlink,
    Route,
)
from tests.fabric.netns import ip, network_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

address = ipaddress.ip_address
interface = ipaddress.ip_interface

NET = """link set lo up
link add near type veth peer name far
addr add 10.1.0.1/24 dev near
addr add fd01::1/64 dev near nodad
addr add 10.1.7.1 peer 10.1.7.2/32 dev near
link set far up
link set near up
route add 10.2.0.0/16 via 10.1.0.254 dev near
route add 10.3.0.0/16 via inet6 fd01::fe dev near
route add unreachable 10.4.0.0/16"""


@pytest.fixture
def net() -> Iterator[int]:
    with network_namespace():
        for words in NET.splitlines():
            ip(words)
        yield socket.if_nametoindex("near")


@pytest.fixture
def asking(net: int) -> Iterator[Netlink]:
    asked = Netlink()
    yield asked
    asked.close()
    asked.close()


@pytest.mark.netns
def test_routes(net: int, asking: Netlink) -> None:
    source = address("10.1.0.1")
    for to, gateway in (
        ("10.1.0.9", None),
        ("10.2.0.9", "10.1.0.254"),
        ("10.3.0.9", "fd01::fe"),
    ):
        found = asking.route(address(to), source, net)
        expected = None if gateway is None else address(gateway)
        assert found == Route(net, expected, is_local=False), to
    assert asking.route(address("fd01::9"), None) == Route(net, None, is_local=False)
    assert asking.route(source, None).is_local
    with pytest.raises(OSError, match="No route to host"):
        asking.route(address("10.4.0.1"), source)
    with pytest.raises(OSError, match="unreachable"):
        asking.route(address("192.0.2.1"), source)


@pytest.mark.netns
def test_addresses_have_their_networks(net: int, asking: Netlink) -> None:
    found = [each for each in asking.addresses(net) if not each.ip.is_link_local]
    assert found == [
        interface("10.1.0.1/24"),
        interface("10.1.7.1/32"),
        interface("fd01::1/64"),
    ]
    assert asking.addresses(12345) == []


@pytest.mark.netns
def test_neighbours_and_what_is_heard_of_them(net: int, asking: Netlink) -> None:
    peer = address("10.1.0.9")
    heard = NeighbourEvents()
    assert asking.neighbour(peer, net) is None
    ip("neigh replace 10.1.0.9 lladdr 02:00:00:00:00:09 dev near nud stale")
    known = asking.neighbour(peer, net)
    assert known is not None
    assert known.state & NEIGHBOUR_VALID
    ip("neigh replace 10.1.0.9 dev near nud failed")
    found = []
    while batch := heard.take():
        found += [each for each in batch if each.address == peer]
    assert found[0] == known
    assert found[-1] == Neighbour(peer, net, NEIGHBOUR_FAILED)
    heard.close()
    heard.close()


class Answers:
    """Stands in for the socket: says what it is told to, whatever was asked."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)

    def sendto(self, data: bytes, address: tuple[int, int]) -> None:
        assert address == (0, 0)
        assert len(data) == struct.unpack_from("=I", data)[0]

    def recv(self, size: int) -> bytes:
        return self.answers.pop(0)

    def close(self) -> None:
        self.answers.clear()


def message(kind: int, sequence: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, sequence, 0) + body


def answered(*answers: bytes) -> Netlink:
    asked = Netlink()
    asked._questions._socket.close()
    asked._questions._socket = Answers(*answers)  # type: ignore[assignment]
    return asked


ROUTE = struct.pack("=8BI", 2, 32, 0, 0, 0, 0, 0, 1, 0)
HOME = address("10.1.0.1")


def test_an_answer_to_an_earlier_question_is_passed_over() -> None:
    late = message(24, 7, ROUTE + struct.pack("=HHI", 8, 4, 1))
    right = message(24, 1, ROUTE + struct.pack("=HHI", 8, 4, 2))
    found = answered(late + right).route(HOME, None)
    assert found == Route(2, None, is_local=False)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(message(24, 1, ROUTE), id="no device"),
        pytest.param(message(3, 1, b""), id="nothing"),
        pytest.param(struct.pack("=IHHII", 3, 24, 0, 1, 0), id="bad length"),
        pytest.param(
            message(24, 1, ROUTE + struct.pack("=HHI", 2, 4, 1)), id="bad attribute"
        ),
    ],
)
def test_what_is_not_understood_is_an_error(answer: bytes) -> None:
    with pytest.raises(OSError, match="not understood"):
        answered(answer).route(HOME, None)


def test_a_neighbour_that_is_not_understood_is_none() -> None:
    body = struct.pack("=BBHiHBB", 7, 0, 0, 1, 2, 0, 0)  # AF_BRIDGE
    assert answered(message(28, 1, body)).neighbour(HOME, 1) is None
    with pytest.raises(OSError, match="not understood"):
        answered(message(3, 1, b"")).neighbour(HOME, 1)


def test_without_netlink_there_is_no_descriptor_left(monkeypatch) -> None:
    made = []

    class Forbidden(socket.socket):
        def bind(self, address) -> None:
            made.append(self)
            raise OSError(errno.EPERM, "forbidden")

    monkeypatch.setattr("pysmc.fabric.netlink_messages.socket.socket", Forbidden)
    with pytest.raises(OSError, match="forbidden"):
        Netlink()
    assert made[0].fileno() == -1
