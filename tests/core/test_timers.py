"""Deadlines: which is next, and that nothing which has ended is kept."""

from __future__ import annotations

import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysmc.core.timers import Timers


class Subject:
    """Something that has a deadline."""


def test_the_earliest_is_next_and_the_first_set_wins_a_tie() -> None:
    timers: Timers[str] = Timers()
    assert timers.next() is None
    timers.set("late", 5.0)
    timers.set("tie b", 2.0)
    timers.set("tie a", 2.0)
    assert timers.next() == 2.0
    assert timers.pop_due(1.9) is None
    assert [timers.pop_due(9.0) for _ in range(4)] == ["tie b", "tie a", "late", None]
    assert len(timers) == 0


def test_a_new_deadline_replaces_the_old_one() -> None:
    timers: Timers[str] = Timers()
    timers.set("x", 1.0)
    timers.set("x", 3.0)
    assert (timers.next(), len(timers), list(timers)) == (3.0, 1, ["x"])
    assert timers.pop_due(2.0) is None
    timers.cancel("x")
    timers.cancel("x")
    assert "x" not in timers
    assert timers.next() is None


def test_what_one_deadline_causes_may_cancel_the_next() -> None:
    timers: Timers[str] = Timers()
    timers.set("first", 1.0)
    timers.set("second", 1.0)
    assert timers.pop_due(1.0) == "first"
    timers.cancel("second")
    assert timers.pop_due(1.0) is None


@pytest.mark.parametrize("end", ["cancel", "replace", "due"])
def test_a_subject_that_has_ended_is_not_kept(end: str) -> None:
    timers: Timers[object] = Timers()
    keeper, subject = Subject(), Subject()
    timers.set(keeper, 0.5)
    timers.set(subject, 1.0)
    if end == "replace":
        timers.set(subject, 2.0)
    if end == "due":
        assert [timers.pop_due(1.0) for _ in range(2)] == [keeper, subject]
    timers.cancel(subject)
    gone = [weakref.ref(subject)]
    del subject
    assert [left() for left in gone] == [None]


def test_the_heap_does_not_grow_with_changes() -> None:
    timers: Timers[int] = Timers()
    for number in range(10_000):
        timers.set(number % 7, float(number))
    assert len(timers) == 7
    assert len(timers._heap) <= 65


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.one_of(st.none(), st.floats(0, 100))),
        max_size=200,
    )
)
def test_like_a_dictionary_that_is_sorted(
    changes: list[tuple[int, float | None]],
) -> None:
    timers: Timers[int] = Timers()
    model: dict[int, float] = {}
    for subject, when in changes:
        if when is None:
            timers.cancel(subject)
            model.pop(subject, None)
        else:
            timers.set(subject, when)
            model[subject] = when
        assert timers.next() == min(model.values(), default=None)
    popped = []
    while (subject_due := timers.pop_due(1000.0)) is not None:
        popped.append(model.pop(subject_due))
    assert popped == sorted(popped)
    assert not model
