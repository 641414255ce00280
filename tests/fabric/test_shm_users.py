"""Other users of the same host: refused on both ends, unless both allow them."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.fabric.base import CompletionKind, Status
from pysmc.fabric.shm import ShmDevice
from pysmc.fabric.shm_endpoint import (
    FOREIGN_CALLERS_MAX,
)
from tests.fabric.rawpeer import (
    Child,
    RawPeer,
    Sleeper,
    drain,
    identified,
    identify,
    statuses,
)

if TYPE_CHECKING:
    from pysmc.fabric.base import RemoteQueuePair

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be others")
CONNECTED = CompletionKind.CONNECTED


def _as_user(
    uid: int, calls: bool, allowed: tuple[int, ...], line: socket.socket
) -> Any:
    """Be a device of another user, in a child: call or be called; tell the end."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    device = ShmDevice(os.urandom(8), allowed_uids=allowed)
    queue_pair = device.create_domain().create_queue_pair()
    line.send(identify(device, queue_pair, 3))
    queue_pair.connect(identified(line.recv(100)), 3, passive=not calls)
    line.send(b"ready")
    sleeper = Sleeper(device)
    connected = sleeper.until(CONNECTED)
    if connected.status is not Status.SUCCESS:
        return connected.status.name, connected.payload
    # Asleep, so that only the doorbell can wake us.
    received = sleeper.until(CompletionKind.RECEIVE)
    queue_pair.post_send(b"thank you")
    sleeper.until(CompletionKind.DOWN)
    return "SUCCESS", received.payload


def _meet(
    uid: int, calls: bool, ours: tuple[int, ...], theirs: tuple[int, ...]
) -> tuple[Any, Any]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = Child(lambda: _as_user(uid, calls, theirs, far))
    far.close()
    device = ShmDevice(os.urandom(8), allowed_uids=ours)
    queue_pair = device.create_domain().create_queue_pair()
    remote: RemoteQueuePair = identified(near.recv(100))
    near.send(identify(device, queue_pair, 4))
    if calls:
        queue_pair.connect(remote, 4, passive=True)
        assert near.recv(10) == b"ready"
    else:
        assert near.recv(10) == b"ready"
        queue_pair.connect(remote, 4, passive=False)
    sleeper = Sleeper(device)
    connected = sleeper.until(CONNECTED)
    if connected.status is Status.SUCCESS:
        queue_pair.post_send(b"from root")
        sleeper.until(CompletionKind.RECEIVE)
        queue_pair.close()
    result = child.result()
    device.close()
    near.close()
    return connected.status.name, result


@needs_root
@pytest.mark.parametrize("calls", [True, False], ids=["calls", "is called"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [((), ()), ((1000,), ()), ((), (0,))], ids=str
)
def test_a_foreign_user_is_refused_on_both_ends(
    calls: bool, ours: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    mine, (other, text) = _meet(1000, calls, ours, theirs)
    assert mine == "FOREIGN_USER"
    assert other == "FOREIGN_USER"
    assert "user" in text


@needs_root
@pytest.mark.parametrize("calls", [True, False], ids=["calls", "is called"])
def test_a_user_who_is_allowed_connects(calls: bool) -> None:
    mine, other = _meet(1000, calls, (1000,), (0,))
    assert mine == "SUCCESS"
    assert other == ("SUCCESS", b"from root")


@needs_root
@pytest.mark.parametrize("calls", [True, False], ids=["calls", "is called"])
def test_nobody_is_never_allowed(calls: bool) -> None:
    mine, (other, _) = _meet(65534, calls, (65534,), (0,))
    assert mine == "FOREIGN_USER"
    assert other == "FOREIGN_USER"


@needs_root
def test_a_foreign_verdict_waits_for_the_queue_pair() -> None:
    device = ShmDevice(os.urandom(8))
    queue_pair = device.create_domain().create_queue_pair()
    peer = RawPeer()

    def call() -> int:
        os.setresuid(1000, 1000, 1000)
        peer.call(device)
        peer.say(peer.hello(queue_pair.number))
        return 0

    assert Child(call).result() == 0
    assert drain(device) == []
    queue_pair.connect(peer.remote(), 1, passive=True)
    assert statuses(drain(device)) == [(CONNECTED, Status.FOREIGN_USER)]
    device.close()
    peer.close()


def _linger(peer: RawPeer, device: ShmDevice, wanted: int, line: socket.socket) -> int:
    """Send, as another user, a socket whose last close takes a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            near.send(bytes(1 << 16))
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    os.setresuid(1000, 1000, 1000)
    peer.call(device)
    peer.say(peer.hello(wanted), [peer.control, near.fileno()])
    near.close()
    line.send(b"sent")
    # Until the victim has done what it does; then both ends of TCP go.
    line.recv(4)
    far.close()
    peer.socket.close()
    return 0


@needs_root
@pytest.mark.parametrize("allowed", [(), (1000,)], ids=["foreign", "allowed"])
def test_what_closes_slowly_holds_nobody_up(allowed: tuple[int, ...]) -> None:
    device = ShmDevice(os.urandom(8), allowed_uids=allowed)
    queue_pair = device.create_domain().create_queue_pair()
    peer = RawPeer()
    queue_pair.connect(peer.remote(), 1, passive=True)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.settimeout(10)
    caller = Child(lambda: _linger(peer, device, queue_pair.number, far))
    assert near.recv(4) == b"sent"
    began = time.monotonic()
    (completion,) = drain(device)
    refusal = Status.BROKEN_RULE if allowed else Status.FOREIGN_USER
    assert completion.status is refusal
    device.close()
    assert time.monotonic() - began < 20, "it waited for the last byte of a stranger"
    near.send(b"done")
    assert caller.result() == 0
    for end in (near, far):
        end.close()
    peer.close()


@needs_root
def test_strangers_do_not_crowd_out_the_permitted() -> None:
    device = ShmDevice(os.urandom(8))
    queue_pair = device.create_domain().create_queue_pair()

    def crowd() -> int:
        os.setresuid(1000, 1000, 1000)
        peers = [RawPeer() for _ in range(40)]
        for peer in peers:
            peer.call(device)
            peer.say(peer.hello(queue_pair.number))
        return len(peers)

    child = Child(crowd)
    assert child.result() == 40
    drain(device, 400)
    assert device._endpoint is not None
    assert len(device._endpoint._callers) <= FOREIGN_CALLERS_MAX
    peer = RawPeer()
    queue_pair.connect(peer.remote(), 1, passive=True)
    peer.call(device)
    peer.say(peer.hello(queue_pair.number))
    assert statuses(drain(device)) == [(CONNECTED, Status.SUCCESS)]
    device.close()
    peer.close()
