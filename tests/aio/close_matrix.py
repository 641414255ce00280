"""Plays one scenario of two ends that end a connection, over TCP or over SMC-R.

`Stage` tells two players (`close_matrix_player`) in turn what to do, and gives what
their protocols were told. Plain TCP's answer is the one to be had.
"""

from __future__ import annotations

import gc
import itertools
import json
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tests.aio.close_matrix_player import Player

if TYPE_CHECKING:
    import asyncio

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0

ACTIONS = (
    "close",
    "abort",
    "write_eof",
    "write_eof + close",
    "cancel",
    "drop the last reference",
    "process exit",
)
SITUATIONS = ("idle", "unread data", "unsent data", "blocked writer", "mid-handshake")
CALM_ROUNDS = 3
"""Rounds in which nothing moved, after which nothing will."""
ROUNDS = 2000


class Cell(NamedTuple):
    """One scenario: the end that acts first, the other, and what is going on."""

    one: str
    other: str
    situation: str

    def __str__(self) -> str:
        return f"{self.situation}: {self.one}, then {self.other}"


CELLS = tuple(
    Cell(one, other, situation)
    for situation, one, other in itertools.product(SITUATIONS, ACTIONS, ACTIONS)
)


class Told(NamedTuple):
    """What the two protocols were told."""

    one: tuple[str, ...]
    other: tuple[str, ...]
    carriers: tuple[str, str] = ("", "")
    """What carried it at either end; nothing where it was never made."""

    def __str__(self) -> str:
        return f"one: {', '.join(self.one)}\nother: {', '.join(self.other)}"


LATE = "mid-handshake, in CLC"
LATE_CELLS = tuple(
    Cell(one, other, LATE)
    for one in ("cancel", "drop the last reference", "process exit")
    for other in ACTIONS
)
"""In the matrix these three act before the server has confirmed; here after it."""


class Remote:
    """A player in its own process."""

    def __init__(self, stage: Stage, carrier: str, role: str, cell: Cell) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(stage.control, [b"fork"], [theirs.fileno()])
            self._pid = int(stage.control.recv(64))
        self._stage = stage
        ours.settimeout(PATIENCE)
        self._lines = ours.makefile("rw")
        ours.close()
        self.report: list[str] | None = None
        self.carrier = ""
        action = cell.one if role == "one" else cell.other
        self._send(
            {
                "role": role,
                "action": action,
                "situation": cell.situation,
                "carrier": carrier,
            }
        )

    def _send(self, what: Any) -> None:
        self._lines.write(json.dumps(what) + "\n")
        self._lines.flush()

    @property
    def is_gone(self) -> bool:
        return self.report is not None

    def tell(self, command: str, *args: Any) -> None:
        """Give a command without waiting for its answer."""
        if not self.is_gone:
            self._send([command, *args])

    def answer(self) -> Any:
        """Wait for the answer; None from a process that has ended."""
        if self.is_gone:
            return None
        line = self._lines.readline()
        assert line, "the player died"
        kind, answer = json.loads(line)
        assert kind != "failed", answer
        if kind == "bye":
            self.report, self.carrier = answer
            self._leave()
            return None
        return answer

    def ask(self, command: str, *args: Any) -> Any:
        """Give a command and wait for its answer."""
        self.tell(command, *args)
        return self.answer()

    def end(self) -> tuple[str, ...]:
        """End the process; gives its report."""
        if self.report is None:
            self.report, self.carrier = self.ask("report"), self.ask("carrier")
            self._lines.close()
            self._leave()
        return tuple(self.report or ())

    def _leave(self) -> None:
        """Wait for the end of the process: then the kernel has closed what it had."""
        self._stage.control.send(str(self._pid).encode())
        assert self._stage.control.recv(64) == b"0", "the player ended badly"
        self._lines.close()


class Local:
    """A player in this process, on a loop that it shares with the other one."""

    def __init__(self, player: Player) -> None:
        self._player = player
        self._told: list[tuple[Any, ...]] = []

    @property
    def carrier(self) -> str:
        return self._player.mode

    def tell(self, *command: Any) -> None:
        """Keep a command until its answer is wanted."""
        self._told.append(command)

    def answer(self) -> Any:
        """Carry the command out."""
        return self.ask(*self._told.pop())

    def ask(self, command: str, *args: Any) -> Any:
        """Carry a command out."""
        return getattr(self._player, command)(*args)

    def end(self) -> tuple[str, ...]:
        """Give the report."""
        return tuple(self._player.report())


def play_here(cell: Cell, loop: asyncio.AbstractEventLoop) -> Told:
    """Play one cell with both ends on one loop, which is closed afterwards.

    Neither end can be held while the other moves, and neither can exit.
    """
    plan = {"situation": cell.situation}
    one = Player(loop, {**plan, "role": "one", "action": cell.one})
    other = Player(loop, {**plan, "role": "other", "action": cell.other})

    def note(text: Any, *_: Any) -> None:
        for player in (one, other):
            if f" fd={player.fileno} " in str(text):
                player.on_warning(text, ResourceWarning)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        gc.freeze()
        try:
            return _perform(cell, "", Local(one), Local(other))
        finally:
            other.server.close()
            loop.close()
            one.forget()
            other.forget()
            gc.collect()
            gc.unfreeze()


class Stage:
    """Owns the process that the players are forked from."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(PATIENCE)
        with theirs:
            self._mother = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.aio.close_matrix_player",
                    str(theirs.fileno()),
                ],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.control.close()
        self._mother.wait(PATIENCE)

    def play(self, cell: Cell, carrier: str) -> Told:
        """Play one cell over "tcp" or "smcr"."""
        one = Remote(self, carrier, "one", cell)
        other = Remote(self, carrier, "other", cell)
        return _perform(cell, carrier, one, other)


def _perform(cell: Cell, carrier: str, one: Any, other: Any) -> Told:
    ends = (one, other)
    port = other.ask("listen")
    if cell.situation.startswith("mid-handshake"):
        _begin_early(cell, carrier, one, other, port)
    else:
        one.ask("connect", port)
        for end in ends:
            end.tell("until_made")
        for end in ends:
            end.answer()
        for end in (other, one):
            end.ask("prepare")
    _settle(ends)
    for end in ends:
        end.ask("act")
        _settle(ends)
    for command in ("resume", "finish"):
        for end in ends:
            end.ask(command)
        _settle(ends)
    return Told(one.end(), other.end(), (one.carrier, other.carrier))


def _begin_early(cell: Cell, carrier: str, one: Any, other: Any, port: int) -> None:
    """Let both act while the other end has not finished."""
    acts_unmade = cell.one in {"cancel", "drop the last reference", "process exit"}
    if carrier == "tcp" and acts_unmade:
        one.ask("hold")
    one.ask("connect", port)
    one.ask("turn")
    if acts_unmade:
        if carrier == "smcr" and cell.situation == LATE:
            for _ in range(ROUNDS):
                if other.ask("is_in_clc"):
                    break
                other.ask("turn", 1)
                one.ask("turn", 1)
        assert not one.ask("is_made")
        one.ask("act")
        one.ask("release")
    else:
        for _ in range(ROUNDS):
            if one.ask("is_made"):
                break
            other.ask("turn", 1)
            one.ask("turn", 3)
        assert one.ask("is_made")
    assert not other.ask("is_made"), "the other end was to be held"
    other.ask("act")


def _settle(ends: tuple[Any, Any]) -> None:
    """Let both have turns until nothing moves any more."""
    before: Any = None
    calm = 0
    for _ in range(ROUNDS):
        now = [end.ask("turn") for end in ends]
        calm = calm + 1 if now == before else 0
        if calm == CALM_ROUNDS:
            for end in ends:
                end.ask("collect")
            return
        before = now
    raise AssertionError(f"this never ends: {before}")
