"""The verbs fabric: RDMA over converged Ethernet, between hosts.

Decides what a device is: one GID of one port, a few completion queues, and an epoll
descriptor over all that may have something to say. How memory is pinned is in
`pysmc.fabric.verbs_memory`, what a link group has in `pysmc.fabric.verbs_domain`, how a
link moves bytes in `pysmc.fabric.verbs_pair`. The verbs library is behind
`pysmc.fabric.verbs_api`.

A completion queue must never overflow, for that would end every queue pair on it. So
each has room for all requests of all its queue pairs at once, and when one is full the
next is made, twice as large. Each has a completion channel of its own: then one event
is one readable descriptor.

Nothing blocks: the way to a peer is looked for by `Reach` before a queue pair goes to
RTR, where the kernel would wait for an address. One device belongs to one thread.

Source: RFC 7609 section 2.1; ibv_get_cq_event(3) for the order of arming and polling;
kernel counterpart: smc_ib.c.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import time
import weakref
from typing import TYPE_CHECKING, Final

from pysmc.errors import FabricError, FabricUnavailable, ForkedError, LocalProtocolError
from pysmc.fabric.base import Completion, Device, Status, UpdateCodec
from pysmc.fabric.verbs_api import (
    EVENT_CQ_ERROR,
    EVENT_DEVICE_FATAL,
    EVENTS_OF_PORTS,
    EVENTS_OF_QUEUE_PAIRS,
    VerbsError,
)
from pysmc.fabric.verbs_binding import open_verbs
from pysmc.fabric.verbs_closing import CLOSING_MAX, LINGER_MAX, REST_SECONDS, Closing
from pysmc.fabric.verbs_domain import Bundle, VerbsDomain
from pysmc.fabric.verbs_memory import RECEIVES, PinCount, no_memory, refusal
from pysmc.fabric.verbs_pair import SENDS, VerbsQueuePair
from pysmc.fabric.verbs_ports import raise_shortage, read_port
from pysmc.fabric.verbs_reach import Reach

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.config import Config
    from pysmc.fabric.verbs_api import CompletionQueue, Verbs
    from pysmc.fabric.verbs_ports import RdmaPort
    from pysmc.fabric.verbs_reach import Finder

__all__ = ["VerbsDevice"]

_log = logging.getLogger(__name__)

_ENTRIES: Final = 4096
"""Of the first completion queue: 21 queue pairs."""
_BATCH: Final = 32
"""Completions of one queue that one look takes."""
_POLLS_PER_LOOK: Final = 64
"""Polls without a look at descriptors: they tell of events, not of data."""
_CLOSE_WAIT: Final = 2.0
"""Most seconds that a closed queue pair has to send what was posted before."""
_BUNDLES: Final = 2
"""Kept ready for the next link groups."""

_devices: weakref.WeakSet[VerbsDevice] = weakref.WeakSet()


class _Queue:
    """A completion queue and what it still has room for."""

    def __init__(self, handle: CompletionQueue, pairs: int) -> None:
        self.handle = handle
        self.room = pairs
        """Queue pairs."""
        self.is_notified = False
        """Whether its next completion makes it readable, or it is already."""


class VerbsDevice(Device):
    """One GID of one port of an RDMA device, for one event loop.

    Args:
        port: Which one.
        codec: How updates travel.
        config: How to take part.
        verbs: An open device in place of the one that the port names.
        finder: Finds the way to peers; None is a `Reach`.

    Raises:
        FabricUnavailable: There is no such device, or it cannot be used here.
        FabricError: Status ``NO_MEMORY``: no descriptors.
    """

    fabric = "verbs"
    peers_retry = True
    eid: str | None = None

    def __init__(
        self,
        port: RdmaPort,
        *,
        codec: UpdateCodec,
        config: Config,
        verbs: Verbs | None = None,
        finder: Finder | None = None,
    ) -> None:
        self.port = port
        self.codec = codec
        self.config = config
        self.gid = port.gid
        self.mac = port.mac
        self.mtu_code = port.mtu_code
        self.problem = ""
        """What ended the device, in words; from then on a new one has to be opened."""
        self._suspicion = ""
        """What will end it, once all was taken that came before."""
        self.count = PinCount()
        self.domains: list[VerbsDomain] = []
        self.dirty: dict[VerbsQueuePair, None] = {}
        """Queue pairs with posts that the device was not given."""
        self.forked = False
        self._verbs = open_verbs(port.device) if verbs is None else verbs
        self._pairs: dict[int, VerbsQueuePair] = {}
        self._queue_of: dict[int, _Queue] = {}
        self._queues: list[_Queue] = []
        self._bundles: list[Bundle] = []
        self._ready: list[Completion] = []
        self._resolving: dict[int, VerbsQueuePair] = {}
        self._keys = 0
        self._close_wait = min(_CLOSE_WAIT, config.close_wait)
        self._armed = False
        self._polls_left = 0
        self._handlers: dict[int, Callable[[], None]] = {}
        self._open = True
        self._epoll: select.epoll | None = None
        self._number = -1
        self._bell: int | None = None
        self._closing: Closing | None = None
        self._finder: Finder | None = None
        try:
            self._check_limits()
            self._open_descriptors(finder)
            self._add_queue()
        except OSError as exc:
            self.close()
            if finder is not None:
                finder.close()  # which may not have got so far as to be ours
            if isinstance(exc, FabricError):
                raise
            operation = "open the verbs fabric"
            raise_shortage(exc, operation)
            raise FabricUnavailable(operation, "UNAVAILABLE", str(exc)) from exc
        _devices.add(self)

    def _check_limits(self) -> None:
        needed = (max(SENDS, RECEIVES), SENDS + RECEIVES)
        words = ("queue pairs: {} requests", "completion queues: {} entries")
        for least, has, what in zip(needed, self._verbs.limits, words, strict=True):
            if has < least:
                operation = "open the verbs fabric"
                text = f"{self.port.device} has too small {what.format(has)}"
                raise FabricUnavailable(operation, "UNAVAILABLE", text)

    def _open_descriptors(self, finder: Finder | None) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._number = self._epoll.fileno()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if finder is None:
            finder = Reach()
        self._finder = finder
        self._closing = Closing()
        self._watch(self._bell, self._silence)
        self._watch(self._closing.fileno(), self._end_overdue)
        self._watch(self._verbs.event_fd, self._take_asynchronous)
        self._watch(finder.fileno(), self._take_ways)

    def __str__(self) -> str:
        return self.port.name

    @property
    def is_gone(self) -> bool:  # type: ignore[override]
        """Whether it is of no use any more; see `Device.is_gone`."""
        return bool(self.problem) and not self._ready

    @property
    def is_finishing(self) -> bool:  # type: ignore[override]
        """Whether closing it would wait; see `Device.is_finishing`."""
        return bool(self._closing)

    # --- what its domains and queue pairs need ---------------------------------------

    def refuse_if_forked(self) -> None:
        """Refuse in a child what belongs to the parent.

        Raises:
            ForkedError: We are a forked child.
        """
        if self.forked:
            text = "this verbs device was opened before fork(); open one in the child"
            raise ForkedError(text)

    def check_usable(self) -> None:
        """Refuse what a device cannot do that is closed, or gone.

        Raises:
            FabricError: It is gone.
        """
        self.refuse_if_forked()
        if not self._open:
            text = "the verbs device is closed"
            raise LocalProtocolError(text)
        if self.problem:
            operation = "use the verbs fabric"
            raise FabricUnavailable(operation, "UNAVAILABLE", self.problem)

    def complete(self, completion: Completion) -> None:
        """Have `poll` return a completion."""
        self._ready.append(completion)
        if self._armed:
            self._ring()

    def _ring(self) -> None:
        if self._bell is not None:
            os.eventfd_write(self._bell, 1)

    def queue_for_pair(self) -> _Queue:
        """Give a completion queue that has room for one more queue pair.

        Raises:
            FabricError: Status ``NO_MEMORY``, also while too many that were closed have
                yet to be destroyed.
        """
        if self._closing is not None and not self._closing.has_room:
            operation = "create a queue pair"
            text = f"{CLOSING_MAX} closed ones have yet to be destroyed"
            raise FabricError(operation, Status.NO_MEMORY.name, text)
        # What is left of a queue pair that was destroyed must not be taken for that of
        # a new one with the same number, nor stand in its completions' way.
        self._collect_all()
        for queue in self._queues:
            if queue.room:
                return queue
        return self._add_queue()

    def _add_queue(self) -> _Queue:
        per_pair = SENDS + RECEIVES
        most = self._verbs.limits.completion_queue_entries
        entries = min(_ENTRIES << len(self._queues), most)
        try:
            handle = self._verbs.create_completion_queue(entries)
        except VerbsError as exc:
            raise refusal(exc, "create a completion queue") from exc
        queue = _Queue(handle, entries // per_pair)

        def take() -> None:
            handle.take_event()
            queue.is_notified = False

        try:
            self._watch(handle.fd, take)
        except OSError as exc:
            handle.close()
            raise no_memory(str(exc), "watch a completion queue") from exc
        self._queues.append(queue)
        return queue

    def add_pair(self, queue_pair: VerbsQueuePair, queue: _Queue) -> None:
        """Know a new queue pair."""
        queue.room -= 1
        self._pairs[queue_pair.number] = queue_pair
        self._queue_of[queue_pair.number] = queue

    def find_way(self, queue_pair: VerbsQueuePair, gid: bytes) -> None:
        """Find out whether a peer can be reached; `resolved` is told, now or later."""
        assert self._finder is not None
        self._keys += 1
        self._resolving[self._keys] = queue_pair
        self._finder.begin(self._keys, gid, self.port)
        self._take_ways()

    def keep_closing(self, queue_pair: VerbsQueuePair) -> None:
        """Let a closed queue pair send what was posted before."""
        assert self._closing is not None
        self._closing.keep(queue_pair, self._close_wait)

    def let_rest(self, queue_pair: VerbsQueuePair) -> None:
        """Keep a queue pair that failed until destroying it holds nobody up."""
        assert self._closing is not None
        self._closing.keep(queue_pair, REST_SECONDS)

    def linger(self, queue_pair: VerbsQueuePair, *, was_asked: bool) -> None:
        """Keep a closed queue pair that has said all until its peer has, too."""
        assert self._closing is not None
        self._closing.linger(queue_pair, was_asked=was_asked)

    def forget_closing(self, queue_pair: VerbsQueuePair) -> None:
        """A closed queue pair has nothing more to send, or nobody to send it to."""
        assert self._closing is not None
        if self._closing.discard(queue_pair):
            self.destroy(queue_pair)

    def destroy(self, queue_pair: VerbsQueuePair) -> None:
        """Destroy a closed queue pair."""
        number = queue_pair.number
        if self._pairs.get(number) is not queue_pair:
            return
        del self._pairs[number]
        queue = self._queue_of.pop(number)
        for key, other in list(self._resolving.items()):
            if other is queue_pair:
                del self._resolving[key]
                assert self._finder is not None
                self._finder.cancel(key)
        is_destroyed = queue_pair.destroy()
        if is_destroyed:
            queue.room += 1  # else it may go on to fill its part
        queue_pair.domain.pair_destroyed(queue_pair, is_destroyed=is_destroyed)

    def take_back(self, bundle: Bundle) -> None:
        """Keep what a domain had for the next one, or give it back."""
        if self._open and not self.problem and len(self._bundles) < _BUNDLES:
            bundle.trim()
            self._bundles.append(bundle)
        else:
            bundle.close()

    def spare(self) -> bool:
        """Unpin what is only kept ready; tell whether there was anything."""
        bundles, self._bundles = self._bundles, []
        for bundle in bundles:
            bundle.close()
        slabs = [pair.staging.spare() for pair in self._pairs.values()]
        return bool(bundles) or any(slabs)

    # --- the contract ----------------------------------------------------------------

    def create_domain(self) -> VerbsDomain:
        """Create a domain; see `Device.create_domain`."""
        self.check_usable()
        if self._bundles:
            bundle = self._bundles.pop()
        else:
            bundle = Bundle(self._verbs, self.count)
        domain = VerbsDomain(self, bundle)
        self.domains.append(domain)
        return domain

    def poll(self) -> list[Completion]:
        """Take what has completed; see `Device.poll`."""
        self.refuse_if_forked()
        if self.dirty:
            self._flush()
        if self._armed or self._resolving or self._polls_left <= 0:
            self._armed = False
            self._look()
        self._polls_left -= 1
        self._collect()
        ready, self._ready = self._ready, []
        return ready

    def _flush(self) -> None:
        dirty, self.dirty = self.dirty, {}
        for queue_pair in dirty:
            queue_pair.flush_chain()

    def _collect(self) -> int:
        """Take completions of the library; tell how many."""
        if self.problem:
            return 0
        count = 0
        pairs = self._pairs
        try:
            for queue in self._queues:
                found = queue.handle.poll(_BATCH)
                for done in found:
                    queue_pair = pairs.get(done.qp_num)
                    if queue_pair is not None:
                        queue_pair.take(done)
                count += len(found)
        except VerbsError as exc:
            self.fail(f"{self.port.device} is gone: {exc.strerror}")
        if self._suspicion and not count:
            self.fail(self._suspicion)
        return count

    def _collect_all(self) -> None:
        """Take what the queues hold now, of which nothing may be left."""
        for _ in range((_ENTRIES << len(self._queues)) // _BATCH):
            if not self._collect():
                return

    def _look(self) -> None:
        """Look at the descriptors."""
        self._polls_left = _POLLS_PER_LOOK
        assert self._epoll is not None
        if self._epoll.closed:
            return  # a loop may have planned to poll before the device was closed
        for fd, _ in self._epoll.poll(0):
            try:
                if fd in self._handlers:  # one of them may have ended the device
                    self._handlers[fd]()
            except VerbsError as exc:
                self.fail(f"{self.port.device} is gone: {exc.strerror}")

    def _end_overdue(self) -> None:
        """Destroy queue pairs that have rested; the others had time enough to send."""
        assert self._closing is not None
        # A loop that was busy has yet to see that their peers were not silent.
        self._collect_all()
        for queue_pair in self._closing.take_overdue():
            if queue_pair.is_stopped or queue_pair.has_said_all:
                self.destroy(queue_pair)
            else:
                queue_pair.give_up()

    def pending(self) -> bool:
        """Look for completions; see `Device.pending`."""
        self.refuse_if_forked()
        if not self._ready:
            # What is found here was announced by its queue: the bell need not ring too.
            is_armed, self._armed = self._armed, False
            self._collect()
            self._armed = is_armed
        return bool(self._ready)

    def arm(self) -> bool:
        """Ask for `fileno` to become readable; see `Device.arm`."""
        self.refuse_if_forked()
        if self.dirty:
            self._flush()
        self._look()
        try:
            for queue in self._queues:
                if not queue.is_notified and not self.problem:
                    queue.handle.request_notify()
                    queue.is_notified = True
        except VerbsError as exc:
            self.fail(f"{self.port.device} is gone: {exc.strerror}")
        if self._collect() or self._ready:
            return False
        self._armed = True
        return True

    def disarm(self) -> None:
        """Say that we are awake; see `Device.disarm`. Nobody rings for that."""
        self.refuse_if_forked()

    def fileno(self) -> int:
        """Tell the descriptor that rings; see `Device.fileno`."""
        self.refuse_if_forked()
        # Also when it is closed, as at the interpreter's end: a loop that is still to
        # be closed takes it out of its selector.
        return self._number

    # --- descriptors -----------------------------------------------------------------

    def _watch(self, descriptor: int, handler: Callable[[], None]) -> None:
        assert self._epoll is not None
        self._epoll.register(descriptor, select.EPOLLIN)
        self._handlers[descriptor] = handler

    def _silence(self) -> None:
        assert self._bell is not None
        os.eventfd_read(self._bell)

    def _take_ways(self) -> None:
        assert self._finder is not None
        for key, is_reachable, text in self._finder.poll():
            queue_pair = self._resolving.pop(key, None)
            if queue_pair is not None:
                queue_pair.resolved(is_reachable, text)

    def _take_asynchronous(self) -> None:
        while True:
            number = self._verbs.take_event()
            if number is None:
                return
            self._handle_event(number)

    def _handle_event(self, number: int) -> None:
        """Act on an asynchronous event; which object it is about nobody tells."""
        self._collect_all()  # what came before the end is delivered before it
        if number in {EVENT_DEVICE_FATAL, EVENT_CQ_ERROR}:
            self.fail(f"{self.port.device} failed, or was taken away (event {number})")
        elif number in EVENTS_OF_PORTS:
            self._check_port()
        elif number in EVENTS_OF_QUEUE_PAIRS:
            for queue_pair in list(self._pairs.values()):
                if queue_pair.is_in_error():
                    text = f"the device ended the queue pair (event {number})"
                    queue_pair.go_down(Status.BROKEN_RULE, text)

    def _check_port(self) -> None:
        mine = self.port
        try:
            now = read_port(mine.device, mine.port, mine.gid_index)
        except FabricError:
            return  # no descriptor to look with; what is wrong shows later
        if now is None or now.gid != mine.gid:
            self.fail(f"{mine.device} has no longer the GID {mine.address}")
        elif now.problem:
            self.fail(f"GID {mine.address} of {mine.device} {now.problem}")

    def blame_port(self) -> str:
        """Tell what the port has, if anything: its event may come after its effects.

        What the others have received is delivered before the device fails.
        """
        mine = self.port
        try:
            now = read_port(mine.device, mine.port, mine.gid_index)
        except FabricError:
            return self._suspicion
        if now is not None and now.problem:
            self._suspicion = f"GID {mine.address} of {mine.device} {now.problem}"
        return self._suspicion

    def fail(self, text: str) -> None:
        """The device, its port or its GID is gone: nothing on it goes on.

        Args:
            text: What happened.
        """
        if self.problem:
            return
        self.problem = text
        _log.warning("RDMA port %s: %s", self.port.name, text)
        for queue_pair in list(self._pairs.values()):
            queue_pair.go_down(Status.PEER_GONE, text)
        # Those of a device that was taken away stay readable, and have nothing to say.
        for fd in (self._verbs.event_fd, *(each.handle.fd for each in self._queues)):
            if self._epoll is not None and self._handlers.pop(fd, None) is not None:
                self._epoll.unregister(fd)
        self._ring()  # its owner has to see, also when no queue pair tells of it

    # --- the end ---------------------------------------------------------------------

    def close(self) -> None:
        """Close every domain and the device. Idempotent."""
        if not self._open:
            return
        self._open = False
        for domain in list(self.domains):
            domain.close()
        if self.forked:
            return
        try:
            self._await_closing()
        finally:  # Ctrl-C spares the wait
            self._end()

    def _end(self) -> None:
        self._end_closing()
        for bundle in self._bundles:
            bundle.close()
        self._bundles.clear()
        self._ready.clear()
        self.dirty.clear()
        self._armed = False
        self._close_descriptors()
        closes = [queue.handle.close for queue in self._queues]
        for close in (*closes, self._verbs.close):
            try:
                close()
            except VerbsError as exc:
                _log.debug("%s: %s", self, exc)
        self._queues.clear()

    def _close_descriptors(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
        if self._bell is not None:
            os.close(self._bell)
            self._bell = None
        if self._closing is not None:
            self._closing.close()
        if self._finder is not None:
            self._finder.close()

    def _await_closing(self) -> None:
        """Let peers have what was posted before the close, while that has time.

        A program may end when it has written all: over TCP the kernel would go on.
        """
        closing, left = self._closing, self._close_wait + LINGER_MAX
        if closing is None:
            return
        until = time.monotonic() + left
        while closing.is_sending() and not self.problem and left > 0:
            # Arming looks as well, and may have been told of the last one's end.
            if self.arm() and closing.is_sending() and self._epoll is not None:
                self._epoll.poll(left)
            self._ready.clear()
            left = until - time.monotonic()

    def _end_closing(self) -> None:
        closing = self._closing
        if closing is None:
            return
        for queue_pair in closing.all():
            queue_pair.give_up()  # all of them first: then the kernel waits once
        for queue_pair in closing.all():
            self.forget_closing(queue_pair)

    def after_fork_in_child(self) -> None:
        """Let go of what belongs to the parent.

        A child that kept the descriptors would keep the parent's queue pairs alive.
        """
        if self.forked:
            return  # a grandchild: those numbers are of others by now
        self.forked = True
        for queue_pair in self._pairs.values():
            queue_pair.after_fork_in_child()
        self._ready.clear()
        self.dirty.clear()
        if not self._open:
            return
        self._verbs.abandon()
        self._close_descriptors()


def _after_fork_in_child() -> None:
    for device in list(_devices):
        device.after_fork_in_child()


def _close_all() -> None:
    """Close in order what a program left open, while the library is still whole."""
    for device in list(_devices):
        device.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_close_all)
