"""A seed can be played by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysmc.testing.simulation import __main__ as program
from pysmc.testing.simulation.swarm import Outcome, Spec, draw, run_seed

if TYPE_CHECKING:
    import pytest


def test_a_good_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--seed", "3", "--count", "2"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in told] == ["seed 3: good", "seed 4: good"]
    assert run_seed(3).digest in told[0]


def test_a_trace_says_what_the_world_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--seed", "3", "--trace"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(draw(3).describe())
    assert "client turn 1" in told
    assert run_seed(3, trace=True).digest in told


def test_a_broken_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(spec: Spec, *, trace: bool) -> Outcome:
        return Outcome(spec.seed, problems=["it broke"])

    monkeypatch.setattr(program, "play", broken)
    assert program.main(["--seed", "5"]) == 1
    assert "seed 5: BROKEN" in capsys.readouterr().out
