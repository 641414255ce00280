"""Who this end is: peer ID, host name, and the random numbers that the core asks for.

A peer ID belongs to one process and one loop. Two ends with the same one would make a
peer reuse a link group that the other one owns; so nothing of it is derived from the
machine. It decides nothing else.

Source: RFC 7609 section 2.1 and A.2.1 (peer ID: 2 bytes instance, 6 bytes MAC).
"""

from __future__ import annotations

import random
import socket

__all__ = ["SYSTEM", "RandomTokens", "host_name", "new_peer_id"]

SYSTEM = random.SystemRandom()
"""The operating system's generator, which keeps nothing between two numbers."""

HOST_NAME_BYTES = 32
"""Width of the host name in the first contact extension."""

_LOCALLY_ADMINISTERED = 0x02
_MULTICAST = 0x01


def new_peer_id(entropy: random.Random = SYSTEM) -> bytes:
    """Make a peer ID: 2 random bytes and a random, locally administered MAC.

    Args:
        entropy: Where random numbers come from.

    Returns:
        8 bytes.

    Reference: RFC 7609 A.2.1.
    """
    token = bytearray(entropy.randbytes(8))
    token[2] = (token[2] | _LOCALLY_ADMINISTERED) & ~_MULTICAST
    return bytes(token)


def host_name() -> str:
    """Tell the host's name as the first contact extension carries it.

    Returns:
        At most 32 printable ASCII characters; other characters become "?".
    """
    name = socket.gethostname().encode("ascii", "replace")[:HOST_NAME_BYTES]
    return "".join(c if c.isprintable() else "?" for c in name.decode("ascii"))


class RandomTokens:
    """The core's `TokenSource`.

    Args:
        entropy: Where random numbers come from.
    """

    def __init__(self, entropy: random.Random = SYSTEM) -> None:
        self._entropy = entropy

    def psn(self) -> int:
        """Give a first packet sequence number, 24 bits."""
        return self._entropy.getrandbits(24)

    def alert_token(self) -> int:
        """Give an alert token, 32 bits, never 0."""
        return self._entropy.randrange(0xFFFFFFFF) + 1

    def user_id(self) -> int:
        """Give a link user ID, 32 bits."""
        return self._entropy.getrandbits(32)
