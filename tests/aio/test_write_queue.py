"""How writes are cut, kept and put together, without a peer."""

from __future__ import annotations

import random

import pytest

from pysmc.aio.write_queue import SLICE_BYTES, SMALL_BYTES, WriteQueue
from pysmc.errors import FabricError

BASE = 1 << 40


class Peer:
    """A connection and a queue pair in one: a ring, and what was announced."""

    remote_rkey = 7
    alert_token = 9

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.memory = bytearray(capacity)
        self.produced = self.consumed = 0
        self.update_due = False
        self.announced: list[int] = []
        self.written = 0
        self.received = bytearray()
        self.flushed = 0
        self.blocked = False
        self.mailbox = -1

    # the core's connection

    def claim(self, waiting: int, limit: int):
        space = self.capacity - (self.produced - self.consumed)
        count = min(waiting, limit, space)
        if waiting >= space and not self.blocked:
            self.blocked = self.update_due = True
        if not count:
            return ()
        self.update_due = True
        start = self.produced % self.capacity
        self.produced += count
        first = min(count, self.capacity - start)
        spans = [(BASE + start, first)]
        if count > first:
            spans.append((BASE, count - first))
        return tuple(spans)

    def take_post(self):
        self.update_due = False
        return (self.remote_rkey, 9, 1, 2, self.produced, 0, 0)

    def published(self, completed: bool) -> None:
        assert completed

    rmb = type("Rmb", (), {"handle": "our region"})

    def follow_consumer(self, consumer: int) -> bool:
        if consumer == self.consumed:
            return False
        self.consumed = consumer
        self.blocked = False
        return True

    # the fabric's queue pair

    def post_write(self, rkey: int, address: int, data) -> None:
        assert rkey == self.remote_rkey
        assert len(data) <= SLICE_BYTES
        start = address - BASE
        self.memory[start : start + len(data)] = data
        self.written += len(data)

    def publish(self, rkey, wr_id, sequence, token, producer, consumer, flags) -> bool:
        assert (rkey, wr_id) == (7, 9)
        assert self.written == producer, "announced before it was written"
        self.announced.append(producer)
        return True

    def flush(self) -> None:
        self.flushed += 1

    def newest_consumer(self, region, alert_token: int) -> int:
        assert (region, alert_token) == ("our region", 9)
        return self.mailbox

    # the reader

    def read(self, count: int) -> None:
        count = min(count, self.announced[-1] - self.consumed)
        for position in range(self.consumed, self.consumed + count):
            self.received.append(self.memory[position % self.capacity])
        self.consumed += count
        self.blocked = False


def queue_to(peer: Peer) -> WriteQueue:
    return WriteQueue(peer, peer)


def test_a_small_write_is_one_announcement() -> None:
    peer = Peer(1000)
    queue = queue_to(peer)
    assert queue.write(b"hello") is False
    assert peer.announced == [5]
    assert bytes(peer.memory[:5]) == b"hello"
    assert peer.flushed == 1
    assert queue.size == 0


def test_a_large_write_is_announced_slice_by_slice() -> None:
    peer = Peer(4 * SLICE_BYTES)
    queue = queue_to(peer)
    assert queue.write(bytes(3 * SLICE_BYTES)) is False
    assert peer.announced == [SLICE_BYTES, 2 * SLICE_BYTES, 3 * SLICE_BYTES]


def test_a_write_around_the_end_of_the_ring() -> None:
    peer = Peer(100)
    queue = queue_to(peer)
    queue.write(b"a" * 80)
    peer.read(80)
    assert queue.write(b"0123456789" * 5) is False
    peer.read(50)
    assert bytes(peer.received[80:]) == b"0123456789" * 5
    assert peer.announced == [80, 130]


def test_what_finds_no_room_waits() -> None:
    peer = Peer(100)
    queue = queue_to(peer)
    assert queue.write(b"x" * 150) is True
    assert queue.size == 50
    assert queue.write(b"y" * 10) is True
    assert queue.size == 60
    assert queue.send() is True, "no room yet"
    peer.read(30)
    assert queue.send() is True
    assert queue.size == 30
    peer.read(1000)
    assert queue.send() is False
    peer.read(1000)
    assert peer.received == b"x" * 150 + b"y" * 10


def test_being_blocked_is_announced_once() -> None:
    peer = Peer(10)
    queue = queue_to(peer)
    queue.write(b"x" * 10)
    assert peer.announced == [10]
    queue.write(b"y")
    queue.send()
    queue.send()
    assert len(peer.announced) == 1, "the first announcement said so"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_only_bytes_are_kept_by_reference(kind) -> None:
    peer = Peer(10)
    queue = queue_to(peer)
    source = bytearray(b"0123456789abcdef")
    data = bytes(source) if kind is bytes else kind(source)
    queue.write(data)
    queue.write(data)
    if kind is not bytes:
        source[:] = b"X" * 16
        if kind is memoryview:
            data.release()
        source.extend(b"no view is held")
    for _ in range(10):
        peer.read(7)
        queue.send()
    peer.read(100)
    assert peer.received == b"0123456789abcdef" * 2


def test_small_writes_that_wait_grow_together() -> None:
    peer = Peer(10)
    queue = queue_to(peer)
    queue.write(b"x" * 11)
    for _ in range(1000):
        queue.write(b"abc")
    assert len(queue._waiting) == 2
    queue.write(bytes(SMALL_BYTES))
    queue.write(b"after")
    assert len(queue._waiting) == 4
    queue.clear()
    assert queue.size == 0
    assert queue.send() is False


def test_a_piece_that_grew_is_cut() -> None:
    peer = Peer(10)
    queue = queue_to(peer)
    queue.write(b"x" * 10 + b"-")
    for _ in range(5):
        queue.write(b"abc")
    while queue.size:
        peer.read(4)
        queue.send()
    peer.read(100)
    assert peer.received == b"x" * 10 + b"-" + b"abc" * 5


def test_growing_stops_at_a_slice() -> None:
    peer = Peer(10)
    queue = queue_to(peer)
    queue.write(b"x" * 11)
    for _ in range(2 * SLICE_BYTES // 1000 + 2):
        queue.write(bytes(1000))
    assert len(queue._waiting) == 4


def test_room_that_was_not_told_yet_is_found() -> None:
    peer = Peer(100)
    queue = queue_to(peer)
    queue.write(b"x" * 100)
    peer.mailbox = 40
    assert queue.write(b"y" * 30) is False
    peer.mailbox = 40  # no news
    assert queue.write(b"z" * 20) is True
    assert queue.size == 10
    peer.mailbox = 100
    assert queue.send() is False
    assert peer.produced == 150


def test_a_random_walk_loses_nothing() -> None:
    choose = random.Random(7)
    peer = Peer(5000)
    queue = queue_to(peer)
    sent = bytearray()
    for step in range(3000):
        size = choose.choice([1, 10, 100, 5000, 9000])
        data = bytes([step & 0xFF]) * size
        if queue.size < 50_000:
            queue.write(bytearray(data) if step % 3 else data)
            sent += data
        peer.read(choose.choice([0, 1, 100, 4000]))
        queue.send()
    while queue.size:
        peer.read(5000)
        queue.send()
    peer.read(5000)
    assert peer.received == sent


def test_memory_that_is_not_there() -> None:
    class Liar(Peer):
        def post_write(self, rkey, address, data):
            raise FabricError("post_write", "REMOTE_ACCESS")

    for size in (1, 1_000_000):
        with pytest.raises(FabricError):
            queue_to(Liar(1000)).write(bytes(size))
