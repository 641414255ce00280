"""Who imports whom, and what `import pysmc` costs.

import-linter holds the rooms apart (pyproject.toml); what it cannot say, "nothing but
the standard library and these", is read from the sources here.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SANS_IO_FORBIDDEN = {
    "asyncio", "ctypes", "mmap", "multiprocessing", "os", "pyverbs", "random",
    "secrets", "select", "selectors", "signal", "socket", "ssl", "subprocess",
    "threading", "time",
}  # fmt: skip

# What each room may import beside the standard library and itself. `construct` has one
# door, `pyverbs` none: it is loaded by hand.
MAY_IMPORT = {
    "proto/smcproto": {"construct", "smcproto"},
    "pysmc/core": {
        "smcproto", "pysmc.core", "pysmc.errors", "pysmc.config", "pysmc.info",
        "pysmc.reasons",
    },
    "pysmc/fabric": {
        "pysmc.fabric", "pysmc.errors", "pysmc.config", "pysmc.info",
        "pysmc.reasons", "pysmc.disposal",
    },
    "pysmc/discovery": {
        "smcproto", "pysmc.discovery", "pysmc.errors", "pysmc.config", "pysmc.info",
        "pysmc.reasons", "pysmc.disposal",
    },
    "pysmc/testing": {
        "hypothesis", "cryptography", "smcproto", "pysmc.testing", "pysmc.aio",
        "pysmc.core", "pysmc.fabric", "pysmc.discovery",
        "pysmc.errors", "pysmc.config", "pysmc.info", "pysmc.reasons", "pysmc.disposal",
    },
    "pysmc/contrib": {"scapy", "smcproto"},
    "pysmc/integrations": {"gunicorn", "uvicorn_worker", "aiohttp", "pysmc"},
}  # fmt: skip

GROUND_FLOOR = ("errors", "config", "info", "reasons", "disposal")


def imported_names(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, also inside functions."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    package = package[1:] if package[0] == "proto" else package
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            if base in {"pysmc", "smcproto", "pysmc.core", "pysmc.fabric"}:
                names |= {f"{base}.{alias.name}" for alias in node.names}
            else:
                names.add(base)
    return names


def is_below(name: str, packages: set[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def is_standard(name: str) -> bool:
    return name.split(".", maxsplit=1)[0] in sys.stdlib_module_names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    problems = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for name in sorted(imported_names(path))
        if not is_standard(name) and not is_below(name, MAY_IMPORT[room])
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", GROUND_FLOOR)
def test_the_ground_floor_imports_only_the_standard_library(name: str) -> None:
    names = imported_names(ROOT / "pysmc" / f"{name}.py")
    own = {f"pysmc.{other}" for other in GROUND_FLOOR}
    assert [n for n in names if not is_standard(n) and not is_below(n, own)] == []


@pytest.mark.parametrize("room", ["proto/smcproto", "pysmc/core"])
def test_sans_io_rooms_know_no_world(room: str) -> None:
    problems = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for name in sorted(imported_names(path))
        if name.split(".")[0] in SANS_IO_FORBIDDEN
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("library", "door"),
    [
        ("pyverbs", ()),
        ("scapy", "pysmc/contrib/scapy"),
        ("hypothesis", "pysmc/testing/"),
        ("aiohttp", ("pysmc/cli/", "pysmc/integrations/")),
        ("gunicorn", "pysmc/integrations/"),
        ("uvicorn_worker", "pysmc/integrations/"),
        ("rich", "pysmc/cli/"),
        ("construct", "proto/smcproto/"),
    ],
)
def test_a_library_has_one_door(library: str, door: str | tuple[str, ...]) -> None:
    files = [*ROOT.glob("pysmc/**/*.py"), *ROOT.glob("proto/smcproto/**/*.py")]
    users = {
        str(path.relative_to(ROOT))
        for path in files
        if any(name.split(".")[0] == library for name in imported_names(path))
    }
    assert {user for user in users if not user.startswith(door)} == set()


def test_smcproto_and_core_are_found() -> None:
    """The rules above would hold for empty folders too."""
    for room in ("proto/smcproto", "pysmc/core", "pysmc/fabric", "pysmc/discovery"):
        assert len(list((ROOT / room).glob("*.py"))) > 1, room


def modules_after(statement: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter after one statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


HEAVY = {"scapy", "pyverbs", "construct", "hypothesis", "aiohttp", "rich", "smcproto"}


def test_importing_pysmc_is_cheap() -> None:
    loaded = modules_after("import pysmc")
    assert loaded & HEAVY == set()
    assert "asyncio" not in loaded, "pysmc/__init__.py is lazy: keep it that way"


def test_importing_pysmc_does_not_touch_asyncio() -> None:
    """Nothing is patched and no policy is set, however the import is done."""
    code = (
        "import asyncio; before = {k: id(v) for k, v in vars(asyncio).items()};"
        "import pysmc; pysmc.Loop; pysmc.run;"
        "print({k for k, v in before.items() if id(vars(asyncio)[k]) != v} or 'same')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "same"


def test_smcproto_loads_nothing_of_pysmc() -> None:
    loaded = modules_after("import smcproto")
    assert {name for name in loaded if name.split(".")[0] == "pysmc"} == set()
    assert "asyncio" not in loaded


def test_import_contracts_hold() -> None:
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    if not program.exists():
        pytest.skip("needs import-linter: pip install -e .[lint]")
    command = [str(program), "--no-cache", "--no-logo"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
