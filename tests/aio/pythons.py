"""The Pythons that are there, for what differs between their versions."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

VERSIONS = ("3.11", "3.12", "3.13")


def interpreters() -> dict[str, str]:
    """Version to program, from PATH and from where pyenv keeps them."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    homes = [Path(sys.base_prefix).parent, Path.home() / ".pyenv" / "versions"]
    for version in VERSIONS:
        candidates = [
            str(path)
            for home in homes
            if home.is_dir()
            for path in sorted(home.glob(f"{version}*/bin/python{version}"))
        ]
        in_path = shutil.which(f"python{version}")
        candidates += [in_path] if in_path else []
        if candidates:
            found.setdefault(version, candidates[0])
    return found


def need(version: str) -> str:
    """Give a version's program, or skip the test."""
    program = interpreters().get(version)
    if program is None:
        pytest.skip(f"needs python{version}: install it, or put it in PATH")
    return program
