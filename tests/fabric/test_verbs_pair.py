"""A queue pair of the verbs fabric: coming up, posting, receiving, going down."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import pytest

from pysmc.errors import FabricError, LocalProtocolError
from pysmc.fabric import verbs_api as api
from pysmc.fabric.base import CompletionKind, RemoteQueuePair, Status
from pysmc.fabric.verbs_memory import (
    PIECE_BYTES,
    RECEIVE_BYTES,
    RECEIVES,
    SLAB_BYTES,
    SLABS_MAX,
)
from pysmc.fabric.verbs_pair import INLINE_BYTES, SENDS, VerbsQueuePair
from pysmc.testing.conformance_bench import End, Writer, content
from tests.fabric.fake_verbs import ATTEMPTS, ERROR, RTS

if TYPE_CHECKING:
    from tests.fabric.fake_verbs import FakeQueuePair, Roce

MIB = 1 << 20


def library_end(roce: Roce, end: End) -> FakeQueuePair:
    """Give what the library has for an end."""
    return roce.library_pair(end.queue_pair.number)


def send_raw(pair: FakeQueuePair, data: bytes) -> None:
    """Post something behind the back of the fabric, as a stranger's program would."""
    buffer = ctypes.create_string_buffer(data, len(data))
    wr_id = (pair.unretired[-1] if pair.unretired else 0) + 1000
    address = ctypes.addressof(buffer)
    limit, pair.inline_bytes = pair.inline_bytes, len(data)
    pair.post_send(
        [
            api.SendRequest(
                wr_id, api.WR_SEND, api.SEND_INLINE, address, len(data), 0, 0, 0
            )
        ]
    )
    pair.inline_bytes = limit


def statuses(end: End) -> list[tuple[CompletionKind, Status]]:
    """List what an end was told, but for the data."""
    return [
        (item.kind, item.status)
        for item in end.side.seen
        if item.queue_pair is end.queue_pair
    ]


CONNECTED = (CompletionKind.CONNECTED, Status.SUCCESS)


# Coming up


def test_no_way_to_a_port_is_not_the_same_as_no_port(roce: Roce) -> None:
    cases = {
        "00000000000000000000ffff0a000009": Status.NO_ROUTE,
        "20010db8000000000000000000000001": Status.UNREACHABLE,
        "00000000000000000000000000000009": Status.UNREACHABLE,
        "00000000000000000000000000000000": Status.UNREACHABLE,
    }
    for gid, status in cases.items():
        end = roce.bench.end(roce.bench.a)
        remote = RemoteQueuePair(bytes(8), bytes.fromhex(gid), bytes(6), 5, 5, 3)
        end.queue_pair.connect(remote, 1, passive=False)
        found = roce.bench.await_one(end, CompletionKind.CONNECTED)
        assert (found.status, found.payload) == (status, "nobody has this GID")


@pytest.mark.parametrize("operation", ["to_rtr", "to_rts"])
@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.ETIMEDOUT, Status.NO_ROUTE), (errno.ENOMEM, Status.NO_MEMORY)],
)
def test_the_library_may_refuse_to_connect(
    roce: Roce, operation: str, number: int, status: Status
) -> None:
    near, far = roce.bench.end(roce.bench.a), roce.bench.end(roce.bench.b)
    roce.libraries[0].fail(operation, number)
    near.queue_pair.connect(far.remote(5), 5, passive=False)
    found = roce.bench.await_one(near, CompletionKind.CONNECTED)
    assert found.status is status
    assert errno.errorcode[number] in found.payload
    assert not near.queue_pair.is_up


def test_a_passive_end_that_nobody_answers_has_no_way(roce: Roce) -> None:
    near, far = roce.bench.end(roce.bench.a), roce.bench.end(roce.bench.b)
    near.queue_pair.connect(far.remote(5), 6, passive=True)
    for _ in range(ATTEMPTS + 10):
        roce.bench.move()
    assert statuses(near) == [(CompletionKind.CONNECTED, Status.NO_ROUTE)]
    assert "IBV_WC_RETRY_EXC_ERR, 12" in near.side.seen[-1].payload


def test_a_message_connects_the_active_end(roce: Roce) -> None:
    """A kernel's SMC says nothing but its first message."""
    near, far = roce.bench.end(roce.bench.a), roce.bench.end(roce.bench.b)
    kernel = library_end(roce, far)
    near.queue_pair.connect(far.remote(7), 8, passive=False)
    roce.bench.move()
    kernel.to_rtr(
        api.Path(1, 1, near.side.device.gid, 3, 64), near.queue_pair.number, 8
    )
    kernel.to_rts(7)
    send_raw(kernel, b"CONFIRM LINK")
    roce.bench.settle()
    assert statuses(near) == [CONNECTED, (CompletionKind.RECEIVE, Status.SUCCESS)]
    near.queue_pair.post_send(b"the answer")
    near.queue_pair.flush()
    roce.bench.settle()
    assert not library_end(roce, near).posted  # it was acknowledged


def test_a_message_may_overtake_the_acknowledgement(roce: Roce) -> None:
    """The passive end is connected by what the active one sends, too."""
    near, far = roce.bench.end(roce.bench.a), roce.bench.end(roce.bench.b)
    roce.bench.b.device.poll()
    kernel = library_end(roce, near)
    far.queue_pair.connect(near.remote(7), 8, passive=True)
    kernel.to_rtr(api.Path(1, 1, far.side.device.gid, 3, 64), far.queue_pair.number, 8)
    kernel.to_rts(7)
    kernel.remote_number = far.queue_pair.number + 1  # acknowledges to nobody
    roce.bench.b.poll()
    assert not far.queue_pair.is_up
    kernel.remote_number = far.queue_pair.number
    library_end(roce, far).posted.clear()  # its hello was taken, the answer is lost
    kernel.expected_psn += 1
    send_raw(kernel, b"first")
    roce.bench.settle()
    assert statuses(far)[:2] == [CONNECTED, (CompletionKind.RECEIVE, Status.SUCCESS)]


def test_a_peer_that_closes_while_it_is_awaited(roce: Roce) -> None:
    near, far = roce.bench.end(roce.bench.a), roce.bench.end(roce.bench.b)
    near.queue_pair.connect(far.remote(7), 8, passive=False)
    roce.bench.move()
    near.queue_pair.close()
    far.queue_pair.connect(near.remote(8), 7, passive=True)
    roce.bench.settle()
    assert statuses(far) == [(CompletionKind.CONNECTED, Status.PEER_GONE)]
    roce.bench.settle()
    assert not roce.libraries[0].open["pair"]


def test_what_is_closed_while_the_way_is_looked_for(roce: Roce) -> None:
    near, far = roce.bench.end(roce.bench.a), roce.bench.end(roce.bench.b)
    roce.finders[0].is_held = True
    near.queue_pair.connect(far.remote(7), 8, passive=False)
    roce.bench.move()
    assert roce.finders[0].searches
    near.queue_pair.close()
    assert not roce.finders[0].searches
    roce.finders[0].is_held = False
    roce.bench.settle()
    assert not near.side.seen


def test_a_way_that_is_known_is_taken_at_once(roce: Roce) -> None:
    """Without another look at descriptors: each costs the loop a turn."""
    domain = roce.devices[1].create_domain()
    pair = domain.create_queue_pair()
    there = RemoteQueuePair(bytes(8), roce.devices[0].gid, bytes(6), 0x99, 0, 3)
    pair.connect(there, 7, passive=True)
    assert roce.world.pairs[pair.number].state() == RTS


def test_nothing_connects_twice(roce: Roce) -> None:
    near, far = roce.bench.link()
    with pytest.raises(LocalProtocolError, match="connected before"):
        near.queue_pair.connect(far.remote(1), 1, passive=False)


def test_posts_before_connecting_are_refused(roce: Roce) -> None:
    end = roce.bench.end(roce.bench.a)
    posts = [
        lambda: end.queue_pair.post_send(b"x"),
        lambda: end.queue_pair.post_write(1, 1, b"x"),
        lambda: end.queue_pair.publish(1, 1, 1, 1, 1, 1, 1),
    ]
    for post in posts:
        with pytest.raises(LocalProtocolError, match="is not connected"):
            post()


def test_the_smaller_mtu_is_used(roce: Roce) -> None:
    near, far = roce.bench.link()
    path = library_end(roce, near).path
    assert path is not None
    assert path == api.Path(1, 1, far.side.device.gid, 3, 64)
    end, other = roce.bench.end(roce.bench.a), roce.bench.end(roce.bench.b)
    remote = other.remote(5)
    small = RemoteQueuePair(
        remote.peer_id, remote.gid, remote.mac, remote.number, 5, mtu_code=1
    )
    end.queue_pair.connect(small, 5, passive=False)
    roce.bench.move()
    path = library_end(roce, end).path
    assert path is not None
    assert path.mtu_code == 1


# Posts


def test_writes_and_their_update_are_one_post(roce: Roce) -> None:
    near, far = roce.bench.link()
    writer = Writer(near, far.domain.register(MIB), far.queue_pair)
    roce.bench.settle()
    roce.world.posts.clear()
    for at in range(5):
        writer.write(at * 100, b"a" * 100)
    writer.publish(producer=500)
    assert roce.world.posts == {"posts": 1, "requests": 6}
    roce.bench.await_newest(far, writer)
    assert len(near.side.of(CompletionKind.PUBLISH, near.queue_pair)) == 1


def test_a_long_chain_is_cut(roce: Roce) -> None:
    near, far = roce.bench.link()
    writer = Writer(near, far.domain.register(MIB), far.queue_pair)
    roce.world.posts.clear()
    for at in range(40):
        writer.write(at * 100, b"a" * 100)
    writer.publish(producer=4000)
    roce.bench.await_newest(far, writer)
    assert roce.world.posts["requests"] == 41
    assert roce.world.posts["posts"] == 3


def test_only_short_requests_are_inline(roce: Roce) -> None:
    near, far = roce.bench.link()
    region = far.domain.register(MIB)
    writer = Writer(near, region, far.queue_pair)
    roce.world.is_held = True
    for size in (1, INLINE_BYTES, INLINE_BYTES + 1, 4096):
        writer.write(0, bytes(size))
    writer.publish()
    posted = library_end(roce, near).posted
    flags = [bool(item.request.flags & api.SEND_INLINE) for item in posted]
    assert flags == [True, True, False, False, True]
    signalled = [bool(item.request.flags & api.SEND_SIGNALED) for item in posted]
    assert signalled == [False] * 4 + [True]
    assert posted[-1].request.flags & api.SEND_SOLICITED
    roce.world.is_held = False


def test_a_long_write_is_cut_into_pieces(roce: Roce) -> None:
    near, far = roce.bench.link()
    region = far.domain.register(MIB)
    data = bytes(range(251)) * (3 * PIECE_BYTES // 251) + b"end"
    writer = Writer(near, region, far.queue_pair)
    writer.write(7, data)
    writer.publish()
    roce.bench.await_newest(far, writer)
    assert content(region, 7, 7 + len(data)) == data
    assert not content(region)[7 + len(data) :].strip(b"\0")


def test_an_empty_write_is_none(roce: Roce) -> None:
    near, _ = roce.bench.link()
    roce.world.posts.clear()
    near.queue_pair.post_write(0, 0, b"")
    near.queue_pair.flush()
    assert not roce.world.posts


@pytest.mark.parametrize("size", [0, 1101])
def test_a_send_has_bounds(roce: Roce, size: int) -> None:
    near, _ = roce.bench.link()
    with pytest.raises(LocalProtocolError, match=f"a SEND of {size} bytes"):
        near.queue_pair.post_send(bytes(size))


def test_what_finds_no_room_waits_in_order(roce: Roce) -> None:
    """More than the send queue and staging hold, while nothing moves."""
    near, far = roce.bench.link()
    region = far.domain.register(16 * MIB)
    writer = Writer(near, region, far.queue_pair)
    roce.world.is_held = True
    staged = SLAB_BYTES * SLABS_MAX
    image = bytearray(2 * staged)
    for at in range(0, len(image), PIECE_BYTES):
        data = bytes([at // PIECE_BYTES + 1]) * PIECE_BYTES
        writer.write(at, data)
        image[at : at + PIECE_BYTES] = data
        writer.publish(producer=at)
    for number in range(SENDS):
        near.queue_pair.post_send(b"s%d" % number)
    near.queue_pair.flush()
    assert len(library_end(roce, near).posted) <= SENDS
    roce.world.is_held = False
    roce.bench.await_newest(far, writer)
    receives = CompletionKind.RECEIVE
    roce.bench.until(
        lambda: len(far.side.of(receives, far.queue_pair)) == SENDS, "all arrive"
    )
    sent = [item.payload for item in far.side.of(receives, far.queue_pair)]
    assert sent == [b"s%d" % number for number in range(SENDS)]
    assert content(region, 0, len(image)) == bytes(image)
    publishes = near.side.of(CompletionKind.PUBLISH, near.queue_pair)
    assert [item.wr_id for item in publishes] == list(writer.open_wr_ids)


def test_what_is_lost_on_the_way_comes_later_and_once(roce: Roce) -> None:
    near, far = roce.bench.link()
    region = far.domain.register(16 << 10)
    writer = Writer(near, region, far.queue_pair)
    pair = library_end(roce, far)
    for number in range(20):
        pair.is_cut = True
        writer.write(number, bytes([number + 1]))
        writer.publish(producer=number + 1)
        for _ in range(ATTEMPTS // 10):
            roce.bench.move()
        pair.is_cut = False
        roce.bench.await_newest(far, writer)
        assert content(region)[: number + 2] == bytes([*range(1, number + 2), 0])
    assert statuses(near)[0] == statuses(far)[0] == CONNECTED
    assert not near.side.of(CompletionKind.DOWN, near.queue_pair)


def test_a_busy_peer_costs_time_and_nothing_else(roce: Roce) -> None:
    """It has no receives for a while: SMC-R has no credits for them."""
    near, far = roce.bench.link()
    for number in range(3 * RECEIVES):
        near.queue_pair.post_send(b"%d" % number)
    near.queue_pair.flush()
    for _ in range(3 * ATTEMPTS):
        roce.world.run()
        near.side.poll()
    assert near.queue_pair.is_up
    receives = CompletionKind.RECEIVE
    roce.bench.until(
        lambda: len(far.side.of(receives, far.queue_pair)) == 3 * RECEIVES, "all arrive"
    )


def test_a_post_that_fails_ends_the_queue_pair(roce: Roce) -> None:
    near, _ = roce.bench.link()
    roce.libraries[0].fail("post_send", errno.EINVAL)
    near.queue_pair.post_send(b"x")
    near.queue_pair.flush()
    found = roce.bench.await_one(near, CompletionKind.DOWN)
    assert found.status is Status.FLUSHED
    assert found.payload.startswith("a post failed: post send: EINVAL")


def test_a_post_that_fails_ends_what_waits_for_room(roce: Roce) -> None:
    near, _ = roce.bench.link()
    roce.world.is_held = True
    for _ in range(3 * SENDS):
        near.queue_pair.post_send(b"x")
    near.queue_pair.flush()
    roce.libraries[0].fail("post_send", errno.EIO)
    roce.world.is_held = False
    found = roce.bench.await_one(near, CompletionKind.DOWN)
    assert "post send: EIO" in found.payload
    roce.bench.settle()
    assert near.side.seen[-1] is found


def test_a_long_write_ends_with_the_queue_pair(roce: Roce) -> None:
    near, far = roce.bench.link()
    region = far.domain.register(16 * MIB)
    rkey = region.rkey_on(far.queue_pair)
    roce.world.is_held = True
    roce.libraries[0].fail("post_send", errno.EIO)
    near.queue_pair.post_write(rkey, region.virtual_address, bytes(16 * MIB))
    roce.world.is_held = False
    roce.bench.await_one(near, CompletionKind.DOWN)
    roce.bench.settle()
    assert not library_end(roce, near).posted
    assert not near.side.device.dirty  # type: ignore[attr-defined]


def test_poll_and_arm_give_the_device_what_was_not_flushed(roce: Roce) -> None:
    near, far = roce.bench.link()
    near.queue_pair.post_send(b"one")
    near.side.device.poll()
    near.queue_pair.post_send(b"two")
    near.side.device.arm()
    roce.bench.settle()
    assert len(far.side.of(CompletionKind.RECEIVE, far.queue_pair)) == 2


# What a peer may do


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xfe" + bytes(43), "the peer sent no update"),
        (b"\xfe\x2c", "the peer sent no update"),
        (bytes(RECEIVE_BYTES + 1), "IBV_WC_LOC_LEN_ERR, 1"),
    ],
)
def test_what_no_peer_may_send_ends_its_link_alone(
    roce: Roce, data: bytes, words: str
) -> None:
    near, far = roce.bench.link()
    other, beside = roce.bench.link()
    send_raw(library_end(roce, near), data)
    found = roce.bench.await_one(far, CompletionKind.DOWN)
    assert found.status is Status.BROKEN_RULE
    assert words in found.payload
    other.queue_pair.post_send(b"still here")
    roce.bench.await_one(beside, CompletionKind.RECEIVE)


def test_a_write_with_immediate_is_no_message(roce: Roce) -> None:
    """It uses a receive up, and its length is that of the write."""
    near, far = roce.bench.link()
    pair = library_end(roce, far)
    wr_id, _, _ = pair.receiving.popleft()
    pair._complete(wr_id, 0, 0x81, 1 << 30)
    found = roce.bench.await_one(far, CompletionKind.DOWN)
    assert found.status is Status.BROKEN_RULE
    assert "opcode 0x81" in found.payload
    near.queue_pair.close()


def test_the_longest_llc_message_is_delivered(roce: Roce) -> None:
    near, far = roce.bench.link()
    send_raw(library_end(roce, near), b"\x22" * 4152)
    found = roce.bench.await_one(far, CompletionKind.RECEIVE)
    assert found.payload == b"\x22" * 4152


def test_receives_that_cannot_be_posted_end_the_link(roce: Roce) -> None:
    near, far = roce.bench.link()
    roce.libraries[1].fail("post_receives", errno.EINVAL)
    for _ in range(RECEIVES):
        near.queue_pair.post_send(b"x")
    near.queue_pair.flush()
    found = roce.bench.await_one(far, CompletionKind.DOWN)
    assert found.payload.startswith("no receives can be posted")


# Going down


def test_a_peer_that_vanished_is_noticed_by_sending(roce: Roce) -> None:
    near, far = roce.bench.link()
    library_end(roce, far).is_cut = True
    library_end(roce, near).vendor_error = 0x81
    near.queue_pair.post_send(b"anybody there?")
    near.queue_pair.flush()
    for _ in range(ATTEMPTS + 10):
        roce.bench.move()
    (down,) = near.side.of(CompletionKind.DOWN, near.queue_pair)
    assert down.status is Status.TIMED_OUT
    assert "IBV_WC_RETRY_EXC_ERR, 12, vendor error 0x81" in down.payload
    assert library_end(roce, near).now == ERROR
    near.queue_pair.close()


def test_closing_sends_what_was_posted_and_more_than_fits(roce: Roce) -> None:
    near, far = roce.bench.link()
    roce.world.is_held = True
    for number in range(3 * SENDS):
        near.queue_pair.post_send(b"%d" % number)
    near.queue_pair.close()
    near.domain.close()
    assert roce.libraries[0].open["pair"] == 1
    roce.world.is_held = False
    roce.bench.await_one(far, CompletionKind.DOWN)
    assert len(far.side.of(CompletionKind.RECEIVE, far.queue_pair)) == 3 * SENDS
    roce.bench.settle()
    assert roce.libraries[0].open["pair"] == 0


def test_both_may_close_at_once(roce: Roce) -> None:
    near, far = roce.bench.link()
    roce.world.is_held = True
    near.queue_pair.close()
    far.queue_pair.close()
    roce.world.is_held = False
    roce.bench.settle()
    for library in roce.libraries:
        assert library.open["pair"] == 0
    assert statuses(near) == statuses(far) == [CONNECTED]


def test_a_closing_queue_pair_ends_with_its_peer(roce: Roce) -> None:
    near, far = roce.bench.link()
    library_end(roce, far).is_cut = True
    near.queue_pair.close()
    for _ in range(ATTEMPTS + 10):
        roce.bench.move()
    assert library_end(roce, near).now == ERROR
    assert statuses(near) == [CONNECTED]


def test_a_closing_queue_pair_whose_posts_fail_is_done(roce: Roce) -> None:
    near, _ = roce.bench.link()
    roce.libraries[0].fail("post_send", errno.EIO)
    near.queue_pair.close()
    assert library_end(roce, near).now == ERROR
    assert statuses(near) == [CONNECTED]


def test_memory_of_a_closed_domain_is_not_withdrawn_too_early(roce: Roce) -> None:
    """The peer may write until it learns of the end; it broke no rule."""
    near, far = roce.bench.link()
    region = near.domain.register(MIB)
    writer = Writer(far, region, near.queue_pair)
    rkey, address = writer.rkey, region.virtual_address
    roce.world.is_held = True
    far.queue_pair.post_write(rkey, address, b"on its way")
    far.queue_pair.flush()
    near.domain.close()
    region.close()
    roce.world.is_held = False
    found = roce.bench.await_one(far, CompletionKind.DOWN)
    assert found.status is Status.PEER_GONE
    roce.bench.settle()
    assert rkey not in roce.libraries[0].memory


def test_a_queue_pair_that_the_device_ended(roce: Roce) -> None:
    near, far = roce.bench.link()
    pair = library_end(roce, near)
    assert isinstance(near.queue_pair, VerbsQueuePair)
    assert not near.queue_pair.is_in_error()
    pair.now = ERROR
    assert near.queue_pair.is_in_error()
    roce.libraries[0].fail("state", errno.EIO)
    pair.now = 3
    assert near.queue_pair.is_in_error()
    far.queue_pair.close()


def test_destroying_may_fail(roce: Roce) -> None:
    """Then the device may still fill its receives: nobody else gets them."""
    near, _ = roce.bench.link()
    library = roce.libraries[0]
    pair = library_end(roce, near)
    made = library.made["memory"]
    (queue,) = roce.devices[0]._queues
    room = queue.room
    library.fail("close_pair", errno.EIO)
    near.queue_pair.close()
    roce.bench.settle()
    assert library.open["memory"] == 0
    assert queue.room == room, "its completions may still come"
    near.domain.create_queue_pair().close()
    assert library.made["memory"] == made + 2
    pair.close()  # so that nothing is left


def test_a_device_that_went_before_the_connect(roce: Roce) -> None:
    near, far = roce.bench.end(roce.bench.a), roce.bench.end(roce.bench.b)
    roce.devices[0].fail("taken away")
    with pytest.raises(FabricError, match="taken away"):
        near.queue_pair.connect(far.remote(1), 1, passive=False)
    assert not near.side.device.poll()
    assert str(near.queue_pair) == f"fake1:1:1 queue pair {near.queue_pair.number}"
