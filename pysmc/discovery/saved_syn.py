"""The SYN of an accepted connection, which the kernel kept.

Decides whether it showed the SMC option. A listener with TCP_SAVE_SYN keeps the headers
of each SYN; they can be read once from the accepted socket. Under a SYN cookie nothing
is kept.

Source: tcp(7); RFC 9293 section 3.1, RFC 8200 section 4, RFC 7609 A.1; kernel
counterpart: tcp_input.c (tcp_reqsk_record_syn).
"""

from __future__ import annotations

import socket
from typing import Final

__all__ = ["read_syn", "shows_option"]

TCP_SAVED_SYN: Final = 28
"""On an accepted socket: read and forget the headers of its SYN (Linux 4.2)."""
SAVED_SYN_BYTES: Final = 512
"""More than the longest IPv4 header, or IPv6 header with options, and TCP header."""
IPV6_BYTES: Final = 40
IPV6_OPTIONS: Final = frozenset({0, 43, 60})
"""Hop by hop, routing, destination: what may stand between IPv6 and TCP."""
TCP_BYTES: Final = 20
END, NOP = 0, 1
OPTION: Final = bytes.fromhex("fe06e2d4c3d9")


def read_syn(conn: socket.socket) -> bytes:
    """Read the headers of a connection's SYN, once: one system call.

    Returns:
        Nothing when no SYN was kept, or it was read before.

    Raises:
        OSError: The socket is not TCP, or it is closed.
    """
    return conn.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, SAVED_SYN_BYTES)


def shows_option(syn: bytes) -> bool:
    """Tell whether a SYN shows the SMC option.

    Args:
        syn: From the IP header to the end of TCP's options; what is cut shows nothing.
    """
    options = _options_of(syn)
    while options and options[0] != END:
        if options[0] == NOP:
            options = options[1:]
            continue
        length = options[1] if len(options) > 1 else 0
        if length < 2:
            return False
        if options[:length] == OPTION:
            return True
        options = options[length:]
    return False


def _options_of(syn: bytes) -> bytes:
    if syn[:1] and syn[0] >> 4 == 4:
        at = (syn[0] & 0x0F) * 4
    else:
        kind, at = syn[6:7], IPV6_BYTES
        while kind and kind[0] in IPV6_OPTIONS:
            kind, at = syn[at : at + 1], at + (_byte(syn, at + 1) + 1) * 8
    size = (_byte(syn, at + 12) >> 4) * 4
    return syn[at + TCP_BYTES : at + size]


def _byte(data: bytes, at: int) -> int:
    return data[at] if at < len(data) else 0
