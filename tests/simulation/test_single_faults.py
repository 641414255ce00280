"""Every fault at every step of every scenario; a tenth of them in a usual run."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.testing.simulation.faults import KINDS
from pysmc.testing.simulation.scenarios import SCENARIOS, cases, play_case
from pysmc.testing.simulation.swarm import play

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("quiet")

SHARDS = 4
PARTS = 10
CASES_MIN = 60_000


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_by_itself(name: str) -> None:
    outcome = play(SCENARIOS[name])
    assert outcome.problems == []
    if "a peer without SMC" not in name and "declined" not in name:
        assert outcome.counts["mode: smcr"] == len(SCENARIOS[name].conversations)
    else:
        assert outcome.counts["mode: tcp"] == 1


@pytest.mark.simulate
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_single_fault_breaks_a_promise(
    shard: int, long_run: Callable[..., Any]
) -> None:
    every = cases()
    assert len(every) >= CASES_MIN
    # Each part and each shard gets some of every kind.
    random.Random("parts").shuffle(every)
    numbers = {"small": len(every) // PARTS, "full": len(every)}
    with long_run("single-faults", **numbers, shard=(shard, SHARDS)) as run:
        part, step = (0, 1) if run.is_full else (run.rotate(PARTS), PARTS)
        hit = set()
        for number in run.seeds():
            case = every[part + number * step]
            outcome = play_case(case)
            run.add(cases=1, steps=outcome.steps)
            if f"fault: {case.kind}" in outcome.counts:
                hit.add(case.kind)
            else:
                run.add(nothing_to_hit=1)
            if not outcome.is_good:
                run.fail(f"{case}: {'; '.join(outcome.problems)[:500]}")
        assert hit >= set(KINDS), "no step of this part had something to hit"
