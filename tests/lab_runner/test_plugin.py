"""Tests marked lab: sent to a guest, and reported as any other test.

A program in QEMU's place plays the guest; the pytest that is tried runs in a process of
its own, with a folder of scenarios.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import plugin

pytestmark = pytest.mark.slow

TOOLS = Path(plugin.__file__).resolve().parents[1]
SCENARIOS = """
import pytest

@pytest.mark.lab(seconds=5)
def test_one():
    raise AssertionError("must not run on the host")

@pytest.mark.lab
def test_two():
    raise AssertionError("must not run on the host")

def test_of_the_host():
    pass

@pytest.mark.lab_long(seconds=900)
def test_three(): ...
"""
SEAMS = """
import os
from pathlib import Path
import lab.errors, lab.machine, lab.needs, lab.plugin
from lab.kernel import Kernel
pytest_plugins = ["lab.plugin"]
def prepare(results, series):
    if series == os.environ.get("NOT_THERE"):
        kind = getattr(lab.errors, os.environ.get("WHY", "LabMissing"))
        raise kind("no kernel {}", series)
    kernel = Kernel(Path("k"), f"{series}.1")
    return lab.machine.Setup("tcg", kernel, Path("a"), results)
lab.machine.prepare = prepare
lab.needs.missing = lambda: os.environ.get("MISSING", "")
lab.bytecode.rewrite = lambda files: None
lab.plugin.SLACK = float(os.environ.get("SLACK", 20))
"""


OLDER = """
import pytest

pytestmark = pytest.mark.lab(kernel="6.1")

def test_old():
    raise AssertionError("must not run on the host")

@pytest.mark.lab(seconds=7)
def test_older():
    raise AssertionError("must not run on the host")
"""


def play(
    number: int, outcome: str = "passed", words: str | list[Any] | None = None
) -> str:
    """Write the line of a shell that reports on one test."""
    report: dict[str, Any] = {
        "$report_type": "TestReport",
        "nodeid": f"test_scenarios.py::test_{number}",
        "location": ["test_scenarios.py", number, f"test_{number}"],
        "keywords": {},
        "outcome": outcome,
        "longrepr": words,
        "when": "call",
        "sections": [["the guest's kernel", "rxe0 is gone"]],
        "duration": 0.5,
        "start": 0.0,
        "stop": 0.5,
        "user_properties": [],
    }
    data = json.dumps({"reports": [report]})
    name = f"$share/{number}.json"
    return f"cat >{name}.part <<'E'\n{data}\nE\nmv {name}.part {name}\n"


READY = "echo 1 >$share/ready; echo 3 >$share/collected\n"
STAY = "exec sleep 60\n"


@pytest.fixture
def run(tmp_path: Path, cache: Path, qemu):
    """Run the scenarios with a guest that does as told; gives code and output."""
    folder = tmp_path / "scenarios"
    folder.mkdir()
    (folder / "test_scenarios.py").write_text(SCENARIOS)
    (folder / "conftest.py").write_text(SEAMS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")

    def start(guest: str, *words: str, **settings: str) -> tuple[int, str]:
        qemu(guest)
        own = {n: v for n, v in os.environ.items() if n not in ("PYSMC_LAB", "CI")}
        own |= {"PYTHONPATH": str(TOOLS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "pytest_timeout", "-rA", *words],
            cwd=folder,
            env=own | settings,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return start


def outcomes(text: str) -> dict[str, str]:
    found = re.findall(r"^(PASSED|FAILED|SKIPPED) .*?::(\w+)", text, re.MULTILINE)
    return {name: outcome for outcome, name in found}


def test_reports_of_the_guest_are_reported(run, cache: Path) -> None:
    bad = play(1, "failed", "E   assert 16 == 17")
    code, text = run(READY + play(0) + bad + play(2) + STAY)
    assert code == 1
    assert "1 failed, 3 passed" in text
    # What the guest said, what its kernel said, and where the rest lies.
    assert "assert 16 == 17" in text
    assert "rxe0 is gone" in text
    assert "Lab: Linux 6.12.1 (tcg), up after" in text
    results = (cache / "results" / "latest").resolve()
    assert text.count(str(results)) >= 2
    names = (results / "list").read_text().split()
    assert [name.partition("::")[2] for name in names] == [
        "test_one",
        "test_two",
        "test_three",
    ]
    job = (results / "job").read_text()
    assert "-p lab.runner" in job
    assert job.rstrip().endswith("'test_scenarios.py'")


def test_what_the_guest_skips_is_skipped_with_its_reason(run) -> None:
    """Also where each test is told in a line of its own."""
    why = ["test_scenarios.py", 7, "Skipped: needs the program nginx"]
    code, text = run(READY + play(0) + play(1, "skipped", why) + play(2) + STAY, "-v")
    assert (code, "3 passed, 1 skipped" in text) == (0, True), text
    assert "needs the program nginx" in text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[   12.1] BUG: kernel NULL pointer dereference", True),
        ("[   12.1] WARNING: CPU: 1 PID: 7 at rxe_qp.c:800", True),
        ("[   12.1] INFO: task python:77 blocked for more than 120 seconds.", True),
        ("[   12.1] infiniband rxe0: set active", False),
    ],
)
def test_complaints_of_the_kernel_are_told(line: str, told: bool) -> None:
    assert plugin.complaints({"kernel": ["[ 1.0] veth: up", line]}) == [line] * told
    assert plugin.complaints({"error": "no reports"}) == []


def test_another_kernel_has_a_guest_of_its_own_after_the_usual_one(
    run, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "scenarios" / "test_a_first.py").write_text(OLDER)
    both = play(0) + play(1) + play(2)
    code, text = run(READY + both + STAY)
    assert (code, "6 passed" in text) == (0, True), text
    first, second = sorted(
        path for path in (cache / "results").iterdir() if not path.is_symlink()
    )
    assert "test_a_first" not in (first / "list").read_text()
    assert (second / "list").read_text().split() == [
        "test_a_first.py::test_old",
        "test_a_first.py::test_older",
    ]
    assert text.index("Lab: Linux 6.12.1 (tcg)") < text.index("Lab: Linux 6.1.1 (tcg)")


def test_a_dead_guest_does_no_harm_to_the_next(run, tmp_path: Path) -> None:
    (tmp_path / "scenarios" / "test_a_first.py").write_text(OLDER)
    old = f"if grep -q old $share/list; then\n{READY + play(0) + play(1) + STAY}fi\n"
    code, text = run(old + "exit 1\n")
    assert code == 1
    assert "3 failed, 3 passed" in text


def test_a_kernel_that_cannot_be_had_leaves_its_tests_out(run, tmp_path: Path) -> None:
    (tmp_path / "scenarios" / "test_a_first.py").write_text(OLDER)
    usual = READY + play(0) + play(1) + play(2) + STAY
    code, text = run(usual, NOT_THERE="6.1")
    assert (code, "4 passed, 2 skipped" in text) == (0, True), text
    assert "no kernel 6.1" in text
    code, text = run(usual, NOT_THERE="6.1", PYSMC_LAB="require")
    assert (code, "2 failed, 4 passed" in text) == (1, True), text
    assert "no kernel 6.1 (PYSMC_LAB=require)" in text
    never = {"NOT_THERE": "6.1", "WHY": "NotOffered", "PYSMC_LAB": "require"}
    code, text = run(usual, **never)
    assert (code, "4 passed, 2 skipped" in text) == (0, True), text


def test_a_kernel_that_nobody_knows_is_told(run, tmp_path: Path) -> None:
    wrong = OLDER.replace("6.1", "5.10")
    (tmp_path / "scenarios" / "test_a_first.py").write_text(wrong)
    code, text = run("exit 1\n")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "test_old: no kernel '5.10' in the lab, only 6.12, 6.1" in text


def test_only_what_was_chosen_goes_to_the_guest(run, cache: Path) -> None:
    code, text = run(READY + play(0) + STAY, "-m", "lab and not lab_long", "-k", "two")
    assert (code, "1 passed" in text) == (0, True), text
    listed = (cache / "results" / "latest" / "list").read_text().split()
    assert listed == ["test_scenarios.py::test_two"]


def test_a_guest_that_dies_fails_the_rest_with_its_console(run) -> None:
    dying = READY + play(0) + "echo 'Oops: general protection' >$share/console.log\n"
    code, text = run(dying + "exit 0\n")
    assert code == 1
    assert "2 failed, 2 passed" in text
    assert text.count("Oops: general protection") >= 2
    assert "an earlier scenario ended the guest" in text


def test_a_guest_that_never_comes_up_fails_all_once(run) -> None:
    code, text = run("echo 'no init found' >$share/console.log; exit 1\n")
    assert code == 1
    assert "3 failed, 1 passed" in text
    assert "no init found" in text


def test_a_guest_that_falls_silent_is_not_waited_for_longer_than_the_limit(run) -> None:
    code, text = run(READY + STAY, "-k", "three", SLACK="-899")
    assert code == 1
    assert "no word of the guest within 1 s" in text


def test_a_test_that_the_guest_did_not_find_fails(run) -> None:
    lost = 'echo \'{"error": "the guest has not collected it"}\' >$share/0.json\n'
    code, text = run(READY + lost + STAY, "-k", "one")
    assert code == 1
    assert "the guest has not collected it" in text


def test_where_the_lab_cannot_run_it_says_why(run) -> None:
    code, text = run("exit 1\n", MISSING="needs a bigger boat")
    assert code == 0
    assert "1 passed, 3 skipped" in text
    assert "needs a bigger boat" in text


def test_a_required_lab_that_cannot_run_is_a_failure(run) -> None:
    code, text = run("exit 1\n", MISSING="needs a boat", PYSMC_LAB="require")
    assert code == 1
    assert "3 failed, 1 passed" in text
    assert "needs a boat (PYSMC_LAB=require)" in text


def test_a_lab_that_is_off_is_left_out(run) -> None:
    code, text = run("exit 1\n", PYSMC_LAB="off")
    assert code == 0
    assert "the lab is off (PYSMC_LAB=off)" in text


def test_in_the_guest_the_tests_simply_run(run) -> None:
    code, text = run("exit 1\n", PYSMC_LAB_GUEST="1")
    assert code == 1
    assert text.count("must not run on the host") >= 2
    assert outcomes(text)["test_three"] == "PASSED"
