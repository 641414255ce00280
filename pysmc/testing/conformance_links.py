"""The checks of links: connecting, SENDs, waking up, going down, closing, forking.

Source: pysmc.fabric.base; RFC 7609 section 4.5.1 for what a link is.
"""

from __future__ import annotations

import os
import random
import select
import warnings
from functools import partial
from typing import TYPE_CHECKING

from pysmc.errors import ForkedError
from pysmc.fabric.base import CompletionKind, Device, RemoteQueuePair, Status
from pysmc.testing.conformance_bench import (
    KIB,
    QUIET_ROUNDS,
    ROUNDS,
    Bench,
    ConformanceFailure,
    End,
    Side,
    Writer,
    content,
    expect,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.fabric.base import QueuePair


def check_identity(bench: Bench) -> None:
    """A device says who it is, in the sizes of the CLC messages."""
    for device in (bench.a.device, bench.b.device):
        expect(len(device.gid) == 16, "a GID has 16 bytes")
        expect(len(device.mac) == 6, "a MAC has 6 bytes")
        expect(1 <= device.mtu_code <= 5, "an MTU code is 1 to 5")
        expect(device.fabric in {"shm", "verbs", "sim"}, "a fabric has a known name")
        eid = device.eid
        expect(eid is None or 1 <= len(eid) <= 32, "an EID has 1 to 32 characters")
        allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-")
        expect(allowed.issuperset(eid or ""), "an EID is of A-Z, 0-9, '.' and '-'")


def check_connect(bench: Bench) -> None:
    """Either side can call, before or after the other waits; numbers are 24 bits."""
    for early in (False, True):
        for caller, called in ((bench.a, bench.b), (bench.b, bench.a)):
            active, passive = bench.end(caller), bench.end(called)
            for end in (active, passive):
                number = end.queue_pair.number
                expect(0 < number < 1 << 24, "a number is 24 bits and never 0")
                expect(not end.queue_pair.is_up, "a new queue pair is not up")
            bench.connect(active, passive, early=early)
    bench.settle()
    kinds = [item.kind for item in bench.a.seen + bench.b.seen]
    expect(kinds == [CompletionKind.CONNECTED] * 8, "connecting completes once an end")


def check_loopback(bench: Bench) -> None:
    """A device can be connected with itself."""
    ends = bench.end(bench.a), bench.end(bench.a)
    bench.connect(*ends)
    ends[0].queue_pair.post_send(b"to myself")
    bench.await_one(ends[1], CompletionKind.RECEIVE)


def check_connect_to_nobody(bench: Bench) -> None:
    """A peer that is not there is UNREACHABLE, and that is the only completion."""
    end = bench.end(bench.a)
    ghost = RemoteQueuePair(
        peer_id=b"\xfe\xdc" + bytes(5) + b"\x01",
        gid=bytes(15) + b"\x09",
        mac=b"\x02" + bytes(4) + b"\x09",
        number=77,
        psn=5,
        mtu_code=3,
    )
    end.queue_pair.connect(ghost, 9, passive=False)
    bench.settle()
    statuses = [(item.kind, item.status) for item in bench.a.seen]
    expected = [(CompletionKind.CONNECTED, Status.UNREACHABLE)]
    expect(statuses == expected, f"connecting to nobody gives {expected}: {statuses}")
    expect(not end.queue_pair.is_up, "what did not connect is not up")


def check_connect_to_a_wrong_number(bench: Bench) -> None:
    """Who names a queue pair that is not there does not connect, to no other either."""
    active, passive = bench.end(bench.a), bench.end(bench.b)
    remote = active.remote(11)
    passive.queue_pair.connect(remote, 12, passive=True)
    wrong = passive.remote(12)
    number = wrong.number % 0xFFFFFF + 1
    wrong = RemoteQueuePair(wrong.peer_id, wrong.gid, wrong.mac, number, 12, 3)
    active.queue_pair.connect(wrong, 11, passive=False)
    bench.settle()
    expect(not active.queue_pair.is_up, "a wrong number does not connect")
    expect(not passive.queue_pair.is_up, "who was not called is not connected")


def check_sends(bench: Bench) -> None:
    """SENDs of every size arrive whole and in order, also when nobody polls yet."""
    for sender, receiver in (bench.link(), bench.link()[::-1]):
        # Below 128: what looks like an update is one, where updates are SENDs.
        payloads = [bytes([n % 128]) * (1 + n * 37 % 1100) for n in range(298)]
        payloads += [b"x", b"y" * 1100]
        for payload in payloads:
            sender.queue_pair.post_send(payload)
        sender.queue_pair.flush()

        def received(end: End = receiver) -> list[bytes]:
            side = end.side
            return [
                item.payload for item in side.of(CompletionKind.RECEIVE, end.queue_pair)
            ]

        bench.until(lambda: len(received()) >= 300, "every SEND arrives")
        bench.settle()
        expect(received() == payloads, "SENDs arrive once, whole and in order")


def _is_readable(device: Device) -> bool:
    return bool(select.select([device.fileno()], [], [], 0)[0])


def check_arm(bench: Bench) -> None:
    """The descriptor is readable when something waits, and quiet when nothing does."""
    near, far = bench.link()
    device = near.side.device
    region = near.domain.register(16 * KIB)
    writer = Writer(far, region, near.queue_pair)
    bench.settle()
    expect(device.arm(), "arm says True when nothing waits")
    expect(not _is_readable(device), "an armed device with nothing to say is quiet")
    expect(not device.poll(), "poll is empty when nothing waits")

    expect(device.arm(), "a device can be armed again")
    writer.publish(producer=1)
    _wait_readable(bench, far.side, device)
    near.side.poll()
    expect(
        near.side.updates(near.queue_pair)[-1:] == [writer.last], "poll has the news"
    )
    expect(device.arm(), "after a poll that was empty in the end, arm says True")
    expect(not _is_readable(device), "what was polled does not keep it readable")

    device.disarm()
    writer.publish(producer=2)
    for _ in range(QUIET_ROUNDS):
        bench.pump()  # without the poll of `move`
        far.side.poll()
    expect(device.pending(), "pending sees what poll would return")
    expect(not device.arm(), "arm says False when something waits already")
    near.side.poll()
    expect(
        near.side.updates(near.queue_pair)[-1:] == [writer.last], "poll has the news"
    )


def _wait_readable(bench: Bench, other: Side, device: Device) -> None:
    for _ in range(ROUNDS):
        if _is_readable(device):
            return
        bench.pump()  # without the poll of `move`
        other.poll()
    rule = "the descriptor of an armed device becomes readable when something completes"
    raise ConformanceFailure(rule)


def check_no_lost_wakeup(bench: Bench) -> None:
    """In whatever order publishing and arming meet, the news is found."""
    near, far = bench.link()
    device = near.side.device
    region = near.domain.register(16 * KIB)
    writer = Writer(far, region, near.queue_pair)
    rng = random.Random(4)
    for count in range(1, 301):
        armed = False
        steps = ["publish", "arm", *rng.choices(["poll", "pump", "disarm"], k=2)]
        rng.shuffle(steps)
        for step in steps:
            if step == "publish":
                writer.publish(producer=count)
            elif step == "arm":
                armed = device.arm()
            elif step == "pump":
                bench.pump()
            elif step == "poll":
                near.side.poll()
                armed = False
            else:
                device.disarm()
                armed = False
        if armed and near.side.updates(near.queue_pair)[-1:] != [writer.last]:
            _wait_readable(bench, far.side, device)
        bench.await_newest(near, writer)


def check_own_news_wakes(bench: Bench) -> None:
    """What a post of our own completes makes an armed device readable, too."""
    near, _ = bench.link()
    device = near.side.device
    bench.settle()
    expect(device.arm(), "arm says True when nothing waits")
    lonely = bench.end(near.side)
    ghost = RemoteQueuePair(b"\xfe\xdc" + bytes(6), bytes(16), bytes(6), 5, 5, 3)
    lonely.queue_pair.connect(ghost, 1, passive=False)
    _wait_readable(bench, bench.b, device)


def check_down(bench: Bench) -> None:
    """The peer's close gives DOWN, once, after everything it had posted."""
    for lingers in (False, True):
        _check_down(bench, lingers=lingers)


def _check_down(bench: Bench, *, lingers: bool) -> None:
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    writer = Writer(near, region, far.queue_pair)
    for count in range(1, 31):
        near.queue_pair.post_send(count.to_bytes(2, "big"))
        writer.write(0, count.to_bytes(2, "big"))
        writer.publish(producer=count, flags=0x40)
    bench.move()
    for _ in range(2):
        near.queue_pair.close(linger=lingers)
    expect(not near.queue_pair.is_up, "what was closed is not up")
    bench.await_one(far, CompletionKind.DOWN)
    bench.settle()
    mine = [item for item in far.side.seen if item.queue_pair is far.queue_pair]
    kinds = [item.kind for item in mine]
    expect(kinds.count(CompletionKind.DOWN) == 1, "DOWN comes exactly once")
    expect(kinds[-1] is CompletionKind.DOWN, "after DOWN nothing comes")
    expect(mine[-1].status is Status.PEER_GONE, f"DOWN says {mine[-1].status}")
    expect(kinds.count(CompletionKind.RECEIVE) == 30, "SENDs are delivered before DOWN")
    expect(far.side.updates(far.queue_pair)[-1] == writer.last, "and the last update")
    expect(content(region, 0, 2) == b"\0\x1e", "and the writes")
    expect(not far.queue_pair.is_up, "what is down is not up")
    downs = near.side.of(CompletionKind.DOWN, near.queue_pair)
    expect(not downs, "a close of our own gives no DOWN here")


def check_posts_after_down(bench: Bench) -> None:
    """After DOWN posts do nothing, and the queue pair can still be closed."""
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    rkey, address = region.rkey_on(far.queue_pair), region.virtual_address
    far.queue_pair.close()
    bench.await_one(near, CompletionKind.DOWN)
    queue_pair = near.queue_pair
    queue_pair.post_send(b"late")
    queue_pair.post_write(rkey, address, b"late")
    queue_pair.publish(rkey, 1, 1, 1, 0, 0, 0)
    queue_pair.flush()
    queue_pair.close()
    bench.settle()
    expect(not any(content(region)), "a post after DOWN changes nothing")
    expect(near.side.seen[-1].kind is CompletionKind.DOWN, "after DOWN nothing comes")


def check_closing(bench: Bench) -> None:
    """Everything may be closed twice and in any order."""
    for order in range(6):
        near, far = bench.link()
        near_region, far_region = (end.domain.register(16 * KIB) for end in (near, far))
        Writer(near, far_region, far.queue_pair).publish()
        closing: list[Callable[[], None]] = [
            near.queue_pair.close,
            near_region.close,
            near.domain.close,
        ]
        closing = closing[order % 3 :] + closing[: order % 3]
        for close in closing if order < 3 else reversed(closing):
            close()
            close()
        bench.await_one(far, CompletionKind.DOWN)
        far.domain.close()
        far_region.close()
        far.queue_pair.close()


def check_fork(bench: Bench) -> None:
    """A forked child is refused everything but close; the parent is unharmed."""
    near, far = bench.link()
    region = near.domain.register(16 * KIB)
    device, queue_pair, domain = near.side.device, near.queue_pair, near.domain
    refused: list[Callable[[], object]] = [
        device.poll, device.arm, device.fileno, device.create_domain,
        domain.create_queue_pair, lambda: domain.register(16 * KIB), region.clear,
        lambda: region.rkey_on(queue_pair), partial(_flush, queue_pair),
        lambda: queue_pair.post_send(b"x"), lambda: queue_pair.post_write(1, 1, b"x"),
        lambda: queue_pair.publish(1, 1, 1, 1, 1, 1, 1),
        lambda: queue_pair.connect(far.remote(1), 1, passive=True),
        device.pending, device.disarm,
    ]  # fmt: skip
    with warnings.catch_warnings():
        # Python 3.12 warns where threads exist; this child only tries what is refused.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(_try_in_child(device, refused))
    _, status = os.waitpid(child, 0)
    number = os.waitstatus_to_exitcode(status)
    expect(number == 0, f"a forked child was not refused (number {number})")
    writer = Writer(far, region, near.queue_pair)
    writer.publish(producer=1)
    near.queue_pair.post_send(b"still here")
    bench.await_one(near, CompletionKind.UPDATE)
    bench.await_one(far, CompletionKind.RECEIVE)


def _flush(queue_pair: QueuePair) -> None:
    # Looked up at the time: a fabric may put another function there.
    queue_pair.flush()


def _try_in_child(device: Device, refused: list[Callable[[], object]]) -> int:
    """Try each: 0 when all are refused and close works, else the number of one."""
    for number, call in enumerate(refused, start=1):
        try:
            call()
        except ForkedError:
            continue
        except BaseException:  # noqa: BLE001 - the exit status is all that gets out
            return number
        return number
    try:
        device.close()
        device.close()
    except BaseException:  # noqa: BLE001
        return 100
    return 0
