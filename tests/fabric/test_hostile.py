"""Hostile processes against a victim that serves a well-behaved peer at the same time.

No crash, no hang, nothing that stays, and no byte in a stream where it does not belong.
A seed reproduces its attack: ``pytest tests/fabric/test_hostile.py --long --first SEED
--count 1``.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fabric.hostile_lies import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 40.0
"""Seconds without an answer after which a process hangs."""
PATIENCE_WITH_BROKEN = 10.0
"""The same where a hang is what has to be found out."""
SETTLED_WITHIN = 10.0
"""Seconds in which the victim has to be at rest after its peer's end."""


class Program:
    """One of the programs, and the lines that go to and fro."""

    def __init__(self, patience: float, name: str, *arguments: str) -> None:
        self._patience = patience
        command = [sys.executable, "-X", "faulthandler", "-m", f"tests.fabric.{name}"]
        given = os.environ.get("PYTHONPATH", "")
        paths = os.pathsep.join((str(ROOT), str(ROOT / "proto"), given))
        self._process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
            cwd=ROOT,
        )
        self._pending = b""

    def order(self, **order: Any) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for a line.

        Raises:
            AssertionError: None came, because the program hangs or has ended.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            readable, _, _ = select.select([descriptor], [], [], self._patience)
            assert readable, "the program hangs"
            data = os.read(descriptor, 65536)
            assert data, f"the program ended with {self._process.wait()}"
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send a line and wait for one."""
        self.order(**order)
        return self.answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


class Arena:
    """The victim, the steady peer and whoever attacks."""

    def __init__(self, broken: str = "") -> None:
        self.lies: Counter[str] = Counter()
        """Of each kind, since the beginning."""
        self.programs: list[Program] = []
        self._patience = PATIENCE_WITH_BROKEN if broken else PATIENCE
        try:
            self._begin(broken)
        except BaseException:
            self.close()
            raise

    def _begin(self, broken: str) -> None:
        self.victim = self._start("hostile_victim", "victim", broken)
        facts = self.victim.answer()
        self.steady = self._start("hostile_victim", "steady", str(facts["steady"]))
        assert self.steady.answer() == {"mode": "smcr"}
        self.forge = self._start("hostile_peer", str(facts["hostile"]), facts["door"])
        self._steady_goes_on()
        assert self.victim.ask(do="remember")["links"] == 1

    def _start(self, *arguments: str) -> Program:
        program = Program(self._patience, *arguments)
        self.programs.append(program)
        return program

    def _steady_goes_on(self) -> int:
        beat = self.steady.ask(do="beat")
        assert "broken" not in beat, beat
        return int(beat["bytes"])

    def attack(self, seed: int) -> tuple[list[str], Counter[str]]:
        """Run one attack; tell what went wrong, and what was counted."""
        self.steady.order(do="beat")
        self.forge.order(seed=seed)
        wrong: list[str] = []
        report: dict[str, Any] = {}
        while True:
            answer = self.forge.answer()
            if "end" in answer:
                break
            if "stopped" in answer:
                wrong += self._while_stopped()
                self.forge.order(then="resume" if seed % 2 else "kill")
                report["resumed"] = bool(seed % 2)
            elif "complaint" in answer:
                wrong.append(answer["complaint"])
            else:
                report |= answer
        assert "broken" not in self.steady.answer()
        self._steady_goes_on()
        rest = self.victim.ask(do="settle", within=SETTLED_WITHIN)
        wrong += rest["complaints"]
        marks = [one["mark"] for one in rest["ended"] if one["mark"]]
        if len(marks) != len(set(marks)):
            wrong.append(f"two connections got bytes of one: {marks}")
        wrong += _judge(report, rest["ended"])
        counts = Counter(attacks=1, lies=report.get("lies", 0))
        self.lies[report["kind"]] += counts["lies"]
        counts[f"kind {report['kind']}"] += 1
        for one in rest["ended"]:
            counts[f"connections {one['mode']}"] += 1
            counts["bytes from hostile peers"] += one["received"]
        if report.get("crashed"):
            wrong.append(f"the attacker crashed: {report['crashed']}")
        return [f"seed {seed} ({report['kind']}): {text}" for text in wrong], counts

    def _while_stopped(self) -> list[str]:
        """A stopped peer is idle, and no more: others go on, and it stays connected."""
        before = self.victim.ask(do="look")["open"]
        self._steady_goes_on()
        self._steady_goes_on()
        after = self.victim.ask(do="look")["open"]
        # A handshake that was all but over may end well meanwhile.
        return [] if before <= after else [f"{before} connections, then {after}"]

    def close(self) -> None:
        """End all programs."""
        for program in self.programs:
            program.close()


def _judge(report: dict[str, Any], ended: list[dict[str, Any]]) -> list[str]:
    """An honest peer's streams must have arrived, whole and right."""
    if not report.get("honest") or report.get("resumed") is False:
        return []
    written = {int(mark): count for mark, count in report["written"].items()}
    got = {one["mark"]: one for one in ended}
    wrong = [f"stream {mark} is missing" for mark in written if mark not in got]
    wrong += [
        f"stream {mark} is of an earlier attack" for mark in got.keys() - written.keys()
    ]
    for mark in got.keys() & written.keys():
        expected = {"received": written[mark], "wrong_at": -1, "error": ""}
        found = {name: got[mark][name] for name in expected}
        if found != expected:
            wrong.append(f"stream {mark}: {found} in place of {expected}")
    return wrong


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    """A victim that lives through all attacks."""
    made = Arena()
    yield made
    made.close()


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_hostile_peers(long_run: Callable[..., Any], arena: Arena) -> None:
    with long_run("hostile-shm", small=500, full=10_000) as run:
        for seed in run.seeds():
            wrong, counts = arena.attack(seed)
            run.add(**counts)
            for text in wrong:
                run.fail(text)
        idle = [kind for kind, lies in arena.lies.items() if not lies]
        if run.count >= 500 and idle:
            run.fail(f"kinds that never came to their lies: {idle}")


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("broken", "kind", "says"),
    [
        ("seals", "descriptors_of_a_hello", "the steady connection ended"),
        ("offsets", "scribble_over_everything", "bytes of others"),
        ("queue", "queue_of_the_victim", "the program hangs|RuleBroken"),
        ("positions", "whole_truth", "wrong_at"),
    ],
)
def test_a_victim_that_is_broken_is_found_out(
    broken: str, kind: str, says: str
) -> None:
    arena = Arena(broken)
    try:
        first = list(KINDS).index(kind)
        found: list[str] = []
        # Whether memory is touched before it is truncated is a race, so that the same
        # lie has to be told more than once.
        seeds = [*range(first, 3 * len(KINDS), len(KINDS))] * 15
        for seed in (*seeds, *range(first, 40 * len(KINDS), len(KINDS))):
            try:
                wrong, _ = arena.attack(seed)
            except AssertionError as exc:
                wrong = [str(exc)]
            found += wrong
            if found:
                break
        assert any(re.search(says, text) for text in found), found
    finally:
        arena.close()
