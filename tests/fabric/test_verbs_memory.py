"""Pinned memory, what is said when there is none, and staging."""

from __future__ import annotations

import errno
import logging
import resource
from typing import TYPE_CHECKING

import pytest

from pysmc.errors import FabricError
from pysmc.fabric import verbs_memory
from pysmc.fabric.verbs_memory import (
    RECEIVE_BLOCK,
    RECEIVE_BYTES,
    RECEIVES,
    SLAB_BYTES,
    SLABS_MAX,
    PinCount,
    Pinned,
    ReceiveSlab,
    Staging,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fabric.fake_verbs import FakeDomain, FakeVerbs, Roce

PAGE = 4096


@pytest.fixture
def library(roce: Roce) -> FakeVerbs:
    return roce.libraries[0]


@pytest.fixture
def handle(library: FakeVerbs) -> Iterator[FakeDomain]:
    handle = library.create_domain()
    yield handle
    library.failures.clear()
    handle.close()


@pytest.fixture
def count() -> PinCount:
    return PinCount()


def test_pinned_memory_is_zeros_and_counted(
    handle: FakeDomain, count: PinCount
) -> None:
    pinned = Pinned(handle, 4 * PAGE, 3, count)
    assert count.bytes == 4 * PAGE
    assert pinned.memory[:] == bytes(4 * PAGE)
    assert handle.verbs.memory[pinned.rkey].address == pinned.address
    pinned.close()
    pinned.close()
    assert not count.bytes
    assert pinned.rkey not in handle.verbs.memory


def test_memory_outlives_its_registration_while_it_is_looked_at(
    handle: FakeDomain, count: PinCount
) -> None:
    pinned = Pinned(handle, PAGE, 3, count)
    view = memoryview(pinned.memory)
    pinned.close()
    view[:4] = b"late"
    assert bytes(view[:4]) == b"late"


@pytest.fixture
def first_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs_memory, "_warned", set())


def _limit(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))


@pytest.mark.usefixtures("first_warning")
def test_the_limit_of_pinned_memory_is_named_and_warned_of_once(
    handle: FakeDomain,
    count: PinCount,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _limit(monkeypatch, 65536)
    kept = Pinned(handle, 8 * PAGE, 0, count)
    handle.verbs.fail("register", errno.ENOMEM, errno.ENOMEM)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(FabricError) as caught:
                Pinned(handle, 16 * PAGE, 0, count)
    assert caught.value.status == "NO_MEMORY"
    words = "ENOMEM: 65536 bytes cannot be pinned: RLIMIT_MEMLOCK allows 65536 and this"
    assert caught.value.detail.startswith(f"{words} device has 32768; raise it")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "LimitMEMLOCK=" in caplog.text
    assert count.bytes == 8 * PAGE
    kept.close()


def test_without_a_limit_memory_itself_ran_out(
    handle: FakeDomain, count: PinCount, monkeypatch: pytest.MonkeyPatch
) -> None:
    _limit(monkeypatch, resource.RLIM_INFINITY)
    handle.verbs.fail("register", errno.ENOMEM)
    with pytest.raises(FabricError, match="memory itself has run out") as caught:
        Pinned(handle, PAGE, 0, count)
    assert "RLIMIT_MEMLOCK" not in caught.value.detail


def test_another_failure_is_named(handle: FakeDomain, count: PinCount) -> None:
    handle.verbs.fail("register", errno.EINVAL)
    with pytest.raises(FabricError, match="4096 bytes cannot be registered: .*EINVAL"):
        Pinned(handle, PAGE, 0, count)


def test_memory_that_cannot_be_mapped(handle: FakeDomain, count: PinCount) -> None:
    with pytest.raises(FabricError, match="cannot be mapped") as caught:
        Pinned(handle, 1 << 62, 0, count)
    assert caught.value.status == "NO_MEMORY"


def test_a_device_that_is_gone_deregisters_nothing(
    handle: FakeDomain, count: PinCount
) -> None:
    pinned = Pinned(handle, PAGE, 0, count)
    handle.verbs.fail("deregister", errno.EIO)
    pinned.close()
    assert not count.bytes
    handle.verbs.open["memory"] -= 1
    handle.children -= 1


def test_receives_lie_side_by_side_in_blocks(
    handle: FakeDomain, count: PinCount
) -> None:
    slab = ReceiveSlab(handle, 1, count)
    assert slab.pinned.length >= RECEIVES * RECEIVE_BYTES
    assert slab.pinned.length % PAGE == 0
    blocks = slab.blocks.blocks  # type: ignore[attr-defined]
    assert [len(block) for block in blocks] == [RECEIVE_BLOCK] * (
        RECEIVES // RECEIVE_BLOCK
    )
    places = [address for block in blocks for _, address, _ in block]
    assert places == [
        slab.pinned.address + slot * RECEIVE_BYTES for slot in range(RECEIVES)
    ]
    slab.close()
    slab.close()
    assert not count.bytes


@pytest.fixture
def staging(handle: FakeDomain, count: PinCount) -> Iterator[Staging]:
    staging = Staging(Pinned(handle, SLAB_BYTES, 0, count), handle, count)
    yield staging
    handle.verbs.failures.clear()
    staging.reset().close()
    assert not count.bytes


HALF = SLAB_BYTES // 2


def test_bytes_lie_behind_each_other_until_all_completed(staging: Staging) -> None:
    first = staging.slabs[0]
    assert staging.place(b"abc", 3, 1) == (first.address, first.lkey)
    assert staging.place(b"defg", 4, 2) == (first.address + 64, first.lkey)
    staging.completed(1)
    assert staging.place(b"h", 1, 3) == (first.address + 128, first.lkey)
    assert first.memory[64:68] == b"defg"
    staging.completed(3)
    assert staging.place(b"x", 1, 4) == (first.address, first.lkey)


def test_slabs_are_added_on_demand_up_to_a_bound(
    staging: Staging, count: PinCount
) -> None:
    number = 0
    while staging.place(bytes(HALF), HALF, number + 1) is not None:
        number += 1
    assert number == 2 * SLABS_MAX
    assert len(staging.slabs) == SLABS_MAX
    assert count.bytes == SLABS_MAX * SLAB_BYTES
    staging.completed(1)
    assert staging.place(b"x", 1, number + 1) is None  # half of the first is in use
    staging.completed(2)
    place = staging.place(b"x", 1, number + 1)
    assert place == (staging.slabs[0].address, staging.slabs[0].lkey)
    assert len(staging.slabs) == SLABS_MAX


def test_without_memory_it_goes_on_with_what_there_is(
    handle: FakeDomain, staging: Staging
) -> None:
    handle.verbs.fail("register", errno.ENOMEM)
    assert staging.place(bytes(SLAB_BYTES), SLAB_BYTES, 1) is not None
    assert staging.place(b"x", 1, 2) is None
    assert staging.place(b"x", 1, 2) is None  # and does not ask again
    staging.completed(1)
    assert staging.place(b"x", 1, 2) is not None
    assert len(staging.slabs) == 1


def test_what_is_given_back_is_the_first(handle: FakeDomain, count: PinCount) -> None:
    first = Pinned(handle, SLAB_BYTES, 0, count)
    staging = Staging(first, handle, count)
    for number in (1, 2, 3):
        staging.place(bytes(SLAB_BYTES), SLAB_BYTES, number)
    assert staging.reset() is first
    assert count.bytes == SLAB_BYTES
    first.close()
