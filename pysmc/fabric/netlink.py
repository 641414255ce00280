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
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pysmc.fabric.netlink_messages import (
    ANSWER_BYTES,
    DUMP,
    Questions,
    build_attribute,
    not_understood,
    open_socket,
    parse_attributes,
    parse_messages,
)

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

_ROUTE = struct.Struct("=8BI")  # family, lengths, TOS, table, ..., type; flags
_NEIGHBOUR = struct.Struct("=BBHiHBB")  # family, -, -, interface, state, flags, type
_ADDRESS = struct.Struct("=4BI")  # family, prefix, flags, scope; interface
_NUMBER = struct.Struct("=I")
_NEW_ADDRESS, _GET_ADDRESS = 20, 22
_NEW_ROUTE, _GET_ROUTE = 24, 26
_NEW_NEIGHBOUR, _GET_NEIGHBOUR = 28, 30
_NEIGHBOUR_GROUP = 1 << 2  # RTNLGRP_NEIGH

_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_VIA = 1, 2, 4, 5, 18
_NDA_DST = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_UNICAST_ROUTE, _LOCAL_ROUTE = 1, 2  # RTN_UNICAST, RTN_LOCAL


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
        self._questions = Questions(socket.NETLINK_ROUTE)

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
        body += build_attribute(_RTA_DST, to.packed)
        if source is not None:
            body += build_attribute(_RTA_SRC, source.packed)
        if interface:
            body += build_attribute(_RTA_OIF, _NUMBER.pack(interface))
        for kind, answer in self._ask(_GET_ROUTE, 0, body):
            if kind == _NEW_ROUTE:
                return _route_of(answer)
        raise not_understood()

    def neighbour(self, address: Address, interface: int) -> Neighbour | None:
        """Look an address up among a network device's neighbours; None if unknown.

        Raises:
            OSError: The kernel does not tell.
        """
        body = _NEIGHBOUR.pack(_family(address), 0, 0, interface, 0, 0, 0)
        body += build_attribute(_NDA_DST, address.packed)
        try:
            for kind, answer in self._ask(_GET_NEIGHBOUR, 0, body):
                if kind == _NEW_NEIGHBOUR:
                    return _neighbour_of(answer)
        except FileNotFoundError:
            return None
        raise not_understood()

    def addresses(self, interface: int) -> list[Interface]:
        """List the addresses of a network device, with their networks.

        Raises:
            OSError: The kernel does not tell.
        """
        found = []
        for kind, answer in self._ask(_GET_ADDRESS, DUMP, _ADDRESS.pack(*[0] * 5)):
            if kind == _NEW_ADDRESS:
                family, prefix, _, _, number = _ADDRESS.unpack_from(answer)
                attributes = parse_attributes(answer, _ADDRESS.size)
                # Of a point-to-point link IFA_ADDRESS is the peer's.
                packed = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS, b""))
                if number == interface and family in _LENGTHS:
                    found.append(ipaddress.ip_interface((packed, prefix)))
        return found

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._questions.close()

    def _ask(self, kind: int, flags: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        return self._questions.ask(kind, flags, body)


class NeighbourEvents:
    """Hears of every change of a neighbour, from now on.

    Raises:
        OSError: There is no descriptor left, or netlink is forbidden here.
    """

    def __init__(self) -> None:
        self._socket = open_socket(socket.NETLINK_ROUTE, _NEIGHBOUR_GROUP)

    def fileno(self) -> int:
        """The descriptor; readable when something was heard."""
        return self._socket.fileno()

    def take(self) -> list[Neighbour]:
        """Take what was heard; empty when there is nothing.

        Raises:
            OSError: ENOBUFS: some of it was lost, so ask anew.
        """
        try:
            data = self._socket.recv(ANSWER_BYTES)
        except BlockingIOError:
            return []
        return [
            neighbour
            for kind, _, answer in parse_messages(data)
            if kind == _NEW_NEIGHBOUR and (neighbour := _neighbour_of(answer))
        ]

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()


# Layouts

_LENGTHS = {socket.AF_INET: 4, socket.AF_INET6: 16}


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _route_of(answer: bytes) -> Route:
    attributes = parse_attributes(answer, _ROUTE.size)
    gateway = attributes.get(_RTA_GATEWAY)
    if gateway is None and _RTA_VIA in attributes:
        gateway = attributes[_RTA_VIA][2:]  # an IPv6 one of an IPv4 route
    kind = _ROUTE.unpack_from(answer)[7]
    if kind not in {_UNICAST_ROUTE, _LOCAL_ROUTE}:
        # A peer may name a broadcast, whose neighbour is always there.
        raise OSError(errno.EADDRNOTAVAIL, "it is not the address of one host")
    if _RTA_OIF not in attributes:
        raise not_understood()
    return Route(
        interface=_NUMBER.unpack(attributes[_RTA_OIF])[0],
        gateway=None if gateway is None else ipaddress.ip_address(gateway),
        is_local=kind == _LOCAL_ROUTE,
    )


def _neighbour_of(answer: bytes) -> Neighbour | None:
    family, _, _, interface, state, _, _ = _NEIGHBOUR.unpack_from(answer)
    packed = parse_attributes(answer, _NEIGHBOUR.size).get(_NDA_DST, b"")
    if len(packed) != _LENGTHS.get(family):
        return None  # a bridge's, for example
    return Neighbour(ipaddress.ip_address(packed), interface, state)
