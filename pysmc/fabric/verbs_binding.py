"""The only file that calls pyverbs, which `pysmc.fabric.verbs_loading` finds; tames it.

Versions 44 to 59 of rdma-core serve alike: enums moved between them, so the numbers are
our own, and what only newer ones have (`CompChannel.fd`) is found in another way.

Three things that pyverbs does to its user, and what is done here:

* `SGE`, `RecvWR` and `SendWR` never free what they allocate. They are made once, used
  again and again, and freed by hand.
* A ``next_wr`` that was set cannot be taken back. So the requests of a device form one
  fixed chain, and a shorter one begins nearer to its end.
* Objects destroy what they stand for when they are collected: in a forked child that
  would be the parent's. There they are made immortal.

Source: rdma-core, `pyverbs/*.pyx` and `infiniband/verbs.h`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Final

from pysmc.errors import FabricUnavailable
from pysmc.fabric.verbs_api import (
    ACCESS_LOCAL_WRITE,
    ACCESS_REMOTE_WRITE,
    RECEIVE_BIT,
    SEND_CHAIN,
    SEND_SIGNALED,
    STATE_ERROR,
    WR_SEND,
    Limits,
    Path,
    RequestTuple,
    VerbsError,
)
from pysmc.fabric.verbs_descriptors import with_descriptor
from pysmc.fabric.verbs_loading import find_pyverbs, load
from pysmc.fabric.verbs_ports import raise_shortage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pysmc.fabric.verbs_api import CompletionQueue, ReceiveBlocks, Verbs

__all__ = ["open_verbs"]

VERBS: Final = "/sys/class/infiniband_verbs"
NODES: Final = "/dev/infiniband"

_QPT_RC: Final = 2
_STATE_INIT, _STATE_RTR, _STATE_RTS = 1, 2, 3
_MASK_STATE: Final = 1 << 0
_MASK_INIT: Final = _MASK_STATE | 1 << 3 | 1 << 4 | 1 << 5
"""Access flags, partition, port."""
_MASK_RTR: Final = _MASK_STATE | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 15 | 1 << 17 | 1 << 20
"""Way, MTU, peer's PSN, RNR timer, reads of the peer, peer's number."""
_MASK_RTS: Final = _MASK_STATE | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16
"""Time-out, retries, RNR retries, reads of ours, our PSN."""

TIMEOUT: Final = 15
"""4.096 us << 15 = 134 ms for an acknowledgement, as the kernel's SMC has it."""
RETRIES: Final = 6
"""Then a peer is gone, after about a second. Soft-RoCE takes 7 for endless."""
RNR_RETRIES: Final = 7
"""Endless: a peer whose program is busy has no receives for a while, and is not gone;
one that is stuck for ever does not answer TEST LINK."""
RNR_TIMER: Final = 12
"""0.64 ms until our peer tries again when we had no receive."""


# Opening


def open_verbs(name: str) -> Verbs:
    """Open an RDMA device.

    Args:
        name: As in /sys/class/infiniband.

    Raises:
        FabricUnavailable: No pyverbs, no such device, no permission.
        FabricError: Status ``NO_MEMORY``: no descriptors, or no memory.
    """
    operation = "open the verbs fabric"
    found = find_pyverbs()
    if found.problem:
        raise FabricUnavailable(operation, "UNAVAILABLE", found.problem)
    modules = load(FilePath(found.path))
    try:
        return _Verbs(modules, name)
    except VerbsError as exc:
        raise_shortage(exc, operation)
        why = _forbidden(name) or exc.strerror
        text = f"RDMA device {name} cannot be opened: {why}"
        raise FabricUnavailable(operation, "UNAVAILABLE", text) from exc


def _forbidden(name: str) -> str:
    """Name the device's file if we may not use it: the library says "no such file"."""
    for place in FilePath(VERBS).glob("uverbs*"):
        with contextlib.suppress(OSError):
            if (place / "ibdev").read_text(encoding="ascii").strip() != name:
                continue
            node = f"{NODES}/{place.name}"
            if os.path.exists(node) and not os.access(node, os.R_OK | os.W_OK):
                return f"no permission for {node}"
    return ""


# What an open device consists of


class _Verbs:
    """An open device; see `pysmc.fabric.verbs_api.Verbs`."""

    def __init__(self, modules: dict[str, Any], name: str) -> None:
        self.modules = modules
        self.error: type[Exception] = modules["pyverbs_error"].PyverbsError
        self.raw: dict[int, Any] = {}
        """By identity, every object that must not be collected in a forked child."""
        self.fds: list[int] = []
        with self.translated(f"open {name}"):
            self.context, self.event_fd = with_descriptor(
                lambda: modules["device"].Context(name=name)
            )
        self.own(self.context)
        self.fds += [self.event_fd, self.context.cmd_fd]
        os.set_blocking(self.event_fd, False)
        with self.translated("query the device"):
            attributes = self.context.query_device()
        self.limits = Limits(attributes.max_qp_wr, attributes.max_cqe)
        self.chain = _SendChain(modules["wr"])

    @contextlib.contextmanager
    def translated(self, operation: str) -> Iterator[None]:
        """Turn what pyverbs raises into `VerbsError`."""
        try:
            yield
        except self.error as exc:
            raise self.failure(exc, operation) from exc

    def failure(self, exc: Exception, operation: str) -> VerbsError:
        """Make the error for an exception of pyverbs."""
        number = getattr(exc, "error_code", -1)
        # Some functions give their errno negative, a few none at all.
        number = abs(number) if number not in {0, -1} else errno.EIO
        return VerbsError(number, operation)

    def own(self, made: Any) -> Any:
        """Keep an object from being collected before it is closed."""
        self.raw[id(made)] = made
        return made

    def disown(self, closed: Any) -> None:
        """End `own`, after the object was closed."""
        del self.raw[id(closed)]

    def take_event(self) -> int | None:
        """See `Verbs.take_event`."""
        # Where there is none, pyverbs raises without an errno, as if all were lost.
        if not _is_readable(self.event_fd):
            return None
        try:
            event = self.context.get_async_event()
        except self.error as exc:
            failure = self.failure(exc, "take an event")
            if failure.errno in {errno.EAGAIN, errno.EINTR}:
                return None
            raise failure from exc
        number: int = event.event_type
        event.ack()  # else the object that it is about could not be destroyed
        return number

    def create_completion_queue(self, entries: int) -> _CompletionQueue:
        """See `Verbs.create_completion_queue`."""
        return _CompletionQueue(self, entries)

    def create_domain(self) -> _Domain:
        """See `Verbs.create_domain`."""
        return _Domain(self)

    def close(self) -> None:
        """See `Verbs.close`."""
        self.chain.close()
        with self.translated("close the device"):
            self.context.close()
        self.disown(self.context)

    def abandon(self) -> None:
        """See `Verbs.abandon`."""
        for kept in self.raw.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)


def _is_readable(descriptor: int) -> bool:
    looking = select.poll()
    looking.register(descriptor, select.POLLIN)
    return bool(looking.poll(0))


class _SendChain:
    """Work requests that point to each other, for ever; a post takes the last n."""

    def __init__(self, wr: Any) -> None:
        self._requests: list[tuple[Any, Any]] = []
        following = None
        for _ in range(SEND_CHAIN):
            sge = wr.SGE(0, 0, 0)
            request = wr.SendWR(opcode=WR_SEND, num_sge=1, sg=[sge], send_flags=0)
            # From here on it looks at the SGE itself, and frees it in the end.
            request.sg_list = sge
            if following is not None:
                request.next_wr = following
            following = request
            self._requests.insert(0, (request, sge))

    def fill(self, requests: Sequence[RequestTuple]) -> Any:
        """Fill in the last ones; the first of them is what to post."""
        mine = self._requests[-len(requests) :]
        for (request, sge), (
            wr_id,
            opcode,
            flags,
            local_address,
            length,
            lkey,
            remote_address,
            rkey,
        ) in zip(mine, requests, strict=True):
            request.wr_id = wr_id
            request.opcode = opcode
            request.send_flags = flags
            if length:
                sge.addr = local_address
                sge.length = length
                sge.lkey = lkey
                request.num_sge = 1
            else:
                request.num_sge = 0
            if opcode != WR_SEND:
                request.set_wr_rdma(rkey, remote_address)
        mine[-1][0].send_flags = flags | SEND_SIGNALED
        return mine[0][0]

    def close(self) -> None:
        """Free them, once."""
        for request, _ in self._requests:
            request.close()
        self._requests.clear()


class _CompletionQueue:
    """See `pysmc.fabric.verbs_api.CompletionQueue`."""

    def __init__(self, verbs: _Verbs, entries: int) -> None:
        cq = verbs.modules["cq"]
        self._verbs = verbs
        with verbs.translated("create a completion channel"):
            self._channel, self.fd = with_descriptor(
                lambda: cq.CompChannel(verbs.context)
            )
        verbs.own(self._channel)
        try:
            os.set_blocking(self.fd, False)
            with verbs.translated(f"create a completion queue of {entries}"):
                self.queue = cq.CQ(verbs.context, entries, None, self._channel, 0)
        except VerbsError:
            self._channel.close()
            verbs.disown(self._channel)
            raise
        verbs.own(self.queue)
        verbs.fds.append(self.fd)
        self._taken = 0
        self._poll = self.queue.poll

    def poll(self, count: int) -> Sequence[Any]:
        """See `CompletionQueue.poll`."""
        try:
            found: Sequence[Any] = self._poll(count)[1]
        except self._verbs.error as exc:
            raise self._verbs.failure(exc, "poll") from exc
        return found

    def request_notify(self) -> None:
        """See `CompletionQueue.request_notify`."""
        try:
            self.queue.req_notify(False)  # noqa: FBT003
        except self._verbs.error as exc:
            raise self._verbs.failure(exc, "request a notification") from exc

    def take_event(self) -> bool:
        """See `CompletionQueue.take_event`."""
        try:
            self._channel.get_cq_event(self.queue)
        except self._verbs.error as exc:
            failure = self._verbs.failure(exc, "take a notification")
            if failure.errno in {errno.EAGAIN, errno.EINTR}:
                return False
            raise failure from exc
        self._taken += 1
        return True

    def close(self) -> None:
        """See `CompletionQueue.close`."""
        verbs = self._verbs
        if self._taken:  # destroying waits until each was acknowledged
            self.queue.ack_events(self._taken)
            self._taken = 0
        with verbs.translated("destroy a completion queue"):
            self.queue.close()
        with verbs.translated("destroy a completion channel"):
            self._channel.close()
        verbs.disown(self.queue)
        verbs.disown(self._channel)
        verbs.fds.remove(self.fd)


class _Domain:
    """See `pysmc.fabric.verbs_api.DomainHandle`."""

    def __init__(self, verbs: _Verbs) -> None:
        self._verbs = verbs
        with verbs.translated("allocate a protection domain"):
            self.domain = verbs.own(verbs.modules["pd"].PD(verbs.context))

    def register(self, address: int, length: int, access: int) -> _Registration:
        """See `DomainHandle.register`."""
        return _Registration(self._verbs, self.domain, (address, length), access)

    def receive_blocks(
        self, address: int, slot_bytes: int, slots: int, block: int, lkey: int
    ) -> _ReceiveBlocks:
        """See `DomainHandle.receive_blocks`."""
        wr = self._verbs.modules["wr"]
        return _ReceiveBlocks(wr, address, (slot_bytes, slots, block), lkey)

    def create_queue_pair(
        self, queue: CompletionQueue, sends: int, receives: int, inline_bytes: int
    ) -> _QueuePair:
        """See `DomainHandle.create_queue_pair`."""
        assert isinstance(queue, _CompletionQueue)
        try:
            return _QueuePair(
                self._verbs, self.domain, queue.queue, (sends, receives, inline_bytes)
            )
        except VerbsError as exc:
            if exc.errno != errno.EINVAL or not inline_bytes:
                raise
        # It may be the inline bytes that are too many.
        return _QueuePair(self._verbs, self.domain, queue.queue, (sends, receives, 0))

    def close(self) -> None:
        """See `DomainHandle.close`."""
        with self._verbs.translated("free a protection domain"):
            self.domain.close()
        self._verbs.disown(self.domain)


class _Registration:
    """See `pysmc.fabric.verbs_api.Registration`."""

    def __init__(
        self, verbs: _Verbs, domain: Any, place: tuple[int, int], access: int
    ) -> None:
        self._verbs = verbs
        address, length = place
        with verbs.translated(f"register {length} bytes"):
            mr = verbs.modules["mr"].MR(domain, length, access, address=address)
        self._mr = verbs.own(mr)
        self.lkey: int = mr.lkey
        self.rkey: int = mr.rkey

    def close(self) -> None:
        """See `Registration.close`."""
        with self._verbs.translated("deregister memory"):
            self._mr.close()
        self._verbs.disown(self._mr)


class _ReceiveBlocks:
    """See `pysmc.fabric.verbs_api.ReceiveBlocks`."""

    def __init__(
        self, wr: Any, address: int, shape: tuple[int, int, int], lkey: int
    ) -> None:
        slot_bytes, slots, block = shape
        self.heads: list[Any] = [None] * (slots // block)
        self._requests: list[Any] = []
        sge = wr.SGE(address, slot_bytes, lkey)
        following = None
        for slot in reversed(range(slots)):
            sge.addr = address + slot * slot_bytes  # each request copies it
            request = wr.RecvWR(slot | RECEIVE_BIT, 1, [sge], following)
            self._requests.append(request)
            following = request
            if slot % block == 0:
                self.heads[slot // block] = request
                following = None
        sge.close()

    def close(self) -> None:
        """See `ReceiveBlocks.close`."""
        for request in self._requests:
            request.close()
        self._requests.clear()
        self.heads.clear()


class _QueuePair:
    """See `pysmc.fabric.verbs_api.QueuePairHandle`."""

    def __init__(
        self, verbs: _Verbs, domain: Any, queue: Any, sizes: tuple[int, int, int]
    ) -> None:
        qp = verbs.modules["qp"]
        sends, receives, inline_bytes = sizes
        capacity = qp.QPCap(
            max_send_wr=sends, max_recv_wr=receives, max_inline_data=inline_bytes
        )
        wanted = qp.QPInitAttr(
            qp_type=_QPT_RC, scq=queue, rcq=queue, cap=capacity, sq_sig_all=0
        )
        self._verbs = verbs
        self._qp_module = qp
        with verbs.translated("create a queue pair"):
            self._qp = qp.QP(domain, wanted)
        verbs.own(self._qp)
        self.number: int = self._qp.qp_num
        self.inline_bytes = inline_bytes
        self._post_send = self._qp.post_send

    def to_init(self, port: int) -> None:
        """See `QueuePairHandle.to_init`."""
        attributes = self._qp_module.QPAttr(qp_state=_STATE_INIT)
        attributes.port_num = port
        attributes.pkey_index = 0
        attributes.qp_access_flags = ACCESS_LOCAL_WRITE | ACCESS_REMOTE_WRITE
        self._modify(attributes, _MASK_INIT, "INIT")

    def to_rtr(self, path: Path, remote_number: int, remote_psn: int) -> None:
        """See `QueuePairHandle.to_rtr`."""
        addr = self._verbs.modules["addr"]
        attributes = self._qp_module.QPAttr(qp_state=_STATE_RTR)
        with self._verbs.translated("name the peer"):
            route = addr.GlobalRoute(
                dgid=addr.GID(path.remote_gid.hex(":", 2)),
                sgid_index=path.gid_index,
                hop_limit=path.hop_limit,
            )
            attributes.ah_attr = addr.AHAttr(gr=route, is_global=1, port_num=path.port)
        attributes.path_mtu = path.mtu_code
        attributes.dest_qp_num = remote_number
        attributes.rq_psn = remote_psn
        attributes.max_dest_rd_atomic = 1
        attributes.min_rnr_timer = RNR_TIMER
        self._modify(attributes, _MASK_RTR, "RTR")

    def to_rts(self, psn: int) -> None:
        """See `QueuePairHandle.to_rts`."""
        attributes = self._qp_module.QPAttr(qp_state=_STATE_RTS)
        attributes.timeout = TIMEOUT
        attributes.retry_cnt = RETRIES
        attributes.rnr_retry = RNR_RETRIES
        attributes.sq_psn = psn
        attributes.max_rd_atomic = 1
        self._modify(attributes, _MASK_RTS, "RTS")

    def to_error(self) -> None:
        """See `QueuePairHandle.to_error`."""
        attributes = self._qp_module.QPAttr(qp_state=STATE_ERROR)
        self._modify(attributes, _MASK_STATE, "ERROR")

    def _modify(self, attributes: Any, mask: int, state: str) -> None:
        with self._verbs.translated(f"take a queue pair to {state}"):
            self._qp.modify(attributes, mask)

    def state(self) -> int:
        """See `QueuePairHandle.state`."""
        with self._verbs.translated("query a queue pair"):
            state: int = self._qp.query(_MASK_STATE)[0].qp_state
        return state

    def post_send(self, requests: Sequence[RequestTuple]) -> None:
        """See `QueuePairHandle.post_send`."""
        try:
            self._post_send(self._verbs.chain.fill(requests))
        except self._verbs.error as exc:
            raise self._verbs.failure(exc, "post sends") from exc

    def post_receives(self, blocks: ReceiveBlocks, index: int) -> None:
        """See `QueuePairHandle.post_receives`."""
        assert isinstance(blocks, _ReceiveBlocks)
        try:
            self._qp.post_recv(blocks.heads[index])
        except self._verbs.error as exc:
            raise self._verbs.failure(exc, "post receives") from exc

    def close(self) -> None:
        """See `QueuePairHandle.close`."""
        with self._verbs.translated("destroy a queue pair"):
            self._qp.close()
        self._verbs.disown(self._qp)
