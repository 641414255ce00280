"""The twins on every other Python that is found: asyncio differs between them.

Another Python needs nothing installed: pytest and construct are pure Python, and are
lent to it by links in a folder; certificates are files.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aio.pythons import VERSIONS, interpreters
from tests.twins.test_registry import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
LENT = (
    "pytest",
    "_pytest",
    "pluggy",
    "iniconfig",
    "packaging",
    "pygments",
    "py",
    "construct",
)
OTHERS = tuple(
    v for v in VERSIONS if v != f"{sys.version_info[0]}.{sys.version_info[1]}"
)
TWINS_WITH_MORE_CASES = 1  # test_remote_shutdown_receives_trailing_data has two


def lend(folder: Path) -> str:
    """Make a folder from which another Python can import what we have."""
    for name in LENT:
        found = importlib.util.find_spec(name)
        assert found is not None, name
        assert found.origin is not None, name
        package = Path(found.origin)
        if found.submodule_search_locations:
            package = package.parent
        (folder / package.name).symlink_to(package)
        info = next(package.parent.glob(f"{name}-*.dist-info"), None)
        if info is not None:
            (folder / info.name).symlink_to(info)
    return os.pathsep.join(map(str, (folder, ROOT, ROOT / "proto")))


def expected_cases(version: str, lanes: str) -> int:
    """All twins, but for those of tests that only a later Python has."""
    twins = sum(map(len, REGISTRY["twins"].values()))
    absent = 0 if version == "3.13" else 1
    return (twins - absent + TWINS_WITH_MORE_CASES) * len(lanes.split(","))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "lanes",
    [
        pytest.param("threads", marks=pytest.mark.slow),
        pytest.param("shm,sim", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("version", OTHERS)
def test_the_twins_pass(version, lanes, tmp_path, certificates) -> None:
    """In development mode: asyncio's debug mode, and every warning an error."""
    program = interpreters().get(version)
    if program is None:
        pytest.skip(f"needs python{version}: install it, or put it in PATH")
    command = [program, "-X", "dev", "-m", "pytest", "-q", "-p", "no:cacheprovider",
               "-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib",
               f"--confcutdir={Path(__file__).parent}", "-W", "error",
               "-W", "ignore::pytest.PytestUnknownMarkWarning",
               *(str(Path(__file__).parent / f"{name}.py")
                 for name in REGISTRY["twins"])]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": lend(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYSMC_TWINS_CERTIFICATES": str(certificates.folder),
        "PYSMC_TWINS_LANES": lanes,
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) == expected_cases(version, lanes)
    assert "skipped" not in done.stdout
