"""Tests that run a small number of cases in every run and a large one on request.

The code is the same, only the number differs: the fixture `long_run` gives the small
count, and with `--long` (`make simulate`, `make soak`, `make fuzz`) the full one. A
full run leaves a report, docs/project/long-runs/NAME.json, with the commit that it
began with, the counts and the failures; shards of one name add up in one report, as
long as they are of the same commit and the same numbers.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tested_commit import commit, rotation, trees

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["LongRun"]

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "docs" / "project" / "long-runs"
MARKERS = ("simulate", "soak", "fuzz")
FAILURES_MAX = 50
"""Failures that a run tells in full; the others are only counted."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("long runs")
    group.addoption(
        "--long", action="store_true", help="run the full counts, and write reports"
    )
    group.addoption(
        "--first", type=int, default=0, metavar="SEED", help="begin with this seed"
    )
    group.addoption(
        "--count", type=int, metavar="N", help="run this number instead of the full one"
    )
    group.addoption(
        "--reports", type=Path, default=REPORTS, help="where reports are written"
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if not config.getoption("long"):
        return
    # What was just loaded is tested, whatever the tree is when the run ends.
    commit()
    trees()
    for item in items:
        if any(item.get_closest_marker(name) for name in MARKERS):
            item.add_marker(pytest.mark.timeout(0), append=False)


class LongRun:
    """One run, or one shard of it.

    Attributes:
        count: How many cases are to be run.
        first: The number (seed) of the first one.
    """

    def __init__(self, name: str, first: int, count: int, is_full: bool) -> None:  # noqa: FBT001
        self.name = name
        self.first = first
        self.count = count
        self.is_full = is_full
        self.counts: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.failures: list[str] = []
        self.failed = 0

    def seeds(self) -> range:
        """Give the numbers of the cases."""
        return range(self.first, self.first + self.count)

    def add(self, **counts: float) -> None:
        """Count something; shards add up."""
        for name, number in counts.items():
            self.counts[name] = self.counts.get(name, 0) + number

    def tell(self, **facts: Any) -> None:
        """Note a figure that is not a count: a rate, a percentile."""
        self.facts.update(facts)

    def fail(self, text: str) -> None:
        """Note a failure; the test fails at the end, with all of them."""
        self.failed += 1
        if len(self.failures) < FAILURES_MAX:
            self.failures.append(text)

    def rotate(self, parts: int) -> int:
        """Choose one of so many parts, another one with another commit."""
        return rotation(parts)


@pytest.fixture
def long_run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Give a context manager: ``long_run(name, small=, full=, shard=(k, n))``."""

    @contextmanager
    def begin(
        name: str, *, small: int, full: int, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[LongRun]:
        options = request.config.option
        is_full = options.long
        total = small
        if is_full:
            total = full if options.count is None else options.count
        index, shards = shard
        begins, ends = (total * each // shards for each in (index, index + 1))
        run = LongRun(name, options.first + begins, ends - begins, is_full)
        started = time.monotonic()
        try:
            yield run
        except BaseException as error:  # also one that was interrupted: not all was run
            run.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            if is_full:
                report = options.reports / f"{name}.json"
                key = f"{name}-{commit()}-{options.first}-{total}-{shards}"
                _write(report, run, key, shard, time.monotonic() - started)
            print(f"{name}: {run.counts} {run.facts} failures={run.failed}")
        if run.failed:
            text = "\n".join([f"{run.failed} failures in {name}:", *run.failures])
            pytest.fail(text, pytrace=False)

    return begin


def _write(
    report: Path, run: LongRun, key: str, shard: tuple[int, int], seconds: float
) -> None:
    """Write a shard's part, and the sum of all that are there with its key."""
    index, shards = shard
    report.parent.mkdir(parents=True, exist_ok=True)
    parts = Path(tempfile.gettempdir()) / f"pysmc-long-runs-{os.getuid()}"
    parts.mkdir(exist_ok=True)
    with (parts / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mine = {
            "cases": run.count,
            "seeds": [run.first, run.first + run.count],
            "counts": run.counts,
            "facts": run.facts,
            "failed": run.failed,
            "failures": run.failures,
            "seconds": round(seconds, 1),
        }
        (parts / f"{key}-{index}.json").write_text(json.dumps(mine))
        found = [parts / f"{key}-{each}.json" for each in range(shards)]
        there = [json.loads(path.read_text()) for path in found if path.exists()]
        report.write_text(json.dumps(_sum(run.name, shards, there), indent=2) + "\n")


def _sum(name: str, shards: int, parts: list[dict[str, Any]]) -> dict[str, Any]:
    counts: dict[str, float] = {}
    for part in parts:
        for key, number in part["counts"].items():
            counts[key] = round(counts.get(key, 0) + number, 3)
    facts = [part["facts"] for part in parts if part["facts"]]
    whole: dict[str, Any] = {
        "name": name,
        "commit": commit(),
        "trees": trees(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "cases": sum(part["cases"] for part in parts),
        "first_seed": min(part["seeds"][0] for part in parts),
        "cpu_shards": f"{len(parts)} of {shards}",
        "seconds_of_all_shards": round(sum(part["seconds"] for part in parts), 1),
        "counts": dict(sorted(counts.items())),
        "failures": sum(part["failed"] for part in parts),
        "failed": [text for part in parts for text in part["failures"]],
    }
    if facts:
        whole["facts"] = facts[0] if len(facts) == 1 else facts
    return whole
