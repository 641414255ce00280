"""The shared words: what is queued, what rings, and what no peer may leave there."""

from __future__ import annotations

import mmap
import os
import select
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysmc.errors import FabricError
from pysmc.fabric import shm_ring
from pysmc.fabric.base import CompletionKind, Status
from pysmc.fabric.shm import ShmDevice
from pysmc.fabric.shm_ring import (
    CONTROL_BYTES,
    DESCRIPTOR,
    HELD_SENDS_MAX,
    MAILBOX_WORDS,
    MAILBOXES,
    QUEUE,
    QUEUE_ENTRIES,
    QUEUE_HEAD,
    QUEUE_TAIL,
    SEND_ENTRY,
    SEND_HEAD,
    SEND_SLOTS,
    SEND_WANTED,
    SENDS,
    SLEEPING,
    SLOTS,
    TAKEN_AT_ONCE,
    WRITTEN,
    Inbox,
    Outbox,
    RuleBroken,
    Window,
    pack_descriptor,
    unpack_descriptor,
)
from tests.fabric.rawpeer import drain, link

if TYPE_CHECKING:
    from pysmc.fabric.base import Completion, QueuePair
    from tests.fabric.rawpeer import RawPeer

RKEY = 7 << 16
QUEUE_PAIR = cast("QueuePair", object())  # goes into completions, and nothing else


class Ring:
    """Both sides of one control arena, in one process."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, CONTROL_BYTES)
        self.rings = 0
        self.room_made = 0
        self.failures: list[tuple[Status, str]] = []
        self.data = mmap.mmap(-1, 1 << 16)
        self.inbox = Inbox(self.memory, QUEUE_PAIR, self._made_room)
        self.outbox = Outbox(self.memory, self._ring, self._resolve, self._fail)
        self.inbox.describe(0, pack_descriptor(RKEY, 0, 0, 1 << 14))
        self.resolved = 0

    def _ring(self) -> None:
        self.rings += 1

    def _made_room(self) -> None:
        self.room_made += 1

    def _fail(self, status: Status, text: str) -> None:
        self.failures.append((status, text))

    def _resolve(self, rkey: int) -> Window:
        self.resolved += 1
        index = MAILBOXES + DESCRIPTOR
        word = self.outbox.words[index]
        if word >> 32 != rkey:
            raise shm_ring.refused(rkey, "post_write", "no such region")
        return index, word, self.data, -(1 << 32), 1 << 32, (1 << 32) + (1 << 14)

    def publish(self, sequence: int, producer: int = 0, rkey: int = RKEY) -> bool:
        return self.outbox.publish(rkey, 0, sequence, 9, producer, 0, 0)

    def take(self) -> list[Completion]:
        completions: list[Completion] = []
        self.inbox.take(completions)
        return completions

    def sequences(self) -> list[int]:
        return [completion.payload.sequence for completion in self.take()]


@pytest.fixture
def ring() -> Ring:
    return Ring()


def test_the_layout_has_no_overlaps_and_fits() -> None:
    words = [QUEUE_TAIL, QUEUE_HEAD, SEND_HEAD, SEND_WANTED, SLEEPING]
    lines = [word // 8 for word in words]
    assert len(set(lines)) == len(lines), "each word has a cache line of its own"
    assert max(words) < QUEUE
    assert MAILBOXES == QUEUE + QUEUE_ENTRIES
    assert SENDS == MAILBOXES + SLOTS * MAILBOX_WORDS
    assert (SENDS + SEND_SLOTS * shm_ring.SEND_SLOT_WORDS) * 8 <= CONTROL_BYTES
    assert shm_ring.SEND_SLOT_BYTES >= 8 + shm_ring.SEND_BYTES_MAX
    assert QUEUE_ENTRIES > SLOTS + SEND_SLOTS, "honest peers cannot overflow it"


def test_an_update_is_queued_once_while_it_waits(ring: Ring) -> None:
    for sequence in range(1, 11):
        assert ring.publish(sequence)
    assert ring.outbox.words[QUEUE_TAIL] == 1
    assert ring.sequences() == [10]
    assert ring.sequences() == []
    ring.publish(11)
    assert ring.inbox.waiting()
    assert ring.sequences() == [11]


def test_the_queue_wraps(ring: Ring) -> None:
    for turn in range(5 * QUEUE_ENTRIES // SLOTS):
        for slot in range(SLOTS):
            rkey = RKEY + slot
            ring.inbox.describe(slot, pack_descriptor(rkey, 0, 0, 1 << 14))
            ring.publish(turn, rkey=rkey)
        for _ in range(turn % 3 * 20):
            ring.outbox.send(b"x")
        taken: list[Completion] = []
        while ring.inbox.waiting():
            ring.inbox.take(taken)
        kinds = [completion.kind for completion in taken]
        assert kinds.count(CompletionKind.UPDATE) == SLOTS
        assert kinds.count(CompletionKind.RECEIVE) == turn % 3 * 20


def test_the_doorbell_rings_once_a_sleep(ring: Ring) -> None:
    ring.publish(1)
    assert ring.rings == 0, "nobody sleeps"
    ring.inbox.words[SLEEPING] = 5
    ring.take()
    ring.publish(2)
    assert ring.rings == 1
    ring.take()
    ring.publish(3)
    ring.outbox.send(b"x")
    assert ring.rings == 1, "it has been woken already"
    ring.inbox.words[SLEEPING] = 6
    ring.outbox.send(b"y")
    assert ring.rings == 2, "it sleeps again"


def test_a_cleared_mailbox_says_nothing(ring: Ring) -> None:
    ring.publish(1)
    ring.inbox.clear(0)
    assert ring.take() == []
    ring.publish(2)
    assert ring.sequences() == [2]


def test_a_region_given_up_is_refused(ring: Ring) -> None:
    ring.outbox.post_write(RKEY, 1 << 32, b"first")
    ring.inbox.describe(0, 0)
    for post in (
        lambda: ring.publish(1),
        lambda: ring.outbox.post_write(RKEY, 1 << 32, b"again"),
        lambda: ring.publish(1, rkey=RKEY + SLOTS),
    ):
        with pytest.raises(FabricError) as caught:
            post()
        assert caught.value.status == "REMOTE_ACCESS"
    assert ring.data[:5] == b"first"


def test_a_region_is_looked_up_once(ring: Ring) -> None:
    for _ in range(10):
        ring.outbox.post_write(RKEY, 1 << 32, b"data")
    assert ring.resolved == 1
    ring.inbox.describe(0, pack_descriptor(RKEY, 0, 0, 1 << 15))
    ring.outbox.post_write(RKEY, 1 << 32, b"data")
    assert ring.resolved == 2, "it changed"


def test_names_of_old_regions_do_not_pile_up(ring: Ring) -> None:
    for generation in range(1, 2 * SLOTS):
        rkey = generation << 16
        ring.inbox.describe(0, pack_descriptor(rkey, 0, 0, 1 << 14))
        ring.outbox.post_write(rkey, 1 << 32, b"data")
    closure = ring.outbox.post_write.__closure__ or ()
    kept = [cell.cell_contents for cell in closure]
    assert max(len(item) for item in kept if isinstance(item, dict)) <= SLOTS + 1


def test_sends_that_find_no_slot_are_kept_in_order(ring: Ring) -> None:
    payloads = [bytes([n % 100]) * (n + 1) for n in range(200)]
    for payload in payloads:
        ring.outbox.send(payload)
    assert ring.outbox.words[SEND_WANTED] == 1
    got: list[bytes] = []
    while len(got) < 200:
        completions = ring.take()
        assert completions, "a peer that takes makes room, and rings"
        got += [completion.payload for completion in completions]
        ring.outbox.flush()
    assert ring.room_made >= 1
    assert got == payloads
    assert ring.outbox.words[SEND_WANTED] == 0
    assert ring.failures == []


def test_a_peer_that_takes_no_sends_ends_the_link(ring: Ring) -> None:
    for _ in range(HELD_SENDS_MAX + SEND_SLOTS):
        ring.outbox.send(b"x")
    assert ring.failures == []
    ring.outbox.send(b"x")
    assert ring.failures[0][0] is Status.TIMED_OUT


@pytest.mark.parametrize(
    "tail", [QUEUE_ENTRIES + 4, 2, 0, (1 << 64) - 1, 1 << 63, 3 + QUEUE_ENTRIES + 1]
)
def test_a_wrong_tail_breaks_a_rule(ring: Ring, tail: int) -> None:
    for _ in range(3):
        ring.outbox.send(b"x")
    ring.take()
    ring.outbox.words[QUEUE_TAIL] = tail
    with pytest.raises(RuleBroken, match="queue tail"):
        ring.take()


@pytest.mark.parametrize("entry", [SEND_ENTRY + 1, 1 << 32, (1 << 64) - 1])
def test_a_wrong_entry_breaks_a_rule(ring: Ring, entry: int) -> None:
    ring.publish(1)
    ring.outbox.words[QUEUE] = entry
    with pytest.raises(RuleBroken, match="queue entry"):
        ring.take()


@pytest.mark.parametrize("length", [0, 1101, 1 << 40, (1 << 64) - 1])
def test_a_wrong_length_breaks_a_rule(ring: Ring, length: int) -> None:
    ring.outbox.send(b"x")
    ring.outbox.words[SENDS] = length
    with pytest.raises(RuleBroken, match="a SEND of"):
        ring.take()


@pytest.mark.parametrize("head", [5, (1 << 64) - 1])
def test_a_queue_head_ahead_of_us_ends_the_link(ring: Ring, head: int) -> None:
    ring.inbox.words[QUEUE_HEAD] = head
    ring.publish(1)
    assert ring.failures[0][0] is Status.BROKEN_RULE
    assert ring.outbox.words[QUEUE_TAIL] == 0, "nothing was queued"


@pytest.mark.parametrize("head", [2, (1 << 64) - 1])
def test_a_send_head_ahead_of_us_ends_the_link(ring: Ring, head: int) -> None:
    ring.inbox.words[SEND_HEAD] = head
    ring.outbox.send(b"x")
    assert ring.failures[0][0] is Status.BROKEN_RULE
    assert ring.outbox.words[QUEUE_TAIL] == 0


def test_a_queue_head_that_stands_still_hurts_only_its_owner(ring: Ring) -> None:
    for sequence in range(3000):
        ring.publish(sequence)
        ring.take()
        ring.inbox.words[QUEUE_HEAD] = 0
    assert ring.outbox.words[QUEUE_TAIL] == 1
    assert ring.failures == []


def test_fields_of_an_update_keep_to_their_width(ring: Ring) -> None:
    ring.publish(1)
    words = ring.outbox.words
    words[MAILBOXES] = words[MAILBOXES + 1] = words[MAILBOXES + 2] = (1 << 64) - 1
    (completion,) = ring.take()
    cursor = (1 << 48) - 1
    assert completion.payload == (0xFFFF, 0xFFFFFFFF, cursor, cursor, 0xFFFF)


@given(st.integers(0, 0xFFFF), st.integers(0, SLOTS - 1), st.integers(0, 15))
def test_a_descriptor_says_what_it_was_told(
    generation: int, slot: int, code: int
) -> None:
    rkey, length = generation << 16 | slot, 1 << 14 + code
    for arena, offset in ((0, 0), (63, (512 << 20) - (1 << 14)), (5, 3 << 20)):
        word = pack_descriptor(rkey, arena, offset, length)
        assert unpack_descriptor(word) == (rkey, arena, offset, length)


@given(st.lists(st.sampled_from(["publish", "send", "take"]), max_size=200))
def test_any_order_of_posts_and_takes(steps: list[str]) -> None:
    ring = Ring()
    sent: deque[bytes] = deque()
    newest = seen = 0
    for count, step in enumerate([*steps, "take"], start=1):
        if step == "publish":
            newest = count
            ring.publish(count, producer=count)
        elif step == "send":
            payload = count.to_bytes(2, "big")
            sent.append(payload)
            ring.outbox.send(payload)
        else:
            for completion in ring.take():
                if completion.kind is CompletionKind.RECEIVE:
                    assert completion.payload == sent.popleft()
                else:
                    assert completion.payload.producer >= seen
                    seen = completion.payload.producer
            ring.outbox.flush()
            assert seen == newest
    while sent:
        for completion in ring.take():
            assert completion.payload == sent.popleft()
        ring.outbox.flush()


def test_another_machine_fences_more(monkeypatch: pytest.MonkeyPatch) -> None:
    fences = 0
    real = shm_ring.fence

    def counted() -> None:
        nonlocal fences
        fences += 1
        real()

    monkeypatch.setattr(shm_ring, "fence", counted)
    monkeypatch.setattr(shm_ring, "WORDS_NEED_SYSCALL", True)
    ring = Ring()
    ring.publish(1)
    assert fences == 2, "before the state word, before the tail"
    assert ring.sequences() == [1]
    assert fences == 5, "behind the tail, behind the state, before the data"
    assert WRITTEN == 1 << 63


def test_the_fence_is_for_every_thread_and_every_moment() -> None:
    """Each loop of a process has its own device, and all of them share the fence."""
    taken = shm_ring._lock.acquire(blocking=False)
    shm_ring.fence()  # as beneath a signal handler, or in a forked child
    assert taken
    shm_ring._lock.release()

    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def fence_often() -> None:
        start.wait(20)
        try:
            for _ in range(50_000):
                shm_ring.fence()
        except RuntimeError as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=fence_often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    finally:
        sys.setswitchinterval(before)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors


def test_a_flood_is_taken_in_pieces(device: ShmDevice, peer: RawPeer) -> None:
    peer.link(device, device.create_domain())
    theirs = peer.theirs
    assert theirs is not None
    for slot in range(SLOTS):
        theirs[MAILBOXES + slot * MAILBOX_WORDS + 1] = WRITTEN
        theirs[QUEUE + slot] = slot
    theirs[QUEUE_TAIL] = SLOTS
    rounds = [len(device.poll()) for _ in range(SLOTS // TAKEN_AT_ONCE)]
    assert rounds == [TAKEN_AT_ONCE] * len(rounds)
    assert device.poll() == []


def test_all_of_it_is_taken_before_the_end(device: ShmDevice, peer: RawPeer) -> None:
    peer.link(device, device.create_domain())
    theirs = peer.theirs
    assert theirs is not None
    for slot in range(SLOTS):
        theirs[MAILBOXES + slot * MAILBOX_WORDS + 1] = WRITTEN
        theirs[QUEUE + slot] = slot
    theirs[QUEUE_TAIL] = SLOTS
    peer.socket.close()
    device.arm()
    completions = device.poll()
    kinds = [completion.kind for completion in completions]
    assert kinds == [CompletionKind.UPDATE] * SLOTS + [CompletionKind.DOWN]


def test_what_comes_right_after_the_last_look_rings(
    device: ShmDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sleep is announced before the look, or this update would wake nobody."""
    far = ShmDevice(os.urandom(8))
    _, there = link(device, far)
    region = device.domains[0].register(16 * 1024)
    look = device._waiting[0]

    def look_and_miss() -> bool:
        found = look()
        there.publish(region.rkey, 0, 1, 1, 0, 0, 0)
        return found

    monkeypatch.setattr(device, "_waiting", [look_and_miss])
    assert device.arm()
    assert select.select([device.fileno()], [], [], 0)[0], "asleep for good"
    far.close()


def test_an_update_on_top_of_another_looks_again_behind_a_fence(
    device: ShmDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look at the head may be older than our own store of the state."""
    far = ShmDevice(os.urandom(8))
    _, there = link(device, far)
    region = device.domains[0].register(16 * 1024)
    there.publish(region.rkey, 0, 1, 1, 0, 0, 0)
    real, taken = shm_ring._try_acquire, []

    def taken_meanwhile(blocking: bool) -> bool:
        with monkeypatch.context() as inner:
            inner.setattr(shm_ring, "_try_acquire", real)
            taken.extend(device.poll())
        return real(blocking)

    with monkeypatch.context() as patch:
        patch.setattr(shm_ring, "_try_acquire", taken_meanwhile)
        there.publish(region.rkey, 0, 2, 1, 0, 0, 0)
    taken.extend(device.poll())
    assert [completion.payload.sequence for completion in taken] == [2, 2]
    far.close()


def test_a_send_waits_behind_those_that_are_held(device: ShmDevice) -> None:
    """Room that the peer has just made belongs to the oldest."""
    far = ShmDevice(os.urandom(8))
    here, _ = link(device, far)
    count = SEND_SLOTS + 3
    for number in range(count - 1):
        here.post_send(bytes((number,)))
    taken = far.poll()
    here.post_send(bytes((count - 1,)))
    taken += drain(far)
    assert [completion.payload[0] for completion in taken] == list(range(count))
    far.close()
