"""Queue pairs of two real devices, one of which does what no good peer does."""

from __future__ import annotations

import select
import time
from ipaddress import ip_address

import pytest

import pysmc
from pysmc.aio.devices import CODEC
from pysmc.fabric import verbs_api as api
from pysmc.fabric.base import CompletionKind, Status
from pysmc.fabric.verbs_memory import RECEIVE_BYTES, RECEIVES
from pysmc.testing.conformance_bench import KIB, Bench, Writer, content

pytestmark = pytest.mark.lab(seconds=60)

ROUND_SECONDS = 0.01
RETRY_SECONDS = 6.0
"""In which a device gives up a packet, at most."""
LLC = bytes([0x27]) + bytes(43)


def open_at(address: str):
    """Open the device of an address of ours."""
    from pysmc.fabric import open_device
    from pysmc.fabric.verbs_ports import list_ports

    mapped = ip_address(f"::ffff:{address}").packed
    (port,) = [port for port in list_ports() if port.gid == mapped]
    config = pysmc.Config()
    return open_device("verbs", peer_id=bytes(8), config=config, codec=CODEC, port=port)


@pytest.fixture
def bench():
    devices = open_at("10.0.0.1"), open_at("10.0.0.2")
    yield Bench(*devices, lambda: select.select([], [], [], ROUND_SECONDS))
    for device in devices:
        device.close()
        assert not device.count.bytes


def down_of(bench, end):
    return bench.await_one(end, CompletionKind.DOWN)


def raw(handle, memory, size: int) -> None:
    """SEND behind the back of the fabric."""
    wr_id = 1 << 40
    flags = api.SEND_SIGNALED
    address = memory.virtual_address
    lkey = memory._pinned.lkey
    handle.post_send(
        [api.SendRequest(wr_id, api.WR_SEND, flags, address, size, lkey, 0, 0)]
    )


def test_memory_that_was_deregistered_is_not_written(bench):
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    writer = Writer(near, region, far.queue_pair)
    rkey, address = writer.rkey, region.virtual_address
    memory = region.memory
    region.close()
    near.queue_pair.post_write(rkey, address, b"late")
    near.queue_pair.publish(rkey, 1, 1, 1, 0, 0, 0)
    near.queue_pair.flush()
    down = down_of(bench, near)
    assert down.status is Status.REMOTE_ACCESS
    assert "IBV_WC_REM_ACCESS_ERR, 10" in down.payload
    assert down_of(bench, far).status is Status.FLUSHED
    assert not any(memory[:4])


@pytest.mark.parametrize(
    "at",
    [
        pytest.param(-1, id="before"),
        pytest.param(16 * KIB - 3, id="behind", marks=pytest.mark.lab_long(seconds=60)),
    ],
)
def test_a_write_outside_ends_both(bench, at):
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    other = far.domain.register(16 * KIB)
    rkey = region.rkey_on(far.queue_pair)
    near.queue_pair.post_write(rkey, region.virtual_address + at, b"over")
    near.queue_pair.publish(rkey, 1, 1, 1, 0, 0, 0)
    near.queue_pair.flush()
    assert "IBV_WC_REM_ACCESS_ERR" in down_of(bench, near).payload
    assert down_of(bench, far).status is Status.FLUSHED
    assert not any(content(region))
    assert not any(content(other))


def test_memory_of_another_link_group_is_not_written(bench):
    near, far = bench.link()
    _, victim = bench.link()
    region = victim.domain.register(16 * KIB)
    rkey = region.rkey_on(victim.queue_pair)
    near.queue_pair.post_write(rkey, region.virtual_address, b"mine")
    near.queue_pair.publish(rkey, 1, 1, 1, 0, 0, 0)
    near.queue_pair.flush()
    assert down_of(bench, near).status is Status.REMOTE_ACCESS
    down_of(bench, far)
    assert not any(content(region))
    assert victim.queue_pair.is_up


def test_a_queue_pair_that_vanished_is_given_up(bench):
    near, far = bench.link()
    far.side.device.destroy(far.queue_pair)  # says no goodbye
    since = time.monotonic()
    near.queue_pair.post_send(LLC)
    near.queue_pair.flush()
    down = down_of(bench, near)
    assert down.status is Status.TIMED_OUT
    assert "IBV_WC_RETRY_EXC_ERR, 12" in down.payload
    assert time.monotonic() - since < RETRY_SECONDS


def test_a_send_that_is_too_long_ends_its_link_alone(bench):
    near, far = bench.link()
    good = bench.link()
    memory = near.domain.register(16 * KIB)
    raw(near.queue_pair._handle, memory, RECEIVE_BYTES + 1)
    down = down_of(bench, far)
    assert (down.status, "IBV_WC_" in down.payload) == (Status.BROKEN_RULE, True)
    down_of(bench, near)
    good[0].queue_pair.post_send(LLC)
    good[0].queue_pair.flush()
    bench.await_one(good[1], CompletionKind.RECEIVE)


def test_a_peer_without_receives_is_waited_for(bench):
    """However long it takes: TEST LINK says when it is too long. Nothing is lost."""
    near, far = bench.link()
    for number in range(3 * RECEIVES):
        near.queue_pair.post_send(LLC[:42] + number.to_bytes(2, "big"))
    near.queue_pair.flush()
    for _ in range(100):  # a second, a thousand times what the RNR timer says
        bench.pump()
        bench.a.poll()
    assert near.queue_pair.is_up
    receive = CompletionKind.RECEIVE
    bench.until(
        lambda: len(far.side.of(receive, far.queue_pair)) == 3 * RECEIVES, "all come"
    )
    numbers = [int.from_bytes(item.payload[42:], "big") for item in far.side.seen[1:]]
    assert numbers == list(range(3 * RECEIVES))


@pytest.mark.lab_long(seconds=60)
def test_a_flood_of_updates_is_taken_in_bounded_bites(bench):
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    writer = Writer(near, region, far.queue_pair)
    most = 0
    for _ in range(40):
        for _ in range(50):
            writer.publish(producer=writer.sequence)
        bench.pump()
        near.side.poll()
        batch = far.side.device.poll()
        most = max(most, len(batch))
        far.side.seen += batch
    bench.await_newest(far, writer)
    assert most <= 4 * 32
    assert far.queue_pair.is_up
