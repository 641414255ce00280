"""The memory of the shm fabric: sealed memfds, and the cutting of regions out of them.

Decides which descriptors may be mapped, and where in an arena a region lies. Knows no
sockets, links or messages.

Touching a mapped page behind the end of its file kills a process with SIGBUS, and no
handler written in Python can save it. It is therefore made impossible: our own arenas
are allocated at creation and then sealed, and a peer's descriptor is mapped only when
its seals forbid shrinking, which the kernel grants for memfds alone. The seals are read
before the size, because without them the size means nothing.

Source: memfd_create(2), fcntl(2) on file seals; the mapping itself has no counterpart
in RFC 7609, whose RMBs are registered with an RNIC (section 4.4).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import sys

from pysmc.errors import FabricError
from pysmc.fabric.base import Status

__all__ = ["ARENAS_MAX", "ARENA_BYTES", "REGION_BYTES_MIN", "Arena", "RegionMap"]

KIB = 1024
ARENA_BYTES = 8 * KIB * KIB
"""Size of an ordinary data arena; a larger region gets an arena of its own size."""
ARENA_BYTES_MAX = 512 * KIB * KIB
ARENAS_MAX = 64
"""Data arenas of one domain, and so those that one link may bring."""
REGION_BYTES_MIN = 16 * KIB
"""Smallest region, and the unit in which arenas are cut."""

_F_SEAL_WRITE = 0x0008
_F_SEAL_FUTURE_WRITE = 0x0010  # unknown to `fcntl` before Python 3.13
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3; hardened systems allow no memfd without it
_MADV_POPULATE_WRITE = 23  # Linux 5.14; `mmap` has no name for it
_MADV_REMOVE = 9
_BLOCK_BYTES = 512  # of st_blocks

_SHORTAGE = frozenset(
    {
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EFBIG,
        errno.EMFILE,
        errno.ENFILE,
        errno.EPERM,
        errno.ENOSYS,
        errno.EDQUOT,
        errno.EACCES,
        errno.ETOOMANYREFS,
    }
)
"""What the kernel says when there is no memory, no descriptor or no right to them."""


def is_shortage(exc: OSError) -> bool:
    """Tell whether an error means that memory or descriptors ran out."""
    return exc.errno in _SHORTAGE


def no_memory(why: OSError | str, operation: str) -> FabricError:
    """Make the error for a lack of memory or descriptors, or for a limit of ours.

    Args:
        why: What the kernel answered, or which limit was reached.
        operation: What was tried.
    """
    if isinstance(why, OSError):
        name = errno.errorcode.get(why.errno or 0, "errno unknown")
        why = f"{name}: {why.strerror}"
    return FabricError(operation, Status.NO_MEMORY.name, why)


def map_shared(descriptor: int, length: int) -> mmap.mmap:
    """Map a sealed memfd for reading and writing.

    Args:
        descriptor: The memfd; it may be closed afterwards.
        length: Its size in bytes.

    Raises:
        OSError: The mapping could not be had.
    """
    if sys.version_info >= (3, 13):
        # Without this the mapping keeps a second descriptor, that nobody uses.
        return mmap.mmap(descriptor, length, trackfd=False)
    return mmap.mmap(descriptor, length)


class Arena:
    """One memfd of our own, allocated, sealed and mapped."""

    __slots__ = ("descriptor", "inode", "length", "memory")

    def __init__(self, length: int) -> None:
        """Create it.

        Args:
            length: Size in bytes, a multiple of the page size.

        Raises:
            FabricError: Status ``NO_MEMORY``.
        """
        self.length = length
        self.descriptor = -1
        try:
            self.descriptor = _create_sealed(length)
            self.inode = os.fstat(self.descriptor).st_ino
            self.memory = map_shared(self.descriptor, length)
        except OSError as exc:
            self.close_descriptor()
            operation = f"create an arena of {length // KIB} KiB"
            raise no_memory(exc, operation) from exc

    def close_descriptor(self) -> None:
        """Close the descriptor, when nobody needs to be sent it any more."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def close(self) -> bool:
        """Close the descriptor and unmap. Idempotent.

        Returns:
            False when somebody still holds a view: the memory goes back when that view
            does, because the view keeps the mapping alive and we no longer do.
        """
        self.close_descriptor()
        return unmap(self.memory)


def unmap(memory: mmap.mmap) -> bool:
    """Unmap, unless a view of it is still in use by somebody.

    Returns:
        False when a view was. Nothing is lost then: the view owns the mapping.
    """
    try:
        memory.close()
    except BufferError:
        return False
    return True


def empty(memory: mmap.mmap, offset: int, length: int) -> bool:
    """Make a hole: the pages go back to the kernel, and read as zeros from then on.

    Returns:
        False where the kernel cannot; the pages stay as they are.
    """
    try:
        memory.madvise(_MADV_REMOVE, offset, length)
    except OSError:
        return False
    return True


def allocate(descriptor: int, offset: int, length: int) -> None:
    """Have pages where holes may be, so that no touch has to find one.

    Raises:
        OSError: There is no memory for them.
    """
    os.posix_fallocate(descriptor, offset, length)


def populate(memory: mmap.mmap, offset: int, length: int) -> None:
    """Enter pages in our page table ahead of their use, where the kernel can.

    A page costs a fifth of what it costs to fault it in at the first write.
    """
    try:
        memory.madvise(_MADV_POPULATE_WRITE, offset, length)
    except OSError:
        return  # an older kernel: the pages come when they are touched


def closes_quickly(descriptor: int) -> bool:
    """Tell whether a descriptor is a memfd with few pages to free."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return os.fstat(descriptor).st_blocks * _BLOCK_BYTES <= ARENA_BYTES


def map_peer_arena(
    descriptor: int, length: int | None = None, *, ours: frozenset[int] = frozenset()
) -> mmap.mmap:
    """Check a peer's descriptor, then map it.

    Args:
        descriptor: What came over the link's socket; stays the caller's to close.
        length: The only size in bytes that is right, or None for a data arena.
        ours: Inodes of the memory that we sent the peer: what we write for it must not
            come back as what it wrote.

    Raises:
        ValueError: It is not a sealed memfd of a permitted size; the text says why.
        OSError: The mapping could not be had.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as exc:
        text = "the descriptor is not a memfd: it knows no seals"
        raise ValueError(text) from exc
    if seals & _SEALS != _SEALS:
        text = f"its seals are {seals:#x}, SHRINK, GROW and SEAL ({_SEALS:#x}) required"
        raise ValueError(text)
    if seals & (_F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE):
        text = f"its seals are {seals:#x}: we could not write to it"
        raise ValueError(text)
    if os.fstat(descriptor).st_ino in ours:
        text = "it is our own memory"
        raise ValueError(text)
    return map_shared(descriptor, _checked_size(descriptor, length))


def _checked_size(descriptor: int, length: int | None) -> int:
    facts = os.fstat(descriptor)
    size = facts.st_size
    page = os.fstatvfs(descriptor).f_bsize
    if not stat.S_ISREG(facts.st_mode) or page != mmap.PAGESIZE:
        # Huge pages come out of a pool that can run dry at the first touch. Not asked
        # of fstat(), whose answer is about transparent ones.
        text = f"its pages are {page} bytes, {mmap.PAGESIZE} required"
        raise ValueError(text)
    if length is not None and size != length:
        text = f"its size is {size} bytes, {length} required"
        raise ValueError(text)
    if not REGION_BYTES_MIN <= size <= ARENA_BYTES_MAX or size % mmap.PAGESIZE:
        text = f"its size of {size} bytes is not one that an arena has"
        raise ValueError(text)
    return size


def _create_sealed(length: int) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        descriptor = os.memfd_create("pysmc", flags | _MFD_NOEXEC_SEAL)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        descriptor = os.memfd_create("pysmc", flags)  # an older kernel
    try:
        os.ftruncate(descriptor, length)
        os.posix_fallocate(descriptor, 0, length)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class RegionMap:
    """Which parts of a domain's arenas are free: buddies, by powers of two.

    A place is ``(arena index, offset in bytes)``. Two free halves of the same whole
    become one again, so that a domain which served many small connections can serve a
    large one afterwards.
    """

    def __init__(self) -> None:
        # Free places by size; an arena is a free place of its own size at first.
        self._free: dict[int, set[tuple[int, int]]] = {}
        self._lengths: list[int] = []

    def add_arena(self, length: int) -> None:
        """Take the next arena, all of it free.

        Args:
            length: Size in bytes, a power of two from `REGION_BYTES_MIN`.
        """
        self._free.setdefault(length, set()).add((len(self._lengths), 0))
        self._lengths.append(length)

    def take(self, length: int) -> tuple[int, int] | None:
        """Take a place.

        Args:
            length: Size in bytes, a power of two from `REGION_BYTES_MIN`.

        Returns:
            The place, or None when no arena has room.
        """
        whole = length
        while not self._free.get(whole):
            whole *= 2
            if whole > ARENA_BYTES_MAX:
                return None
        # The lowest place, so that the same requests always give the same places.
        arena, offset = min(self._free[whole])
        self._free[whole].discard((arena, offset))
        while whole > length:
            whole //= 2
            self._free.setdefault(whole, set()).add((arena, offset + whole))
        return arena, offset

    def give_back(
        self, place: tuple[int, int], length: int
    ) -> tuple[tuple[int, int], int]:
        """Give a place back, together with the free half beside it.

        Args:
            place: What `take` returned.
            length: With what it was asked.

        Returns:
            The free place that it is a part of now, and that one's length.
        """
        arena, offset = place
        while length < self._lengths[arena]:
            beside = (arena, offset ^ length)
            if beside not in self._free.get(length, ()):
                break
            self._free[length].discard(beside)
            offset &= ~length
            length *= 2
        self._free.setdefault(length, set()).add((arena, offset))
        return (arena, offset), length
