"""The shm device: links that come up, carry and end, and peers that do not behave."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.errors import FabricError, ForkedError, LocalProtocolError
from pysmc.fabric import shm, shm_arena, shm_endpoint, shm_ring
from pysmc.fabric.base import CompletionKind, Status
from pysmc.fabric.shm import ShmDevice, host_eid
from pysmc.fabric.shm_arena import ARENA_BYTES, ARENAS_MAX
from pysmc.fabric.shm_endpoint import ARENA, BELL, receive
from pysmc.fabric.shm_ring import (
    DESCRIPTOR,
    MAILBOX_WORDS,
    MAILBOXES,
    QUEUE,
    QUEUE_HEAD,
    QUEUE_TAIL,
    SEND_ENTRY,
    SENDS,
    SLEEPING,
    SLOTS,
    pack_descriptor,
)
from tests.fabric.rawpeer import (
    Child,
    RawPeer,
    Sleeper,
    drain,
    identified,
    identify,
    memfd,
    statuses,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pysmc.fabric.shm import ShmDomain
    from pysmc.fabric.shm_link import ShmQueuePair

KIB = 1024
DOWN = CompletionKind.DOWN


@pytest.fixture
def device() -> Iterator[ShmDevice]:
    device = ShmDevice(os.urandom(8))
    yield device
    device.close()


@pytest.fixture
def peer() -> Iterator[RawPeer]:
    peer = RawPeer()
    yield peer
    peer.close()


@pytest.fixture
def domain(device: ShmDevice) -> ShmDomain:
    return device.create_domain()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    with open("/proc/self/maps", encoding="ascii") as file:
        return sum("memfd:pysmc" in line for line in file)


def link(near: ShmDevice, far: ShmDevice) -> tuple[ShmQueuePair, ShmQueuePair]:
    pairs = [device.create_domain().create_queue_pair() for device in (near, far)]
    pairs[1].connect(identified(identify(near, pairs[0], 1)), 2, passive=True)
    pairs[0].connect(identified(identify(far, pairs[1], 2)), 1, passive=False)
    drain(far)
    drain(near)
    assert pairs[0].is_up
    assert pairs[1].is_up
    return pairs[0], pairs[1]


def ended(device: ShmDevice) -> tuple[Status, str]:
    """Poll until a link is down; tell how."""
    completions = [item for item in drain(device) if item.kind is DOWN]
    assert len(completions) == 1, completions
    return completions[0].status, completions[0].payload


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


def test_no_descriptor_for_a_doorbell(
    domain: ShmDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(24, "Too many open files")

    before = descriptors()
    monkeypatch.setattr(os, "eventfd", full)
    with pytest.raises(FabricError) as caught:
        domain.create_queue_pair()
    assert caught.value.status == "NO_MEMORY"
    assert descriptors() == before
    assert domain.queue_pairs == []


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
        shm_endpoint, "receive", lambda sock: packets.pop() if packets else real(sock)
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


# --- peers that do not behave ------------------------------------------------------


def test_a_peer_that_publishes_and_dies(device: ShmDevice) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def run() -> None:
        mine = ShmDevice(os.urandom(8))
        pair = mine.create_domain().create_queue_pair()
        far.send(identify(mine, pair, 1))
        answer = far.recv(100)
        pair.connect(identified(answer[:16]), 1, passive=False)
        Sleeper(mine).until(CompletionKind.CONNECTED)
        rkey, address = struct.unpack("!IQ", answer[16:])
        count = 0
        while True:  # until it is killed
            count += 1
            pair.post_write(rkey, address + count % 1000 * 8, count.to_bytes(8, "big"))
            pair.publish(rkey, 0, count & 0xFFFF, 1, count, 0, 0)
            if count % 100 == 0:
                pair.post_send(b"x" * 100)

    child = Child(run)
    domain = device.create_domain()
    queue_pair, region = domain.create_queue_pair(), domain.register(16 * KIB)
    remote = identified(near.recv(100))
    queue_pair.connect(remote, 2, passive=True)
    where = struct.pack("!IQ", region.rkey, region.virtual_address)
    near.send(identify(device, queue_pair, 2) + where)
    newest = 0
    kinds: list[CompletionKind] = []
    while DOWN not in kinds:
        for completion in device.poll():
            kinds.append(completion.kind)
            if completion.kind is CompletionKind.UPDATE:
                newest = completion.payload.producer
        if newest > 2000:
            os.kill(child.pid, signal.SIGKILL)
        if device.arm():
            select.select([device.fileno()], [], [], 5)
    assert child.reap() == -signal.SIGKILL
    assert kinds[-1] is DOWN
    at = newest % 1000 * 8
    assert int.from_bytes(region.view[at : at + 8], "big") >= newest
    near.close()
    far.close()


def test_a_forked_child_does_not_hide_its_parents_death(device: ShmDevice) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def run() -> None:
        mine = ShmDevice(os.urandom(8))
        pair = mine.create_domain().create_queue_pair()
        far.send(identify(mine, pair, 1))
        pair.connect(identified(far.recv(100)), 1, passive=False)
        Sleeper(mine).until(CompletionKind.CONNECTED)
        grandchild = os.fork()
        if grandchild == 0:
            signal.pause()
        far.send(grandchild.to_bytes(8, "big"))
        signal.pause()

    child = Child(run)
    queue_pair = device.create_domain().create_queue_pair()
    queue_pair.connect(identified(near.recv(100)), 2, passive=True)
    near.send(identify(device, queue_pair, 2))
    sleeper = Sleeper(device)
    sleeper.until(CompletionKind.CONNECTED)
    grandchild = int.from_bytes(near.recv(8), "big")
    os.kill(child.pid, signal.SIGKILL)
    assert sleeper.until(DOWN).status is Status.PEER_GONE
    os.kill(grandchild, signal.SIGKILL)
    child.reap()
    near.close()
    far.close()


@pytest.mark.parametrize(
    "changes",
    [
        {QUEUE_TAIL: 5000},
        {QUEUE_TAIL: (1 << 64) - 1},
        {QUEUE_TAIL: 1, QUEUE: SEND_ENTRY + 1},
        {QUEUE_TAIL: 1, QUEUE: (1 << 64) - 1},
        {QUEUE_TAIL: 1, QUEUE: SEND_ENTRY},
        {QUEUE_TAIL: 1, QUEUE: SEND_ENTRY, SENDS: 1 << 50},
    ],
    ids=str,
)
def test_garbage_in_our_words_ends_the_link(
    device: ShmDevice, peer: RawPeer, changes: dict[int, int]
) -> None:
    peer.link(device, device.create_domain())
    assert peer.theirs is not None
    for word, value in changes.items():
        peer.theirs[word] = value
    status, text = ended(device)
    assert status is Status.BROKEN_RULE
    assert text
    assert peer.hear().data == b"", "the peer learns by the end of its socket"


@pytest.mark.parametrize("head", [5, (1 << 64) - 1])
def test_garbage_in_its_own_words_ends_the_link(
    device: ShmDevice, peer: RawPeer, head: int
) -> None:
    queue_pair = peer.link(device, device.create_domain())
    peer.words[QUEUE_HEAD] = head
    device.arm()
    queue_pair.post_send(b"x")
    assert select.select([device.fileno()], [], [], 0)[0], "our own failure wakes us"
    assert ended(device)[0] is Status.BROKEN_RULE
    queue_pair.post_send(b"after")
    assert peer.words[QUEUE_TAIL] == 0


@pytest.mark.parametrize(
    "word",
    [
        pack_descriptor(7 << 16, 5, 0, 16 * KIB),
        pack_descriptor(7 << 16, 0xFFF, 0, 16 * KIB),
        pack_descriptor(7 << 16, 0, 16 * KIB, 16 * KIB),
        pack_descriptor(7 << 16, 0, 0, 32 * KIB),
        pack_descriptor(7 << 16, 0, 512 << 20, 16 * KIB),
        7 << 48 | 0xFFFFFFFF,
        pack_descriptor(8 << 16, 0, 0, 16 * KIB),
        0,
    ],
    ids=hex,
)
def test_a_descriptor_that_lies_is_refused(
    device: ShmDevice, peer: RawPeer, word: int
) -> None:
    queue_pair = peer.link(device, device.create_domain())
    descriptor = memfd(16 * KIB)
    peer.say(bytes((ARENA, 0)), [descriptor])
    os.close(descriptor)
    peer.words[MAILBOXES + DESCRIPTOR] = word
    for address in (1 << 32, 6 << 32, 0):
        with pytest.raises(FabricError) as caught:
            queue_pair.post_write(7 << 16, address, b"x" * 100)
        assert caught.value.status == "REMOTE_ACCESS"
    with pytest.raises(FabricError, match="512 regions"):
        queue_pair.post_write(7 << 16 | SLOTS, 1 << 32, b"x")
    assert queue_pair.is_up


def test_a_descriptor_may_change_under_our_hands(
    device: ShmDevice, peer: RawPeer
) -> None:
    queue_pair = peer.link(device, device.create_domain())
    arenas = [memfd(16 * KIB), memfd(32 * KIB)]
    for number, descriptor in enumerate(arenas):
        peer.say(bytes((ARENA, number)), [descriptor])
    slot = 3
    index = MAILBOXES + slot * MAILBOX_WORDS + DESCRIPTOR
    rkey = 9 << 16 | slot
    peer.words[index] = pack_descriptor(rkey, 1, 0, 32 * KIB)
    queue_pair.post_write(rkey, (2 << 32) + 32 * KIB - 1, b"x")
    peer.words[index] = pack_descriptor(rkey, 0, 0, 32 * KIB)
    with pytest.raises(FabricError, match="outside"):
        queue_pair.post_write(rkey, (2 << 32) + 32 * KIB - 1, b"x")
    for descriptor in arenas:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (bytes((ARENA, 1)), 1),
        (bytes((ARENA, 0)), 0),
        (bytes((ARENA, 0)), 2),
        (bytes((ARENA,)), 1),
        (bytes((BELL,)), 1),
        (b"\0", 0),
        (b"x" * 300, 0),
    ],
    ids=str,
)
def test_a_wrong_message_on_a_link_ends_it(
    device: ShmDevice, peer: RawPeer, data: bytes, count: int
) -> None:
    peer.link(device, device.create_domain())
    before = descriptors()
    sent = [memfd(16 * KIB) for _ in range(count)]
    peer.say(data, sent)
    for descriptor in sent:
        os.close(descriptor)
    assert ended(device)[0] is Status.BROKEN_RULE
    assert descriptors() < before


def test_an_unsealed_arena_ends_the_link(device: ShmDevice, peer: RawPeer) -> None:
    peer.link(device, device.create_domain())
    descriptor = memfd(16 * KIB, seals=0)
    peer.say(bytes((ARENA, 0)), [descriptor])
    os.close(descriptor)
    status, text = ended(device)
    assert status is Status.BROKEN_RULE
    assert "seals" in text


def test_a_peer_may_bring_only_so_many_arenas(device: ShmDevice, peer: RawPeer) -> None:
    peer.link(device, device.create_domain())
    descriptor = memfd(16 * KIB)
    for number in range(ARENAS_MAX):
        peer.say(bytes((ARENA, number)), [descriptor])
        assert drain(device, 70) == []
    peer.say(bytes((ARENA, ARENAS_MAX)), [descriptor])
    assert ended(device)[0] is Status.BROKEN_RULE
    os.close(descriptor)


def test_our_memory_cannot_be_truncated(device: ShmDevice, peer: RawPeer) -> None:
    queue_pair = device.create_domain().create_queue_pair()
    queue_pair.domain.register(16 * KIB)
    queue_pair.connect(peer.remote(), 1, passive=True)
    peer.call(device)
    peer.say(peer.hello(queue_pair.number))
    drain(device)
    packet = receive(peer.socket)
    for descriptor in (packet.descriptors[0], packet.descriptors[2]):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 1 << 30)
    packet.close()


def test_holes_in_our_memory_are_zeros_and_no_more(
    device: ShmDevice, peer: RawPeer
) -> None:
    import ctypes

    queue_pair = peer.link(device, device.create_domain())
    region = queue_pair.domain.register(16 * KIB)
    region.view[:] = b"x" * region.length
    arena = queue_pair.domain.arenas[0]
    libc = ctypes.CDLL(None, use_errno=True)
    punch_and_keep_size = 3
    done = libc.fallocate(
        arena.descriptor,
        punch_and_keep_size,
        ctypes.c_long(0),
        ctypes.c_long(ARENA_BYTES),
    )
    assert done == 0
    assert not any(region.view)
    region.view[0] = 1


def test_a_bell_that_cannot_ring_blocks_nobody(
    device: ShmDevice, peer: RawPeer
) -> None:
    queue_pair = peer.link(device, device.create_domain())
    os.eventfd_write(peer.bell, (1 << 64) - 2)
    peer.words[SLEEPING] = 1
    queue_pair.post_send(b"x")
    assert queue_pair.is_up


def test_the_doorbell_rings_only_for_a_sleeper(device: ShmDevice) -> None:
    other = ShmDevice(os.urandom(8))
    near, far = link(device, other)
    rkey = far.domain.register(16 * KIB).rkey

    def rings() -> int:
        try:
            return os.eventfd_read(far._bell)
        except BlockingIOError:
            return 0

    for _ in range(100):
        near.publish(rkey, 0, 1, 1, 1, 1, 1)
        other.poll()
    assert rings() == 0
    assert other.arm()
    for _ in range(100):
        near.publish(rkey, 0, 1, 1, 1, 1, 1)
    assert rings() == 1
    other.close()


def test_a_link_that_comes_up_while_we_sleep_finds_us_asleep(
    device: ShmDevice,
) -> None:
    other = ShmDevice(os.urandom(8))
    near, far = (one.create_domain().create_queue_pair() for one in (device, other))
    near.connect(identified(identify(other, far, 2)), 1, passive=False)
    drain(other)
    assert other.arm()
    far.connect(identified(identify(device, near, 1)), 2, passive=True)
    assert far.inbox.words[SLEEPING] != 0
    assert select.select([other.fileno()], [], [], 0)[0]
    other.close()


def test_the_first_reason_counts(device: ShmDevice, peer: RawPeer) -> None:
    queue_pair = peer.link(device, device.create_domain())
    queue_pair.fail(Status.BROKEN_RULE, "first")
    queue_pair.fail(Status.PEER_GONE, "second")
    peer.socket.close()
    assert ended(device) == (Status.BROKEN_RULE, "first")


def test_what_is_kept_goes_out_before_the_close(device: ShmDevice) -> None:
    other = ShmDevice(os.urandom(8))
    near, far = link(device, other)
    for number in range(100):
        near.post_send(bytes([number]))
    got = [c.payload for c in other.poll()]
    near.close()
    completions = drain(other)
    got += [c.payload for c in completions if c.kind is CompletionKind.RECEIVE]
    assert got == [bytes([number]) for number in range(100)]
    assert completions[-1].kind is DOWN
    assert statuses(completions)[-1] == (DOWN, Status.PEER_GONE)
    assert not far.is_up
    other.close()


def test_room_for_kept_sends_wakes_the_sender(device: ShmDevice) -> None:
    other = ShmDevice(os.urandom(8))
    near, _ = link(device, other)
    for number in range(100):
        near.post_send(bytes([number]))
    assert device.arm()
    assert not select.select([device.fileno()], [], [], 0)[0]
    other.poll()
    assert select.select([device.fileno()], [], [], 0)[0]
    device.poll()
    assert len(other.poll()) == 36
    other.close()


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
    assert not device.pending(), "it would have to look at words"
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
