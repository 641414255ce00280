"""Collects how the scenarios of a run went, and writes its report: a plugin of pytest.

With ``--lab-report`` (`make lab-long`) a run leaves the file lab-long.json in
docs/project/long-runs: the commit, the counts, the failures, and for each scenario how
often it was run, how often it failed and how long it took. Runs of the same commit add
up, so that the lane can be run in pieces; a failure stays in the report however often
it passes afterwards.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.places import ROOT
from tested_commit import commit, trees

if TYPE_CHECKING:
    import pytest

__all__ = ["Report"]

REPORT = ROOT / "docs" / "project" / "long-runs" / "lab-long.json"
FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")
"""Of an absolute path: they are the machine's, its last part tells something."""
TEXT_MAX = 2000
"""Characters of a failure that a report keeps."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run be asked for its report."""
    parser.getgroup("long runs").addoption(
        "--lab-report",
        type=Path,
        nargs="?",
        const=REPORT,
        metavar="FILE",
        help="write how the scenarios of the lab went",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Begin one where it is wanted."""
    path = config.getoption("lab_report")
    if path is not None:
        config.pluginmanager.register(Report(path), "pysmc-lab-report")


class Report:
    """How the scenarios of one run went.

    Args:
        path: Where the report is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        self._failed: list[str] = []

    def pytest_collection_finish(self) -> None:
        """Note what is tested, whatever the tree is at the end."""
        commit()
        trees()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what one phase of a scenario says; what was skipped does not count."""
        if not {"lab", "lab_long"}.intersection(report.keywords) or report.skipped:
            return
        new = {"runs": 0, "failures": 0, "seconds": 0.0}
        row = self._rows.setdefault(report.nodeid, new)
        row["seconds"] = round(row["seconds"] + report.duration, 1)
        row["runs"] += report.when == "call" or report.failed
        if report.failed:
            row["failures"] += 1
            text = FOLDERS.sub("", report.longreprtext[-TEXT_MAX:])
            self._failed.append(f"{report.nodeid}: {text}")

    def pytest_sessionfinish(self) -> None:
        """Write the report, with what earlier runs of this commit have told."""
        if not self._rows:
            return
        before = self._before()
        rows: dict[str, dict[str, Any]] = dict(before.get("scenarios", {}))
        for name, row in self._rows.items():
            old = rows.get(name, {"runs": 0, "failures": 0, "seconds": 0.0})
            rows[name] = {key: round(old[key] + row[key], 1) for key in row}
        failed = [*before.get("failed", []), *self._failed]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._whole(dict(sorted(rows.items())), failed)
        self._path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")

    def _before(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        found: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return found if found["commit"] == commit() else {}

    def _whole(
        self, rows: dict[str, dict[str, Any]], failed: list[str]
    ) -> dict[str, Any]:
        return {
            "name": self._path.stem,
            "commit": commit(),
            "trees": trees(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "cases": sum(row["runs"] for row in rows.values()),
            "seconds_of_all_shards": round(
                sum(row["seconds"] for row in rows.values()), 1
            ),
            "counts": {"scenarios": len(rows)},
            "failures": len(failed),
            "failed": failed,
            "scenarios": rows,
        }
