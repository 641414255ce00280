"""A device of the verbs fabric: queues, descriptors, events, forking and its end."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING

import pytest

from pysmc.config import Config
from pysmc.errors import (
    FabricError,
    FabricUnavailable,
    ForkedError,
    LocalProtocolError,
)
from pysmc.fabric import open_device, verbs, verbs_closing
from pysmc.fabric import verbs_api as api
from pysmc.fabric.base import CompletionKind, Status, UpdateCodec
from pysmc.fabric.verbs import VerbsDevice
from pysmc.fabric.verbs_api import Limits
from pysmc.fabric.verbs_memory import RECEIVE_BLOCK, RECEIVES
from pysmc.testing.conformance_bench import KIB
from smcproto import cdc
from tests.fabric.fake_verbs import (
    ERROR,
    FakeFinder,
    Roce,
    World,
    make_port,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.fabric.verbs_ports import RdmaPort

CODEC = UpdateCodec(cdc.pack, cdc.unpack, lambda data: data[:1] == b"\xfe")
PORT_ERR, GID_CHANGE, QP_FATAL, COMM_EST = 10, 18, 1, 4


def is_readable(device: VerbsDevice) -> bool:
    return bool(select.select([device.fileno()], [], [], 0)[0])


def turn(device: VerbsDevice) -> None:
    """Poll as often as it takes to look at the descriptors."""
    for _ in range(70):
        device.poll()


# What it is


def test_a_device_is_a_gid_of_a_port(roce: Roce) -> None:
    device = roce.devices[0]
    port = make_port(1)
    assert (device.fabric, device.eid) == ("verbs", None)
    assert (device.gid, device.mac, device.mtu_code) == (port.gid, port.mac, 3)
    assert str(device) == "fake1:1:1"
    assert not device.is_gone


def test_the_library_is_opened_by_the_ports_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    opened: list[str] = []

    def open_verbs(name: str) -> api.Verbs:
        opened.append(name)
        return world.device(1)

    monkeypatch.setattr(verbs, "open_verbs", open_verbs)
    monkeypatch.setattr(verbs, "Reach", lambda: FakeFinder(world))
    device = open_device(
        "verbs", peer_id=bytes(8), config=Config(), codec=CODEC, port=make_port(1)
    )
    assert opened == ["fake1"]
    device.close()


def test_without_the_library_there_is_no_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def open_verbs(name: str) -> api.Verbs:
        operation = "open the verbs fabric"
        raise FabricUnavailable(operation, "UNAVAILABLE", f"no {name}")

    monkeypatch.setattr(verbs, "open_verbs", open_verbs)
    with pytest.raises(FabricUnavailable, match="no fake1"):
        VerbsDevice(make_port(1), codec=CODEC, config=Config())


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE])
def test_a_device_that_cannot_be_opened_leaves_nothing(number: int) -> None:
    world = World()
    library, finder = world.device(1), FakeFinder(world)
    library.fail("create_completion_queue", number)
    with pytest.raises(FabricError, match=errno.errorcode[number]) as caught:
        VerbsDevice(
            make_port(1), codec=CODEC, config=Config(), verbs=library, finder=finder
        )
    assert caught.value.status == "NO_MEMORY"
    assert library.is_closed
    assert not finder.is_open


@pytest.mark.parametrize(
    ("number", "words", "status"),
    [
        (errno.EMFILE, "EMFILE: no timer", "NO_MEMORY"),
        (errno.EPERM, "no timer", "UNAVAILABLE"),
    ],
)
def test_a_device_without_descriptors_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, number: int, words: str, status: str
) -> None:
    def no_timer() -> None:
        raise OSError(number, "no timer")

    monkeypatch.setattr(verbs_closing, "Timer", no_timer)
    world = World()
    library, finder = world.device(1), FakeFinder(world)
    with pytest.raises(FabricError, match=words) as caught:
        VerbsDevice(
            make_port(1), codec=CODEC, config=Config(), verbs=library, finder=finder
        )
    assert caught.value.status == status
    assert library.is_closed


# Completion queues


def test_no_completion_queue_has_more_queue_pairs_than_it_holds() -> None:
    """The imitation fails the test when one overflows."""
    roce = Roce()
    ends = []
    for _ in range(30):
        near, far = roce.bench.link()
        ends.append((near, far))
    assert roce.libraries[0].made["queue"] == 2
    roce.world.is_held = True
    for near, far in ends:
        for end in (near, far):
            for _ in range(200):
                end.queue_pair.post_send(b"x")
            end.queue_pair.flush()
    for number in list(roce.world.pairs):
        roce.world.pairs[number].to_error()
    roce.world.is_held = False
    for near, far in ends:
        for end in (near, far):
            roce.bench.await_one(end, CompletionKind.DOWN)
    roce.close()


def test_places_in_a_completion_queue_are_given_back(roce: Roce) -> None:
    device = roce.devices[0]
    for _ in range(60):
        domain = device.create_domain()
        domain.create_queue_pair()
        domain.close()
    assert roce.libraries[0].made["queue"] == 1


def test_a_small_device_has_more_queues() -> None:
    roce = Roce(Limits(1024, 400))
    domain = roce.devices[0].create_domain()
    for _ in range(5):
        domain.create_queue_pair()
    assert roce.libraries[0].made["queue"] == 3
    roce.close()


def test_a_completion_queue_that_cannot_be_had(roce: Roce) -> None:
    domain = roce.devices[0].create_domain()
    for _ in range(21):
        domain.create_queue_pair()
    roce.libraries[0].fail("create_completion_queue", errno.ENOMEM)
    with pytest.raises(FabricError, match="create completion queue: ENOMEM"):
        domain.create_queue_pair()
    domain.create_queue_pair()


def test_a_completion_queue_that_cannot_be_watched_is_not_used(
    roce: Roce, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would be woken for it."""

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no watches")

    domain = roce.devices[0].create_domain()
    for _ in range(21):
        domain.create_queue_pair()
    with monkeypatch.context() as patch:
        patch.setattr(roce.devices[0], "_watch", no_room)
        with pytest.raises(FabricError, match="no watches"):
            domain.create_queue_pair()
    assert roce.libraries[0].open["queue"] == 1
    domain.create_queue_pair()
    assert len(roce.devices[0]._handlers) == 6


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(16384, 100), "too small completion queues: 100"),
        (Limits(127, 1000), "too small queue pairs: 127 requests"),
    ],
)
def test_a_device_whose_queues_are_too_small_is_none(
    limits: Limits, words: str
) -> None:
    world = World()
    library, finder = world.device(1, limits), FakeFinder(world)
    with pytest.raises(FabricUnavailable, match=words):
        VerbsDevice(
            make_port(1), codec=CODEC, config=Config(), verbs=library, finder=finder
        )
    assert library.is_closed
    assert not finder.is_open


def test_a_completion_queue_that_the_device_does_not_have_is_no_shortage(
    roce: Roce,
) -> None:
    domain = roce.devices[0].create_domain()
    for _ in range(21):
        domain.create_queue_pair()
    roce.libraries[0].fail("create_completion_queue", errno.EINVAL)
    with pytest.raises(FabricUnavailable, match="create completion queue: EINVAL"):
        domain.create_queue_pair()


# Waking


def test_one_notification_is_asked_for_at_a_time(roce: Roce) -> None:
    near, far = roce.bench.link()
    device = roce.devices[0]
    roce.bench.settle()
    assert device.arm()
    roce.libraries[0].fail("request_notify", errno.EIO)  # which nobody asks for
    assert device.arm()
    assert not device.problem
    roce.libraries[0].failures.clear()
    far.queue_pair.post_send(b"x")
    far.queue_pair.flush()
    roce.world.run()
    assert is_readable(device)
    near.side.poll()
    assert device.arm()
    assert not is_readable(device)


def test_a_look_of_the_selector_takes_nothing_from_its_sleep(
    roce: Roce, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `pending` finds has rung by itself; nothing is written to ring again."""
    _, far = roce.bench.link()
    device = roce.devices[0]
    roce.bench.settle()
    rings: list[bool] = []
    ring = device._ring

    def counted() -> None:
        rings.append(True)
        ring()

    monkeypatch.setattr(device, "_ring", counted)
    assert device.arm()
    assert not device.pending()
    far.queue_pair.post_send(b"x")
    far.queue_pair.flush()
    roce.world.run()
    assert device.pending()
    assert is_readable(device)
    assert rings == []
    assert [done.kind for done in device.poll()] == [CompletionKind.RECEIVE]
    # A device that fails while it is looked at has nothing else to ring.
    assert device.arm()
    roce.libraries[0].fail("poll", errno.EIO)
    assert device.pending()
    assert rings
    assert is_readable(device)


def test_an_idle_device_is_quiet(roce: Roce) -> None:
    links = [roce.bench.link() for _ in range(5)]
    roce.bench.settle()
    for device in roce.devices:
        assert device.arm()
        assert not is_readable(device)
    roce.world.run()
    for device in roce.devices:
        assert not is_readable(device)
    assert links


# Events


def port_now(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[RdmaPort], RdmaPort | None]
) -> None:
    """Let the kernel show a port in another way."""
    monkeypatch.setattr(verbs, "read_port", lambda *_: change(make_port(1)))


def changed(**fields: object) -> Callable[[RdmaPort], RdmaPort]:
    import dataclasses

    return lambda port: dataclasses.replace(port, **fields)  # type: ignore[arg-type]


def test_a_port_that_is_blamed_takes_nothing_from_the_others(
    roce: Roce, monkeypatch: pytest.MonkeyPatch
) -> None:
    (near, _), (other, beside) = roce.bench.link(), roce.bench.link()
    port_now(monkeypatch, changed(state="DOWN"))
    roce.library_pair(near.queue_pair.number).to_error()
    beside.queue_pair.post_send(b"before the port went down")
    beside.queue_pair.flush()
    down = roce.bench.await_one(other, CompletionKind.DOWN)
    assert other.side.of(CompletionKind.RECEIVE, other.queue_pair)
    assert down.payload == roce.devices[0].problem


@pytest.mark.parametrize("number", [PORT_ERR, QP_FATAL, api.EVENT_DEVICE_FATAL])
def test_what_came_before_an_event_is_delivered_before_it(
    roce: Roce, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    near, far = roce.bench.link()
    count = RECEIVES - RECEIVE_BLOCK
    roce.bench.settle()
    assert roce.devices[0].arm(), "the next poll looks at events first"
    for _ in range(count):
        far.queue_pair.post_send(b"before")
    far.queue_pair.flush()
    roce.world.run()
    port_now(monkeypatch, changed(state="DOWN"))
    roce.library_pair(near.queue_pair.number).now = ERROR
    roce.libraries[0].raise_event(number)
    roce.bench.await_one(near, CompletionKind.DOWN)
    kinds = [item.kind for item in near.side.seen]
    assert kinds.count(CompletionKind.RECEIVE) == count
    assert kinds[-1] is CompletionKind.DOWN


def test_a_device_that_goes_while_it_is_armed_rings(
    roce: Roce, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without links nothing else tells its owner, who would offer it again."""
    device = roce.devices[0]
    roce.bench.settle()
    port_now(monkeypatch, lambda _: None)
    roce.libraries[0].raise_event(PORT_ERR)
    assert not device.arm() or is_readable(device)
    device.poll()
    assert device.is_gone


def test_a_closed_device_may_still_be_polled() -> None:
    """By what a loop had planned before."""
    roce = Roce()
    roce.close()
    turn(roce.devices[0])
    assert roce.devices[0].arm()


def test_a_link_that_ends_costs_one_look_at_the_port(
    roce: Roce, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its receives are flushed, and each look reads files."""
    near, _ = roce.bench.link()
    looks: list[str] = []
    monkeypatch.setattr(verbs, "read_port", lambda device, *_: looks.append(device))
    roce.library_pair(near.queue_pair.number).to_error()
    roce.bench.await_one(near, CompletionKind.DOWN)
    roce.bench.settle()
    assert looks == ["fake1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: None, "fake1 has no longer the GID 10.0.0.1"),
        (changed(gid=bytes(15) + b"\1"), "fake1 has no longer the GID 10.0.0.1"),
        (changed(state="DOWN"), "GID 10.0.0.1 of fake1 belongs to a port that is DOWN"),
    ],
)
def test_a_port_that_goes_away_ends_its_links(
    roce: Roce,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[RdmaPort], RdmaPort | None],
    words: str,
) -> None:
    links = [roce.bench.link() for _ in range(3)]
    waiting = roce.bench.end(roce.bench.a)
    waiting.queue_pair.connect(links[0][1].remote(1), 1, passive=False)
    device = roce.devices[0]
    roce.bench.settle()
    port_now(monkeypatch, change)
    assert device.arm()
    roce.libraries[0].raise_event(PORT_ERR)
    assert is_readable(device)
    roce.bench.a.poll()
    for near, _ in links:
        (down,) = near.side.of(CompletionKind.DOWN, near.queue_pair)
        assert (down.status, down.payload) == (Status.PEER_GONE, words)
    failed = waiting.side.of(CompletionKind.CONNECTED, waiting.queue_pair)
    assert [(item.status, item.payload) for item in failed] == [
        (Status.PEER_GONE, words)
    ]
    assert device.problem == words
    assert device.is_gone
    with pytest.raises(FabricUnavailable, match=words):
        device.create_domain()
    assert device.arm()


def test_another_ports_event_changes_nothing(
    roce: Roce, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = roce.bench.link()
    port_now(monkeypatch, lambda port: port)
    roce.libraries[0].raise_event(GID_CHANGE)
    roce.libraries[0].raise_event(COMM_EST)
    turn(roce.devices[0])
    assert not roce.libraries[0].events
    near.queue_pair.post_send(b"still here")
    roce.bench.await_one(far, CompletionKind.RECEIVE)


@pytest.mark.parametrize("number", [api.EVENT_DEVICE_FATAL, api.EVENT_CQ_ERROR])
def test_a_device_that_is_taken_away(roce: Roce, number: int) -> None:
    near, _ = roce.bench.link()
    device = roce.devices[0]
    roce.libraries[0].raise_event(number)
    found = roce.bench.await_one(near, CompletionKind.DOWN)
    assert found.status is Status.PEER_GONE
    assert found.payload == f"fake1 failed, or was taken away (event {number})"
    device.fail("a second time")
    assert "second" not in device.problem
    assert len(near.side.of(CompletionKind.DOWN, near.queue_pair)) == 1
    near.domain.close()


def test_a_queue_pair_that_the_device_ends_by_itself(roce: Roce) -> None:
    near, far = roce.bench.link()
    other, beside = roce.bench.link()
    roce.library_pair(near.queue_pair.number).now = ERROR
    roce.libraries[0].raise_event(QP_FATAL)
    found = roce.bench.await_one(near, CompletionKind.DOWN)
    assert found.payload == f"the device ended the queue pair (event {QP_FATAL})"
    other.queue_pair.post_send(b"still here")
    roce.bench.await_one(beside, CompletionKind.RECEIVE)
    far.queue_pair.close()


@pytest.mark.parametrize("operation", ["poll", "request_notify", "take_event"])
def test_a_device_whose_calls_fail_is_gone(roce: Roce, operation: str) -> None:
    near, _ = roce.bench.link()
    device = roce.devices[0]
    roce.bench.settle()
    if operation == "take_event":
        roce.libraries[0].raise_event(COMM_EST)
    roce.libraries[0].fail(operation, errno.EIO)
    device.arm()
    words = operation.replace("_", " ")
    (down,) = device.poll()
    assert (down.kind, down.queue_pair) == (CompletionKind.DOWN, near.queue_pair)
    assert down.payload.startswith(f"fake1 is gone: {words}: EIO")
    assert device.is_gone
    roce.libraries[0].raise_event(COMM_EST)  # which nobody can take any more
    turn(device)
    assert device.arm()
    assert not is_readable(device)


def test_what_a_gone_device_cannot_close_is_left() -> None:
    roce = Roce()
    library = roce.libraries[0]
    near, _ = roce.bench.link()
    near.domain.register(16 * KIB)
    library.fail("close", errno.EIO)
    roce.devices[0].fail("taken away")
    assert near.side.device.poll()
    roce.devices[0].close()
    assert not +library.open
    library.close()
    roce.close()


# The end


def test_a_closed_device_does_nothing(roce: Roce) -> None:
    device = roce.devices[0]
    device.close()
    device.close()
    with pytest.raises(LocalProtocolError, match="device is closed"):
        device.create_domain()


def test_a_child_is_refused_and_closes_its_descriptors(roce: Roce) -> None:
    near, far = roce.bench.link()
    region = near.domain.register(16 * KIB)
    device = roce.devices[0]
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(_look_in_child(device, before))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    far.queue_pair.post_send(b"still here")
    roce.bench.await_one(near, CompletionKind.RECEIVE)
    region.close()


def _look_in_child(device: VerbsDevice, before: int) -> int:
    try:
        for call in (device.poll, device.arm, device.fileno, device.create_domain):
            try:
                call()
            except ForkedError:
                continue
            return 1
        device.close()
        # Both devices: epoll, bell, timer, events, queue, finder.
        return 0 if before - len(os.listdir("/proc/self/fd")) == 12 else 2
    except BaseException:  # noqa: BLE001 - the exit status is all that gets out
        return 3


def test_a_grandchild_keeps_what_the_child_opened(roce: Roce) -> None:
    """Daemons fork twice, and their files get the numbers that are free."""
    _ = roce
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(_fork_with_files())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _fork_with_files() -> int:
    try:
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
        child = os.fork()
        if child == 0:
            for file in files:
                os.fstat(file)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:  # noqa: BLE001 - the exit status is all that gets out
        os._exit(3)


PROGRAM = """
import sys, importlib.util
spec = importlib.util.spec_from_file_location("tests.fabric.fake_verbs", sys.argv[1])
fake = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = fake
spec.loader.exec_module(fake)
roce = fake.Roce()
near, far = roce.bench.link()
near.domain.register(16384)
near.queue_pair.post_send(b"x")
close = roce.libraries[0].close
roce.libraries[0].close = lambda: (close(), print("closed"))
"""


@pytest.mark.slow
def test_a_program_that_ends_with_open_devices_says_nothing() -> None:
    """What is open is closed in order, while the library is still whole."""
    file = sys.modules["tests.fabric.fake_verbs"].__file__
    assert file is not None
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", PROGRAM, file],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")
