"""The device of a simulated process: of the simulated fabric, without a descriptor.

Decides nothing. The world asks a device whether something waits, so nothing rings, and
its number stands only for the selector's sake.

Reference: `pysmc.fabric.sim_device`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysmc.fabric.sim_device import SimDevice

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.fabric.sim import SimNetwork
    from pysmc.testing.simulation.process import Process

__all__ = ["WorldDevice"]


class WorldDevice(SimDevice):
    """A simulated device without a real descriptor.

    Args:
        process: Whose device; its kernel gives the number.
        network: The world's.
        peer_id: 8 bytes, not in use in this world.
    """

    eid = "SIM-WORLD"
    forked = False  # a world is one process of the host

    def __init__(self, process: Process, network: SimNetwork, peer_id: bytes) -> None:
        super().__init__(network, peer_id)
        self._descriptors = process.descriptors
        self._number = process.descriptors.take(self)

    def refuse_if_forked(self) -> None:
        """Refuse nobody."""

    def pending(self) -> bool:
        """Look for completions; see `Device.pending`."""
        return bool(self._completions)

    def is_readable(self) -> bool:
        """Whether completions wait."""
        return self.pending()

    def is_writable(self) -> bool:
        """Never: nobody writes to a device's descriptor."""
        return False

    def fileno(self) -> int:
        """Tell the number that stands for it."""
        return self._number

    def forget_posts(self, chance: Callable[[], float]) -> None:
        """Let only a part of what was posted arrive, as when its process is killed.

        In shared memory what was posted is there already, and nothing is forgotten.

        Args:
            chance: Gives numbers from 0 to 1; they decide how much is left.
        """
        if self.network.newest_only:
            return
        for domain in self.domains:
            for queue_pair in domain.queue_pairs:
                items = queue_pair.outgoing.items
                for _ in range(int(chance() * (len(items) + 1))):
                    items.pop()

    def close(self) -> None:
        """Close everything of it. Idempotent."""
        if self._number >= 0:
            self._descriptors.give(self._number)
            self._number = -1
            super().close()
