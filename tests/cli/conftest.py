"""The command line as a newcomer meets it: real processes, exit codes, both outputs."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _load(name: str) -> None:
    """Load a helper under the name that test modules import."""
    qualified = f"tests.cli.{name}"
    if qualified not in sys.modules:
        path = Path(__file__).resolve().parent / f"{name}.py"
        spec = importlib.util.spec_from_file_location(qualified, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)


_load("smc_peer")

from tests.cli.smc_peer import Peer  # noqa: E402  # loaded just now

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


@pytest.fixture
def serve() -> Iterator[Callable[..., Peer]]:
    """Start a peer that does something with its connection.

    What it sends as an answer may be a message, bytes, or a function.
    """
    peers: list[Peer] = []

    def start(answer: Any = None, family: int = socket.AF_INET) -> Peer:
        def act(sock: socket.socket) -> None:
            if answer is None:
                return
            if callable(answer):
                answer(peer, sock)
                return
            peer.propose(sock)
            sock.sendall(answer if isinstance(answer, bytes) else answer.build())

        peer = Peer(family, act)
        peers.append(peer)
        return peer

    yield start
    for peer in peers:
        peer.close()
