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
PASSING = ("negotiations", "handshakes", "connections", "transports")
"""What is held only for a connection that has not ended yet."""


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
    def idle(process: Process) -> dict[str, Any]:
        """Wait until a process has ended its last connections; gives its facts.

        The other process has seen their ends before: a picture that is taken at once
        shows what will be gone in a moment.

        Raises:
            AssertionError: Something is left when the time is over.
        """
        return _asked_until(process, _at_rest, {})

    @staticmethod
    def settled(process: Process, before: dict[str, Any]) -> dict[str, Any]:
        """Wait until a process holds what it held before; gives its facts.

        Raises:
            AssertionError: It holds something else when the time is over.
        """
        return _asked_until(process, _the_same, before["held"])


def _at_rest(held: dict[str, Any], nothing: dict[str, Any]) -> None:
    assert {name: held[name] for name in PASSING if held.get(name)} == nothing
    # A server's own is the one that takes orders; a client has no loop between them.
    assert held.get("tasks", 1) == 1


def _the_same(held: dict[str, Any], before: dict[str, Any]) -> None:
    assert held == before


def _asked_until(
    process: Process, check: Any, expected: dict[str, Any]
) -> dict[str, Any]:
    """Ask for a process's facts until they pass the check, or the time is over."""
    end = time.monotonic() + PATIENCE
    while True:
        facts: dict[str, Any] = process.ask("facts")
        try:
            check(facts["held"], expected)
        except AssertionError:
            if time.monotonic() > end:
                raise
            select.select([], [], [], 0.05)
        else:
            return facts


@pytest.fixture
def peers(tmp_path: Path):
    """Start peers; they end with the test, and must not have complained."""
    started = _load("tests.integration.conftest").Programs(tmp_path)
    yield Peers(started)
    complaints = started.clean_up()
    assert complaints == [], "\n".join(complaints)
