"""Whether the TCP option is installed, looked at so rarely that nobody pays for it.

Decides when a fresh socket is asked: at the first use, then again after `LOOK_SECONDS`
as long as the answer is no, and when a socket that was to opt in could not. In between
a connection costs a comparison of times and no system call.

Source: `pysmc.discovery.option.sockets`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pysmc.discovery.findings import NO_OPTION_HERE, PEER_NO_SMC
from pysmc.discovery.option import sockets

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.reasons import Reason

__all__ = ["LOOK_SECONDS", "Presence"]

LOOK_SECONDS = 5.0
"""Shortest time between two looks, and longest until an installation is noticed."""


class Presence:
    """What one loop knows of the installed option.

    Args:
        clock: Tells the time in seconds, for example the loop's.
        is_wanted: Whether the configuration has this way of discovery at all.
    """

    __slots__ = (
        "_clock",
        "_is_here",
        "_look_at",
        "absent",
        "absent_until",
        "is_wanted",
    )

    def __init__(self, clock: Callable[[], float], *, is_wanted: bool) -> None:
        self.is_wanted = is_wanted
        """Whether it is ever looked for."""
        self.absent_until = -math.inf if is_wanted else math.inf
        """Before this time on the clock it is certain, or agreed, that it is absent."""
        self.absent = NO_OPTION_HERE if is_wanted else PEER_NO_SMC
        """What a connection is told whose peer showed nothing while it is absent."""
        self._clock = clock
        self._is_here = False
        self._look_at = -math.inf

    def time(self) -> float:
        """Tell the time in seconds."""
        return self._clock()

    def is_here(self) -> bool:
        """Tell whether sockets can opt in, after a look if it is time for one."""
        if not self.is_wanted:
            return False
        if not self._is_here and self._clock() >= self._look_at:
            self._look()
        return self._is_here

    def doubt(self) -> bool:
        """A socket could not opt in: look whether others can, if it is time for a look.

        Returns:
            True when the option is installed, as far as is known.
        """
        if self._clock() >= self._look_at:
            self._look()
        return self._is_here

    @property
    def plain(self) -> Reason:
        """What a connection is told whose peer showed nothing."""
        return PEER_NO_SMC if self._is_here else self.absent

    def _look(self) -> None:
        try:
            self._is_here = sockets.is_installed()
        except OSError:  # no descriptor is left for now
            self._is_here = False
        self._look_at = self._clock() + LOOK_SECONDS
        self.absent_until = -math.inf if self._is_here else self._look_at
