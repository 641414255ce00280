"""What the verbs fabric asks of a verbs library: a seam, and numbers that never change.

`pysmc.fabric.verbs_binding` fulfils it with pyverbs, the tests with an imitation in
memory. Only what the fabric needs is here, in calls that do the most at once: posting a
chain, taking a batch. What fails raises `VerbsError` with the errno. Nothing waits, but
for the address resolution within `QueuePairHandle.to_rtr`.

The numbers are those of libibverbs' stable ABI (`infiniband/verbs.h`).
"""

from __future__ import annotations

import errno as errnos
import os
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CompletionQueue",
    "DomainHandle",
    "Limits",
    "Path",
    "QueuePairHandle",
    "ReceiveBlocks",
    "Registration",
    "RequestTuple",
    "SendRequest",
    "Verbs",
    "VerbsError",
    "WorkCompletion",
]

WR_RDMA_WRITE: Final = 0
WR_SEND: Final = 2

SEND_SIGNALED: Final = 1 << 1
SEND_SOLICITED: Final = 1 << 2
SEND_INLINE: Final = 1 << 3

ACCESS_NONE: Final = 0
"""The device may read the memory for our own posts."""
ACCESS_LOCAL_WRITE: Final = 1
"""The device may write there what it receives."""
ACCESS_REMOTE_WRITE: Final = 2
"""The peer may write there."""

WC_RECEIVE: Final = 1 << 7
"""Opcode of a completion of a receive that a SEND took."""

RECEIVE_BIT: Final = 1 << 63
"""In the wr_id of receives; the rest is the slot. That of sends counts them."""

STATE_ERROR: Final = 6
"""A queue pair in the state ERROR."""

EVENT_CQ_ERROR: Final = 0
EVENTS_OF_QUEUE_PAIRS: Final = frozenset({1, 2, 3, 7})
"""QP_FATAL, QP_REQ_ERR, QP_ACCESS_ERR, PATH_MIG_ERR."""
EVENT_DEVICE_FATAL: Final = 8
EVENTS_OF_PORTS: Final = frozenset({10, 11, 12, 17, 18})
"""PORT_ERR, LID_CHANGE, PKEY_CHANGE, CLIENT_REREGISTER, GID_CHANGE."""


class VerbsError(OSError):
    """A verb failed: errno, and what was tried."""

    def __init__(self, number: int, operation: str) -> None:
        name = errnos.errorcode.get(number, str(number))
        super().__init__(number, f"{operation}: {name} ({os.strerror(number)})")
        self.name = name


class Limits(NamedTuple):
    """What the device can at most."""

    queue_pair_requests: int
    """Of its send queue, and of its receive queue."""
    completion_queue_entries: int


RequestTuple = tuple[int, int, int, int, int, int, int, int]
"""A `SendRequest` that cost no call to make."""


class SendRequest(NamedTuple):
    """A work request for the send queue."""

    wr_id: int
    """64 bits."""
    opcode: int
    flags: int
    local_address: int
    length: int
    """In bytes; 0 carries nothing."""
    lkey: int
    remote_address: int
    """Of a write, 64 bits."""
    rkey: int
    """Of a write, 32 bits."""


class Path(NamedTuple):
    """Where packets go."""

    port: int
    gid_index: int
    remote_gid: bytes
    """16 bytes."""
    mtu_code: int
    """1-5 for 256-4096 bytes."""
    hop_limit: int


class WorkCompletion(Protocol):
    """How a work request ended; after a failure only wr_id, status and qp_num count."""

    @property
    def wr_id(self) -> int:
        """64 bits, as it was posted."""

    @property
    def status(self) -> int:
        """0 for success."""

    @property
    def opcode(self) -> int:
        """What completed."""

    @property
    def byte_len(self) -> int:
        """Of a receive, in bytes."""

    @property
    def qp_num(self) -> int:
        """Whose it is."""

    @property
    def vendor_err(self) -> int:
        """The device's own code of a failure."""


class CompletionQueue(Protocol):
    """A completion queue with a completion channel of its own."""

    @property
    def fd(self) -> int:
        """Readable, level-triggered, when a notification was requested and came."""

    def poll(self, count: int) -> Sequence[WorkCompletion]:
        """Take up to so many completions."""

    def request_notify(self) -> None:
        """Have `fd` become readable once, at the next completion."""

    def take_event(self) -> bool:
        """Take a notification; False when there was none."""

    def close(self) -> None:
        """Destroy it, after its queue pairs."""


class Registration(Protocol):
    """Memory that is registered with a protection domain."""

    @property
    def lkey(self) -> int:
        """For our own posts, 32 bits."""

    @property
    def rkey(self) -> int:
        """For the peer, 32 bits."""

    def close(self) -> None:
        """Deregister it."""


class ReceiveBlocks(Protocol):
    """Receives that are posted several at a time, made once for a piece of memory."""

    def close(self) -> None:
        """Free what the work requests take."""


class QueuePairHandle(Protocol):
    """A reliable connected queue pair."""

    @property
    def number(self) -> int:
        """24 bits."""

    @property
    def inline_bytes(self) -> int:
        """Most bytes of an inline request."""

    def to_init(self, port: int) -> None:
        """Go to INIT: receives may be posted; peers may write."""

    def to_rtr(self, path: Path, remote_number: int, remote_psn: int) -> None:
        """Go to RTR. Blocks while the peer's address is resolved."""

    def to_rts(self, psn: int) -> None:
        """Go to RTS: sends may be posted."""

    def to_error(self) -> None:
        """Go to ERROR: what was posted is flushed, and nothing is sent again."""

    def state(self) -> int:
        """Ask for the state."""

    def post_send(self, requests: Sequence[RequestTuple]) -> None:
        """Post all of them at once, at most `SEND_CHAIN`; the last one is signalled.

        Args:
            requests: What `SendRequest` names.
        """

    def post_receives(self, blocks: ReceiveBlocks, index: int) -> None:
        """Post one block of receives."""

    def close(self) -> None:
        """Destroy it."""


class DomainHandle(Protocol):
    """A protection domain."""

    def register(self, address: int, length: int, access: int) -> Registration:
        """Register memory; the caller keeps it alive."""

    def receive_blocks(
        self, address: int, slot_bytes: int, slots: int, block: int, lkey: int
    ) -> ReceiveBlocks:
        """Make receives for slots that follow each other, ``block`` of them at once.

        The wr_id of each is its slot, with `RECEIVE_BIT`.
        """

    def create_queue_pair(
        self, queue: CompletionQueue, sends: int, receives: int, inline_bytes: int
    ) -> QueuePairHandle:
        """Create a queue pair whose completions all go to one queue.

        It may take fewer bytes inline than was asked for.
        """

    def close(self) -> None:
        """Free it, after all that belongs to it."""


class Verbs(Protocol):
    """An open device."""

    @property
    def limits(self) -> Limits:
        """What it can at most."""

    @property
    def event_fd(self) -> int:
        """Readable when `take_event` has something."""

    def take_event(self) -> int | None:
        """Take an asynchronous event: its type."""

    def create_completion_queue(self, entries: int) -> CompletionQueue:
        """Create a completion queue, with a channel."""

    def create_domain(self) -> DomainHandle:
        """Allocate a protection domain."""

    def close(self) -> None:
        """Close the device, after all that belongs to it."""

    def abandon(self) -> None:
        """In a forked child: close its descriptors, and touch nothing of the parent."""


SEND_CHAIN: Final = 16
"""Most send requests in one post."""
