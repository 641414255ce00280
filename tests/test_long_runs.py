"""Long runs: small by default, full and with a report on request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tested_commit import trees

TOOLS = Path(__file__).resolve().parents[1] / "tools"

PROGRAM = """
import pytest

@pytest.mark.soak
@pytest.mark.parametrize("shard", range(2))
def test_numbers(long_run, shard):
    with long_run("numbers", small=4, full=10, shard=(shard, 2)) as run:
        for seed in run.seeds():
            run.add(cases=1, **{f"shard{shard}": 1})
            if seed == BAD:
                run.fail(f"seed {seed}: as wanted")
            if seed == BROKEN_OFF:
                pytest.fail("what a time-out does")
        run.tell(rate=3)
"""


def play(
    folder: Path, bad: int, *options: str, broken_off: int = -1
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    program = PROGRAM.replace("BAD", str(bad)).replace("BROKEN_OFF", str(broken_off))
    (folder / "test_it.py").write_text(program)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    soak: x\n")
    reports = folder / "reports"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "long_runs",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "-q", "-s", f"--reports={reports}", *options, str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": str(TOOLS), "TMPDIR": str(folder), "PATH": "/usr/bin:/bin"},
        check=False,
        timeout=50,
    )
    report = reports / "numbers.json"
    return done, json.loads(report.read_text()) if report.exists() else {}


@pytest.mark.slow
def test_the_small_count_leaves_no_report(tmp_path: Path) -> None:
    done, report = play(tmp_path, -1)
    assert done.returncode == 0, done.stdout
    assert "numbers: {'cases': 2, 'shard1': 2}" in done.stdout
    assert report == {}


@pytest.mark.slow
def test_the_full_count_adds_up_its_shards(tmp_path: Path) -> None:
    done, report = play(tmp_path, -1, "--long")
    assert done.returncode == 0, done.stdout
    assert report["cases"] == report["counts"]["cases"] == 10
    assert report["counts"]["shard0"] == report["counts"]["shard1"] == 5
    assert report["cpu_shards"] == "2 of 2"
    assert report["failures"] == 0
    assert report["facts"] == [{"rate": 3}, {"rate": 3}]
    assert report["trees"] == trees()


@pytest.mark.slow
def test_a_failure_is_told_and_reported(tmp_path: Path) -> None:
    done, report = play(tmp_path, 107, "--long", "--first=100", "--count=20")
    assert done.returncode == 1
    assert "seed 107: as wanted" in done.stdout
    assert report["first_seed"] == 100
    assert report["cases"] == 20
    assert report["failures"] == 1
    assert report["failed"] == ["seed 107: as wanted"]


@pytest.mark.slow
def test_a_run_that_was_broken_off_is_a_failure(tmp_path: Path) -> None:
    """Or a report would claim cases that nobody has run."""
    done, report = play(tmp_path, -1, "--long", broken_off=7)
    assert done.returncode == 1
    assert report["counts"]["cases"] == 8
    assert report["failures"] == 1
    assert report["failed"] == ["Failed: what a time-out does"]


@pytest.mark.slow
def test_a_report_does_not_add_up_other_numbers(tmp_path: Path) -> None:
    play(tmp_path, -1, "--long", "--count=4")
    _, report = play(tmp_path, -1, "--long", "-k", "0")
    assert report["cpu_shards"] == "1 of 2"
    assert report["cases"] == 5
