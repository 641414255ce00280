"""Do two processors agree? Tearing, store buffering and message passing, for real.

Two processes and a shared page, the very operations of `pysmc.fabric.shm_ring`. What
these show holds for the machine they run on; x86-64 is the one that the fast path is
offered on.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
import socket
import time
from typing import NamedTuple

import pytest

from pysmc.fabric.base import CompletionKind
from pysmc.fabric.shm import ShmDevice
from pysmc.fabric.shm_ring import (
    CONTROL_BYTES,
    WORDS_NEED_SYSCALL,
    fence,
)
from tests.fabric.rawpeer import Child, identified, identify

SECONDS = 0.4
# Words, a cache line each.
X, Y, LINE_X, LINE_Y, SEEN_BY_X, SEEN_BY_Y = 0, 8, 16, 24, 32, 40
pytestmark = pytest.mark.slow


def shared() -> memoryview:
    return memoryview(mmap.mmap(-1, CONTROL_BYTES)).cast("Q")


def test_which_machines_are_measured() -> None:
    measured = {"x86_64", "AMD64"}
    assert (platform.machine() not in measured) == WORDS_NEED_SYSCALL


def test_a_word_is_never_torn() -> None:
    words = shared()
    low, high = 0x0000_0000_FFFF_FFFF, 0xFFFF_FFFF_0000_0000
    end = time.monotonic() + SECONDS

    def write() -> None:
        while time.monotonic() < end:
            for _ in range(1000):
                words[X] = low
                words[X] = high

    words[X] = low
    child = Child(write)
    reads = 0
    while time.monotonic() < end:
        for _ in range(1000):
            assert words[X] in (low, high)
        reads += 1000
    child.result()
    assert reads > 10_000


def test_data_is_there_when_its_word_is() -> None:
    memory = mmap.mmap(-1, CONTROL_BYTES)
    words = memoryview(memory).cast("Q")
    end = time.monotonic() + SECONDS

    def write() -> None:
        count = 0
        while time.monotonic() < end:
            for _ in range(500):
                count += 1
                while words[Y] != count - 1:
                    if time.monotonic() > end:
                        return
                memory[4096:4160] = count.to_bytes(8, "little") * 8
                words[X] = count

    child = Child(write)
    seen = 0
    while time.monotonic() < end:
        count = words[X]
        if count != seen:
            assert memory[4096:4160] == count.to_bytes(8, "little") * 8
            words[Y] = seen = count
    child.result()
    assert seen > 0


def _meet(words: memoryview, mine: int, other: int, turn: int, end: float) -> bool:
    """Wait at a line for the other side; False when the time is over."""
    words[mine] = turn
    while words[other] < turn:
        if time.monotonic() > end:
            return False
    return True


def _cross(words: memoryview, own: Side, turns: int, end: float) -> tuple[int, int]:
    """Store, fence, load, at the same time as the other side; tell what both missed."""
    done = both_missed = 0
    for turn in range(1, turns + 1):
        if not _meet(words, own.line, own.other_line, turn, end):
            break
        words[own.word] = turn
        fence()
        words[own.seen] = words[own.other_word]
        if not _meet(words, own.line + 1, own.other_line + 1, turn, end):
            break
        done = turn
        both_missed += words[SEEN_BY_X] != turn and words[SEEN_BY_Y] != turn
        if not _meet(words, own.line + 2, own.other_line + 2, turn, end):
            break
    return done, both_missed


class Side(NamedTuple):
    word: int
    other_word: int
    seen: int
    line: int
    other_line: int


def test_of_two_fenced_pairs_one_sees_the_other() -> None:
    """Never may both loads miss both stores.

    Without the fences six of a thousand turns do, on two processors.
    """
    words = shared()
    end = time.monotonic() + 5 * SECONDS
    near = Side(X, Y, SEEN_BY_X, LINE_X, LINE_Y)
    far = Side(Y, X, SEEN_BY_Y, LINE_Y, LINE_X)
    child = Child(lambda: _cross(words, far, 15_000, end))
    done, both_missed = _cross(words, near, 15_000, end)
    child.result()
    assert done > 0
    assert both_missed == 0


def test_no_wake_up_is_lost_between_two_processes() -> None:
    """Sleep at once and at every turn; a lost ring would leave both asleep."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    turns = 2000

    def play(line: socket.socket, passive: bool) -> int:
        device = ShmDevice(os.urandom(8))
        domain = device.create_domain()
        queue_pair, region = domain.create_queue_pair(), domain.register(1 << 14)
        line.send(identify(device, queue_pair, 1) + region.rkey.to_bytes(4, "big"))
        facts = line.recv(100)
        rkey = int.from_bytes(facts[16:], "big")
        queue_pair.connect(identified(facts[:16]), 1, passive=passive)
        mine = newest = 0
        while newest < turns:
            for completion in device.poll():
                if completion.kind is CompletionKind.CONNECTED and not passive:
                    mine += 1
                    queue_pair.publish(rkey, 0, mine, 1, mine, 0, 0)
                elif completion.kind is CompletionKind.UPDATE:
                    newest = max(newest, completion.payload.producer)
                    if mine < newest or (not passive and mine == newest < turns):
                        mine += 1
                        queue_pair.publish(rkey, 0, mine, 1, mine, 0, 0)
            if newest < turns and device.arm():
                assert select.select([device.fileno()], [], [], 5)[0], "asleep for good"
        line.send(b"done")
        line.recv(4)
        device.close()
        return newest

    child = Child(lambda: play(far, True))
    assert play(near, False) == turns
    assert child.result() == turns
    near.close()
    far.close()
