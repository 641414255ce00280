"""TCP addresses as discovery compares them, and what names one connection.

Decides when two addresses are the same (an IPv4-mapped IPv6 address is the IPv4
address), which bytes identify a TCP connection on this host, and whether an address
belongs to this host. Knows nothing of beacons, marks or messages.

Source: socket(7), ip(7), ipv6(7), rtnetlink(7); kernel counterpart: inet_hashtables.c,
which keeps one socket for each (namespace, device, 4-tuple).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Endpoint", "bound_device", "connection_id", "endpoint", "is_local"]

SO_BINDTOIFINDEX = 62
"""Number of the device that a socket is bound to (Linux 5.1)."""
SO_NETNS_COOKIE = 71
"""A number of the network namespace, never used twice (Linux 5.14)."""
NETNS_COOKIE_BYTES = 8

MAPPED_PREFIX = bytes(10) + b"\xff\xff"
"""First 12 bytes of an IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2)."""
LOOPBACK_OF_ANY = {bytes(4): b"\x7f\0\0\1", bytes(16): bytes(15) + b"\x01"}
"""Linux connects to the loopback address when the unspecified one is dialled."""

NONLOCAL_BIND = {
    socket.AF_INET: "/proc/sys/net/ipv4/ip_nonlocal_bind",
    socket.AF_INET6: "/proc/sys/net/ipv6/ip_nonlocal_bind",
}
"""Whether sockets may be bound to addresses that are not the host's."""
SYSCTL_BYTES = 16

RTM_NEWROUTE, RTM_GETROUTE, NLM_F_REQUEST = 24, 26, 1
RTA_DST, RTA_OIF, RTN_LOCAL = 1, 4, 2
NETLINK_ANSWER_BYTES = 4096


class Endpoint(NamedTuple):
    """One end of a TCP connection, or a listener's address."""

    packed: bytes
    """4 bytes of an IPv4 address (also of a mapped one) or 16 of an IPv6 address."""
    port: int
    """TCP port, 16 bits."""
    scope: int = 0
    """Device number of a link-local address, 0 otherwise."""

    @property
    def is_link_local(self) -> bool:
        """Whether the address is fe80::/10, which every device has for itself."""
        packed = self.packed
        return len(packed) == 16 and packed[0] == 0xFE and packed[1] & 0xC0 == 0x80


def endpoint(address: Sequence[Any]) -> Endpoint | None:
    """Bring a socket address of AF_INET or AF_INET6 into the form that is compared.

    Args:
        address: What `socket.getsockname` gives or `socket.connect` takes.

    Returns:
        None when the host is not numeric or the address is not of these families.
    """
    if not isinstance(address, tuple) or len(address) < 2:
        return None
    host, port = address[0], address[1]
    if not isinstance(host, str) or not isinstance(port, int):
        return None
    scope = address[3] if len(address) > 3 else 0
    if ":" not in host:
        try:
            return Endpoint(socket.inet_pton(socket.AF_INET, host), port)
        except OSError:
            return None
    plain, _, zone = host.partition("%")
    try:
        packed = socket.inet_pton(socket.AF_INET6, plain)
        if zone and not scope:
            scope = int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
    except OSError:
        return None
    if packed.startswith(MAPPED_PREFIX):
        return Endpoint(packed[12:], port)
    return Endpoint(packed, port, scope)


def dialled(target: Endpoint) -> Endpoint:
    """Replace the unspecified address by the one that Linux connects to instead."""
    loopback = LOOPBACK_OF_ANY.get(target.packed)
    return target if loopback is None else target._replace(packed=loopback)


def bound_device(sock: socket.socket) -> int:
    """Return the number of the device that a socket is bound to, 0 for none."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX)
    except OSError:  # the kernel is older than the option
        return 0


def connection_id(sock: socket.socket, *, client: bool) -> bytes:
    """Return bytes that no other live connection of this host has, equal on both ends.

    The 4-tuple alone is not enough: each network namespace has its own loopback, and
    each device of its own routing domain (VRF) its own connections. So the namespace
    and the device belong to it.

    Args:
        sock: A connected TCP socket.
        client: Which end it is.

    Returns:
        24 bytes for IPv4, 48 for IPv6.

    Raises:
        OSError: The socket is closed, or its connection is gone (ENOTCONN).
    """
    peer, own = endpoint(sock.getpeername()), endpoint(sock.getsockname())
    if peer is None or own is None:
        raise OSError(errno.ENOTCONN, "not a connected TCP socket")
    ends = (own, peer) if client else (peer, own)
    try:
        cookie = sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, NETNS_COOKIE_BYTES)
    except OSError:  # the kernel is older than the option
        cookie = bytes(NETNS_COOKIE_BYTES)
    where = cookie + struct.pack("!I", bound_device(sock))
    return where + b"".join(struct.pack("!H", end.port) + end.packed for end in ends)


def is_local(target: Endpoint) -> bool:
    """Tell whether a connection to this address stays on this host.

    A socket can be bound to the host's own addresses only, so a bind is the test. Where
    the administrator allowed binding to any address, the routing table is asked.
    """
    family = socket.AF_INET if len(target.packed) == 4 else socket.AF_INET6
    host = socket.inet_ntop(family, target.packed)
    address = (host, 0) if len(target.packed) == 4 else (host, 0, 0, target.scope)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return not _binds_anywhere(family) or _is_routed_locally(target)


def _binds_anywhere(family: socket.AddressFamily) -> bool:
    # Each time anew, for it may change; by three system calls, not by a file object's.
    try:
        fileno = os.open(NONLOCAL_BIND[family], os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no /proc: the sysctl's default is off
        return False
    try:
        return os.read(fileno, SYSCTL_BYTES).strip() != b"0"
    finally:
        os.close(fileno)


def _is_routed_locally(target: Endpoint) -> bool:
    """Ask the routing table whether the address is delivered to this host."""
    packed = target.packed
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    attributes = struct.pack("=HH", 4 + len(packed), RTA_DST) + packed
    if target.scope:
        attributes += struct.pack("=HHI", 8, RTA_OIF, target.scope)
    # struct rtmsg: family, length of the destination in bits, all else 0.
    body = struct.pack("=BB6xI", family, 8 * len(packed), 0) + attributes
    request = struct.pack("=IHHII", 16 + len(body), RTM_GETROUTE, NLM_F_REQUEST, 0, 0)
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    try:
        with socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE) as netlink:
            netlink.send(request + body)
            # The kernel has answered before send() returns.
            answer = netlink.recv(NETLINK_ANSWER_BYTES)
    except OSError:
        return False
    # In the answer the route's type is the eighth byte of struct rtmsg.
    is_route = len(answer) >= 28 and struct.unpack_from("=H", answer, 4)[0] == (
        RTM_NEWROUTE
    )
    return is_route and answer[16 + 7] == RTN_LOCAL
