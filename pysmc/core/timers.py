"""Deadlines without a clock: a heap of (when, subject), with cheap changes.

Decides only which deadline is next. The time comes in as an argument.

Reference: the waits of RFC 7609 sections 3.5 and 4.8; kernel counterpart: smc_llc.c.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Timers"]

Subject = TypeVar("Subject")


class Timers(Generic[Subject]):
    """At most one deadline for each subject.

    A changed or cancelled deadline leaves its old heap entry behind; entries that no
    longer count are dropped when they surface, and all at once when they outnumber the
    living, so that the heap stays within twice the number of subjects.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Subject]] = []
        self._living: dict[Subject, tuple[float, int]] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._living)

    def __iter__(self) -> Iterator[Subject]:
        return iter(self._living)

    def __contains__(self, subject: Subject) -> bool:
        return subject in self._living

    def set(self, subject: Subject, when: float) -> None:
        """Give the subject this deadline, in place of one it may have."""
        self._serial += 1
        self._living[subject] = (when, self._serial)
        heapq.heappush(self._heap, (when, self._serial, subject))
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._living):
            self._heap = [
                (when, serial, subject)
                for subject, (when, serial) in self._living.items()
            ]
            heapq.heapify(self._heap)

    def cancel(self, subject: Subject) -> None:
        """Take the subject's deadline away; nothing when it has none."""
        self._living.pop(subject, None)

    def next(self) -> float | None:
        """Tell the earliest deadline, None when there is none."""
        while self._heap:
            when, serial, subject = self._heap[0]
            if self._living.get(subject) == (when, serial):
                return when
            heapq.heappop(self._heap)
        return None

    def pop_due(self, now: float) -> Subject | None:
        """Take away and give the subject whose deadline came first; None for none.

        One at a time, because what one deadline causes may cancel the next.
        """
        when = self.next()
        if when is None or when > now:
            return None
        subject = heapq.heappop(self._heap)[2]
        del self._living[subject]
        return subject
