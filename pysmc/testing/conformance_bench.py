"""What the conformance checks work with: two devices, their ends, and a writer.

Decides how long to wait for something before a rule counts as broken: in rounds of
pumping and polling, never in seconds. Source: pysmc.fabric.base.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pysmc.fabric.base import (
    Completion,
    CompletionKind,
    Device,
    RemoteQueuePair,
    Status,
    Update,
)

if TYPE_CHECKING:
    from pysmc.fabric.base import MemoryRegion, ProtectionDomain, QueuePair

__all__ = [
    "KIB",
    "QUIET_ROUNDS",
    "ROUNDS",
    "Bench",
    "ConformanceFailure",
    "End",
    "MakePair",
    "Pump",
    "Side",
    "Writer",
    "content",
    "expect",
]

Pump = Callable[[], object]
MakePair = Callable[[], AbstractContextManager[tuple[Device, Device, Pump]]]

KIB = 1024
ROUNDS = 2000
"""Times to pump and poll before something counts as not happening."""
QUIET_ROUNDS = 200
"""Times to pump and poll before nothing counts as nothing; a device may look at some
of its sources only once in a while."""


class ConformanceFailure(AssertionError):
    """A device broke a rule of the contract."""


def expect(condition: object, rule: str) -> None:
    """Raise with the rule when it is broken."""
    if not condition:
        raise ConformanceFailure(rule)


@dataclass(eq=False)
class Side:
    """A device, and what it completed so far."""

    device: Device
    peer_id: bytes
    seen: list[Completion] = field(default_factory=list)

    def poll(self) -> None:
        """Take what completed."""
        while completions := self.device.poll():
            self.seen += completions

    def of(self, kind: CompletionKind, queue_pair: QueuePair) -> list[Completion]:
        """List what of one kind was seen on one queue pair."""
        return [
            item
            for item in self.seen
            if item.kind is kind and item.queue_pair is queue_pair
        ]

    def updates(self, queue_pair: QueuePair) -> list[Update]:
        """List the updates seen on one queue pair."""
        return [item.payload for item in self.of(CompletionKind.UPDATE, queue_pair)]


@dataclass(eq=False)
class End:
    """One end of a link."""

    side: Side
    domain: ProtectionDomain
    queue_pair: QueuePair

    def remote(self, psn: int) -> RemoteQueuePair:
        """Describe this end as a CLC message would."""
        device = self.side.device
        return RemoteQueuePair(
            peer_id=self.side.peer_id,
            gid=device.gid,
            mac=device.mac,
            number=self.queue_pair.number,
            psn=psn,
            mtu_code=device.mtu_code,
        )


class Bench:
    """Two devices and what the checks do with them again and again."""

    def __init__(self, device_a: Device, device_b: Device, pump: Pump) -> None:
        self.a = Side(device_a, _peer_id(device_a))
        self.b = Side(device_b, _peer_id(device_b))
        self.pump = pump
        self._psns = iter(range(1000, 1 << 24, 7))

    def move(self) -> None:
        """Let things move once, and take what completed on both sides."""
        self.pump()
        self.a.poll()
        self.b.poll()

    def settle(self) -> None:
        """Let things move until nothing more can be expected to happen."""
        for _ in range(QUIET_ROUNDS):
            self.move()

    def until(self, condition: Callable[[], object], rule: str) -> None:
        """Let things move until a condition holds."""
        for _ in range(ROUNDS):
            if condition():
                return
            self.move()
        raise ConformanceFailure(rule)

    def end(self, side: Side, domain: ProtectionDomain | None = None) -> End:
        """Make a queue pair, in a domain of its own unless one is given."""
        if domain is None:
            domain = side.device.create_domain()
        return End(side, domain, domain.create_queue_pair())

    def connect(self, active: End, passive: End, *, early: bool = False) -> None:
        """Connect two ends, and wait until both say that they are.

        Args:
            active: The end that calls.
            passive: The end that is called.
            early: The active end calls before the passive one waits.
        """
        psn_active, psn_passive = next(self._psns), next(self._psns)
        if early:
            remote = passive.remote(psn_passive)
            active.queue_pair.connect(remote, psn_active, passive=False)
            self.settle()
            rule = "who does not wait is not connected"
            expect(not active.queue_pair.is_up, rule)
        remote = active.remote(psn_active)
        passive.queue_pair.connect(remote, psn_passive, passive=True)
        if not early:
            remote = passive.remote(psn_passive)
            active.queue_pair.connect(remote, psn_active, passive=False)
        for end in (active, passive):
            self._await_connected(end)

    def _await_connected(self, end: End) -> None:
        queue_pair = end.queue_pair

        def connected() -> list[Completion]:
            return end.side.of(CompletionKind.CONNECTED, queue_pair)

        self.until(connected, "connect ends with a CONNECTED completion on both ends")
        status = connected()[0].status
        expect(status is Status.SUCCESS, f"CONNECTED says {status}, not SUCCESS")
        expect(queue_pair.is_up, "a queue pair is up after a successful CONNECTED")

    def await_newest(self, end: End, writer: Writer) -> None:
        """Wait until an end has seen what a writer published last."""

        def is_newest() -> bool:
            return end.side.updates(end.queue_pair)[-1:] == [writer.last]

        self.until(is_newest, "the newest update arrives, every bit of it")

    def await_one(self, end: End, kind: CompletionKind) -> Completion:
        """Wait until an end has seen a completion of a kind; tell the first."""
        rule = f"a completion of kind {kind.value} comes"
        self.until(lambda: end.side.of(kind, end.queue_pair), rule)
        return end.side.of(kind, end.queue_pair)[0]

    def link(self) -> tuple[End, End]:
        """Connect an end of A with one of B."""
        ends = self.end(self.a), self.end(self.b)
        self.connect(*ends)
        return ends


def _peer_id(device: Device) -> bytes:
    peer_id = getattr(device, "peer_id", None)
    if not isinstance(peer_id, bytes):
        # Where the peer ID is not the device's, the GID and MAC address it.
        return bytes(2) + device.mac
    return peer_id


@dataclass
class Writer:
    """Publishes on one region and counts what must complete."""

    end: End
    region: MemoryRegion
    region_queue_pair: QueuePair
    token: int = 1
    sequence: int = 0
    last: Update | None = None
    open_wr_ids: deque[int] = field(default_factory=deque)

    @property
    def rkey(self) -> int:
        """The rkey on the link that is written through."""
        return self.region.rkey_on(self.region_queue_pair)

    def write(self, at: int, data: bytes) -> None:
        """Write into the region."""
        address = self.region.virtual_address + at
        self.end.queue_pair.post_write(self.rkey, address, memoryview(data))

    def publish(self, producer: int = 0, consumer: int = 0, flags: int = 0) -> bool:
        """Publish the next update."""
        self.sequence = self.sequence + 1 & 0xFFFF
        self.last = Update(self.sequence, self.token, producer, consumer, flags)
        wr_id = self.sequence
        done = self.end.queue_pair.publish(self.rkey, wr_id, *self.last)
        self.end.queue_pair.flush()
        if not done:
            self.open_wr_ids.append(wr_id)
        return done


def content(region: MemoryRegion, start: int = 0, stop: int | None = None) -> bytes:
    """Read a region through the object that the data path slices."""
    stop = region.length if stop is None else stop
    return bytes(region.memory[region.offset + start : region.offset + stop])
