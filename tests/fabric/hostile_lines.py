"""What the programs of the hostile runs share: streams by position, lines of JSON."""

from __future__ import annotations

import json
import os
import random
import sys
from typing import TYPE_CHECKING, Any

import pysmc
from pysmc.fabric import shm

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

KIB = 1024
ELEMENT = 32 * KIB
MOST_SENT = 128 * KIB
"""What the victim sends on each connection."""
STREAM = 131_071
"""Bytes after which a stream repeats itself: no divisor of any buffer's size."""

CONFIG = pysmc.Config(
    rmbe_bytes=ELEMENT,
    sndbuf_bytes=ELEMENT,
    proposal_wait=1.0,
    accept_wait=1.0,
    confirm_wait=1.0,
    handshake_wait=2.0,
    confirm_link_server_wait=0.4,
    confirm_link_client_wait=0.8,
    decline_wait=0.2,
    llc_wait=0.5,
    close_wait=0.5,
    discovery_wait=0.5,
)
"""Short waits: whatever hangs in a handshake is gone within seconds."""

_NIBBLES = bytes(byte & 0xF for byte in random.Random(7609).randbytes(STREAM))
GOOD = bytes(nibble | 0x80 | nibble << 4 & 0x70 for nibble in _NIBBLES)
"""What the well-behaved send: bytes from 0x80, which no hostile peer ever sends."""


def make_small_arenas() -> None:
    """Let this program's arenas be small: each run pays for some."""
    shm.ARENA_BYTES = 8 * ELEMENT  # type: ignore[attr-defined]


def marked(mark: int) -> bytes:
    """Give the stream of a hostile connection: bytes whose upper half is its mark.

    Args:
        mark: 2 to 7; 1 stands for memory that belongs to no connection.
    """
    return bytes(mark << 4 | nibble for nibble in _NIBBLES)


def piece(stream: bytes, position: int, count: int) -> bytes:
    """Cut bytes out of a stream that repeats itself; count is at most its length."""
    start = position % STREAM
    cut = stream[start : start + count]
    return cut + stream[: count - len(cut)]


def first_difference(data: bytes, expected: bytes) -> int:
    """Tell at which index two pieces of equal length differ; -1 for nowhere."""
    if data == expected:
        return -1
    pairs = zip(data, expected, strict=True)
    return next(at for at, (one, other) in enumerate(pairs) if one != other)


def tell(**facts: Any) -> None:
    """Write one line to whoever started this program."""
    os.write(1, json.dumps(facts).encode() + b"\n")


def listen(
    loop: asyncio.AbstractEventLoop, handle: Callable[[dict[str, Any]], None]
) -> None:
    """Have a function called with every line that comes; the end ends the program."""
    pending = bytearray()

    def read() -> None:
        data = os.read(0, 65536)
        if not data:
            loop.stop()
            return
        pending.extend(data)
        while b"\n" in pending:
            line, _, rest = bytes(pending).partition(b"\n")
            pending[:] = rest
            handle(json.loads(line))

    loop.add_reader(sys.stdin.fileno(), read)
