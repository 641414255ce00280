"""Queue pairs of the verbs fabric that are closed: what each may still do, how long."""

from __future__ import annotations

import errno
import select
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.errors import FabricError
from pysmc.fabric import verbs, verbs_closing
from pysmc.fabric.base import CompletionKind, Status
from pysmc.fabric.verbs_pair import VerbsQueuePair
from pysmc.testing.conformance_bench import KIB, Writer
from tests.fabric.fake_verbs import ERROR, RESET, RTS, Roce

if TYPE_CHECKING:
    from pysmc.fabric.verbs import VerbsDevice


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock for what is being closed, which goes only by hand."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(verbs_closing, "time", clock)
    return clock


def pass_time(device: VerbsDevice) -> None:
    """Let a device see that time has passed, whatever its timer waits for."""
    assert device._closing is not None
    device._closing._timer.set(0.0)
    assert select.select([device.fileno()], [], [], 10)[0]
    device.arm()
    device.poll()


# What has something to say


def test_a_sleeping_loop_is_woken_for_a_peer_that_takes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verbs, "REST_SECONDS", 0.01)
    roce = Roce(close_wait=0.02)
    links = [roce.bench.link() for _ in range(2)]
    device = roce.devices[0]
    roce.bench.settle()
    roce.world.is_held = True
    for near, _ in links:
        near.queue_pair.close()
    opened = roce.libraries[0].open
    while opened["pair"]:
        # Arming looks too, and may have destroyed the last one itself.
        if device.arm() and opened["pair"]:
            assert select.select([device.fileno()], [], [], 10)[0]
        device.poll()
    roce.world.is_held = False
    roce.close()


def test_each_peer_that_takes_nothing_has_its_time(roce: Roce, clock: Any) -> None:
    """Two seconds to send, and four until none of its packets is left."""
    links = [roce.bench.link() for _ in range(2)]
    library, device = roce.libraries[0], roce.devices[0]
    roce.world.is_held = True
    pairs = []
    for (near, _), clock.now in zip(links, (100.0, 101.0), strict=True):
        pairs.append(roce.library_pair(near.queue_pair.number))
        near.queue_pair.close()
    first, second = pairs
    for clock.now, states, left in (
        (101.9, (RTS, RTS), 2),
        (102.1, (ERROR, RTS), 2),
        (103.1, (ERROR, ERROR), 2),
        (106.0, (ERROR, ERROR), 2),
        (106.2, (RESET, ERROR), 1),
        (107.2, (RESET, RESET), 0),
    ):
        assert device.is_finishing
        pass_time(device)
        assert (first.now, second.now) == states
        assert library.open["pair"] == left
    assert not device.is_finishing
    roce.world.is_held = False


# A peer that still had connections


@pytest.fixture
def linux(roce: Roce, clock: Any, monkeypatch: pytest.MonkeyPatch) -> VerbsQueuePair:
    """The far end of a link whose near one is closed: it heeds no goodbye."""
    near, far = roce.bench.link()
    assert isinstance(far.queue_pair, VerbsQueuePair)
    monkeypatch.setattr(far.queue_pair, "_received_empty", lambda: None)
    near.queue_pair.close(linger=True)
    near.domain.close()
    roce.bench.settle()
    return far.queue_pair


def say(peer: VerbsQueuePair, roce: Roce) -> None:
    """Let a peer send something, and the device see it."""
    peer.post_send(b"abort")
    peer.flush()
    roce.devices[0].arm()
    roce.devices[0].poll()


def test_a_peer_with_connections_is_acknowledged_until_it_is_silent(
    roce: Roce, clock: Any, linux: VerbsQueuePair
) -> None:
    library, device = roce.libraries[0], roce.devices[0]
    for clock.now, is_left in ((100.2, 1), (100.4, 1), (100.8, 0)):
        pass_time(device)
        assert library.open["pair"] == is_left
        assert device.is_finishing == is_left
        if clock.now == 100.2:
            say(linux, roce)
    linux.close()


def test_a_peer_that_is_never_silent_is_not_waited_for(
    roce: Roce, clock: Any, linux: VerbsQueuePair
) -> None:
    for fifth in range(1, 25):
        clock.now = 100 + fifth / 5
        pass_time(roce.devices[0])
        say(linux, roce)
        assert roce.libraries[0].open["pair"] == 1
    clock.now = 105.01
    pass_time(roce.devices[0])
    assert roce.libraries[0].open["pair"] == 0
    linux.close()


def test_a_peer_is_not_silent_because_the_loop_was_busy(
    roce: Roce, clock: Any, linux: VerbsQueuePair
) -> None:
    """It spoke in time, and goes on; the device looks only when its time is over."""
    linux.post_send(b"abort")
    linux.flush()
    roce.world.run()
    for clock.now, is_left in ((100.4, 1), (100.8, 0)):
        pass_time(roce.devices[0])
        assert roce.libraries[0].open["pair"] == is_left
    linux.close()


def test_a_question_gives_a_peer_the_time_in_which_it_waits_for_the_answer(
    roce: Roce, clock: Any, linux: VerbsQueuePair
) -> None:
    linux.post_send(b"\x29\x2c\x00\x00 DELETE RKEY, a request")
    linux.flush()
    for clock.now, is_left in ((100.1, 1), (102.5, 1), (102.7, 0)):
        pass_time(roce.devices[0])
        assert roce.libraries[0].open["pair"] == is_left
    linux.close()


def test_a_device_is_closed_when_such_a_peer_is_silent(
    roce: Roce, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs_closing, "LINGER_SECONDS", 0.05)
    near, far = roce.bench.link()
    assert isinstance(far.queue_pair, VerbsQueuePair)
    monkeypatch.setattr(far.queue_pair, "_received_empty", lambda: None)
    near.queue_pair.close(linger=True)
    since = time.monotonic()
    roce.devices[0].close()
    assert 0.04 < time.monotonic() - since < 1.5
    assert roce.libraries[0].is_closed
    far.queue_pair.close()


def test_an_interrupt_spares_the_wait_alone(
    roce: Roce, linux: VerbsQueuePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = roce.devices[0]

    def interrupt() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(device, "arm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        device.close()
    assert roce.libraries[0].open["pair"] == 0
    assert roce.libraries[0].is_closed
    linux.close()


# What failed


def test_what_failed_is_stopped_at_once_and_destroyed_later(
    roce: Roce, clock: Any
) -> None:
    """Destroying it would wait for packets in the queue of a neighbour."""
    near, far = roce.bench.link()
    other, beside = roce.bench.link()
    library, device = roce.libraries[0], roce.devices[0]
    region = near.domain.register(16 * KIB)
    pair = roce.library_pair(near.queue_pair.number)
    roce.world.is_held = True
    near.queue_pair.post_send(b"never taken")
    near.queue_pair.flush()
    assert pair.posted
    assert isinstance(near.queue_pair, VerbsQueuePair)
    near.queue_pair.go_down(Status.TIMED_OUT, "as the test says")
    assert (pair.now, len(pair.posted)) == (ERROR, 0)
    roce.world.is_held = False
    roce.bench.await_one(near, CompletionKind.DOWN)
    rkey = region.rkey_on(near.queue_pair)
    region.close()
    near.queue_pair.close()
    near.queue_pair.close()
    near.domain.close()
    device.poll()
    assert library.open["pair"] == 2
    # The device keeps hold of what a peer was writing.
    assert rkey in library.memory
    other.queue_pair.post_send(b"still here")
    roce.bench.await_one(beside, CompletionKind.RECEIVE)
    clock.now += 4.1
    pass_time(device)
    assert library.open["pair"] == 1
    assert rkey not in library.memory
    assert not device.is_finishing
    far.queue_pair.close()


def test_links_that_fail_one_after_the_other_hold_no_more_than_the_limit(
    monkeypatch: pytest.MonkeyPatch, roce: Roce, clock: Any
) -> None:
    """What rests is registered, and no connection is charged for it."""
    monkeypatch.setattr(verbs_closing, "CLOSING_MAX", 3)
    device = roce.devices[0]
    for _ in range(3):
        near, far = roce.bench.link()
        assert isinstance(near.queue_pair, VerbsQueuePair)
        near.queue_pair.go_down(Status.TIMED_OUT, "as the test says")
        near.queue_pair.close()
        near.domain.close()
        far.queue_pair.close()
    domain = device.create_domain()
    with pytest.raises(FabricError, match="closed ones") as caught:
        domain.create_queue_pair()
    assert caught.value.status == Status.NO_MEMORY.name
    clock.now += 4.1
    pass_time(device)
    domain.create_queue_pair().close()
    assert roce.libraries[0].open["pair"] == 0
    domain.close()


def test_memory_of_a_domain_that_goes_on_waits_for_what_failed(
    roce: Roce, clock: Any
) -> None:
    near, far = roce.bench.link()
    library = roce.libraries[0]
    region, live = near.domain.register(16 * KIB), near.domain.register(16 * KIB)
    rkeys = [each.rkey_on(near.queue_pair) for each in (region, live)]
    assert isinstance(near.queue_pair, VerbsQueuePair)
    near.queue_pair.go_down(Status.TIMED_OUT, "as the test says")
    region.close()
    near.queue_pair.close()
    assert all(rkey in library.memory for rkey in rkeys)
    clock.now += 4.1
    pass_time(roce.devices[0])
    assert [rkey in library.memory for rkey in rkeys] == [False, True]
    live.close()
    assert rkeys[1] not in library.memory
    far.queue_pair.close()


def test_a_device_that_failed_rests_before_it_is_closed(roce: Roce, clock: Any) -> None:
    near, _ = roce.bench.link()
    device = roce.devices[0]
    roce.world.is_held = True
    near.queue_pair.post_send(b"never taken")
    near.queue_pair.flush()
    device.fail("as the test says")
    roce.world.is_held = False
    assert [done.kind for done in device.poll()] == [CompletionKind.DOWN]
    near.domain.close()
    assert (device.is_gone, device.is_finishing) == (True, True)
    assert device.arm()
    clock.now += 4.1
    pass_time(device)
    assert (device.is_gone, device.is_finishing) == (True, False)
    assert roce.libraries[0].open["pair"] == 0


def test_what_cannot_be_stopped_is_destroyed_all_the_same(
    roce: Roce, clock: Any
) -> None:
    near, far = roce.bench.link()
    roce.libraries[0].fail("to_error", errno.EIO)
    assert isinstance(near.queue_pair, VerbsQueuePair)
    near.queue_pair.go_down(Status.TIMED_OUT, "as the test says")
    near.queue_pair.close()
    clock.now += 4.1
    pass_time(roce.devices[0])
    assert roce.libraries[0].open["pair"] == 0
    far.queue_pair.close()


def test_what_its_peer_has_closed_is_destroyed_at_once(roce: Roce) -> None:
    """Its acknowledgement of the goodbye has to go out, and it has nothing to say."""
    near, far = roce.bench.link()
    pair = roce.library_pair(near.queue_pair.number)
    far.queue_pair.close()
    roce.bench.await_one(near, CompletionKind.DOWN)
    assert pair.now == RTS
    near.queue_pair.close()
    assert roce.libraries[0].open["pair"] == 0


def test_what_is_left_of_a_queue_pair_is_nobodys(roce: Roce) -> None:
    """Its completions stay in the queue; its number may be given out again."""
    near, far = roce.bench.link()
    roce.world.is_held = True
    near.queue_pair.post_send(b"old")
    near.queue_pair.flush()
    pair = roce.library_pair(near.queue_pair.number)
    pair.to_error()
    assert isinstance(near.queue_pair, VerbsQueuePair)
    near.queue_pair.go_down(Status.PEER_GONE, "as the test says", stop=False)
    near.queue_pair.close()
    roce.world.numbers = iter([pair.number, *range(5000, 5100)])
    end = roce.bench.end(roce.bench.a)
    assert end.queue_pair.number == pair.number
    roce.world.is_held = False
    roce.bench.settle()
    assert not near.side.of(CompletionKind.DOWN, end.queue_pair)
    assert not near.side.of(CompletionKind.CONNECTED, end.queue_pair)
    assert len(near.side.of(CompletionKind.DOWN, near.queue_pair)) == 1
    far.queue_pair.close()


# The end of the device


def test_closing_does_not_wait_for_a_peer_that_takes_nothing() -> None:
    roce = Roce(close_wait=0.01)
    near, _ = roce.bench.link()
    roce.world.is_held = True
    near.queue_pair.post_send(b"never taken")
    roce.devices[0].close()
    assert roce.libraries[0].is_closed
    roce.world.is_held = False
    roce.close()


def test_closing_the_device_lets_peers_have_what_was_posted(roce: Roce) -> None:
    near, far = roce.bench.link()
    region = far.domain.register(16 * KIB)
    writer = Writer(near, region, far.queue_pair)
    writer.write(0, b"last words")
    writer.publish(producer=10)
    roce.devices[0].close()
    found = roce.bench.b
    found.poll()
    kinds = [item.kind for item in found.seen if item.queue_pair is far.queue_pair]
    assert kinds[1:] == [CompletionKind.UPDATE, CompletionKind.DOWN]


class SlowWire:
    """An epoll during whose waits everything is carried out."""

    def __init__(self, roce: Roce) -> None:
        self.roce = roce
        epoll = roce.devices[0]._epoll
        assert epoll is not None
        self.epoll = epoll
        self.waits: list[float] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.epoll, name)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        if timeout:
            self.waits.append(timeout)
            self.roce.world.is_held = False
        return self.epoll.poll(0)


def test_closing_the_device_gives_a_slow_wire_its_time(
    roce: Roce, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = roce.bench.link()
    wire = SlowWire(roce)
    monkeypatch.setattr(roce.devices[0], "_epoll", wire)
    roce.world.is_held = True
    near.queue_pair.post_send(b"last words")
    roce.devices[0].close()
    assert wire.waits[0] > 1
    assert len(wire.waits) == 1, "and no more than that"
    roce.bench.b.poll()
    kinds = [item.kind for item in far.side.seen if item.queue_pair is far.queue_pair]
    assert kinds[1:] == [CompletionKind.RECEIVE, CompletionKind.DOWN]
