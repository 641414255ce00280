"""A stream of many gibibytes whose every byte is checked, at the speed of memory.

Block n begins with the number n; the rest is noise, another piece of it for each of
`WINDOWS` following blocks. The receiver compares every byte with what belongs there,
which finds and places a loss, a doubling, a swap or a stale byte. Both ends also sum up
all bytes (CRC-32, chained), one sum a gibibyte and one for the whole: it depends on
nothing that this module computes twice.
"""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tracemalloc
    from collections.abc import Iterator

BLOCK_BYTES = 64 * 1024
WRITE_BYTES = 16 * BLOCK_BYTES
STAMP_BYTES = 8
WINDOWS = 61
"""A prime, so that no power of two of bytes leads from a block to its like."""
GIBIBYTE = 1 << 30


def _make_noise() -> list[bytes]:
    noise = random.Random(7609).randbytes(BLOCK_BYTES + WINDOWS)
    size = BLOCK_BYTES - STAMP_BYTES
    return [noise[at : at + size] for at in range(WINDOWS)]


NOISE = _make_noise()


def block(number: int) -> bytes:
    """Give one block."""
    return number.to_bytes(STAMP_BYTES, "big") + NOISE[number % WINDOWS]


def blocks(total: int) -> Iterator[bytes]:
    """Give a stream of so many bytes, 1 MiB at a time."""
    for first in range(0, total // BLOCK_BYTES, 16):
        yield b"".join(map(block, range(first, first + 16)))


class Sums:
    """Sums of all bytes: at the end of each gibibyte, from the beginning."""

    def __init__(self) -> None:
        self.received = 0
        self._sum = 0
        self._whole: list[int] = []

    def take(self, data: bytes) -> None:
        """Add the next bytes."""
        while len(data) >= (left := GIBIBYTE - self.received % GIBIBYTE):
            self._add(data[:left])
            self._whole.append(self._sum)
            data = data[left:]
        self._add(data)

    def _add(self, data: bytes) -> None:
        self._sum = zlib.crc32(data, self._sum)
        self.received += len(data)

    @property
    def sums(self) -> list[int]:
        """The sums so far, the last one over everything."""
        return [*self._whole, self._sum]


class Checker:
    """Takes a stream as it comes, sums it up, and compares every byte."""

    def __init__(self) -> None:
        self._sums = Sums()
        self._at = 0
        self._expected = block(0)
        self.wrong_at: int | None = None

    def take(self, data: bytes) -> None:
        """Take the next bytes."""
        self._sums.take(data)
        if self.wrong_at is None:
            self._compare(memoryview(data))

    def _compare(self, view: memoryview) -> None:
        place = 0
        while place < len(view):
            offset = self._at % BLOCK_BYTES
            size = min(BLOCK_BYTES - offset, len(view) - place)
            wanted = memoryview(self._expected)[offset : offset + size]
            # As bytes: views are compared item by item.
            if bytes(view[place : place + size]) != bytes(wanted):
                pairs = zip(view[place : place + size], wanted, strict=True)
                wrong = next(i for i, (was, fits) in enumerate(pairs) if was != fits)
                self.wrong_at = self._at + wrong
                return
            self._at += size
            place += size
            if self._at % BLOCK_BYTES == 0:
                self._expected = block(self._at // BLOCK_BYTES)

    def record(self) -> dict[str, Any]:
        """Tell what came."""
        received, sums = self._sums.received, self._sums.sums
        return {"received": received, "sums": sums, "wrong_at": self.wrong_at}


def grown(before: tracemalloc.Snapshot, now: tracemalloc.Snapshot) -> list[str]:
    """Name the lines that hold more than before, those with the most first."""
    rows = now.compare_to(before, "lineno")
    return [str(row) for row in rows if row.size_diff > 0][:12]
