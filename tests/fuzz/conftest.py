"""Makes the modules of this folder importable, and finds out about atheris."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# In the order in which they import each other.
MODULES = (
    "target",
    "wire_checker",
    "kit",
    "targets_wire",
    "in_path",
    "targets_core",
    "targets_shm",
    "targets_transport",
)


def _load(name: str) -> None:
    """Load a helper that lies beside, under the name that others import."""
    qualified = f"tests.fuzz.{name}"
    if qualified not in sys.modules:
        path = Path(__file__).with_name(f"{name}.py")
        spec = importlib.util.spec_from_file_location(qualified, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)


for each in MODULES:
    _load(each)
