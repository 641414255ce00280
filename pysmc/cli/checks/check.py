"""What a check of the doctor is, how checks are run, and what their verdicts add up to.

A check looks at one thing and gives a `Finding`. It is bounded in time, and whatever it
raises is a finding too: the doctor always comes to its end. A check that needs another
one is skipped unless that one passed, so that one cause gives one failure.

Knows nothing of fabrics, files or sockets: those are the checks' own business.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pysmc.cli.checks.machine import Machine

__all__ = ["Check", "Finding", "Report", "Status", "check", "examine", "verdict"]

SECONDS = 15.0
"""How long a check may take unless it says something else: much, for the first one that
loads something on a slow machine."""


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    """It works, but something will hurt."""
    FAIL = "fail"
    """What this check is about does not work."""
    SKIP = "skip"
    """It was not looked at; the detail says why."""


class Finding(NamedTuple):
    """What a check saw."""

    status: Status
    seen: str
    """What was seen, in whole sentences."""
    means: str = ""
    """What that means, if it is not what the check says in general."""
    remedy: str = ""
    """What to do, if it is not what the check says in general."""


class Check(NamedTuple):
    """One thing to look at."""

    name: str
    """``area.thing``; the areas "shm" and "verbs" are the fabrics."""
    looks_at: str
    """What is looked at, for the documentation."""
    means: str
    """What it means when it is not ok."""
    remedy: str
    """What to do then."""
    look: Callable[[Machine], Finding]
    needs: tuple[str, ...] = ()
    """Checks that have to pass (ok or warn) before this one makes sense."""
    seconds: float = SECONDS
    """After so long it counts as failed."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one check, as it is printed."""

    name: str
    status: Status
    seen: str
    """What was seen."""
    means: str
    """What it means; empty when all is well."""
    remedy: str
    """What to do; empty when there is nothing to do."""

    def as_json(self) -> dict[str, str]:
        """Give the four keys of a check in ``--json``."""
        detail = " ".join(text for text in (self.seen, self.means) if text)
        return {
            "name": self.name,
            "status": str(self.status),
            "detail": detail,
            "remedy": self.remedy,
        }


def check(
    name: str,
    *,
    looks_at: str,
    means: str,
    remedy: str,
    needs: tuple[str, ...] = (),
    seconds: float = SECONDS,
) -> Callable[[Callable[[Machine], Finding]], Check]:
    """Make a `Check` of the function below; the arguments are its fields."""

    def make(look: Callable[[Machine], Finding]) -> Check:
        return Check(name, looks_at, means, remedy, look, needs, seconds)

    return make


def ok(seen: str) -> Finding:
    """Find that all is well."""
    return Finding(Status.OK, seen)


def warn(seen: str, means: str = "", remedy: str = "") -> Finding:
    """Find something that will hurt; see `Finding` for the arguments."""
    return Finding(Status.WARN, seen, means, remedy)


def fail(seen: str, means: str = "", remedy: str = "") -> Finding:
    """Find that something does not work; see `Finding` for the arguments."""
    return Finding(Status.FAIL, seen, means, remedy)


def skip(seen: str, remedy: str = "") -> Finding:
    """Say why it was not looked at, and what to do to have it looked at."""
    return Finding(Status.SKIP, seen, remedy=remedy)


def examine(machine: Machine, checks: Iterable[Check]) -> list[Report]:
    """Run checks in their order.

    Args:
        machine: What they look at.
        checks: What a check needs has to come before it.

    Returns:
        One report a check; nothing is raised.
    """
    passed: set[str] = set()
    reports = []
    for item in checks:
        missing = [name for name in item.needs if name not in passed]
        if missing:
            finding = skip(f"Wants {', '.join(missing)} to pass first.")
        else:
            finding = _look(item, machine)
        if finding.status in {Status.OK, Status.WARN}:
            passed.add(item.name)
        reports.append(_report(item, finding))
    return reports


def _report(item: Check, finding: Finding) -> Report:
    general = finding.status in {Status.WARN, Status.FAIL}
    return Report(
        item.name,
        finding.status,
        finding.seen,
        finding.means or (item.means if general else ""),
        finding.remedy or (item.remedy if general else ""),
    )


def _look(item: Check, machine: Machine) -> Finding:
    answer: queue.SimpleQueue[Finding] = queue.SimpleQueue()

    def look() -> None:
        try:
            answer.put(item.look(machine))
        except BaseException as error:  # noqa: BLE001 - the doctor goes on
            answer.put(_broken(f"{type(error).__name__}: {error}"))

    # A thread that does not come back must not keep the process from ending.
    try:
        threading.Thread(target=look, name=item.name, daemon=True).start()
    except RuntimeError as error:  # a limit of processes
        return _broken(str(error))
    try:
        return answer.get(timeout=item.seconds)
    except queue.Empty:
        return _broken(f"no answer within {item.seconds:g} seconds")


def _broken(text: str) -> Finding:
    return fail(
        f"The check itself failed: {text}.",
        "Nothing is known about what it looks at.",
        "Report it, with the output of pysmc doctor --json.",
    )


def verdict(fabric: str, reports: Sequence[Report]) -> Status:
    """Add up the checks of a fabric.

    Returns:
        FAIL when one failed, else WARN when one warned, else OK; SKIP when nothing was
        looked at.
    """
    found = {item.status for item in reports if item.name.startswith(f"{fabric}.")}
    order = (Status.FAIL, Status.WARN, Status.OK)
    return next((status for status in order if status in found), Status.SKIP)
