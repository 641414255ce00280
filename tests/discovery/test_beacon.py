"""Beacons: names, lookups with their system calls, sharing and taking over."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.discovery import beacon as beacon_module
from pysmc.discovery.address import Endpoint, endpoint
from pysmc.discovery.beacon import (
    BEACON_PREFIX,
    KEEPER_PREFIX,
    Beacon,
    BeaconRegistry,
    Lookup,
    listener_names,
)
from pysmc.discovery.rendezvous import Users

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAME = b"test-%d" % os.getpid()


def names_in_kernel(part: bytes) -> list[str]:
    """List the abstract names that contain `part`, by /proc/net/unix."""
    with open("/proc/net/unix", encoding="ascii", errors="replace") as table:
        words = [line.split() for line in table]
    wanted = part.decode("ascii")
    return sorted(
        row[7] for row in words if len(row) > 7 and row[7].endswith("/" + wanted)
    )


@pytest.fixture
def lookup() -> Iterator[Lookup]:
    made = Lookup()
    yield made
    made.close()


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beacon_module, "RETRY_FIRST", 0.00001)


def target(host: str, port: int) -> Endpoint:
    found = endpoint((host, port))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("bound", "dual_stack", "names"),
    [
        ("127.0.0.1", False, (b"80", b"4-7f000001-80")),
        ("0.0.0.0", False, (b"80", b"4-00000000-80")),
        ("::1", False, (b"80", b"6-" + b"0" * 31 + b"1-80")),
        ("::1", True, (b"80", b"6-" + b"0" * 31 + b"1-80")),
        ("::", False, (b"80", b"6-" + b"0" * 32 + b"-80")),
        ("::", True, (b"80", b"6-" + b"0" * 32 + b"-80", b"46-" + b"0" * 32 + b"-80")),
        ("::ffff:127.0.0.1", True, (b"80", b"4-7f000001-80")),
        ("::ffff:0.0.0.0", True, (b"80", b"4-00000000-80")),
    ],
)
def test_names(bound: str, dual_stack: bool, names: tuple[bytes, ...]) -> None:
    assert listener_names(target(bound, 80), dual_stack=dual_stack) == names


@pytest.mark.parametrize(
    ("bound", "dual_stack", "dialled", "found"),
    [
        ("127.0.0.1", False, "127.0.0.1", True),
        ("127.0.0.1", False, "127.0.0.2", False),
        ("127.0.0.1", False, "::ffff:127.0.0.1", True),
        ("127.0.0.1", False, "0.0.0.0", True),
        ("127.0.0.1", False, "::1", False),
        ("0.0.0.0", False, "127.0.0.1", True),
        ("0.0.0.0", False, "127.1.2.3", True),
        ("0.0.0.0", False, "::ffff:127.0.0.1", True),
        ("0.0.0.0", False, "192.0.2.1", False),
        ("0.0.0.0", False, "::1", False),
        ("::", True, "127.0.0.1", True),
        ("::", True, "::1", True),
        ("::", True, "::", True),
        ("::", True, "192.0.2.1", False),
        ("::", True, "2001:db8::1", False),
        ("::", False, "127.0.0.1", False),
        ("::", False, "::1", True),
        ("::1", False, "::1", True),
        ("::ffff:127.0.0.1", True, "127.0.0.1", True),
    ],
)
async def test_lookup(
    kit: Any, lookup: Lookup, bound: str, dual_stack: bool, dialled: str, found: bool
) -> None:
    registry = BeaconRegistry(kit.loop, Users())
    port = 40_000 + os.getpid() % 20_000
    assert not lookup.has_port(port)
    names = listener_names(target(bound, port), dual_stack=dual_stack)
    held = [registry.hold(name) for name in names]
    assert lookup.has_port(port)
    assert lookup.has_address(target(dialled, port)) is found
    for beacon in held:
        registry.release(beacon)
    assert not lookup.has_port(port)
    assert not lookup.has_address(target(dialled, port))


PROBES = """
import os, sys
from pysmc.discovery.address import endpoint
from pysmc.discovery.beacon import Lookup
lookup = Lookup()
for host, port in [("127.0.0.1", {plain}), ("127.0.0.1", {exact}), ("::1", {any})]:
    os.write(1, b"before")
    if lookup.has_port(port):
        lookup.has_address(endpoint((host, port)))
    os.write(1, b"after")
"""


@pytest.mark.skipif(
    shutil.which("strace") is None,
    reason="needs the program strace: apt-get install -y strace",
)
async def test_system_calls_of_a_lookup(kit: Any, tmp_path: Path) -> None:
    registry = BeaconRegistry(kit.loop, Users())
    base = 41_000 + os.getpid() % 10_000
    for bound, port in (("127.0.0.1", base + 1), ("::", base + 2)):
        for name in listener_names(target(bound, port), dual_stack=False):
            registry.hold(name)
    log = tmp_path / "strace"
    code = PROBES.format(plain=base, exact=base + 1, any=base + 2)
    command = ["strace", "-f", "-o", str(log), sys.executable, "-c", code]
    strace = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert await asyncio.wait_for(strace.wait(), 60) == 0
    registry.close()
    counts = [
        Counter(re.findall(r"^\d+ +(\w+)\(", part.split('"after"')[0], re.MULTILINE))
        for part in log.read_text("utf-8").split('"before"')[1:]
    ]
    for count in counts:
        del count["write"]
        # An interpreter may collect garbage or take memory at any moment.
        for noise in ("brk", "mmap", "munmap", "madvise", "futex"):
            del count[noise]
    assert counts[0] == {"connect": 1}, "a plain server"
    assert counts[1] == {"connect": 2}, "an exact address"
    # Three names, the bind test, and whether any address can be bound.
    local = {"socket": 1, "bind": 1, "close": 2, "openat": 1, "read": 1}
    assert counts[2] == {"connect": 3, **local}, "a wildcard address"


async def test_sharers_of_a_name_close_it_with_the_last_one(kit: Any) -> None:
    registry = BeaconRegistry(kit.loop, Users())
    first, second = registry.hold(NAME), registry.hold(NAME)
    assert first is second
    registry.release(first)
    assert first.is_holder
    registry.release(second)
    assert names_in_kernel(NAME) == []
    registry.close()


async def test_a_second_loop_watches_and_takes_over(kit: Any) -> None:
    holder = Beacon(kit.loop, NAME, Users())
    watcher = Beacon(kit.loop, NAME, Users())
    assert [holder.is_holder, watcher.is_holder] == [True, False]
    assert [holder.is_guarded, watcher.is_guarded] == [True, True]
    holder.close()
    holder.close()
    await kit.until(lambda: watcher.is_holder and watcher.is_guarded)
    watcher.close()
    assert names_in_kernel(NAME) == []


async def test_exactly_one_of_many_survivors_takes_over(kit: Any) -> None:
    beacons = [Beacon(kit.loop, NAME, Users()) for _ in range(8)]
    while beacons:
        await kit.until(
            lambda: (
                any(beacon.is_holder for beacon in beacons)
                and all(beacon.is_guarded for beacon in beacons)
            )
        )
        assert [beacon.is_holder for beacon in beacons].count(True) == 1
        assert len(set(names_in_kernel(NAME))) == 2, "the beacon and its keeper"
        holder = next(beacon for beacon in beacons if beacon.is_holder)
        beacons.remove(holder)
        holder.close()


async def test_a_watcher_that_leaves_is_forgotten(kit: Any) -> None:
    holder = Beacon(kit.loop, NAME, Users())
    before = kit.count_descriptors()
    watcher = Beacon(kit.loop, NAME, Users())
    await kit.until(lambda: kit.count_descriptors() == before + 2)
    watcher.close()
    await kit.until(lambda: kit.count_descriptors() == before)
    holder.close()


async def test_strangers_do_not_fill_the_descriptor_table(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Users, "foreign", lambda *_: 4711)
    holder = Beacon(kit.loop, NAME, Users())
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(KEEPER_PREFIX + NAME)
        stranger.setblocking(False)
        assert await kit.loop.sock_recv(stranger, 1) == b""
    holder.close()


async def test_while_closes_wait_no_watcher_is_taken(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beacon_module, "ADMIT_PAUSE", 0.01)
    monkeypatch.setattr(beacon_module, "has_room", lambda: False)
    holder = Beacon(kit.loop, NAME, Users())
    watcher = Beacon(kit.loop, NAME, Users())
    await kit.until(lambda: holder._timer is not None)
    assert not holder._watchers
    monkeypatch.undo()
    await kit.until(lambda: holder._watchers)
    watcher.close()
    holder.close()


async def test_a_squatted_beacon_is_left_alone_with_a_warning(
    kit: Any, quick_retries: None, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as squatter:
        squatter.bind(BEACON_PREFIX + NAME)
        beacon = Beacon(kit.loop, NAME, Users())
        await kit.until(lambda: "giving up" in caplog.text)
        assert not beacon.is_holder
        assert not beacon.is_guarded
        beacon.close()


async def test_a_squatted_keeper_does_not_put_the_beacon_out(
    kit: Any, quick_retries: None, lookup: Lookup, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(KEEPER_PREFIX + NAME)
        beacon = Beacon(kit.loop, NAME, Users())
        await kit.until(lambda: "giving up" in caplog.text)
        assert beacon.is_holder
        assert lookup._exists(NAME)
        beacon.close()


async def test_a_keeper_that_hangs_up_does_not_keep_a_watcher_busy(
    kit: Any, quick_retries: None, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as beacon,
        socket.socket(socket.AF_UNIX) as keeper,
    ):
        beacon.bind(BEACON_PREFIX + NAME)
        keeper.bind(KEEPER_PREFIX + NAME)
        keeper.listen()
        keeper.setblocking(False)
        visits = 0

        def hang_up() -> None:
            nonlocal visits
            visits += 1
            keeper.accept()[0].close()

        kit.loop.add_reader(keeper, hang_up)
        watcher = Beacon(kit.loop, NAME, Users())
        await kit.until(lambda: "giving up" in caplog.text)
        kit.loop.remove_reader(keeper)
        assert visits <= beacon_module.RETRIES_MAX + 1
        watcher.close()


async def test_a_holder_that_stayed_is_followed_at_once(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beacon_module, "STEADY", 0.0)
    monkeypatch.setattr(beacon_module, "RETRY_FIRST", 1000.0)
    holder = Beacon(kit.loop, NAME, Users())
    watcher = Beacon(kit.loop, NAME, Users())
    holder.close()
    await kit.until(lambda: watcher.is_holder)
    watcher.close()


async def test_closing_while_a_retry_is_planned(kit: Any) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as squatter:
        squatter.bind(BEACON_PREFIX + NAME)
        beacon = Beacon(kit.loop, NAME, Users())
        beacon.close()
    await kit.after(0.003)
    assert not beacon.is_holder


class NoDescriptors:
    """Leaves room for some more descriptors only, until it is left."""

    def __init__(self, spare: int) -> None:
        self.spare = spare

    def __enter__(self) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as free:
            lowest = free.fileno()
        limit = (lowest + self.spare, self.limits[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)


@pytest.mark.parametrize("spare", [0, 1])
async def test_no_descriptor_for_a_new_beacon(kit: Any, spare: int) -> None:
    before = kit.count_descriptors()
    with NoDescriptors(spare), pytest.raises(OSError, match="Too many open files"):
        Beacon(kit.loop, NAME, Users())
    assert kit.count_descriptors() == before
    assert names_in_kernel(NAME) == []


async def test_no_descriptor_for_a_watcher_and_later_one(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beacon_module, "ADMIT_PAUSE", 0.01)
    holder = Beacon(kit.loop, NAME, Users())
    watcher = Beacon(kit.loop, NAME, Users())
    before = kit.count_descriptors()
    with NoDescriptors(0):
        await kit.until(lambda: holder._timer is not None)
    await kit.until(lambda: kit.count_descriptors() == before + 1)
    watcher.close()
    holder.close()


async def test_no_descriptor_while_taking_over_and_later_one(kit: Any) -> None:
    holder = Beacon(kit.loop, NAME, Users())
    watcher = Beacon(kit.loop, NAME, Users())
    await kit.until(lambda: holder._watchers)
    holder.close()
    with NoDescriptors(0):
        watcher._on_holder_gone()
        # Two closed sockets have left room; take it.
        taken = []
        with suppress(OSError):
            while True:
                taken.append(socket.socket())
        await kit.until(lambda: watcher._retries >= 2)
        for sock in taken:
            sock.close()
    await kit.until(lambda: watcher.is_holder and watcher.is_guarded)
    watcher.close()


async def test_keeper_connection_refused_for_other_reasons_is_an_error(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forbidden(socket.socket):
        def connect(self, _: Any, /) -> None:
            raise PermissionError(errno.EACCES, "forbidden")

    holder = Beacon(kit.loop, NAME, Users())
    monkeypatch.setattr(socket, "socket", Forbidden)
    with pytest.raises(PermissionError):
        Beacon(kit.loop, NAME, Users())
    monkeypatch.undo()
    holder.close()


async def test_spurious_wake_of_the_keeper(kit: Any) -> None:
    holder = Beacon(kit.loop, NAME, Users())
    holder._admit()
    assert holder._watchers == set()
    holder.close()
    holder._resume_admitting()
    assert holder._keeper is None


async def test_a_beacon_takes_no_datagrams(kit: Any) -> None:
    holder = Beacon(kit.loop, NAME, Users())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(BEACON_PREFIX + NAME)
        with pytest.raises(BrokenPipeError):
            sender.send(b"x")
    holder.close()


async def test_abandoned_copies_leave_the_loop_alone(kit: Any) -> None:
    registry = BeaconRegistry(kit.loop, Users())
    holder = registry.hold(NAME)
    keeper = holder._keeper
    assert keeper is not None
    fileno = keeper.fileno()
    registry.abandon()
    assert names_in_kernel(NAME) == []
    assert kit.loop.remove_reader(fileno), "abandon() did not touch it"
    registry.release(holder)


async def _work(
    say: Callable[[Any], None], make_kit: Callable[[], Any], name: bytes
) -> None:
    kit = make_kit()
    beacon = Beacon(kit.loop, name, Users())
    say(beacon.is_holder)
    await kit.until(lambda: beacon.is_holder and beacon.is_guarded)
    say("holder")
    await kit.after(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_holders_are_replaced(
    fork: Any, make_kit: Any, lookup: Lookup, number: int
) -> None:
    children = [fork(_work, make_kit, NAME) for _ in range(4)]
    roles = [child.hear() for child in children]
    assert roles.count(True) == 1
    holder = children[roles.index(True)]
    assert holder.hear() == "holder"

    async def replace() -> None:
        nonlocal holder
        while len(children) > 1:
            children.remove(holder)
            holder.kill(number)
            tasks = {asyncio.create_task(child.heard()): child for child in children}
            done, waiting = await asyncio.wait(
                tasks, return_when=asyncio.FIRST_COMPLETED
            )
            assert {task.result() for task in done} == {"holder"}
            assert len(done) == 1
            holder = tasks[done.pop()]
            assert lookup._exists(NAME)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(replace())
