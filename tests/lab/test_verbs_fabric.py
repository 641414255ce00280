"""The verbs fabric on soft-RoCE keeps the contract, and what an imitation cannot show.

The checks are those that every fabric passes; time passes while they pump, for here
there is a wire.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import subprocess
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.config import Config
from pysmc.errors import FabricError
from pysmc.fabric.base import CompletionKind, Status, UpdateCodec
from pysmc.fabric.verbs_ports import RdmaPort, list_ports
from pysmc.testing.conformance import CHECKS, ConformanceFailure
from pysmc.testing.conformance_bench import KIB, Bench, Writer, content
from smcproto import cdc
from tests.lab.ends import NOBODY
from tests.lab.network_faults import resources, run, wait_for_resources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pysmc.fabric.base import MemoryRegion
    from pysmc.fabric.verbs import VerbsDevice

pytestmark = pytest.mark.lab(seconds=60)

CODEC = UpdateCodec(cdc.pack, cdc.unpack, lambda data: data[:1] == b"\xfe")
MOMENT = 0.001
"""Seconds that a pump waits."""


def port_of(device: str) -> RdmaPort:
    """Find the GID of a device that is an IPv4 address."""
    (port,) = [
        port
        for port in list_ports()
        if port.device == device and not port.problem and port.address.version == 4
    ]
    return port


def open_one(device: str) -> VerbsDevice:
    """Open a device of this machine."""
    # Not above: the warm parent of the scenarios loads no verbs library.
    from pysmc.fabric.verbs import VerbsDevice

    return VerbsDevice(port_of(device), codec=CODEC, config=Config())


@contextlib.contextmanager
def make_pair() -> Iterator[tuple[Any, Any, Callable[[], object]]]:
    """Open both devices."""
    with contextlib.ExitStack() as opened:
        waiting = opened.enter_context(contextlib.closing(select.epoll()))
        a = opened.enter_context(contextlib.closing(open_one("rxe0")))
        b = opened.enter_context(contextlib.closing(open_one("rxe1")))
        yield a, b, lambda: waiting.poll(MOMENT)


@pytest.fixture
def before():
    """What the kernel holds when a scenario begins."""
    return resources()


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Both devices, and what checks do with them."""
    with make_pair() as (a, b, pump):
        yield Bench(a, b, pump)


SLOW = {"coalescing", "region_reuse", "order", "no_lost_wakeup"}
"""Checks that take half of the time of all."""


def breaches_of(names: set[str], to: int) -> None:
    """Make these checks, and write what was broken."""
    broken = []
    for name, check in CHECKS:
        if name in names:
            try:
                check(make_pair)
            except ConformanceFailure as exc:
                broken.append(f"{name}: {exc}")
    os.write(to, json.dumps(broken).encode())


@pytest.mark.lab(seconds=120)
@pytest.mark.timeout(180)
def test_conformance() -> None:
    """Every check passes; there are two processors, and two processes share them."""
    every = {name for name, _ in CHECKS}
    assert every > SLOW
    asked = []
    for names in (SLOW, every - SLOW):
        here, there = os.pipe()
        asked.append((begin_child(lambda: breaches_of(names, there)), here))  # noqa: B023
        os.close(there)
    broken = []
    for child, here in asked:
        with open(here, "rb") as answer:
            text = answer.read()
        assert end_child(child) == 0
        broken += json.loads(text)
    assert not broken


def test_a_busy_peer_is_waited_for(bench: Bench) -> None:
    """It takes nothing for two seconds, which is longer than any retry of packets."""
    near, far = bench.link()
    for number in range(300):
        near.queue_pair.post_send(b"%d" % number)
    near.queue_pair.flush()
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        near.side.poll()
        bench.pump()
    assert near.queue_pair.is_up

    def taken() -> list[Any]:
        return far.side.of(CompletionKind.RECEIVE, far.queue_pair)

    bench.until(lambda: len(taken()) == 300, "all arrive")
    assert [item.payload for item in taken()] == [b"%d" % n for n in range(300)]


def test_a_long_write_lands_byte_for_byte(bench: Bench) -> None:
    """Longer than staging, so that it waits, in pieces."""
    near, far = bench.link()
    region = far.domain.register(8 << 20)
    data = os.urandom(8 << 20)
    writer = Writer(near, region, far.queue_pair)
    writer.write(0, data)
    writer.publish(producer=1)
    until = time.monotonic() + 40
    while not far.side.updates(far.queue_pair) and time.monotonic() < until:
        bench.move()
    assert content(region) == data


def test_a_vanished_peer_is_noticed_within_the_stated_time(bench: Bench) -> None:
    """Its queue pair is destroyed without a word, as with a process that is killed."""
    near, far = bench.link()
    far.side.device.destroy(far.queue_pair)  # type: ignore[attr-defined]
    began = time.monotonic()
    near.queue_pair.post_send(b"anybody there?")
    near.queue_pair.flush()
    while not near.side.of(CompletionKind.DOWN, near.queue_pair):
        assert time.monotonic() < began + 10
        bench.move()
    (down,) = near.side.of(CompletionKind.DOWN, near.queue_pair)
    assert down.status is Status.TIMED_OUT
    assert "IBV_WC_RETRY_EXC_ERR, 12" in down.payload
    print(f"noticed after {time.monotonic() - began:.2f} s")  # noqa: T201


@pytest.mark.parametrize("what", ["link", "address"])
def test_a_port_that_goes_away_is_told(bench: Bench, what: str) -> None:
    near, _ = bench.link()
    device = near.side.device
    undo = {
        "link": ("ip link set va down", "ip link set va up"),
        "address": ("ip addr del 10.0.0.1/24 dev va", "ip addr add 10.0.0.1/24 dev va"),
    }
    do, back = undo[what]
    route = run("ip route show table 100 dev va").strip()
    run(do)
    try:
        until = time.monotonic() + 10
        while not device.is_gone:
            assert time.monotonic() < until
            near.side.poll()
            bench.pump()
        (down,) = near.side.of(CompletionKind.DOWN, near.queue_pair)
        assert down.status is Status.PEER_GONE
        print(down.payload)  # noqa: T201
        assert "10.0.0.1" in down.payload
    finally:
        run(back)
        # It went with the device, or with the address that it names.
        run(f"ip route replace {route} dev va table 100")
        until = time.monotonic() + 10
        while "10.0.0.1" not in usable("rxe0"):
            assert time.monotonic() < until, "its GID has not come back"
            select.select([], [], [], 0.1)


def usable(device: str) -> list[str]:
    """List the addresses of a device's GIDs that a connection could use now."""
    return [
        str(port.address)
        for port in list_ports()
        if port.device == device and not port.problem
    ]


def begin_child(call: Callable[[], None]) -> int:
    """Call something in a process of its own."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call()
            status = 0
        except BaseException:  # noqa: BLE001  # whoever reads the output learns it
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child


def end_child(child: int) -> int:
    """Wait for its end; gives its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(call: Callable[[], None]) -> None:
    """Call something in a process of its own, which fails with it."""
    assert end_child(begin_child(call)) == 0


def test_the_limit_of_pinned_memory_is_respected() -> None:
    """An ordinary user with 1 MiB: what does not fit is refused, and named."""

    def as_nobody() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        device = open_one("rxe0")
        domain = device.create_domain()
        domain.create_queue_pair()
        regions: list[MemoryRegion] = []
        with pytest.raises(FabricError) as caught:
            regions.extend(domain.register(64 * KIB) for _ in range(64))
        assert caught.value.status == "NO_MEMORY"
        assert "RLIMIT_MEMLOCK allows 1048576" in caught.value.detail
        assert 0 < len(regions) < 16
        pinned = device.count.bytes
        assert pinned <= 1 << 20
        regions.pop().close()
        regions.append(domain.register(64 * KIB))
        assert device.count.bytes == pinned
        device.close()
        assert not device.count.bytes

    in_child(as_nobody)


def test_a_child_does_no_harm_and_keeps_nothing_alive(before, bench: Bench) -> None:
    """It neither destroys what is its parent's, nor holds it when that is closed."""
    near, far = bench.link()
    hold, release = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            near.side.device.close()
            near.side.device, near.queue_pair, near.domain = None, None, None  # type: ignore[assignment]
            gc.collect()
            os.close(release)
            os.read(hold, 1)  # outlives what the parent closes
            status = 0
        finally:
            os._exit(status)
    os.close(hold)
    near.queue_pair.post_send(b"still here")
    near.queue_pair.flush()
    bench.await_one(far, CompletionKind.RECEIVE)
    for side in (bench.a, bench.b):
        side.device.close()
    # What the library has mapped is the child's, too, until it ends or executes
    # another program; it keeps the bare context, and nothing that a peer could reach.
    with_child = {name: {**row, "ctx": row["ctx"] + 1} for name, row in before.items()}
    wait_for_resources(with_child)
    os.close(release)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    wait_for_resources(before)


def test_a_program_that_ends_with_an_open_device_is_silent() -> None:
    """No page of ignored exceptions, and no crash."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from pysmc.config import Config\n"
        "from pysmc.fabric.base import UpdateCodec\n"
        "from pysmc.fabric.verbs import VerbsDevice\n"
        "from pysmc.fabric.verbs_ports import list_ports\n"
        "port = next(p for p in list_ports() if not p.problem)\n"
        "codec = UpdateCodec(None, None, None)\n"
        "device = VerbsDevice(port, codec=codec, config=Config())\n"
        "domain = device.create_domain()\n"
        "pair = domain.create_queue_pair()\n"
        "region = domain.register(65536)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
