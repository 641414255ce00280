"""Which descriptors may be mapped, and how arenas are cut into regions."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysmc.errors import FabricError
from pysmc.fabric import shm_arena
from pysmc.fabric.shm_arena import (
    ARENA_BYTES,
    REGION_BYTES_MIN,
    Arena,
    RegionMap,
    is_shortage,
    map_peer_arena,
    no_memory,
    populate,
)
from tests.fabric.rawpeer import ALL_SEALS, Child, memfd

F_SEAL_FUTURE_WRITE = 0x10
KIB = 1024


def test_an_arena_is_allocated_and_sealed() -> None:
    arena = Arena(ARENA_BYTES)
    try:
        facts = os.fstat(arena.descriptor)
        assert facts.st_size == ARENA_BYTES
        assert facts.st_blocks * 512 == ARENA_BYTES
        seals = fcntl.fcntl(arena.descriptor, fcntl.F_GET_SEALS)
        assert seals & ALL_SEALS == ALL_SEALS
        with pytest.raises(PermissionError):
            os.ftruncate(arena.descriptor, 0)
        assert not os.get_inheritable(arena.descriptor)
        mapped = map_peer_arena(arena.descriptor, ARENA_BYTES)
        arena.memory[5:8] = b"abc"
        assert mapped[5:8] == b"abc"
        mapped.close()
    finally:
        assert arena.close()
        assert arena.close()


def test_an_arena_in_use_is_not_unmapped_and_not_lost() -> None:
    arena = Arena(REGION_BYTES_MIN)
    view = memoryview(arena.memory)
    assert not arena.close()
    view[0] = 1  # still there
    view.release()
    assert arena.close()


def test_an_older_kernel_knows_fewer_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.memfd_create

    def older(name: str, flags: int) -> int:
        if flags & ~(os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    arena = Arena(REGION_BYTES_MIN)
    map_peer_arena(arena.descriptor).close()
    arena.close()


def test_memfds_may_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str, flags: int) -> int:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    with pytest.raises(FabricError, match="EACCES"):
        Arena(REGION_BYTES_MIN)


@pytest.mark.parametrize(
    "seals",
    [
        0,
        fcntl.F_SEAL_SEAL,
        fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW,
        ALL_SEALS | fcntl.F_SEAL_WRITE,
        ALL_SEALS | F_SEAL_FUTURE_WRITE,
    ],
)
def test_other_seals_are_refused(seals: int) -> None:
    descriptor = memfd(REGION_BYTES_MIN, seals)
    try:
        with pytest.raises(ValueError, match="its seals are"):
            map_peer_arena(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("folder", ["/dev/shm", None])
def test_a_file_is_refused(folder: str | None) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(REGION_BYTES_MIN)
        with pytest.raises(ValueError, match="seals"):
            map_peer_arena(file.fileno())


def test_a_pipe_or_socket_is_refused() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(ValueError, match="not a memfd"):
            map_peer_arena(writing)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, None),
        (mmap.PAGESIZE, None),
        (REGION_BYTES_MIN + 1, None),
        (REGION_BYTES_MIN, 2 * REGION_BYTES_MIN),
        (1 << 30, None),
    ],
)
def test_a_wrong_size_is_refused(length: int, expected: int | None) -> None:
    descriptor = memfd(length)
    try:
        with pytest.raises(ValueError, match="size"):
            map_peer_arena(descriptor, expected)
    finally:
        os.close(descriptor)


def test_huge_pages_are_refused() -> None:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB
    try:
        descriptor = os.memfd_create("test", flags)
    except OSError:
        pytest.skip("this kernel has no huge pages")
    try:
        os.ftruncate(descriptor, 2 << 20)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, ALL_SEALS)
        with pytest.raises(ValueError, match="pages"):
            map_peer_arena(descriptor)
    finally:
        os.close(descriptor)


def test_a_limit_of_the_file_size_is_no_memory() -> None:
    def limited() -> list[str]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(FabricError) as caught:
            Arena(ARENA_BYTES)
        after = len(os.listdir("/proc/self/fd"))
        error = caught.value
        return [error.status, error.detail.partition(":")[0], str(after - before)]

    assert Child(limited).result() == ["NO_MEMORY", "EFBIG", "0"]


def test_a_mapping_that_cannot_be_had_leaves_no_descriptor() -> None:
    def limited() -> list[str]:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
        used = int(pages) * mmap.PAGESIZE
        most = used + (4 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(FabricError) as caught:
            Arena(ARENA_BYTES)
        after = len(os.listdir("/proc/self/fd"))
        error = caught.value
        return [error.status, error.detail.partition(":")[0], str(after - before)]

    assert Child(limited).result() == ["NO_MEMORY", "ENOMEM", "0"]


def test_what_counts_as_a_shortage() -> None:
    assert is_shortage(OSError(errno.EMFILE, "x"))
    assert not is_shortage(OSError(errno.ECONNREFUSED, "x"))
    assert no_memory(OSError(errno.ENOSPC, "full"), "try").detail == "ENOSPC: full"
    assert no_memory("a limit", "try").detail == "a limit"


def test_populating_is_only_a_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_arena, "_MADV_POPULATE_WRITE", 12345)
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        populate(memory, 0, mmap.PAGESIZE)
        assert memory[:4] == bytes(4)


def test_regions_of_an_arena_do_not_overlap_and_come_together_again() -> None:
    areas = RegionMap()
    assert areas.take(REGION_BYTES_MIN) is None
    areas.add_arena(ARENA_BYTES)
    places = []
    while (place := areas.take(REGION_BYTES_MIN)) is not None:
        places.append(place)
    assert places == [(0, n * REGION_BYTES_MIN) for n in range(512)]
    for place in places[::2] + places[1::2]:
        areas.give_back(place, REGION_BYTES_MIN)
    assert areas.take(ARENA_BYTES) == (0, 0)
    assert areas.take(REGION_BYTES_MIN) is None


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 1000)), max_size=80
    )
)
def test_regions_never_overlap(steps: list[tuple[bool, int, int]]) -> None:
    areas = RegionMap()
    sizes = [ARENA_BYTES, ARENA_BYTES, 4 * ARENA_BYTES]
    for size in sizes:
        areas.add_arena(size)
    taken: list[tuple[int, int, int]] = []
    for is_take, order, which in steps:
        if is_take or not taken:
            length = REGION_BYTES_MIN << order
            place = areas.take(length)
            if place is not None:
                arena, offset = place
                assert offset % length == 0
                assert offset + length <= sizes[arena]
                for other, start, size in taken:
                    apart = offset + length <= start or start + size <= offset
                    assert other != arena or apart
                taken.append((arena, offset, length))
        else:
            arena, offset, length = taken.pop(which % len(taken))
            areas.give_back((arena, offset), length)
    for arena, offset, length in taken:
        areas.give_back((arena, offset), length)
    wholes = [areas.take(size) for size in sizes[::-1]]
    assert sorted(place for place in wholes if place) == [(0, 0), (1, 0), (2, 0)]
