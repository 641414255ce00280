"""A strict imitation of a verbs library: RC queue pairs between devices in memory.

It keeps the rules that real devices keep, and is harsh where they are merely vague: a
request's bytes are read when it is carried out, not when it was posted; the place of an
unsignalled request is free only when a later completion was taken; completions of a
destroyed queue pair stay in the completion queue; an overflow fails the test; what is
destroyed in the wrong order is EBUSY. What only time does on a wire (retries) happens
by the number of attempts.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.config import Config
from pysmc.fabric import verbs_api as api
from pysmc.fabric.base import UpdateCodec
from pysmc.fabric.verbs import VerbsDevice
from pysmc.fabric.verbs_api import Limits, Path, SendRequest, VerbsError
from pysmc.fabric.verbs_ports import ROCE_V2, RdmaPort
from pysmc.testing.conformance_bench import Bench
from smcproto import cdc, llc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pysmc.fabric.verbs_api import CompletionQueue, ReceiveBlocks

__all__ = ["FakeFinder", "FakeQueuePair", "FakeVerbs", "Roce", "World", "make_port"]

ATTEMPTS = 300
LIMITS = Limits(16384, 32767)
RESET, INIT, RTR, RTS, ERROR = 0, 1, 2, 3, 6
GARBAGE = 0x5A


class Done(NamedTuple):
    """A work completion."""

    wr_id: int
    status: int
    opcode: int
    byte_len: int
    qp_num: int
    vendor_err: int = 0


def make_port(number: int) -> RdmaPort:
    """Make the port of host 10.0.0.<number>."""
    gid = bytes(10) + b"\xff\xff\x0a\x00\x00" + bytes([number])
    mac = b"\x02\0\0\0\0" + bytes([number])
    name = f"fake{number}"
    return RdmaPort(name, 1, 1, gid, ROCE_V2, f"v{number}", mac, "ACTIVE", 3)


class World:
    """All devices, and what is on its way between them."""

    def __init__(self) -> None:
        self.devices: dict[bytes, FakeVerbs] = {}
        self.pairs: dict[int, FakeQueuePair] = {}
        self.numbers = iter(range(0x11, 1 << 24))
        self.keys = iter(range(0x100, 1 << 31, 0x101))
        self.is_held = False
        """Nothing moves."""
        self.posts: Counter[str] = Counter()
        """Posts and requests so far."""

    def device(self, number: int, limits: Limits = LIMITS) -> FakeVerbs:
        """Open the device of `make_port`."""
        verbs = FakeVerbs(self, make_port(number).gid, limits)
        self.devices[verbs.gid] = verbs
        return verbs

    def run(self) -> None:
        """Carry out what can be."""
        for pair in [] if self.is_held else list(self.pairs.values()):
            pair.run()


class FakeVerbs:
    """An open device."""

    def __init__(self, world: World, gid: bytes, limits: Limits) -> None:
        self.world = world
        self.gid = gid
        self.limits = limits
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.events: deque[int] = deque()
        self.open: Counter[str] = Counter()
        """What is not destroyed yet, by kind."""
        self.made: Counter[str] = Counter()
        """What was ever made, by kind."""
        self.failures: dict[str, deque[int]] = {}
        """Errnos of the next calls of an operation; 0 lets one succeed."""
        self.is_closed = False
        self.queue_fds: set[int] = set()
        self.memory: dict[int, FakeRegistration] = {}

    def call(self, operation: str) -> None:
        """Fail if that was asked for."""
        assert not self.is_closed, f"{operation} on a closed device"
        planned = self.failures.get(operation)
        if planned:
            number = planned.popleft()
            if number:
                raise VerbsError(number, operation.replace("_", " "))

    def fail(self, operation: str, *numbers: int) -> None:
        """Have the next calls of an operation fail."""
        self.failures.setdefault(operation, deque()).extend(numbers)

    def count(self, kind: str) -> None:
        """Count something that was made."""
        self.open[kind] += 1
        self.made[kind] += 1

    def raise_event(self, number: int) -> None:
        """Let an asynchronous event happen."""
        self.events.append(number)
        os.eventfd_write(self.event_fd, 1)

    def take_event(self) -> int | None:
        """Take one."""
        self.call("take_event")
        if not self.events:
            return None
        if len(self.events) == 1:
            os.eventfd_read(self.event_fd)
        return self.events.popleft()

    def create_completion_queue(self, entries: int) -> FakeQueue:
        """Create a completion queue."""
        self.call("create_completion_queue")
        if entries > self.limits.completion_queue_entries:
            raise VerbsError(errno.EINVAL, "create a completion queue")
        return FakeQueue(self, entries)

    def create_domain(self) -> FakeDomain:
        """Allocate a protection domain."""
        self.call("create_domain")
        return FakeDomain(self)

    def close(self) -> None:
        """Close it."""
        self.call("close")
        left = +self.open
        assert not left, f"the device is closed before {dict(left)}"
        self.is_closed = True
        del self.world.devices[self.gid]
        os.close(self.event_fd)

    def abandon(self) -> None:
        """Be in a forked child."""
        for fd in (self.event_fd, *self.queue_fds):
            os.close(fd)


class FakeQueue:
    """A completion queue with its channel."""

    def __init__(self, verbs: FakeVerbs, entries: int) -> None:
        self.verbs = verbs
        self.entries = entries
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE
        self.fd = os.eventfd(0, flags)
        self.waiting: deque[tuple[FakeQueuePair, Done]] = deque()
        self.is_armed = False
        self.pairs = 0
        verbs.queue_fds.add(self.fd)
        verbs.count("queue")

    def push(self, pair: FakeQueuePair, done: Done) -> None:
        """Add a completion."""
        self.waiting.append((pair, done))
        assert len(self.waiting) <= self.entries, "a completion queue overflowed"
        if self.is_armed:
            self.is_armed = False
            os.eventfd_write(self.fd, 1)

    def poll(self, count: int) -> Sequence[Done]:
        """Take completions."""
        self.verbs.call("poll")
        self.verbs.world.run()
        found: list[Done] = []
        while self.waiting and len(found) < count:
            pair, done = self.waiting.popleft()
            if not done.wr_id & api.RECEIVE_BIT:
                pair.retire(done.wr_id)
            found.append(done)
        return found

    def request_notify(self) -> None:
        """Arm it."""
        self.verbs.call("request_notify")
        self.is_armed = True

    def take_event(self) -> bool:
        """Take a notification."""
        self.verbs.call("take_notification")
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Destroy it."""
        self.verbs.call("close_queue")
        if self.pairs:
            raise VerbsError(errno.EBUSY, "destroy a completion queue")
        os.close(self.fd)
        self.verbs.queue_fds.remove(self.fd)
        self.verbs.open["queue"] -= 1


class FakeRegistration:
    """Registered memory."""

    def __init__(
        self, domain: FakeDomain, address: int, length: int, access: int
    ) -> None:
        self.domain = domain
        self.address = address
        self.length = length
        self.access = access
        self.lkey = self.rkey = next(domain.verbs.world.keys)
        domain.verbs.memory[self.rkey] = self
        domain.verbs.count("memory")
        domain.children += 1

    def has(self, address: int, length: int) -> bool:
        """Whether something lies in it."""
        start = address - self.address
        return start >= 0 and start + length <= self.length

    def close(self) -> None:
        """Deregister it."""
        verbs = self.domain.verbs
        verbs.call("deregister")
        del verbs.memory[self.rkey]
        verbs.open["memory"] -= 1
        self.domain.children -= 1


class FakeBlocks:
    """Receives, block by block."""

    def __init__(self, blocks: list[list[tuple[int, int, int]]], lkey: int) -> None:
        self.blocks = blocks
        self.lkey = lkey

    def close(self) -> None:
        """Free them."""
        self.blocks = []


class FakeDomain:
    """A protection domain."""

    def __init__(self, verbs: FakeVerbs) -> None:
        self.verbs = verbs
        self.children = 0
        verbs.count("domain")

    def register(self, address: int, length: int, access: int) -> FakeRegistration:
        """Register memory."""
        self.verbs.call("register")
        return FakeRegistration(self, address, length, access)

    def receive_blocks(
        self, address: int, slot_bytes: int, slots: int, block: int, lkey: int
    ) -> FakeBlocks:
        """Make receives."""
        receives = [
            (slot | api.RECEIVE_BIT, address + slot * slot_bytes, slot_bytes)
            for slot in range(slots)
        ]
        blocks = [receives[at : at + block] for at in range(0, slots, block)]
        return FakeBlocks(blocks, lkey)

    def create_queue_pair(
        self, queue: CompletionQueue, sends: int, receives: int, inline_bytes: int
    ) -> FakeQueuePair:
        """Create a queue pair."""
        assert isinstance(queue, FakeQueue)
        self.verbs.call("create_queue_pair")
        return FakeQueuePair(self, queue, (sends, receives, inline_bytes))

    def close(self) -> None:
        """Free it."""
        self.verbs.call("close_domain")
        if self.children:
            raise VerbsError(errno.EBUSY, "free a protection domain")
        self.verbs.open["domain"] -= 1


@dataclass(eq=False)
class Posted:
    """A request in a send queue."""

    request: SendRequest
    data: bytes | None
    """Of an inline request."""
    psn: int
    attempts: int = 0
    was_taken: bool = field(default=False)
    """By a peer that acknowledges to somebody else."""


class FakeQueuePair:
    """A reliable connected queue pair."""

    def __init__(
        self, domain: FakeDomain, queue: FakeQueue, sizes: tuple[int, int, int]
    ) -> None:
        self.domain = domain
        self.verbs = domain.verbs
        self.world = domain.verbs.world
        self.queue = queue
        self.sends, self.receives, self.inline_bytes = sizes
        self.number = next(self.world.numbers)
        self.now = RESET
        self.path: Path | None = None
        self.remote_number = 0
        self.expected_psn = self.next_psn = 0
        self.posted: deque[Posted] = deque()
        self.unretired: deque[int] = deque()
        self.receiving: deque[tuple[int, int, int]] = deque()
        self.is_cut = False
        """Nothing of ours reaches anybody, and nobody reaches us."""
        self.vendor_error = 0
        queue.pairs += 1
        domain.children += 1
        domain.verbs.count("pair")
        self.world.pairs[self.number] = self

    # States

    def to_init(self, port: int) -> None:
        """Go to INIT."""
        self.verbs.call("to_init")
        assert (self.now, port) == (RESET, 1)
        self.now = INIT

    def to_rtr(self, path: Path, remote_number: int, remote_psn: int) -> None:
        """Go to RTR."""
        self.verbs.call("to_rtr")
        assert self.now == INIT
        assert self.receiving, "the peer may send, and there are no receives"
        assert path.remote_gid in self.world.devices, "this would have blocked"
        self.path, self.remote_number = path, remote_number
        self.expected_psn = remote_psn
        self.now = RTR

    def to_rts(self, psn: int) -> None:
        """Go to RTS."""
        self.verbs.call("to_rts")
        assert self.now == RTR
        self.next_psn = psn
        self.now = RTS

    def state(self) -> int:
        """Tell the state."""
        self.verbs.call("state")
        return self.now

    def to_error(self) -> None:
        """Go to ERROR: everything that was posted is flushed."""
        self.now = ERROR
        while self.posted:
            self._complete(self.posted.popleft().request.wr_id, 5)
        while self.receiving:
            self._complete(self.receiving.popleft()[0], 5)

    def _complete(
        self, wr_id: int, status: int = 0, opcode: int = 0xBAD, size: int = GARBAGE
    ) -> None:
        vendor = self.vendor_error if status else 0
        done = Done(wr_id, status, opcode, size, self.number, vendor)
        self.queue.push(self, done)

    # Posting

    def post_send(self, requests: Sequence[api.RequestTuple]) -> None:
        """Post sends."""
        self.verbs.call("post_send")
        self.world.posts.update({"posts": 1, "requests": len(requests)})
        assert 1 <= len(requests) <= api.SEND_CHAIN
        assert self.now in {RTS, ERROR}, f"a send in state {self.now}"
        named = [SendRequest(*request) for request in requests]
        named[-1] = named[-1]._replace(flags=named[-1].flags | api.SEND_SIGNALED)
        for request in named:
            if len(self.unretired) == self.sends:
                raise VerbsError(errno.ENOMEM, "post sends")
            self.unretired.append(request.wr_id)
            data = None
            if request.flags & api.SEND_INLINE:
                assert request.length <= self.inline_bytes
                data = ctypes.string_at(request.local_address, request.length)
            self.posted.append(Posted(request, data, self.next_psn))
            self.next_psn = self.next_psn + 1 & 0xFFFFFF
        if self.now == ERROR:
            self.to_error()

    def post_receives(self, blocks: ReceiveBlocks, index: int) -> None:
        """Post a block of receives."""
        assert isinstance(blocks, FakeBlocks)
        self.verbs.call("post_receives")
        assert self.now != RESET
        self.receiving.extend(blocks.blocks[index])
        assert len(self.receiving) <= self.receives, "a receive queue overflowed"
        if self.now == ERROR:
            self.to_error()

    def retire(self, wr_id: int) -> None:
        """A completion was taken: the places of all up to it are free."""
        while self.unretired and self.unretired[0] <= wr_id:
            self.unretired.popleft()

    # Moving

    def run(self) -> None:
        """Carry out what was posted, as far as the peer lets us."""
        while self.posted and self.now == RTS:
            posted = self.posted[0]
            if not self._reaches(posted):
                posted.attempts += 1
                if posted.attempts >= ATTEMPTS:
                    self._fail(12)
                return
            self.posted.popleft()
            if posted.request.flags & api.SEND_SIGNALED:
                self._complete(posted.request.wr_id, 0, posted.request.opcode, 0)

    def _fail(self, status: int) -> None:
        self._complete(self.posted.popleft().request.wr_id, status)
        self.to_error()

    def _reaches(self, posted: Posted) -> bool:
        """Try once; True when it was acknowledged."""
        assert self.path is not None
        peer = self.world.pairs.get(self.remote_number)
        if peer is None or peer.verbs.gid != self.path.remote_gid:
            return False
        if peer.now not in {RTR, RTS} or self.is_cut or peer.is_cut:
            return False
        assert peer.path is not None
        if peer.path.remote_gid != self.verbs.gid:
            return False
        if not posted.was_taken:
            if posted.psn != peer.expected_psn:
                return False
            if not self._carry_out(posted, peer):
                return False
            peer.expected_psn = peer.expected_psn + 1 & 0xFFFFFF
            posted.was_taken = True
        return peer.remote_number == self.number

    def _carry_out(self, posted: Posted, peer: FakeQueuePair) -> bool:
        request = posted.request
        data = posted.data
        if data is None:
            data = self._gather(request)
        if request.opcode == api.WR_RDMA_WRITE:
            return self._write(request, data, peer)
        if not peer.receiving:
            posted.attempts = 0  # the peer is there, and says: not now
            return False
        wr_id, address, size = peer.receiving.popleft()
        if len(data) > size:
            peer._complete(wr_id, 1)
            peer.to_error()
            self._fail(9)
            return False
        ctypes.memmove(address, data, len(data))
        peer._complete(wr_id, 0, api.WC_RECEIVE, len(data))
        return True

    def _gather(self, request: SendRequest) -> bytes:
        if not request.length:
            return b""
        memory = self.verbs.memory[request.lkey]
        assert memory.domain is self.domain, "memory of another domain"
        assert memory.has(request.local_address, request.length)
        return ctypes.string_at(request.local_address, request.length)

    def _write(self, request: SendRequest, data: bytes, peer: FakeQueuePair) -> bool:
        if not data:
            return True  # names no memory
        memory = peer.verbs.memory.get(request.rkey)
        allowed = (
            memory is not None
            and memory.domain is peer.domain
            and memory.access & api.ACCESS_REMOTE_WRITE
            and memory.has(request.remote_address, len(data))
        )
        if not allowed:
            peer.to_error()
            self._fail(10)
            return False
        ctypes.memmove(request.remote_address, data, len(data))
        return True

    def close(self) -> None:
        """Destroy it."""
        self.verbs.call("close_pair")
        is_waited_for = self.is_cut and self.posted
        assert not is_waited_for, "this would have waited for its packets"
        self.now = RESET
        del self.world.pairs[self.number]
        self.queue.pairs -= 1
        self.domain.children -= 1
        self.verbs.open["pair"] -= 1


class FakeFinder:
    """Finds the way to every device of a world at once, and to nobody else."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_held = False
        """No answers for now."""
        self.searches: dict[int, bytes] = {}
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.is_open = True

    def fileno(self) -> int:
        """Readable when there is an answer."""
        return self._bell

    def begin(self, key: int, gid: bytes, port: RdmaPort) -> None:
        """Begin to look."""
        assert port.gid in self.world.devices
        assert key not in self.searches
        self.searches[key] = gid
        os.eventfd_write(self._bell, 1)

    def cancel(self, key: int) -> None:
        """Forget one."""
        self.searches.pop(key, None)

    def poll(self) -> list[tuple[int, bool, str]]:
        """Tell what was found."""
        if self.is_held:
            return []
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            assert not self.searches
        found, self.searches = self.searches, {}
        return [
            (key, gid in self.world.devices, "nobody has this GID")
            for key, gid in found.items()
        ]

    def close(self) -> None:
        """Forget everything."""
        if self.is_open:
            self.is_open = False
            os.close(self._bell)


class Roce:
    """Two hosts of one world: their libraries, finders and devices, and a bench."""

    def __init__(self, limits: Limits = LIMITS, **changes: Any) -> None:
        self.config = Config(**changes)
        self.world = World()
        self.libraries = [self.world.device(number, limits) for number in (1, 2)]
        self.finders = [FakeFinder(self.world) for _ in self.libraries]
        self.devices = [self._open(host) for host in (0, 1)]
        self.bench = Bench(self.devices[0], self.devices[1], self.world.run)

    def _open(self, host: int) -> VerbsDevice:
        codec = UpdateCodec(
            cdc.pack, cdc.unpack, lambda data: data[:1] == b"\xfe", llc.is_question
        )
        return VerbsDevice(
            make_port(host + 1),
            codec=codec,
            config=self.config,
            verbs=self.libraries[host],
            finder=self.finders[host],
        )

    def _give_up(self) -> None:
        """Close everything, and try what nobody answers as often as it takes.

        A device that is closed waits for that, and here no time goes by.
        """
        for device in self.devices:
            for domain in list(device.domains):
                domain.close()
        for _ in range(2 * ATTEMPTS):
            for device, verbs in zip(self.devices, self.libraries, strict=True):
                closing = device._closing
                if closing and closing.is_sending() and not verbs.is_closed:
                    device.poll()

    def library_pair(self, number: int) -> FakeQueuePair:
        """Find what the library has for a queue pair."""
        return self.world.pairs[number]

    def close(self) -> None:
        """Close both devices, and see that nothing is left."""
        self._give_up()
        for device in self.devices:
            device.close()
        for verbs, finder, device in zip(
            self.libraries, self.finders, self.devices, strict=True
        ):
            assert verbs.is_closed
            assert not finder.is_open
            assert not device.count.bytes
