"""A queue pair of the verbs fabric: how it comes up, posts, receives and goes down.

Two things the contract promises and RDMA does not have are made of what it has:

* **Connected** means that both ends are. A queue pair is ready to send as soon as we
  say so, whether there is a peer or not. So the passive end begins with an empty SEND,
  and is connected when that was acknowledged. The active end answers it with an empty
  RDMA WRITE, which no program sees, and is connected when that was acknowledged; or by
  the peer's first message. A kernel's SMC reads no SEND as short as this, and its
  first message connects our active end.
* **DOWN** at the peer's close: who closes sends an empty SEND behind all that was
  posted, and destroys the queue pair when that was acknowledged, or nobody answers.

What is posted is gathered to a chain, which `flush` gives to the device in one call.
Only the last request of a chain asks for a completion: it tells of all before it. What
finds no room in the send queue or in staging waits, in order, and goes as completions
come.

Source: RFC 7609 section 4.5; InfiniBand Architecture Specification 1.4, section 10.3.1
(states of a queue pair); kernel counterparts: smc_ib.c, smc_wr.c (a message shorter
than its header is dropped in smc_wr_rx_demultiplex()).
"""

from __future__ import annotations

import errno
import ipaddress
import logging
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final

from pysmc.errors import FabricError, ForkedError, LocalProtocolError
from pysmc.fabric.base import (
    Completion,
    CompletionKind,
    QueuePair,
    RemoteQueuePair,
    Status,
    Update,
)
from pysmc.fabric.verbs_api import (
    RECEIVE_BIT,
    SEND_CHAIN,
    SEND_INLINE,
    SEND_SOLICITED,
    STATE_ERROR,
    WC_RECEIVE,
    WR_RDMA_WRITE,
    WR_SEND,
    Path,
    RequestTuple,
    VerbsError,
)
from pysmc.fabric.verbs_memory import (
    PIECE_BYTES,
    RECEIVE_BLOCK,
    RECEIVE_BYTES,
    Staging,
)
from pysmc.fabric.verbs_status import FLUSHED, describe, status_of

if TYPE_CHECKING:
    from pysmc.fabric.verbs import VerbsDevice
    from pysmc.fabric.verbs_api import QueuePairHandle, WorkCompletion
    from pysmc.fabric.verbs_domain import VerbsDomain
    from pysmc.fabric.verbs_memory import ReceiveSlab

__all__ = ["INLINE_BYTES", "MESSAGES_WAITING_MAX", "SENDS", "VerbsQueuePair"]

_log = logging.getLogger(__name__)

SENDS: Final = 128
"""Requests of a queue pair that the device has at once."""
INLINE_BYTES: Final = 64
"""Requests up to this length are copied by the post, which spares the device a look."""
MESSAGES_WAITING_MAX: Final = 1024
"""SENDs that wait for room, updates aside."""
HOP_LIMIT: Final = 64
_SEND_BYTES_MAX: Final = 1100
_SLOT_MASK: Final = RECEIVE_BIT - 1
_NOT_A_PUBLISH: Final = -1
_NO_WAY: Final = frozenset(
    {
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EINVAL,
        errno.EADDRNOTAVAIL,
    }
)
"""What the way to a peer may fail with when a queue pair goes to RTR."""


class _State(Enum):
    IDLE = "idle"
    RESOLVING = "resolving"  # the way to the peer is looked for
    WAITING = "waiting"  # for the peer's first SEND, or that it takes ours
    PROBING = "probing"  # active: the peer is there; does it take what we send?
    UP = "up"
    DOWN = "down"
    CLOSING = "closing"  # what was posted before our close is still on its way
    RESTING = "resting"  # closed; of what it sent, packets may be left
    CLOSED = "closed"
    FORKED = "forked"  # we are a child of the process that has it


_SENDING: Final = {_State.WAITING, _State.PROBING, _State.UP}
_OVER: Final = {_State.DOWN, _State.CLOSING, _State.RESTING, _State.CLOSED}

# Looked up once: a member of an Enum is found by a Python call.
_UP, _WAITING, _PROBING = _State.UP, _State.WAITING, _State.PROBING
_UPDATE, _PUBLISH = CompletionKind.UPDATE, CompletionKind.PUBLISH
_SUCCESS = Status.SUCCESS


class VerbsQueuePair(QueuePair):
    """One end of a link.

    Args:
        domain: Its owner.
        handle: Of the verbs library, in INIT, with all receives posted.
        receives: Where they go to.
        staging: Where posts lie until they complete.
    """

    def __init__(
        self,
        domain: VerbsDomain,
        handle: QueuePairHandle,
        receives: ReceiveSlab,
        staging: Staging,
    ) -> None:
        self.domain = domain
        self.device: VerbsDevice = domain.device
        self.number = handle.number
        self.is_up = False
        self.receives = receives
        self.staging = staging
        self.is_stopped = False
        """Nothing is sent or received any more."""
        self._handle = handle
        self._state = _State.IDLE
        self._remote: RemoteQueuePair | None = None
        self._psn = 0
        self._passive = False
        self._awaited = 0
        """The post whose completion connects us."""
        self._goodbye = 0
        """The post whose completion ends our close."""
        self._lingers = False
        """Whether the peer has more to say after our close."""
        self._was_asked = False
        self._chain: list[RequestTuple] = []
        self._posted = 0
        """Requests that were numbered, those of the chain among them."""
        self._completed = 0
        self._publishes: deque[tuple[int, int]] = deque()
        """Number of the request and wr_id of what has not completed."""
        self._waiting: deque[tuple[int, memoryview | bytes, int, int, int]] = deque()
        """Opcode, bytes, rkey, address, wr_id of what found no room."""
        self._messages_waiting = 0
        """SENDs among these that are no updates."""
        self._codec = domain.device.codec
        self._end = "the queue pair is closed"
        """What ended it, in words."""

    def __str__(self) -> str:
        return f"{self.device} queue pair {self.number}"

    # --- coming up -----------------------------------------------------------------

    def connect(self, remote: RemoteQueuePair, psn: int, *, passive: bool) -> None:
        """Begin to connect; see `QueuePair.connect`."""
        if self._state is not _State.IDLE:
            self._refuse_if_forked()
            if self._remote is None:
                operation = "connect"
                raise FabricError(operation, Status.UNREACHABLE.name, self._end)
            text = f"queue pair {self.number} was connected before"
            raise LocalProtocolError(text)
        self._remote, self._psn, self._passive = remote, psn, passive
        self._state = _State.RESOLVING
        self.device.find_way(self, remote.gid)

    def resolved(self, is_reachable: bool, text: str) -> None:  # noqa: FBT001
        """Go on when the device knows whether there is a way to the peer."""
        if self._state is not _State.RESOLVING:
            return
        remote, port = self._remote, self.device.port
        assert remote is not None
        if not is_reachable:
            self.go_down(_status_without_way(port.gid, remote.gid), text)
            return
        mtu_code = min(remote.mtu_code, self.device.mtu_code)
        path = Path(port.port, port.gid_index, remote.gid, mtu_code, HOP_LIMIT)
        try:
            self._handle.to_rtr(path, remote.number, remote.psn)
            self._handle.to_rts(self._psn)
        except VerbsError as exc:
            known = exc.errno in _NO_WAY
            status = Status.NO_ROUTE if known else Status.NO_MEMORY
            self.go_down(status, exc.strerror or str(exc))
            return
        self._state = _WAITING
        if self._passive:
            self._awaited = self._post_empty(WR_SEND)

    def _post_empty(self, opcode: int) -> int:
        """Post a request without bytes; tell its number. Nothing waits before it."""
        self._post(opcode, b"", 0, 0, _NOT_A_PUBLISH)
        self.flush_chain()
        return self._posted

    def _connected(self) -> None:
        self._state = _UP
        self.is_up = True
        self.device.complete(Completion(CompletionKind.CONNECTED, self))

    # --- posts ---------------------------------------------------------------------

    def _cannot_post(self) -> None:
        """Refuse what may not be posted; return where posts do nothing."""
        self._refuse_if_forked()
        if self._state in _OVER:
            return
        text = f"queue pair {self.number} is not connected"
        raise LocalProtocolError(text)

    def _refuse_if_forked(self) -> None:
        if self._state is _State.FORKED:
            text = "this verbs device was opened before fork(); open one in the child"
            raise ForkedError(text)

    def post_send(self, payload: bytes) -> None:
        """SEND; see `QueuePair.post_send`."""
        if self._state is not _UP:
            self._cannot_post()
            return
        if not 1 <= len(payload) <= _SEND_BYTES_MAX:
            text = f"a SEND of {len(payload)} bytes; 1 to {_SEND_BYTES_MAX} possible"
            raise LocalProtocolError(text)
        self._post(WR_SEND, bytes(payload), 0, 0, _NOT_A_PUBLISH)

    def post_write(self, rkey: int, address: int, data: memoryview | bytes) -> None:
        """Write; see `QueuePair.post_write`."""
        if self._state is not _UP:
            self._cannot_post()
            return
        size = len(data)
        if size <= PIECE_BYTES:
            if size:
                self._post(WR_RDMA_WRITE, data, rkey, address, _NOT_A_PUBLISH)
            return
        with memoryview(data) as view:
            for start in range(0, size, PIECE_BYTES):
                if self._state is not _UP:
                    return  # a post failed
                piece = view[start : start + PIECE_BYTES]
                at = address + start & 0xFFFF_FFFF_FFFF_FFFF
                self._post(WR_RDMA_WRITE, piece, rkey, at, _NOT_A_PUBLISH)
                piece.release()

    def publish(
        self,
        rkey: int,  # noqa: ARG002  # an update travels as a SEND
        wr_id: int,
        sequence: int,
        alert_token: int,
        producer: int,
        consumer: int,
        flags: int,
    ) -> bool:
        """Publish; see `QueuePair.publish`. It always completes later."""
        if self._state is not _UP:
            self._cannot_post()
            return False
        data = self._codec.pack(sequence, alert_token, producer, consumer, flags)
        self._post(WR_SEND, data, 0, 0, wr_id)
        return False

    def _post(
        self, opcode: int, data: memoryview | bytes, rkey: int, address: int, wr_id: int
    ) -> None:
        """Put a request into the chain, or behind those that wait."""
        if self._waiting or not self._place(opcode, data, rkey, address, wr_id):
            self._wait(opcode, bytes(data), rkey, address, wr_id)

    def _wait(
        self, opcode: int, data: bytes, rkey: int, address: int, wr_id: int
    ) -> None:
        """Keep a request until there is room.

        Writes and updates are bounded by who writes. Messages may be answers, and a
        peer that takes none can ask for as many as it likes.
        """
        if opcode == WR_SEND and wr_id < 0 and data:
            self._messages_waiting += 1
            if self._messages_waiting > MESSAGES_WAITING_MAX:
                text = f"the peer took none of {MESSAGES_WAITING_MAX + SENDS} SENDs"
                self.go_down(Status.TIMED_OUT, text)
                return
        self._waiting.append((opcode, data, rkey, address, wr_id))

    def _place(
        self, opcode: int, data: memoryview | bytes, rkey: int, address: int, wr_id: int
    ) -> bool:
        """Put a request into the chain; False when there is no room now."""
        number = self._posted + 1
        if number - self._completed > SENDS:
            return False
        size = len(data)
        if size:
            place = self.staging.place(data, size, number)
            if place is None:
                return False
            local, lkey = place
        else:
            local = lkey = 0
        flags = SEND_SOLICITED if opcode == WR_SEND else 0
        if 0 < size <= self._handle.inline_bytes:
            flags |= SEND_INLINE
        self._posted = number
        chain = self._chain
        if not chain:
            self.device.dirty[self] = None
        chain.append((number, opcode, flags, local, size, lkey, address, rkey))
        if wr_id >= 0:
            self._publishes.append((number, wr_id))
        if len(chain) == SEND_CHAIN:
            self.flush_chain()
        return True

    def flush(self) -> None:
        """Give the device what was posted; see `QueuePair.flush`."""
        if self._chain:
            self.flush_chain()
        elif self._state is _State.FORKED:
            self._refuse_if_forked()

    def flush_chain(self) -> None:
        """Give the chain to the device; its last request asks for a completion."""
        chain = self._chain
        if not chain:
            return
        self._chain = []
        try:
            self._handle.post_send(chain)
        except VerbsError as exc:
            self.go_down(Status.FLUSHED, f"a post failed: {exc.strerror}")

    # --- completions ---------------------------------------------------------------

    def take(self, done: WorkCompletion) -> None:
        """Take a completion of this queue pair."""
        wr_id = done.wr_id
        if done.status:
            self._failed(done.status, done.vendor_err)
        elif wr_id & RECEIVE_BIT:
            self._received(wr_id & _SLOT_MASK, done)
        else:
            self._sent(wr_id)

    def _failed(self, number: int, vendor_error: int) -> None:
        if self._state is _State.CLOSING:
            self.give_up()
            return
        if self._state in _OVER:
            return  # whatever was posted is flushed, and the first one told of it
        status, text = status_of(number), describe(number, vendor_error)
        if number == FLUSHED or status is Status.TIMED_OUT:
            problem = self.device.blame_port()  # which may be what is behind it
            if problem:
                status, text = Status.PEER_GONE, problem
        if status is Status.TIMED_OUT and not self.is_up:
            status = Status.NO_ROUTE
        self.go_down(status, text)

    def _sent(self, number: int) -> None:
        self._completed = number
        self.staging.completed(number)
        publishes = self._publishes
        if publishes and publishes[0][0] <= number:
            is_told = self._state is _UP
            while publishes and publishes[0][0] <= number:
                wr_id = publishes.popleft()[1]
                if is_told:
                    self.device.complete(
                        Completion(_PUBLISH, self, _SUCCESS, wr_id, None)
                    )
        if self._waiting:
            self._post_waiting()
        state = self._state
        is_waiting = state is _WAITING or state is _PROBING
        if is_waiting and self._awaited and number >= self._awaited:
            self._connected()
        if self._goodbye and self.has_said_all:
            self._end_of_goodbye()

    @property
    def has_said_all(self) -> bool:
        """Whether it was closed, and everything before that was acknowledged."""
        is_closing = self._state is _State.CLOSING
        return is_closing and 0 < self._goodbye <= self._completed

    def _end_of_goodbye(self) -> None:
        if self._lingers:
            self.device.linger(self, was_asked=self._was_asked)
        else:
            self.device.forget_closing(self)

    def _post_waiting(self) -> None:
        waiting = self._waiting
        while waiting and self._place(*waiting[0]):
            if not waiting:
                return  # a post failed, which ended everything
            opcode, data, _, _, wr_id = waiting.popleft()
            if opcode == WR_SEND and wr_id < 0 and data:
                self._messages_waiting -= 1
        if not waiting and self._state is _State.CLOSING and not self._goodbye:
            self._goodbye = self._posted  # it was the last one
        self.flush_chain()

    def _received(self, slot: int, done: WorkCompletion) -> None:
        start = slot * RECEIVE_BYTES
        size, opcode = done.byte_len, done.opcode
        is_message = opcode == WC_RECEIVE and size <= RECEIVE_BYTES
        data = self.receives.memory[start : start + size] if is_message else b""
        if slot % RECEIVE_BLOCK == RECEIVE_BLOCK - 1:
            self._repost(slot // RECEIVE_BLOCK)
        state = self._state
        if not is_message:
            text = f"the peer used a receive for another thing (opcode {opcode:#x})"
            self.go_down(Status.BROKEN_RULE, text)
        elif not size:
            self._received_empty()
        else:
            if state is _WAITING or state is _PROBING:
                self._connected()
            if self._state is _UP:
                self._deliver(data)
            elif self._state is _State.CLOSING:
                self._was_asked |= self._codec.is_question(data)
                if self.has_said_all:
                    self._end_of_goodbye()  # which the peer has put off

    def _deliver(self, data: bytes) -> None:
        codec = self._codec
        if not codec.is_update(data):
            self.device.complete(
                Completion(CompletionKind.RECEIVE, self, _SUCCESS, 0, data)
            )
            return
        try:
            update = Update(*codec.unpack(data))
        except ValueError as exc:
            self.go_down(Status.BROKEN_RULE, f"the peer sent no update: {exc}")
            return
        self.device.complete(Completion(_UPDATE, self, _SUCCESS, 0, update))

    def _received_empty(self) -> None:
        """The peer waits for us at first; later it has closed."""
        match self._state:
            case _State.WAITING if not self._passive:
                self._state = _PROBING
                self._awaited = self._post_empty(WR_RDMA_WRITE)
            case _State.CLOSING:
                self.device.forget_closing(self)
            case _:
                # Its goodbye is not acknowledged yet, which nobody may prevent.
                text = "the peer closed its queue pair"
                self.go_down(Status.PEER_GONE, text, stop=False)

    def _repost(self, block: int) -> None:
        if self._state in {_State.DOWN, _State.RESTING, _State.CLOSED}:
            return
        try:
            self._handle.post_receives(self.receives.blocks, block)
        except VerbsError as exc:
            self.go_down(Status.FLUSHED, f"no receives can be posted: {exc.strerror}")

    # --- going down ----------------------------------------------------------------

    def go_down(self, status: Status, text: str, *, stop: bool = True) -> None:
        """Go down, once; a queue pair that was closed is done with.

        Args:
            status: Why.
            text: The same for people.
            stop: False lets the device go on with what it was given.
        """
        kind: CompletionKind | None = CompletionKind.CONNECTED
        match self._state:
            case _State.CLOSING:
                self.give_up()
                return
            case _State.DOWN | _State.RESTING | _State.CLOSED | _State.FORKED:
                return
            case _State.UP:
                kind = CompletionKind.DOWN
            case _State.IDLE:
                kind = None
        has_sent = self._state in _SENDING
        self._state, self._end = _State.DOWN, text
        self.is_up = False
        self._drop_posts()
        if stop and has_sent:
            self._stop()
        if kind is not None:
            self.device.complete(Completion(kind, self, status, payload=text))

    def _stop(self) -> None:
        """Send nothing again: else packets would come as long as tries are left."""
        self.is_stopped = True
        try:
            self._handle.to_error()
        except VerbsError as exc:
            _log.debug("%s could not be stopped: %s", self, exc)

    def give_up(self) -> None:
        """Send no longer what was posted before the close: nobody takes it."""
        if self._state is _State.CLOSING:
            self._goodbye = 0
            self._drop_posts()
            self._stop()
            self._rest()

    def _rest(self) -> None:
        self._state = _State.RESTING
        self.device.let_rest(self)

    def _drop_posts(self) -> None:
        self._chain = []
        self._waiting.clear()
        self._publishes.clear()

    def is_in_error(self) -> bool:
        """Ask the device whether it has ended the queue pair by itself."""
        try:
            return self._handle.state() == STATE_ERROR
        except VerbsError:
            return True

    def close(self, *, linger: bool = False) -> None:
        """Close; the peer gets DOWN after all that was posted. Idempotent."""
        state = self._state
        if state in {_State.CLOSING, _State.RESTING, _State.CLOSED, _State.FORKED}:
            return
        self.is_up = False
        self.domain.forget_queue_pair(self)
        if self.is_stopped:
            self._rest()
            return
        if state not in _SENDING:
            self.device.destroy(self)
            return
        self._state, self._lingers = _State.CLOSING, linger
        self.device.keep_closing(self)
        self._post(WR_SEND, b"", 0, 0, _NOT_A_PUBLISH)
        if not self._waiting:
            self._goodbye = self._posted
        self.flush_chain()

    def destroy(self) -> bool:
        """Destroy it in the verbs library. Only the device calls this.

        Returns:
            False when the library could not: the device may still have to do with it.
        """
        self._state = _State.CLOSED
        self._drop_posts()
        try:
            self._handle.close()
        except VerbsError as exc:
            _log.debug("%s could not be destroyed: %s", self, exc)
            return False
        return True

    def after_fork_in_child(self) -> None:
        """Belong to the parent from now on."""
        self._drop_posts()
        self.is_up = False
        self._state = _State.FORKED


def _status_without_way(ours: bytes, theirs: bytes) -> Status:
    """Tell whether a GID that cannot be reached could be that of a port at all."""
    mine, other = (ipaddress.IPv6Address(gid) for gid in (ours, theirs))
    if other.ipv4_mapped is None and (other.is_reserved or other.is_unspecified):
        return Status.UNREACHABLE
    is_of_our_kind = (mine.ipv4_mapped is None) == (other.ipv4_mapped is None)
    return Status.NO_ROUTE if is_of_our_kind else Status.UNREACHABLE
