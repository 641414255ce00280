"""Who owns the other end of a TCP connection, when that is a user of this host.

Decides nothing: one question to the kernel, which knows every socket of this network
namespace by its addresses. A peer of another host, and one that has closed its socket,
has no owner here: the kernel shows what is left of a closed one as root's, and where no
connection fits it shows a listener of that port. The option says nothing of users, and
all peers of a host have its address in common: without this, strangers would share what
one peer may have with us.

Source: sock_diag(7); kernel counterpart: inet_diag.c (inet_diag_find_one_icsk).
"""

from __future__ import annotations

import socket
import struct

from pysmc.discovery.address import endpoint

__all__ = ["owner_of_peer"]

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 1
NO_COOKIE = b"\xff" * 8
ALL_STATES = 0xFFFFFFFF
HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""
ANSWER_BYTES = 4096
STATE_AT = HEADER.size + 1
TCP_LISTEN = 10
UID_AT = HEADER.size + 4 + 48 + 12
"""Where struct inet_diag_msg has idiag_uid: after four bytes, the two addresses, and
three numbers. idiag_inode follows, 0 where no process holds the socket any more."""


def owner_of_peer(conn: socket.socket) -> int | None:
    """Ask for the user number of the socket at the other end: four system calls.

    Args:
        conn: A connected TCP socket.

    Returns:
        None when it is not of this host and network namespace, is closed, or the kernel
        does not say.
    """
    try:
        peer, own = endpoint(conn.getpeername()), endpoint(conn.getsockname())
    except OSError:
        return None
    if peer is None or own is None:
        return None
    family = socket.AF_INET if len(peer.packed) == 4 else socket.AF_INET6
    # From the other end's view: its own address comes first.
    body = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, ALL_STATES)
    body += struct.pack("!HH", peer.port, own.port)
    body += peer.packed.ljust(16, b"\0") + own.packed.ljust(16, b"\0")
    body += struct.pack("=I", peer.scope) + NO_COOKIE
    header = HEADER.pack(
        HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0
    )
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    try:
        with socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG) as netlink:
            netlink.send(header + body)
            # The kernel has answered before send() returns.
            answer = netlink.recv(ANSWER_BYTES)
    except OSError:  # a kernel without it, or no descriptor left
        return None
    _, message, *_ = HEADER.unpack_from(answer)
    if message != SOCK_DIAG_BY_FAMILY or len(answer) < UID_AT + 8:
        return None  # an error: it knows no such socket
    uid: int
    uid, inode = struct.unpack_from("=II", answer, UID_AT)
    return uid if inode and answer[STATE_AT] != TCP_LISTEN else None
