"""The world: order, clock, deadlocks, what is left, and that a seed says all."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from pysmc.testing.simulation import Stuck, TooManySteps, World
from tests.testing.simulation.kit import PLAIN, begin, digests, echo_run

SEEDS = 25


@pytest.mark.parametrize("newest_only", [False, True, None])
def test_both_ends_run_over_smcr(newest_only) -> None:
    for seed in range(SEEDS):
        kit = echo_run(seed, newest_only=newest_only)
        assert sorted(kit.modes) == ["client smcr", "server smcr"]


@pytest.mark.slow
def test_200_seeds_mean_the_same_in_every_process() -> None:
    """Twice here, and once where strings have other hashes."""
    program = (
        "import sys\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "from tests.testing.simulation.kit import digests\n"
        "print(*digests(int(sys.argv[1])))\n"
    )
    count = 200
    elsewhere = subprocess.Popen(
        [sys.executable, "-c", program, str(count), *sys.path],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with elsewhere:
        first = digests(count)
        assert digests(count) == first
        told, _ = elsewhere.communicate(timeout=60)
    assert len(set(first)) == count, "each has its own"
    assert told.split() == first


def test_a_world_that_does_not_shuffle_has_one_order() -> None:
    def orders(seed: int) -> list[str]:
        kit = echo_run(seed, shuffle=False, newest_only=False)
        # Names of devices are random numbers.
        return [line.split()[-1] for line in kit.world.trace if " tcp " in line]

    assert orders(1) == orders(2)


def test_a_world_without_trace_goes_the_same_way() -> None:
    with_trace, without = echo_run(3), echo_run(3, trace=False)
    assert without.world.steps == with_trace.world.steps
    assert without.world.trace == []


def test_choices_of_the_workload_and_of_the_schedule_are_apart() -> None:
    plain = echo_run(4)
    drawing = begin(4)
    drawn = [drawing.world.rng.random() for _ in range(100)]
    assert len(set(drawn)) == 100
    data = b"x" * 1000
    assert drawing.run(drawing.talk(data)) == data
    assert drawing.close() == []
    assert drawing.world.trace == plain.world.trace
    other = World(4).stream("other")
    assert other.random() not in drawn


def test_the_clock_jumps_over_what_nobody_waits_for() -> None:
    world = World(1)
    process = world.process("sleeper")
    woken = []

    async def sleep() -> None:
        loop = asyncio.get_running_loop()
        for seconds in (0.5, 3600.0):
            waiter = loop.create_future()
            loop.call_later(seconds, waiter.set_result, None)
            await waiter
            woken.append(round(loop.time(), 6))

    steps = world.run(until=process.start(sleep()))
    assert woken == [0.5, 3600.5]
    assert steps < 10
    assert world.run(until=4000.0) == 0
    assert world.now == 4000.0
    assert world.close() == []


def test_a_task_that_nobody_wakes_is_stuck() -> None:
    world = World(1)

    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    world.process("waiter").start(wait(), name="the one")
    with pytest.raises(Stuck, match="the one in .*wait"):
        world.run()
    assert world.close() == ["waiter: task the one waits"]


def test_a_condition_that_nothing_brings_about_is_stuck() -> None:
    world = World(1)
    with pytest.raises(Stuck, match="no task"):
        world.run(until=lambda: False)
    assert world.run() == 0


def test_steps_are_bounded() -> None:
    world = World(1)
    process = world.process("busy")

    def again() -> None:
        process.loop.call_soon(again)

    again()
    with pytest.raises(TooManySteps, match="after 50 steps"):
        world.run(limit=50)
    assert process.turns == 50


def test_no_two_processes_have_one_name() -> None:
    world = World(1)
    world.process("a")
    with pytest.raises(ValueError, match="'a'"):
        world.process("a")


def test_what_a_loop_reports_is_kept() -> None:
    world = World(1)
    process = world.process("p")
    process.loop.call_soon(lambda: 1 / 0)
    world.run()
    assert isinstance(world.error, ZeroDivisionError)
    assert "ZeroDivisionError" in world.errors[0]
    assert any("error p: " in line for line in world.trace)


def test_what_is_left_is_told() -> None:
    kit = begin(1)

    async def forget() -> None:
        kit.client.kept = await kit.client.dial(kit.listener)  # type: ignore[attr-defined]

    kit.run(forget())
    leaks = kit.close()
    assert any(leak.startswith("client: socket 10.0.0.2:") for leak in leaks)
    assert kit.world.close() == [], "idempotent"


def test_invariants_are_checked_after_every_step(monkeypatch) -> None:
    for every, expected in ((0, 0), (1, 10), (5, 2)):
        kit = begin(1, client=PLAIN, check_every=every)
        checks: list[None] = []
        monkeypatch.setattr(kit.world, "check", lambda c=checks: c.append(None))
        begun = kit.world.steps
        kit.world.steps = 0
        kit.client.start(kit.talk(b"x"))
        kit.step(10)
        assert len(checks) == expected
        kit.world.steps += begun
        kit.world.run(until=kit.world.now + 30)
