"""The mark: a DSCP on the client's SYN, which the accepting process can read.

Decides how a socket is marked, how it gets its old values back, and whether an accepted
connection was marked. Knows nothing of beacons or of what a mark leads to.

The DSCP is 001011, of the pool xxxx11 for experimental or local use (RFC 2474 section
6). A listener with TCP_SAVE_SYN keeps the headers of each SYN; TCP_SAVED_SYN reads them
once from the accepted socket. Under a SYN cookie nothing is kept.

Source: RFC 2474; ip(7), ipv6(7), tcp(7); kernel counterpart: tcp_input.c
(tcp_reqsk_record_syn), ip_sockglue.c (IP_TOS also sets the socket's priority).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from pysmc.discovery.saved_syn import read_syn

__all__ = [
    "MARK_TOS",
    "MarkedSocket",
    "is_marked",
    "keeps_syn",
    "read_mark",
    "save_syn",
    "set_mark",
]

TCP_SAVE_SYN = 27
"""On a listener: keep the headers of each SYN (Linux 4.2)."""

MARK_TOS = 0x2C
"""The mark as TOS or traffic class: DSCP 001011, and no ECN bits."""
DSCP_SHIFT = 2
"""The two low bits of a TOS are ECN's, not ours (RFC 3168 section 5)."""
PRIORITY_MAX = 6
"""Highest SO_PRIORITY that may be set without CAP_NET_ADMIN."""


@dataclass(frozen=True, slots=True)
class MarkedSocket:
    """What the mark changed on a socket, to be put back."""

    level: int
    """IPPROTO_IP or IPPROTO_IPV6."""
    option: int
    """IP_TOS or IPV6_TCLASS."""
    priority: int
    """SO_PRIORITY before, which IP_TOS overwrites."""

    def clear(self, sock: socket.socket) -> None:
        """Put the old values back; nothing happens on a socket that is closed."""
        try:
            sock.setsockopt(self.level, self.option, 0)
            if self.priority:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, self.priority)
        except OSError:
            # Closed meanwhile: then there is nothing left to put back.
            return


def set_mark(sock: socket.socket, *, ipv4: bool) -> MarkedSocket | None:
    """Mark a socket that is about to connect.

    Args:
        sock: A TCP socket, not connected.
        ipv4: Whether it dials an IPv4 address; a mapped address is one.

    Returns:
        What to `MarkedSocket.clear` once connected. None, with nothing changed, when
        the application chose a TOS of its own, or a priority that could not be put
        back.

    Raises:
        OSError: The kernel refused the option.
    """
    level, option = (
        (socket.IPPROTO_IP, socket.IP_TOS)
        if ipv4
        else (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
    )
    if sock.getsockopt(level, option):
        return None
    # Only IP_TOS changes the priority; one that needs a privilege could not be
    # restored after the process has dropped it.
    priority = 0
    if ipv4:
        priority = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY)
    if priority > PRIORITY_MAX:
        return None
    sock.setsockopt(level, option, MARK_TOS)
    return MarkedSocket(level, option, priority)


def save_syn(listener: socket.socket) -> None:
    """Make a listener keep the SYN headers of the connections it accepts.

    Raises:
        OSError: The socket is not TCP, or the kernel does not know the option.
    """
    listener.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)


def keeps_syn(conn: socket.socket) -> bool:
    """Tell whether the listener of an accepted socket had been told to keep SYNs."""
    try:
        return conn.getsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN) != 0
    except OSError:
        return False


def read_mark(conn: socket.socket) -> bool | None:
    """Read, once, whether an accepted connection was marked: one system call.

    Returns:
        None when no SYN was kept: its listener was not told to, the answer was a SYN
        cookie, or it was read before.

    Raises:
        OSError: The socket is not TCP, or it is closed.
    """
    return is_marked(read_syn(conn))


def is_marked(syn: bytes) -> bool | None:
    """Tell whether a SYN was marked; None when there is none."""
    if len(syn) < 2:
        return None
    # IPv4 has it as its second byte; IPv6 after the 4 bits of the version.
    is_ipv4 = syn[0] >> 4 == 4
    traffic_class = syn[1] if is_ipv4 else (syn[0] & 0x0F) << 4 | syn[1] >> 4
    return traffic_class >> DSCP_SHIFT == MARK_TOS >> DSCP_SHIFT
