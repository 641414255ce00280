"""The checks of memory: writes, updates and their order, regions and their bounds.

Source: pysmc.fabric.base; RFC 7609 sections 4.4 (RMBs) and 4.7 (cursors).
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from pysmc.errors import FabricError
from pysmc.fabric.base import CompletionKind, Status, Update
from pysmc.testing.conformance_bench import KIB, Bench, End, Writer, content, expect

if TYPE_CHECKING:
    from collections.abc import Callable

FLAGS = 0xF8E0
"""The flags that a CDC message has; a codec may refuse others."""


def check_write(bench: Bench) -> None:
    """A write lands exactly where it was told, and nowhere else."""
    near, far = bench.link()
    before = far.domain.register(16 * KIB)
    region = far.domain.register(64 * KIB)
    after = far.domain.register(16 * KIB)
    expect(region.length == 64 * KIB, "a region has the length that was asked for")
    expect(not any(content(region)), "a new region is all zeros")
    writer = Writer(near, region, far.queue_pair)
    image = bytearray(region.length)
    rng = random.Random(1)
    places = [(0, 1), (1, 64 * KIB - 1), (64 * KIB - 1, 1), (0, 64 * KIB)]
    places += [(rng.randrange(60000), rng.randrange(1, 5000)) for _ in range(20)]
    for number, (at, size) in enumerate(places, start=1):
        data = bytes([number]) * size
        writer.write(at, data)
        image[at : at + size] = data
    writer.publish()
    bench.await_one(far, CompletionKind.UPDATE)
    expect(content(region) == bytes(image), "a write lands exactly where it was told")
    for other in (before, after):
        expect(not any(content(other)), "a write touches no other region")


def check_data_is_taken(bench: Bench) -> None:
    """The caller may change its buffer as soon as a post has returned."""
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    buffer = bytearray(b"first")
    rkey = region.rkey_on(far.queue_pair)
    near.queue_pair.post_write(rkey, region.virtual_address, memoryview(buffer))
    buffer[:] = b"other"
    Writer(near, region, far.queue_pair).publish()
    bench.await_one(far, CompletionKind.UPDATE)
    expect(content(region, 0, 5) == b"first", "data is taken before a post returns")


def _attempt(bench: Bench, near: End, post: Callable[[], object], what: str) -> None:
    """Do what must be refused, at once or by the end of the queue pair."""
    try:
        post()
    except FabricError as exc:
        expect(exc.status == Status.REMOTE_ACCESS.name, f"{what}: status {exc.status}")
        return
    down = bench.await_one(near, CompletionKind.DOWN)
    expect(down.status is Status.REMOTE_ACCESS, f"{what}: DOWN says {down.status}")


def check_write_out_of_bounds(bench: Bench) -> None:
    """What does not lie wholly in the region that the rkey names is refused."""
    places = [(-1, 1), (-16 * KIB, 16), (16 * KIB - 1, 2), (16 * KIB, 1), (1 << 40, 1)]
    for at, size in places:
        near, far = bench.link()
        neighbours = [far.domain.register(16 * KIB) for _ in range(3)]
        region = neighbours[1]
        rkey, address = region.rkey_on(far.queue_pair), region.virtual_address + at
        data = b"\xff" * size
        post = near.queue_pair.post_write
        what = f"a write of {size} bytes at {at} of 16384"
        _attempt(bench, near, partial(post, rkey, address, data), what)
        bench.settle()
        for one in neighbours:
            expect(not any(content(one)), f"{what} changed memory")


def check_unknown_rkey(bench: Bench) -> None:
    """An rkey that never was, or is no more, names nothing."""
    near, far = bench.link()
    region, closed = (far.domain.register(16 * KIB) for _ in range(2))
    stale, address = closed.rkey_on(far.queue_pair), closed.virtual_address
    writer = Writer(near, closed, far.queue_pair)
    writer.write(0, b"once")
    writer.publish()
    bench.await_newest(far, writer)
    closed.close()
    again = far.domain.register(16 * KIB)
    cases = [(stale, address)]
    cases += [
        (region.rkey_on(far.queue_pair) ^ bit, address) for bit in (1 << 17, 1 << 9)
    ]
    for rkey, where in cases:
        if not near.queue_pair.is_up:
            return  # its fabric refuses by the end of the queue pair
        post = near.queue_pair.post_write
        _attempt(bench, near, partial(post, rkey, where, b"no"), "an old rkey")
    bench.settle()
    expect(not any(content(region)), "an unknown rkey writes nowhere")
    expect(
        not any(content(again)), "memory registered again is not written by old rkeys"
    )


def check_order(bench: Bench) -> None:
    """When an update is seen, every write posted before it is in memory."""
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    writer = Writer(near, region, far.queue_pair)
    rng = random.Random(2)
    for count in range(1, 1001):
        writer.write(count * 4, count.to_bytes(4, "big"))
        writer.publish(producer=count)
        if rng.random() < 0.3:
            bench.move()
        for update in far.side.updates(far.queue_pair)[-1:]:
            at = update.producer * 4
            seen = int.from_bytes(content(region, at, at + 4), "big")
            expect(seen == update.producer, "a write is in memory before its update")


def check_newest_update(bench: Bench) -> None:
    """Updates come in order, and the last one comes; its fields are unharmed."""
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    writer = Writer(near, region, far.queue_pair, token=0xFFFFFFFF)
    for count in range(100):
        flags = FLAGS if count % 2 else 0x0800
        writer.publish(0xFFFF_FFFFFFFF - count, 0xFFFE_00000000 + count, flags)
    bench.await_newest(far, writer)
    sequences = [update.sequence for update in far.side.updates(far.queue_pair)]
    expect(sequences == sorted(sequences), "updates do not overtake each other")


def check_newest_consumer(bench: Bench) -> None:
    """Who looks into a mailbox sees the newest cursor or nothing, and takes nothing."""
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    look = far.queue_pair.newest_consumer
    expect(look(region, 5) == -1, "an empty mailbox has no cursor")
    writer = Writer(near, region, far.queue_pair, token=5)
    for cursor in (3, 4):
        writer.publish(consumer=cursor)
        bench.pump()
        expect(look(region, 5) in (-1, cursor), "a mailbox shows the newest cursor")
        expect(look(region, 6) == -1, "another connection's cursor is not shown")
    bench.await_newest(far, writer)


def check_coalescing(bench: Bench) -> None:
    """Whatever is left out of 10,000 updates, the last of each burst is not."""
    near, far = bench.link()
    regions = [far.domain.register(16 * KIB) for _ in range(3)]
    writers = [
        Writer(near, region, far.queue_pair, token)
        for token, region in enumerate(regions, start=1)
    ]
    newest: dict[int, Update] = {}
    rng = random.Random(3)
    published = 0

    def up_to_date() -> bool:
        for completion in far.side.seen:
            if completion.kind is CompletionKind.UPDATE:
                update = completion.payload
                old = newest.get(update.alert_token)
                expect(old is None or old.producer <= update.producer, "no way back")
                newest[update.alert_token] = update
        far.side.seen.clear()
        near.side.seen.clear()
        return all(newest.get(w.token) == w.last for w in writers if w.last)

    while published < 10_000:
        for _ in range(rng.randrange(1, 200)):
            published += 1
            rng.choice(writers).publish(producer=published, flags=published & FLAGS)
            if rng.random() < 0.05:
                bench.move()
        bench.until(up_to_date, "the last update of a connection is never lost")


def check_send_and_update_order(bench: Bench) -> None:
    """A SEND does not overtake the update that was posted before it."""
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    writer = Writer(near, region, far.queue_pair)
    for count in range(1, 41):
        writer.publish(producer=count)
        near.queue_pair.post_send(count.to_bytes(2, "big"))
    near.queue_pair.flush()
    receives = CompletionKind.RECEIVE
    bench.until(
        lambda: len(far.side.of(receives, far.queue_pair)) == 40, "every SEND arrives"
    )
    newest = 0
    for completion in far.side.seen:
        if completion.kind is CompletionKind.UPDATE:
            newest = max(newest, completion.payload.producer)
        elif completion.kind is receives:
            number = int.from_bytes(completion.payload, "big")
            expect(newest >= number, "a SEND came before the update posted before it")


def check_publish_completes(bench: Bench) -> None:
    """Every publish completes once, at once or later, in order."""
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    writer = Writer(near, region, far.queue_pair)
    for count in range(300):
        writer.publish(producer=count)
    open_wr_ids = list(writer.open_wr_ids)

    def completed() -> list[int]:
        done = near.side.of(CompletionKind.PUBLISH, near.queue_pair)
        return [item.wr_id for item in done]

    bench.until(lambda: len(completed()) >= len(open_wr_ids), "every publish completes")
    bench.settle()
    expect(
        completed() == open_wr_ids, "a publish completes once, in order, by its wr_id"
    )


def check_region_reuse(bench: Bench) -> None:
    """Memory that is registered again or cleared shows nothing of before."""
    near, far = bench.link()
    for count in range(1, 21):
        region = far.domain.register(16 * KIB)
        expect(not any(content(region)), "a region is all zeros, whoever had it before")
        writer = Writer(near, region, far.queue_pair, token=count)
        near.side.seen.clear()
        writer.write(0, b"s" * 16 * KIB)
        has_landed = writer.publish(producer=count)
        if count % 2 and not has_landed:
            bench.await_one(near, CompletionKind.PUBLISH)
            has_landed = True
        region.clear()
        # What is still on a wire may land between the two.
        expect(not (has_landed and any(content(region))), "clear leaves zeros")
        far.side.seen.clear()
        if count % 3:
            writer.write(0, b"t" * 16 * KIB)
        bench.settle()  # nothing may be under way to what is closed
        region.close()
        region.close()


def check_clear_forgets_updates(bench: Bench) -> None:
    """An update of a region's last life is not seen in the next one."""
    near, far = bench.link()
    region = far.domain.register(16 * KIB)
    old = Writer(near, region, far.queue_pair, token=1)
    for count in range(5):
        old.publish(producer=count)
    bench.settle()
    region.clear()
    far.side.seen.clear()
    new = Writer(near, region, far.queue_pair, token=2)
    new.publish(producer=9)
    bench.await_one(far, CompletionKind.UPDATE)
    bench.settle()
    tokens = {update.alert_token for update in far.side.updates(far.queue_pair)}
    expect(tokens == {2}, "an update from before the clear came after it")


def check_rkeys_per_link(bench: Bench) -> None:
    """A region is reached through every link of its domain, by that link's rkey."""
    near, far = bench.link()
    near2, far2 = bench.end(bench.a, near.domain), bench.end(bench.b, far.domain)
    region = far.domain.register(16 * KIB)
    bench.connect(near2, far2)
    later = far.domain.register(16 * KIB)
    for number, (end, other) in enumerate(((near, far), (near2, far2)), start=1):
        for tens, target in enumerate((region, later), start=1):
            token = tens * 10 + number
            writer = Writer(end, target, other.queue_pair, token)
            writer.write(number, bytes([number]))
            writer.publish(producer=number)
            bench.await_newest(other, writer)
    for target in (region, later):
        expect(content(target, 0, 4) == b"\0\1\2\0", "a write through each link lands")


def check_isolation(bench: Bench) -> None:
    """The peer of one domain does not reach the memory of another."""
    near, far = bench.link()
    bench.link()
    private = bench.b.device.create_domain()
    secret_end = bench.end(bench.b, private)
    bench.connect(bench.end(bench.a), secret_end)
    secret = private.register(16 * KIB)
    own = far.domain.register(16 * KIB)
    rkey = secret.rkey_on(secret_end.queue_pair)
    post = near.queue_pair.post_write
    address = secret.virtual_address
    what = "another domain's rkey"
    _attempt(bench, near, partial(post, rkey, address, b"spy"), what)
    bench.settle()
    expect(not any(content(secret)), "another domain's memory was written")
    expect(not any(content(own)), "a foreign rkey names nothing in this domain")


def check_many_regions(bench: Bench) -> None:
    """Regions of every size live side by side, up to more than one arena of them."""
    near, far = bench.link()
    sizes = [16 * KIB << n % 7 for n in range(40)]
    regions = [far.domain.register(size) for size in sizes]
    for number, region in enumerate(regions, start=1):
        writer = Writer(near, region, far.queue_pair, token=number)
        writer.write(0, bytes([number]) * 8)
        writer.write(region.length - 8, bytes([number]) * 8)
    Writer(near, regions[0], far.queue_pair).publish()
    bench.await_one(far, CompletionKind.UPDATE)
    for number, region in enumerate(regions, start=1):
        ends = content(region, 0, 8) + content(region, region.length - 8)
        expect(
            ends == bytes([number]) * 16, f"region {number} holds its own bytes only"
        )
