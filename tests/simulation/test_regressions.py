"""What the swarm has found in the library, each as a world of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pysmc.config import KIB, Config
from pysmc.testing.simulation.faults import Fault
from pysmc.testing.simulation.swarm import Spec, play, run_seed
from pysmc.testing.simulation.workload import Conversation, Script

pytestmark = pytest.mark.usefixtures("quiet")

SEEDS = Path(__file__).parent / "regressions.txt"
CONFIG = Config(rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB, test_link_interval=1.0)
TALK = Conversation(
    1,
    0,
    Script(api="protocol", style="ask", writes=(100, 50)),
    Script(api="protocol", style="answer"),
    begin=0.1,
)


def seeds() -> list[int]:
    lines = SEEDS.read_text().splitlines()
    return [int(line.split()[0]) for line in lines if line[:1].isdigit()]


@pytest.mark.parametrize("seed", seeds())
def test_a_seed_that_found_something(seed: int) -> None:
    assert run_seed(seed).problems == []


def outcomes(
    *kinds: str, which: int = 0, steps: range, talks: tuple[Conversation, ...]
) -> set[str]:
    """Play talks with faults from every one of the steps on; tell how they ended."""
    ended: set[str] = set()
    for step in steps:
        faults = tuple(Fault(kind, step + n, which) for n, kind in enumerate(kinds))
        outcome = play(Spec(1, (CONFIG, CONFIG), talks, faults))
        assert outcome.problems == [], step
        ended.update(outcome.counts)
    return ended


@pytest.mark.slow
def test_a_confirm_is_sent_whole_though_tcp_takes_it_byte_by_byte() -> None:
    """A client of a reused group was connected when its Confirm was ordered.

    What TCP had not taken of it by then was dropped, and the server gave up.
    """
    talks = (TALK, replace(TALK, begin=0.5))
    ended = outcomes("cut TCP into pieces", steps=range(60, 140, 3), talks=talks)
    assert {"mode: smcr", "ended: complete"} <= ended


@pytest.mark.slow
def test_a_decline_that_tcp_did_not_take_ends_with_the_connection() -> None:
    """Whoever waited for the rest of it to be sent waited for ever."""
    faults = ("cut TCP into pieces", "pause a link for long")
    ended = outcomes(*faults, which=16, steps=range(5, 80), talks=(TALK,))
    assert "ended: ConnectionReset" in ended


def test_who_reads_too_slowly_is_an_excuse_for_its_peer() -> None:
    """Whoever closes waits for room for `close_wait`, and not for ever."""
    reader = Script(api="protocol", read_bytes=700, read_pause=3.0)
    talk = Conversation(1, 0, Script(writes=(40_000,)), reader, begin=0.1)
    outcome = play(Spec(1, (CONFIG, CONFIG), (talk,)))
    assert outcome.problems == []
    assert outcome.counts["ended: ConnectionAborted"] == 1


@pytest.mark.slow
def test_a_removed_device_is_watched_no_more() -> None:
    """Its number was the next socket's, which nobody heard of."""
    talks = (TALK, replace(TALK, caller=2, begin=0.4))
    for step in range(20, 60, 4):
        fault = Fault("remove a device", step, 0)
        configs = (CONFIG, CONFIG, Config(discovery=()))
        outcome = play(Spec(1, configs, talks, (fault,)))
        assert outcome.problems == [], step
        assert outcome.counts["ended: complete"] >= 1
