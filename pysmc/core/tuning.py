"""Where a connection's counters begin, and how small its element is: for simulations.

What an element's end, a cursor's wrap number or a sequence number does when it is
passed shows after gigabytes in life and after a few bytes here. Both ends of a
connection need the same values: nothing of it is said on the wire. Decides nothing.

Reference: RFC 7609 section A.4 (16 bits each of wrap and sequence number).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AS_SPECIFIED", "Tuning"]


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the connections of an endpoint begin."""

    element_bytes: int = 0
    """Bytes of every element, fewer than the memory has; 0 for all of it."""
    first_wrap: int = 0
    """Wrap number of all cursors at the beginning, 16 bits."""
    first_sequence: int = 0
    """Sequence number before the first update, 16 bits."""

    def element(self, length: int) -> int:
        """Tell how many bytes of memory are used as an element.

        Args:
            length: Bytes that there are.
        """
        return min(length, self.element_bytes) if self.element_bytes else length


AS_SPECIFIED = Tuning()
"""As the RFC has it: everything is used, and everything begins at 0."""
