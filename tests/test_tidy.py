"""Taste that a machine can check, each rule with what to do instead.

The rules hold for the files that git knows or would take up, so that no cache or
private note disturbs them. An exception is a row in a table here, with its reason.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pysmc/", "proto/smcproto/")

MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 70
MAX_FILE_BYTES = 200 * 1024

BANNED_IN_PACKAGES = {
    "eval": "parse the value",
    "exec": "write the code",
    "time.time": "time is an argument; a clock is time.monotonic",
    "time.sleep": "wait for an event in the loop",
    "random.random": "take it from the TokenSource",
    "asyncio.get_event_loop": "asyncio.get_running_loop",
    "asyncio.ensure_future": "create_task on the loop, and keep the task",
    "os.system": "subprocess.run with a list",
    "logging.basicConfig": "a library leaves logging to the program",
}
BANNED_IN_TESTS = {
    "time.sleep": "step the pair, or wait for the event with a deadline",
    "breakpoint": "nothing",
}
# Programs, and code that plays a program: these may wait and look at clocks.
MAY_WAIT = ("pysmc/cli/",)

# Modules without a test file of their own, and what tests them instead. No row is
# needed for a module that only declares (records, enumerations, protocols), nor for one
# that was cut out of a bigger one: `clc_v2` may be tested in `test_clc.py`.
TESTED_ELSEWHERE = {
    "pysmc/aio/orders.py": "tests/aio/test_driver.py",
    "pysmc/fabric/base.py": "tests/fabric/test_conformance.py",
    "pysmc/_version.py": "tests/test_packaging.py",
    "pysmc/__main__.py": "tests/test_packaging.py",
}

LEFTOVERS = re.compile(r"\b(?:TODO|FIXME|XXX)\b|\bbreakpoint\(|\bpdb\.set_trace\(")
SOURCES = re.compile(
    r"RFC \d{4}|section \d|\bA\.\d|figure \d|\bsmc\w*\.[ch]\b|SMC-?Rv2|Source:"
)
MACHINE_PATHS = re.compile(
    r"(?<![\w.$~)}-])/(?:home|root|work|Users|mnt|media)/[\w.-]+|/tmp/[\w-]{3,}/"
)
TEXT_SUFFIXES = {
    ".py", ".md", ".toml", ".json", ".sh", ".cfg", ".txt", ".yml", ".yaml", ".c", "",
}  # fmt: skip


@cache
def tracked_files() -> tuple[str, ...]:
    """List what git knows, or would take up, as paths relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        # No git, an unpacked sdist, or a checkout that belongs to somebody else.
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        names = [str(path) for path in paths if not _is_by_product(path)]
    else:
        names = done.stdout.decode().split("\0")
    return tuple(sorted(name for name in set(names) if (ROOT / name).is_file()))


def _is_by_product(path: Path) -> bool:
    parts = set(path.parts)
    hidden = {part for part in parts if part.startswith(".")} - {".ci", ".gitignore"}
    return bool(hidden or parts & {"__pycache__", "build", "dist", "coverage.json"})


def python_files(*prefixes: str) -> list[str]:
    """List the Python files below any of the folders; all without one."""
    files = [name for name in tracked_files() if name.endswith(".py")]
    return [name for name in files if name.startswith(prefixes or ("",))]


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


class Call(NamedTuple):
    place: str
    name: str
    node: ast.Call


def calls(name: str) -> Iterator[Call]:
    """Every call in a file whose callee is a plain or dotted name."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call):
            yield Call(f"{name}:{node.lineno}", ast.unparse(node.func), node)


def assert_none(problems: list[str], remedy: str) -> None:
    assert not problems, "\n  ".join([f"{remedy}:", *problems])


def test_files_are_short() -> None:
    lengths = {
        name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
        for name in python_files()
    }
    assert lengths, "no Python file was found"
    long = [f"{name}: {n} lines" for name, n in lengths.items() if n > MAX_FILE_LINES]
    assert_none(
        long, f"More than {MAX_FILE_LINES} lines: cut where the question changes"
    )


def test_functions_are_short() -> None:
    problems = [
        f"{name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name in python_files()
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert_none(
        problems, f"More than {MAX_FUNCTION_LINES} lines: make it two functions"
    )


def test_no_file_is_big() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in tracked_files()}
    big = [
        f"{name}: {size} bytes" for name, size in sizes.items() if size > MAX_FILE_BYTES
    ]
    assert_none(
        big, f"More than {MAX_FILE_BYTES} bytes: keep an excerpt, or generate it"
    )


def test_packages_make_no_banned_call() -> None:
    problems = [
        f"{call.place} {call.name}: {BANNED_IN_PACKAGES[call.name]}"
        for name in python_files(*PACKAGES)
        if not name.startswith(MAY_WAIT)
        for call in calls(name)
        if call.name in BANNED_IN_PACKAGES
    ]
    assert_none(problems, "Banned calls, and what to do instead")


def test_tests_make_no_banned_call() -> None:
    problems = [
        f"{call.place} {call.name}: {BANNED_IN_TESTS[call.name]}"
        for name in python_files("tests/")
        for call in calls(name)
        if call.name in BANNED_IN_TESTS
    ]
    assert_none(problems, "Banned calls, and what to do instead")


def test_tests_do_not_wait_a_fixed_time() -> None:
    """A pause long enough to matter is a guess about somebody else's speed."""
    problems = [
        f"{call.place} {ast.unparse(call.node)}"
        for name in python_files("tests/")
        for call in calls(name)
        if call.name == "asyncio.sleep" and _is_a_pause(call.node)
    ]
    assert_none(problems, "Wait for the event with asyncio.timeout() around it")


def _is_a_pause(call: ast.Call) -> bool:
    if not call.args or not isinstance(call.args[0], ast.Constant):
        return False
    value = call.args[0].value
    return isinstance(value, int | float) and value > 0.1


def test_nothing_is_left_over() -> None:
    this_file = Path(__file__).name
    problems = [
        f"{name}:{number} {line.strip()}"
        for name, number, line in _text_lines()
        if LEFTOVERS.search(line) and not name.endswith(this_file)
    ]
    assert_none(problems, "Do it, or file an issue")


def test_no_path_of_one_machine() -> None:
    this_file = Path(__file__).name
    problems = [
        f"{name}:{number} {line.strip()}"
        for name, number, line in _text_lines()
        # In a report a line ends by two characters, the second of which is a letter.
        if MACHINE_PATHS.search(line.replace("\\n", " "))
        if not name.endswith(this_file)
    ]
    assert_none(problems, "Use a relative path, tmp_path or an environment variable")


def _text_lines() -> Iterator[tuple[str, int, str]]:
    for name in tracked_files():
        if Path(name).suffix not in TEXT_SUFFIXES:
            continue
        text = (ROOT / name).read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            yield name, number, line


def test_sans_io_modules_name_their_source() -> None:
    problems = [
        name
        for name in python_files("pysmc/core/", "proto/smcproto/")
        if not SOURCES.search(ast.get_docstring(tree_of(name)) or "")
    ]
    assert_none(problems, "The module docstring names the RFC section or kernel file")


def test_every_module_has_its_test_file() -> None:
    tests = set(python_files("tests/"))
    problems = []
    for name in python_files(*PACKAGES):
        if name.endswith("/__init__.py") or _only_declares(name):
            continue
        elsewhere = TESTED_ELSEWHERE.get(name)
        wanted = [elsewhere] if elsewhere else _mirrors(name)
        if not tests.intersection(wanted):
            problems.append(f"{name}: {' or '.join(wanted)} is missing")
    assert_none(problems, "Every module has its test file")


def test_exceptions_to_the_mirror_are_needed() -> None:
    modules = set(python_files(*PACKAGES))
    needless = [
        name
        for name in TESTED_ELSEWHERE
        if name in modules and (ROOT / _mirrors(name)[0]).exists()
    ]
    assert_none(needless, "Has a test file of its own now: take the row out")


def _mirrors(name: str) -> list[str]:
    """Name the test file of a module, then those of the families that it is from.

    ``pysmc/core/link_group.py``: ``tests/core/test_link_group.py``, then
    ``tests/core/test_link.py``.
    """
    path = Path(name)
    folder = Path("tests")
    if path.parts[0] == "proto":
        folder /= "proto"
    else:
        folder = folder.joinpath(*path.parts[1:-1])
    words = path.stem.strip("_").split("_")
    stems = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
    return [str(folder / f"test_{stem}.py") for stem in stems]


def _only_declares(name: str) -> bool:
    functions = (
        node
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    # The body of a protocol's method is a docstring, or an ellipsis.
    return all(
        isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
        for function in functions
        for line in function.body
    )


def test_tests_assert_something() -> None:
    problems = [
        f"{name}:{node.lineno}"
        for name in python_files("tests/")
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Assert)
        and isinstance(node.test, ast.Constant)
        and node.test.value
    ]
    assert_none(problems, "An assertion that cannot fail: say what must hold")


def test_tests_need_no_package_of_their_own() -> None:
    found = [name for name in python_files("tests/") if name.endswith("/__init__.py")]
    assert_none(found, "Importlib mode: no __init__.py in tests")


def test_proto_is_no_package() -> None:
    """It would shadow proto-plus for everyone who runs from the checkout."""
    assert not (ROOT / "proto" / "__init__.py").exists()
    assert "proto/__init__.py" not in tracked_files()


def changelog_fragments() -> list[str]:
    names = [n for n in tracked_files() if n.startswith("docs/changelog.d/")]
    return [name for name in names if not name.endswith("README.md")]


def test_changelog_fragments_are_well_formed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        types = tomllib.load(file)["tool"]["towncrier"]["type"]
    kinds = "|".join(kind["directory"] for kind in types)
    good_name = re.compile(rf"docs/changelog\.d/[a-z0-9-]+\.(?:{kinds})\.md")
    problems = []
    for name in changelog_fragments():
        text = (ROOT / name).read_text(encoding="utf-8").strip()
        if not good_name.fullmatch(name):
            problems.append(f"{name}: the name is not word-word.({kinds}).md")
        if not text or not text[0].isupper() or not text.endswith("."):
            problems.append(f"{name}: is not whole sentences")
        if text.startswith(("#", "-", "*")):
            problems.append(f"{name}: towncrier makes the heading and the bullet")
    assert_none(problems, "See docs/changelog.d/README.md")


@pytest.mark.parametrize(
    ("pattern", "line", "found"),
    [
        (LEFTOVERS, "x = 1  # " + "TO" + "DO later", True),
        (LEFTOVERS, "the todo list of a day", False),
        (MACHINE_PATHS, "open('/ho" + "me/me/x')", True),
        (MACHINE_PATHS, "/tm" + "p/some-folder/file", True),
        (MACHINE_PATHS, "https://example.org/work/item", False),
        (MACHINE_PATHS, "$HOME/work/x and tests/work/x", False),
        (SOURCES, "Source: RFC 7609 section 4.7", True),
        (SOURCES, "Decides what may happen next.", False),
    ],
)
def test_the_patterns_find_what_they_are_for(
    pattern: re.Pattern[str], line: str, found: bool
) -> None:
    assert bool(pattern.search(line)) is found
