"""Collects how the cells of the interop matrix went, and writes the report of a run.

A plugin of pytest, on the host. A test of a cell has a parameter ``cell`` with a name,
its module a ``PAIR`` of the kinds of its ends, and it records what it saw as the
property ``cell``. With ``--matrix`` a run leaves docs/project/long-runs/
interop-matrix.json: the commit, the counts, the failures and a row for each cell. Rows
of the same commit that were not run this time are kept, so that a report can be made in
several runs.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tested_commit import commit, trees

if TYPE_CHECKING:
    import pytest

__all__ = ["Matrix", "table"]

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "project" / "long-runs" / "interop-matrix.json"
PROPERTY = "cell"
ROLES = (("pysmc", "kernel"), ("kernel", "pysmc"), ("pysmc", "pysmc"))
"""Kinds of client and server, in the order of the table's columns."""
TEXT_MAX = 2000
"""Characters of a failure that a report keeps."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("long runs").addoption(
        "--matrix",
        type=Path,
        nargs="?",
        const=REPORT,
        metavar="FILE",
        help="write how the cells of the interop matrix went",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("matrix")
    if path is not None:
        config.pluginmanager.register(Matrix(path), "interop-matrix")


class Matrix:
    """The rows of one run.

    Args:
        path: Where the report is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chosen: dict[str, dict[str, Any]] = {}
        self._began = time.monotonic()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note which cells will be run, and what is tested."""
        # What was just loaded, whatever the tree is at the end.
        commit()
        trees()
        for item in session.items:
            cell = getattr(getattr(item, "callspec", None), "params", {}).get("cell")
            pair = getattr(getattr(item, "module", None), "PAIR", None)
            if cell is not None and pair is not None:
                client, server = pair
                row = {"cell": cell.name, "client": client, "server": server}
                self._chosen[item.nodeid] = row | {"outcome": "not run"}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a cell's test says."""
        row = self._chosen.get(report.nodeid)
        if row is None:
            return
        for name, value in report.user_properties:
            if name == PROPERTY:
                row |= _rounded(dict(value))  # type: ignore[call-overload]
        if report.failed:
            row["outcome"] = "failed"
            row["failure"] = report.longreprtext[-TEXT_MAX:]
        elif report.skipped:
            row["outcome"] = "skipped"
        elif report.when == "call" and row["outcome"] != "failed":
            row["outcome"] = "passed"
            row["test_seconds"] = round(report.duration, 2)

    def pytest_sessionfinish(self) -> None:
        """Write the report, with the rows of earlier runs of this commit."""
        rows = {_key(row): row for row in self._kept()}
        rows |= {
            _key(row): row
            for row in self._chosen.values()
            if row["outcome"] in {"passed", "failed"}
        }
        if rows:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._whole(list(rows.values()))
            self._path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")

    def _kept(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        report = json.loads(self._path.read_text(encoding="utf-8"))
        return list(report["cells"]) if report["commit"] == commit() else []

    def _whole(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        failed = [row for row in rows if row["outcome"] == "failed"]
        counts: dict[str, int] = {}
        for row in rows:
            key = f"{row['client']} to {row['server']}: {row['outcome']}"
            counts[key] = counts.get(key, 0) + 1
        return {
            "name": self._path.stem,
            "commit": commit(),
            "trees": trees(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "kernels": sorted({row.get("kernel_release", "unknown") for row in rows}),
            "cases": len(rows),
            "seconds_of_all_shards": round(
                sum(row.get("test_seconds", 0.0) for row in rows), 1
            ),
            "counts": dict(sorted(counts.items())),
            "failures": len(failed),
            "failed": [f"{_key(row)}: {row['failure']}" for row in failed],
            "cells": rows,
        }


def _key(row: dict[str, Any]) -> str:
    return f"{row['cell']}, {row['client']} to {row['server']}"


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in figures.items()
    }


def table(path: Path = REPORT) -> str:
    """Render a report: a row for each cell, a column for each pair of ends.

    Args:
        path: The report; without one the table has no rows.
    """
    heads = [f"{client} to {server}" for client, server in ROLES]
    lines = [f"| cell | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    if not path.exists():
        return "\n".join(lines)
    report = json.loads(path.read_text(encoding="utf-8"))
    rows = {(row["cell"], row["client"], row["server"]): row for row in report["cells"]}
    for name in dict.fromkeys(row["cell"] for row in report["cells"]):
        cells = [_words(rows.get((name, *pair))) for pair in ROLES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    kernels = ", ".join(report["kernels"])
    return "\n".join([*lines, "", f"Commit `{report['commit'][:9]}`, Linux {kernels}."])


def _words(row: dict[str, Any] | None) -> str:
    """Say how one cell went: outcome, mode, the kernel's codes, seconds."""
    if row is None:
        return ""
    words = [row["outcome"], row.get("mode", "")]
    if "kernel" in row:
        words.append(f"`{row['kernel']}`")
    if "seconds" in row:
        words.append(f"{row['seconds']:.1f} s")
    return ", ".join(word for word in words if word)
