"""Finds pyverbs, and loads it when it is needed.

Decides where to look: on the module path, then where distributions put python3-pyverbs,
so that a virtual environment of the same Python has it too. What is loaded is called by
`pysmc.fabric.verbs_binding` alone.

Source: rdma-core, `pyverbs/CMakeLists.txt`; the packages of Debian and Fedora.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["Pyverbs", "find_pyverbs", "load"]

PLACES: Final = (
    "/usr/lib/python3/dist-packages",
    "/usr/lib64/python{0}.{1}/site-packages",
    "/usr/lib/python{0}.{1}/site-packages",
)
"""Where distributions put it."""
_LIBRARY: Final = re.compile(r"/libibverbs\.so\.1\.\d+\.([\d.]+)$", re.MULTILINE)
_MODULES: Final = ("addr", "cq", "device", "mr", "pd", "pyverbs_error", "qp", "wr")


class Pyverbs(NamedTuple):
    """Where pyverbs is, or why it cannot be used."""

    path: str
    """The package's directory, empty when it is nowhere."""
    version: str
    """Of the rdma-core that is loaded with it: "44.0"; empty when it cannot be told."""
    interpreter: str
    """This Python, as extension modules name it: "cpython-311-x86_64-linux-gnu"."""
    problem: str
    """One sentence without its full stop; empty when it can be loaded."""


def find_pyverbs() -> Pyverbs:
    """Find pyverbs, and load it to see whether it can be."""
    interpreter = importlib.machinery.EXTENSION_SUFFIXES[0].split(".")[1]
    directory = _locate()
    if directory is None:
        places = ", ".join(_places())
        problem = f"python3-pyverbs is not installed: not on the path, not in {places}"
        return Pyverbs("", "", interpreter, problem)
    built_for, wanted = _inspect(directory)
    problem = ""
    if built_for and interpreter not in built_for:
        there = ", ".join(sorted(built_for))
        problem = f"pyverbs is built for {there}, and this Python is {interpreter}"
    else:
        try:
            load(directory)
        except ImportError as exc:
            problem = _explain(exc, wanted)
    version = "" if problem else _loaded_version()
    return Pyverbs(str(directory), version, interpreter, problem)


def _places() -> list[str]:
    return [place.format(*sys.version_info) for place in PLACES]


def _locate() -> Path | None:
    loaded = sys.modules.get("pyverbs")
    spec = None if loaded is not None else importlib.util.find_spec("pyverbs")
    file = getattr(loaded, "__file__", None) if spec is None else spec.origin
    if file is not None:
        return Path(file).parent
    for place in _places():
        directory = Path(place, "pyverbs")
        if (directory / "__init__.py").exists():
            return directory
    return None


def _inspect(directory: Path) -> tuple[set[str], str]:
    """Tell for which Pythons its extensions were built, and what they want.

    That is the version of libibverbs' private symbols, which is not rdma-core's own.
    """
    built_for, wanted = set(), ""
    for file in directory.glob("device.*.so"):
        built_for.add(file.name.split(".")[1])
        with contextlib.suppress(OSError):
            found = re.search(rb"IBVERBS_PRIVATE_\d+", file.read_bytes())
            wanted = found[0].decode() if found else ""
    return built_for, wanted


def _loaded_version() -> str:
    """Tell rdma-core's version: the file of its library has it in its name."""
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        found = _LIBRARY.search(maps)
        return found[1] if found else ""
    return ""


def _explain(exc: ImportError, wanted: str) -> str:
    text = str(exc)
    if "IBVERBS_PRIVATE" in text:
        return f"pyverbs wants another libibverbs than the installed one ({wanted})"
    if "libibverbs" in text:
        return "pyverbs needs libibverbs, which is not installed"
    return f"pyverbs cannot be loaded: {text}"


def load(directory: Path) -> dict[str, Any]:
    """Import pyverbs from a directory, and nothing else from where that lies.

    Args:
        directory: The package's, as `find_pyverbs` tells it.

    Returns:
        Its modules that are used, by name.

    Raises:
        ImportError: It cannot be loaded.
    """
    if "pyverbs" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "pyverbs",
            directory / "__init__.py",
            submodule_search_locations=[str(directory)],
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["pyverbs"] = module
        spec.loader.exec_module(module)
    return {name: importlib.import_module(f"pyverbs.{name}") for name in _MODULES}
