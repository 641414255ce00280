"""The report of the interop matrix: a row for each cell, and the table made of them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import interop_matrix

if TYPE_CHECKING:
    from pathlib import Path

MODULE = SimpleNamespace(PAIR=("kernel", "pysmc"))
ROW = {"mode": "smcr", "seconds": 1.23456, "kernel_release": "6.12"}


def run(path: Path, outcomes: dict[str, str]) -> dict[str, Any]:
    """Let a run of pytest tell of cells what it would."""
    matrix = interop_matrix.Matrix(path)
    chosen = [
        SimpleNamespace(
            nodeid=name,
            module=MODULE,
            callspec=SimpleNamespace(params={"cell": SimpleNamespace(name=name)}),
        )
        for name in outcomes
    ]
    items: Any = [*chosen, SimpleNamespace(nodeid="test_of_no_cell", module=MODULE)]
    matrix.pytest_collection_finish(SimpleNamespace(items=items))  # type: ignore[arg-type]
    for name in (*outcomes, "test_of_no_cell"):
        outcome = outcomes.get(name, "passed")
        for when in ("setup", *(["call"] if outcome != "skipped" else []), "teardown"):
            matrix.pytest_runtest_logreport(report(name, when, outcome))
    matrix.pytest_sessionfinish()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def report(name: str, when: str, outcome: str) -> Any:
    """Make the report of one phase of a test."""
    return SimpleNamespace(
        nodeid=name,
        when=when,
        failed=outcome == "failed" and when == "call",
        skipped=outcome == "skipped" and when == "setup",
        user_properties=[("other", 1), ("cell", ROW)] if when != "setup" else [],
        longreprtext="as wanted",
        duration=2.0,
    )


def test_runs_of_one_commit_add_up_to_one_report(tmp_path: Path) -> None:
    path = tmp_path / "made" / "matrix.json"
    first = run(path, {"good": "passed", "absent": "skipped"})
    assert first["counts"] == {"kernel to pysmc: passed": 1}
    assert (first["cases"], first["failures"]) == (1, 0)
    assert first["seconds_of_all_shards"] == 2.0
    both = run(path, {"bad": "failed"})
    assert both["counts"] == {
        "kernel to pysmc: failed": 1,
        "kernel to pysmc: passed": 1,
    }
    assert both["failed"] == ["bad, kernel to pysmc: as wanted"]
    assert both["kernels"] == ["6.12"]
    table = interop_matrix.table(path)
    assert "| good |  | passed, smcr, 1.2 s |  |" in table
    assert "| bad |  | failed, smcr, 1.2 s |  |" in table


def test_rows_of_another_commit_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    row = {"cell": "old", "client": "kernel", "server": "pysmc", "outcome": "passed"}
    path.write_text(json.dumps({"commit": "another", "cells": [row]}))
    matrix = interop_matrix.Matrix(path)
    assert matrix._kept() == []
    matrix.pytest_sessionfinish()
    assert json.loads(path.read_text())["cells"] == [row], "nothing was run"


def test_the_table_shows_how_the_kernel_saw_a_fallback(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    row = {"cell": "no option", "client": "pysmc", "server": "kernel", "mode": "tcp"}
    row |= {"outcome": "passed", "kernel": "03010000/00000000"}
    path.write_text(json.dumps({"commit": "0" * 40, "kernels": [], "cells": [row]}))
    line = "| no option | passed, tcp, `03010000/00000000` |  |  |"
    assert line in interop_matrix.table(path)
    assert "| cell |" in interop_matrix.table(tmp_path / "absent.json")
