"""What is in the wheel and in the source distribution, built from this very tree.

Built without isolation, so that no network is needed; the extra `test` brings
hatchling.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from pysmc._version import __version__

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _build("wheel", folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    _build("sdist", folder)
    (path,) = folder.glob("*.tar.gz")
    return path


def _build(target: str, folder: Path) -> None:
    """Call the build backend as a front end does, in a process of its own."""
    code = f"from hatchling import build; build.build_{target}({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(folder: str, relative_to: str) -> set[str]:
    base = ROOT / relative_to
    return {str(p.relative_to(base)) for p in (ROOT / folder).rglob("*.py")}


def test_the_wheel_holds_both_packages_whole(wheel: Path) -> None:
    names = names_in_wheel(wheel)
    assert names >= sources("pysmc", ".")
    assert names >= sources("proto/smcproto", "proto")


def test_the_wheel_is_typed(wheel: Path) -> None:
    assert {"pysmc/py.typed", "smcproto/py.typed"} <= names_in_wheel(wheel)


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.split("/", 1)[0] for name in names_in_wheel(wheel)}
    assert tops == {"pysmc", "smcproto", f"pysmcr-{__version__}.dist-info"}
    assert not [n for n in names_in_wheel(wheel) if "__pycache__" in n or "test_" in n]


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    info = f"pysmcr-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Name"] == "pysmcr"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "demo",
        "dev",
        "lint",
        "test",
    }
    assert "pysmc = pysmc.cli:main" in scripts


def test_the_base_install_needs_construct_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"pysmcr-{__version__}.dist-info/METADATA").decode()
    requirements = Parser().parsestr(text).get_all("Requires-Dist", [])
    base = [line for line in requirements if "extra ==" not in line]
    assert [line.split("<")[0].split(">")[0].strip() for line in base] == ["construct"]


def test_the_sdist_is_enough_to_test_and_to_build(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {
        "pyproject.toml", "Makefile", "LICENSE", "README.md", "tests/conftest.py",
        "tools/house_gate.py", "pysmc/_version.py", "proto/smcproto/__init__.py",
    }  # fmt: skip
    assert wanted <= names
    hidden = {n for n in names if n.startswith(".") and n != ".gitignore"}
    assert hidden == set(), "caches and settings of one machine do not belong in it"


def test_the_wheel_works_where_the_tree_is_not(wheel: Path, tmp_path: Path) -> None:
    """Import both packages from the wheel alone; zipimport needs no install."""
    code = (
        "import pysmc, smcproto, pysmc.cli, sys;"
        "print(pysmc.__version__, pysmc.__file__, smcproto.__file__)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(wheel)!r}); {code}",
        ],
        cwd=tmp_path,
        # The copy in the wheel must not be measured in the place of the tree.
        env={k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")},
        capture_output=True,
        text=True,
        check=True,
    )
    version, *files = done.stdout.split()
    assert version == __version__
    assert all(file.startswith(str(wheel)) for file in files)
