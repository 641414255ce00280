"""Pinned memory: our own pages, registered with a protection domain of the device.

Decides what a registration that fails means to people, and where bytes lie between a
post and its completion. Pages are anonymous and shared: a fork does not copy them away
from under the device. They are zeros at first, and unmapped only after the
registration has ended, so that a late write of a peer hits nothing of ours.

Source: ibv_reg_mr(3), getrlimit(2) on RLIMIT_MEMLOCK; RFC 7609 section 4.4.1.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import resource
from collections import deque
from typing import TYPE_CHECKING, Final

from pysmc.errors import FabricError, FabricUnavailable
from pysmc.fabric.base import Status
from pysmc.fabric.verbs_api import VerbsError
from pysmc.fabric.verbs_ports import SHORTAGES

if TYPE_CHECKING:
    from pysmc.fabric.verbs_api import DomainHandle, ReceiveBlocks

__all__ = [
    "PIECE_BYTES",
    "RECEIVES",
    "RECEIVE_BLOCK",
    "RECEIVE_BYTES",
    "SLABS_MAX",
    "SLAB_BYTES",
    "PinCount",
    "Pinned",
    "ReceiveSlab",
    "Staging",
    "no_memory",
    "refusal",
]

_log = logging.getLogger(__name__)

RECEIVES: Final = 64
"""Receives of a queue pair. SMC-R has no credits for them: a peer that sends more waits
until there is one."""
RECEIVE_BYTES: Final = 4608
"""An LLC message of version 2 with 255 rkeys has 4152 bytes; what is longer than its
receive ends the queue pair."""
RECEIVE_BLOCK: Final = 8
"""Receives that are posted at once."""
SLAB_BYTES: Final = 256 * 1024
SLABS_MAX: Final = 16
"""Of a queue pair: 4 MiB between post and completion; more waits in ordinary memory."""
PIECE_BYTES: Final = 128 * 1024
"""Most bytes of one write; longer ones are cut, so that a slab holds a few."""
_ALIGNMENT: Final = 64

_LIMITED: Final = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EPERM})
"""What the kernel says when RLIMIT_MEMLOCK is used up, by its version."""
_RAN_OUT: Final = SHORTAGES | _LIMITED | {errno.ENOSPC, errno.EBUSY}

_warned: set[str] = set()


class PinCount:
    """How much memory a device has pinned."""

    def __init__(self) -> None:
        self.bytes = 0


class Pinned:
    """Pages that are registered until `close`.

    Args:
        handle: The protection domain.
        length: In bytes.
        access: What the device and the peer may do with it.
        count: Of the device.

    Raises:
        FabricError: Status ``NO_MEMORY``; the detail says how much is pinned and how
            much may be.
    """

    def __init__(
        self, handle: DomainHandle, length: int, access: int, count: PinCount
    ) -> None:
        self.length = length
        try:
            self.memory = mmap.mmap(-1, length)  # shared and anonymous
        except (OSError, ValueError) as exc:
            text = f"{length} bytes cannot be mapped: {exc}"
            raise no_memory(text, "register memory") from exc
        first = ctypes.c_char.from_buffer(self.memory)
        self.address = ctypes.addressof(first)
        del first
        try:
            self._registration = handle.register(self.address, length, access)
        except VerbsError as exc:
            self.memory.close()
            detail = _explain(exc, length, count)
            raise refusal(exc, "register memory", detail) from exc
        self.lkey = self._registration.lkey
        self.rkey = self._registration.rkey
        self._count = count
        self.is_open = True
        count.bytes += length

    def close(self) -> None:
        """Deregister. Idempotent; the pages go with the last view of them."""
        if not self.is_open:
            return
        self.is_open = False
        self._count.bytes -= self.length
        try:
            self._registration.close()
        except VerbsError as exc:
            # A device that was taken away: the kernel has ended the registration.
            _log.debug("memory could not be deregistered: %s", exc)


def no_memory(detail: str, operation: str) -> FabricError:
    """Make the error for memory, pinned memory or descriptors that ran out."""
    return FabricError(operation, Status.NO_MEMORY.name, detail)


def refusal(exc: VerbsError, operation: str, detail: str = "") -> FabricError:
    """Make the error for what the library did not give.

    Args:
        exc: What it said.
        operation: What was tried.
        detail: One sentence for people; by default what the library said.

    Returns:
        Status ``NO_MEMORY`` where something ran out, so that it may be had later; else
        the device is none that can be used here.
    """
    detail = detail or exc.strerror or str(exc)
    if exc.errno in _RAN_OUT:
        return no_memory(detail, operation)
    return FabricUnavailable(operation, "UNAVAILABLE", detail)


def _explain(exc: VerbsError, length: int, count: PinCount) -> str:
    if exc.errno not in _LIMITED:
        return f"{length} bytes cannot be registered: {exc.strerror}"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return (
            f"{exc.name}: {length} bytes cannot be pinned, {count.bytes} of this device"
            " are; pinned memory is not limited, so memory itself has run out"
        )
    text = (
        f"{exc.name}: {length} bytes cannot be pinned: RLIMIT_MEMLOCK allows {limit}"
        f" and this device has {count.bytes}; raise it (ulimit -l, LimitMEMLOCK= of a"
        " systemd unit, --ulimit memlock= of a container)"
    )
    if "memlock" not in _warned:
        _warned.add("memlock")
        _log.warning("pinned memory has run out: %s", text)
    return text


class ReceiveSlab:
    """The receives of one queue pair, and the memory they go to."""

    def __init__(self, handle: DomainHandle, access: int, count: PinCount) -> None:
        size = RECEIVES * RECEIVE_BYTES
        self.pinned = Pinned(handle, -(-size // 4096) * 4096, access, count)
        self.memory = self.pinned.memory
        self.blocks: ReceiveBlocks = handle.receive_blocks(
            self.pinned.address,
            RECEIVE_BYTES,
            RECEIVES,
            RECEIVE_BLOCK,
            self.pinned.lkey,
        )

    def close(self) -> None:
        """Give all of it back. Idempotent."""
        if self.pinned.is_open:
            self.blocks.close()
            self.pinned.close()


class Staging:
    """Where the bytes of posts lie until they complete: slabs, filled one by one.

    Args:
        first: A slab to begin with.
        handle: The protection domain, for more of them.
        count: Of the device.
    """

    def __init__(self, first: Pinned, handle: DomainHandle, count: PinCount) -> None:
        self.slabs = [first]
        """All of them; the first one was given."""
        self._handle = handle
        self._count = count
        self._current = first
        self._used = 0
        self._last = 0
        """Number of the newest post that lies in the current slab."""
        self._full: deque[tuple[Pinned, int]] = deque()
        self._free: list[Pinned] = []
        self._may_grow = True

    def place(
        self, data: memoryview | bytes, size: int, number: int
    ) -> tuple[int, int] | None:
        """Copy bytes in.

        Args:
            data: At most `PIECE_BYTES`.
            size: How many they are.
            number: Of the post that they belong to; each higher than the one before.

        Returns:
            Address and lkey; None when there is no room until something completes.
        """
        start = self._used
        if start + size > SLAB_BYTES:
            if not self._turn():
                return None
            start = 0
        slab = self._current
        slab.memory[start : start + size] = data
        self._used = start + size + _ALIGNMENT - 1 & -_ALIGNMENT
        self._last = number
        return slab.address + start, slab.lkey

    def completed(self, number: int) -> None:
        """All posts up to this number have completed."""
        full = self._full
        while full and full[0][1] <= number:
            self._free.append(full.popleft()[0])
        if self._last <= number:
            self._used = 0  # the same bytes again, while they are in the caches

    def _turn(self) -> bool:
        """Go on to a slab that is free, or a new one."""
        if self._free:
            fresh = self._free.pop()
        elif self._may_grow and len(self.slabs) < SLABS_MAX:
            try:
                fresh = Pinned(self._handle, SLAB_BYTES, 0, self._count)
            except FabricError:
                self._may_grow = False  # it goes on with what there is
                return False
            self.slabs.append(fresh)
        else:
            return False
        self._full.append((self._current, self._last))
        self._current, self._used = fresh, 0
        return True

    def spare(self) -> bool:
        """Give slabs back that nothing lies in; tell whether there were any."""
        free, self._free = self._free, []
        for slab in free:
            self.slabs.remove(slab)
            slab.close()
        return bool(free)

    def reset(self) -> Pinned:
        """End: give all slabs back but the first, which is returned."""
        first, *others = self.slabs
        for slab in others:
            slab.close()
        return first
