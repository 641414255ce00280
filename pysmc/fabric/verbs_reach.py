"""Whether a peer's GID can be reached, found out without blocking.

The kernel resolves the address of a peer's GID when a queue pair goes to RTR, and waits
for the answer: an unreachable peer would hold the whole interpreter for a second.
`Reach` finds out before whether that would succeed at once, so that a queue pair is
connected only when it cannot block.

Reference: kernel, ib_resolve_unicast_gid_dmac() in drivers/infiniband/core/verbs.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pysmc.fabric.verbs_ports import RdmaPort

__all__ = ["Reach"]


class Reach:
    """Looks for the way to peers' GIDs; one for each device.

    `fileno` becomes readable when `poll` may have an answer. Nothing blocks, nothing
    calls back, and no privilege is needed.
    """

    def fileno(self) -> int:
        """The descriptor for a selector (level-triggered, for reading)."""
        raise NotImplementedError

    def begin(self, key: int, gid: bytes, port: RdmaPort) -> None:
        """Begin to look for the way from a port to a peer's GID.

        `poll` tells the answer, once; it may be there at once.

        Args:
            key: The caller's name for it, not in use.
            gid: The peer's, 16 bytes.
            port: Ours.
        """
        raise NotImplementedError

    def cancel(self, key: int) -> None:
        """Forget one that was begun; nothing when it is not there."""
        raise NotImplementedError

    def poll(self) -> list[tuple[int, bool, str]]:
        """Take the answers: (key, whether it can be reached, a sentence why not)."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget everything. Idempotent."""
        raise NotImplementedError
