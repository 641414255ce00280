"""Who may call, what a caller may say, and what it hears when it may not."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysmc import disposal
from pysmc.disposal import has_room
from pysmc.errors import FabricError
from pysmc.fabric import shm_endpoint
from pysmc.fabric.base import CompletionKind, Status
from pysmc.fabric.shm import ShmDevice
from pysmc.fabric.shm_arena import ARENA_BYTES, ARENAS_MAX
from pysmc.fabric.shm_endpoint import (
    CALLERS_MAX,
    HELLO_DESCRIPTORS_MAX,
    REFUSAL,
    REFUSALS,
    Hello,
    Packet,
    endpoint_name,
    is_allowed,
    receive,
)
from tests.fabric.rawpeer import (
    PSN,
    Child,
    RawPeer,
    descriptors,
    drain,
    identified,
    identify,
    memfd,
    statuses,
)

if TYPE_CHECKING:
    from pysmc.fabric.shm_link import ShmQueuePair

CONNECTED = CompletionKind.CONNECTED


def waiting(device: ShmDevice, peer: RawPeer) -> ShmQueuePair:
    queue_pair = device.create_domain().create_queue_pair()
    queue_pair.connect(peer.remote(), 1, passive=True)
    return queue_pair


def refusal(device: ShmDevice, peer: RawPeer) -> Status:
    """Hear why; nothing may have come along."""
    packet = peer.hear(device)
    assert packet.data[0] == REFUSAL
    assert len(packet.data) == 2
    assert packet.descriptors == []
    assert peer.hear(device).data == b"", "and the socket is closed"
    return REFUSALS[packet.data[1]][0]


def test_the_name_follows_from_the_peer_id() -> None:
    assert endpoint_name(bytes(range(8))) == "\0pysmc/shm/1/0001020304050607"


def test_a_hello_says_what_it_was_told() -> None:
    hello = Hello(b"12345678", 1, 2, 3, 4, 5, 1)
    assert Hello.parse(hello.build()) == hello


@given(st.binary(max_size=80))
def test_any_bytes_are_a_hello_or_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="hello"):
        Hello.parse(data)


@pytest.mark.parametrize(
    ("at", "what"), [(0, "kind"), (1, "magic"), (8, "geometry"), (49, "many arenas")]
)
def test_a_hello_of_something_else_is_refused(at: int, what: str) -> None:
    data = bytearray(Hello(b"12345678", 1, 2, 3, 4).build())
    data[at] ^= 0x7F
    with pytest.raises(ValueError, match="hello"):
        Hello.parse(bytes(data))


def test_who_may_connect() -> None:
    me = os.geteuid()
    assert is_allowed(me, ()) is (me != 65534)
    assert not is_allowed(me + 1, ())
    assert is_allowed(1234, (1234,))


def test_the_overflow_user_may_never(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_allowed(65534, (65534,))
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert not is_allowed(65534, ())


def test_the_overflow_user_is_asked_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.open", _no_proc)
    assert shm_endpoint.overflow_uid() == 65534


def _no_proc(*arguments: object, **keywords: object) -> Any:
    raise FileNotFoundError(errno.ENOENT, "no /proc here")


def test_a_caller_that_is_expected_connects(device: ShmDevice, peer: RawPeer) -> None:
    queue_pair = peer.link(device, device.create_domain())
    assert queue_pair.is_up


@pytest.mark.parametrize(
    "changes",
    [
        {"peer_id": b"\0" * 8},
        {"number": 5},
        {"psn": PSN + 1},
        {"wanted_psn": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_caller_with_one_wrong_number_harms_nobody(
    device: ShmDevice, peer: RawPeer, changes: dict[str, Any]
) -> None:
    queue_pair = waiting(device, peer)
    before = descriptors()
    peer.call(device)
    peer.say(peer.hello(queue_pair.number, **changes))
    assert refusal(device, peer) is Status.UNREACHABLE
    assert drain(device) == []
    assert descriptors() == before
    # The one who is expected still connects.
    peer.socket.close()
    peer.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.socket.setblocking(False)
    peer.call(device)
    peer.say(peer.hello(queue_pair.number))
    assert statuses(drain(device)) == [(CONNECTED, Status.SUCCESS)]


def test_a_caller_for_nobody_is_refused(device: ShmDevice, peer: RawPeer) -> None:
    queue_pair = waiting(device, peer)
    peer.call(device)
    peer.say(peer.hello(queue_pair.number % 0xFFFFFF + 1))
    assert refusal(device, peer) is Status.UNREACHABLE


def test_a_caller_for_one_that_calls_itself_is_refused(
    device: ShmDevice, peer: RawPeer
) -> None:
    peer.listen()
    queue_pair = device.create_domain().create_queue_pair()
    queue_pair.connect(peer.remote(), 1, passive=False)
    peer.accept().close()
    peer.socket.close()
    peer.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.socket.setblocking(False)
    peer.call(device)
    peer.say(peer.hello(queue_pair.number))
    assert refusal(device, peer) is Status.UNREACHABLE


class FullEpoll:
    """An epoll that watches nothing more."""

    def __init__(self, device: ShmDevice, after: int = 0) -> None:
        self._real, self._left = device._epoll, after

    def register(self, descriptor: int, events: int) -> None:
        if self._left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._left -= 1
        self._real.register(descriptor, events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.parametrize("after", [0, 1])
def test_a_caller_that_cannot_be_watched_is_refused(
    device: ShmDevice, peer: RawPeer, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    queue_pair = waiting(device, peer)
    monkeypatch.setattr(device, "_epoll", FullEpoll(device, after))
    before = descriptors()
    peer.call(device)
    peer.say(peer.hello(queue_pair.number))
    expected = [[], [(CONNECTED, Status.NO_MEMORY)]][after]
    assert statuses(drain(device)) == expected
    assert refusal(device, peer) is Status.NO_MEMORY
    assert descriptors() == before
    assert device._endpoint is not None
    assert device._endpoint._callers == {}


def test_a_call_that_cannot_be_watched_fails(
    device: ShmDevice, peer: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer.listen()
    queue_pair = device.create_domain().create_queue_pair()
    monkeypatch.setattr(device, "_epoll", FullEpoll(device))
    queue_pair.connect(peer.remote(), 1, passive=False)
    assert statuses(drain(device)) == [(CONNECTED, Status.NO_MEMORY)]


def test_an_early_caller_waits_for_its_queue_pair(
    device: ShmDevice, peer: RawPeer
) -> None:
    queue_pair = device.create_domain().create_queue_pair()
    peer.call(device)
    peer.say(peer.hello(queue_pair.number))
    assert drain(device) == []
    queue_pair.connect(peer.remote(), 1, passive=True)
    assert statuses(drain(device)) == [(CONNECTED, Status.SUCCESS)]


def test_an_early_caller_is_refused_when_its_queue_pair_closes(
    device: ShmDevice, peer: RawPeer
) -> None:
    queue_pair = device.create_domain().create_queue_pair()
    before = descriptors()
    peer.call(device)
    peer.say(peer.hello(queue_pair.number))
    drain(device)
    queue_pair.close()
    assert refusal(device, peer) is Status.UNREACHABLE
    assert descriptors() < before, "its own went, and nothing of the caller's stayed"


def test_an_early_caller_may_give_up(device: ShmDevice, peer: RawPeer) -> None:
    queue_pair = device.create_domain().create_queue_pair()
    peer.call(device)
    before = descriptors()
    peer.say(peer.hello(queue_pair.number))
    drain(device)
    assert descriptors() == before + 1, "its socket is kept; what it brought waits"
    peer.socket.close()
    drain(device)
    assert descriptors() == before - 1
    queue_pair.connect(peer.remote(), 1, passive=True)
    assert drain(device) == []


@pytest.mark.parametrize(
    "data", [b"\0", b"\x01" * 52, b"\x04\x01", b"x" * 300], ids=lambda d: str(len(d))
)
def test_nonsense_is_refused(device: ShmDevice, peer: RawPeer, data: bytes) -> None:
    waiting(device, peer)
    before = descriptors()
    peer.call(device)
    peer.say(data)
    assert refusal(device, peer) is Status.BROKEN_RULE
    assert descriptors() == before
    assert drain(device) == []


BAD_MEMORY = [
    "none",
    "one too many",
    "an arena is missing",
    "seals are missing",
    "too small",
    "not a memfd",
    "an arena of an odd size",
]


def _bad_memory(peer: RawPeer) -> dict[str, tuple[list[int], int]]:
    """Descriptors that break a rule, by what is wrong, with the arenas announced."""
    control = peer.control
    return {
        "none": ([], 0),
        "one too many": ([control, memfd()], 0),
        "an arena is missing": ([control], 1),
        "seals are missing": ([memfd(seals=0)], 0),
        "too small": ([memfd(4096)], 0),
        "not a memfd": ([peer.socket.fileno()], 0),
        "an arena of an odd size": ([control, memfd(16384 + 1)], 1),
    }


@pytest.mark.parametrize("what", BAD_MEMORY)
def test_bad_memory_is_refused_on_both_ends(
    device: ShmDevice, peer: RawPeer, what: str
) -> None:
    queue_pair = waiting(device, peer)
    cases = _bad_memory(peer)
    assert list(cases) == BAD_MEMORY
    brought, arenas = cases[what]
    peer.call(device)
    before = descriptors()
    peer.say(peer.hello(queue_pair.number, arenas=arenas), brought)
    (completion,) = drain(device)
    assert completion.kind is CONNECTED
    assert completion.status is Status.BROKEN_RULE
    assert completion.payload
    packet = receive(peer.socket)
    assert REFUSALS[packet.data[1]][0] is Status.BROKEN_RULE
    assert not queue_pair.is_up
    assert descriptors() == before


def test_our_own_memory_is_not_taken_for_the_peers(
    device: ShmDevice, peer: RawPeer
) -> None:
    queue_pair = peer.link(device, device.create_domain())
    queue_pair.domain.register(16384)
    packet = peer.hear(device)
    assert packet.data == bytes((shm_endpoint.ARENA, 0))
    peer.say(packet.data, packet.descriptors)
    packet.close()
    (completion,) = drain(device)
    assert completion.status is Status.BROKEN_RULE
    assert completion.payload == "it is our own memory"


def test_more_descriptors_than_anybody_needs(device: ShmDevice, peer: RawPeer) -> None:
    queue_pair = waiting(device, peer)
    peer.call(device)
    before = descriptors()
    peer.say(peer.hello(queue_pair.number), [peer.control] * 200)
    (completion,) = drain(device)
    assert completion.status is Status.BROKEN_RULE
    assert descriptors() == before


def test_callers_that_wait_cost_a_descriptor_each(device: ShmDevice) -> None:
    queue_pair = device.create_domain().create_queue_pair()
    peers = [RawPeer() for _ in range(8)]
    before = descriptors()
    for peer in peers:
        peer.call(device)
        peer.say(
            peer.hello(queue_pair.number, arenas=ARENAS_MAX),
            [peer.control] * HELLO_DESCRIPTORS_MAX,
        )
    drain(device)
    assert descriptors() == before + len(peers)
    for peer in peers:
        peer.close()


def test_too_many_callers_wait(device: ShmDevice) -> None:
    queue_pair = device.create_domain().create_queue_pair()
    peers = [RawPeer() for _ in range(CALLERS_MAX + 3)]
    for peer in peers:
        peer.call(device)
        peer.say(peer.hello(queue_pair.number))
        drain(device, 70)
    answers = []
    for peer in peers:
        try:
            answers.append(REFUSALS[receive(peer.socket).data[1]][1])
        except BlockingIOError:
            answers.append("waits")
    assert answers == ["waits"] * CALLERS_MAX + ["busy: too many callers wait"] * 3
    for peer in peers:
        peer.close()


def test_while_closes_wait_nobody_is_taken(
    device: ShmDevice, peer: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_pair = waiting(device, peer)
    with monkeypatch.context() as patch:
        patch.setattr(shm_endpoint, "has_room", lambda: False)
        peer.call(device)
        peer.say(peer.hello(queue_pair.number))
        with pytest.raises(FabricError, match="strangers wait"):
            device.check_callable()
        assert drain(device) == []
        assert device.arm()
        assert not select.select([device.fileno()], [], [], 0)[0], "it would spin"
        with pytest.raises(FabricError, match="strangers wait"):
            device.check_callable()
    device.check_callable()
    assert statuses(drain(device)) == [(CONNECTED, Status.SUCCESS)]


def test_memory_of_another_user_is_closed_here_when_there_is_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever closes a memfd last frees its pages."""
    elsewhere: list[int] = []

    def close_elsewhere(descriptor: int) -> bool:
        elsewhere.append(descriptor)
        return False

    monkeypatch.setattr(shm_endpoint, "close_elsewhere", close_elsewhere)
    little, much = memfd(ARENA_BYTES * 2), memfd(ARENA_BYTES * 2)
    os.posix_fallocate(much, 0, ARENA_BYTES * 2)
    Packet(b"", [little, much], truncated=False, is_foreign=True).close()
    assert elsewhere == [much]


def test_nothing_of_another_user_is_closed_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two messages bring more than waits before nobody else is let in."""
    slow, closers = threading.Event(), set()

    def close(descriptor: int) -> None:
        closers.add(threading.current_thread().name)
        assert slow.wait(10)

    with monkeypatch.context() as patch:
        patch.setattr(disposal, "_closer", disposal._Closer())
        patch.setattr(disposal, "_REST", 0.01)
        patch.setattr(os, "close", close)
        for first in (1 << 20, 1 << 21):
            brought = list(range(first, first + 253))
            Packet(b"", brought, truncated=False, is_foreign=True).close()
            assert not brought
        assert not has_room()
        slow.set()
        for thread in threading.enumerate():
            if thread.name == "pysmc-close":
                thread.join(10)
        assert has_room()
    assert closers == {"pysmc-close"}


def test_silent_callers_make_room_for_others(device: ShmDevice) -> None:
    queue_pair = device.create_domain().create_queue_pair()
    silent = [RawPeer() for _ in range(CALLERS_MAX)]
    for peer in silent:
        peer.call(device)
    drain(device, 400)
    speaker = RawPeer()
    queue_pair.connect(speaker.remote(), 1, passive=True)
    speaker.call(device)
    speaker.say(speaker.hello(queue_pair.number))
    assert statuses(drain(device)) == [(CONNECTED, Status.SUCCESS)]
    assert REFUSALS[receive(silent[0].socket).data[1]][0] is Status.NO_MEMORY
    for peer in [*silent, speaker]:
        peer.close()


def test_the_name_may_be_taken() -> None:
    peer_id = os.urandom(8)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as squatter:
        squatter.bind(endpoint_name(peer_id))
        device = ShmDevice(peer_id)
        with pytest.raises(FabricError, match="EADDRINUSE"):
            device.create_domain()
        device.close()


def test_a_device_without_an_endpoint_can_only_call() -> None:
    near, far = ShmDevice(os.urandom(8), endpoint=False), ShmDevice(os.urandom(8))
    ends = [device.create_domain().create_queue_pair() for device in (near, far)]
    ends[1].connect(identified(identify(near, ends[0], 1)), 2, passive=True)
    ends[0].connect(identified(identify(far, ends[1], 2)), 1, passive=False)
    drain(far)
    drain(near)
    assert ends[0].is_up
    assert ends[1].is_up
    back = [device.create_domain().create_queue_pair() for device in (near, far)]
    back[1].connect(identified(identify(near, back[0], 1)), 2, passive=False)
    assert statuses(drain(far)) == [(CONNECTED, Status.UNREACHABLE)]
    near.close()
    far.close()


# --- calling somebody strange --------------------------------------------------


def calling(device: ShmDevice, peer: RawPeer) -> ShmQueuePair:
    peer.listen()
    queue_pair = device.create_domain().create_queue_pair()
    queue_pair.connect(peer.remote(), 1, passive=False)
    hello = peer.understand(peer.accept())
    assert hello == Hello(
        device.peer_id, queue_pair.number, 1, peer.number, PSN, arenas=0
    )
    return queue_pair


def test_the_called_peer_answers(device: ShmDevice, peer: RawPeer) -> None:
    queue_pair = calling(device, peer)
    peer.say(peer.hello(queue_pair.number))
    assert statuses(drain(device)) == [(CONNECTED, Status.SUCCESS)]


@pytest.mark.parametrize("reason", [*REFUSALS, 99])
def test_the_called_peer_refuses(device: ShmDevice, peer: RawPeer, reason: int) -> None:
    queue_pair = calling(device, peer)
    peer.say(bytes((REFUSAL, reason)), [])
    (completion,) = drain(device)
    expected = REFUSALS.get(reason, (Status.BROKEN_RULE, "refusal 99"))
    assert completion.status is expected[0]
    assert expected[1] in completion.payload
    assert not queue_pair.is_up


def test_the_called_peer_hangs_up(device: ShmDevice, peer: RawPeer) -> None:
    calling(device, peer)
    peer.socket.close()
    assert statuses(drain(device)) == [(CONNECTED, Status.PEER_GONE)]


@pytest.mark.parametrize("changes", [{"number": 1}, {"refusal": 2}, {"arenas": 1}])
def test_the_called_peer_answers_wrongly(
    device: ShmDevice, peer: RawPeer, changes: dict[str, int]
) -> None:
    queue_pair = calling(device, peer)
    before = descriptors()
    peer.say(peer.hello(queue_pair.number, **changes))
    assert statuses(drain(device)) == [(CONNECTED, Status.BROKEN_RULE)]
    assert descriptors() == before - 1, "the socket"


def test_the_called_peer_babbles(device: ShmDevice, peer: RawPeer) -> None:
    calling(device, peer)
    peer.say(b"hello?", [peer.control])
    assert statuses(drain(device)) == [(CONNECTED, Status.BROKEN_RULE)]


def test_nobody_takes_calls(device: ShmDevice, peer: RawPeer) -> None:
    peer.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.listener.bind(endpoint_name(peer.peer_id))
    peer.listener.listen(0)
    domain = device.create_domain()
    for _ in range(2):
        domain.create_queue_pair().connect(peer.remote(), 1, passive=False)
    (completion,) = drain(device)
    assert completion.status is Status.NO_MEMORY
    assert "EAGAIN" in completion.payload


def test_the_peer_ends_while_it_is_called(device: ShmDevice, peer: RawPeer) -> None:
    peer.listen()
    domain = device.create_domain()
    domain.create_queue_pair().connect(peer.remote(), 1, passive=False)
    assert peer.listener is not None
    peer.listener.close()
    assert statuses(drain(device)) == [(CONNECTED, Status.PEER_GONE)]


# --- running out of descriptors ------------------------------------------------


def _starved(spare: int, run: Any) -> Any:
    """Run something in a child that has only so many descriptors to spare."""

    def limited() -> Any:
        return run(lambda: _limit(spare))

    return Child(limited).result()


def _limit(spare: int) -> None:
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    holes = used + 1 - len(os.listdir("/proc/self/fd"))
    for _ in range(holes + 1):
        os.dup(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + spare, hard))


def test_with_few_descriptors_connecting_fails_and_says_so() -> None:
    def run(limit: Any) -> list[str]:
        caller = ShmDevice(os.urandom(8))
        called = ShmDevice(os.urandom(8))
        near = caller.create_domain().create_queue_pair()
        far = called.create_domain().create_queue_pair()
        remotes = (
            identified(identify(caller, near, 1)),
            identified(identify(called, far, 2)),
        )
        far.connect(remotes[0], 2, passive=True)
        limit()
        near.connect(remotes[1], 1, passive=False)
        seen = [drain(caller), drain(called), drain(caller)]
        return [c.status.name for one in seen for c in one]

    outcomes = [_starved(spare, run) for spare in range(12)]
    assert outcomes[0] == ["NO_MEMORY"], "not even a socket"
    assert outcomes[-1] == ["SUCCESS", "SUCCESS"]
    for outcome in outcomes:
        assert set(outcome) <= {"NO_MEMORY", "SUCCESS"}, outcome
        assert len(outcome) >= 1
    assert any(outcome == ["NO_MEMORY", "NO_MEMORY"] for outcome in outcomes)


def test_with_no_descriptor_callers_are_told_and_the_loop_rests() -> None:
    def run(limit: Any) -> list[Any]:
        called = ShmDevice(os.urandom(8))
        called.create_domain()
        peers = [RawPeer() for _ in range(3)]
        limit()
        for peer in peers:
            peer.call(called)
        drain(called, 500)
        answers = [REFUSALS[receive(peer.socket).data[1]][0].name for peer in peers]
        rests = called.arm() and not called.poll() and called.arm()
        import select

        return [answers, rests, select.select([called.fileno()], [], [], 0)[0]]

    assert _starved(0, run) == [["NO_MEMORY"] * 3, True, []]


def test_without_a_reserve_the_endpoint_pauses_and_resumes() -> None:
    def run(limit: Any) -> list[Any]:
        called = ShmDevice(os.urandom(8))
        domain = called.create_domain()
        doomed = domain.create_queue_pair()
        peer = RawPeer()
        endpoint = called._endpoint
        assert endpoint is not None
        limit()
        # As when another thread took the one that was freed for a moment.
        os.close(endpoint._reserve)
        endpoint._reserve = -1
        os.dup(0)
        peer.call(called)
        drain(called, 200)
        paused = endpoint._paused
        doomed.close()
        drain(called, 200)
        return [paused, endpoint._paused, endpoint._reserve >= 0]

    assert _starved(0, run) == [True, False, True]
