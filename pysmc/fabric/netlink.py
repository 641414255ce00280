"""What the kernel knows of routes, neighbours and addresses, asked over netlink.

Decides nothing. Every question is one request on a non-blocking socket: the kernel has
put its answer there when the send returns, so that nothing waits. Three requests of
fixed layout need no library: the one that is well kept takes 0.15 s to import, which
would stop the loop in the middle of its first connection, and 13 MiB.

Source: rtnetlink(7), netlink(7), kernel `include/uapi/linux/rtnetlink.h`,
`neighbour.h`, `if_addr.h`.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "NEIGHBOUR_FAILED",
    "NEIGHBOUR_VALID",
    "Address",
    "Interface",
    "Neighbour",
    "NeighbourEvents",
    "Netlink",
    "Route",
]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

NEIGHBOUR_FAILED: Final = 0x20
"""State of a neighbour that did not answer."""
NEIGHBOUR_VALID: Final = 0xDE
"""States with a usable address: REACHABLE, STALE, DELAY, PROBE, NOARP, PERMANENT."""

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ROUTE = struct.Struct("=8BI")  # family, lengths, TOS, table, ..., type; flags
_NEIGHBOUR = struct.Struct("=BBHiHBB")  # family, -, -, interface, state, flags, type
_ADDRESS = struct.Struct("=4BI")  # family, prefix, flags, scope; interface
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_NUMBER = struct.Struct("=I")
_ERROR = struct.Struct("=i")

_ERROR_TYPE, _DONE = 2, 3
_NEW_ADDRESS, _GET_ADDRESS = 20, 22
_NEW_ROUTE, _GET_ROUTE = 24, 26
_NEW_NEIGHBOUR, _GET_NEIGHBOUR = 28, 30
_REQUEST, _DUMP = 0x1, 0x300
_NEIGHBOUR_GROUP = 1 << 2  # RTNLGRP_NEIGH

_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_VIA = 1, 2, 4, 5, 18
_NDA_DST = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_UNICAST_ROUTE, _LOCAL_ROUTE = 1, 2  # RTN_UNICAST, RTN_LOCAL
_TYPE_MASK = 0x3FFF  # without the flags "nested" and "network byte order"
_ANSWER_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Route:
    """How a packet would leave."""

    interface: int
    """Number of the network device."""
    gateway: Address | None
    """The next hop, None when the destination is on the link."""
    is_local: bool
    """Whether the destination is an address of this host."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """What is known of an address on a link."""

    address: Address
    interface: int
    """Number of the network device."""
    state: int
    """One of the kernel's NUD states; see `NEIGHBOUR_VALID`."""


class Netlink:
    """Asks the kernel; unprivileged, without waiting.

    Raises:
        OSError: There is no descriptor left, or netlink is forbidden here.
    """

    def __init__(self) -> None:
        self._socket = _open()
        self._sequence = 0

    def route(self, to: Address, source: Address | None, interface: int = 0) -> Route:
        """Find the route of a packet that is about to be sent.

        Args:
            to: Where it goes.
            source: Its source address, when that is given.
            interface: Number of the network device that it is bound to, 0 for none.

        Raises:
            OSError: There is none; the errno says why.
        """
        bits = to.max_prefixlen
        body = _ROUTE.pack(_family(to), bits, bits if source else 0, *[0] * 6)
        body += _attribute(_RTA_DST, to.packed)
        if source is not None:
            body += _attribute(_RTA_SRC, source.packed)
        if interface:
            body += _attribute(_RTA_OIF, _NUMBER.pack(interface))
        for kind, answer in self._ask(_GET_ROUTE, 0, body):
            if kind == _NEW_ROUTE:
                return _route_of(answer)
        raise _broken()

    def neighbour(self, address: Address, interface: int) -> Neighbour | None:
        """Look an address up among a network device's neighbours; None if unknown.

        Raises:
            OSError: The kernel does not tell.
        """
        body = _NEIGHBOUR.pack(_family(address), 0, 0, interface, 0, 0, 0)
        body += _attribute(_NDA_DST, address.packed)
        try:
            for kind, answer in self._ask(_GET_NEIGHBOUR, 0, body):
                if kind == _NEW_NEIGHBOUR:
                    return _neighbour_of(answer)
        except FileNotFoundError:
            return None
        raise _broken()

    def addresses(self, interface: int) -> list[Interface]:
        """List the addresses of a network device, with their networks.

        Raises:
            OSError: The kernel does not tell.
        """
        found = []
        for kind, answer in self._ask(_GET_ADDRESS, _DUMP, _ADDRESS.pack(*[0] * 5)):
            if kind == _NEW_ADDRESS:
                family, prefix, _, _, number = _ADDRESS.unpack_from(answer)
                attributes = _attributes(answer, _ADDRESS.size)
                # Of a point-to-point link IFA_ADDRESS is the peer's.
                packed = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS, b""))
                if number == interface and family in _LENGTHS:
                    found.append(ipaddress.ip_interface((packed, prefix)))
        return found

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    def _ask(self, kind: int, flags: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        """Ask, and give the answer's messages: one, or all up to the dump's end."""
        self._sequence += 1
        length = _HEADER.size + len(body)
        header = _HEADER.pack(length, kind, flags | _REQUEST, self._sequence, 0)
        self._socket.sendto(header + body, (0, 0))
        while True:
            # A dump goes on with each call; nothing of it has to be awaited.
            for found, sequence, answer in _messages(self._socket.recv(_ANSWER_BYTES)):
                if sequence != self._sequence:
                    continue  # left over from a question whose answer broke off
                if found == _ERROR_TYPE:
                    number = -_ERROR.unpack_from(answer)[0]
                    raise OSError(number, os.strerror(number))
                if found == _DONE:
                    return
                yield found, answer


class NeighbourEvents:
    """Hears of every change of a neighbour, from now on.

    Raises:
        OSError: There is no descriptor left, or netlink is forbidden here.
    """

    def __init__(self) -> None:
        self._socket = _open(_NEIGHBOUR_GROUP)

    def fileno(self) -> int:
        """The descriptor; readable when something was heard."""
        return self._socket.fileno()

    def take(self) -> list[Neighbour]:
        """Take what was heard; empty when there is nothing.

        Raises:
            OSError: ENOBUFS: some of it was lost, so ask anew.
        """
        try:
            data = self._socket.recv(_ANSWER_BYTES)
        except BlockingIOError:
            return []
        return [
            neighbour
            for kind, _, answer in _messages(data)
            if kind == _NEW_NEIGHBOUR and (neighbour := _neighbour_of(answer))
        ]

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()


def _open(groups: int = 0) -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    made = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
    try:
        made.bind((0, groups))
    except BaseException:
        made.close()
        raise
    return made


# Layouts

_LENGTHS = {socket.AF_INET: 4, socket.AF_INET6: 16}


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _attribute(kind: int, value: bytes) -> bytes:
    header = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind)
    return header + value + bytes(-len(value) % 4)


def _attributes(data: bytes, offset: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Give type, sequence number and body of each message of a datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            raise _broken()
        yield kind, sequence, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _route_of(answer: bytes) -> Route:
    attributes = _attributes(answer, _ROUTE.size)
    gateway = attributes.get(_RTA_GATEWAY)
    if gateway is None and _RTA_VIA in attributes:
        gateway = attributes[_RTA_VIA][2:]  # an IPv6 one of an IPv4 route
    kind = _ROUTE.unpack_from(answer)[7]
    if kind not in {_UNICAST_ROUTE, _LOCAL_ROUTE}:
        # A peer may name a broadcast, whose neighbour is always there.
        raise OSError(errno.EADDRNOTAVAIL, "it is not the address of one host")
    if _RTA_OIF not in attributes:
        raise _broken()
    return Route(
        interface=_NUMBER.unpack(attributes[_RTA_OIF])[0],
        gateway=None if gateway is None else ipaddress.ip_address(gateway),
        is_local=kind == _LOCAL_ROUTE,
    )


def _neighbour_of(answer: bytes) -> Neighbour | None:
    family, _, _, interface, state, _, _ = _NEIGHBOUR.unpack_from(answer)
    packed = _attributes(answer, _NEIGHBOUR.size).get(_NDA_DST, b"")
    if len(packed) != _LENGTHS.get(family):
        return None  # a bridge's, for example
    return Neighbour(ipaddress.ip_address(packed), interface, state)


def _broken() -> OSError:
    return OSError(0, "the kernel's netlink answer is not understood")
