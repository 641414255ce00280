"""So many a second, a burst after silence, and never more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pysmc.core.rate import Rate


def test_a_second_s_worth_passes_at_once_and_one_more_does_not() -> None:
    rate = Rate(10)
    assert rate.left(5.0) == 10
    assert [rate.take(5.0) for _ in range(11)] == [True] * 10 + [False]
    assert rate.left(5.0) == 0
    assert not rate.take(5.0625)
    assert rate.take(5.125)
    assert not rate.take(5.125)


def test_silence_saves_up_one_second_and_no_more() -> None:
    rate = Rate(10)
    assert sum(rate.take(1000.0) for _ in range(30)) == 10


@given(st.integers(1, 50), st.lists(st.floats(0, 0.5), max_size=200))
def test_no_time_sees_more_than_its_share(per_second: int, steps: list[float]) -> None:
    rate, now, taken = Rate(per_second), 7.0, 0
    for step in steps:
        now += step
        taken += rate.take(now)
        assert taken <= per_second * (now - 7.0) + per_second + 1e-6


def test_more_may_be_saved_up_than_a_second_s_worth() -> None:
    rate = Rate(10, most=25)
    assert sum(rate.take(1.0) for _ in range(30)) == 25
    assert rate.left(2.0) == 10
    assert rate.left(100.0) == 25
