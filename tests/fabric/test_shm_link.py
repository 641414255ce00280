"""Peers that do not behave: they die, lie, scribble and stall, and we go on."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from pysmc.errors import FabricError
from pysmc.fabric import shm_link
from pysmc.fabric.base import CompletionKind, Status
from pysmc.fabric.shm import ShmDevice
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
    SEND_HEAD,
    SENDS,
    SLEEPING,
    SLOTS,
    pack_descriptor,
)
from tests.fabric.rawpeer import (
    Child,
    RawPeer,
    Sleeper,
    descriptors,
    drain,
    ended,
    identified,
    identify,
    link,
    memfd,
    statuses,
)

if TYPE_CHECKING:
    import mmap

KIB = 1024
DOWN = CompletionKind.DOWN


@pytest.mark.parametrize("has_thread", [True, False])
def test_a_lot_of_a_peers_memory_is_unmapped_elsewhere(
    device: ShmDevice, monkeypatch: pytest.MonkeyPatch, has_thread: bool
) -> None:
    """When the peer is gone, its pages are freed by whoever unmaps them last."""
    elsewhere: list[mmap.mmap] = []
    sizes: list[int] = []

    def unmap_elsewhere(memory: mmap.mmap) -> bool:
        elsewhere.append(memory)
        sizes.append(len(memory))
        return has_thread

    monkeypatch.setattr(shm_link, "unmap_elsewhere", unmap_elsewhere)
    for count in (ARENA_BYTES, 512 * KIB * KIB):
        peer = RawPeer()
        queue_pair = device.create_domain().create_queue_pair()
        queue_pair.connect(peer.remote(), 1, passive=True)
        arena = memfd(count)
        peer.call(device)
        peer.say(peer.hello(queue_pair.number, arenas=1), [peer.control, arena])
        assert statuses(drain(device)) == [(CompletionKind.CONNECTED, Status.SUCCESS)]
        os.close(arena)
        peer.close()
        assert ended(device)[0] is Status.PEER_GONE
        assert sizes[:1] == [count] * (count > ARENA_BYTES)
    assert [memory.closed for memory in elsewhere] == [not has_thread] * 2
    for memory in elsewhere:
        memory.close()


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


def test_only_a_whole_region_of_the_peer_is_an_element(
    device: ShmDevice, peer: RawPeer
) -> None:
    """What a CLC message says of it may have been changed on its way."""
    rkey, address, length = 9 << 16 | 3, 2 << 32 | 64 * KIB, 32 * KIB
    unlinked = device.create_domain().create_queue_pair()
    assert unlinked.names_element(rkey, address, length), "nothing is known yet"
    queue_pair = peer.link(device, device.create_domain())
    word = pack_descriptor(rkey, 1, 64 * KIB, length)
    peer.words[MAILBOXES + 3 * MAILBOX_WORDS + DESCRIPTOR] = word
    assert queue_pair.names_element(rkey, address, length)
    for changed in (
        (rkey ^ 1 << 16, address, length),
        (rkey ^ 1, address, length),
        (rkey | SLOTS, address, length),
        (rkey, address + 1, length),
        (rkey, address ^ 1 << 32, length),
        (rkey, address, length // 2),
        (rkey, address, length * 2),
    ):
        assert not queue_pair.names_element(*changed)


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
    assert len(packet.descriptors) == 2
    for descriptor in packet.descriptors:
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
    # Asleep again and again, and never reading what rings.
    for sleep in range(1, 1001):
        peer.words[SLEEPING] = sleep
        peer.words[QUEUE_HEAD] = peer.words[QUEUE_TAIL]
        peer.words[SEND_HEAD] = sleep - 1
        queue_pair.post_send(b"x")
    assert queue_pair.is_up
    assert drain(device) == []
    assert receive(peer.socket).data == bytes((BELL,))


def test_the_doorbell_rings_only_for_a_sleeper(device: ShmDevice) -> None:
    other = ShmDevice(os.urandom(8))
    near, far = link(device, other)
    rkey = far.domain.register(16 * KIB).rkey
    drain(other)

    def rings() -> int:
        assert far._socket is not None
        count = 0
        while True:
            try:
                assert receive(far._socket).data == bytes((BELL,))
            except BlockingIOError:
                return count
            count += 1

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
