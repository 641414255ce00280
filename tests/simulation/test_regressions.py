"""What the swarm has found in the library, each as a world of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pysmc.config import KIB, Config
from pysmc.core.tuning import Tuning
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
    *kinds: str,
    which: int = 0,
    steps: range,
    talks: tuple[Conversation, ...],
    seed: int = 1,
) -> set[str]:
    """Play talks with faults from every one of the steps on; tell how they ended."""
    ended: set[str] = set()
    for step in steps:
        faults = tuple(Fault(kind, step + n, which) for n, kind in enumerate(kinds))
        outcome = play(Spec(seed, (CONFIG, CONFIG), talks, faults))
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


@pytest.mark.slow
def test_a_connection_may_have_ended_before_it_is_accepted() -> None:
    """A stopped server finds it in its queue, and the network has forgotten it.

    The next one that is made meanwhile is where ended ones are forgotten.
    """
    talks = (TALK, replace(TALK, begin=0.12))
    faults = ("stop a process", "reset TCP")
    ended = outcomes(*faults, steps=range(4, 20), talks=talks)
    assert {"mode: tcp", "ended: ConnectionResetError", "ended: complete"} <= ended


@pytest.mark.slow
def test_who_reads_for_longer_than_its_patience_has_not_hung() -> None:
    """429 reads of 700 bytes, with 1.2 seconds after each, take 515."""
    reader = Script(read_bytes=700, read_pause=1.2)
    talk = Conversation(1, 0, reader, Script(writes=(300_000,)), begin=0.1)
    config = replace(CONFIG, close_wait=30.0)
    outcome = play(Spec(1, (config, config), (talk,)))
    assert outcome.problems == []
    assert outcome.seconds > reader.patience
    assert outcome.counts["ended: complete"] == 1


def test_a_caller_may_have_ended_before_its_server_begins() -> None:
    """A world was over when no task was left, one turn before the server was told."""
    answers = Script(style="answer", cancel_step=1)
    talk = Conversation(1, 0, Script(style="ask"), answers, begin=0.1)
    ended = outcomes("cancel a task", steps=range(4, 40), talks=(talk,), seed=5)
    assert {"ended: refused", "ended: cut short"} <= ended


def test_a_server_may_begin_on_a_dead_path_when_its_caller_has_ended() -> None:
    """It waits for longer than the library may at the end of a world."""
    caller = Script(style="ask", end="abort")
    talk = Conversation(1, 0, caller, Script(style="answer"), begin=0.1)
    configs = (CONFIG, Config(discovery=()))
    fault = Fault("kill TCP silently", 4)
    for seed in range(30):
        outcome = play(Spec(seed, configs, (talk,), (fault,)))
        assert outcome.problems == [], seed
        assert outcome.counts["mode: tcp"] == 1


def test_an_update_repeated_before_the_confirm_takes_nothing_back() -> None:
    """The client of a reused group writes before its Confirm is there.

    What its device repeated then took the place of a newer update, and the server
    never heard of bytes behind which the client had no room.
    """
    first = Conversation(1, 0, Script(), Script(), begin=0.1)
    writer = Script(api="buffer", writes=(3, 3997))
    talks = (first, Conversation(1, 0, writer, Script(writes=(64,)), begin=0.5))
    for step in range(56, 84, 4):
        outcome = play(
            Spec(
                1,
                (CONFIG, CONFIG),
                talks,
                (Fault("repeat an update later", step, 0),),
                Tuning(element_bytes=1000),
                newest_only=False,
                tcp_delay=0.001,
            )
        )
        assert outcome.problems == [], step
        assert outcome.counts["ended: complete"] == 2
