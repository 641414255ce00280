"""Memory that nobody uses goes back to the kernel, and comes back as zeros."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.errors import FabricError
from pysmc.fabric import shm, shm_arena
from pysmc.fabric.shm_arena import ARENA_BYTES

if TYPE_CHECKING:
    from pysmc.fabric.shm import ShmDomain

KIB = 1024


def resident(domain: ShmDomain) -> int:
    """Tell how many bytes of memory the domain's arenas take."""
    return sum(os.fstat(arena.descriptor).st_blocks * 512 for arena in domain.arenas)


def test_closed_regions_cost_nothing(domain: ShmDomain) -> None:
    regions = [domain.register(64 * KIB) for _ in range(ARENA_BYTES // (64 * KIB))]
    for region in regions:
        region.view[:] = b"x" * region.length
    assert resident(domain) == ARENA_BYTES
    for region in regions[1:]:
        region.close()
    assert resident(domain) == 64 * KIB
    assert bytes(regions[0].view) == b"x" * 64 * KIB, "its neighbour is untouched"


def test_a_place_that_was_in_use_is_there_and_empty(domain: ShmDomain) -> None:
    old = domain.register(64 * KIB)
    memory, offset = old.memory, old.offset
    old.close()
    # A peer that does not know yet, or does not care, writes on.
    memory[offset : offset + 4096] = b"y" * 4096
    new = domain.register(64 * KIB)
    assert new.offset == offset
    assert not any(new.view)
    assert resident(domain) == 64 * KIB, "allocated: a touch needs no luck"


def test_without_holes_it_is_filled_with_zeros(
    domain: ShmDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "empty", lambda *_: False)
    old = domain.register(64 * KIB)
    old.view[:] = b"x" * old.length
    old.close()
    assert not any(domain.register(64 * KIB).view)


def test_an_older_kernel_makes_no_holes(domain: ShmDomain) -> None:
    region = domain.register(16 * KIB)
    assert shm_arena.empty(region.memory, region.offset, region.length)
    assert not shm_arena.empty(region.memory, 1, 16 * KIB), "not where a page begins"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_a_place_that_cannot_be_had_again(
    domain: ShmDomain, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    domain.register(16 * KIB).close()

    def full(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FabricError) as caught:
        domain.register(ARENA_BYTES)
    assert caught.value.status == "NO_MEMORY"
    assert errno.errorcode[code] in str(caught.value)
    monkeypatch.undo()
    assert domain.register(ARENA_BYTES).place == (0, 0), "nothing was lost"


def test_transparent_huge_pages_are_no_reason_to_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with ``shmem_enabled=always``, when fstat() tells the size of a huge page."""
    real = os.fstat

    class Facts:
        def __init__(self, descriptor: int) -> None:
            facts = real(descriptor)
            self.st_size, self.st_mode = facts.st_size, facts.st_mode
            self.st_ino = facts.st_ino
            self.st_blksize = 2 << 20

    arena = shm_arena.Arena(ARENA_BYTES)
    monkeypatch.setattr(os, "fstat", Facts)
    assert shm_arena.unmap(shm_arena.map_peer_arena(arena.descriptor))
    arena.close()
