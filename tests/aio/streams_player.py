"""Plays a script on a stream reader and notes everything that can be seen of it.

The same script on asyncio's reader and on ours must give the same notes.
"""

from __future__ import annotations

import asyncio
from typing import Any

Step = tuple[Any, ...]

SETTLED_TURNS = 6
"""Turns of the loop after which a reader that could go on has done so."""


class FakeTransport:
    """Remembers when it was paused; some cannot be."""

    def __init__(self, *, can_pause: bool) -> None:
        self.calls: list[str] = []
        self.can_pause = can_pause
        self.is_paused = False

    def __repr__(self) -> str:
        return "<FakeTransport>"

    def pause_reading(self) -> None:
        if not self.can_pause:
            raise NotImplementedError
        assert not self.is_paused
        self.is_paused = True
        self.calls.append("pause")

    def resume_reading(self) -> None:
        assert self.is_paused
        self.is_paused = False
        self.calls.append("resume")


def describe(error: BaseException) -> list[Any]:
    """Tell all that a program can see of an error."""
    facts = ("partial", "expected", "consumed")
    seen = [getattr(error, fact, None) for fact in facts]
    return [type(error).__name__, str(error), *seen]


class Player:
    """One reader, and what was asked of it.

    What the readers may do differently is left out: ``read(-1)`` is alone while it
    waits (asyncio's loses what it took when it fails), pauses are noted until somebody
    waits for a number of bytes, the connection is not lost between waking and reading,
    and who asks while another waits finds him waiting (asyncio's forgets one of two
    waiters otherwise).
    """

    def __init__(
        self, cls: type[asyncio.StreamReader], limit: int, *, can_pause: bool
    ) -> None:
        self.transport = FakeTransport(can_pause=can_pause)
        self.reader = cls(limit=limit, loop=asyncio.get_running_loop())
        self.reader.set_transport(self.transport)
        self.tasks: list[tuple[str, Any, asyncio.Task[Any]]] = []
        self.notes: list[Any] = []
        self.pauses_are_alike = True

    async def play(self, script: list[Step]) -> list[Any]:
        """Play it to its end, and read what is left."""
        for step in script:
            await self._play(*step)
            self._note_state()
        for _ in self.tasks:
            await self._play("cancel", 0)
        await self._settle()
        if not self.reader.exception():
            await self._play("eof")
            self._ask("read", 1 << 30)
            await self._settle()
        for _, _, task in self.tasks:
            task.cancel()
        await self._settle()
        return self.notes

    async def _play(self, what: str, argument: Any = None) -> None:
        if what == "settle":
            await self._settle()
        elif what in {"feed", "eof", "exception"}:
            await self._arrive(what, argument)
        elif what == "cancel" and self.tasks:
            method, asked, task = self.tasks[argument % len(self.tasks)]
            if (method, asked) != ("read", -1):
                task.cancel()
        elif (what, argument) == ("read", -1):
            if not self.tasks:
                self._ask(what, argument)
        elif what.startswith("read") and not self._somebody_waits_for_the_end():
            self._ask(what, argument)
            if len(self.tasks) > 1:
                await self._settle()

    async def _arrive(self, what: str, data: Any) -> None:
        if self.reader._eof or self.reader.exception():
            return
        if what == "feed":
            self.reader.feed_data(data)
        elif what == "eof":
            self.reader.feed_eof()
            self.pauses_are_alike = False
        else:
            await self._settle()
            self.reader.set_exception(OSError("it broke"))

    def _ask(self, method: str, argument: Any) -> None:
        ask = getattr(self.reader, method)
        asked = ask() if argument is None else ask(argument)
        self.tasks.append((method, argument, asyncio.ensure_future(asked)))

    def _somebody_waits_for_the_end(self) -> bool:
        return any((method, n) == ("read", -1) for method, n, _ in self.tasks)

    async def _settle(self) -> None:
        for _ in range(SETTLED_TURNS):
            await asyncio.sleep(0)
        for row in list(self.tasks):
            method, argument, task = row
            if not task.done():
                continue
            self.tasks.remove(row)
            if task.cancelled():
                self.notes.append([method, argument, "cancelled"])
            elif error := task.exception():
                self.notes.append([method, argument, *describe(error)])
            else:
                assert type(task.result()) is bytes
                self.notes.append([method, argument, task.result()])
        if self.tasks:
            assert not self.transport.is_paused, "what is waited for cannot come"

    def _note_state(self) -> None:
        if any(
            method == "readexactly" or (method, n) == ("read", -1)
            for method, n, _ in self.tasks
        ):
            self.pauses_are_alike = False
        if self.pauses_are_alike:
            self.notes.append(list(self.transport.calls))
        self.notes.append([self.reader.at_eof(), repr(self.reader.exception())])
        if not (self._somebody_waits_for_the_end() or self.reader.exception()):
            self.notes.append(bytes(self.reader._buffer))


def play(
    cls: type[asyncio.StreamReader],
    script: list[Step],
    limit: int,
    *,
    can_pause: bool = True,
) -> list[Any]:
    """Play a script on a reader of a class; gives what was seen."""

    async def main() -> list[Any]:
        return await Player(cls, limit, can_pause=can_pause).play(script)

    with asyncio.Runner() as runner:
        return runner.run(main())
