"""What a program can do with a socket of the kernel's SMC, and asyncio has not."""

from __future__ import annotations

import pytest

from tests.lab.odd_ends import COUNT, rest

pytestmark = pytest.mark.lab_long(seconds=60)
HALF_CLOSED = 5.0
"""Seconds of silence behind a half close: longer than any wait of a handshake."""


@pytest.fixture(params=[True, False], ids=["ours", "theirs"])
def pair(kernel, meetings, request):
    """A connection on SMC-R; gives our end of it and the kernel's."""
    ours, theirs = meetings.ours("ours"), meetings.theirs("theirs")
    client, server = (ours, theirs) if request.param else (theirs, ours)
    assert meetings.connect(client, server, server.ask("serve")["port"]) == "smcr"
    return ours, theirs


def test_urgent_data(meetings, pair):
    """It comes at its place in the stream, and nobody is left waiting behind it."""
    ours, theirs = pair
    for _ in range(3):
        theirs.ask("send", count=100)
        theirs.ask("send_urgent")
        theirs.tell("send", count=COUNT)
        ours.ask("receive", count=101 + COUNT)
        assert "error" not in theirs.answer()
    meetings.part(ours, theirs)


def test_a_reader_that_looks_ahead(meetings, pair):
    ours, theirs = pair
    for _ in range(3):
        ours.ask("send", count=30_000)
        found = theirs.ask("peek", count=30_000)
        assert found == {"are_right": True, "count": 30_000}
        theirs.ask("receive", count=30_000)
    meetings.part(ours, theirs)


def test_a_reader_that_stops(meetings, pair):
    """The kernel keeps that to itself: what it is sent fills its buffer."""
    ours, theirs = pair
    theirs.ask("stop_reading")
    ours.ask("send", count=1000)
    theirs.ask("send", count=1000)
    ours.ask("receive", count=1000)
    theirs.ask("close")  # with unread data
    assert ours.ask("reset")["failed"] is not None


def test_a_long_silence_behind_a_half_close(meetings, pair):
    ours, theirs = pair
    theirs.ask("finish")
    ours.ask("end")
    rest(HALF_CLOSED)
    ours.ask("send", count=COUNT // 4)
    theirs.ask("receive", count=COUNT // 4)
    ours.ask("finish")
    theirs.ask("end")


def test_an_abort_of_the_kernel(meetings, pair):
    ours, theirs = pair
    meetings.exchange(ours, theirs)
    theirs.ask("abort")
    ours.ask("reset")
