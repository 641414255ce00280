"""Every demand names tests that exist and run, or says what it waits for."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
REGISTRY: dict[str, Any] = tomllib.loads(
    (Path(__file__).parent / "demands.toml").read_text("utf-8")
)
DEMANDS, FAULTS = REGISTRY["demand"], REGISTRY["fault"]
ROWS = [*DEMANDS, *FAULTS]
SECTIONS = {"input", "ends", "fallback", "groups", "data", "set-up"}
NEVER = {"skip", "skipif", "xfail"}
NOT_EVERYWHERE = {"netns", "long", "lab", "lab_long"}
"""Marks of tests that are left out on many machines."""
TESTS = sorted({name for row in ROWS for name in row["tests"]})


@cache
def marks_of(path: str) -> dict[str, set[str]]:
    """Give the tests of a file, each with the names of all of its marks."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    of_all: set[str] = set()
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "pytestmark"
        ):
            of_all |= marks_in(node.value)
    functions = (
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {
        node.name: of_all.union(*map(marks_in, node.decorator_list), skips_in(node))
        for node in functions
    }


def marks_in(node: ast.AST) -> set[str]:
    return {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def skips_in(function: ast.AST) -> set[str]:
    called = (each.func for each in ast.walk(function) if isinstance(each, ast.Call))
    return {"skip" for name in called if ast.unparse(name) == "pytest.skip"}


def test_every_row_is_complete() -> None:
    for row in DEMANDS:
        assert set(row) - {"later"} == {"section", "id", "was", "holds", "tests"}, row
        assert row["section"] in SECTIONS, row
    for row in FAULTS:
        assert set(row) - {"later"} == {"id", "was", "holds", "tests"}, row
    for row in ROWS:
        for key in ("was", "holds", "later"):
            assert row.get(key, "Fine.").endswith("."), row


def test_no_row_is_missing_and_none_is_there_twice() -> None:
    ids = [row["id"] for row in ROWS]
    assert len(ids) == len(set(ids))
    assert [row["id"] for row in FAULTS] == [f"F{number}" for number in range(1, 52)]
    named = {word.strip(",") for row in DEMANDS for word in row["id"].split()}
    assert len({word for word in named if word.startswith("CVE-")}) >= 48


def test_what_has_no_test_waits_for_something_that_is_not_built() -> None:
    """And that is little; it can only become less."""
    waiting = [row["id"] for row in ROWS if not row["tests"]]
    assert [row["id"] for row in ROWS if not row["tests"] and "later" not in row] == []
    assert len(waiting) <= 7, waiting


@pytest.mark.parametrize("name", TESTS)
def test_a_test_that_is_named_exists_and_is_never_skipped(name: str) -> None:
    path, _, function = name.partition("::")
    assert Path(path).name.startswith("test_")
    found = marks_of(path)
    assert function in found, f"{path} has {sorted(found)}"
    assert not found[function] & NEVER, "it may be skipped"


def test_no_demand_hangs_on_what_is_left_out_on_many_machines() -> None:
    for row in ROWS:
        marks = [marks_of(name.partition("::")[0]) for name in row["tests"]]
        everywhere = [
            name
            for name, found in zip(row["tests"], marks, strict=True)
            if not found[name.partition("::")[2]] & NOT_EVERYWHERE
        ]
        assert everywhere or not row["tests"], row


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_every_test_that_is_named_is_collected() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *TESTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    collected = {line.partition("[")[0] for line in done.stdout.splitlines()}
    assert set(TESTS) - collected == set()
