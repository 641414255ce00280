"""Where a coroutine can be struck, counted on a loop's queue or by its suspensions.

A point is the moment before a loop calls the next callback. Loops without a queue that
can be watched (uvloop) have coarser ones: the suspensions of the coroutine itself, and
the turns of the loop behind each.
"""

from __future__ import annotations

import asyncio
import collections
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator


class Callbacks(collections.deque[Any]):
    """A loop's queue of callbacks, which can be interrupted before each of them."""

    before: Callable[[], None] | None = None

    def popleft(self) -> Any:
        if self.before is not None and not self[0]._cancelled:
            self.before()
        return super().popleft()


def watched(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """Make a loop's points visible, where it has a queue."""
    if isinstance(loop, asyncio.SelectorEventLoop):
        loop._ready = Callbacks(loop._ready)
    return loop


class Striker:
    """Acts once, at one point in a task's life.

    Args:
        target: The task; without a point after its end.
        at: Which point, from 1.
        act: What to do; it may return what to do at the next point.
    """

    def __init__(
        self, target: asyncio.Future[Any], at: int, act: Callable[[], Any]
    ) -> None:
        self.target = target
        self.has_come = False
        """Whether there was such a point."""
        self.has_struck = False
        self._left = at
        self._act = act
        self._queue: Any = target.get_loop()._ready
        self._queue.before = self._on_point

    def _on_point(self) -> None:
        if self.target.done():
            self.stop()
            return
        self._left -= 1
        if self._left > 0:
            return
        self.has_come = self.has_struck = True
        then = self._act()
        if callable(then):
            self._act = then
        else:
            self.stop()

    def stop(self) -> None:
        self._queue.before = None


class Suspensions:
    """A coroutine that is struck a few turns after one of its suspensions, on any loop.

    Args:
        coroutine: What is played.
        at: Which point, from 1: each suspension counts `TURNS` times, one turn of the
            loop later each time.
        act: What to do then, unless the task has ended.
    """

    TURNS = 4

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], at: int, act: Callable[[], Any]
    ) -> None:
        self.target: asyncio.Future[Any] | None = None
        self.has_come = False
        """Whether there was such a point."""
        self.has_struck = False
        self._coroutine = coroutine
        suspension, self._turns = divmod(at - 1, self.TURNS)
        self._left = suspension + 1
        self._act = act

    async def play(self) -> Any:
        """Run the coroutine."""
        return await self

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine = self._coroutine
        error: BaseException | None = None
        value: Any = None
        while True:
            try:
                if error is None:
                    waited = coroutine.send(value)
                else:
                    waited = coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            self._left -= 1
            if self._left == 0:
                self.has_come = True
                asyncio.get_running_loop().call_soon(self._on_turn)
            error = value = None
            try:
                value = yield waited
            except BaseException as raised:  # noqa: BLE001  # passed on
                error = raised

    def stop(self) -> None:
        self._turns = 0

    def _on_turn(self) -> None:
        assert self.target is not None
        if self.target.done():
            return
        if self._turns:
            self._turns -= 1
            asyncio.get_running_loop().call_soon(self._on_turn)
            return
        self.has_struck = True
        then = self._act()
        if callable(then):
            self._act = then
            asyncio.get_running_loop().call_soon(self._on_turn)
