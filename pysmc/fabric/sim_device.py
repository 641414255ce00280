"""The devices of the simulated fabric; `pysmc.fabric.sim` decides what happens when.

Decides what a post does at its peer, and how a simulated link comes up and goes down.
Source: RFC 7609 section 4.5 (reliable connected queue pairs).
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.errors import FabricError, ForkedError, LocalProtocolError
from pysmc.fabric.base import (
    Completion,
    CompletionKind,
    Device,
    MemoryRegion,
    ProtectionDomain,
    QueuePair,
    RemoteQueuePair,
    Status,
    Update,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.fabric.sim import SimNetwork
    from pysmc.fabric.sim_faults import Tamper

__all__ = [
    "Item",
    "Mail",
    "SimDevice",
    "SimDomain",
    "SimQueuePair",
    "SimRegion",
    "Stream",
]

_SEND_BYTES_MAX = 1100
_REGION_BYTES_MIN = 16 * 1024
_REGION_BYTES_MAX = 512 * 1024 * 1024
_FIRST_ADDRESS = 0x7F00_0000


class Item(NamedTuple):
    """Something posted that has not taken effect yet."""

    due: float
    text: str
    effect: Callable[[], None]


@dataclass(eq=False)
class Mail:
    """An update on its way; in a mailbox it may be replaced until it is taken."""

    rkey: int
    update: Any
    wr_ids: list[int]


@dataclass(eq=False)
class Stream:
    """Items that take effect one after the other."""

    name: str
    items: deque[Item] = field(default_factory=deque)
    delay: float = 0.0
    is_held: bool = False
    waits_for: SimQueuePair | None = None
    """Nothing is delivered while this queue pair is open and not yet connected."""

    @property
    def is_ready(self) -> bool:
        """Whether there is something that only the clock may keep back."""
        if not self.items or self.is_held:
            return False
        peer = self.waits_for
        return peer is None or peer.is_connected or not peer.is_open


class SimRegion(MemoryRegion):
    """Memory of a simulated device."""

    def __init__(self, domain: SimDomain, length: int) -> None:
        self.length = length
        self.number = domain.device.network.new_region_number()
        self.virtual_address = self.number << 33 | _FIRST_ADDRESS
        # Anonymous memory and not a bytearray: its slices are bytes.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory: Any = mmap.mmap(-1, length, flags=flags)
        self.offset = 0
        self.view = memoryview(self.memory)
        self._domain = domain
        self._open = True

    def rkey_on(self, queue_pair: QueuePair) -> int:
        """Tell the rkey on a link; see `MemoryRegion.rkey_on`."""
        self._domain.device.refuse_if_forked()
        assert isinstance(queue_pair, SimQueuePair)
        return self.number << 12 | queue_pair.index

    def clear(self, count: int | None = None) -> None:
        """Fill with zeros, and empty the mailboxes; see `MemoryRegion.clear`."""
        self._domain.device.refuse_if_forked()
        end = self.length if count is None else min(count, self.length)
        self.memory[:end] = bytes(end)
        self._domain.empty_mailboxes(self)

    def close(self) -> None:
        """Deregister. Idempotent; the memory goes with the last view of it."""
        if self._open:
            self._open = False
            self._domain.empty_mailboxes(self)
            del self._domain.regions[self.number]
            self.view.release()


class SimDomain(ProtectionDomain):
    """Regions and queue pairs of one link group."""

    def __init__(self, device: SimDevice) -> None:
        self.device = device
        self.regions: dict[int, SimRegion] = {}
        self.queue_pairs: list[SimQueuePair] = []
        self._open = True

    def _check_open(self) -> None:
        self.device.refuse_if_forked()
        if not self._open:
            text = "the protection domain is closed"
            raise LocalProtocolError(text)

    def create_queue_pair(self) -> SimQueuePair:
        """Create a queue pair; see `ProtectionDomain.create_queue_pair`."""
        self._check_open()
        self.device.network.allocate("queue pair", self.device)
        queue_pair = SimQueuePair(self)
        self.queue_pairs.append(queue_pair)
        return queue_pair

    def register(self, length: int) -> SimRegion:
        """Get memory; see `ProtectionDomain.register`."""
        self._check_open()
        if not _REGION_BYTES_MIN <= length <= _REGION_BYTES_MAX or length & length - 1:
            text = f"a region of {length} bytes; 16 KiB to 512 MiB, a power of two"
            raise LocalProtocolError(text)
        self.device.network.allocate("region", self.device)
        region = SimRegion(self, length)
        self.regions[region.number] = region
        return region

    def empty_mailboxes(self, region: SimRegion) -> None:
        """Forget updates for a region that wait in mailboxes."""
        for queue_pair in self.queue_pairs:
            queue_pair.mailboxes.pop(region.rkey_on(queue_pair), None)

    def close(self) -> None:
        """Close everything of this domain. Idempotent."""
        if self._open:
            self._open = False
            for queue_pair in list(self.queue_pairs):
                queue_pair.close()
            if not self.device.forked:
                for region in list(self.regions.values()):
                    region.close()
            self.device.domains.remove(self)


class SimQueuePair(QueuePair):
    """One end of a simulated link."""

    def __init__(self, domain: SimDomain) -> None:
        self.domain = domain
        self.device = domain.device
        self.network = network = domain.device.network
        self.number = network.new_number(self)
        self.index = self.device.new_index()
        self.is_up = False
        self.is_connected = False
        self.is_passive = False
        self.remote: RemoteQueuePair | None = None
        self.psn = 0
        self.peer: SimQueuePair | None = None
        self.outgoing = network.new_stream(f"{self} posts")
        self.answers = network.new_stream(f"{self} completes")
        self.mailboxes: dict[int, Mail] = {}
        """Updates that wait for us, by rkey: only with ``newest_only``."""
        self._is_down = False
        self.is_open = True
        self.vanishes = False
        """What it posts is acknowledged, and never lands."""
        self.loses = False
        """What it posts is neither acknowledged, nor lands."""
        self.is_retrying = False
        """Whether it is about to find out that nobody answers."""

    def __str__(self) -> str:
        return f"{self.device} qp {self.index}"

    # --- coming up -----------------------------------------------------------------

    def connect(self, remote: RemoteQueuePair, psn: int, *, passive: bool) -> None:
        """Begin to connect; see `QueuePair.connect`."""
        self.device.refuse_if_forked()
        if self.remote is not None or not self.is_open:
            text = f"queue pair {self.number} was connected before"
            raise LocalProtocolError(text)
        self.remote, self.psn, self.is_passive = remote, psn, passive
        if not self.network.faults.call("connect", self.device, self):
            self.network.introduce(self)

    def fits(self, other: SimQueuePair) -> bool:
        """Tell whether another queue pair is the one that we were told of."""
        remote = self.remote
        return (
            remote is not None
            and (remote.number, remote.psn) == (other.number, other.psn)
            and remote.peer_id == other.device.peer_id
            and self.is_passive is not other.is_passive
        )

    def connected_later(self, status: Status, text: str) -> None:
        """Let an attempt to connect end, one step from now."""
        self.network.post(
            self.answers,
            f"connect: {status.value}",
            lambda: self._connected(status, text),
        )

    def _connected(self, status: Status, text: str) -> None:
        if self._is_down:
            return
        if status is Status.SUCCESS:
            self.is_up = self.is_connected = True
        else:
            self._is_down = True
        self.device.complete(
            Completion(CompletionKind.CONNECTED, self, status, payload=text or None)
        )

    def _check_posting(self) -> SimQueuePair | None:
        """Tell the peer; None when posts do nothing any more."""
        self.device.refuse_if_forked()
        if self._is_down or not self.is_open:
            return None
        if self.peer is None or not self.is_connected:
            text = f"queue pair {self.number} is not connected"
            raise LocalProtocolError(text)
        return self.peer

    # --- posts ---------------------------------------------------------------------

    def post_send(self, payload: bytes) -> None:
        """SEND; see `QueuePair.post_send`."""
        peer = self._check_posting()
        if not 1 <= len(payload) <= _SEND_BYTES_MAX:
            text = f"a SEND of {len(payload)} bytes; 1 to {_SEND_BYTES_MAX} possible"
            raise LocalProtocolError(text)
        if peer is None or self.network.faults.call("send", self.device, self):
            return
        taken, text = bytes(payload), f"SEND of {len(payload)} bytes"
        self.network.post(self.outgoing, text, lambda: self._send_arrives(peer, taken))

    def _send_arrives(self, peer: SimQueuePair, payload: bytes) -> None:
        if self._reaches(peer):
            peer.receive(payload)

    def _reaches(self, peer: SimQueuePair) -> bool:
        """Tell whether what was posted lands; if nobody takes it, retries begin."""
        if self.vanishes or self.loses:
            return False
        if peer.is_dead:
            self.network.faults.unanswered(self)
            return False
        return True

    def post_write(self, rkey: int, address: int, data: memoryview | bytes) -> None:
        """Write; see `QueuePair.post_write`."""
        peer = self._check_posting()
        if peer is None or self.network.faults.call("write", self.device, self):
            return
        if self.network.newest_only:
            region = peer.region_at(rkey, address, len(data))
            if region is None:
                self._refuse("post_write", rkey, address)
            else:
                start = address - region.virtual_address
                region.memory[start : start + len(data)] = data
            return
        taken, text = bytes(data), f"write of {len(data)} bytes"
        self.network.post(
            self.outgoing, text, lambda: self._write_arrives(peer, rkey, address, taken)
        )

    def _write_arrives(
        self, peer: SimQueuePair, rkey: int, address: int, data: bytes
    ) -> None:
        if not self._reaches(peer):
            return
        region = peer.region_at(rkey, address, len(data))
        if region is None:
            self.outgoing.items.clear()
            self.go_down(Status.REMOTE_ACCESS, f"rkey {rkey:#x} at {address:#x}")
            peer.go_down(Status.BROKEN_RULE, "the peer wrote to what is not its own")
            return
        start = address - region.virtual_address
        region.memory[start : start + len(data)] = data

    def region_at(self, rkey: int, address: int, length: int) -> SimRegion | None:
        """Find our region for a write of the peer; None when it may not."""
        region = self.domain.regions.get(rkey >> 12)
        if region is None or rkey & 0xFFF != self.index:
            return None
        start = address - region.virtual_address
        if start < 0 or start + length > region.length:
            return None
        return region

    def _refuse(self, operation: str, rkey: int, address: int) -> None:
        text = f"rkey {rkey:#x} at {address:#x} is not the peer's memory"
        raise FabricError(operation, Status.REMOTE_ACCESS.name, text)

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
        """Publish; see `QueuePair.publish`. It always completes later."""
        peer = self._check_posting()
        if peer is None or self.network.faults.call("publish", self.device, self):
            return False
        update: Any = Update(sequence, alert_token, producer, consumer, flags)
        codec = self.network.codec
        if codec is not None:
            update = codec.pack(*update)
        if self.network.newest_only:
            if rkey & 0xFFF != peer.index or rkey >> 12 not in peer.domain.regions:
                self._refuse("publish", rkey, 0)
            waiting = peer.mailboxes.get(rkey)
            if waiting is not None:
                waiting.update = update
                waiting.wr_ids.append(wr_id)
                return False
        mail = Mail(rkey, update, [wr_id])
        if self.network.newest_only:
            peer.mailboxes[rkey] = mail
        text = f"update {sequence} of {alert_token:#x}"
        self.network.post(self.outgoing, text, lambda: self._update_arrives(peer, mail))
        return False

    def _update_arrives(self, peer: SimQueuePair, mail: Mail) -> None:
        is_wanted = self._reaches(peer)
        if not is_wanted and not self.vanishes:
            return  # not acknowledged, so it does not complete
        if self.network.newest_only and is_wanted:
            # A mailbox that was emptied meanwhile has nothing to say.
            is_wanted = peer.mailboxes.get(mail.rkey) is mail
            if is_wanted:
                del peer.mailboxes[mail.rkey]
        if is_wanted:
            peer.receive(mail.update)
        for wr_id in mail.wr_ids:
            done = Completion(CompletionKind.PUBLISH, self, wr_id=wr_id)
            self._answer(f"publish {wr_id}", done)

    def _answer(self, text: str, completion: Completion) -> None:
        if not self._is_down and self.is_open:
            self.network.post(
                self.answers, text, lambda: self.device.complete(completion)
            )

    def receive(self, payload: bytes | Update) -> None:
        """Take a SEND, which may be an update."""
        if self._is_down or not self.is_open:
            return
        kind, codec = CompletionKind.RECEIVE, self.network.codec
        content: bytes | Update = payload
        if isinstance(payload, Update):
            kind = CompletionKind.UPDATE
        elif codec is not None and codec.is_update(payload):
            try:
                kind, content = CompletionKind.UPDATE, Update(*codec.unpack(payload))
            except ValueError as error:
                self.go_down(Status.BROKEN_RULE, f"a malformed update: {error}")
                return
        self.device.complete(Completion(kind, self, payload=content))

    def flush(self) -> None:
        """Do nothing: nothing is kept back."""
        self.device.refuse_if_forked()

    # --- going down ----------------------------------------------------------------

    def go_down(self, status: Status, text: str) -> None:
        """Go down, once."""
        if self._is_down or not self.is_open:
            return
        kind = CompletionKind.DOWN if self.is_connected else CompletionKind.CONNECTED
        self._is_down = True
        self.is_up = False
        self.answers.items.clear()
        self.device.complete(Completion(kind, self, status, payload=text))

    @property
    def is_dead(self) -> bool:
        """Whether nothing that arrives here is taken, or acknowledged, any more."""
        return self._is_down or not self.is_open

    def give_up(self, status: Status, text: str) -> None:
        """Go down with all that was still to be sent."""
        if not self.is_dead:
            self.outgoing.items.clear()
            self.go_down(status, text)

    def cut_if_up(self) -> None:
        """Be cut, unless it is down already."""
        if not self.is_dead:
            self.network.faults.cut(self)

    def release(self) -> None:
        """Let go what was held back."""
        self.outgoing.is_held = False

    def hurry(self) -> None:
        """Let what is posted from now on arrive at once."""
        self.outgoing.delay = 0.0

    def die(self) -> None:
        """Be gone with the process: nobody here is told."""
        self._is_down = True
        self.is_up = False
        self.answers.items.clear()

    def close(self, *, linger: bool = False) -> None:
        """Close; the peer gets DOWN after all that was posted. Idempotent."""
        del linger  # nothing is tried again here
        if not self.is_open:
            return
        self.is_open = False
        self.is_up = False
        self.domain.queue_pairs.remove(self)
        if self.device.forked:
            return
        self.network.forget_queue_pair(self)
        peer, was_down = self.peer, self._is_down
        self.mailboxes.clear()
        if peer is None or was_down:
            self.outgoing.items.clear()
            self._gone()
            return
        # What was posted before still arrives, whoever held it back.
        self.outgoing.is_held = False
        self.network.post(self.outgoing, "close", lambda: self._peer_sees_close(peer))

    def _peer_sees_close(self, peer: SimQueuePair) -> None:
        self._gone()
        peer.outgoing.items.clear()
        peer.go_down(Status.PEER_GONE, "the peer closed its queue pair")

    def _gone(self) -> None:
        self.network.forget_stream(self.outgoing)


class SimDevice(Device):
    """A device of a simulated network."""

    fabric = "sim"
    eid: str | None = None

    def __init__(self, network: SimNetwork, peer_id: bytes) -> None:
        if len(peer_id) != 8:
            text = f"a peer ID of {len(peer_id)} bytes; it has 8"
            raise ValueError(text)
        self.network = network
        self.peer_id = peer_id
        self.mac = peer_id[2:]
        self.gid = b"\xfe\x80" + bytes(6) + peer_id
        self.mtu_code = 3
        self.domains: list[SimDomain] = []
        self._process = os.getpid()
        self._completions: list[Completion] = []
        self._indexes = 0
        self._bell = -1
        self._armed = False
        self._open = True
        self.is_gone = False
        """Whether it was taken away: nothing can be had from it any more."""
        self.tampers: list[Tamper] = []
        """What changes its completions."""

    def __str__(self) -> str:
        return self.peer_id.hex()

    @property
    def forked(self) -> bool:
        """Whether we are a child of the process that opened this device."""
        return os.getpid() != self._process

    def refuse_if_forked(self) -> None:
        """Refuse in a child what belongs to the parent.

        Raises:
            ForkedError: We are a forked child.
        """
        if self.forked:
            text = "this simulated device was opened before fork()"
            raise ForkedError(text)

    def new_index(self) -> int:
        """Number the queue pairs of this device from 1."""
        self._indexes += 1
        return self._indexes

    def complete(self, completion: Completion) -> None:
        """Have `poll` return a completion."""
        if self.tampers:
            tamper = self.tampers[0]
            self._completions += tamper.change(completion)
            if tamper.is_over:
                del self.tampers[0]
        else:
            self._completions.append(completion)
        if self._armed:
            os.eventfd_write(self._bell, 1)

    def create_domain(self) -> SimDomain:
        """Create a domain; see `Device.create_domain`."""
        self.refuse_if_forked()
        if not self._open:
            text = "the simulated device is closed"
            raise LocalProtocolError(text)
        self.network.allocate("domain", self)
        domain = SimDomain(self)
        self.domains.append(domain)
        return domain

    def poll(self) -> list[Completion]:
        """Take what has completed; see `Device.poll`."""
        self.refuse_if_forked()
        completions, self._completions = self._completions, []
        self._silence()
        return completions

    def _silence(self) -> None:
        if self._bell >= 0:
            try:
                os.eventfd_read(self._bell)
            except BlockingIOError:
                return  # it had not rung

    def pending(self) -> bool:
        """Look for completions; see `Device.pending`."""
        self.refuse_if_forked()
        return bool(self._completions)

    def arm(self) -> bool:
        """Ask for `fileno` to become readable; see `Device.arm`."""
        self.fileno()
        if self._completions:
            return False
        self._silence()
        self._armed = True
        return True

    def disarm(self) -> None:
        """Say that we are awake; see `Device.disarm`."""
        self.refuse_if_forked()
        self._armed = False

    def fileno(self) -> int:
        """Tell the descriptor that rings; see `Device.fileno`."""
        self.refuse_if_forked()
        if self._bell < 0:
            try:
                self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except OSError as exc:
                operation = "create a doorbell"
                name = Status.NO_MEMORY.name
                raise FabricError(operation, name, str(exc)) from exc
        return self._bell

    def close(self) -> None:
        """Close every domain and the device. Idempotent."""
        if not self._open:
            return
        self._open = False
        for domain in list(self.domains):
            domain.close()
        if not self.forked:
            self.network.forget_device(self)
        self._armed = False
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1
