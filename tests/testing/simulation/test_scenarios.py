"""Scenarios repeat themselves exactly up to the fault that is put in."""

from __future__ import annotations

import pytest

from pysmc.testing.simulation.faults import KINDS
from pysmc.testing.simulation.scenarios import (
    SCENARIOS,
    Case,
    cases,
    play_case,
    steps_of,
)
from pysmc.testing.simulation.swarm import play

ECHO = "connect, echo and close"


def test_every_pair_of_a_step_and_a_fault_is_a_case() -> None:
    every = cases()
    assert len(set(every)) == len(every)
    pairs = {(case.scenario, case.step, case.kind) for case in every}
    assert len(pairs) == len(KINDS) * sum(map(steps_of, SCENARIOS))
    assert {case.step for case in every if case.scenario == ECHO} == set(
        range(1, steps_of(ECHO) + 1)
    )


@pytest.mark.parametrize("kind", ["crash a process", "remove a device"])
def test_a_fault_hits_both_ends_at_every_step(kind: str) -> None:
    for step in (40, 41):
        cases_here = [
            case
            for case in cases()
            if (case.scenario, case.step, case.kind) == (ECHO, step, kind)
        ]
        told = set()
        for case in cases_here:
            trace = play_case(case, trace=True).trace
            place = next(n for n, line in enumerate(trace) if "fault: " in line)
            told.add(trace[place + 1])
        assert len(told) == len(cases_here) == 2


def test_a_case_is_its_scenario_up_to_the_fault() -> None:
    alone = play(SCENARIOS[ECHO], trace=True).trace
    for step in (30, 40, 70):
        case = Case(ECHO, step, "cut a link")
        trace = play_case(case, trace=True).trace
        place = next(n for n, line in enumerate(trace) if "fault: " in line)
        assert trace[:place] == alone[:place]
        assert trace[place:] != alone[place:]
        assert str(case) == f"cut a link before step {step} (which={step}) of {ECHO!r}"


def test_a_fault_that_finds_nothing_ends_the_run() -> None:
    outcome = play_case(Case(ECHO, 1, "cut a link"))
    assert outcome.counts["nothing to hit"] == 1
    assert outcome.problems == []
    assert outcome.steps < steps_of(ECHO)
