"""The one file that calls pyverbs."""

from __future__ import annotations

import errno
import os
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.errors import FabricError
from pysmc.fabric import verbs_api as api
from pysmc.fabric import verbs_binding
from pysmc.fabric.verbs_api import SEND_CHAIN, SendRequest, VerbsError
from pysmc.fabric.verbs_binding import open_verbs
from pysmc.fabric.verbs_descriptors import NewDescriptors
from pysmc.fabric.verbs_loading import Pyverbs, find_pyverbs, load
from tests.fabric import fake_pyverbs
from tests.fabric.fake_pyverbs import CALLS, FAILURES, RecvWR, SendWR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pysmc.fabric.verbs_api import CompletionQueue, DomainHandle, QueuePairHandle

pytestmark = pytest.mark.usefixtures("forget")


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    modules = fake_pyverbs.modules()
    monkeypatch.setattr(
        verbs_binding,
        "find_pyverbs",
        lambda: Pyverbs("/somewhere", "44", "cpython-311-x86_64-linux-gnu", ""),
    )
    monkeypatch.setattr(verbs_binding, "load", lambda _: modules)
    verbs: Any = open_verbs("rxe0")
    readable = {verbs.event_fd: verbs.context.events}
    monkeypatch.setattr(verbs_binding, "_is_readable", lambda fd: bool(readable[fd]))
    yield verbs
    FAILURES.clear()
    if verbs.context.is_open:
        verbs.close()
    assert not verbs.raw, "something could be collected in a child"


@pytest.fixture
def domain(verbs: Any) -> Iterator[DomainHandle]:
    domain = verbs.create_domain()
    yield domain
    FAILURES.clear()
    domain.close()


@pytest.fixture
def queue(verbs: Any) -> Iterator[CompletionQueue]:
    queue = verbs.create_completion_queue(100)
    yield queue
    FAILURES.clear()
    queue.close()


@pytest.fixture
def pair(domain: DomainHandle, queue: CompletionQueue) -> Iterator[QueuePairHandle]:
    pair = domain.create_queue_pair(queue, 128, 64, 48)
    yield pair
    FAILURES.clear()
    pair.close()


def last(name: str) -> tuple[Any, ...]:
    """Give the arguments of the last call of an operation."""
    return next(each[1:] for each in reversed(CALLS) if each[0] == name)


def fail(name: str, *numbers: int) -> None:
    """Have the next calls of an operation fail."""
    FAILURES[name] = deque(numbers)


def test_an_open_device(verbs: Any) -> None:
    assert last("open") == ("rxe0",)
    assert verbs.limits == (1000, 2000)
    assert verbs.event_fd == verbs.context.event_fd
    assert not os.get_blocking(verbs.event_fd)


def test_events_are_acknowledged(verbs: Any) -> None:
    assert verbs.take_event() is None
    verbs.context.events.append(10)
    assert verbs.take_event() == 10
    assert verbs.take_event() is None, "which pyverbs tells as if all were lost"
    assert last("ack") == (10,)
    verbs.context.events.append(10)
    fail("get_async_event", errno.EAGAIN)
    assert verbs.take_event() is None, "another one took it"
    fail("get_async_event", errno.EIO)
    with pytest.raises(VerbsError, match="take an event: EIO"):
        verbs.take_event()


def test_a_descriptor_says_whether_there_is_something() -> None:
    here, there = os.pipe()
    assert not verbs_binding._is_readable(here)
    os.write(there, b"x")
    assert verbs_binding._is_readable(here)
    os.close(here)
    os.close(there)


def test_a_completion_queue_has_a_channel(verbs: Any, queue: Any) -> None:
    assert last("queue") == (100, 0)
    assert queue.fd == queue.queue.channel.descriptor
    assert not os.get_blocking(queue.fd)
    assert not queue.take_event()
    queue.queue.channel.events = 2
    assert queue.take_event()
    assert queue.take_event()
    queue.request_notify()
    assert last("req_notify") == (False,)
    queue.queue.found = [1, 2, 3]
    assert queue.poll(2) == [1, 2]
    assert verbs.fds.count(queue.fd) == 1


def test_notifications_are_acknowledged_in_the_end(verbs: Any) -> None:
    queue = verbs.create_completion_queue(10)
    queue._channel.events = 2
    queue.take_event()
    queue.take_event()
    queue.close()
    names = [each[0] for each in CALLS]
    assert last("ack_events") == (2,)
    assert names[-3:] == ["ack_events", "close CQ", "close CompChannel"]


@pytest.mark.parametrize(
    ("operation", "method", "words"),
    [
        ("poll", lambda queue: queue.poll(1), "poll: EIO"),
        ("req_notify", lambda queue: queue.request_notify(), "a notification: EIO"),
        ("get_cq_event", lambda queue: queue.take_event(), "a notification: EIO"),
    ],
)
@pytest.mark.parametrize("number", [errno.EIO, -errno.EIO, -1])
def test_a_completion_queue_may_fail(
    queue: Any, operation: str, method: Any, words: str, number: int
) -> None:
    fail(operation, number)
    with pytest.raises(VerbsError, match=words) as caught:
        method(queue)
    assert caught.value.errno == errno.EIO
    assert caught.value.name == "EIO"


def test_a_channel_goes_with_the_queue_that_cannot_be_had(verbs: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fail("queue", errno.ENOMEM)
    with pytest.raises(VerbsError, match="create a completion queue of 5: ENOMEM"):
        verbs.create_completion_queue(5)
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_descriptors_it_says_so_and_holds_nobody_up(
    verbs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: str) -> list[str]:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", none_left)
        with pytest.raises(VerbsError, match="list the descriptors: EMFILE"):
            verbs.create_completion_queue(5)
        with pytest.raises(FabricError, match="EMFILE: list the descriptors") as caught:
            open_verbs("rxe0")
    assert caught.value.status == "NO_MEMORY"
    assert not NewDescriptors.lock.locked()
    verbs.create_completion_queue(5).close()


def test_memory_is_registered_at_its_address(verbs: Any, domain: Any) -> None:
    memory = domain.register(0x1000, 4096, 3)
    assert last("register") == (4096, 3, 0x1000)
    assert (memory.lkey, memory.rkey) == (7, 8)
    memory.close()
    fail("register", errno.ENOMEM)
    with pytest.raises(VerbsError, match="register 4096 bytes: ENOMEM"):
        domain.register(0x1000, 4096, 3)
    assert len(verbs.raw) == 2  # device and domain


def test_receives_are_made_once_and_posted_by_the_block(domain: Any, pair: Any) -> None:
    blocks = domain.receive_blocks(0x10000, 0x1000, 8, 4, 7)
    pair.post_receives(blocks, 1)
    expected = [
        (slot | api.RECEIVE_BIT, 0x10000 + slot * 0x1000, 0x1000, 7)
        for slot in range(4, 8)
    ]
    assert last("post_recv") == (expected,)
    fail("post_recv", errno.ENOMEM)
    with pytest.raises(VerbsError, match="post receives: ENOMEM"):
        pair.post_receives(blocks, 0)
    made = list(RecvWR.made)
    blocks.close()
    blocks.close()
    assert [each.freed for each in made] == [1] * 8


def requests(count: int) -> list[SendRequest]:
    """Make requests of each kind."""
    made = []
    for n in range(count):
        write = n % 2 == 0
        opcode = api.WR_RDMA_WRITE if write else api.WR_SEND
        rest = (0x2000 + n, n) if write else (0, 0)
        data = (0x100 + n, n, 7) if n % 3 else (0, 0, 0)
        made.append(SendRequest(n + 1, opcode, n % 16, *data, *rest))
    return made


def test_chains_of_every_length_end_where_they_should(pair: Any) -> None:
    for count in (SEND_CHAIN, 1, 3, SEND_CHAIN - 1, 2):
        posted = requests(count)
        pair.post_send(posted)
        end = posted[-1]
        posted[-1] = end._replace(flags=end.flags | api.SEND_SIGNALED)
        assert last("post_send") == ([tuple(request) for request in posted],)
    assert len(SendWR.made) == SEND_CHAIN  # none was made for a post
    fail("post_send", errno.ENOMEM)
    with pytest.raises(VerbsError, match="post sends: ENOMEM"):
        pair.post_send(requests(1))


def test_a_queue_pair_has_the_attributes_of_the_protocol(pair: Any) -> None:
    assert pair.number == 0x123
    wanted = {"max_send_wr": 128, "max_recv_wr": 64, "max_inline_data": 48}
    assert last("pair") == (wanted,)
    pair.to_init(1)
    attributes, mask = last("modify")
    assert mask == 0b111001
    expected = {"qp_state": 1, "port_num": 1, "pkey_index": 0, "qp_access_flags": 3}
    assert attributes == expected
    gid = bytes.fromhex("00000000000000000000ffff0a000002")
    pair.to_rtr(api.Path(1, 5, gid, 3, 64), 0x77, 0x1234)
    attributes, mask = last("modify")
    way = attributes.pop("ah_attr")
    assert (way.is_global, way.port_num) == (1, 1)
    assert way.gr.dgid.text == "0000:0000:0000:0000:0000:ffff:0a00:0002"
    assert (way.gr.sgid_index, way.gr.hop_limit) == (5, 64)
    assert attributes == {
        "qp_state": 2,
        "path_mtu": 3,
        "dest_qp_num": 0x77,
        "rq_psn": 0x1234,
        "max_dest_rd_atomic": 1,
        "min_rnr_timer": 12,
    }
    assert mask == 1 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 15 | 1 << 17 | 1 << 20
    pair.to_rts(0x4321)
    attributes, mask = last("modify")
    assert attributes == {
        "qp_state": 3,
        "timeout": 15,
        "retry_cnt": 6,  # soft-RoCE takes 7 for endless
        "rnr_retry": 7,
        "sq_psn": 0x4321,
        "max_rd_atomic": 1,
    }
    assert mask == 1 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16
    assert pair.state() == api.STATE_ERROR


@pytest.mark.parametrize(
    ("operation", "method", "words"),
    [
        ("modify", lambda pair: pair.to_init(1), "to INIT: ETIMEDOUT"),
        ("modify", lambda pair: pair.to_rts(1), "to RTS: ETIMEDOUT"),
        ("query", lambda pair: pair.state(), "query a queue pair: ETIMEDOUT"),
    ],
)
def test_a_queue_pair_may_fail(
    pair: Any, operation: str, method: Any, words: str
) -> None:
    fail(operation, errno.ETIMEDOUT)
    with pytest.raises(VerbsError, match=words):
        method(pair)


def test_a_queue_pair_is_stopped(pair: Any) -> None:
    pair.to_error()
    assert last("modify") == ({"qp_state": 6}, 1)
    fail("modify", errno.EINVAL)
    with pytest.raises(VerbsError, match="take a queue pair to ERROR: EINVAL"):
        pair.to_error()


def test_a_device_may_take_nothing_inline(domain: Any, queue: Any) -> None:
    fail("pair", errno.EINVAL)
    pair = domain.create_queue_pair(queue, 10, 10, 48)
    assert pair.inline_bytes == 0
    pair.close()
    fail("pair", errno.EINVAL)
    with pytest.raises(VerbsError, match="create a queue pair: EINVAL"):
        domain.create_queue_pair(queue, 10, 10, 0)
    fail("pair", errno.ENOMEM)
    with pytest.raises(VerbsError, match="create a queue pair: ENOMEM"):
        domain.create_queue_pair(queue, 10, 10, 48)


def test_everything_is_closed_once(verbs: Any) -> None:
    domain = verbs.create_domain()
    domain.close()
    verbs.close()
    assert [each.freed for each in SendWR.made] == [1] * SEND_CHAIN
    assert {each.freed for each in fake_pyverbs.SGE.made} == {1}
    assert [each[0] for each in CALLS][-2:] == ["close PD", "close Context"]


def test_a_child_keeps_the_objects_and_closes_the_descriptors(
    verbs: Any, queue: Any
) -> None:
    fds = [verbs.event_fd, verbs.context.cmd_fd, queue.fd]
    kept = verbs.context
    before = sys.getrefcount(kept)
    child = os.fork()
    if child == 0:
        verbs.abandon()
        good = sys.getrefcount(kept) == before + 1
        for fd in fds:
            try:
                os.fstat(fd)
            except OSError:
                continue
            good = False
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for fd in fds:
        os.fstat(fd)


# The real one, where it is


@pytest.fixture
def real_wr() -> Any:
    found = find_pyverbs()
    if found.problem:
        pytest.skip(f"needs python3-pyverbs: {found.problem}")
    return load(Path(found.path))["wr"]


def test_the_real_requests_can_be_used_again(real_wr: Any) -> None:
    chain = verbs_binding._SendChain(real_wr)
    for count in (1, SEND_CHAIN, 2):
        first = chain.fill(requests(count))
        assert (first.wr_id, first.opcode) == (1, api.WR_RDMA_WRITE)
        filled = [request for request, _ in chain._requests[-count:]]
        assert [each.wr_id for each in filled] == list(range(1, count + 1))
        assert [each.num_sge for each in filled] == [
            1 if each.length else 0 for each in requests(count)
        ]
    chain.close()
    blocks = verbs_binding._ReceiveBlocks(real_wr, 0x1000, (64, 8, 4), 7)
    assert [head.wr_id & 0xFF for head in blocks.heads] == [0, 4]
    blocks.close()


def test_the_real_one_has_what_is_used(real_wr: Any) -> None:
    modules = load(Path(find_pyverbs().path))
    used = {
        "device": ("Context.get_async_event", "Context.cmd_fd", "AsyncEvent.ack"),
        "cq": ("CompChannel.get_cq_event", "CQ.poll", "CQ.req_notify", "CQ.ack_events"),
        "qp": ("QP.modify", "QP.query", "QP.post_send", "QP.post_recv", "QP.qp_num"),
        "mr": ("MR.lkey", "MR.rkey"),
        "wr": ("SendWR.sg_list", "SendWR.set_wr_rdma", "RecvWR.wr_id", "SGE.close"),
    }
    for module, names in used.items():
        for name in names:
            kind, attribute = name.split(".")
            assert hasattr(getattr(modules[module], kind), attribute), name
    assert real_wr is modules["wr"]
