"""Processes under load: a server, good clients, and those who mean it no good."""

from __future__ import annotations

import importlib.util
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.conftest import Process

HERE = Path(__file__).resolve().parent
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


class Crowd:
    """Starts the processes, and waits until one holds what it held before.

    Args:
        programs: Starts programs, and ends them.
    """

    def __init__(self, programs: Any) -> None:
        self._programs = programs

    def start(self, program: str, *arguments: str, **settings: Any) -> Process:
        """Start a program of this folder.

        Args:
            program: Its name.
            arguments: Of its command line; "--traced" is for Python.
            settings: Fields of the configuration.
        """
        env = {f"PYSMC_{name.upper()}": str(one) for name, one in settings.items()}
        flags = ("-X", "tracemalloc=1") if "--traced" in arguments else ()
        rest = [one for one in arguments if one != "--traced"]
        path = HERE / "programs" / f"{program}.py"
        process: Process = self._programs.start(
            *flags, path, *rest, env=env, is_measured=False
        )
        assert process.json() == {"ready": True}
        return process

    @staticmethod
    def when(
        process: Process, is_so: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        """Wait until something is so of a process; gives its facts in any case."""
        end = time.monotonic() + PATIENCE
        facts: dict[str, Any] = process.ask("facts")
        while not is_so(facts) and time.monotonic() < end:
            select.select([], [], [], 0.05)
            facts = process.ask("facts")
        return facts

    def settled(self, process: Process, before: dict[str, Any]) -> dict[str, Any]:
        """Wait until a process holds what it held before; gives its facts.

        Raises:
            AssertionError: It holds something else when the time is over.
        """
        facts = self.when(process, lambda now: now["held"] == before["held"])
        assert facts["held"] == before["held"]
        return facts


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Crowd]:
    """Start processes; they end with the test, and must not have complained."""
    started = _load("tests.integration.conftest").Programs(tmp_path)
    yield Crowd(started)
    complaints = started.clean_up()
    assert complaints == [], "\n".join(complaints)
