"""How often a peer may make us do something: so many times a second, and no more.

`Rate` decides whether one more is within the limit. It knows no clock: the time is an
argument. What was not used is kept up to a bound, so that a burst after silence passes.

Reference: RFC 7609 names no rate; the kernel has none either (smc_llc.c).
"""

from __future__ import annotations

__all__ = ["Rate"]


class Rate:
    """A bucket of permissions that fills with time.

    Args:
        per_second: Permissions that are added in a second.
        most: The most that it holds; those of a second by default.
    """

    __slots__ = ("_left", "_most", "_per_second", "_when")

    def __init__(self, per_second: int, most: int | None = None) -> None:
        self._per_second = per_second
        self._left = self._most = float(most or per_second)
        self._when = 0.0

    def left(self, now: float) -> int:
        """Tell how many permissions are left.

        Args:
            now: The time in seconds, never less than before.
        """
        grown = self._left + (now - self._when) * self._per_second
        self._left = min(grown, self._most)
        self._when = now
        return int(self._left)

    def take(self, now: float) -> bool:
        """Take a permission; False when none is left.

        Args:
            now: The time in seconds, never less than before.
        """
        if self.left(now) < 1:
            return False
        self._left -= 1.0
        return True
