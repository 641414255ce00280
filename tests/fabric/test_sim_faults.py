"""What goes wrong on the simulated fabric looks as it would on a real one."""

from __future__ import annotations

import pytest

from pysmc.errors import FabricError
from pysmc.fabric.base import CompletionKind, RemoteQueuePair, Status, Update
from pysmc.fabric.sim import SimNetwork, SimQueuePair
from pysmc.fabric.sim_faults import RETRY_SECONDS, VERBS

KIB = 1024
KIND = CompletionKind


def remote(pair: SimQueuePair, psn: int) -> RemoteQueuePair:
    device = pair.device
    return RemoteQueuePair(device.peer_id, device.gid, device.mac, pair.number, psn, 3)


def linked(network: SimNetwork) -> tuple[SimQueuePair, SimQueuePair]:
    near, far = (
        network.device(name).create_domain().create_queue_pair()
        for name in (b"device-A", b"device-B")
    )
    far.connect(remote(near, 1), 2, passive=True)
    near.connect(remote(far, 2), 1, passive=False)
    network.run_until_idle()
    near.device.poll()
    far.device.poll()
    return near, far


def rest(network: SimNetwork, seconds: float = 10 * RETRY_SECONDS) -> None:
    """Let everything happen that is due within some seconds."""
    end = network.now + seconds
    while True:
        network.run_until_idle()
        due = network.next_due()
        if due is None or due > end:
            return
        network.advance(max(0.0, due - network.now))


def kinds(pair: SimQueuePair) -> list[CompletionKind]:
    return [completion.kind for completion in pair.device.poll()]


def publish(near: SimQueuePair, far: SimQueuePair, *sequences: int) -> None:
    region = next(iter(far.domain.regions.values()), None)
    region = region or far.domain.register(16 * KIB)
    for sequence in sequences:
        near.publish(region.rkey_on(far), sequence, sequence, 9, 0, 0, 0)


def test_what_is_lost_takes_the_link_with_it() -> None:
    network = SimNetwork()
    near, far = linked(network)
    publish(near, far, 1, 2)
    near.post_send(b"behind it")
    network.faults.lose(near)
    near.post_send(b"later")
    network.run_until_idle()
    assert kinds(far) == []
    assert near.is_up, "the retries are not over"
    rest(network)
    assert kinds(near) == [KIND.DOWN], "no publish completed"
    assert kinds(far) == [KIND.DOWN]
    assert network.now >= RETRY_SECONDS


def test_what_is_posted_next_may_be_lost() -> None:
    network = SimNetwork()
    near, far = linked(network)
    network.faults.lose(near)
    near.post_send(b"x")
    rest(network)
    assert kinds(near) == [KIND.DOWN]
    assert kinds(far) == [KIND.DOWN]


def test_what_is_acknowledged_may_have_landed_nowhere() -> None:
    network = SimNetwork()
    near, far = linked(network)
    region = far.domain.register(16 * KIB)
    near.post_write(region.rkey_on(far), region.virtual_address, b"gone")
    network.faults.vanish(near)
    publish(near, far, 7)
    network.run_until_idle()
    assert kinds(near) == [KIND.PUBLISH]
    assert kinds(far) == []
    assert not any(region.view)
    rest(network)
    assert kinds(near) == [KIND.DOWN]
    assert kinds(far) == [KIND.DOWN]


def test_one_end_may_notice_a_cut_later() -> None:
    network = SimNetwork()
    near, far = linked(network)
    publish(near, far, 1)
    publish(far, near, 1)
    network.faults.cut(near, peer_later=5.0)
    assert kinds(near) == [KIND.DOWN]
    network.run_until_idle()
    assert kinds(far) == []
    rest(network)
    assert network.now == 5.0
    assert kinds(far) == [KIND.DOWN]


def test_a_post_to_who_is_down_ends_the_sender_too() -> None:
    network = SimNetwork()
    near, far = linked(network)
    network.faults.cut(near, peer_later=1000.0)
    publish(far, near, 1)
    far.post_send(b"x")
    network.run_until_idle()
    rest(network, 100)
    assert network.now == RETRY_SECONDS
    assert kinds(far) == [KIND.DOWN]


@pytest.mark.parametrize("verb", ["send", "write", "publish"])
def test_a_post_that_fails_ends_the_link(verb: str) -> None:
    network = SimNetwork()
    near, far = linked(network)
    region = far.domain.register(16 * KIB)
    network.faults.fail_verb(verb, 2)
    posts = {
        "send": lambda: near.post_send(b"x"),
        "write": lambda: near.post_write(
            region.rkey_on(far), region.virtual_address, b"x"
        ),
        "publish": lambda: publish(near, far, 1),
    }
    posts[verb]()
    assert not near.is_dead
    posts[verb]()
    rest(network)
    assert kinds(near)[-1] is KIND.DOWN
    assert kinds(far)[-1] is KIND.DOWN


def test_a_connect_that_fails_is_told_by_its_completion() -> None:
    network = SimNetwork()
    near, far = (
        network.device(name).create_domain().create_queue_pair()
        for name in (b"device-A", b"device-B")
    )
    network.faults.fail_verb("connect", 1, Status.UNREACHABLE)
    near.connect(remote(far, 2), 1, passive=False)
    network.run_until_idle()
    (completion,) = near.device.poll()
    assert (completion.kind, completion.status) == (KIND.CONNECTED, Status.UNREACHABLE)


@pytest.mark.parametrize("verb", ["domain", "queue pair", "region"])
def test_an_allocation_that_fails_raises(verb: str) -> None:
    network = SimNetwork()
    device = network.device(b"device-A")
    domain = device.create_domain()
    make = {
        "domain": device.create_domain,
        "queue pair": domain.create_queue_pair,
        "region": lambda: domain.register(16 * KIB),
    }[verb]
    network.faults.fail_verb(verb, 2)
    make()
    assert not network.faults.hits, "it lies in wait, and has hit nobody"
    with pytest.raises(FabricError, match=verb):
        make()
    assert network.faults.hits == {verb: 1}
    make()


def test_there_is_no_other_verb() -> None:
    with pytest.raises(ValueError, match=VERBS[0]):
        SimNetwork().faults.fail_verb("read")


def test_completions_are_lost_and_doubled() -> None:
    network = SimNetwork()
    near, far = linked(network)
    network.faults.lose_completion(near.device, 2)
    network.faults.double_completion(near.device)
    assert not network.faults.hits
    publish(near, far, 1, 2)
    network.run_until_idle()
    assert network.faults.hits == {"lose completion": 1}
    publish(near, far, 3, 4)
    network.run_until_idle()
    assert [completion.wr_id for completion in near.device.poll()] == [3, 3, 4]
    assert network.faults.hits == {"lose completion": 1, "double completion": 1}


@pytest.mark.parametrize(("later", "expected"), [(0, [1, 1, 2, 3]), (2, [1, 2, 3, 1])])
def test_an_update_may_come_twice(later: int, expected: list[int]) -> None:
    network = SimNetwork()
    near, far = linked(network)
    network.faults.double_update(far.device, later)
    publish(near, far, 1, 2, 3)
    network.run_until_idle()
    told = [completion.payload.sequence for completion in far.device.poll()]
    assert told == expected
    assert network.faults.hits == {"repeat update" if later else "double update": 1}


def test_what_is_repeated_later_has_happened_only_then() -> None:
    network = SimNetwork()
    near, far = linked(network)
    network.faults.double_update(far.device, 2)
    publish(near, far, 1, 2)
    network.run_until_idle()
    assert not network.faults.hits


def test_a_device_may_tell_what_nobody_posted() -> None:
    network = SimNetwork()
    near, _ = linked(network)
    network.faults.stray_completion(near, 77)
    network.faults.stray_update(near, Update(1, 2, 3, 4, 5))
    done, update = near.device.poll()
    assert (done.kind, done.wr_id) == (KIND.PUBLISH, 77)
    assert (update.kind, update.payload.alert_token) == (KIND.UPDATE, 2)


def test_a_pause_and_a_slow_time_end() -> None:
    network = SimNetwork()
    near, far = linked(network)
    network.faults.pause(near, 3.0)
    near.post_send(b"a")
    network.run_until_idle()
    assert kinds(far) == []
    rest(network)
    assert kinds(far) == [KIND.RECEIVE]
    network.faults.slow_down(near, 0.5, 4.0)
    near.post_send(b"b")
    network.run_until_idle()
    assert kinds(far) == []
    rest(network)
    near.post_send(b"c")
    network.run_until_idle()
    assert kinds(far) == [KIND.RECEIVE] * 2


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_device_that_is_gone(is_noticed: bool) -> None:
    network = SimNetwork()
    near, far = linked(network)
    network.faults.remove(near.device, is_noticed=is_noticed)
    network.run_until_idle()
    assert kinds(near) == ([KIND.DOWN] if is_noticed else [])
    with pytest.raises(FabricError, match="gone"):
        near.device.create_domain()
    rest(network)
    assert kinds(far) == [], "nobody told it"
    far.post_send(b"hello?")
    rest(network)
    assert kinds(far) == [KIND.DOWN]


def test_no_trace_when_none_is_wanted() -> None:
    network = SimNetwork()
    network.tracing = False
    linked(network)
    assert network.trace == []


def test_a_link_that_is_down_is_not_cut_again() -> None:
    network = SimNetwork()
    near, far = linked(network)
    network.faults.vanish(near)
    network.faults.cut(near)
    rest(network)
    assert kinds(near) == [KIND.DOWN]
    assert kinds(far) == [KIND.DOWN]
