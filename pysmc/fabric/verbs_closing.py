"""Queue pairs that were closed and still exist, and when the time of each is over.

Decides how long. One that was up has something to say: what was posted before its close
and the goodbye behind that, which a peer that takes nothing would hold up for ever. One
that failed rests: soft-RoCE destroys a queue pair only when none of its packets is left
in the kernel, waits for that with the interpreter held, and packets to a neighbour that
is asked for and does not answer lie in its queue until the kernel gives that up. And
one whose peer still had connections lingers when all of ours was taken: a Linux peer
that is told of the end of a link group aborts each of them on the wire, and where a try
follows the other for ever waits in ``close()`` until that was acknowledged.

Source: kernel, `neigh_timer_handler()` (mcast_solicit questions, retrans_time_ms apart:
three seconds by default) and `rxe_skb_tx_dtor()`, by which packets release theirs;
`smc_conn_kill()` and `smc_cdc_wait_pend_tx_wr()`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from pysmc.fabric.timerfd import Timer

if TYPE_CHECKING:
    from pysmc.fabric.verbs_pair import VerbsQueuePair

__all__ = ["CLOSING_MAX", "LINGER_MAX", "LINGER_SECONDS", "REST_SECONDS", "Closing"]

REST_SECONDS: Final = 4.0
"""A neighbour's three questions, and a second for timers that are late."""
LINGER_SECONDS: Final = 0.3
"""Silence after which a peer that still had connections has said all of them."""
LINGER_ASKED: Final = 2.5
"""The same behind a question, which we have no answer to any more: Linux waits two
seconds for that, and says the rest only then."""
LINGER_MAX: Final = 5.0
"""Seconds after which it may say what it likes."""
CLOSING_MAX: Final = 256
"""Queue pairs that still exist when no new one is made: each holds memory registered
that no connection is charged for, and a peer can let links fail one after the other."""


class Closing:
    """The closed queue pairs of a device, with a timer for all of them.

    Raises:
        OSError: There is no descriptor for the timer.
    """

    def __init__(self) -> None:
        self._timer = Timer()
        self._until: dict[VerbsQueuePair, float] = {}
        self._latest: dict[VerbsQueuePair, float] = {}
        """When those that linger must end."""

    def __bool__(self) -> bool:
        return bool(self._until)

    @property
    def has_room(self) -> bool:
        """Whether more may be made that will have to be closed too."""
        return len(self._until) < CLOSING_MAX

    def fileno(self) -> int:
        """Readable when `take_overdue` has something."""
        return self._timer.fileno()

    def keep(self, queue_pair: VerbsQueuePair, seconds: float) -> None:
        """Let a queue pair exist for so long from now, whatever was said before."""
        now = time.monotonic()
        self._until[queue_pair] = now + seconds
        self._set(now)

    def linger(self, queue_pair: VerbsQueuePair, *, was_asked: bool = False) -> None:
        """Let one that has said all exist until its peer is silent.

        Args:
            queue_pair: Which one; again whenever its peer has said something.
            was_asked: That was a question.
        """
        now = time.monotonic()
        latest = self._latest.setdefault(queue_pair, now + LINGER_MAX)
        silence = LINGER_ASKED if was_asked else LINGER_SECONDS
        self._until[queue_pair] = min(now + silence, latest)
        self._set(now)

    def discard(self, queue_pair: VerbsQueuePair) -> bool:
        """Forget one; tell whether it was there."""
        self._latest.pop(queue_pair, None)
        return self._until.pop(queue_pair, None) is not None

    def all(self) -> list[VerbsQueuePair]:
        """Name all of them."""
        return list(self._until)

    def is_sending(self) -> bool:
        """Tell whether any has something to say."""
        return any(not queue_pair.is_stopped for queue_pair in self._until)

    def take_overdue(self) -> list[VerbsQueuePair]:
        """Take those whose time is over."""
        now = time.monotonic()
        over = [pair for pair, until in self._until.items() if until <= now]
        for queue_pair in over:
            self.discard(queue_pair)
        self._set(now)
        return over

    def _set(self, now: float) -> None:
        if self._until:
            self._timer.set(min(self._until.values()) - now)
        else:
            self._timer.stop()

    def close(self) -> None:
        """Close the timer. Idempotent."""
        self._timer.close()
