"""The command line as a newcomer meets it: real processes, exit codes, both outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE = 60.0


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def environment():
    """Give the environment of a command: ours, without settings of pysmc."""
    names = [name for name in os.environ if not name.startswith("PYSMC_")]
    return {name: os.environ[name] for name in names}


@pytest.fixture
def pysmc(tmp_path: Path, environment):
    """Run ``python -m pysmc`` to its end."""

    def run(*arguments: Any, env: dict[str, str] | None = None, **options: Any):
        done = subprocess.run(
            [sys.executable, "-m", "pysmc", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            cwd=tmp_path,
            env=environment | (env or {}),
            check=False,
            **options,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def write(tmp_path: Path):
    """Write a program into the folder in which commands run; gives its name."""

    def save(text: str, name: str = "program.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return save
