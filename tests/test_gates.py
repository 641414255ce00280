"""The gates of a full run are code too: a gate that cannot fail guards nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import coverage_gate
import house_gate
from house_gate import COUNTS_FILE, ExpectedCounts, part_of

ROOT = Path(__file__).resolve().parent.parent
BARS = {"default": 90.0, "smcproto": 100.0}


def entry(lines: tuple[int, int], branches: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """One file of a report: (covered, all) of its lines and of its branches."""
    return {
        "summary": {
            "covered_lines": lines[0],
            "num_statements": lines[1],
            "covered_branches": branches[0],
            "num_branches": branches[1],
        },
        "missing_lines": list(range(lines[0] + 1, lines[1] + 1)),
        "missing_branches": [[7, -1]] * (branches[1] - branches[0]),
    }


@pytest.mark.parametrize(
    ("path", "package"),
    [
        ("pysmc/config.py", "pysmc"),
        ("pysmc/core/link.py", "pysmc.core"),
        ("pysmc/fabric/deep/er.py", "pysmc.fabric"),
        ("proto/smcproto/clc.py", "smcproto"),
    ],
)
def test_files_belong_to_packages(path: str, package: str) -> None:
    assert coverage_gate.package_of(path) == package


def test_each_package_has_to_reach_its_own_bar() -> None:
    report = {
        "files": {
            "pysmc/config.py": entry((9, 10)),
            "pysmc/core/link.py": entry((8, 8), (1, 3)),
            "proto/smcproto/clc.py": entry((999, 1000)),
        }
    }
    packages = {p.name: p for p in coverage_gate.measure(report, BARS)}
    assert packages["pysmc"].good
    assert not packages["pysmc.core"].good, "9 of 11 is less than 90 %"
    assert not packages["smcproto"].good
    assert packages["smcproto"].per_cent == 99.9
    assert packages["pysmc.core"].missing == [
        "pysmc/core/link.py: branches 7->-1, 7->-1"
    ]
    assert packages["smcproto"].missing == ["proto/smcproto/clc.py: lines 1000"]


def test_almost_all_is_not_all() -> None:
    package = coverage_gate.PackageCoverage("x", 100.0, total=100_000, covered=99_999)
    assert package.per_cent == 99.99
    assert not package.good


def test_a_package_with_a_bar_must_be_measured() -> None:
    (package,) = coverage_gate.measure({"files": {}}, BARS)
    assert package.name == "smcproto"
    assert not package.good


def test_a_report_is_compared_with_the_projects_bars(tmp_path: Path) -> None:
    report = tmp_path / "coverage.json"
    assert coverage_gate.check(report, ROOT / "pyproject.toml")[0] is False
    full = {"pysmc/core/a.py": entry((5, 5)), "proto/smcproto/b.py": entry((5, 5))}
    report.write_text(json.dumps({"files": full}))
    good, lines = coverage_gate.check(report, ROOT / "pyproject.toml")
    assert good
    assert [line.split()[0] for line in lines] == ["pysmc.core", "smcproto"]
    full["pysmc/core/a.py"] = entry((4, 6))
    report.write_text(json.dumps({"files": full}))
    good, lines = coverage_gate.check(report, ROOT / "pyproject.toml")
    assert not good
    assert lines[-1] == "pysmc/core/a.py: lines 5-6"


def test_too_few_tests_are_a_problem() -> None:
    expected = ExpectedCounts(
        total=10, folders={"tests/core": 6}, left_out={}, lanes={}
    )
    assert expected.problems(Counter({"tests/core": 10})) == []
    assert len(expected.problems(Counter({"tests/core": 9}))) == 1
    assert len(expected.problems(Counter({"tests/core": 5}))) == 2


def test_a_folder_without_a_row_is_a_problem() -> None:
    expected = ExpectedCounts(total=1, folders={}, left_out={}, lanes={})
    (problem,) = expected.problems(Counter({"tests/new": 3}))
    assert problem.startswith("tests/new: 3 tests ran")


def test_the_projects_own_counts_are_readable() -> None:
    expected = ExpectedCounts.read(ROOT / COUNTS_FILE)
    assert expected.total >= sum(expected.folders.values())
    assert all(reason for reason in expected.left_out.values())
    assert [f for f in expected.folders if not (ROOT / f).is_dir()] == []


PLUGIN_TEST = """
import pytest

def test_runs(): assert 1 + 1 == 2

@pytest.mark.netns
def test_left_out(): pytest.skip("needs root")

def test_skipped(): pytest.skip("needs a unicorn")
"""


def run_in(folder: Path, total: int, covered: int) -> tuple[int, list[str]]:
    """Run a full run of a tiny project in a process of its own."""
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "tests" / "test_it.py").write_text(PLUGIN_TEST)
    (folder / COUNTS_FILE).write_text(
        f'total = {total}\n[folders]\n"tests" = {total}\n'
        '[left_out.netns]\nreason = "needs root"\n'
    )
    (folder / "coverage.json").write_text(
        json.dumps({"files": {"pysmc/a.py": entry((covered, 10))}})
    )
    (folder / "pyproject.toml").write_text(
        "[tool.pysmc.coverage]\ndefault = 90\n[tool.pytest.ini_options]\n"
        f"testpaths = ['tests']\npythonpath = [{str(ROOT / 'tools')!r}]\n"
        "markers = ['netns: x']\n"
    )
    (folder / "tests" / "conftest.py").write_text('pytest_plugins = ["house_gate"]\n')
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--full", "-p", "no:cacheprovider"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.strip().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("total", "covered", "status", "word"),
    [(2, 9, 0, "ok"), (3, 9, 1, "TOO FEW TESTS"), (2, 8, 1, "TOO LOW")],
)
def test_a_full_run_fails_where_it_shows_too_little(
    tmp_path: Path, total: int, covered: int, status: int, word: str
) -> None:
    returned, lines = run_in(tmp_path, total, covered)
    assert returned == status
    assert any(word in line for line in lines)
    assert "1 passed, 2 skipped" in lines[-1], "pytest's closing line stays the last"
    assert lines[-2] == "Skipped: 1 x needs root; 1 x needs a unicorn."


@pytest.mark.slow
def test_a_lane_needs_its_number_of_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--lane", "hard"]
    few = subprocess.run(
        [*command, "tests/test_errors.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=50,
    )
    assert few.returncode == 1
    assert "TOO FEW TESTS: lane hard" in few.stdout


def test_parts_are_all_of_the_tests() -> None:
    parts = [part_of(f"tests/test_x.py::test_{number}", 3) for number in range(100)]
    assert set(parts) == {0, 1, 2}


class Chosen:
    """An item with a limit of its own, or without."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def get_closest_marker(self, name: str) -> Any:
        assert name == "timeout"
        return None if self.seconds is None else pytest.mark.timeout(self.seconds).mark


@pytest.mark.parametrize(
    ("lane", "of_many", "order"),
    [
        ("hard", True, [600, 60, None, None]),
        ("load", False, [None, 60, None, 600]),
        (None, True, [None, 60, None, 600]),
    ],
)
def test_a_lane_that_is_shared_begins_with_what_may_take_longest(
    lane: str | None,
    of_many: bool,
    order: list[float | None],
) -> None:
    config: Any = SimpleNamespace(getoption={"lane": lane, "part": None}.get)
    if of_many:
        config.workerinput = {}
    items: list[Any] = [Chosen(seconds) for seconds in (None, 60, None, 600)]
    house_gate.pytest_collection_modifyitems(config, items)
    assert [item.seconds for item in items] == order
