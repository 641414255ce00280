"""Machines that are not this one: files below a folder, settings, limits."""

from __future__ import annotations

import importlib.util
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from pysmc.cli.checks.machine import Machine

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


@pytest.fixture
def rxe():
    """Give the files of a soft-RoCE device, and of what belongs to it.

    Args of the function: the device's name and network device, its port's state, its
    GIDs (address and type).
    """

    def files(
        name: str = "rxe0",
        netdev: str = "va",
        state: str = "4: ACTIVE",
        gids: tuple[tuple[str, str], ...] = (
            ("fe80::1", "RoCE v2"),
            ("::ffff:10.0.0.1", "RoCE v2"),
        ),
        node: int = 0,
    ) -> dict[str, str]:
        device = f"/sys/class/infiniband/{name}"
        port = f"{device}/ports/1"
        found = {
            f"{device}/parent": netdev,
            f"{port}/state": f"{state}\n",
            f"/sys/class/infiniband_verbs/uverbs{node}/ibdev": f"{name}\n",
            f"/dev/infiniband/uverbs{node}": "",
            f"/sys/class/net/{netdev}/address": "02:00:00:00:00:01\n",
            f"/sys/class/net/{netdev}/mtu": "1500\n",
            "/etc/libibverbs.d/rxe.driver": "driver rxe\n",
            "/etc/libibverbs.d/mlx5.driver": "driver mlx5\n",
        }
        for index, (gid, kind) in enumerate(gids):
            found[f"{port}/gids/{index}"] = f"{gid}\n"
            found[f"{port}/gid_attrs/types/{index}"] = f"{kind}\n"
            found[f"{port}/gid_attrs/ndevs/{index}"] = f"{netdev}\n"
        return found

    return files


@pytest.fixture
def roce():
    """Two verbs devices on the imitation of a verbs library in tests/fabric."""
    name = "tests.fabric.fake_verbs"
    if name not in sys.modules:
        path = Path(__file__).parents[2] / "fabric" / "fake_verbs.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    devices = sys.modules[name].Roce()
    yield devices
    devices.close()
