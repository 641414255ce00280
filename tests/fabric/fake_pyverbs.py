"""Imitations of pyverbs' classes, as far as the binding uses them.

They take what the real ones take, complain as those do, and write down what was asked.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from types import SimpleNamespace
from typing import Any, ClassVar

__all__ = ["PyverbsError", "PyverbsRDMAError", "modules"]

CALLS: list[tuple[Any, ...]] = []
"""What was asked of objects that say nothing."""
FAILURES: dict[str, deque[int]] = {}
"""Errnos of the next calls of an operation; -1 is an error without one."""


class PyverbsError(Exception):
    """Base of what pyverbs raises."""


class PyverbsRDMAError(PyverbsError):
    """A function of the library failed."""

    def __init__(self, text: str, error_code: int = -1) -> None:
        super().__init__(text)
        self.error_code = error_code


def call(name: str, *arguments: Any) -> None:
    """Write a call down, and fail if that was asked for."""
    CALLS.append((name, *arguments))
    if FAILURES.get(name):
        raise PyverbsRDMAError(name, FAILURES[name].popleft())


def new_descriptor() -> int:
    """Open a descriptor with the name that the library's have."""
    return os.memfd_create("infinibandevent")


class Closable:
    """What is closed by hand, once or more."""

    is_open = True

    def close(self) -> None:
        """Destroy it."""
        if self.is_open:
            call(f"close {type(self).__name__}")
            self.is_open = False


class Context(Closable):
    """An open device."""

    def __init__(self, name: str) -> None:
        call("open", name)
        self.event_fd = new_descriptor()
        self.cmd_fd = os.open(os.devnull, os.O_RDWR)
        self.events: deque[int] = deque()

    def query_device(self) -> Any:
        """Tell the limits."""
        call("query_device")
        return SimpleNamespace(max_qp_wr=1000, max_cqe=2000)

    def get_async_event(self) -> Any:
        """Take an event."""
        call("get_async_event")
        assert not os.get_blocking(self.event_fd)
        if not self.events:
            text = "Failed to get async event"
            raise PyverbsRDMAError(text)
        number = self.events.popleft()
        return SimpleNamespace(event_type=number, ack=lambda: call("ack", number))

    def close(self) -> None:
        """Close it, and its descriptors."""
        was_open = self.is_open
        super().close()
        if was_open:
            os.close(self.event_fd)
            os.close(self.cmd_fd)


class CompChannel(Closable):
    """A completion channel."""

    def __init__(self, context: Context) -> None:
        call("channel")
        assert context.is_open
        self.descriptor = new_descriptor()
        self.events = 0

    def get_cq_event(self, expected_cq: CQ) -> None:
        """Take a notification."""
        call("get_cq_event")
        assert expected_cq.channel is self
        if not self.events:
            text = "Failed to get CQ event"
            raise PyverbsRDMAError(text, errno.EAGAIN)
        self.events -= 1

    def close(self) -> None:
        """Destroy it."""
        was_open = self.is_open
        super().close()
        if was_open:
            os.close(self.descriptor)


class CQ(Closable):
    """A completion queue."""

    def __init__(
        self,
        context: Context,
        cqe: int,
        cq_context: object,
        channel: CompChannel,
        comp_vector: int,
    ) -> None:
        call("queue", cqe, comp_vector)
        assert cq_context is None
        assert context.is_open
        self.channel = channel
        self.found: list[Any] = []

    def poll(self, num_entries: int = 1) -> tuple[int, list[Any]]:
        """Take completions."""
        call("poll", num_entries)
        taken, self.found = self.found[:num_entries], self.found[num_entries:]
        return len(taken), taken

    def req_notify(self, solicited_only: bool = False) -> None:
        """Arm it."""
        call("req_notify", solicited_only)

    def ack_events(self, num_events: int) -> None:
        """Acknowledge notifications."""
        call("ack_events", num_events)


class PD(Closable):
    """A protection domain."""

    def __init__(self, context: Context) -> None:
        call("domain")
        assert context.is_open


class MR(Closable):
    """Registered memory."""

    lkey, rkey = 7, 8

    def __init__(self, domain: PD, length: int, access: int, address: int) -> None:
        call("register", length, access, address)
        assert domain.is_open


class GID:
    """A GID."""

    def __init__(self, text: str) -> None:
        assert [len(word) for word in text.split(":")] == [4] * 8
        self.text = text


class SGE:
    """Where bytes are."""

    made: ClassVar[list[SGE]] = []

    def __init__(self, addr: int, length: int, lkey: int) -> None:
        self.addr, self.length, self.lkey = addr, length, lkey
        self.freed = 0
        self.made.append(self)

    def close(self) -> None:
        """Free it; the second time would be an error of memory."""
        self.freed += 1


class RecvWR:
    """A receive."""

    made: ClassVar[list[RecvWR]] = []

    def __init__(
        self, wr_id: int = 0, num_sge: int = 0, sg: Any = None, next_wr: Any = None
    ) -> None:
        assert num_sge == len(sg) == 1
        self.wr_id, self.next_wr = wr_id, next_wr
        self.place = (sg[0].addr, sg[0].length, sg[0].lkey)
        self.freed = 0
        self.made.append(self)

    def close(self) -> None:
        """Free it."""
        self.freed += 1


class SendWR:
    """A send."""

    made: ClassVar[list[SendWR]] = []

    def __init__(self, opcode: int, num_sge: int, sg: Any, send_flags: int) -> None:
        assert num_sge == len(sg) == 1
        self.opcode, self.send_flags, self.num_sge = opcode, send_flags, num_sge
        self.wr_id = 0
        self.sg_list: SGE | None = None
        self.next_wr: SendWR | None = None
        self.rdma = (0, 0)
        self.freed = 0
        self.made.append(self)

    def set_wr_rdma(self, rkey: int, addr: int) -> None:
        """Say where a write goes."""
        self.rdma = (rkey, addr)

    def as_posted(self) -> list[tuple[int, ...]]:
        """Read the chain that begins here, as the library would."""
        chain: list[tuple[int, ...]] = []
        request: SendWR | None = self
        while request is not None:
            sge = request.sg_list
            assert sge is not None
            data = (sge.addr, sge.length, sge.lkey) if request.num_sge else (0, 0, 0)
            head = (request.wr_id, request.opcode, request.send_flags)
            rkey, address = request.rdma if request.opcode == 0 else (0, 0)
            chain.append((*head, *data, address, rkey))
            request = request.next_wr
        return chain

    def close(self) -> None:
        """Free it, with the SGE that it looks at."""
        self.freed += 1
        assert self.sg_list is not None
        self.sg_list.close()


class QP(Closable):
    """A queue pair."""

    def __init__(self, domain: PD, init_attr: Any) -> None:
        call("pair", vars(init_attr.cap))
        assert domain.is_open
        assert init_attr.scq is init_attr.rcq
        assert (init_attr.qp_type, init_attr.sq_sig_all) == (2, 0)
        self.qp_num = 0x123

    def modify(self, attributes: Any, mask: int) -> None:
        """Go to another state."""
        call("modify", vars(attributes), mask)

    def query(self, mask: int) -> tuple[Any, None]:
        """Tell the state."""
        call("query", mask)
        return SimpleNamespace(qp_state=6), None

    def post_send(self, request: SendWR) -> None:
        """Post a chain."""
        call("post_send", request.as_posted())

    def post_recv(self, wr: RecvWR) -> None:
        """Post a chain."""
        chain = []
        request: RecvWR | None = wr
        while request is not None:
            chain.append((request.wr_id, *request.place))
            request = request.next_wr
        call("post_recv", chain)


def modules() -> dict[str, Any]:
    """Make what `import pyverbs.…` would give, by name; forgets what was before."""
    for made in (CALLS, FAILURES, SGE.made, RecvWR.made, SendWR.made):
        made.clear()
    plain = SimpleNamespace
    return {
        "addr": plain(GID=GID, GlobalRoute=plain, AHAttr=plain),
        "cq": plain(CompChannel=CompChannel, CQ=CQ),
        "device": plain(Context=Context),
        "mr": plain(MR=MR),
        "pd": plain(PD=PD),
        "pyverbs_error": plain(PyverbsError=PyverbsError),
        "qp": plain(QP=QP, QPCap=plain, QPInitAttr=plain, QPAttr=plain),
        "wr": plain(SGE=SGE, RecvWR=RecvWR, SendWR=SendWR),
    }
