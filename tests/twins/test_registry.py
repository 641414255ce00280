"""Every test of CPython's classes is sorted in, and every twin that is named exists."""

from __future__ import annotations

import ast
import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.aio.pythons import VERSIONS, interpreters

HERE = Path(__file__).resolve().parent
REGISTRY: dict[str, Any] = tomllib.loads((HERE / "registry.toml").read_text("utf-8"))

# Runs on its own: another Python need not have anything of ours installed.
LIST = """
import importlib, json, platform, sys, unittest

found = {}
for module, names in json.load(sys.stdin).items():
    loaded = importlib.import_module("test.test_asyncio." + module)
    classes = [getattr(loaded, name, None) for name in names]
    found[module] = sorted({
        test for case in classes if case is not None
        for test in unittest.defaultTestLoader.getTestCaseNames(case)
    })
print(json.dumps([platform.python_version(), found]))
"""


def sorted_in(kind: str) -> set[tuple[str, str]]:
    """Pairs of module and test, of one kind or of all."""
    tables = {
        "twins": [REGISTRY["twins"]],
        "transports": [REGISTRY["transports"]],
        "without": REGISTRY["without"],
    }[kind]
    pairs = [
        (module, test)
        for table in tables
        for module, tests in table.items()
        if module != "reason"
        for test in tests
    ]
    assert len(pairs) == len(set(pairs)), f"a test is in {kind} twice"
    return set(pairs)


def test_each_test_is_sorted_in_once() -> None:
    kinds = [sorted_in(kind) for kind in ("twins", "transports", "without")]
    assert sum(map(len, kinds)) == len(set.union(*kinds))
    assert all(row["reason"] for row in REGISTRY["without"])


@pytest.mark.parametrize("version", VERSIONS)
def test_every_test_of_cpython_is_sorted_in(version) -> None:
    program = interpreters().get(version)
    if program is None:
        pytest.skip(f"needs python{version}: install it, or put it in PATH")
    done = subprocess.run(
        [program, "-I", "-c", LIST],
        input=json.dumps(REGISTRY["classes"]),
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named 'test" in done.stderr or "not found" in done.stderr:
        pytest.skip(
            f"python{version} has no test.test_asyncio: on Debian, "
            f"apt-get install libpython3.11-testsuite; {done.stderr[-200:]}"
        )
    assert done.returncode == 0, done.stderr
    release, found = json.loads(done.stdout)
    there = {(module, test) for module, tests in found.items() for test in tests}
    kinds = {kind: sorted_in(kind) for kind in ("twins", "transports", "without")}
    known = set().union(*kinds.values())
    assert not there - known, "sort these in, see registry.toml"
    counts = {kind: len(there & tests) for kind, tests in kinds.items()}
    counts["tests"] = len(there)
    expected = REGISTRY["counts"].get(release)
    if expected is None:  # another patch release: a few more, or a few less
        assert counts["tests"] >= 200
        assert counts["twins"] >= 70
    else:
        assert counts == expected


def test_tests_with_transports_at_both_ends_are_run_as_they_are() -> None:
    """What has no twin for that reason is run over SMC-R by tests/cpython."""
    path = HERE.parent / "cpython" / "expected.toml"
    run = tomllib.loads(path.read_text("utf-8"))["both_ends"]
    ran = {(module, test) for module, _, test in (name.split(".") for name in run)}
    assert sorted_in("transports") <= ran
    others = {pair for pair in ran if pair in sorted_in("twins")}
    # These are run there too, where a blocking connect is led through the loop.
    assert {module for module, _ in others} == {"test_sendfile"}
    assert {test for _, test in ran - sorted_in("transports") - others} == {
        test for _, test in ran if "unix" in test
    }


def test_every_twin_that_is_named_exists_and_every_other_is_named() -> None:
    """A twin is a function of the same name in the file of the same name."""
    twins = set()
    for path in HERE.glob("test_*.py"):
        if path.stem in REGISTRY["classes"]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            twins |= {
                (path.stem, node.name)
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            }
    assert twins == sorted_in("twins")
    assert len(twins) == 79
