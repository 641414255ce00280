"""Protection domains of the verbs fabric: regions, queue pairs, and what is kept ready.

Decides what is registered when. Registering memory takes milliseconds, so that what a
link needs beside its receive buffers (a protection domain, receives, staging) comes as
a `Bundle`, which is used again for another link group: the device and our own posts
reach it, a peer never does. Regions are registered anew each time, and a peer's rkey
ends with them.

Source: RFC 7609 sections 2.1 and 4.4; kernel counterpart: smc_ib.c.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

from pysmc.errors import FabricError, LocalProtocolError
from pysmc.fabric.base import MemoryRegion, ProtectionDomain, QueuePair
from pysmc.fabric.verbs_api import (
    ACCESS_LOCAL_WRITE,
    ACCESS_NONE,
    ACCESS_REMOTE_WRITE,
    VerbsError,
)
from pysmc.fabric.verbs_memory import (
    RECEIVE_BLOCK,
    RECEIVES,
    SLAB_BYTES,
    PinCount,
    Pinned,
    ReceiveSlab,
    Staging,
    refusal,
)
from pysmc.fabric.verbs_pair import INLINE_BYTES, SENDS, VerbsQueuePair

if TYPE_CHECKING:
    from pysmc.fabric.verbs import VerbsDevice
    from pysmc.fabric.verbs_api import DomainHandle, QueuePairHandle, Verbs

__all__ = ["Bundle", "VerbsDomain", "VerbsRegion"]

_log = logging.getLogger(__name__)

_REGION_BYTES_MIN: Final = 16 * 1024
_REGION_BYTES_MAX: Final = 512 * 1024 * 1024
_ZEROS: Final = bytes(64 * 1024)


class Bundle:
    """A protection domain with the memory that a queue pair needs.

    Raises:
        FabricError: Status ``NO_MEMORY``.
    """

    def __init__(self, verbs: Verbs, count: PinCount) -> None:
        try:
            self.handle: DomainHandle = verbs.create_domain()
        except VerbsError as exc:
            raise refusal(exc, "create a protection domain") from exc
        self._count = count
        self._receives: list[ReceiveSlab] = []
        self._slabs: list[Pinned] = []

    def take(self) -> tuple[ReceiveSlab, Pinned]:
        """Give the memory for a queue pair: that of another one, or new."""
        receives = self._receives.pop() if self._receives else None
        if receives is None:
            receives = ReceiveSlab(self.handle, ACCESS_LOCAL_WRITE, self._count)
        try:
            slab = self._slabs.pop() if self._slabs else None
            if slab is None:
                slab = Pinned(self.handle, SLAB_BYTES, ACCESS_NONE, self._count)
        except FabricError:
            self._receives.append(receives)
            raise
        return receives, slab

    def give_back(self, receives: ReceiveSlab, slab: Pinned) -> None:
        """Take the memory back, when its queue pair is no more."""
        self._receives.append(receives)
        self._slabs.append(slab)

    def trim(self) -> None:
        """Keep memory for one queue pair."""
        for receives in self._receives[1:]:
            receives.close()
        for slab in self._slabs[1:]:
            slab.close()
        del self._receives[1:], self._slabs[1:]

    def close(self) -> None:
        """Give all of it back."""
        for receives in self._receives:
            receives.close()
        for slab in self._slabs:
            slab.close()
        try:
            self.handle.close()
        except VerbsError as exc:
            _log.debug("a protection domain could not be freed: %s", exc)


class VerbsRegion(MemoryRegion):
    """Memory of our own that the peers of one domain may write."""

    def __init__(self, domain: VerbsDomain, length: int) -> None:
        self.length = length
        access = ACCESS_LOCAL_WRITE | ACCESS_REMOTE_WRITE
        self._pinned = Pinned(domain.bundle.handle, length, access, domain.device.count)
        self.virtual_address = self._pinned.address
        self.memory: Any = self._pinned.memory
        self.offset = 0
        self.view = memoryview(self.memory)
        self._domain = domain
        self._open = True

    def rkey_on(self, queue_pair: QueuePair) -> int:
        """Tell the rkey; here it is the same on every link of the domain."""
        del queue_pair
        self._domain.device.refuse_if_forked()
        return self._pinned.rkey

    def clear(self, count: int | None = None) -> None:
        """Fill with zeros; see `MemoryRegion.clear`. Updates are delivered already."""
        self._domain.device.refuse_if_forked()
        end = self.length if count is None else min(count, self.length)
        for at in range(0, end, len(_ZEROS)):
            size = min(len(_ZEROS), end - at)
            self.memory[at : at + size] = _ZEROS[:size]

    def close(self) -> None:
        """Deregister. Idempotent; see `MemoryRegion.close`."""
        if not self._open:
            return
        self._open = False
        self.view.release()
        self._domain.forget_region(self)

    def deregister(self) -> None:
        """Let no peer write any more. Only the domain calls this."""
        self._pinned.close()


class VerbsDomain(ProtectionDomain):
    """The regions and queue pairs of one link group."""

    def __init__(self, device: VerbsDevice, bundle: Bundle) -> None:
        self.device = device
        self.bundle = bundle
        self.queue_pairs: list[VerbsQueuePair] = []
        self._regions: dict[VerbsRegion, None] = {}
        self._undead: list[VerbsRegion] = []
        """Closed while queue pairs may still have to do with them."""
        self._pairs: dict[VerbsQueuePair, None] = {}
        """Queue pairs that are not destroyed."""
        self._open = True

    def _check_open(self) -> None:
        self.device.check_usable()
        if not self._open:
            text = "the protection domain is closed"
            raise LocalProtocolError(text)

    def create_queue_pair(self) -> VerbsQueuePair:
        """Create a queue pair; see `ProtectionDomain.create_queue_pair`."""
        self._check_open()
        queue = self.device.queue_for_pair()
        receives, slab = self.bundle.take()
        handle: QueuePairHandle | None = None
        try:
            handle = self.bundle.handle.create_queue_pair(
                queue.handle, SENDS, RECEIVES, INLINE_BYTES
            )
            handle.to_init(self.device.port.port)
            for block in range(RECEIVES // RECEIVE_BLOCK):
                handle.post_receives(receives.blocks, block)
        except VerbsError as exc:
            if handle is not None:
                with contextlib.suppress(VerbsError):
                    handle.close()
            self.bundle.give_back(receives, slab)
            raise refusal(exc, "create a queue pair") from exc
        staging = Staging(slab, self.bundle.handle, self.device.count)
        queue_pair = VerbsQueuePair(self, handle, receives, staging)
        self._pairs[queue_pair] = None
        self.queue_pairs.append(queue_pair)
        self.device.add_pair(queue_pair, queue)
        return queue_pair

    def register(self, length: int) -> VerbsRegion:
        """Get memory; see `ProtectionDomain.register`."""
        self._check_open()
        if not _REGION_BYTES_MIN <= length <= _REGION_BYTES_MAX or length & length - 1:
            text = f"a region of {length} bytes; 16 KiB to 512 MiB, a power of two"
            raise LocalProtocolError(text)
        try:
            region = VerbsRegion(self, length)
        except FabricError:
            # Buffers of connections count more than what makes posts quick.
            if not self.device.spare():
                raise
            region = VerbsRegion(self, length)
        self._regions[region] = None
        return region

    def forget_region(self, region: VerbsRegion) -> None:
        """Deregister a region; only its own close calls this."""
        del self._regions[region]
        if self.device.forked:
            return
        self._undead.append(region)
        self._finish()

    def forget_queue_pair(self, queue_pair: VerbsQueuePair) -> None:
        """Take a queue pair off the list; only its own close calls this."""
        self.queue_pairs.remove(queue_pair)

    def pair_destroyed(self, queue_pair: VerbsQueuePair, *, is_destroyed: bool) -> None:
        """Take back what a queue pair had; only the device calls this.

        Args:
            queue_pair: Which one.
            is_destroyed: False when the library could not: its memory is not used
                again.
        """
        del self._pairs[queue_pair]
        slab = queue_pair.staging.reset()
        if is_destroyed:
            self.bundle.give_back(queue_pair.receives, slab)
        else:
            queue_pair.receives.close()
            slab.close()
        self._finish()

    def close(self) -> None:
        """Close everything of this domain. Idempotent; see `ProtectionDomain.close`.

        While a queue pair still sends what was posted before, its peer does not know of
        the end and may write: the memory is deregistered after that.
        """
        if not self._open:
            return
        self._open = False
        for queue_pair in list(self.queue_pairs):
            queue_pair.close()
        for region in list(self._regions):
            region.close()
        self.device.domains.remove(self)
        self._finish()

    def _may_deregister(self) -> bool:
        """Tell whether no queue pair can have to do with closed memory.

        The device keeps hold of the region that a peer was writing when it failed.
        """
        if self._open:
            return not any(queue_pair.is_stopped for queue_pair in self._pairs)
        return not self._pairs

    def _finish(self) -> None:
        if self.device.forked:
            return
        if self._undead and self._may_deregister():
            for region in self._undead:
                region.deregister()
            self._undead.clear()
        if self._open or self._pairs or self._regions:
            return
        bundle, self.bundle = self.bundle, _GONE
        if bundle is not _GONE:
            self.device.take_back(bundle)


class _NoBundle(Bundle):
    """What a domain has that gave its bundle back."""

    def __init__(self) -> None:
        """Have nothing."""


_GONE: Final = _NoBundle()
