"""A day of 64 connections, with faults: an hour of it in every run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.testing.simulation.soak import Soak

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("quiet")

SPEED_MIN = 144
"""Simulated seconds a second of a processor: a day in ten minutes, where nobody else
is at work."""


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_day_leaves_nothing_behind(long_run: Callable[..., Any]) -> None:
    with long_run("simulated-day", small=1, full=24) as run:
        began = time.process_time()
        outcome = Soak(run.first, connections=64).run(hours=run.count)
        seconds = time.process_time() - began
        run.add(hours=run.count, steps=outcome.steps, **outcome.counts)
        run.tell(simulated_seconds_a_second=round(outcome.seconds / seconds))
        for problem in outcome.problems:
            run.fail(problem)
        assert outcome.seconds / seconds >= SPEED_MIN
        assert run.counts["ended: complete"] >= 200 * run.count
        assert run.counts["mode: smcr"] >= 200 * run.count
        faults = sum(n for name, n in run.counts.items() if name.startswith("fault: "))
        assert faults >= 4 * run.count
