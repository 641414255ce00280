"""The simulated fabric: in one process, deterministic, with faults on request.

Decides what happens next by its seed alone: the same seed and the same calls give the
same completions in the same order, and the same `SimNetwork.trace`. Its clock stands
still unless it is advanced. Knows no real time, no sockets and no threads.

What is posted waits in its queue pair's stream. A step takes the next item of one
stream, which one the seed says, and lets it take effect at the peer. So queue pairs
keep their own order, and interleave with each other in every possible way.

Two ways to treat updates, both within the contract:

* every one (the default): as RDMA does it. A write lands when it is delivered, an
  update travels as the bytes that the codec makes, a wrong address ends both queue
  pairs.
* only the newest (``newest_only=True``): as shared memory does it. A write lands at
  once, an update waits in a mailbox where a later one replaces it, and a wrong address
  is refused at the post.

Each region has another rkey on each link, so that whoever mixes them up is noticed.

Source: RFC 7609 sections 2.1 and 4.5 (reliable connected queue pairs).
"""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING

from pysmc.errors import FabricError, LocalProtocolError
from pysmc.fabric.base import Status, UpdateCodec
from pysmc.fabric.sim_device import (
    Item,
    SimDevice,
    SimDomain,
    SimQueuePair,
    SimRegion,
    Stream,
)
from pysmc.fabric.sim_faults import Faults

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SimDevice", "SimDomain", "SimNetwork", "SimQueuePair", "SimRegion"]


class SimNetwork:
    """The world of the simulated devices: seed, clock, faults and trace."""

    def __init__(
        self,
        seed: int = 0,
        *,
        codec: UpdateCodec | None = None,
        newest_only: bool = False,
        auto: bool = False,
    ) -> None:
        """Make an empty network at time 0.

        Args:
            seed: Decides every choice.
            codec: Makes updates bytes, and tells them from other SENDs; without one
                they travel as they are.
            newest_only: Deliver only the newest update of each region.
            auto: Deliver at once what is posted, as far as it is not held or delayed;
                for drivers that only watch `Device.fileno`.
        """
        self.now = 0.0
        self.auto = auto
        self.newest_only = newest_only
        self.codec = codec
        self.trace: list[str] = []
        self.tracing = True
        """Whether the trace is kept."""
        self._rng = random.Random(seed)
        self._devices: dict[bytes, SimDevice] = {}
        self._queue_pairs: dict[int, SimQueuePair] = {}
        self._streams: dict[Stream, None] = {}
        """Where something may wait, in the order in which it began to."""
        self._regions = 0
        self.faults = Faults(self)
        """What may go wrong beside `cut`, `hold`, `delay` and the two ``fail_``s."""
        self._allocations_left: int | None = None
        self._connect_failures: deque[Status] = deque()
        self._is_running = False

    # --- driving -------------------------------------------------------------------

    def device(
        self,
        peer_id: bytes,
        make: Callable[[SimNetwork, bytes], SimDevice] = SimDevice,
    ) -> SimDevice:
        """Open a device.

        Args:
            peer_id: 8 bytes, not in use in this network.
            make: Makes the device, for whoever needs another kind.
        """
        if peer_id in self._devices:
            text = f"peer ID {peer_id.hex()} is in use"
            raise LocalProtocolError(text)
        device = self._devices[peer_id] = make(self, peer_id)
        return device

    def advance(self, seconds: float) -> None:
        """Let virtual time pass; delayed items become due."""
        if seconds < 0:
            text = f"time does not go back by {-seconds} s"
            raise ValueError(text)
        self.now += seconds
        self._run_if_auto()

    def next_due(self) -> float | None:
        """Tell when the next item can be delivered; None when there is none."""
        dues = [stream.items[0].due for stream in self._ready_streams()]
        return min(dues, default=None)

    def is_ready(self) -> bool:
        """Tell, quickly, whether `step` would deliver something."""
        now = self.now
        for stream in self._streams:
            if stream.is_ready and stream.items[0].due <= now:
                return True
        return False

    def step(self) -> bool:
        """Deliver one item.

        Returns:
            False when nothing can be delivered now.
        """
        ready = [
            stream
            for stream in self._ready_streams()
            if stream.items[0].due <= self.now
        ]
        if not ready:
            return False
        stream = ready[self._rng.randrange(len(ready)) if len(ready) > 1 else 0]
        item = stream.items.popleft()
        self.note(f"{stream.name}: {item.text}")
        item.effect()
        return True

    def note(self, text: str) -> None:
        """Add a line to the trace, with the time."""
        if self.tracing:
            self.trace.append(f"{self.now:.6f} {text}")

    def run_until_idle(self, limit: int = 100_000) -> int:
        """Deliver until nothing can be delivered now.

        Args:
            limit: Most items to deliver.

        Returns:
            How many were delivered.

        Raises:
            RuntimeError: The limit was reached: whoever is driven never rests.
        """
        for count in range(limit):
            if not self.step():
                return count
        text = f"the network is not idle after {limit} deliveries"
        raise RuntimeError(text)

    def _ready_streams(self) -> list[Stream]:
        for stream in [stream for stream in self._streams if not stream.items]:
            del self._streams[stream]
        return [stream for stream in self._streams if stream.is_ready]

    # --- faults --------------------------------------------------------------------

    def fail_connect(self, status: Status) -> None:
        """Have the next connection end with a status on both ends."""
        self._connect_failures.append(status)

    def fail_allocation(self, nth: int = 1) -> None:
        """Have an allocation fail for want of memory.

        Args:
            nth: Which of the next allocations of domains, queue pairs and regions.
        """
        self._allocations_left = nth

    def cut(self, queue_pair: SimQueuePair, status: Status = Status.TIMED_OUT) -> None:
        """Cut a link: both ends go down, and what is on its way is lost."""
        self.faults.cut(queue_pair, status)

    def hold(self, queue_pair: SimQueuePair, *, held: bool = True) -> None:
        """Keep back what a queue pair posts, until called with ``held=False``."""
        queue_pair.outgoing.is_held = held
        self._run_if_auto()

    def delay(self, queue_pair: SimQueuePair, seconds: float) -> None:
        """Have what a queue pair posts from now on take a time to arrive."""
        queue_pair.outgoing.delay = seconds

    # --- what devices and queue pairs need -----------------------------------------

    def allocate(self, what: str, device: SimDevice) -> None:
        """Count an allocation.

        Args:
            what: "domain", "queue pair" or "region".
            device: Whose.

        Raises:
            FabricError: This is the one that was to fail, or the device is gone.
        """
        self.faults.call(what, device)
        if self._allocations_left is None:
            return
        self._allocations_left -= 1
        if self._allocations_left == 0:
            self._allocations_left = None
            self.note(f"{what}: no memory")
            text = "ENOMEM: as the fault plan says"
            operation = f"create a {what}"
            raise FabricError(operation, Status.NO_MEMORY.name, text)

    def new_stream(self, name: str) -> Stream:
        """Make a stream."""
        return Stream(name)

    def new_region_number(self) -> int:
        """Number the regions of the network from 1."""
        self._regions += 1
        return self._regions

    def new_number(self, queue_pair: SimQueuePair) -> int:
        """Choose a number for a queue pair."""
        while True:
            number = self._rng.randrange(1, 1 << 24)
            if number not in self._queue_pairs:
                self._queue_pairs[number] = queue_pair
                return number

    def post(self, stream: Stream, text: str, effect: Callable[[], None]) -> None:
        """Put an item at the end of a stream."""
        due = self.now + stream.delay
        if stream.items:
            due = max(due, stream.items[-1].due)
        stream.items.append(Item(due, text, effect))
        self._streams[stream] = None
        self._run_if_auto()

    def later(self, seconds: float, text: str, effect: Callable[[], None]) -> None:
        """Let something happen by itself after some seconds."""
        stream = self.new_stream("later")
        stream.delay = seconds
        self.post(stream, text, effect)

    def _run_if_auto(self) -> None:
        if self.auto and not self._is_running:
            self._is_running = True
            try:
                self.run_until_idle()
            finally:
                self._is_running = False

    def introduce(self, queue_pair: SimQueuePair) -> None:
        """Connect a queue pair with the one it names, if that is there and agrees."""
        remote = queue_pair.remote
        assert remote is not None
        other = self._queue_pairs.get(remote.number)
        if other is None or other.device.peer_id != remote.peer_id:
            if not queue_pair.is_passive:
                text = "there is no such queue pair at that peer ID"
                queue_pair.connected_later(Status.UNREACHABLE, text)
            return
        if other.remote is None or other.peer is not None:
            return  # it has not called or waited yet
        if not (queue_pair.fits(other) and other.fits(queue_pair)):
            caller = other if queue_pair.is_passive else queue_pair
            text = "the two queue pairs do not name each other"
            caller.connected_later(Status.UNREACHABLE, text)
            return
        status, text = Status.SUCCESS, ""
        if self._connect_failures:
            status, text = self._connect_failures.popleft(), "as the fault plan says"
        else:
            queue_pair.peer, other.peer = other, queue_pair
            queue_pair.outgoing.waits_for = other
            other.outgoing.waits_for = queue_pair
        for end in (queue_pair, other):
            end.connected_later(status, text)

    def forget_queue_pair(self, queue_pair: SimQueuePair) -> None:
        """Take a closed queue pair off the network, and tell who still calls it."""
        del self._queue_pairs[queue_pair.number]
        self._streams.pop(queue_pair.answers, None)
        queue_pair.answers.items.clear()
        for other in self._queue_pairs.values():
            remote = other.remote
            is_caller = remote is not None and remote.number == queue_pair.number
            if is_caller and other.peer is None and not other.is_passive:
                other.connected_later(Status.UNREACHABLE, "the queue pair was closed")

    def forget_stream(self, stream: Stream) -> None:
        """Take a stream away that nobody posts to any more."""
        self._streams.pop(stream, None)

    def forget_device(self, device: SimDevice) -> None:
        """Take a closed device off the network."""
        del self._devices[device.peer_id]
