"""A fault of a plan hits what is there, and says whom it may hurt."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pysmc.config import KIB, Config
from pysmc.testing.simulation import World
from pysmc.testing.simulation.faults import KINDS, Fault, apply, draw_fault, wait_for
from pysmc.testing.simulation.swarm import Spec, play
from pysmc.testing.simulation.workload import Conversation, Script, Town

pytestmark = pytest.mark.usefixtures("quiet")

CONFIG = Config(rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB, test_link_interval=1.0)
TALKS = tuple(
    Conversation(
        1,
        0,
        Script(api="protocol", style="ask", writes=(100, 100), pauses=(0.0, 9.0)),
        Script(api="protocol", style="answer"),
        begin=0.1,
    )
    for _ in range(2)
)


def town(seed: int = 1) -> tuple[World, Town]:
    world = World(seed, newest_only=False)
    processes = [world.process(name, CONFIG) for name in ("server", "client")]
    made = Town(world, processes, TALKS)
    made.open()
    return world, made


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_hits_something_in_the_middle_of_a_talk(kind: str) -> None:
    world, made = town()
    world.run(until=3.0)
    assert apply(world, made, Fault(kind, world.steps, 1))
    assert any(f"fault: {kind} 1" in line for line in world.trace)
    excused = [talking for talking in made.talkings if talking.excuses]
    # Everybody was admitted before the server was closed, and is on SMC-R when TCP
    # dies, so that hurts nobody.
    admitted = kind in {"close a server", "kill TCP silently"}
    assert (
        len(excused)
        == {"all": 2, "one": 1, "none": 0}["none" if admitted else KINDS[kind].scope]
    )
    world.run(until=lambda: made.is_over)
    made.close_servers()
    world.run(until=lambda: made.is_quiet)
    assert world.close() == []


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("kind", ["cut a link", "lose completions", "crash a process"])
def test_who_talks_elsewhere_has_no_excuse(kind: str, which: int) -> None:
    """A fault hurts those who talk over what it hits, and nobody else."""
    world = World(1, newest_only=False)
    names = ("server", "client", "another server", "another client")
    processes = [world.process(name, CONFIG) for name in names]
    elsewhere = replace(TALKS[0], caller=3, listener=2)
    made = Town(world, processes, (TALKS[0], elsewhere))
    made.open()
    world.run(until=3.0)
    assert apply(world, made, Fault(kind, world.steps, which))
    world.run(until=lambda: made.is_over)
    (hurt,) = [talking for talking in made.talkings if talking.excuses]
    (other,) = [talking for talking in made.talkings if talking is not hurt]
    assert not hurt.is_complete or kind == "lose completions"
    assert other.is_complete
    world.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "verb" not in kind])
def test_before_anything_is_there_most_kinds_find_nothing(kind: str) -> None:
    world, made = town()
    hits = apply(world, made, Fault(kind, 1, 0))
    assert hits is (kind in {"crash a process", "cancel a task"} or "stop" in kind)
    world.run(until=lambda: made.is_over)
    made.close_servers()
    world.run(until=lambda: made.is_quiet)
    assert world.close() == []


@pytest.mark.parametrize("which", range(2))
def test_data_goes_on_over_a_link_when_tcp_has_died(which: int) -> None:
    world, made = town()
    world.run(until=3.0)
    assert apply(world, made, Fault("kill TCP silently", world.steps, which))
    world.run(until=lambda: made.is_over)
    for talking in made.talkings:
        assert talking.client.mode == "smcr"
        assert talking.is_complete
        assert not talking.excuses
    assert world.now < 20.0, "nobody waited for TCP"
    made.close_servers()
    world.run(until=lambda: made.is_quiet)
    assert world.close() == []


def test_a_plan_is_drawn_from_its_seed_alone() -> None:
    def plan(seed: int) -> list[Fault]:
        rng = random.Random(seed)
        return [draw_fault(rng, 100) for _ in range(300)]

    assert plan(1) == plan(1)
    assert plan(1) != plan(2)
    assert {fault.kind for fault in plan(1)} == set(KINDS)
    assert all(1 <= fault.step <= 100 for fault in plan(1))


def test_a_fault_can_wait() -> None:
    fault = Fault("cut a link", 10, 3)
    assert wait_for(fault).step > 10
    assert wait_for(fault).which == 3
    assert str(fault) == "cut a link before step 10 (which=3)"


def test_the_last_process_is_not_crashed() -> None:
    world, made = town()
    world.run(until=3.0)
    assert apply(world, made, Fault("crash a process", 1, 0))
    assert not apply(world, made, Fault("crash a process", 1, 0))
    world.run(until=lambda: made.is_over)
    assert made.talkings[0].server.is_dead
    assert not made.talkings[0].client.is_dead
    world.close()


@pytest.mark.parametrize("nth", [0, 2])
def test_a_verb_that_is_never_called_again_has_not_failed(nth: int) -> None:
    """What lies in wait is counted when it comes to pass."""
    fault = Fault("fail verb: domain", 1, nth)
    outcome = play(Spec(1, (CONFIG, CONFIG), TALKS[:1], (fault,), newest_only=False))
    assert outcome.problems == []
    assert ("fault: fail verb: domain" in outcome.counts) is (nth == 0)
