"""Machines that are not this one: files below a folder, settings, limits."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.cli.checks.machine import Machine

if TYPE_CHECKING:
    from pathlib import Path

LINUX: dict[str, Any] = {
    "system": "Linux",
    "release": "6.12.41+deb12-amd64",
    "architecture": "x86_64",
    "euid": 1000,
    "environ": {},
}


@pytest.fixture
def machine(tmp_path: Path):
    """Make a machine of files (name to text) and fields of `Machine`."""

    def make(files: dict[str, str] | None = None, **fields) -> Machine:
        for name, text in (files or {}).items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        limits: dict[int, tuple[int, int]] = fields.pop("limits", {})
        infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

        def limit(number: int) -> tuple[int, int]:
            return limits.get(number, infinite)

        return Machine(root=tmp_path, limit=limit, **(LINUX | fields))

    return make
