"""The fabric contract: what every fabric can do, and not one method more.

Five nouns: a `Device`, the `MemoryRegion` of a `ProtectionDomain`, a `QueuePair`, the
work requests posted on it, and the `Completion` that answers. A fabric moves memory. It
does not know what an SMC-R message means: a SEND carries opaque bytes, and an `Update`
is five integers whose bytes a codec makes where the wire wants bytes.

Rules that hold for every fabric; `pysmc.testing.conformance` checks them:

* **Order.** What is posted on one queue pair takes effect in that order: when a
  receiver sees an update, every write posted before it is in memory.
* **Publish.** A fabric may deliver every update or only the newest one of each
  connection. A later update replaces an earlier one completely. An update never
  overtakes the writes or the updates posted before it. The newest may be seen twice.
* **Every publish completes**, at once (`QueuePair.publish` returns True) or by a
  completion of kind PUBLISH, unless the queue pair goes down first.
* **Data is taken before a post returns**: the caller may reuse its buffer. The caller
  keeps at most `Config.sndbuf_bytes` of a connection unpublished or uncompleted.
* **One end.** A queue pair goes down exactly once, by a completion of kind DOWN, after
  everything that arrived before it was delivered. From then on posts do nothing.
  `QueuePair.close` of our own gives no DOWN here, but one at the peer.
* **Waiting.** `Device.fileno` becomes readable when completions may wait, provided that
  `Device.arm` returned True after the last `poll`. The order is: poll until empty, arm,
  and when arm says False poll again.
* **Nothing blocks**, and no method calls back.
* **Fork.** In a forked child every method but ``close`` raises
  `pysmc.errors.ForkedError`.

Reference: RFC 7609 sections 2.1 and 4; kernel counterparts: smc_ib.c, smc_wr.c.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Completion",
    "CompletionKind",
    "Device",
    "MemoryRegion",
    "ProtectionDomain",
    "QueuePair",
    "RemoteQueuePair",
    "Status",
    "Update",
    "UpdateCodec",
]


class Status(Enum):
    """How a work request or a queue pair ended."""

    SUCCESS = "success"
    PEER_GONE = "peer gone"  # the peer's process or port is no longer there
    UNREACHABLE = "unreachable"  # the peer's endpoint could not be found
    NO_ROUTE = "no route"  # the peer's port does not answer on the network
    FOREIGN_USER = "foreign user"  # same host, but a user who is not allowed
    REMOTE_ACCESS = "remote access"  # rkey or address outside the peer's memory
    BROKEN_RULE = "broken rule"  # the peer broke a rule of the fabric
    NO_MEMORY = "no memory"  # memory, pinned memory or descriptors ran out
    TIMED_OUT = "timed out"  # the fabric's own retries ended
    FLUSHED = "flushed"  # the queue pair went down first


class CompletionKind(Enum):
    """What a completion tells."""

    CONNECTED = "connected"  # connect() ended; status says how
    RECEIVE = "receive"  # the peer's SEND: payload is bytes
    UPDATE = "update"  # the peer's publish: payload is an Update
    PUBLISH = "publish"  # our publish with this wr_id completed
    DOWN = "down"  # the queue pair is gone; status says why


class Update(NamedTuple):
    """The whole state of one direction pair of a connection, as a CDC carries it."""

    sequence: int
    """16 bits, +1 for each update of a connection; gaps are normal."""
    alert_token: int
    """32 bits, the receiver's name of the connection."""
    producer: int
    """48 bits: wrap << 32 | count of the sender's producer cursor."""
    consumer: int
    """48 bits: wrap << 32 | count of the sender's consumer cursor."""
    flags: int
    """16 bits: producer flags << 8 | connection state flags."""


class UpdateCodec(NamedTuple):
    """How an update becomes the 44 bytes of a CDC message, for fabrics that SEND it."""

    pack: Callable[[int, int, int, int, int], bytes]
    """The five fields of `Update` to 44 bytes."""
    unpack: Callable[[bytes], tuple[int, int, int, int, int]]
    """44 bytes to the five fields; raises ValueError."""
    is_update: Callable[[bytes], bool]
    """Whether a received SEND is an update and not an LLC message."""
    is_question: Callable[[bytes], bool] = lambda _: False
    """Whether the peer waits for an answer to an LLC message before it does more."""


class Completion(NamedTuple):
    """One answer of a device."""

    kind: CompletionKind
    queue_pair: QueuePair
    status: Status = Status.SUCCESS
    wr_id: int = 0
    payload: Any = None
    """bytes for RECEIVE, `Update` for UPDATE, a sentence for people or None else."""


@dataclass(frozen=True, slots=True)
class RemoteQueuePair:
    """Where the other end of a queue pair is, as its CLC message named it."""

    peer_id: bytes
    """8 bytes."""
    gid: bytes
    """16 bytes."""
    mac: bytes
    """6 bytes."""
    number: int
    """24 bits."""
    psn: int
    """24 bits, the first packet sequence number that the peer sends."""
    mtu_code: int
    """1-5 for 256-4096 bytes."""


class MemoryRegion(ABC):
    """A piece of our memory that the peer of one domain may write."""

    length: int
    """Size in bytes."""
    virtual_address: int
    """64 bits; where the peer has to write for the region's first byte."""
    memory: Any
    """The object to slice: ``memory[offset + a : offset + b]`` gives bytes, fast."""
    offset: int
    """Where the region begins in `memory`."""
    view: memoryview
    """The region itself, writable, for copies without an intermediate object."""

    @abstractmethod
    def rkey_on(self, queue_pair: QueuePair) -> int:
        """Tell the region's rkey (32 bits) on this link; it may differ on each."""

    @abstractmethod
    def clear(self, count: int | None = None) -> None:
        """Fill the region with zeros, and forget updates that named it.

        Args:
            count: How many bytes from the region's beginning, all of them by default.
        """

    @abstractmethod
    def close(self) -> None:
        """Deregister. Idempotent; `view` must not be used afterwards."""


class QueuePair(ABC):
    """One reliable, ordered connection between two devices."""

    number: int
    """24 bits, never 0."""
    is_up: bool
    """True from a successful CONNECTED until DOWN or close."""

    @abstractmethod
    def connect(self, remote: RemoteQueuePair, psn: int, *, passive: bool) -> None:
        """Begin to connect; a CONNECTED completion ends it.

        Both ends call it. A server is passive: a fabric that has to call its peer lets
        the active end call. Sends of the peer that arrive before the completion was
        polled are held until then.

        Args:
            remote: The other end.
            psn: Our own first packet sequence number, 24 bits.
            passive: True at the server.
        """

    @abstractmethod
    def post_send(self, payload: bytes) -> None:
        """SEND 1-1100 bytes into the peer's next receive."""

    @abstractmethod
    def post_write(self, rkey: int, address: int, data: memoryview | bytes) -> None:
        """Write data to the peer's memory.

        Raises:
            FabricError: The fabric can tell at once that rkey and address do not name
                memory of the peer (status ``REMOTE_ACCESS``).
        """

    @abstractmethod
    def publish(
        self,
        rkey: int,
        wr_id: int,
        sequence: int,
        alert_token: int,
        producer: int,
        consumer: int,
        flags: int,
    ) -> bool:
        """Make an `Update` known to the peer.

        Args:
            rkey: The peer's region of this connection; selects the mailbox in fabrics
                that have mailboxes.
            wr_id: Comes back in the PUBLISH completion (a whole number from 0).
            sequence: See `Update`, as for the others.
            alert_token: See `Update`.
            producer: See `Update`.
            consumer: See `Update`.
            flags: See `Update`.

        Returns:
            True when it completed at once.

        Raises:
            FabricError: As for `post_write`.
        """

    def newest_consumer(self, region: MemoryRegion, alert_token: int) -> int:  # noqa: ARG002
        """Look at the consumer cursor of the peer's newest update, without taking it.

        The update itself still comes by `Device.poll`. This is for a writer that is out
        of room in the middle of a turn of its loop: the room may be there already.

        Args:
            region: Ours, of the connection.
            alert_token: What the update has to carry.

        Returns:
            48 bits as in `Update`, or -1 when there is none or the fabric keeps no
            mailboxes.
        """
        return -1

    def names_element(self, rkey: int, address: int, length: int) -> bool:  # noqa: ARG002
        """Tell whether something is exactly one region of the peer.

        What the CLC messages say of the peer's memory nothing guards but the checksum
        of TCP; a fabric that knows better says so before anything is written.

        Args:
            rkey: 32 bits.
            address: Where it begins, 64 bits.
            length: In bytes.

        Returns:
            True also when the fabric cannot tell.
        """
        return True

    @abstractmethod
    def flush(self) -> None:
        """Ring the peer's doorbell if posts since the last flush made it necessary.

        Posts may ring by themselves earlier; after flush nothing is held back.
        """

    @abstractmethod
    def close(self, *, linger: bool = False) -> None:
        """Go to ERROR, drain, destroy. Idempotent. The peer gets DOWN.

        Args:
            linger: The peer will have more to say, which nobody reads. Where it would
                try again for ever, it is acknowledged until there is silence.
        """


class ProtectionDomain(ABC):
    """The memory and queue pairs of one link group: no other peer reaches them."""

    @abstractmethod
    def create_queue_pair(self) -> QueuePair:
        """Create a queue pair.

        Raises:
            FabricError: Status ``NO_MEMORY`` and the errno's name in the detail.
        """

    @abstractmethod
    def register(self, length: int) -> MemoryRegion:
        """Get zeroed memory that the peers of this domain may write.

        Args:
            length: A power of two from 16 KiB to 512 MiB.

        Raises:
            FabricError: Status ``NO_MEMORY`` and the errno's name in the detail.
        """

    @abstractmethod
    def close(self) -> None:
        """Close queue pairs, then regions, then give the memory back. Idempotent."""


class Device(ABC):
    """One way to reach other processes' memory."""

    fabric: str
    """"shm", "verbs" or "sim"."""
    eid: str | None
    """EID that selects this fabric by itself; None when the user's UEIDs do."""
    gid: bytes
    """16 bytes."""
    mac: bytes
    """6 bytes."""
    mtu_code: int
    """1-5 for 256-4096 bytes."""
    is_gone: bool = False
    """True once the device can never be used again (it was removed), every queue pair
    of it went down and `poll` gave all that. Its owner closes it then, as soon as it is
    not `is_finishing`."""
    peers_retry: bool = False
    """True where what a peer sends to a queue pair that is gone may be tried again for
    ever, so that it never ends what it was about to end."""
    is_finishing: bool = False
    """True while `close` would wait for queue pairs that were closed before: a peer
    does not have all yet, or packets are still somewhere. That ends by itself, with
    time, and `fileno` becomes readable then."""

    @abstractmethod
    def create_domain(self) -> ProtectionDomain:
        """Create a protection domain for one link group.

        Raises:
            FabricError: It could not be had.
        """

    def check_callable(self) -> None:
        """Refuse a passive queue pair that no peer could call as things are.

        Without it the peer would learn that only from its time-out.

        Raises:
            FabricError: Status ``NO_MEMORY``.
        """
        return

    @abstractmethod
    def poll(self) -> list[Completion]:
        """Take what has completed, in order for each queue pair; empty when nothing.

        One call returns a bounded number; call again until it returns an empty list.
        """

    @abstractmethod
    def pending(self) -> bool:
        """Look, without a system call, whether `poll` would return something.

        May miss what only a system call can tell (a peer's death).
        """

    @abstractmethod
    def arm(self) -> bool:
        """Ask for `fileno` to become readable at the next completion.

        Returns:
            False when something completed meanwhile: poll again.
        """

    @abstractmethod
    def disarm(self) -> None:
        """Say that we are awake again: peers need not ring. Cheap; optional to call."""

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor for the loop's selector (level-triggered, for reading)."""

    @abstractmethod
    def close(self) -> None:
        """Close every domain and the device. Idempotent."""
