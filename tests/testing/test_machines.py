"""The public state machine: it finds what it is there to find."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from pysmc.core.connection import Connection
from pysmc.testing.machines import PERIOD, TwoCores, stream

if TYPE_CHECKING:
    from pysmc.testing.pair import CorePair


def test_the_stream_is_coded_by_position() -> None:
    assert stream(0, 5, 3) == stream(0, 0, 8)[5:]
    assert stream(0, PERIOD + 5, 3) == stream(0, 5, 3)
    assert stream(0, 5, 300) != stream(1, 5, 300)
    assert stream(0, 5, 300) != stream(0, 6, 300)


def test_other_pairs_can_be_put_in() -> None:
    made = []

    class Counted(TwoCores):
        def make_pair(self) -> CorePair:
            made.append(super().make_pair())
            return made[-1]

    few = settings(max_examples=3, stateful_step_count=5, deadline=None)
    run_state_machine_as_test(Counted, settings=few)
    assert len(made) >= 3


def test_it_sees_a_byte_that_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    consume = Connection.consume

    def forgetful(self: Connection, count: int) -> bool:
        return consume(self, count - (count > 1000))

    monkeypatch.setattr(Connection, "consume", forgetful)
    quick = settings(
        max_examples=200,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(TwoCores, settings=quick)
