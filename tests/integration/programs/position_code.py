"""A byte stream that says at every place where it is.

Byte n can be computed from n alone, so a loss, a doubling, a swap and bytes of another
connection are all found, and located. Each block begins with its number; the rest is
the same noise in every block.
"""

from __future__ import annotations

import random

BLOCK_BYTES = 64 * 1024
STAMP_BYTES = 8


class PositionCode:
    """One stream.

    Args:
        seed: Streams of different seeds have nothing in common.
    """

    def __init__(self, seed: int = 0) -> None:
        self._noise = random.Random(seed).randbytes(BLOCK_BYTES - STAMP_BYTES)

    def block(self, number: int) -> bytes:
        """Give one whole block."""
        return number.to_bytes(STAMP_BYTES, "big") + self._noise

    def piece(self, start: int, length: int) -> bytes:
        """Give the bytes from one place on."""
        first = start // BLOCK_BYTES
        last = (start + length - 1) // BLOCK_BYTES
        whole = b"".join(self.block(number) for number in range(first, last + 1))
        return whole[start - first * BLOCK_BYTES :][:length]


class Checker:
    """Takes a stream as it comes, and knows how much of it was right."""

    def __init__(self, seed: int = 0) -> None:
        self._code = PositionCode(seed)
        self.received = 0
        self.wrong_at: int | None = None

    def take(self, data: bytes | bytearray | memoryview) -> None:
        """Compare the next bytes."""
        expected = self._code.piece(self.received, len(data))
        if self.wrong_at is None and data != expected:
            pairs = zip(data, expected, strict=True)
            at = next(i for i, (was, wanted) in enumerate(pairs) if was != wanted)
            self.wrong_at = self.received + at
        self.received += len(data)
