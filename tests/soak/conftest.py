"""Two processes that meet over shared memory for a long time, and what they hold."""

from __future__ import annotations

import importlib.util
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Process

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "programs" / "peer.py"
PATIENCE = 30.0
"""Seconds after which what should be given back will not be."""


def _load(name: str) -> Any:
    """Load a module of another folder of tests under the name that pytest gives it."""
    if name not in sys.modules:
        path = HERE.parents[1].joinpath(*name.split(".")).with_suffix(".py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class Peers:
    """Starts the processes, and compares what they hold.

    Args:
        programs: Starts programs, and ends them.
    """

    def __init__(self, programs: Any) -> None:
        self._programs = programs

    def start(self, role: str, *arguments: str, **settings: Any) -> Process:
        """Start a peer.

        Args:
            role: "server" or "client".
            arguments: Further ones for the program.
            settings: Fields of the configuration.
        """
        env = {f"PYSMC_{name.upper()}": str(one) for name, one in settings.items()}
        flags = ("-X", "tracemalloc=1") if "--traced" in arguments else ()
        rest = [one for one in arguments if one != "--traced"]
        command = (*flags, PROGRAM, role, *rest)
        process: Process = self._programs.start(*command, env=env, is_measured=False)
        assert process.json() == {"ready": True}
        return process

    @staticmethod
    def settled(process: Process, before: dict[str, Any]) -> dict[str, Any]:
        """Wait until a process holds what it held before; gives its facts.

        Raises:
            AssertionError: It holds something else when the time is over.
        """
        end = time.monotonic() + PATIENCE
        facts = process.ask("facts")
        while facts["held"] != before["held"] and time.monotonic() < end:
            select.select([], [], [], 0.05)
            facts = process.ask("facts")
        assert facts["held"] == before["held"]
        return dict(facts)


@pytest.fixture
def peers(tmp_path: Path):
    """Start peers; they end with the test, and must not have complained."""
    started = _load("tests.integration.conftest").Programs(tmp_path)
    yield Peers(started)
    complaints = started.clean_up()
    assert complaints == [], "\n".join(complaints)
