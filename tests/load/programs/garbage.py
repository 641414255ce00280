"""Clients that send garbage, as many as this process can make.

Some carry the mark of a client that speaks SMC, so that each of them costs the server
as much as such a client can. What each does next is drawn from a list.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import time
from typing import TYPE_CHECKING

from orders import obey  # type: ignore[import-not-found]

from smcproto.constants import EYECATCHER_SMCR

if TYPE_CHECKING:
    from collections.abc import Callable

HOST = "127.0.0.1"
MARK = 0x2C
RESET = struct.pack("ii", 1, 0)


def noise(sock: socket.socket, draw: random.Random) -> None:
    """Send random bytes, and go."""
    sock.send(draw.randbytes(draw.randrange(1, 600)))


def eyecatcher(sock: socket.socket, draw: random.Random) -> None:
    """Begin as a CLC message does, and go on as none."""
    sock.send(EYECATCHER_SMCR + draw.randbytes(draw.randrange(1, 100)))


def half(sock: socket.socket, draw: random.Random) -> None:
    """Send less than the header of a Proposal."""
    sock.send((EYECATCHER_SMCR + b"\x01\x01\x00\x20")[: draw.randrange(1, 8)])


def leave(sock: socket.socket, draw: random.Random) -> None:
    """End at once."""
    del sock, draw


def reset(sock: socket.socket, draw: random.Random) -> None:
    """Break off at once."""
    del draw
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


WAYS: tuple[Callable[[socket.socket, random.Random], None], ...] = (
    noise,
    eyecatcher,
    half,
    leave,
    reset,
)


async def throw(
    port: int, seconds: float, rate: float, marked: int
) -> dict[str, float]:
    """Throw connections at a port; so many of a hundred are marked.

    Args:
        port: Whose.
        seconds: How long.
        rate: Most connections a second; fewer where the machine makes no more.
        marked: Percent that claim to speak SMC.
    """
    draw = random.Random(os.getpid())
    begun = now = time.monotonic()
    thrown = refused = 0
    while now - begun < seconds:
        if thrown > (now - begun) * rate:
            await asyncio.sleep(0.002)
        else:
            for _ in range(20):
                thrown += 1
                refused += not one(port, draw, is_marked=draw.randrange(100) < marked)
        now = time.monotonic()
    took = now - begun
    return {"thrown": thrown, "refused": refused, "rate": round(thrown / took)}


def one(port: int, draw: random.Random, *, is_marked: bool) -> bool:
    """Make one connection; False when it could not be made."""
    with socket.socket() as sock:
        if is_marked:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, MARK)
        sock.setblocking(False)
        if sock.connect_ex((HOST, port)) not in {0, 115}:
            return False
        try:
            draw.choice(WAYS)(sock, draw)
        except OSError:
            return False
    return True


async def main() -> None:
    """Take orders."""
    await obey({"throw": throw})


if __name__ == "__main__":
    asyncio.run(main())
