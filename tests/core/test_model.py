"""Two cores against a queue of bytes, in whatever order things happen."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from pysmc.testing.machines import TwoCores


@pytest.mark.parametrize("newest_only", [False, True], ids=["every", "newest"])
@pytest.mark.parametrize("publish_later", [False, True], ids=["at once", "later"])
def test_two_cores_and_a_queue_of_bytes(newest_only: bool, publish_later: bool) -> None:
    class Machine(TwoCores):
        pass

    Machine.newest_only = newest_only
    Machine.publish_later = publish_later
    run_state_machine_as_test(
        Machine,
        settings=settings(
            stateful_step_count=25, deadline=None, report_multiple_bugs=False
        ),
    )
