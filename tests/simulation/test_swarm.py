"""Thousands of drawn worlds full of faults: nothing that was promised is broken."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.testing.simulation.faults import KINDS
from pysmc.testing.simulation.swarm import run_seed

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("quiet")

SHARDS = 8
SPEED_MIN = 500
"""Simulated seconds a second of a processor: others may be at work beside."""
# What every thousand worlds have to reach at least: a swarm that no longer gets there
# would still be green.
ENDINGS_MIN = {
    "mode: smcr": 500,
    "mode: tcp": 200,
    "ended: complete": 500,
    "ended: refused": 40,
    "ended: ConnectionReset": 50,
    "ended: ConnectionResetError": 4,
    "ended: a process died": 3,
    "ended: cut short": 50,
    "rested": 100,
}
FAULTS_MIN = 4
RARE_MIN = 2
"""Of those that lie in wait for what a process does only a few times."""


@pytest.mark.simulate
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_the_promises_hold(shard: int, long_run: Callable[..., Any]) -> None:
    numbers = {"small": 10_000, "full": 1_000_000, "shard": (shard, SHARDS)}
    with long_run("swarm", **numbers) as run:
        began, seconds, steps = time.process_time(), 0.0, 0
        for seed in run.seeds():
            outcome = run_seed(seed)
            run.add(worlds=1, **outcome.counts)
            seconds += outcome.seconds
            steps += outcome.steps
            if not outcome.is_good:
                told = "; ".join(outcome.problems)[:500]
                run.fail(f"seed {seed}: {told} (make simulate SEED={seed})")
        run.add(simulated_seconds=seconds, steps=steps)
        speed = seconds / (time.process_time() - began)
        run.tell(simulated_seconds_a_second=round(speed))
        assert speed >= SPEED_MIN
        share = run.count / 1000
        missed = {
            name: run.counts.get(name, 0)
            for name, least in _least().items()
            if run.counts.get(name, 0) < int(least * share)
        }
        assert not missed, f"too few in {run.count} worlds"


def _least() -> dict[str, int]:
    waiting = {"domain", "queue pair", "region", "connect"}
    faults = {
        f"fault: {name}": RARE_MIN if kind.armed in waiting else FAULTS_MIN
        for name, kind in KINDS.items()
    }
    return ENDINGS_MIN | faults
