"""Fuzz targets for the words and messages that a peer writes in shared memory.

``shm-ring`` is both arenas of a link under a peer that writes any word of its own at
any time: what comes out is a completion that says what was in the words, or a broken
rule; what goes in lands where it may land, or is refused.

``shm-link`` is what the peer says on the link's socket, its descriptors, and the words
that lead into its memory: a write stays inside the region that they name.
"""

from __future__ import annotations

import mmap
import os
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from pysmc.errors import FabricError
from pysmc.fabric import shm_endpoint, shm_link, shm_ring
from pysmc.fabric.base import CompletionKind, Status
from pysmc.fabric.shm_arena import ARENAS_MAX, Arena
from pysmc.fabric.shm_ring import (
    CONTROL_BYTES,
    DESCRIPTOR,
    MAILBOX_WORDS,
    MAILBOXES,
    QUEUE,
    QUEUE_ENTRIES,
    QUEUE_HEAD,
    QUEUE_TAIL,
    SEND_BYTES_MAX,
    SEND_HEAD,
    SEND_SLOT_WORDS,
    SEND_SLOTS,
    SEND_WANTED,
    SENDS,
    SLEEPING,
    SLOTS,
    Inbox,
    Outbox,
    RuleBroken,
    pack_descriptor,
)
from tests.fuzz.target import Bytes, Target, must

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.fabric.base import Completion, QueuePair
    from pysmc.fabric.shm_ring import Window

__all__ = ["TARGETS"]

QUEUE_PAIR = cast("QueuePair", object())  # goes into completions, and nothing else
REGION = 1 << 14
KEEP = 4096
"""Bytes around a region that nobody may touch."""
NOTHING, NO_REGION, NO_CONTROL = map(bytes, (KEEP, REGION + 2 * KEEP, CONTROL_BYTES))
"""Zeros; made once, and compared at once, for there are many inputs."""
EDGES = (
    0, 1, 2, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 1100, 1101, 1152, 1 << 14,
    (1 << 16) - 1, (1 << 31) - 1, (1 << 32) - 1, 1 << 32, (1 << 48) - 1, 1 << 48,
    1 << 63, (1 << 63) | (1 << 48), (1 << 64) - 1, (1 << 64) - 1024,
)  # fmt: skip


def _word(source: Bytes) -> int:
    """A word near an edge, or any."""
    choice = source.byte()
    if choice < 200:
        return (EDGES[choice % len(EDGES)] + source.signed()) % (1 << 64)
    return int.from_bytes(source.take(8).ljust(8, b"\0"), "big")


class Words:
    """The two control arenas of one end, and the peer's data."""

    def __init__(self) -> None:
        self.ours = mmap.mmap(-1, CONTROL_BYTES)
        self.theirs = mmap.mmap(-1, CONTROL_BYTES)
        self.data = mmap.mmap(-1, REGION + 2 * KEEP)
        self.dirty = False
        self.begin()

    def begin(self) -> None:
        """Empty everything."""
        for memory in (self.ours, self.theirs):
            memory[:] = NO_CONTROL
        self.data[:] = NO_REGION
        self.ended: list[Status] = []
        self.inbox = Inbox(self.ours, QUEUE_PAIR, self._nothing)
        self.outbox = Outbox(self.theirs, self._nothing, self._resolve, self._fail)
        self.words = memoryview(self.ours).cast("Q")
        self.their_words = memoryview(self.theirs).cast("Q")
        self.their_words[MAILBOXES + DESCRIPTOR] = pack_descriptor(
            1 << 16, 0, 0, REGION
        )
        self.sent: list[bytes] = []

    def end(self) -> None:
        """Let go of the views."""
        self.inbox.close()
        self.outbox.close()
        self.words.release()
        self.their_words.release()

    def _nothing(self) -> None:
        return

    def _fail(self, status: Status, text: str) -> None:
        assert text
        self.ended.append(status)

    def _resolve(self, rkey: int) -> Window:
        index = MAILBOXES + DESCRIPTOR
        word = self.their_words[index]
        if word >> 32 != rkey:
            raise shm_ring.refused(rkey, "post_write", "no such region")
        first = 1 << 32
        return index, word, self.data, KEEP - first, first, first + REGION

    # What the peer writes

    def queue(self, source: Bytes) -> None:
        """An entry, and perhaps the tail behind it."""
        tail = self.words[QUEUE_TAIL]
        self.words[QUEUE + tail % QUEUE_ENTRIES] = _word(source)
        self.words[QUEUE_TAIL] = (tail + 1) % (1 << 64)

    def tail(self, source: Bytes) -> None:
        """Any tail."""
        self.words[QUEUE_TAIL] = _word(source)

    def mailbox(self, source: Bytes) -> None:
        """One word of a mailbox."""
        base = MAILBOXES + (source.byte() << 1 & 0x1FF) * MAILBOX_WORDS
        self.words[base + source.byte() % MAILBOX_WORDS] = _word(source)

    def slot(self, source: Bytes) -> None:
        """The length word of a SEND slot, and some of its bytes."""
        base = SENDS + source.byte() % SEND_SLOTS * SEND_SLOT_WORDS
        self.words[base] = _word(source)
        self.words[base + 1] = _word(source)

    def heads(self, source: Bytes) -> None:
        """How far the peer says that it has read, in its own arena."""
        place = (QUEUE_HEAD, SEND_HEAD, SLEEPING)[source.byte() % 3]
        self.their_words[place] = _word(source)

    def wanted(self, source: Bytes) -> None:
        """Whether the peer waits for room."""
        self.words[SEND_WANTED] = _word(source)

    def descriptor(self, source: Bytes) -> None:
        """The word that names the peer's region."""
        self.their_words[MAILBOXES + DESCRIPTOR] = (
            _word(source)
            if source.byte() % 4
            else pack_descriptor(1 << 16, 0, 0, REGION)
        )

    # What we do

    def take(self, source: Bytes) -> None:
        """Take what came; each completion says what was in the words."""
        del source
        completions: list[Completion] = []
        try:
            self.inbox.take(completions)
        except RuleBroken as error:
            must(bool(str(error)), "no words")
            self.ended.append(Status.BROKEN_RULE)
        assert len(completions) <= QUEUE_ENTRIES
        for completion in completions:
            self._judge(completion)
        assert self.inbox.waiting() in (True, False)

    @staticmethod
    def _judge(completion: Completion) -> None:
        payload = completion.payload
        if completion.kind is CompletionKind.RECEIVE:
            assert type(payload) is bytes
            assert 1 <= len(payload) <= SEND_BYTES_MAX
            return
        assert completion.kind is CompletionKind.UPDATE
        sequence, token, producer, consumer, flags = payload
        assert min(payload) >= 0
        assert max(sequence, flags) < 1 << 16
        assert token < 1 << 32
        assert max(producer, consumer) < 1 << 48

    def publish(self, source: Bytes) -> None:
        """Publish into a mailbox, perhaps one that does not exist."""
        slot = (0, 0, 1, SLOTS - 1, SLOTS, 0xFFFF)[source.byte() % 6]
        before = self.outbox.words[QUEUE_TAIL]
        try:
            self.outbox.publish(1 << 16 | slot, 0, 1, 2, 3, 4, 5)
        except FabricError as error:
            must(error.status == Status.REMOTE_ACCESS.name, error.status)
        assert self.outbox.words[QUEUE_TAIL] - before in (0, 1)

    def send(self, source: Bytes) -> None:
        """SEND, or keep it back."""
        payload = bytes((len(self.sent) & 0xFF,)) * (1 + source.byte() * 4)
        self.sent.append(payload)
        self.outbox.send(payload)
        self.outbox.flush()

    def write(self, source: Bytes) -> None:
        """Write near the ends of the region; nothing around it changes."""
        start = (1 << 32) + (0, REGION, 1 << 20)[source.byte() % 3] + source.signed()
        data = b"\xaa" * (1 + source.byte())
        try:
            self.outbox.post_write(1 << 16, start, data)
        except FabricError as error:
            must(error.status == Status.REMOTE_ACCESS.name, error.status)
        assert self.data[:KEEP] == NOTHING, "bytes before the region"
        assert self.data[KEEP + REGION :] == NOTHING, "bytes behind the region"

    STEPS: tuple[Callable[[Words, Bytes], None], ...] = (
        queue, queue, tail, mailbox, mailbox, slot, heads, wanted, descriptor,
        take, take, publish, send, write,
    )  # fmt: skip


_words = Words()


def _ring(data: bytes) -> None:
    if not data:
        return
    words, source = _words, Bytes(data)
    words.end()
    words.begin()
    while source and not words.ended:
        words.STEPS[source.byte() % len(words.STEPS)](words, source)
    assert set(words.ended) <= {Status.BROKEN_RULE, Status.TIMED_OUT}


def _ring_seeds() -> list[bytes]:
    """One of each step, and the usual order of several."""
    seeds = [bytes((step, 1, 0, 2, 0, 3, 9)) for step in range(len(Words.STEPS))]
    usual = bytes(
        (3, 0, 1, 25, 0, 3, 0, 0, 9, 0, 0, 0, 0, 9, 11, 0, 12, 3, 13, 0, 5, 7)
    )
    update = bytes((3, 0, 1, 22, 0, 3, 0, 0, 2, 1, 0, 0, 0, 9))
    message = bytes((5, 0, 12, 0, 1, 0, 0, 7, 0, 9, 12, 0, 12, 1, 6, 1, 5, 0, 12, 9))
    # A SEND as long as may be, and longer ones.
    lengths = [bytes((5, 0, edge, 0, 1, 0, 0, 7, 0, 9)) for edge in range(11, 16)]
    return [*seeds, *lengths, usual, update, message, usual + message + update]


# The link's socket


class Link:
    """A link that is up, without a peer: what it hears comes from the input."""

    def __init__(self) -> None:
        self.queue_pair = shm_link.ShmQueuePair(cast("Any", _Domain()), 7)
        self.control = mmap.mmap(-1, CONTROL_BYTES)
        self.arena = Arena(1 << 20)
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.begin()

    def begin(self) -> None:
        """Bring the link up anew."""
        pair = self.queue_pair
        pair._release()
        self.control[:] = NO_CONTROL
        pair.state, pair.is_up, pair.ending = shm_link.LinkState.UP, True, None
        pair._outbox = Outbox(self.control, pair._ring, pair._resolve, pair.fail)

    def hear(self, source: Bytes) -> None:
        """A message with descriptors, good ones and others."""
        descriptors = []
        for _ in range(source.byte() % 3):
            which = self.null if source.byte() % 4 == 0 else self.arena.descriptor
            descriptors.append(os.dup(which))
        truncated = source.byte() % 4 == 0
        choice = source.byte() % 4
        data = source.take(source.byte() % 16)
        if choice == 1:
            data = bytes((shm_endpoint.ARENA, len(self.queue_pair._peer_arenas)))
        elif choice == 2:
            data = bytes((shm_endpoint.BELL,))
        packet = shm_endpoint.Packet(data, descriptors, truncated)
        try:
            self.queue_pair._understand(packet)
        except ValueError as error:
            self.queue_pair.fail(Status.BROKEN_RULE, str(error))
        finally:
            packet.close()
        assert len(self.queue_pair._peer_arenas) <= ARENAS_MAX

    def name(self, source: Bytes) -> None:
        """A word that names a region, true or not."""
        slot = source.byte() % 4
        offset, length = source.byte() << 14, REGION << source.byte() % 16
        word = pack_descriptor(
            source.byte() << 16 | slot, source.byte() % 66, offset, length
        )
        if source.byte() % 4 == 0:
            word = _word(source)
        assert self.queue_pair._outbox is not None
        words = self.queue_pair._outbox.words
        words[MAILBOXES + slot * MAILBOX_WORDS + DESCRIPTOR] = word % (1 << 64)

    def write(self, source: Bytes) -> None:
        """Look up a region as the first write does: it lies inside its arena."""
        pair = self.queue_pair
        slot = (0, 1, 2, 3, SLOTS, 0xFFFF)[source.byte() % 6]
        rkey = source.byte() << 16 | slot
        try:
            index, word, memory, delta, first, end = pair._resolve(rkey)
        except FabricError as error:
            must(error.status in {"REMOTE_ACCESS", "NO_MEMORY"}, error.status)
            return
        assert word >> 32 == rkey
        assert index == MAILBOXES + slot * MAILBOX_WORDS + DESCRIPTOR
        assert any(memory is arena for arena in pair._peer_arenas)
        assert 0 <= first + delta < end + delta <= len(memory)

    def hello(self, source: Bytes) -> None:
        """The first message: refused, or written again the same."""
        data = source.patch(HELLO.build(), 6)
        if source.byte() % 8 == 0:
            data = source.take(source.byte())
        try:
            parsed = shm_endpoint.Hello.parse(data)
        except ValueError as error:
            must(bool(str(error)), "no words")
            return
        assert parsed.build() == data
        assert parsed.arenas <= ARENAS_MAX
        assert not self.queue_pair.expects(parsed), "nobody was announced"

    STEPS: tuple[Callable[[Link, Bytes], None], ...] = (hear, hear, name, write, hello)


class _Device:
    """What a link tells its device."""

    forked = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: None


class _Domain(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(device=_Device(), arenas=[])


HELLO = shm_endpoint.Hello(bytes(range(8)), 1, 2, 3, 4, 1, 0)
_living: list[Link] = []


def _link(data: bytes) -> None:
    if not data:
        return
    if not _living:
        _living.append(Link())
    link, source = _living[0], Bytes(data)
    link.begin()
    while source and link.queue_pair.ending is None:
        link.STEPS[source.byte() % len(link.STEPS)](link, source)
    ending = link.queue_pair.ending
    assert ending is None or ending[0] in {Status.BROKEN_RULE, Status.PEER_GONE}


def _link_seeds() -> list[bytes]:
    """A hello; an arena, its region, a write; and what goes wrong with each."""
    arena = bytes((0, 1, 1, 1, 1, 0))
    region = bytes((2, 0, 0, 0, 1, 0, 1))
    seeds = [bytes((4, 0, 1)), arena, arena + region + bytes((3, 0, 1))]
    seeds += [bytes((0, n, 1, 1, 1, c, 1, 4)) for n in range(3) for c in range(4)]
    seeds += [bytes((4, 2, at, 1, at + 1, 3, 1)) for at in range(0, 50, 5)]
    seeds.append(b"\4\0\0" + struct.pack("B", 60) + HELLO.build())
    return seeds


TARGETS = [
    Target("shm-ring", _ring, _ring_seeds, 128),
    Target("shm-link", _link, _link_seeds, 96),
]
