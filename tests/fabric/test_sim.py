"""The simulated network: the seed decides, and faults come when they are asked for."""

from __future__ import annotations

import os
import random
import select

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysmc.errors import FabricError, ForkedError, LocalProtocolError
from pysmc.fabric.base import (
    Completion,
    CompletionKind,
    RemoteQueuePair,
    Status,
    Update,
    UpdateCodec,
)
from pysmc.fabric.sim import SimDevice, SimNetwork, SimQueuePair
from smcproto import cdc

KIB = 1024
CODEC = UpdateCodec(cdc.pack, cdc.unpack, lambda data: data[:1] == b"\xfe")
KIND = CompletionKind


def remote(queue_pair: SimQueuePair, psn: int) -> RemoteQueuePair:
    device = queue_pair.device
    return RemoteQueuePair(
        device.peer_id, device.gid, device.mac, queue_pair.number, psn, 3
    )


def devices(network: SimNetwork) -> tuple[SimDevice, SimDevice]:
    return network.device(b"device-A"), network.device(b"device-B")


def introduce(near: SimQueuePair, far: SimQueuePair) -> None:
    far.connect(remote(near, 1), 2, passive=True)
    near.connect(remote(far, 2), 1, passive=False)


def linked(network: SimNetwork) -> tuple[SimQueuePair, SimQueuePair]:
    near, far = (
        device.create_domain().create_queue_pair() for device in devices(network)
    )
    introduce(near, far)
    network.run_until_idle()
    assert near.is_up
    assert far.is_up
    near.device.poll()
    far.device.poll()
    return near, far


def play(seed: int, *, newest_only: bool = False) -> tuple[list[str], list[str]]:
    """Post a lot on several links; tell the trace and what completed."""
    network = SimNetwork(seed, codec=CODEC, newest_only=newest_only)
    near, far = devices(network)
    rng = random.Random(99)
    domains = near.create_domain(), far.create_domain()
    links = []
    for _ in range(3):
        pair = domains[0].create_queue_pair(), domains[1].create_queue_pair()
        introduce(*pair)
        links.append(pair)
    network.run_until_idle()
    region = domains[1].register(16 * KIB)
    seen = []
    for count in range(200):
        mine, other = rng.choice(links)
        rkey = region.rkey_on(other)
        mine.post_write(rkey, region.virtual_address + count, b"x")
        mine.publish(rkey, count, count, 7, count, 0, 0)
        other.post_send(bytes([count % 100]))
        if rng.random() < 0.4:
            network.step()
        for completion in near.poll() + far.poll():
            pair_index = completion.queue_pair.number
            seen.append(f"{completion.kind} {pair_index} {completion.payload}")
    network.run_until_idle()
    seen += [f"{item.kind} {item.payload}" for item in near.poll() + far.poll()]
    return network.trace, seen


@pytest.mark.parametrize("newest_only", [False, True])
def test_the_same_seed_gives_the_same_trace(newest_only: bool) -> None:
    first, again = (play(5, newest_only=newest_only) for _ in range(2))
    assert first == again
    assert len(first[0]) > 300


def test_another_seed_gives_another_order() -> None:
    traces = {tuple(play(seed)[0]) for seed in range(4)}
    assert len(traces) == 4


def test_the_trace_reads_well() -> None:
    network = SimNetwork()
    near, _ = linked(network)
    network.advance(1.5)
    near.post_send(b"hello")
    network.step()
    assert network.trace[-1] == f"1.500000 {near} posts: SEND of 5 bytes"
    assert str(near) == f"{b'device-A'.hex()} qp 1"


def test_nothing_moves_by_itself() -> None:
    network = SimNetwork()
    near, far = linked(network)
    near.post_send(b"x")
    assert not far.device.pending()
    assert network.step()
    assert far.device.pending()
    assert not network.step()
    assert network.run_until_idle() == 0


def test_an_update_is_its_44_bytes_on_the_way() -> None:
    sizes = []

    def pack(*fields: int) -> bytes:
        data = cdc.pack(*fields)
        sizes.append(len(data))
        return data

    network = SimNetwork(codec=UpdateCodec(pack, cdc.unpack, CODEC.is_update))
    near, far = linked(network)
    region = far.domain.register(16 * KIB)
    near.publish(region.rkey_on(far), 5, 1, 2, 3, 4, 0x8000)
    network.run_until_idle()
    assert sizes == [44]
    (completion,) = far.device.poll()
    assert completion == Completion(
        KIND.UPDATE, far, payload=Update(1, 2, 3, 4, 0x8000)
    )
    (done,) = near.device.poll()
    assert done == Completion(KIND.PUBLISH, near, wr_id=5)


def test_what_looks_like_an_update_is_one() -> None:
    network = SimNetwork(codec=CODEC)
    near, far = linked(network)
    near.post_send(cdc.pack(1, 2, 3, 4, 0))
    near.post_send(b"\x01" * 44)
    network.run_until_idle()
    kinds = [completion.kind for completion in far.device.poll()]
    assert kinds == [KIND.UPDATE, KIND.RECEIVE]


def test_every_update_or_only_the_newest() -> None:
    for newest_only, expected in ((False, [1, 2, 3]), (True, [3])):
        network = SimNetwork(newest_only=newest_only)
        near, far = linked(network)
        region = far.domain.register(16 * KIB)
        for sequence in (1, 2, 3):
            near.publish(region.rkey_on(far), sequence, sequence, 9, 0, 0, 0)
        network.run_until_idle()
        updates = [completion.payload.sequence for completion in far.device.poll()]
        assert updates == expected
        done = [completion.wr_id for completion in near.device.poll()]
        assert done == [1, 2, 3], "every publish completes"


def test_an_rkey_belongs_to_its_link() -> None:
    network = SimNetwork()
    near, far = linked(network)
    other = far.domain.create_queue_pair()
    region = far.domain.register(16 * KIB)
    assert region.rkey_on(far) != region.rkey_on(other)
    near.post_write(region.rkey_on(other), region.virtual_address, b"x")
    network.run_until_idle()
    assert [c.status for c in near.device.poll()] == [Status.REMOTE_ACCESS]
    assert [c.status for c in far.device.poll()] == [Status.BROKEN_RULE]
    assert not any(region.view)


def test_like_shared_memory_a_wrong_rkey_is_refused_at_once() -> None:
    network = SimNetwork(newest_only=True)
    near, far = linked(network)
    region = far.domain.register(16 * KIB)
    rkey = region.rkey_on(far)
    for post in (
        lambda: near.post_write(rkey ^ 1, region.virtual_address, b"x"),
        lambda: near.post_write(rkey, region.virtual_address - 1, b"x"),
        lambda: near.publish(rkey + (1 << 12), 1, 1, 1, 1, 1, 1),
    ):
        with pytest.raises(FabricError, match="REMOTE_ACCESS"):
            post()
    assert near.is_up


def test_connecting_can_fail_on_request() -> None:
    network = SimNetwork()
    network.fail_connect(Status.TIMED_OUT)
    near, far = (
        device.create_domain().create_queue_pair() for device in devices(network)
    )
    introduce(near, far)
    network.run_until_idle()
    for queue_pair in (near, far):
        (completion,) = queue_pair.device.poll()
        assert (completion.kind, completion.status) == (
            KIND.CONNECTED,
            Status.TIMED_OUT,
        )
        assert not queue_pair.is_up


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_an_allocation_can_fail_on_request(nth: int) -> None:
    network = SimNetwork()
    device = network.device(b"device-A")
    network.fail_allocation(nth)
    made: list[object] = []

    def make_all() -> None:
        made.append(device.create_domain())
        made.append(device.domains[0].create_queue_pair())
        made.append(device.domains[0].register(16 * KIB))

    with pytest.raises(FabricError) as caught:
        make_all()
    assert len(made) == nth - 1
    assert caught.value.status == "NO_MEMORY"
    assert caught.value.detail.startswith("ENOMEM")
    device.create_domain()


def test_a_cut_takes_both_ends_and_what_was_under_way() -> None:
    network = SimNetwork()
    near, far = linked(network)
    near.post_send(b"lost")
    network.cut(near)
    network.run_until_idle()
    for queue_pair in (near, far):
        (completion,) = queue_pair.device.poll()
        assert (completion.kind, completion.status) == (KIND.DOWN, Status.TIMED_OUT)
        queue_pair.post_send(b"late")
    assert network.run_until_idle() == 0
    lonely = near.domain.create_queue_pair()
    network.cut(lonely)
    (completion,) = near.device.poll()
    assert completion.kind is KIND.CONNECTED, "it never was connected"


def test_posts_can_be_held_and_delayed() -> None:
    network = SimNetwork()
    near, far = linked(network)
    network.hold(near)
    near.post_send(b"held")
    far.post_send(b"not held")
    assert network.run_until_idle() == 1
    network.hold(near, held=False)
    assert network.run_until_idle() == 1
    network.delay(near, 2.0)
    near.post_send(b"slow")
    network.delay(near, 0.5)
    near.post_send(b"behind it")
    assert network.next_due() == 2.0
    network.advance(1.9)
    assert not network.step()
    network.advance(0.1)
    assert network.run_until_idle() == 2
    assert network.next_due() is None
    payloads = [completion.payload for completion in far.device.poll()]
    assert payloads == [b"held", b"slow", b"behind it"], "the order stays"
    with pytest.raises(ValueError, match="back"):
        network.advance(-1)


def test_a_close_comes_after_what_was_posted_though_it_was_held() -> None:
    network = SimNetwork()
    near, far = linked(network)
    network.hold(near)
    near.post_send(b"before")
    near.close()
    network.run_until_idle()
    kinds = [completion.kind for completion in far.device.poll()]
    assert kinds == [KIND.RECEIVE, KIND.DOWN]


def test_a_network_that_never_rests_is_noticed() -> None:
    network = SimNetwork()
    near, _ = linked(network)
    for _ in range(20):
        near.post_send(b"x")
    with pytest.raises(RuntimeError, match="not idle"):
        network.run_until_idle(limit=10)


def test_connecting_to_what_is_not_there() -> None:
    network = SimNetwork()
    near, far = (
        device.create_domain().create_queue_pair() for device in devices(network)
    )
    # To a queue pair that closes before it waits, and to one of another device.
    near.connect(remote(far, 2), 1, passive=False)
    assert network.run_until_idle() == 0
    far.close()
    network.run_until_idle()
    assert [c.status for c in near.device.poll()] == [Status.UNREACHABLE]
    near.close()
    third = near.domain.create_queue_pair()
    wrong = RemoteQueuePair(b"nobody--", bytes(16), bytes(6), third.number, 1, 3)
    third.connect(wrong, 1, passive=False)
    network.run_until_idle()
    assert [c.status for c in near.device.poll()] == [Status.UNREACHABLE]
    with pytest.raises(LocalProtocolError, match="before"):
        third.connect(wrong, 1, passive=False)


def test_a_passive_one_waits_for_ever() -> None:
    network = SimNetwork()
    device = network.device(b"device-A")
    queue_pair = device.create_domain().create_queue_pair()
    ghost = RemoteQueuePair(b"nobody--", bytes(16), bytes(6), 5, 1, 3)
    queue_pair.connect(ghost, 1, passive=True)
    assert network.run_until_idle() == 0
    queue_pair.close()


def test_the_psn_has_to_agree() -> None:
    network = SimNetwork()
    near, far = (
        device.create_domain().create_queue_pair() for device in devices(network)
    )
    near.connect(remote(far, 2), 1, passive=False)
    far.connect(remote(near, 7), 2, passive=True)
    network.run_until_idle()
    assert [c.status for c in near.device.poll()] == [Status.UNREACHABLE]
    assert far.device.poll() == []


def test_sends_wait_until_the_receiver_is_connected() -> None:
    for seed in range(20):
        network = SimNetwork(seed)
        near, far = (
            device.create_domain().create_queue_pair() for device in devices(network)
        )
        introduce(near, far)
        while not near.is_up:
            network.step()
        near.post_send(b"early")
        network.run_until_idle()
        kinds = [completion.kind for completion in far.device.poll()]
        assert kinds == [KIND.CONNECTED, KIND.RECEIVE]


def test_a_close_before_the_other_end_is_connected() -> None:
    for seed in range(20):
        network = SimNetwork(seed)
        near, far = (
            device.create_domain().create_queue_pair() for device in devices(network)
        )
        introduce(near, far)
        while not near.is_up:
            network.step()
        near.close()
        network.run_until_idle()
        kinds = [completion.kind for completion in far.device.poll()]
        assert kinds == [KIND.CONNECTED, KIND.DOWN]
        far.close()
        network.run_until_idle()


def test_an_automatic_network_delivers_at_once() -> None:
    network = SimNetwork(auto=True)
    near, far = (
        device.create_domain().create_queue_pair() for device in devices(network)
    )
    introduce(near, far)
    assert near.is_up
    assert far.is_up
    far.device.poll()
    assert far.device.arm()
    near.post_send(b"x")
    assert select.select([far.device.fileno()], [], [], 0)[0]
    assert far.device.poll()[0].payload == b"x"
    network.hold(near)
    near.post_send(b"y")
    assert far.device.poll() == []
    network.hold(near, held=False)
    assert far.device.poll()[0].payload == b"y"
    network.delay(near, 1)
    near.post_send(b"z")
    network.advance(1)
    assert far.device.poll()[0].payload == b"z"


def test_a_mailbox_of_a_closed_region_is_forgotten() -> None:
    network = SimNetwork(newest_only=True)
    near, far = linked(network)
    region = far.domain.register(16 * KIB)
    near.publish(region.rkey_on(far), 3, 1, 1, 1, 1, 1)
    region.close()
    network.run_until_idle()
    assert far.device.poll() == []
    assert [c.wr_id for c in near.device.poll()] == [3], "it completes all the same"


def test_clear_may_be_told_how_much() -> None:
    network = SimNetwork()
    region = network.device(b"device-A").create_domain().register(16 * KIB)
    region.view[:] = b"x" * region.length
    region.clear(10)
    assert bytes(region.view[:11]) == bytes(10) + b"x"
    region.clear(1 << 20)
    assert not any(region.view)


@pytest.mark.parametrize("payload", [b"", b"x" * 1101])
def test_a_send_has_a_size(payload: bytes) -> None:
    near, _ = linked(SimNetwork())
    with pytest.raises(LocalProtocolError, match="1 to 1100"):
        near.post_send(payload)


def test_a_mistake_is_named() -> None:
    network = SimNetwork()
    device = network.device(b"device-A")
    with pytest.raises(LocalProtocolError, match="in use"):
        network.device(b"device-A")
    with pytest.raises(ValueError, match="8"):
        network.device(b"short")
    domain = device.create_domain()
    queue_pair = domain.create_queue_pair()
    with pytest.raises(LocalProtocolError, match="not connected"):
        queue_pair.post_send(b"x")
    with pytest.raises(LocalProtocolError, match="power of two"):
        domain.register(1000)
    assert queue_pair.newest_consumer(domain.register(16 * KIB), 1) == -1
    domain.close()
    domain.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        domain.create_queue_pair()
    device.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        device.create_domain()
    network.device(b"device-A").close()


def test_no_descriptor_for_a_doorbell(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "eventfd", full)
    with pytest.raises(FabricError, match="NO_MEMORY"):
        SimNetwork().device(b"device-A").fileno()


def test_a_forked_child_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    near, _ = linked(SimNetwork())
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(ForkedError):
            near.post_send(b"x")
    near.post_send(b"x")


@given(st.integers(0, 2**32), st.lists(st.sampled_from("abcdef"), max_size=60))
def test_each_queue_pair_keeps_its_order(seed: int, steps: list[str]) -> None:
    network = SimNetwork(seed)
    near, far = devices(network)
    domains = near.create_domain(), far.create_domain()
    links = []
    for _ in range(3):
        pair = domains[0].create_queue_pair(), domains[1].create_queue_pair()
        introduce(*pair)
        links.append(pair)
    network.run_until_idle()
    far.poll()
    sent: list[list[bytes]] = [[], [], []]
    got: list[list[bytes]] = [[], [], []]
    for count, step in enumerate(steps):
        index = "abc".find(step)
        if index < 0:
            network.step()
        else:
            payload = count.to_bytes(2, "big")
            links[index][0].post_send(payload)
            sent[index].append(payload)
    network.run_until_idle()
    for completion in far.poll():
        index = [pair[1] for pair in links].index(completion.queue_pair)  # type: ignore[arg-type]
        got[index].append(completion.payload)
    assert got == sent


@pytest.mark.parametrize("sent", [b"\xfe", b"\xfe\x2c" + bytes(41), b"\xfe" * 44])
def test_an_update_that_is_malformed_ends_the_link(sent: bytes) -> None:
    """Whoever sends it breaks a rule; nobody else hears of an exception."""
    network = SimNetwork(codec=CODEC)
    near, far = linked(network)
    near.post_send(sent)
    network.run_until_idle()
    (down,) = far.device.poll()
    assert (down.kind, down.status) == (CompletionKind.DOWN, Status.BROKEN_RULE)
    assert "malformed update" in down.payload
