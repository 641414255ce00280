"""Deadlines without a clock: a heap of (when, subject), with cheap changes.

Decides only which deadline is next. The time comes in as an argument, and a subject is
never None.

Reference: the waits of RFC 7609 sections 3.5 and 4.8; kernel counterpart: smc_llc.c.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Timers"]

Subject = TypeVar("Subject")


class _Entry(Generic[Subject]):
    """A place in the heap; without a subject it no longer counts."""

    __slots__ = ("serial", "subject", "when")

    def __init__(self, when: float, serial: int, subject: Subject) -> None:
        self.when = when
        self.serial = serial
        self.subject: Subject | None = subject

    def __lt__(self, other: _Entry[Subject]) -> bool:
        return (self.when, self.serial) < (other.when, other.serial)


class Timers(Generic[Subject]):
    """At most one deadline for each subject.

    A changed or cancelled deadline leaves its old place in the heap behind, without its
    subject, so that nothing which has ended is kept. Such places are dropped when they
    surface, and all at once when they outnumber the living, so that the heap stays
    within twice the number of subjects.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry[Subject]] = []
        self._living: dict[Subject, _Entry[Subject]] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._living)

    def __iter__(self) -> Iterator[Subject]:
        return iter(self._living)

    def __contains__(self, subject: Subject) -> bool:
        return subject in self._living

    def set(self, subject: Subject, when: float) -> None:
        """Give the subject this deadline, in place of one it may have."""
        self.cancel(subject)
        self._serial += 1
        entry = _Entry(when, self._serial, subject)
        self._living[subject] = entry
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._living):
            self._heap = list(self._living.values())
            heapq.heapify(self._heap)

    def cancel(self, subject: Subject) -> None:
        """Take the subject's deadline away; nothing when it has none."""
        entry = self._living.pop(subject, None)
        if entry is not None:
            entry.subject = None

    def next(self) -> float | None:
        """Tell the earliest deadline, None when there is none."""
        while self._heap:
            if self._heap[0].subject is not None:
                return self._heap[0].when
            heapq.heappop(self._heap)
        return None

    def pop_due(self, now: float) -> Subject | None:
        """Take away and give the subject whose deadline came first; None for none.

        One at a time, because what one deadline causes may cancel the next.
        """
        when = self.next()
        if when is None or when > now:
            return None
        subject = heapq.heappop(self._heap).subject
        assert subject is not None, "next() drops places without a subject"
        del self._living[subject]
        return subject
