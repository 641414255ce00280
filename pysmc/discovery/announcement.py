"""Announcements: a listener's beacons, held or given back together.

Decides that a listener has all of its names or none. Knows nothing of why it is
announced, or of what its clients do.

Source: design decision "local"; unix(7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pysmc.discovery.beacon import Beacon, BeaconRegistry

__all__ = ["Announcement"]


class Announcement:
    """A listener's beacons; close it when the listener closes."""

    def __init__(self, registry: BeaconRegistry, names: Sequence[bytes]) -> None:
        """Hold every name, or none.

        Raises:
            OSError: There is no descriptor left, or Unix sockets are forbidden.
        """
        self._registry = registry
        self._beacons: list[Beacon] = []
        try:
            for name in names:
                self._beacons.append(registry.hold(name))
        except OSError:
            self.close()
            raise

    @property
    def is_holder(self) -> bool:
        """Whether this loop holds all the names; otherwise another one does."""
        return all(beacon.is_holder for beacon in self._beacons)

    def close(self) -> None:
        """Give the names back; idempotent."""
        while self._beacons:
            self._registry.release(self._beacons.pop())

    @property
    def is_closed(self) -> bool:
        """Whether the names were given back."""
        return not self._beacons
