"""A day of 64 connections, with faults: an hour of it in every run."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.testing.simulation.soak import Soak

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SPEED_MIN = 144
"""Simulated seconds a real second: a day in ten minutes."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Faults are logged, a line each; here they are wanted."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_day_leaves_nothing_behind(long_run: Callable[..., Any]) -> None:
    with long_run("simulated-day", small=1, full=24) as run:
        began = time.perf_counter()
        outcome = Soak(run.first, connections=64).run(hours=run.count)
        seconds = time.perf_counter() - began
        run.add(hours=run.count, steps=outcome.steps, **outcome.counts)
        run.tell(simulated_seconds_a_second=round(outcome.seconds / seconds))
        for problem in outcome.problems:
            run.fail(problem)
        # An hour beside other tests on a busy machine says nothing of a day.
        assert outcome.seconds / seconds >= SPEED_MIN or not run.is_full
        assert run.counts["ended: complete"] >= 200 * run.count
        assert run.counts["mode: smcr"] >= 200 * run.count
        faults = sum(n for name, n in run.counts.items() if name.startswith("fault: "))
        assert faults >= 4 * run.count
