"""Netlink's messages and attributes: what every family of it has in common.

Decides nothing. A question is one message on a non-blocking socket: the kernel has put
its answer there when the send returns, so that nothing waits.

Source: netlink(7), kernel `include/uapi/linux/netlink.h`.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "DUMP",
    "Questions",
    "build_attribute",
    "not_understood",
    "open_socket",
    "parse_attributes",
    "parse_messages",
]

DUMP: Final = 0x300
"""Flag of a question whose answer is a list."""
ANSWER_BYTES: Final = 64 * 1024

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERROR = struct.Struct("=i")
_ERROR_TYPE, _DONE = 2, 3
_REQUEST = 0x1
_TYPE_MASK = 0x3FFF  # without the flags "nested" and "network byte order"


class Questions:
    """Asks the kernel by one protocol of netlink; without waiting.

    Args:
        protocol: ``socket.NETLINK_ROUTE`` or another one.

    Raises:
        OSError: There is no descriptor left, or netlink is forbidden here.
    """

    def __init__(self, protocol: int) -> None:
        self._socket = open_socket(protocol)
        self._sequence = 0

    def ask(self, kind: int, flags: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        """Ask, and give the answer's messages: one, or all up to the dump's end.

        Args:
            kind: The message's type.
            flags: 0 or `DUMP`.
            body: What follows the header.

        Yields:
            Type and body of each message. A question that is answered by one message
            is not awaited any further: take that one, and stop.

        Raises:
            OSError: The kernel's answer is an error, or there is none.
        """
        self._sequence += 1
        length = _HEADER.size + len(body)
        header = _HEADER.pack(length, kind, flags | _REQUEST, self._sequence, 0)
        self._socket.sendto(header + body, (0, 0))
        while True:
            # A dump goes on with each call; nothing of it has to be awaited.
            for found, sequence, answer in parse_messages(
                self._socket.recv(ANSWER_BYTES)
            ):
                if sequence != self._sequence:
                    continue  # left over from a question whose answer broke off
                if found == _ERROR_TYPE:
                    number = -_ERROR.unpack_from(answer)[0]
                    raise OSError(number, os.strerror(number))
                if found == _DONE:
                    return
                yield found, answer

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()


def open_socket(protocol: int, groups: int = 0) -> socket.socket:
    """Open a non-blocking netlink socket that hears of some groups of events."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    made = socket.socket(socket.AF_NETLINK, kind, protocol)
    try:
        made.bind((0, groups))
    except BaseException:
        made.close()
        raise
    return made


def build_attribute(kind: int, value: bytes) -> bytes:
    """Write one attribute, padded."""
    header = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind)
    return header + value + bytes(-len(value) % 4)


def parse_attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """Read attributes, from an offset to the end."""
    found: dict[int, bytes] = {}
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def parse_messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Give type, sequence number and body of each message of a datagram.

    Raises:
        OSError: They are none.
    """
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            raise not_understood()
        yield kind, sequence, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def not_understood() -> OSError:
    """Make the error for an answer that is none."""
    return OSError(0, "the kernel's netlink answer is not understood")
