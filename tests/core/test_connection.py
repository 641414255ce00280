"""One connection: windows, updates, lies, and how it ends."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysmc.core.connection import POSTS_MAX, Connection, split_wr_id
from pysmc.core.events import News
from pysmc.core.rmb import Rmb, RToken
from pysmc.core.roles import Role
from pysmc.errors import (
    ConnectionReset,
    LocalProtocolError,
    RemoteProtocolError,
)

if TYPE_CHECKING:
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup
    from tests.core.conftest import Duo

BLOCKED, REQUESTED, FAILOVER = 0x8000, 0x1000, 0x0800
URGENT = 0x6000
DONE, CLOSED, ABORTED = 0x80, 0x40, 0x20


# Out


def test_claims_follow_the_cursor_and_wrap_once(duo: Duo) -> None:
    assert duo.left.claim(10) == ((1000, 10),)
    assert duo.tell(duo.right) == News.DATA
    assert duo.right.peek(100) == (0, 10)
    assert duo.right.consume(10)
    assert duo.tell(duo.left) == News.SPACE
    assert duo.left.claim(12) == ((1010, 6), (1000, 6))
    duo.tell(duo.right)
    assert duo.right.peek(100) == (10, 6)
    assert duo.right.peek(4) == (10, 4)
    duo.right.consume(6)
    assert duo.right.peek(100) == (0, 6)


def test_an_element_of_several_begins_where_its_index_says() -> None:
    connection = Connection(
        role=Role.CLIENT,
        group=cast("LinkGroup", None),
        link=cast("Link", None),
        rmb=Rmb(cast("LinkGroup", None), 16),
        alert_token=1,
        sndbuf_bytes=16,
    )
    assert connection.writable == 0
    assert connection.claim(4) == ()
    assert (connection.rmbe_bytes, connection.peer_rmbe_bytes) == (16, 0)
    connection.attach_peer(
        token=RToken(9, 5000), alert_token=2, rmbe_bytes=32, rmbe_index=3
    )
    assert connection.claim(4) == ((5064, 4),)
    assert (connection.remote_rkey, connection.peer_rmbe_bytes) == (9, 32)


def test_a_writer_that_is_blocked_says_so_even_with_nothing_to_announce(
    duo: Duo,
) -> None:
    assert duo.left.claim(16) == ((1000, 16),)
    assert duo.left.take_update()[4] == BLOCKED
    duo.left.published(completed=True)
    assert not duo.left.update_due
    assert duo.left.writable == 0
    assert duo.left.claim(1) == ()
    assert not duo.left.update_due, "it was said"


def test_the_flag_goes_when_all_fits(duo: Duo) -> None:
    duo.left.claim(16)
    duo.tell(duo.right)
    duo.right.consume(16)
    duo.tell(duo.left)
    duo.left.claim(3)
    assert duo.left.take_update()[4] == 0


def test_a_blocked_writer_hears_of_every_byte(duo: Duo) -> None:
    duo.left.claim(20)
    duo.tell(duo.right)
    assert duo.right.consume(1)
    assert duo.tell(duo.left) == News.SPACE


def test_a_writer_that_is_not_blocked_hears_of_an_eighth(make_duo: type[Duo]) -> None:
    duo = make_duo(right_bytes=80)
    duo.left.claim(40)
    duo.tell(duo.right)
    assert not duo.right.consume(9)
    assert duo.right.consume(1)


def test_a_flag_that_comes_later_is_answered_at_once(make_duo: type[Duo]) -> None:
    """The last claim fitted, the next does not: the window is opened by the flag."""
    duo = make_duo(right_bytes=80)
    duo.left.claim(79)
    duo.tell(duo.right)
    duo.right.consume(5)
    assert not duo.right.update_due
    duo.left.claim(2)
    assert duo.tell(duo.right) & News.PUBLISH
    assert duo.right.update_due


def test_a_requested_update_is_given(duo: Duo) -> None:
    duo.left.claim(3)
    duo.tell(duo.right)
    duo.right.consume(1)
    assert duo.tell(duo.right, flags=REQUESTED) == News.PUBLISH


def test_an_urgent_byte_has_whatever_is_read_reported(make_duo: type[Duo]) -> None:
    """Linux sends no more until that; the mark is gone before the byte is read."""
    duo = make_duo(right_bytes=80)
    duo.left.claim(3)
    duo.tell(duo.right, flags=URGENT)
    duo.tell(duo.right)
    assert duo.right.consume(3)
    duo.tell(duo.left)
    assert duo.left.writable == 80
    duo.left.claim(2)
    duo.tell(duo.right)
    assert duo.right.consume(1)


def test_a_claim_can_be_limited(duo: Duo) -> None:
    assert duo.left.claim(10, 4) == ((1000, 4),)
    assert duo.left.claim(6, 4) == ((1004, 4),)


def test_a_report_that_goes_back_is_passed_over(duo: Duo) -> None:
    duo.move(9)
    assert duo.tell(duo.left, consumer=4) == News.NOTHING
    assert duo.left.writable == 16


def test_small_rests_wait_for_more_room(make_duo: type[Duo]) -> None:
    duo = make_duo(right_bytes=64)
    duo.left.claim(60)
    assert duo.left.claim(10) == ()
    assert duo.left.claim(4) == ((1060, 4),)


@pytest.mark.parametrize(("sndbuf", "ring"), [(16, 64), (64, 16), (16, 16), (16, 4096)])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_long_write_always_goes_on(
    make_duo: type[Duo], sndbuf: int, ring: int, at_once: bool
) -> None:
    """Whatever is the smaller, buffer or element: nobody waits for news in vain."""
    duo = make_duo(right_bytes=ring, sndbuf_bytes=sndbuf)
    left, right = duo.left, duo.right
    waiting, news, turns = 1000, News.SPACE, 0
    unfinished = 0
    while waiting:
        turns += 1
        assert turns < 5000
        assert news & News.SPACE, f"nothing more happens with {waiting} bytes to go"
        news = News.NOTHING
        while spans := left.claim(waiting):
            waiting -= sum(length for _, length in spans)
            update = left.take_update()
            left.published(completed=at_once)
            unfinished += not at_once
            right.receive_update(update)
        if left.update_due:
            right.receive_update(left.take_update())
            left.published(completed=at_once)
            unfinished += not at_once
        if unfinished:
            unfinished -= 1
            news |= left.publish_completed()
        if right.readable:
            # As slowly as can be.
            right.consume(1)
        if right.update_due:
            update = right.take_update()
            right.published(completed=True)
            news |= left.receive_update(update)
        if unfinished or right.readable:
            news |= News.SPACE


def test_what_is_not_completed_counts_against_the_send_buffer(
    make_duo: type[Duo],
) -> None:
    duo = make_duo(right_bytes=64, sndbuf_bytes=8)
    assert duo.left.claim(20) == ((1000, 8),)
    duo.left.take_update()
    duo.left.published(completed=False)
    assert duo.left.writable == 0
    assert duo.left.claim(12) == ()
    assert duo.left.publish_completed() == News.SPACE
    assert duo.left.publish_completed() == News.NOTHING
    assert duo.left.writable == 8


def test_a_completion_is_news_for_a_claim_that_waits_with_a_little_free(
    make_duo: type[Duo],
) -> None:
    duo = make_duo(right_bytes=64, sndbuf_bytes=8)
    duo.left.claim(6)
    duo.left.take_update()
    duo.left.published(completed=False)
    assert duo.left.writable == 2
    assert duo.left.claim(10) == (), "not worth an announcement"
    assert duo.left.publish_completed() == News.SPACE
    assert duo.left.claim(10) == ((1006, 8),)


def test_a_completion_at_once_covers_those_before_it(make_duo: type[Duo]) -> None:
    duo = make_duo(right_bytes=64, sndbuf_bytes=8)
    duo.left.claim(4)
    duo.left.take_update()
    duo.left.published(completed=False)
    duo.left.claim(4)
    duo.left.take_update()
    duo.left.published(completed=True)
    assert duo.left.writable == 8
    assert duo.left.publish_completed() == News.NOTHING
    assert duo.left.writable == 8


def test_writes_wait_while_many_updates_are_on_their_way(
    make_duo: type[Duo],
) -> None:
    """What is written meanwhile goes as one piece, with one update."""
    duo = make_duo(right_bytes=4096, sndbuf_bytes=4096)
    for _ in range(POSTS_MAX):
        assert duo.left.claim(8)
        duo.left.take_update()
        duo.left.published(completed=False)
    assert duo.left.claim(8) == ()
    assert not duo.left.update_due, "the peer has room: it is not what we wait for"
    assert duo.left.publish_completed() == News.SPACE
    assert duo.left.claim(800) == ((1000 + 8 * POSTS_MAX, 800),)
    duo.left.take_update()
    duo.left.published(completed=False)
    assert duo.left.claim(8) == ()
    assert duo.left.publish_completed(5) == News.SPACE
    assert duo.left.publish_completed() == News.NOTHING, "it was told already"


def test_a_completion_names_its_publish(make_duo: type[Duo]) -> None:
    duo = make_duo(right_bytes=64, sndbuf_bytes=12)
    named = []
    for _ in range(3):
        duo.left.claim(4)
        post = duo.left.take_post()
        duo.left.published(completed=False)
        assert post[0] == duo.left.remote_rkey
        named.append(split_wr_id(post[1]))
    assert named == [(duo.left.alert_token, number) for number in (1, 2, 3)]
    assert duo.left.oldest_post == (1, 4)
    assert duo.left.publish_completed(9) == News.NOTHING, "nobody posted it"
    assert duo.left.writable == 0
    assert duo.left.publish_completed(2) == News.SPACE, "what was before it too"
    assert duo.left.writable == 8
    assert duo.left.publish_completed(2) == News.NOTHING, "told twice"
    assert duo.left.publish_completed(1) == News.NOTHING, "told late"
    assert duo.left.writable == 8
    assert duo.left.oldest_post == (3, 12)


def test_nothing_can_be_written_after_the_end(duo: Duo) -> None:
    duo.left.shutdown_write()
    duo.left.shutdown_write()
    with pytest.raises(LocalProtocolError, match="write side was closed"):
        duo.left.claim(1)
    assert duo.left.writable == 0


# Updates


def test_updates_count_from_one_and_carry_everything(duo: Duo) -> None:
    duo.left.claim(5)
    assert duo.left.take_update() == (1, 0x11, 5, 0, 0)
    duo.left.shutdown_write()
    assert duo.left.take_update() == (2, 0x11, 5, 0, DONE)
    duo.left.close()
    assert duo.left.take_update() == (3, 0x11, 5, 0, DONE | CLOSED)
    assert not duo.left.update_due


def test_nothing_can_be_published_to_nobody(duo: Duo) -> None:
    lonely = duo.bare(16, 1)
    with pytest.raises(AssertionError, match="before the peer is known"):
        lonely.take_update()


@pytest.mark.parametrize("start", [0, 1, 65535, 65536, 131071])
def test_sequences_and_wraps_pass_their_16_bits(
    make_duo: type[Duo], start: int
) -> None:
    duo = make_duo(left_bytes=4, right_bytes=4)
    left, right = duo.left, duo.right
    # As if so many updates and wraps had gone before.
    left._sequence = right._peer_sequence = start & 0xFFFF
    right._sequence = left._peer_sequence = start & 0xFFFF
    position = start * 4
    left._tx_produced = left._tx_acked = left._tx_completed = position
    left._tx_announced = position
    left._producer = left._peer_ring.pack(position) if left._peer_ring else 0
    right._rx_produced = right._rx_consumed = right._rx_reported = position
    right._consumer = right._ring.pack(position)
    left._peer_consumer = right._peer_producer = right._consumer
    for _ in range(3):
        duo.move(4)
        duo.move(3)
    assert right._rx_consumed == position + 21
    assert left.error is None
    assert right.error is None


def test_an_equal_update_says_nothing_new_and_an_older_one_is_passed_over(
    duo: Duo,
) -> None:
    duo.left.claim(3)
    first = duo.left.take_update()
    duo.left.claim(4)
    duo.left.shutdown_write()
    second = duo.left.take_update()
    assert duo.right.receive_update(second) == News.DATA | News.DONE
    assert duo.right.receive_update(second) == News.NOTHING
    assert duo.right.receive_update(first) == News.NOTHING
    assert duo.right.readable == 7
    assert duo.right.peer_done


def test_an_older_update_with_other_flags_is_passed_over(duo: Duo) -> None:
    duo.tell(duo.right)
    old = (0, 0x11, 0, 0, CLOSED)
    duo.tell(duo.right)
    assert duo.right.receive_update(old) == News.NOTHING
    assert duo.right.state == "ACTIVE"


def test_a_gap_of_any_size_does_not_matter(duo: Duo) -> None:
    """A mailbox shows the newest only: 16 bits cannot tell how many were skipped."""
    for gap in (1, 2, 0x7FFF, 0x8000, 0xFFFF):
        duo.left._sequence = (duo.left._sequence + gap) & 0xFFFF
        duo.left.claim(2)
        assert duo.tell(duo.right) & News.DATA
        duo.right.consume(2)
        duo.tell(duo.left)
    assert duo.right.error is None


def test_what_came_before_the_peer_is_known_counts_then(duo: Duo) -> None:
    early = duo.bare(16, 5)
    assert early.receive_update((1, 5, 3, 0, 0)) == News.NOTHING
    assert early.receive_update((2, 5, 9, 0, DONE)) == News.NOTHING
    assert early.readable == 0
    early.attach_peer(token=RToken(7, 1000), alert_token=6, rmbe_bytes=16)
    assert (early.readable, early.peer_done) == (9, True)


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        # A device repeats what it has delivered; cursors decide, then sequences.
        ([(1, 5, 3, 0, 0), (2, 5, 9, 0, 0), (1, 5, 3, 0, 0)], (9, False)),
        ([(1, 5, 9, 0, 0), (2, 5, 9, 0, DONE), (1, 5, 9, 0, 0)], (9, True)),
        ([(0xFFFF, 5, 9, 0, 0), (0, 5, 9, 0, DONE), (0xFFFF, 5, 9, 0, 0)], (9, True)),
        ([(1, 5, 3, 0, 0), (40_000, 5, 9, 0, 0)], (9, False)),
    ],
)
def test_what_is_repeated_before_the_peer_is_known_takes_nothing_back(
    duo: Duo, updates: list[tuple[int, int, int, int, int]], expected: tuple[int, bool]
) -> None:
    early = duo.bare(16, 5)
    for update in updates:
        assert early.receive_update(update) == News.NOTHING
    early.attach_peer(token=RToken(7, 1000), alert_token=6, rmbe_bytes=16)
    assert (early.readable, early.peer_done) == expected


@pytest.mark.parametrize("producers", [(3, 99), (99, 3), (99, 98)])
def test_a_lie_before_the_peer_is_known_is_found_then(
    duo: Duo, producers: tuple[int, int]
) -> None:
    early = duo.bare(16, 5)
    for sequence, producer in enumerate(producers, 1):
        update = (sequence, 5, producer, 0, 0)
        assert early.receive_update(update) == News.NOTHING
    early.attach_peer(token=RToken(7, 1000), alert_token=6, rmbe_bytes=16)
    assert (early.readable, early.peer_aborted) == (0, True)


# Lies


LIES = {
    "producer outside": ({"producer": 16}, "producer cursor 16 lies outside"),
    "producer too far": (
        {"producer": 1 << 32 | 1},
        "advanced 17 bytes; allowed are 16",
    ),
    "consumer outside": ({"consumer": 0xFFFFFFFF}, "consumer cursor 4294967295 lies"),
    "consumer ahead": ({"consumer": 4}, "consumer cursor advanced 4 bytes; allowed"),
    "data lost": (
        {"sequence": 9, "flags": FAILOVER},
        "after update 9, which never came; the last one was 0",
    ),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("ours", ["open", "done", "closed"])
def test_a_lie_aborts_its_connection_and_names_the_rule(
    duo: Duo, lie: str, ours: str
) -> None:
    changes, text = LIES[lie]
    right = duo.right
    if ours != "open":
        right.shutdown_write()
    if ours == "closed":
        right.close()
        right.take_update()
    expected = News.ABORTED | (News.PUBLISH if ours != "closed" else 0)
    assert duo.tell(right, **changes) == expected
    assert isinstance(right.error, RemoteProtocolError)
    assert text in str(right.error)
    assert "RFC 7609" in str(right.error)
    assert right.suspect
    assert right.peer_aborted
    if ours != "closed":
        assert right.take_update()[4] & ABORTED
    assert right.is_ended
    assert duo.tell(right, **changes) == News.NOTHING, "whatever it says now"


def test_writing_over_unread_bytes_is_a_lie(duo: Duo) -> None:
    duo.left.claim(16)
    duo.tell(duo.right)
    duo.right.consume(1)
    # It is not told yet that one byte is free.
    assert duo.tell(duo.right, producer=1 << 32 | 1) & News.ABORTED
    assert "advanced 1 bytes; allowed are 0" in str(duo.right.error)


def test_writing_after_the_end_is_a_lie(duo: Duo) -> None:
    duo.left.shutdown_write()
    duo.tell(duo.right)
    assert duo.tell(duo.right, producer=1) & News.ABORTED
    assert "after it had said that it finished" in str(duo.right.error)


def test_the_validation_of_a_failover_passes_when_nothing_was_lost(duo: Duo) -> None:
    duo.left.claim(2)
    duo.tell(duo.right)
    for sequence in (1, 0, 0x8001):
        assert duo.tell(duo.right, sequence=sequence, flags=FAILOVER) == News.NOTHING
    assert duo.right.error is None
    assert duo.right.readable == 2


def test_no_update_whatever_leads_out_of_the_element(make_duo: type[Duo]) -> None:
    cursors = st.integers(0, (1 << 48) - 1) | st.integers(0, 40)
    numbers = st.integers(0, 0xFFFF)

    @given(st.lists(st.tuples(numbers, cursors, cursors, numbers), max_size=20))
    def follow(updates: list[tuple[int, int, int, int]]) -> None:
        right = make_duo().right
        right.claim(7)
        right.take_update()
        for sequence, producer, consumer, flags in updates:
            before = right.readable
            right.receive_update((sequence, 0x22, producer, consumer, flags))
            right.check()
            assert before <= right.readable <= 16
            offset, length = right.peek(100)
            assert 0 <= offset <= offset + length <= 16

    follow()


def test_room_can_be_seen_before_the_update_that_tells_of_it(duo: Duo) -> None:
    duo.left.claim(10)
    duo.tell(duo.right)
    duo.right.consume(4)
    update = duo.right.take_update()
    consumer = update[3]
    assert duo.left.follow_consumer(consumer)
    assert duo.left.writable == 10
    assert not duo.left.follow_consumer(consumer), "it is known"
    assert duo.left.receive_update(update) == News.NOTHING
    assert not duo.left.follow_consumer(0), "it never goes back"
    assert not duo.left.follow_consumer(11), "nor too far: its update will say so"
    assert duo.left.error is None
    assert duo.left.writable == 10
    duo.left.abort()
    duo.right.abort()
    duo.tell(duo.left)
    assert not duo.left.follow_consumer(5)
    assert not duo.bare(16, 1).follow_consumer(5)


# The end

ENDS = ["nothing", "done", "closed", "aborted"]


def say(connection: Connection, what: str) -> None:
    if what == "done":
        connection.shutdown_write()
    elif what == "closed":
        connection.close()
    elif what == "aborted":
        connection.abort()


@pytest.mark.parametrize(("ours", "theirs"), [*product(ENDS, ENDS)])
@pytest.mark.parametrize("we_first", [True, False])
def test_every_way_to_end(duo: Duo, ours: str, theirs: str, we_first: bool) -> None:
    left, right = duo.left, duo.right
    if we_first:
        say(left, ours)
    say(right, theirs)
    news = duo.tell(left)
    if not we_first:
        say(left, ours)
    expected = {
        "nothing": News.NOTHING,
        "done": News.DONE,
        "closed": News.DONE | News.CLOSED,
        "aborted": News.ABORTED,
    }
    publish = News.PUBLISH if we_first and ours != "nothing" else 0
    assert news == expected[theirs] | publish
    assert left.peer_done == (theirs in {"done", "closed"})
    assert left.peer_closed == (theirs == "closed")
    assert left.peer_aborted == (theirs == "aborted")
    assert left.we_ended == (ours in {"closed", "aborted"})
    both = left.we_ended and theirs in {"closed", "aborted"}
    assert not left.is_ended, "ours was not said yet"
    assert left.is_open == (not left.we_ended and theirs in {"nothing", "done"})
    if left.update_due:
        left.take_update()
    assert left.is_ended == both
    if ours == "closed" and theirs == "aborted" and not we_first:
        assert left.state == "CLOSED"


def test_a_close_with_unread_bytes_is_an_abort(duo: Duo) -> None:
    duo.left.claim(1)
    duo.tell(duo.right)
    duo.right.close()
    assert duo.tell(duo.left) == News.ABORTED
    assert duo.left.peer_aborted


def test_an_abort_after_the_last_byte_still_says_that_it_was_the_last(
    duo: Duo,
) -> None:
    """The update that said D alone may have been skipped."""
    duo.left.claim(3)
    duo.left.shutdown_write()
    duo.left.abort()
    assert duo.tell(duo.right) == News.DATA | News.DONE | News.ABORTED
    assert duo.right.peer_done
    assert duo.right.peer_aborted
    assert duo.right.readable == 3


def test_after_an_abort_of_the_peer_our_close_is_an_abort(duo: Duo) -> None:
    duo.left.abort()
    duo.tell(duo.right)
    duo.right.close()
    assert duo.right.take_update()[4] == ABORTED


def test_bytes_before_the_close_can_be_read_after_it(duo: Duo) -> None:
    duo.left.claim(6)
    duo.left.close()
    assert duo.tell(duo.right) == News.DATA | News.DONE | News.CLOSED
    assert duo.right.readable == 6
    assert not duo.right.consume(6), "the peer wants no reports any more"
    assert duo.right.claim(5) == (), "it would go nowhere"


def test_nothing_is_said_after_the_end(duo: Duo) -> None:
    duo.left.claim(16)
    duo.tell(duo.right)
    duo.right.abort()
    duo.right.take_update()
    duo.right.consume(16)
    duo.right.close()
    duo.right.shutdown_write()
    assert not duo.right.update_due


def test_an_end_without_a_peer_is_said_to_nobody(duo: Duo) -> None:
    lonely = duo.bare(16, 1)
    lonely.abort()
    assert lonely.we_ended
    assert not lonely.update_due


def test_a_lost_link_ends_both_sides_and_keeps_the_first_error(duo: Duo) -> None:
    duo.left.claim(3)
    duo.left.take_update()
    duo.left.published(completed=False)
    first, second = ConnectionReset("first"), ConnectionReset("second")
    duo.left.link_lost(first)
    duo.left.link_lost(second)
    assert duo.left.error is first
    assert duo.left.is_ended
    assert not duo.left.update_due
    assert duo.left.publish_completed() == News.NOTHING


def test_more_cannot_be_consumed_than_was_there(duo: Duo) -> None:
    with pytest.raises(AssertionError, match="more consumed than was there"):
        duo.right.consume(1)


def test_it_says_what_it_is(duo: Duo) -> None:
    duo.left.claim(3)
    assert repr(duo.left) == "<Connection 00000022 ACTIVE unread=0 unacked=3>"


def test_a_peer_that_has_ended_takes_nothing_and_hears_only_of_our_end(
    duo: Duo,
) -> None:
    left, right = duo.left, duo.right
    right.claim(10)
    right.close()
    duo.tell(left)
    assert left.peer_closed
    # Its memory may be withdrawn already: neither EOF nor reading is announced.
    left.shutdown_write()
    left.consume(left.readable)
    assert not left.update_due
    # And whoever ended it, a write finds no room instead of an error.
    assert left.claim(10) == ()
    left.close()
    assert left.update_due
