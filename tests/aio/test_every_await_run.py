"""pysmc.run is interrupted at each of its points, as by the user's Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from typing import Any

import pytest

import pysmc
from tests.aio import every_await as harness
from tests.aio.every_await import HOST, Stage, pattern
from tests.aio.every_await_points import Callbacks, watched
from tests.aio.every_await_state import open_descriptors, own_names

pytestmark = [
    pytest.mark.slow,
    # Whose callback has not begun when the loop ends, as with TCP.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:coroutine 'BaseEventLoop:RuntimeWarning"),
]

SENT = pattern(20_000)
PACKAGES = {"ours": pysmc, "stock": asyncio}


class Interrupter:
    """Interrupts a loop before one of its callbacks, and maybe before the next too."""

    def __init__(self, at: int, times: int) -> None:
        self.left = at
        self.times = times
        self.interrupts = 0

    def watch(self, loop: Any) -> Any:
        queue: Callbacks = watched(loop)._ready
        queue.before = self._on_point
        return loop

    def _on_point(self) -> None:
        self.left -= 1
        if self.left <= 0 and self.interrupts < self.times:
            self.interrupts += 1
            signal.raise_signal(signal.SIGINT)


async def program(package: Any, arrived: bytearray) -> None:
    """Serve and visit: over SMC-R with our package, over TCP with asyncio."""

    async def on_visit(reader: Any, writer: Any) -> None:
        with contextlib.closing(writer):
            arrived.extend(await reader.read())

    async with await package.start_server(on_visit, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await package.open_connection(HOST, port)
        with contextlib.closing(writer):
            if package is pysmc:
                assert writer.get_extra_info("smc").mode == "smcr"
            writer.write(SENT)
            await writer.drain()
            writer.write_eof()
            assert await reader.read() == b""


def interrupt(name: str, at: int, times: int) -> bool:
    """Run the program as pysmc.run does; False when it ended uninterrupted."""
    seen, arrived, package = Interrupter(at, times), bytearray(), PACKAGES[name]
    make = asyncio.SelectorEventLoop if package is asyncio else pysmc.new_event_loop
    try:
        with asyncio.Runner(loop_factory=lambda: seen.watch(make())) as runner:
            # Streams of Python 3.11 report callbacks that were cancelled.
            runner.get_loop().set_exception_handler(lambda *_: None)
            runner.run(program(package, arrived))
    except KeyboardInterrupt:
        assert seen.interrupts
    except RuntimeError:
        if seen.interrupts < 2:  # the second one meets asyncio's own clean-up
            raise
    else:
        assert seen.interrupts or arrived == SENT
    assert SENT.startswith(arrived)
    return bool(seen.interrupts)


def sweep(name: str, times: int) -> tuple[int, int]:
    """Interrupt at each point.

    Returns:
        How many points there are, and how many leave something to the garbage
        collector.
    """
    gc.collect()
    before, collected = open_descriptors(), 0
    for at in range(1, 400):
        has_come = interrupt(name, at, times)
        collected += open_descriptors() != before
        gc.collect()
        assert open_descriptors() == before, f"{name}, point {at}: {own_names()}"
        if not has_come:
            return at - 1, collected
    message = "no end"
    raise AssertionError(message)


def test_interrupts() -> None:
    """No more is left to the garbage collector than with asyncio over TCP."""
    points, collected = sweep("ours", 1)
    assert points >= 40
    assert collected <= sweep("stock", 1)[1]


def test_two_interrupts() -> None:
    """The second one ends asyncio's own clean-up in the middle."""
    points, _ = sweep("ours", 2)
    assert points >= 40


def test_a_loop_works_after_an_interrupt() -> None:
    async def main() -> None:
        stage = Stage(asyncio.get_running_loop(), 0)
        await harness.prove_by_streams(stage, "smcr")
        await stage.clear()

    assert interrupt("ours", 20, 1)
    harness.run_on(pysmc.new_event_loop, main)
