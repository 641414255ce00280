"""A pytest plugin: what a full run of the tests has to show beside green tests.

``pytest --full`` (that is: ``make test``) also fails when a package is below its bar
of coverage, or when fewer tests ran than ``tests/expected_counts.toml`` demands: a
folder that is no longer collected must not look like success. Every run ends with one
line on what was skipped and why. All of it is printed above pytest's own closing line.

``--lane NAME`` asks the same of a run of chosen tests, by the row of its name, without
coverage. ``--part N`` runs one N-th of the tests, another one with every commit.
"""

from __future__ import annotations

import tomllib
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

import coverage_gate
from tested_commit import rotation

if TYPE_CHECKING:
    from collections.abc import Iterable

COUNTS_FILE = "tests/expected_counts.toml"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("pysmc")
    group.addoption(
        "--full",
        action="store_true",
        help="all tests: also check the coverage of each package and the number of "
        f"tests that ran ({COUNTS_FILE})",
    )
    group.addoption(
        "--lane", metavar="NAME", help=f"check the number of tests ({COUNTS_FILE})"
    )
    group.addoption(
        "--part", type=int, metavar="N", help="one N-th, which one the commit says"
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave the tests of one part; begin a lane with what may take longest."""
    if config.getoption("lane") and hasattr(config, "workerinput"):
        # Else a long one may be the last that is begun, and the others wait for it.
        items.sort(key=longest, reverse=True)
    parts = config.getoption("part")
    if not parts:
        return
    mine = rotation(parts)
    chosen = [item for item in items if part_of(item.nodeid, parts) == mine]
    print(f"part {mine + 1} of {parts}: {len(chosen)} of {len(items)} tests")
    items[:] = chosen


def pytest_configure(config: pytest.Config) -> None:
    """Refuse ``--full`` for a part of the tests, and start counting."""
    if config.getoption("full") and config.args_source is config.ArgsSource.ARGS:
        message = "--full is for all tests: name no folders or files beside it"
        raise pytest.UsageError(message)
    if not hasattr(config, "workerinput"):  # with xdist, only the one that reports
        config.pluginmanager.register(HouseGate(config), "pysmc-house-gate")


def longest(item: pytest.Item) -> float:
    """Tell how long a test may take, in seconds: those with a limit of their own."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker is not None and marker.args else 0.0


def part_of(nodeid: str, parts: int) -> int:
    """Tell to which of so many parts a test belongs."""
    return zlib.crc32(nodeid.encode()) % parts


@dataclass(frozen=True, slots=True)
class ExpectedCounts:
    """The file of minimums."""

    total: int
    folders: dict[str, int]
    left_out: dict[str, str]
    """Marker -> why tests with it may be skipped or deselected."""
    lanes: dict[str, int]
    """Name of a lane -> tests that have to run in it."""

    @classmethod
    def read(cls, path: Path) -> ExpectedCounts:
        """Read ``tests/expected_counts.toml``."""
        with path.open("rb") as file:
            data = tomllib.load(file)
        left_out = {name: str(row["reason"]) for name, row in data["left_out"].items()}
        lanes = dict(data.get("lanes", {}))
        return cls(data["total"], dict(data["folders"]), left_out, lanes)

    def problems(self, counts: Counter[str]) -> list[str]:
        """Compare with the tests that ran (or were left out with a reason)."""
        result = []
        if counts.total() < self.total:
            result.append(f"{counts.total()} tests ran, at least {self.total} expected")
        for folder, least in sorted(self.folders.items()):
            if counts[folder] < least:
                result.append(
                    f"{folder}: {counts[folder]} tests ran, at least {least} expected"
                )
        result += [
            f"{folder}: {counts[folder]} tests ran, but {COUNTS_FILE} has no row for it"
            for folder in sorted(counts.keys() - self.folders.keys())
        ]
        return result


class HouseGate:
    """Counts what ran and what was skipped; checks a full run at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.full = bool(config.getoption("full"))
        self.lane: str | None = config.getoption("lane")
        self.ran = 0
        self.root = config.rootpath
        self.expected = ExpectedCounts.read(self.root / COUNTS_FILE)
        self.counts: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one test that ran, or note why it did not."""
        folder = _folder(report.nodeid)
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skips[_skip_reason(report)] += 1
            self.counts[folder] += self._may_be_left_out(report.keywords)
        elif report.when == "call":
            self.counts[folder] += 1
            self.ran += 1

    def pytest_deselected(self, items: Iterable[pytest.Item]) -> None:
        """Note tests that a marker expression or ``-k`` took out."""
        for item in items:
            names = [name for name in self.expected.left_out if name in item.keywords]
            reason = self.expected.left_out[names[0]] if names else "deselected"
            self.skips[reason] += 1
            self.counts[_folder(item.nodeid)] += bool(names)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a module that skipped itself as a whole."""
        if report.skipped:
            self.skips[f"{_skip_reason(report)} (the whole of {report.nodeid})"] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a full run that is green but shows too little."""
        collect_only = session.config.getoption("collectonly")
        if session.shouldstop or collect_only:
            return
        if self.lane is not None:
            self._finish_lane(session, self.lane)
        if not self.full:
            return
        good, self.lines = coverage_gate.check(
            self.root / "coverage.json", self.root / "pyproject.toml"
        )
        problems = self.expected.problems(self.counts)
        self.lines += [f"TOO FEW TESTS: {problem}" for problem in problems]
        if (not good or problems) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _finish_lane(self, session: pytest.Session, lane: str) -> None:
        least = self.expected.lanes[lane]
        if self.ran < least and session.exitstatus == pytest.ExitCode.OK:
            text = f"lane {lane}: {self.ran} tests ran, at least {least} expected"
            self.lines.append(f"TOO FEW TESTS: {text}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the verdict and the line on skipped tests, above the closing line."""
        if self.lines:
            terminalreporter.section("coverage of each package, number of tests")
        for line in self.lines:
            bad = "TOO " in line
            terminalreporter.write_line(line, red=bad, bold=bad)
        words = [f"{count} x {reason}" for reason, count in self.skips.most_common()]
        terminalreporter.write_line(f"Skipped: {'; '.join(words) or 'nothing'}.")

    def _may_be_left_out(self, keywords: Any) -> bool:
        return any(name in keywords for name in self.expected.left_out)


def _folder(nodeid: str) -> str:
    return str(PurePosixPath(nodeid.split("::", 1)[0]).parent)


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    return str(text).removeprefix("Skipped: ").rstrip(".") or "no reason given"
