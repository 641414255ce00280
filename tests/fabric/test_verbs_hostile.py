"""Peers over RoCE that ask for more than they give, and what is left of dead ones."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from pysmc.fabric import verbs
from pysmc.fabric.base import CompletionKind, Status
from pysmc.fabric.verbs_memory import RECEIVES
from pysmc.fabric.verbs_pair import MESSAGES_WAITING_MAX, SENDS, VerbsQueuePair
from tests.fabric.fake_verbs import make_port

if TYPE_CHECKING:
    from pysmc.testing.conformance_bench import End
    from tests.fabric.fake_verbs import Roce

LLC = bytes([0x27]) + bytes(43)


def close_receives(roce: Roce, end: End) -> None:
    """Let an end take no SEND any more, as a program does that posts no receives."""
    roce.library_pair(end.queue_pair.number).receiving.clear()


def test_a_peer_that_takes_no_answers_is_given_a_bound(roce: Roce) -> None:
    """It may ask a thousand times a second; its silence is not noticed by TEST LINK."""
    near, far = roce.bench.link()
    close_receives(roce, far)
    for _ in range(SENDS + MESSAGES_WAITING_MAX):
        near.queue_pair.post_send(LLC)
    near.queue_pair.flush()
    near.side.poll()
    assert near.queue_pair.is_up
    near.queue_pair.post_send(LLC)
    down = roce.bench.await_one(near, CompletionKind.DOWN)
    assert down.status is Status.TIMED_OUT
    assert down.payload == f"the peer took none of {MESSAGES_WAITING_MAX + SENDS} SENDs"
    near.queue_pair.post_send(LLC)  # does nothing


def test_answers_that_found_room_later_are_not_counted(roce: Roce) -> None:
    near, far = roce.bench.link()
    receives = CompletionKind.RECEIVE
    for _ in range(3):
        roce.world.is_held = True
        for _ in range(MESSAGES_WAITING_MAX):
            near.queue_pair.post_send(LLC)
        near.queue_pair.flush()
        roce.world.is_held = False
        far.side.seen.clear()
        roce.bench.until(
            lambda: len(far.side.of(receives, far.queue_pair)) == MESSAGES_WAITING_MAX,
            "all arrive",
        )
    assert near.queue_pair.is_up


def test_updates_may_wait_however_many_they_are(roce: Roce) -> None:
    """Who writes is held back by the room in the peer's buffer."""
    near, far = roce.bench.link()
    close_receives(roce, far)
    for number in range(SENDS + 2 * MESSAGES_WAITING_MAX):
        near.queue_pair.publish(0, number, number & 0xFFFF, 1, 0, 0, 0)
    near.queue_pair.flush()
    near.side.poll()
    assert near.queue_pair.is_up


@pytest.mark.parametrize("count", [1, RECEIVES])
def test_nothing_of_a_dead_queue_pair_is_left_for_the_next(
    roce: Roce, count: int
) -> None:
    """Its completions lie in the queue; the next one may have its number."""
    near, far = roce.bench.link()
    library = roce.library_pair(near.queue_pair.number)
    for _ in range(count):
        far.queue_pair.post_send(LLC)
    far.queue_pair.flush()
    roce.world.run()
    number = near.queue_pair.number
    assert isinstance(near.queue_pair, VerbsQueuePair)
    roce.devices[0].destroy(near.queue_pair)
    assert library.queue.waiting
    roce.world.numbers = iter(range(number, 1 << 24))
    again = roce.bench.end(roce.bench.a)
    assert again.queue_pair.number == number
    assert not library.queue.waiting
    near.side.poll()
    assert not [item for item in near.side.seen if item.queue_pair is again.queue_pair]


def test_the_descriptor_of_a_closed_device_is_still_named(roce: Roce) -> None:
    """At the interpreter's end a device closes before a loop that was forgotten."""
    device = roce.devices[0]
    number = device.fileno()
    device.close()
    assert device.fileno() == number


@pytest.mark.parametrize("state", [None, "ACTIVE", "DOWN"])
def test_a_port_that_is_down_is_blamed_before_the_peer(
    roce: Roce, monkeypatch: pytest.MonkeyPatch, state: str | None
) -> None:
    """What it has flushed may be there before the event that tells of it."""
    near, _ = roce.bench.link()
    now = None if state is None else dataclasses.replace(make_port(1), state=state)
    monkeypatch.setattr(verbs, "read_port", lambda *_: now)
    roce.library_pair(near.queue_pair.number).to_error()
    down = roce.bench.await_one(near, CompletionKind.DOWN)
    if state == "DOWN":
        assert down.status is Status.PEER_GONE
        assert down.payload == "GID 10.0.0.1 of fake1 belongs to a port that is DOWN"
    else:
        assert down.status is Status.FLUSHED
