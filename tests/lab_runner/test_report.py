"""The report of a run of scenarios, which adds up over runs of one commit."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from lab import report
from lab.report import Report

if TYPE_CHECKING:
    from pathlib import Path


def tell(into: Report, name: str, phases: Any, mark: str) -> None:
    """Report on a scenario: phase, outcome and seconds of each."""
    for when, outcome, seconds in phases:
        said: Any = pytest.TestReport(
            name, (name, 0, name), {mark: 1}, outcome, "what /far/away/it said", when
        )
        said.duration = seconds
        into.pytest_runtest_logreport(said)


WELL = (("setup", "passed", 0.3), ("call", "passed", 4.0), ("teardown", "passed", 0.2))
BADLY = (("setup", "passed", 0.5), ("call", "failed", 2.0))


def play(path: Path, *plays: tuple[str, Any], mark: str = "lab_long") -> dict[str, Any]:
    """Make a run with these scenarios; give the report that it leaves."""
    run = Report(path)
    run.pytest_collection_finish()
    for name, phases in plays:
        tell(run, name, phases, mark)
    run.pytest_sessionfinish()
    return dict(json.loads(path.read_text())) if path.exists() else {}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "commit", lambda: "abc")
    return tmp_path / "reports" / "lab-long.json"


def test_a_run_leaves_its_figures(path: Path) -> None:
    found = play(path, ("a", WELL), ("b", BADLY))
    assert (found["name"], found["commit"]) == ("lab-long", "abc")
    assert (found["cases"], found["failures"]) == (2, 1)
    assert found["seconds_of_all_shards"] == 7.0
    assert found["failed"] == ["b: what it said"]
    assert found["scenarios"] == {
        "a": {"runs": 1, "failures": 0, "seconds": 4.5},
        "b": {"runs": 1, "failures": 1, "seconds": 2.5},
    }


def test_a_failure_is_not_forgotten_when_it_passes_later(path: Path) -> None:
    play(path, ("b", BADLY))
    found = play(path, ("b", WELL), ("c", WELL))
    assert (found["cases"], found["failures"]) == (3, 1)
    assert found["scenarios"]["b"] == {"runs": 2, "failures": 1, "seconds": 7.0}


def test_another_commit_begins_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(path, ("b", BADLY))
    monkeypatch.setattr(report, "commit", lambda: "def")
    found = play(path, ("a", WELL))
    assert list(found["scenarios"]) == ["a"]
    assert found["failures"] == 0


def test_what_fails_before_its_call_is_a_failure(path: Path) -> None:
    found = play(path, ("a", (("setup", "failed", 1.0), ("teardown", "passed", 0.0))))
    assert (found["cases"], found["failures"]) == (1, 1)


def test_what_was_not_run_leaves_nothing(path: Path) -> None:
    assert play(path, ("a", (("setup", "skipped", 0.0),))) == {}
    assert play(path, ("a", WELL), mark="slow") == {}


def test_it_is_written_where_it_is_asked_for(path: Path) -> None:
    registered: list[str] = []
    manager = SimpleNamespace(register=lambda _, name: registered.append(name))
    for asked in (None, path):
        config: Any = SimpleNamespace(
            getoption=lambda _, asked=asked: asked, pluginmanager=manager
        )
        report.pytest_configure(config)
    assert registered == ["pysmc-lab-report"]
