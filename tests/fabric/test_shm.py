"""The shm device: links that come up, carry and end, and peers that do not behave."""

from __future__ import annotations

import logging
import os
import select
import socket
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.errors import FabricError, FabricUnavailable, ForkedError, LocalProtocolError
from pysmc.fabric import shm, shm_arena, shm_endpoint, shm_ring
from pysmc.fabric.base import CompletionKind, Status
from pysmc.fabric.shm import ShmDevice, host_eid
from pysmc.fabric.shm_arena import ARENA_BYTES, ARENAS_MAX
from pysmc.fabric.shm_endpoint import ARENA, BELL
from pysmc.fabric.shm_ring import (
    DESCRIPTOR,
    MAILBOXES,
    SLOTS,
    pack_descriptor,
)
from tests.fabric.rawpeer import (
    RawPeer,
    descriptors,
    drain,
    ended,
    identified,
    identify,
    link,
    mappings,
    memfd,
)

if TYPE_CHECKING:
    from pysmc.fabric.shm import ShmDomain

KIB = 1024
DOWN = CompletionKind.DOWN


# --- the device --------------------------------------------------------------------


def test_a_device_says_who_it_is(device: ShmDevice) -> None:
    assert device.fabric == "shm"
    assert device.eid == host_eid()
    assert device.eid.startswith("PYSMC-SHM-")
    assert len(device.eid) == 30
    assert device.gid == socket.inet_pton(socket.AF_INET6, "::ffff:127.0.0.1")
    assert device.mac == device.peer_id[2:]
    assert device.mtu_code == 5


def test_the_eid_follows_from_the_boot_and_the_namespace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = host_eid()
    assert before == host_eid()
    facts = os.stat("/")
    monkeypatch.setattr(os, "stat", lambda path: facts)
    assert host_eid() != before


def test_without_proc_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> Any:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os, "stat", missing)
    with pytest.raises(FabricUnavailable, match="/proc"):
        ShmDevice(os.urandom(8))


def test_a_peer_id_has_eight_bytes() -> None:
    with pytest.raises(ValueError, match="8"):
        ShmDevice(b"short")


def test_an_idle_device_needs_two_descriptors_and_no_name() -> None:
    before = descriptors()
    device = ShmDevice(os.urandom(8))
    assert descriptors() == before + 2
    device.create_domain()
    assert descriptors() == before + 4, "the listener and its reserve"
    device.close()
    device.close()
    assert descriptors() == before
    with pytest.raises(LocalProtocolError):
        device.create_domain()


def test_no_descriptor_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(24, "Too many open files")

    before = descriptors()
    monkeypatch.setattr(os, "eventfd", full)
    with pytest.raises(FabricError, match="EMFILE"):
        ShmDevice(os.urandom(8))
    assert descriptors() == before


def test_a_closed_domain_makes_nothing(domain: ShmDomain) -> None:
    domain.close()
    domain.close()
    with pytest.raises(LocalProtocolError):
        domain.create_queue_pair()
    with pytest.raises(LocalProtocolError):
        domain.register(16 * KIB)


# --- memory ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 8 * KIB, 24 * KIB, 1 << 30, -16 * KIB])
def test_a_region_has_a_size_of_its_own(domain: ShmDomain, length: int) -> None:
    with pytest.raises(LocalProtocolError, match="power of two"):
        domain.register(length)


def test_a_domain_has_so_many_regions(domain: ShmDomain) -> None:
    regions = [domain.register(16 * KIB) for _ in range(SLOTS)]
    with pytest.raises(FabricError, match="512 regions"):
        domain.register(16 * KIB)
    assert len(domain.arenas) == 1
    assert len({region.rkey & 0xFFFF for region in regions}) == SLOTS
    regions[7].close()
    again = domain.register(16 * KIB)
    assert again.rkey & 0xFFFF == 7
    assert again.rkey != regions[7].rkey


def test_a_domain_has_so_many_arenas(
    domain: ShmDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "ARENA_BYTES", 16 * KIB)
    for _ in range(ARENAS_MAX):
        domain.register(16 * KIB)
    with pytest.raises(FabricError, match="64 arenas"):
        domain.register(16 * KIB)


def test_a_large_region_has_an_arena_of_its_own(domain: ShmDomain) -> None:
    small, large = domain.register(16 * KIB), domain.register(2 * ARENA_BYTES)
    assert [arena.length for arena in domain.arenas] == [ARENA_BYTES, 2 * ARENA_BYTES]
    assert large.virtual_address == 2 << 32
    assert small.virtual_address == 1 << 32
    large.close()
    assert domain.register(2 * ARENA_BYTES).virtual_address == 2 << 32


def test_clear_may_be_told_how_much(domain: ShmDomain) -> None:
    region, beside = domain.register(16 * KIB), domain.register(16 * KIB)
    region.view[:] = b"x" * region.length
    beside.view[:] = b"y" * beside.length
    region.clear(100)
    assert bytes(region.view[:101]) == bytes(100) + b"x"
    region.clear(1 << 20)
    assert not any(region.view)
    assert bytes(beside.view) == b"y" * beside.length, "never more than the region"


def test_memory_in_use_is_kept_and_said(
    device: ShmDevice, caplog: pytest.LogCaptureFixture
) -> None:
    domain = device.create_domain()
    region = domain.register(16 * KIB)
    kept = region.view[:10]
    before = mappings()
    with caplog.at_level(logging.WARNING):
        domain.close()
    assert "1 of 1 arenas stay mapped" in caplog.text
    kept[0] = 1
    kept.release()
    del kept, region
    assert mappings() == before - 1


def test_nothing_is_left_behind() -> None:
    def once() -> None:
        near, far = ShmDevice(os.urandom(8)), ShmDevice(os.urandom(8))
        pair, other = link(near, far)
        region = other.domain.register(64 * KIB)
        pair.post_write(region.rkey, region.virtual_address, b"x")
        pair.post_send(b"y")
        near.close()
        drain(far)
        far.close()

    once()
    before = descriptors(), mappings(), len(os.listdir("/dev/shm"))
    for _ in range(20):
        once()
    assert (descriptors(), mappings(), len(os.listdir("/dev/shm"))) == before


# --- links -------------------------------------------------------------------------


def test_posts_before_the_link_are_refused(domain: ShmDomain) -> None:
    queue_pair = domain.create_queue_pair()
    for post in (
        lambda: queue_pair.post_send(b"x"),
        lambda: queue_pair.post_write(1, 1, b"x"),
        lambda: queue_pair.publish(1, 1, 1, 1, 1, 1, 1),
    ):
        with pytest.raises(LocalProtocolError, match="not connected"):
            post()


def test_a_queue_pair_connects_once(device: ShmDevice, peer: RawPeer) -> None:
    queue_pair = peer.link(device, device.create_domain())
    with pytest.raises(LocalProtocolError, match="before"):
        queue_pair.connect(peer.remote(), 1, passive=True)


@pytest.mark.parametrize("payload", [b"", b"x" * 1101])
def test_a_send_has_a_size(device: ShmDevice, peer: RawPeer, payload: bytes) -> None:
    queue_pair = peer.link(device, device.create_domain())
    with pytest.raises(LocalProtocolError, match="1 to 1100"):
        queue_pair.post_send(payload)


def test_the_mailbox_can_be_looked_at(device: ShmDevice) -> None:
    near, far = link(device, device)
    region = far.domain.register(16 * KIB)
    assert far.newest_consumer(region, 5) == -1
    near.publish(region.rkey, 0, 1, 5, 10, 20, 0)
    assert far.newest_consumer(region, 5) == 20
    assert far.newest_consumer(region, 6) == -1, "of another connection"
    near.publish(region.rkey, 0, 2, 5, 10, 30, 0)
    assert far.newest_consumer(region, 5) == 30
    assert device.poll()[0].payload.consumer == 30, "it was not taken by looking"
    region.clear()
    assert far.newest_consumer(region, 5) == -1
    far.close()
    assert far.newest_consumer(region, 5) == -1


def test_arenas_grow_while_a_link_is_up(device: ShmDevice) -> None:
    other = ShmDevice(os.urandom(8))
    near, far = link(device, other)
    for number in range(5):
        region = far.domain.register(ARENA_BYTES)
        # The rkey travels another way than the arena: no poll in between.
        end = region.virtual_address + ARENA_BYTES - 8
        near.post_write(region.rkey, end, bytes([number]) * 8)
        assert bytes(region.view[-8:]) == bytes([number]) * 8
    assert near.is_up
    other.close()


def test_arenas_grow_while_a_link_comes_up(device: ShmDevice) -> None:
    other = ShmDevice(os.urandom(8))
    near, far = (one.create_domain().create_queue_pair() for one in (device, other))
    near.connect(identified(identify(other, far, 2)), 1, passive=False)
    drain(other)  # it holds the caller, who goes on
    regions = [near.domain.register(ARENA_BYTES) for _ in range(2)]
    far.connect(identified(identify(device, near, 1)), 2, passive=True)
    assert far.is_up
    for region in regions:
        far.post_write(region.rkey, region.virtual_address, b"grown")
        assert bytes(region.view[:5]) == b"grown"
    other.close()


def test_an_arena_that_cannot_be_received_concerns_only_its_users(
    device: ShmDevice, peer: RawPeer
) -> None:
    queue_pair = peer.link(device, device.create_domain())
    peer.words[MAILBOXES + DESCRIPTOR] = pack_descriptor(7 << 16, 0, 0, 16 * KIB)
    descriptor = memfd(16 * KIB)
    real = shm_arena.map_shared
    try:
        shm_arena.map_shared = _no_mapping
        peer.say(bytes((ARENA, 0)), [descriptor])
        assert drain(device) == []
    finally:
        shm_arena.map_shared = real
    with pytest.raises(FabricError) as caught:
        queue_pair.post_write(7 << 16, 1 << 32, b"x")
    assert caught.value.status == "NO_MEMORY"
    peer.say(bytes((ARENA, 1)), [descriptor])
    peer.words[MAILBOXES + DESCRIPTOR] = pack_descriptor(7 << 16, 1, 0, 16 * KIB)
    queue_pair.post_write(7 << 16, 2 << 32, b"x")
    assert queue_pair.is_up
    os.close(descriptor)


def _no_mapping(descriptor: int, length: int) -> Any:
    raise OSError(12, "Cannot allocate memory")


def test_an_arena_that_no_descriptor_is_left_for(
    device: ShmDevice, peer: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_pair = peer.link(device, device.create_domain())
    lost = shm_endpoint.Packet(bytes((ARENA, 0)), [], truncated=True)
    packets = [lost]
    real = shm_endpoint.receive
    monkeypatch.setattr(
        shm_endpoint, "receive", lambda *args: packets.pop() if packets else real(*args)
    )
    peer.say(bytes((BELL,)), [])
    drain(device)
    peer.words[MAILBOXES + DESCRIPTOR] = pack_descriptor(7 << 16, 0, 0, 16 * KIB)
    with pytest.raises(FabricError, match="NO_MEMORY"):
        queue_pair.post_write(7 << 16, 1 << 32, b"x")
    assert queue_pair.is_up


def test_a_peer_that_reads_nothing_is_not_waited_for(
    device: ShmDevice, peer: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "ARENA_BYTES", 16 * KIB)
    queue_pair = peer.link(device, device.create_domain())
    connection = queue_pair._socket
    assert connection is not None
    fill(connection)
    region = queue_pair.domain.register(16 * KIB)
    assert ended(device)[0] is Status.TIMED_OUT
    region.clear()


def fill(connection: socket.socket) -> None:
    """Send until no more goes in."""
    while True:
        try:
            shm_endpoint.send(connection, bytes((BELL,)), [])
        except BlockingIOError:
            return


def test_no_room_for_a_descriptor_on_its_way(
    device: ShmDevice, peer: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_pair = peer.link(device, device.create_domain())

    def full(*arguments: Any) -> None:
        raise OSError(109, "Too many references: cannot splice")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(shm_endpoint, "send", full)
        with pytest.raises(FabricError, match="ETOOMANYREFS"):
            queue_pair.domain.register(16 * KIB)
    assert descriptors() == before
    assert queue_pair.is_up
    assert queue_pair.domain.register(16 * KIB).virtual_address == 1 << 32


# --- other machines ----------------------------------------------------------------


def test_other_machines_look_only_after_a_system_call(
    device: ShmDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (shm, shm_ring):
        monkeypatch.setattr(module, "WORDS_NEED_SYSCALL", True)
    near, far = link(device, device)
    region = far.domain.register(16 * KIB)
    near.post_write(region.rkey, region.virtual_address, b"data")
    near.publish(region.rkey, 0, 1, 1, 1, 1, 1)
    assert device.pending(), "a hint may look at words; what is read comes by poll()"
    assert far.newest_consumer(region, 1) == -1
    looks = 0
    real = device._look

    def counted() -> None:
        nonlocal looks
        looks += 1
        real()

    monkeypatch.setattr(device, "_look", counted)
    assert device.poll()[0].payload.sequence == 1
    assert looks == 1
    assert device.arm()
    near.publish(region.rkey, 0, 2, 1, 1, 1, 1)
    assert select.select([device.fileno()], [], [], 0)[0]
    assert device.poll()[0].payload.sequence == 2


def test_a_forked_child_is_refused_everywhere(device: ShmDevice) -> None:
    domain = device.create_domain()
    device.after_fork_in_child()
    for call in (device.poll, device.pending, device.arm, device.disarm):
        with pytest.raises(ForkedError):
            call()
    with pytest.raises(ForkedError):
        domain.create_queue_pair()
