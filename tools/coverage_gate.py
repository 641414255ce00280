#!/usr/bin/env python3
"""Hold each package to its own bar of branch coverage.

Reads the JSON report of coverage.py and the bars in pyproject.toml
(``[tool.pysmc.coverage]``, per cent), prints a table and says what is missing.
A share of the whole would let a well-tested package pay for a neglected one.

Run by the tests' plugin (tools/house_gate.py) at the end of a full run, or alone::

    python tools/coverage_gate.py coverage.json
"""

from __future__ import annotations

import json
import sys
import textwrap
import tomllib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_WIDTH = 300
"""Characters of a line on what is missing; coverage.json has the rest."""


@dataclass(slots=True)
class PackageCoverage:
    """What was measured of one package, and the bar that it has to reach."""

    name: str
    required: float
    """Per cent."""
    total: int = 0
    """Statements and branches."""
    covered: int = 0
    """Statements and branches that ran."""
    missing: list[str] = field(default_factory=list)
    """One line for each file in which something did not run."""

    @property
    def per_cent(self) -> float:
        """Share that ran, cut and not rounded: 99.996 is not 100."""
        return int(10_000 * self.covered / self.total) / 100 if self.total else 100.0

    @property
    def good(self) -> bool:
        """Whether the bar is reached."""
        return self.per_cent >= self.required

    def __str__(self) -> str:
        verdict = "ok" if self.good else "TOO LOW"
        return (
            f"{self.name:<18} {self.covered:>6} of {self.total:>6}"
            f" {self.per_cent:>7.2f} %  at least {self.required:g} %  {verdict}"
        )


def package_of(path: str) -> str:
    """Name the package that a source file belongs to, two levels deep.

    Args:
        path: As in the report, relative to the root: ``pysmc/core/link.py``.

    Returns:
        ``pysmc.core`` for that, ``pysmc`` for ``pysmc/config.py``, ``smcproto`` for
        anything in ``proto/smcproto``.
    """
    parts = PurePosixPath(path.replace("\\", "/")).parts
    parts = parts[1:] if parts[0] == "proto" else parts
    return ".".join(parts[:-1][:2])


def read_bars(pyproject: Path) -> dict[str, float]:
    """Read the bars in per cent, by package; ``default`` holds for all others."""
    with pyproject.open("rb") as file:
        bars = tomllib.load(file)["tool"]["pysmc"]["coverage"]
    return {name: float(bar) for name, bar in bars.items()}


def measure(report: dict[str, Any], bars: dict[str, float]) -> list[PackageCoverage]:
    """Add up a report by package, in the order of their names.

    A package that has a bar of its own but is not in the report at all counts as
    empty-handed: otherwise a misspelt name would pass for ever.
    """
    files: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for path, entry in report["files"].items():
        files[package_of(path)].append((path, entry))
    result = []
    for name in sorted(files.keys() | (bars.keys() - {"default"})):
        package = PackageCoverage(name, bars.get(name, bars["default"]))
        for path, entry in sorted(files[name]):
            _add(package, path, entry)
        if not files[name]:
            package.total = 1
            package.missing.append(f"{name}: nothing of it was measured")
        result.append(package)
    return result


def _add(package: PackageCoverage, path: str, entry: dict[str, Any]) -> None:
    summary = entry["summary"]
    package.total += summary["num_statements"] + summary["num_branches"]
    package.covered += summary["covered_lines"] + summary["covered_branches"]
    lines = ", ".join(_ranges(entry["missing_lines"]))
    branches = ", ".join(f"{a}->{b}" for a, b in entry["missing_branches"])
    if lines or branches:
        words = [f"lines {lines}"] * bool(lines) + [f"branches {branches}"] * bool(
            branches
        )
        package.missing.append(f"{path}: {'; '.join(words)}")


def _ranges(numbers: list[int]) -> list[str]:
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return [str(a) if a == b else f"{a}-{b}" for a, b in ranges]


def check(report_path: Path, pyproject: Path) -> tuple[bool, list[str]]:
    """Compare a report with the bars.

    Args:
        report_path: The JSON report of coverage.py.
        pyproject: The file with the bars.

    Returns:
        Whether every package reached its bar, and the lines to print: the table, and
        below it what is missing in the packages that did not.
    """
    if not report_path.exists():
        return False, [f"{report_path.name} is missing: no coverage was measured"]
    report = json.loads(report_path.read_text(encoding="utf-8"))
    packages = measure(report, read_bars(pyproject))
    lines = [str(package) for package in packages]
    low = [package for package in packages if not package.good]
    lines += [
        textwrap.shorten(line, MAX_WIDTH, placeholder=" ...")
        for package in low
        for line in package.missing
    ]
    return not low, lines


def main(arguments: list[str]) -> int:
    """Print the table; 0 = every bar is reached, 1 = not, 2 = usage."""
    if len(arguments) > 1:
        print("usage: coverage_gate.py [coverage.json]", file=sys.stderr)
        return 2
    report = Path(arguments[0]) if arguments else ROOT / "coverage.json"
    good, lines = check(report, ROOT / "pyproject.toml")
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
