"""Cursors and windows: all arithmetic about positions in an RMBE stands here.

A cursor on the wire is a wrap number (16 bits) and a count (32 bits). Inside, a
position is the number of bytes since the connection began, an int that never wraps.
`Ring` translates; it knows the size of the element and where its data begins, which is
0 for Linux and for us and 4 for a strict RFC peer that keeps an eye catcher.

Reference: RFC 7609 section 4.7.2 and A.4; kernel counterpart: smc_cdc.h.
"""

from __future__ import annotations

from dataclasses import dataclass

from pysmc.errors import RemoteProtocolError

__all__ = ["Cursor", "Ring"]

_COUNT_MASK = 0xFFFFFFFF
_WRAP_MASK = 0xFFFF


@dataclass(frozen=True, slots=True)
class Cursor:
    """A cursor as the wire has it."""

    wrap: int
    """16 bits: how often the element's end was passed."""
    count: int
    """32 bits: offset of the next byte in the element."""

    @property
    def packed(self) -> int:
        """48 bits: wrap << 32 | count."""
        return self.wrap << 32 | self.count


class Ring:
    """The geometry of one RMBE.

    Args:
        size: Bytes of the element, 16 KiB to 512 MiB (any size works in tests).
        base: Offset of the first data byte: 0, or 4 behind an eye catcher.
    """

    __slots__ = ("base", "capacity", "modulus", "size")

    def __init__(self, size: int, base: int = 0) -> None:
        assert 0 <= base < size, "the data area is empty"
        self.size = size
        self.base = base
        self.capacity = size - base
        # Positions are compared modulo all the cursors that the wire can tell apart.
        self.modulus = self.capacity << 16

    def pack(self, position: int) -> int:
        """Give the 48-bit cursor of a position."""
        wrap, count = divmod(position, self.capacity)
        return (wrap & _WRAP_MASK) << 32 | (count + self.base)

    def cursor(self, position: int) -> Cursor:
        """Give the cursor of a position."""
        packed = self.pack(position)
        return Cursor(packed >> 32, packed & _COUNT_MASK)

    def offset(self, position: int) -> int:
        """Give the offset in the element of a position."""
        return position % self.capacity + self.base

    def advance(self, position: int, packed: int, allowed: int, what: str) -> int:
        """Follow a cursor that the peer sent.

        A cursor that lies behind is ignored, never followed back: an older update may
        arrive after a failover.

        Args:
            position: Where the cursor stood before, in bytes.
            packed: What the peer sent, 48 bits.
            allowed: How many bytes it may have advanced, 0 to `capacity`.
            what: The cursor's name for the error text.

        Returns:
            The new position, at least `position`.

        Raises:
            RemoteProtocolError: The cursor lies outside the element, or it advanced
                further than allowed.

        Reference: RFC 7609 section 4.7.2; kernel counterpart: smc_cdc.c.
        """
        count = (packed & _COUNT_MASK) - self.base
        if not 0 <= count < self.capacity:
            message = (
                f"peer's {what} cursor {packed & _COUNT_MASK} lies outside its element"
                f" of {self.size} bytes"
            )
            raise RemoteProtocolError(message, section="RFC 7609 section 4.7.2")
        step = ((packed >> 32) * self.capacity + count - position) % self.modulus
        if step <= allowed:
            return position + step
        if step >= self.modulus >> 1:
            return position
        message = f"peer's {what} cursor advanced {step} bytes; allowed are {allowed}"
        raise RemoteProtocolError(message, section="RFC 7609 section 4.7.2")

    def pieces(self, position: int, count: int) -> tuple[tuple[int, int], ...]:
        """Cut a range of bytes at the element's end.

        Args:
            position: Where the range begins, in bytes.
            count: How many bytes, 0 to `capacity`.

        Returns:
            At most two (offset in the element, length) pairs; none for 0 bytes.
        """
        if count == 0:
            return ()
        start = position % self.capacity
        first = self.capacity - start
        if count <= first:
            return ((start + self.base, count),)
        return ((start + self.base, first), (self.base, count - first))
