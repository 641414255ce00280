"""Streams are struck at each of their points, on every kind of loop."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import uvloop

import pysmc
from tests.aio import every_await as harness
from tests.aio.every_await import HOST, Scene, Stage, Visit, pattern

if TYPE_CHECKING:
    from collections.abc import Coroutine

pytestmark = pytest.mark.slow

LOOPS = {
    "pysmc": pysmc.new_event_loop,
    "stock": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
BIG = 3_000_000
"""More bytes than both ends' buffers hold."""
ANSWER = pattern(50_000).replace(b"\n", b"-") + b"\n"
PIECES = 4


class OnStreams(Scene):
    """Something that goes on between two streams."""

    async def prove(self, stage: Stage) -> None:
        await harness.prove_by_streams(stage, "smcr")


class Open(OnStreams):
    """open_connection."""

    async def prepare(self, stage: Stage) -> None:
        self.port = await stage.serve_streams()

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return self._open(stage)

    async def _open(self, stage: Stage) -> None:
        # No point lies between the two.
        streams = await pysmc.open_connection(HOST, self.port)
        stage.near.append(Visit(*streams))


class StartServer(OnStreams):
    """start_server; whoever is cancelled finds neither listener nor beacon."""

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return self._start(stage)

    async def _start(self, stage: Stage) -> None:
        server = await pysmc.start_server(lambda *_: None, HOST, 0)
        stage.servers.append(server)


class Connected(OnStreams):
    """A coroutine of one end while the other answers; derive."""

    async def prepare(self, stage: Stage) -> None:
        port = await stage.serve_streams(self.serve)
        self.visit = Visit(*await pysmc.open_connection(HOST, port))
        assert self.visit.writer.get_extra_info("smc").mode == "smcr"
        stage.near.append(self.visit)
        await harness.until(lambda: stage.far, lambda: "nobody came")

    async def serve(self, visit: Visit) -> None:
        """Answer in pieces, in a turn each."""
        await visit.reader.readexactly(1)
        step = len(ANSWER) // PIECES + 1
        for start in range(0, len(ANSWER), step):
            visit.writer.write(ANSWER[start : start + step])
            await asyncio.sleep(0)
        await self.finish(visit)

    async def finish(self, visit: Visit) -> None:
        await visit.reader.read()


class Reading(Connected):
    """Derive with the method of the reader that reads the answer."""

    loses = False
    """Whether asyncio's reader loses what was read when it is cancelled."""

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        self.visit.writer.write(b"?")
        self.got = b""
        return self._read()

    async def _read(self) -> None:
        self.got = await self.read(self.visit.reader)

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        raise NotImplementedError

    async def check(self, stage: Stage, strike: str) -> None:
        if strike in {*harness.BY_TASK, "", "stop the loop"}:
            # A read that was cancelled has lost nothing: what is left follows.
            async with asyncio.timeout(harness.PATIENCE):
                while len(self.got) < len(ANSWER):
                    more = await self.visit.reader.read(100_000)
                    assert more
                    self.got += more
            assert self.got == ANSWER
        else:
            assert ANSWER.startswith(self.got)


class ReadExactly(Reading):
    async def read(self, reader: asyncio.StreamReader) -> bytes:
        return await reader.readexactly(len(ANSWER))


class ReadUntil(Reading):
    async def read(self, reader: asyncio.StreamReader) -> bytes:
        return await reader.readuntil(ANSWER[-10:])


class ReadLine(Reading):
    async def read(self, reader: asyncio.StreamReader) -> bytes:
        return await reader.readline()


class Read(Reading):
    async def read(self, reader: asyncio.StreamReader) -> bytes:
        return await reader.read(len(ANSWER))


class ReadAll(Reading):
    async def finish(self, visit: Visit) -> None:
        visit.writer.close()

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        return await reader.read()


class Sending(Connected):
    """Derive with something that waits until the peer has read much."""

    async def serve(self, visit: Visit) -> None:
        self.arrived = 0
        while data := await visit.reader.read(1_000_000):
            assert data == pattern(len(data), self.arrived)
            self.arrived += len(data)


class Drain(Sending):
    """drain."""

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return self._send()

    async def _send(self) -> None:
        self.visit.writer.write(pattern(BIG))
        await self.visit.writer.drain()

    async def check(self, stage: Stage, strike: str) -> None:
        if strike in {*harness.BY_TASK, "", "stop the loop"}:
            if not strike:
                assert not self.visit.transport.is_closing()
            await self.visit.leave()
            await harness.until(
                lambda: all(v.is_over for v in stage.far), lambda: "not over"
            )
            assert self.arrived in {0, BIG}


class WaitClosed(Sending):
    """wait_closed, behind bytes that the peer has not read."""

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        self.visit.writer.write(pattern(BIG))
        self.visit.writer.close()
        return self.visit.writer.wait_closed()


class Callback(Connected):
    """The server's callback; what is near to it is far from the connecting end."""

    async def prepare(self, stage: Stage) -> None:
        await super().prepare(stage)
        stage.near, stage.far = stage.far, stage.near
        await harness.until(lambda: self.task, lambda: "not called")

    task: asyncio.Task[Any] | None = None

    async def serve(self, visit: Visit) -> None:
        self.task = asyncio.current_task()
        await super().serve(visit)

    def play(self, stage: Stage) -> asyncio.Task[Any]:
        self.visit.writer.write(b"?" + pattern(2000))
        assert self.task is not None
        return self.task

    async def finish(self, visit: Visit) -> None:
        await visit.writer.drain()

    async def check(self, stage: Stage, strike: str) -> None:
        """The connecting end gets the beginning of the answer, then an end."""
        got = b""
        async with asyncio.timeout(harness.PATIENCE):
            with contextlib.suppress(OSError):
                while more := await self.visit.reader.read(100_000):
                    got += more
        assert ANSWER.startswith(got)
        assert strike or got == ANSWER
        await self.visit.leave()


class Least(NamedTuple):
    """How many points a scene has at least, by kind of loop."""

    scene: type[OnStreams]
    pysmc: int
    stock: int
    uvloop: int
    """0 where there is none, or none that can be seen: a callback has a task of its
    own."""


SCENES = {
    "open_connection": Least(Open, 17, 17, 16),
    "start_server": Least(StartServer, 4, 3, 0),
    "readexactly": Least(ReadExactly, 8, 8, 4),
    "readuntil": Least(ReadUntil, 8, 8, 4),
    "readline": Least(ReadLine, 6, 6, 4),
    "read": Least(Read, 6, 6, 4),
    "read all": Least(ReadAll, 10, 10, 4),
    "drain": Least(Drain, 10, 10, 4),
    "wait_closed": Least(WaitClosed, 12, 12, 4),
    "callback": Least(Callback, 5, 5, 0),
}
STRIKES = [*harness.BY_TASK, *harness.BY_PEER, "close", "abort", "stop the loop"]
FEW = ["cancel", "peer aborts", "close"]
"""On the loops whose transports and readers are the same."""
CASES = [
    (loop, scene, strike)
    for loop in LOOPS
    for scene in SCENES
    if getattr(SCENES[scene], loop)
    for strike in (STRIKES if loop == "pysmc" or scene == "open_connection" else FEW)
]


@pytest.mark.parametrize(("loop", "scene", "strike"), CASES)
def test_streams(loop, scene, strike) -> None:
    row = SCENES[scene]

    async def main() -> int:
        stage = Stage(asyncio.get_running_loop(), 0)
        await harness.prove_by_streams(stage, "smcr")
        await stage.clear()
        return await harness.strike_everywhere(row.scene(), strike)

    points = harness.run_on(LOOPS[loop], main)
    assert points >= getattr(row, loop)


def test_the_cases_are_many() -> None:
    assert len(CASES) >= 160
