"""The shared-memory fabric: two processes of one host, no privilege and no hardware.

A software RDMA device. Decides what a device, its protection domains and its regions
are; how a link comes up is in `pysmc.fabric.shm_link`, who may call in
`pysmc.fabric.shm_endpoint`, which words are shared in `pysmc.fabric.shm_ring`, and
which memory may be mapped in `pysmc.fabric.shm_arena`.

An RDMA write is a slice copy into the peer's arena, an update a mailbox, a SEND a slot
of a ring, a doorbell a message that is sent only when the peer said that it sleeps. One
device belongs to one thread (one event loop).

Source: RFC 7609 section 2.1 for what an RNIC would do; kernel counterpart: smc_ib.c,
and smc_loopback.c for the idea of a device without hardware.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import select
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from pysmc.errors import (
    FabricError,
    FabricUnavailable,
    ForkedError,
    LocalProtocolError,
)
from pysmc.fabric.base import (
    Completion,
    Device,
    MemoryRegion,
    ProtectionDomain,
    QueuePair,
    Status,
)
from pysmc.fabric.shm_arena import (
    ARENA_BYTES,
    ARENA_BYTES_MAX,
    ARENAS_MAX,
    REGION_BYTES_MIN,
    Arena,
    RegionMap,
    allocate,
    empty,
    is_shortage,
    no_memory,
    populate,
)
from pysmc.fabric.shm_endpoint import Endpoint
from pysmc.fabric.shm_link import ShmQueuePair
from pysmc.fabric.shm_ring import (
    SLEEPING,
    SLOTS,
    WORDS_NEED_SYSCALL,
    RuleBroken,
    fence,
    pack_descriptor,
)

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

__all__ = ["ShmDevice", "ShmDomain", "ShmRegion", "host_eid"]

_log = logging.getLogger(__name__)

_GID = bytes(10) + b"\xff\xff\x7f\x00\x00\x01"  # ::ffff:127.0.0.1
_MTU_CODE_4096 = 5
_POLLS_PER_LOOK = 64
"""Polls without a look at sockets: they tell of callers and deaths, not of data."""
_LOOK_EVERY = 0.001
"""Longest time in seconds between two such looks while polling."""
_EVENTS_AT_ONCE = 64
_ALL_SLOTS = tuple(range(SLOTS))
"""One object for each number, however many domains there are."""
_ZEROS = bytes(64 * 1024)
_POPULATED_AT_ONCE = 1 << 20

_devices: weakref.WeakSet[ShmDevice] = weakref.WeakSet()


def host_eid() -> str:
    """Make the EID that two processes share when shm can connect them.

    Abstract Unix names live in the network namespace, memory in the booted kernel.
    """
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    namespace = os.stat("/proc/self/ns/net")
    text = f"{boot_id} {namespace.st_dev} {namespace.st_ino}"
    return "PYSMC-SHM-" + hashlib.sha256(text.encode()).hexdigest()[:20].upper()


class ShmRegion(MemoryRegion):
    """A piece of an arena, and its mailbox in each link of the domain."""

    def __init__(
        self, domain: ShmDomain, slot: int, rkey: int, place: tuple[int, int], size: int
    ) -> None:
        number, offset = place
        self.length = size
        self.virtual_address = number + 1 << 32 | offset
        self.memory: Any = domain.arenas[number].memory
        self.offset = offset
        whole = memoryview(self.memory)
        self.view = whole[offset : offset + size]
        whole.release()
        self.slot = slot
        self.rkey = rkey
        self.place = place
        self._domain = domain
        self._open = True

    def rkey_on(self, queue_pair: QueuePair) -> int:
        """Tell the rkey; here it is the same on every link of the domain."""
        self._domain.device.refuse_if_forked()
        del queue_pair
        return self.rkey

    @property
    def descriptor(self) -> int:
        """What the peer needs to find it, in one word."""
        number, offset = self.place
        return pack_descriptor(self.rkey, number, offset, self.length)

    def clear(self, count: int | None = None) -> None:
        """Fill with zeros and forget updates; see `MemoryRegion.clear`."""
        self._domain.device.refuse_if_forked()
        end = self.length if count is None else min(count, self.length)
        _fill_with_zeros(self.memory, self.offset, self.offset + end)
        for queue_pair in self._domain.queue_pairs:
            queue_pair.inbox.clear(self.slot)

    def close(self) -> None:
        """Deregister. Idempotent; see `MemoryRegion.close`."""
        if self._open:
            self._open = False
            self.view.release()
            self._domain.give_back(self)


class ShmDomain(ProtectionDomain):
    """The arenas, regions and queue pairs of one link group."""

    def __init__(self, device: ShmDevice) -> None:
        self.device = device
        self.arenas: list[Arena] = []
        self.queue_pairs: list[ShmQueuePair] = []
        self._regions: dict[int, ShmRegion] = {}
        self._slots = deque(_ALL_SLOTS)  # in turn: a stale rkey stays stale for long
        self._map = RegionMap()
        self._open = True

    def create_queue_pair(self) -> ShmQueuePair:
        """Create a queue pair; see `ProtectionDomain.create_queue_pair`."""
        self._check_open()
        queue_pair = ShmQueuePair(self, self.device.new_number())
        self.queue_pairs.append(queue_pair)
        self.device.queue_pairs[queue_pair.number] = queue_pair
        for region in self._regions.values():
            queue_pair.inbox.describe(region.slot, region.descriptor)
        return queue_pair

    def register(self, length: int) -> ShmRegion:
        """Get memory; see `ProtectionDomain.register`."""
        self._check_open()
        if not REGION_BYTES_MIN <= length <= ARENA_BYTES_MAX or length & (length - 1):
            text = f"a region of {length} bytes; 16 KiB to 512 MiB, a power of two"
            raise LocalProtocolError(text)
        if not self._slots:
            text = f"a domain has at most {SLOTS} regions"
            raise no_memory(text, "register memory")
        place = self._map.take(length)
        is_fresh = place is None
        if place is None:
            self._add_arena(max(length, ARENA_BYTES))
            place = self._map.take(length)
            assert place is not None
        if not is_fresh:
            self._refresh(place, length)
        slot = self._slots.popleft()
        rkey = self.device.next_generation() << 16 | slot
        region = ShmRegion(self, slot, rkey, place, length)
        self._regions[slot] = region
        populate(region.memory, region.offset, min(length, _POPULATED_AT_ONCE))
        for queue_pair in self.queue_pairs:
            queue_pair.inbox.describe(slot, region.descriptor)
        return region

    def _refresh(self, place: tuple[int, int], length: int) -> None:
        """Make a place of an arena that was in use new: pages of zeros."""
        number, offset = place
        arena = self.arenas[number]
        try:
            # A peer may have written there after the pages were given back.
            if not empty(arena.memory, offset, length):
                _fill_with_zeros(arena.memory, offset, offset + length)
            allocate(arena.descriptor, offset, length)
        except OSError as exc:
            self._map.give_back(place, length)
            raise no_memory(exc, "register memory") from exc

    def _add_arena(self, length: int) -> None:
        operation = "register memory"
        if len(self.arenas) >= ARENAS_MAX:
            text = f"a domain has at most {ARENAS_MAX} arenas"
            raise no_memory(text, operation)
        arena = Arena(length)
        is_told = False
        for queue_pair in self.queue_pairs:
            try:
                is_told |= queue_pair.send_arena(arena)
            except OSError as exc:
                if not is_told and is_shortage(exc):
                    arena.close()
                    raise no_memory(exc, operation) from exc
                # A peer that is gone, or that does not read what we tell it; or one
                # that must do without what another peer has already.
                status = Status.NO_MEMORY if is_shortage(exc) else Status.PEER_GONE
                if exc.errno == errno.EAGAIN:
                    status = Status.TIMED_OUT
                queue_pair.fail(status, f"the peer could not be sent an arena: {exc}")
        self.arenas.append(arena)
        self._map.add_arena(length)

    def give_back(self, region: ShmRegion) -> None:
        """Take a region's place and slot back; only its own close calls this."""
        del self._regions[region.slot]
        if self.device.forked:
            return
        for queue_pair in self.queue_pairs:
            queue_pair.inbox.describe(region.slot, 0)
        self._slots.append(region.slot)
        (_, offset), length = self._map.give_back(region.place, region.length)
        if self._open:  # else the whole arena goes
            empty(region.memory, offset, length)

    def forget_queue_pair(self, queue_pair: ShmQueuePair) -> None:
        """Take a queue pair off the lists; only its own close calls this."""
        self.queue_pairs.remove(queue_pair)
        self.device.forget_number(queue_pair.number)

    def _check_open(self) -> None:
        self.device.refuse_if_forked()
        if not self._open:
            text = "the protection domain is closed"
            raise LocalProtocolError(text)

    def close(self) -> None:
        """Close everything of this domain. Idempotent; see `ProtectionDomain.close`."""
        if not self._open:
            return
        self._open = False
        for queue_pair in list(self.queue_pairs):
            queue_pair.close()
        for region in list(self._regions.values()):
            region.close()
        in_use = [arena for arena in self.arenas if not arena.close()]
        if in_use:
            _log.warning(
                "%d of %d arenas stay mapped until the last view of them is released",
                len(in_use),
                len(self.arenas),
            )
        self.arenas.clear()
        self.device.domains.remove(self)


class ShmDevice(Device):
    """The shm fabric of one event loop."""

    fabric = "shm"

    def __init__(
        self,
        peer_id: bytes,
        *,
        allowed_uids: tuple[int, ...] = (),
        endpoint: bool = True,
    ) -> None:
        """Open the device; the endpoint opens with the first domain.

        Args:
            peer_id: 8 bytes, unique for this process and loop.
            allowed_uids: Users beside our own with whom to share memory.
            endpoint: False for a device whose queue pairs are never passive.

        Raises:
            FabricUnavailable: This system lacks what the fabric needs.
            FabricError: Status ``NO_MEMORY``: no descriptors.
        """
        if len(peer_id) != 8:
            text = f"a peer ID of {len(peer_id)} bytes; it has 8"
            raise ValueError(text)
        self.peer_id = peer_id
        self.allowed_uids = allowed_uids
        self.gid = _GID
        self.mac = peer_id[2:]
        self.mtu_code = _MTU_CODE_4096
        try:
            self.eid = host_eid()
        except OSError as exc:
            operation = "open the shm device"
            if is_shortage(exc):
                raise no_memory(exc, operation) from exc
            text = f"/proc does not tell where we are: {exc}"
            raise FabricUnavailable(operation, "UNAVAILABLE", text) from exc
        self.forked = False
        self.domains: list[ShmDomain] = []
        self.queue_pairs: dict[int, ShmQueuePair] = {}
        self._wants_endpoint = endpoint
        self._endpoint: Endpoint | None = None
        self._generation = secrets.randbelow(0xFFFF)
        self._handlers: dict[int, Callable[[], None]] = {}
        self._ready: list[Completion] = []
        self._ending: list[ShmQueuePair] = []
        self._takes: list[tuple[Callable[[list[Completion]], None], ShmQueuePair]] = []
        self._waiting: list[Callable[[], bool]] = []
        self._sleep_words: list[memoryview] = []
        self._sleep = 0
        self._armed = False
        self._polls_left = 0
        self._look_by = 0.0
        self._open = True
        try:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as exc:
            raise no_memory(exc, "open the shm device") from exc
        try:
            self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        except OSError as exc:
            os.close(self._bell)
            raise no_memory(exc, "open the shm device") from exc
        self.watch(self._bell, select.EPOLLIN | select.EPOLLET, _nothing)
        _devices.add(self)

    # --- what its domains and links need --------------------------------------------

    def refuse_if_forked(self) -> None:
        """Refuse in a child what belongs to the parent.

        Raises:
            ForkedError: We are a forked child.
        """
        if self.forked:
            text = "this shm device was opened before fork(); open one in the child"
            raise ForkedError(text)

    def watch(self, descriptor: int, events: int, handler: Callable[[], None]) -> None:
        """Have a function called by `poll` when a descriptor is ready.

        Raises:
            FabricError: Status ``NO_MEMORY``: the kernel watches no more for this user.
        """
        if descriptor in self._handlers:
            self._epoll.modify(descriptor, events)
        else:
            try:
                self._epoll.register(descriptor, events)
            except OSError as exc:
                raise no_memory(exc, "watch a descriptor") from exc
        self._handlers[descriptor] = handler

    def unwatch(self, descriptor: int) -> None:
        """End `watch`; must come before the descriptor is closed. Idempotent."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def new_number(self) -> int:
        """Choose a number for a queue pair: random, so that no stranger knows it."""
        while True:
            number = secrets.randbelow(0xFFFFFF) + 1
            if number not in self.queue_pairs:
                return number

    def forget_number(self, number: int) -> None:
        """Refuse callers who still want a queue pair that was closed."""
        self.queue_pairs.pop(number, None)
        if self._endpoint is not None and not self.forked:
            self._endpoint.drop_callers_of(number)
            self._endpoint.resume()

    def next_generation(self) -> int:
        """Number registrations, so that an rkey is not used again for long; 16 bits."""
        self._generation = self._generation % 0xFFFF + 1
        return self._generation

    def introduce_callers(self, queue_pair: ShmQueuePair) -> None:
        """Let a passive queue pair have the caller that came before it waited."""
        if self._endpoint is not None:
            self._endpoint.introduce_to(queue_pair)

    def complete(self, completion: Completion) -> None:
        """Have `poll` return a completion."""
        self._ready.append(completion)
        self._wake()

    def _wake(self) -> None:
        if self._armed:
            os.eventfd_write(self._bell, 1)

    def add_link(self, queue_pair: ShmQueuePair) -> None:
        """Look at a link's words from now on."""
        inbox = queue_pair.inbox
        self._takes.append((inbox.take, queue_pair))
        self._waiting.append(inbox.waiting)
        self._sleep_words.append(inbox.words)
        if self._armed:
            # The peer may publish at once, and we sleep already.
            inbox.words[SLEEPING] = self._sleep

    def remove_link(self, queue_pair: ShmQueuePair) -> None:
        """Look at a link's words no more. Idempotent."""
        if queue_pair in self._ending:
            self._ending.remove(queue_pair)
        for index, (_, other) in enumerate(self._takes):
            if other is queue_pair:
                del self._takes[index]
                del self._waiting[index]
                del self._sleep_words[index]
                return

    def link_ends(self, queue_pair: ShmQueuePair) -> None:
        """Have the next poll end a link."""
        self._ending.append(queue_pair)
        self._wake()

    def _refuse_to_look(self) -> bool:
        self.refuse_if_forked()
        return False

    # --- the contract ---------------------------------------------------------------

    def create_domain(self) -> ShmDomain:
        """Create a domain, and with the first one the endpoint."""
        self.refuse_if_forked()
        if not self._open:
            text = "the shm device is closed"
            raise LocalProtocolError(text)
        if self._endpoint is None and self._wants_endpoint:
            try:
                self._endpoint = Endpoint(
                    self.peer_id,
                    self.allowed_uids,
                    self.queue_pairs.get,
                    self.watch,
                    self.unwatch,
                )
            except OSError as exc:
                operation = "open the shm endpoint"
                if is_shortage(exc):
                    raise no_memory(exc, operation) from exc
                name = errno.errorcode.get(exc.errno or 0, "errno unknown")
                text = f"peer ID {self.peer_id.hex()}: {exc.strerror}"
                raise FabricError(operation, name, text) from exc
        domain = ShmDomain(self)
        self.domains.append(domain)
        return domain

    def check_callable(self) -> None:
        """Ask the endpoint; see `Device.check_callable`."""
        if self._endpoint is not None and not self._endpoint.takes_callers():
            text = "descriptors are short, or too many of strangers wait to be closed"
            raise no_memory(text, "be called by the peer")

    def poll(self) -> list[Completion]:
        """Take what has completed; see `Device.poll`."""
        if self._armed:
            self.disarm()
        self._polls_left -= 1
        # By count while polls are cheap and many, by time in a loop that is busy: a
        # caller must not wait for dozens of long turns.
        if (
            self._polls_left < 0
            or WORDS_NEED_SYSCALL
            or time.monotonic() >= self._look_by
        ):
            self._look()
        completions = self._ready
        if completions:
            self._ready = []
        else:
            completions = []
        for take, queue_pair in self._takes:
            try:
                take(completions)
            except RuleBroken as exc:
                queue_pair.fail(Status.BROKEN_RULE, str(exc))
        if self._ending:
            for queue_pair in list(self._ending):
                queue_pair.inbox.take_rest(completions)
                completions.append(queue_pair.end())
        return completions

    def _look(self) -> None:
        """Look at the descriptors: doorbells, links' sockets, callers."""
        self.refuse_if_forked()
        self._polls_left = _POLLS_PER_LOOK
        self._look_by = time.monotonic() + _LOOK_EVERY
        if self._endpoint is not None:
            self._endpoint.resume()
        for descriptor, _ in self._epoll.poll(0, _EVENTS_AT_ONCE):
            handler = self._handlers.get(descriptor)
            if handler is not None:
                handler()

    def pending(self) -> bool:
        """Look without a system call; see `Device.pending`."""
        if self._ready or self._ending:
            return True
        # Elsewhere than on x86-64 too: this is a hint, and poll() makes its system call
        # before anything is read.
        for waiting in self._waiting:  # noqa: SIM110 - any() costs twice as much
            if waiting():
                return True
        return False

    def arm(self) -> bool:
        """Tell the peers that we sleep; see `Device.arm`."""
        self.refuse_if_forked()
        self._armed = True
        self._polls_left = 0  # whatever wakes us is to be looked at
        # Numbered, so that a peer rings once for each sleep and not for each message.
        self._sleep += 1
        for words in self._sleep_words:
            words[SLEEPING] = self._sleep
        fence()
        if WORDS_NEED_SYSCALL:
            self._look()
        if self._ready or self._ending or any(look() for look in self._waiting):
            self.disarm()
            return False
        return True

    def disarm(self) -> None:
        """Tell the peers that we are awake; see `Device.disarm`."""
        if self._armed:
            self.refuse_if_forked()
            self._armed = False
            for words in self._sleep_words:
                words[SLEEPING] = 0

    def fileno(self) -> int:
        """Tell the inner epoll's descriptor; see `Device.fileno`."""
        self.refuse_if_forked()
        return self._epoll.fileno()

    def close(self) -> None:
        """Close every domain and the device. Idempotent."""
        if not self._open:
            return
        self._open = False
        for domain in list(self.domains):
            domain.close()
        if self._endpoint is not None:
            if self.forked:
                self._endpoint.close_descriptors()
            else:
                self._endpoint.close()
        os.close(self._bell)
        self._epoll.close()
        self._handlers.clear()
        self._ready.clear()
        _devices.discard(self)

    def after_fork_in_child(self) -> None:
        """Refuse everything from now on, and let go of the parent's sockets.

        A child that kept them would hide the parent's death from its peers. The epoll
        is shared with the parent: nothing may be taken out of it here.
        """
        self.forked = True
        self._ready.clear()
        self._takes.clear()
        self._sleep_words.clear()
        # The quick paths look at these alone: so that they end at the refusal, too.
        self._waiting = [self._refuse_to_look]
        self._polls_left = 0
        self._armed = True
        for queue_pair in self.queue_pairs.values():
            queue_pair.after_fork_in_child()
        if self._endpoint is not None:
            self._endpoint.close_descriptors()


def _fill_with_zeros(memory: mmap.mmap, start: int, end: int) -> None:
    for at in range(start, end, len(_ZEROS)):
        stop = min(at + len(_ZEROS), end)
        memory[at:stop] = _ZEROS if stop - at == len(_ZEROS) else bytes(stop - at)


def _nothing() -> None:
    """Handle our own doorbell: that we woke is all it is for."""


def _after_fork_in_child() -> None:
    for device in list(_devices):
        device.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
