"""A soak keeps its connections alive, breaks things, and ends with nothing left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pysmc.core.connection import Connection
from pysmc.core.events import News
from pysmc.core.keeper import Keeper
from pysmc.core.tuning import Tuning
from pysmc.testing.simulation import soak
from pysmc.testing.simulation.soak import Soak

if TYPE_CHECKING:
    from pysmc.testing.invariants import Watch

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.slow
def test_a_while_with_many_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "FAULT_EVERY_SECONDS", 20.0)
    monkeypatch.setattr(soak, "PAUSES_SECONDS", 20.0)
    day = Soak(3, connections=4)
    outcome = day.run(hours=0.4)
    assert outcome.problems == []
    assert outcome.seconds >= 1440.0
    assert outcome.counts["ended: complete"] > 20
    assert sum("fault: " in name for name in outcome.counts) > 10
    assert any(process.is_crashed for process in day.world.processes)
    assert all(talking.is_over for talking in day.town.talkings)


def test_who_hangs_is_noticed_within_the_hour(
    monkeypatch: pytest.MonkeyPatch, invariants: Watch
) -> None:
    """A lost wake-up: whoever waits for room in a full element waits for ever."""
    right = Connection._follow_cursors

    def wrong(self: Connection, producer: int, consumer: int) -> int:
        return right(self, producer, consumer) & ~News.SPACE

    monkeypatch.setattr(Connection, "_follow_cursors", wrong)
    monkeypatch.setattr(soak, "FAULT_EVERY_SECONDS", 1e9)
    day = Soak(3, connections=8)
    for process in day.town.processes:
        process.driver.open()
        process.driver.endpoint.tuning = Tuning(element_bytes=64)
    outcome = day.run(hours=1.0)
    assert any("its patience was over" in problem for problem in outcome.problems)
    invariants.take()


def test_what_a_soak_leaves_is_noticed(
    monkeypatch: pytest.MonkeyPatch, invariants: Watch
) -> None:
    right = Keeper.leave

    def wrong(self: Keeper, group: object, now: float) -> None:
        right(self, group, now)  # type: ignore[arg-type]
        self._context.timers.cancel(("idle", group))

    monkeypatch.setattr(Keeper, "leave", wrong)
    monkeypatch.setattr(soak, "FAULT_EVERY_SECONDS", 1e9)
    monkeypatch.setattr(soak, "PAUSES_SECONDS", 1.0)
    outcome = Soak(3, connections=2).run(hours=0.02)
    assert any("groups are left" in problem for problem in outcome.problems)
    invariants.take()
