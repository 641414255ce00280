"""The words that the two ends of a link share: who writes which, and in which order.

Each end owns a control arena that both map. In it the *peer* leaves what it has to say
(updates, SENDs), and the owner leaves how far it has read. Decides the layout and the
memory order; knows no sockets and no arenas of data.

Layout, in bytes. Every word that one side writes has a cache line of its own, except
for the last word of a mailbox line, which changes only with the region:

======= ==================================================== ======
offset  what                                                 writer
======= ==================================================== ======
0       queue tail: entries ever queued                      peer
64      queue head: entries ever taken                       owner
128     send head: SENDs ever taken                          owner
192     send wanted: the peer waits for a free SEND slot     peer
256     sleeping: 0 awake, else the number of this sleep     owner
512     queue: 1,024 words                                   peer
8,704   512 mailbox lines: state, producer, consumer word    peer
8,728   in each of these lines: descriptor of the region     owner
41,472  SEND slots: 64 of 1,152 bytes, length word first     peer
======= ==================================================== ======

A queue entry is the number of a mailbox that changed, or `SEND_ENTRY`. One queue for
both keeps SENDs and updates in order. An update that finds its mailbox still waiting in
the queue queues nothing: whoever takes the entry sees the newest state.

Memory order, on x86-64 (stores stay in order, loads stay in order, but a load may
overtake an earlier store to another word):

* Publish: producer word, consumer word, state word, entry, tail. A reader that sees the
  tail sees the entry; one that sees the state word sees the cursors that belong to it.
  The reader loads the state word first, so that the flags it sees (a close, say) are
  never newer than the cursors.
* Coalescing, why no update is lost: the writer stores the state, *fence*, loads the
  head; the reader stores the head, *fence*, loads the state. Of two such pairs at least
  one sees the other: either the writer sees that its entry was taken and queues
  another, or the reader that took it sees the new state. Both may happen; the same
  update is then seen twice.
* Sleeping: the writer stores the tail, *fence*, loads the sleep word; the sleeper
  stores the sleep word, *fence*, loads the tail. Either the writer rings, or the
  sleeper sees the news and stays awake.

Shared words are read and written only as aligned 64-bit words (``memoryview.cast``):
``struct.pack_into`` writes a zero first. The fence is an acquire and a release of a
lock that is never waited for. On other machines than x86-64 nothing of this has been
measured: there every store that others must follow is fenced off, as is every load, and
words are looked at only after a system call.

Source: the layout is that of SMC-D's CDC (a mailbox in the receiver's buffer); RFC 7609
section 4.5 and A.4 say what an update means.
"""

from __future__ import annotations

import platform
import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol

from pysmc.errors import FabricError
from pysmc.fabric.base import Completion, CompletionKind, QueuePair, Status, Update

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

__all__ = ["CONTROL_BYTES", "GEOMETRY", "SLOTS", "Inbox", "Outbox", "RuleBroken"]

SLOTS = 512
"""Regions of a domain, and so mailboxes."""
QUEUE_ENTRIES = 1024
"""More than the mailboxes and SEND slots together: honest peers cannot overflow it."""
TAKEN_AT_ONCE = 64
"""Entries of one link that a poll takes at most."""
SEND_SLOTS = 64
SEND_SLOT_BYTES = 1152
SEND_BYTES_MAX = 1100
HELD_SENDS_MAX = 1024
"""SENDs kept back for a peer that takes none."""
SEND_ENTRY = SLOTS
"""The queue entry that means: the next SEND slot."""

# Offsets in 64-bit words.
QUEUE_TAIL, QUEUE_HEAD, SEND_HEAD, SEND_WANTED, SLEEPING = 0, 8, 16, 24, 32
QUEUE = 64
MAILBOXES = QUEUE + QUEUE_ENTRIES
MAILBOX_WORDS = 8
DESCRIPTOR = 3
SENDS = MAILBOXES + SLOTS * MAILBOX_WORDS
SEND_SLOT_WORDS = SEND_SLOT_BYTES // 8

CONTROL_BYTES = 128 * 1024
"""Size of a control arena, rounded up to whole pages of every usual size."""
GEOMETRY = (CONTROL_BYTES, SLOTS, QUEUE_ENTRIES, SEND_SLOTS, SEND_SLOT_BYTES)
"""What both ends must agree on; part of the hello."""

WRITTEN = 1 << 63
"""In a producer word: the mailbox holds an update. A cleared mailbox does not."""
_CURSOR = (1 << 48) - 1
_ENTRY_MASK = QUEUE_ENTRIES - 1

_UPDATE, _RECEIVE, _SUCCESS = (
    CompletionKind.UPDATE,
    CompletionKind.RECEIVE,
    Status.SUCCESS,
)

WORDS_NEED_SYSCALL = platform.machine() not in {"x86_64", "AMD64"}
"""True where the order of shared words was never measured: see the module's text."""

_lock = threading.Lock()
_try_acquire, _release = _lock.acquire, _lock.release


def fence() -> None:
    """Keep every later load behind every earlier store.

    An atomic read-modify-write is the only full fence that Python offers, and taking a
    lock is one. Threads with loops of their own share this one: whoever finds it taken,
    by another thread, beneath a signal handler or since a fork, takes a new one.
    """
    if _try_acquire(False):  # noqa: FBT003  # by keyword it costs twice as much
        _release()
    else:
        threading.Lock().acquire()


class RuleBroken(Exception):
    """The peer left words that no honest peer leaves. Never leaves the fabric."""


class Resolver(Protocol):
    """Finds the memory that an rkey names."""

    def __call__(self, rkey: int) -> Window:
        """Answer; raises FabricError when it names nothing."""


Window = tuple[int, int, "mmap.mmap", int, int, int]
"""A peer's region: index of its descriptor word and that word as they were checked, the
mapping, what to add to an address to get an offset in it, first address, last + 1."""


def refused(rkey: int, operation: str, why: str) -> FabricError:
    """Make the error for an rkey or address that names no memory of the peer."""
    return FabricError(operation, Status.REMOTE_ACCESS.name, f"rkey {rkey:#x}: {why}")


def pack_descriptor(rkey: int, arena: int, offset: int, length: int) -> int:
    """Say in one word which memory an rkey names.

    Args:
        rkey: 32 bits.
        arena: Index of the arena, below 64.
        offset: In bytes, a multiple of 16 KiB below 512 MiB.
        length: In bytes, a power of two from 16 KiB to 512 MiB.
    """
    code = (length >> 14).bit_length() - 1
    return rkey << 32 | arena << 20 | (offset >> 14) << 4 | code


def unpack_descriptor(word: int) -> tuple[int, int, int, int]:
    """Tell rkey, arena, offset and length; nothing of it has been checked."""
    offset = (word >> 4 & 0xFFFF) << 14
    return word >> 32, word >> 20 & 0xFFF, offset, 1 << 14 + (word & 0xF)


class Inbox:
    """Our own control arena: what the peer left for us.

    ``take(completions)`` appends what arrived since the last call, ``waiting()`` tells
    without taking, and both are closures: this is where a message spends its time.
    """

    def __init__(
        self, memory: mmap.mmap, queue_pair: QueuePair, room_made: Callable[[], None]
    ) -> None:
        """Start at the beginning of an arena full of zeros.

        Args:
            memory: Our control arena.
            queue_pair: Goes into the completions.
            room_made: Rings the peer that waits for a SEND slot.
        """
        self._view = memoryview(memory)
        self.words = self._view.cast("Q")
        self._memory = memory
        self._room_made = room_made
        self._sends = 0
        self.take, self.waiting = self._make_take(queue_pair)

    def _make_take(
        self, queue_pair: QueuePair
    ) -> tuple[Callable[[list[Completion]], None], Callable[[], bool]]:
        words, deliver = self.words, self._make_deliver(queue_pair)
        head = 0

        def waiting() -> bool:
            return words[QUEUE_TAIL] != head

        def take(completions: list[Completion]) -> None:
            nonlocal head
            tail = words[QUEUE_TAIL]
            if tail == head:
                return
            if tail - head == 1:
                if WORDS_NEED_SYSCALL:
                    fence()
                entries = [words[QUEUE + (head & _ENTRY_MASK)]]
            else:
                entries = _copy_entries(words, head, tail)
                tail = head + len(entries)
            # From here the peer may reuse the entries, which is why they were copied;
            # and only behind the fence may the mailboxes be looked at.
            words[QUEUE_HEAD] = head = tail
            if _try_acquire(False):  # noqa: FBT003  # fence(), without a call
                _release()
            else:
                fence()
            deliver(entries, completions)

        return take, waiting

    def _make_deliver(
        self, queue_pair: QueuePair
    ) -> Callable[[list[int], list[Completion]], None]:
        words, take_send = self.words, self._take_send
        # A tuple's own constructor: half the time of the generated one.
        new, weak = tuple.__new__, WORDS_NEED_SYSCALL

        def deliver(entries: list[int], completions: list[Completion]) -> None:
            for entry in entries:
                if entry >= SLOTS:
                    payload = take_send(entry)
                    completions.append(
                        new(Completion, (_RECEIVE, queue_pair, _SUCCESS, 0, payload))
                    )
                    continue
                base = MAILBOXES + (entry << 3)
                state = words[base]
                if weak:
                    fence()
                producer = words[base + 1]
                consumer = words[base + 2]
                if producer < WRITTEN:
                    continue  # cleared since it was queued
                update = (
                    state >> 16 & 0xFFFF,
                    state >> 32,
                    producer & _CURSOR,
                    consumer & _CURSOR,
                    state & 0xFFFF,
                )
                completions.append(
                    new(
                        Completion,
                        (_UPDATE, queue_pair, _SUCCESS, 0, new(Update, update)),
                    )
                )
            if weak:
                fence()  # the data that the cursors speak of is looked at next

        return deliver

    def _take_send(self, entry: int) -> bytes:
        if entry != SEND_ENTRY:
            text = f"queue entry {entry}, {SEND_ENTRY} is the largest"
            raise RuleBroken(text)
        words = self.words
        base = SENDS + self._sends % SEND_SLOTS * SEND_SLOT_WORDS
        length = words[base]
        if not 1 <= length <= SEND_BYTES_MAX:
            text = f"a SEND of {length} bytes, 1 to {SEND_BYTES_MAX} allowed"
            raise RuleBroken(text)
        start = (base + 1) * 8
        payload = self._memory[start : start + length]
        self._sends += 1
        words[SEND_HEAD] = self._sends
        fence()
        if words[SEND_WANTED]:
            self._room_made()
        return payload

    def take_rest(self, completions: list[Completion]) -> None:
        """Take all that is left, before the link ends."""
        for _ in range(QUEUE_ENTRIES // TAKEN_AT_ONCE):
            if not self.waiting():
                return
            try:
                self.take(completions)
            except RuleBroken:
                return  # the link ends anyway

    def describe(self, slot: int, descriptor: int) -> None:
        """Tell the peer what the region of this slot is; 0 for none.

        An update that was left in the mailbox is forgotten.
        """
        self.clear(slot)
        self.words[MAILBOXES + slot * MAILBOX_WORDS + DESCRIPTOR] = descriptor

    def consumer_of(self, slot: int, alert_token: int) -> int:
        """Look at a mailbox's consumer cursor; -1 when it holds no such update."""
        if WORDS_NEED_SYSCALL:
            return -1
        words, base = self.words, MAILBOXES + slot * MAILBOX_WORDS
        if words[base] >> 32 != alert_token or words[base + 1] < WRITTEN:
            return -1
        return words[base + 2] & _CURSOR

    def clear(self, slot: int) -> None:
        """Forget an update that was left for this slot."""
        base = MAILBOXES + slot * MAILBOX_WORDS
        self.words[base + 1] = 0
        self.words[base] = self.words[base + 2] = 0

    def close(self) -> None:
        """Give up the views of the arena; `take` must not be used any more."""
        self.words.release()
        self._view.release()


def _copy_entries(words: memoryview, head: int, tail: int) -> list[int]:
    if not 0 < tail - head <= QUEUE_ENTRIES:
        text = f"queue tail {tail} with head {head}, {QUEUE_ENTRIES} entries"
        raise RuleBroken(text)
    # The rest waits for the next poll: a flood must not fill the loop's whole turn.
    tail = min(tail, head + TAKEN_AT_ONCE)
    if WORDS_NEED_SYSCALL:
        fence()
    start, stop = QUEUE + (head & _ENTRY_MASK), QUEUE + (tail & _ENTRY_MASK)
    if start < stop:
        return words[start:stop].tolist()
    return words[start:MAILBOXES].tolist() + words[QUEUE:stop].tolist()


class Outbox:
    """The peer's control arena: where we leave what the peer should see.

    `publish`, `post_write` and `flush` are closures, for the same reason as in `Inbox`.
    """

    def __init__(
        self,
        memory: mmap.mmap,
        ring: Callable[[], None],
        resolve: Resolver,
        fail: Callable[[Status, str], None],
    ) -> None:
        """Start at the beginning of an arena full of zeros.

        Args:
            memory: The peer's control arena.
            ring: Rings the peer's doorbell.
            resolve: Finds the peer's memory for an rkey seen the first time.
            fail: Ends the link.
        """
        self._view = memoryview(memory)
        self.words = self._view.cast("Q")
        self._memory = memory
        self._ring = ring
        self._fail = fail
        self._rung = 0
        self._sends = 0
        self._held: deque[bytes] = deque()
        self._tail = [0]  # shared with the closure, which is faster than an attribute
        self.publish = self._make_publish()
        self.post_write = self._make_post_write(resolve)
        self.flush = self._make_flush()

    def _make_publish(self) -> Callable[[int, int, int, int, int, int, int], bool]:
        words, shared_tail, enqueue = self.words, self._tail, self._enqueue
        weak = WORDS_NEED_SYSCALL
        queued = [-1] * SLOTS  # position of the last entry of each mailbox

        def publish(
            rkey: int,
            wr_id: int,  # noqa: ARG001 - completes at once
            sequence: int,
            alert_token: int,
            producer: int,
            consumer: int,
            flags: int,
        ) -> bool:
            slot = rkey & 0xFFFF
            if slot >= SLOTS:
                raise refused(rkey, "publish", f"the peer has only {SLOTS} regions")
            base = MAILBOXES + (slot << 3)
            if words[base + 3] >> 32 != rkey:
                raise refused(rkey, "publish", "the peer has no such region")
            words[base + 1] = producer | WRITTEN
            words[base + 2] = consumer
            if weak:
                fence()
            words[base] = alert_token << 32 | sequence << 16 | flags
            position = queued[slot]
            if words[QUEUE_HEAD] <= position:
                # Not taken yet, as it seems; it is certain only behind the fence.
                if _try_acquire(False):  # noqa: FBT003  # fence(), without a call
                    _release()
                else:
                    fence()
                if words[QUEUE_HEAD] <= position:
                    return True
            queued[slot] = shared_tail[0]
            enqueue(slot)
            return True

        return publish

    def _make_post_write(
        self, resolve: Resolver
    ) -> Callable[[int, int, memoryview | bytes], None]:
        words = self.words
        windows: dict[int, Window] = {}

        def post_write(rkey: int, address: int, data: memoryview | bytes) -> None:
            window = windows.get(rkey)
            # The descriptor word is looked at each time: a region that the peer gave
            # up, and perhaps used for something else since, is not written any more.
            if window is None or words[window[0]] != window[1]:
                if len(windows) > SLOTS:
                    windows.clear()  # names of regions long gone
                window = windows[rkey] = resolve(rkey)
            _, _, memory, delta, first, end = window
            stop = address + len(data)
            if address < first or stop > end:
                why = f"{address:#x} to {stop:#x} is not in {first:#x} to {end:#x}"
                raise refused(rkey, "post_write", why)
            memory[address + delta : stop + delta] = data

        return post_write

    def _enqueue(self, entry: int) -> None:
        words, shared_tail = self.words, self._tail
        tail = shared_tail[0]
        # One look at the peer's word, then the check of what was seen.
        pending = tail - words[QUEUE_HEAD]
        if not 0 <= pending < QUEUE_ENTRIES:
            text = f"queue head {tail - pending} with tail {tail} of ours"
            self._fail(Status.BROKEN_RULE, text)
            return
        words[QUEUE + (tail & _ENTRY_MASK)] = entry
        if WORDS_NEED_SYSCALL:
            fence()
        words[QUEUE_TAIL] = shared_tail[0] = tail + 1
        if _try_acquire(False):  # noqa: FBT003  # fence(), without a call
            _release()
        else:
            fence()
        sleep = words[SLEEPING]
        if sleep and sleep != self._rung:
            # Once for each sleep: the peer numbers them.
            self._rung = sleep
            self._ring()

    def _make_flush(self) -> Callable[[], None]:
        held, send_held = self._held, self.send_held

        def flush() -> None:
            if held:
                send_held()

        return flush

    def send(self, payload: bytes) -> None:
        """Put a SEND into the next slot, or keep it until there is one."""
        if self._held or not self._put(payload):
            if len(self._held) >= HELD_SENDS_MAX:
                text = f"the peer took none of {HELD_SENDS_MAX + SEND_SLOTS} SENDs"
                self._fail(Status.TIMED_OUT, text)
                return
            self._held.append(payload)
            self.words[SEND_WANTED] = 1
            fence()
            self.send_held()

    def send_held(self) -> None:
        """Put what was kept back, as far as there is room now."""
        held = self._held
        while held and self._put(held[0]):
            held.popleft()
        if not held:
            self.words[SEND_WANTED] = 0

    def _put(self, payload: bytes) -> bool:
        words, number = self.words, self._sends
        pending = number - words[SEND_HEAD]
        if pending == SEND_SLOTS:
            return False
        if not 0 <= pending < SEND_SLOTS:
            text = f"send head {number - pending} after {number} SENDs of ours"
            self._fail(Status.BROKEN_RULE, text)
            return True
        base = SENDS + number % SEND_SLOTS * SEND_SLOT_WORDS
        start = (base + 1) * 8
        self._memory[start : start + len(payload)] = payload
        words[base] = len(payload)
        self._sends = number + 1
        self._enqueue(SEND_ENTRY)
        return True

    def close(self) -> None:
        """Give up the views of the arena. Nothing may be posted afterwards."""
        self.words.release()
        self._view.release()
