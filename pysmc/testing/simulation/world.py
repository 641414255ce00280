"""The world of a simulation: one clock, one seed, and what happens next.

Decides, by its seed alone, which of the things that can happen does: a turn of one
process's loop, a delivery of the fabric, an arrival on TCP. When nothing can, the clock
jumps to the next timer or arrival. When there is none either, and somebody still waits,
it is `Stuck`: a deadlock, found at once.

The same seed and the same program give the same `World.trace`. The program must not
depend on what Python does not promise: on the order of a set of objects, on ``id``, on
the real time, or on when the cyclic garbage collector runs (it does not, inside `run`).

Source: RFC 7609 sections 3 and 4 for what is simulated; the asyncio documentation for
what a loop may do.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import zlib
from typing import TYPE_CHECKING, Any

from pysmc.aio.devices import CODEC
from pysmc.config import Config
from pysmc.fabric.sim import SimNetwork
from pysmc.testing.simulation.process import Process
from pysmc.testing.simulation.tcp import TcpNetwork

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

__all__ = ["Stuck", "TooManySteps", "World"]

STEPS_MAX = 1_000_000
"""Steps of one `World.run`, unless it is told another number."""
ERRORS_MAX = 100
"""Reports of loops that are kept."""
COLLECT_EVERY = 200_000
"""Steps after which garbage is collected: at the same points of every run."""
STEPS_OF_AN_END = 10_000
SECONDS_OF_AN_END = 60.0
"""What the tasks of a world get to end in, after they were cancelled."""


class Stuck(RuntimeError):  # a state, which is not always a fault
    """Tasks wait, and nothing can ever happen."""


class TooManySteps(RuntimeError):
    """A run has used up its steps: somebody never rests."""


class World:
    """A world: processes, a fabric, TCP, and the order of what happens.

    Args:
        seed: Decides every choice.
        shuffle: Whether the order of what may happen at once is the seed's; otherwise
            it is always the same.
        newest_only: How the fabric treats updates, see `pysmc.fabric.sim`; None lets
            the seed decide.
        trace: Whether to write down what happens.
        check_every: Steps after which all invariants of the core are checked, 0 for
            never.
    """

    def __init__(
        self,
        seed: int,
        *,
        shuffle: bool = True,
        newest_only: bool | None = None,
        trace: bool = True,
        check_every: int = 1,
    ) -> None:
        self.seed = seed
        self.now = 0.0
        """Seconds since the beginning."""
        self.steps = 0
        """Steps made so far."""
        self.is_shuffling = shuffle
        self.is_tracing = trace
        self.check_every = check_every
        self.trace: list[str] = []
        """What happened, a line each: time, where, what."""
        self.errors: list[str] = []
        """What loops reported to their exception handlers."""
        self.error: BaseException | None = None
        """The first exception among these."""
        self.processes: list[Process] = []
        self.rng = self.stream("workload")
        """For the program of the test; nothing else draws from it."""
        self._schedule = self.stream("schedule")
        self.chance = self._schedule.random
        """The scheduler's own choices, from 0 to 1."""
        fabric = self.stream("fabric")
        if newest_only is None:
            newest_only = fabric.random() < 0.5
        self.network = SimNetwork(
            fabric.getrandbits(32), codec=CODEC, newest_only=newest_only
        )
        self.tcp = TcpNetwork(
            lambda: self.now, self.stream("tcp"), self.note, is_tracing=trace
        )
        self.network.trace = self.trace
        self.network.tracing = trace
        self.is_closed = False
        """Whether `close` was called."""

    def __repr__(self) -> str:
        return f"<World {self.seed} at {self.now:.6f} s after {self.steps} steps>"

    def stream(self, name: str) -> random.Random:
        """Make a source of random numbers that depends on the seed and a name alone."""
        return random.Random(self.seed << 32 | zlib.crc32(name.encode()))

    def process(self, name: str, config: Config | None = None) -> Process:
        """Start a process.

        Args:
            name: For people; no two have the same.
            config: How it takes part. The simulated fabric stands in for whatever
                fabrics it names; without any the process is one without SMC-R.

        Raises:
            ValueError: The name is in use.
        """
        if any(each.name == name for each in self.processes):
            message = f"there is a process {name!r} already"
            raise ValueError(message)
        number = len(self.processes) + 1
        made = Process(self, name, Config() if config is None else config, number)
        self.processes.append(made)
        return made

    def note(self, text: str) -> None:
        """Write a line into the trace."""
        if self.is_tracing:
            self.trace.append(f"{self.now:.6f} {text}")

    def take_error(self, text: str, error: BaseException | None) -> None:
        """Keep what a loop reported."""
        self.note(f"error {text}")
        if self.error is None:
            self.error = error
        if len(self.errors) < ERRORS_MAX:
            self.errors.append(text)

    # What happens

    def step(self) -> bool:
        """Let one thing happen now.

        Returns:
            False when nothing can happen before the clock moves.
        """
        now = self.now
        ready: list[Any] = [p for p in self.processes if p.is_ready(now)]
        if self.tcp.active:
            ready += self.tcp.ready(now)
        if self.network.is_ready():
            ready.append(self.network)
        if not ready:
            return False
        self.steps += 1
        count = len(ready)
        choice = int(self.chance() * count) if self.is_shuffling else self.steps % count
        ready[choice].step()
        if self.check_every and self.steps % self.check_every == 0:
            self.check()
        return True

    def next_due(self) -> float | None:
        """When the next thing happens by itself, None when nothing ever does."""
        dues = [process.next_due() for process in self.processes]
        dues += (self.tcp.next_due(), self.network.next_due())
        return min((due for due in dues if due is not None), default=None)

    def advance(self, when: float) -> None:
        """Move the clock on; it never goes back."""
        if when > self.now:
            self.now = when
            self.network.now = when

    def run(
        self,
        until: Callable[[], bool] | asyncio.Future[Any] | float | None = None,
        limit: int = STEPS_MAX,
    ) -> int:
        """Let things happen.

        Args:
            until: A condition that is asked after every step; a task or future that is
                to be done; a time in seconds since the beginning; None runs until
                nothing can happen any more.
            limit: Most steps.

        Returns:
            How many steps were made.

        Raises:
            Stuck: Nothing can happen any more, and a task waits or `until` was not
                reached.
            TooManySteps: `limit` was reached.
        """
        first = self.steps
        is_over, end = _condition(until)
        with _in_charge():
            while is_over is None or not is_over():
                if self.steps - first >= limit:
                    message = f"{self!r} has not come to an end"
                    raise TooManySteps(message)
                if self.steps % COLLECT_EVERY == COLLECT_EVERY - 1:
                    gc.collect()
                if self.step():
                    continue
                due = self.next_due()
                if end is not None and (due is None or due > end):
                    self.advance(end)
                    break
                if due is None:
                    self._rest(is_wanted=is_over is not None)
                    break
                self.advance(due)
        return self.steps - first

    def _rest(self, *, is_wanted: bool) -> None:
        """Nothing can happen any more.

        Raises:
            Stuck: Somebody waits for it.
        """
        waiting = [task for p in self.processes for task in p.waiting_tasks()]
        if waiting or is_wanted:
            names = ", ".join(describe(task) for task in waiting) or "no task"
            message = f"{self!r}: nothing can happen any more; waiting: {names}"
            raise Stuck(message)

    def check(self) -> None:
        """Check the core's invariants in every process.

        Raises:
            AssertionError: One does not hold.
        """
        for process in self.processes:
            process.check()

    # The end

    def close(self) -> list[str]:
        """End everything. Idempotent.

        Returns:
            What was still there, a line each: tasks and sockets that the program had
            not ended, and whatever is left after everything was ended.
        """
        if self.is_closed:
            return []
        self.is_closed = True
        with _in_charge():
            tasks = [task for p in self.processes for task in p.names_of_waiting()]
            if any(p.open_sockets() for p in self.processes):
                # asyncio leaves some to the collector, such as a connection that was
                # accepted when its server closed. What a run has made is young.
                gc.collect(1)
            leaks = tasks + [each for p in self.processes for each in p.open_sockets()]
            for process in self.processes:
                process.is_stopped = False
                for task in process.waiting_tasks():
                    task.cancel()
            self._let_tasks_end()
            for process in self.processes:
                leaks += process.end()
            with contextlib.suppress(RuntimeError):
                self.network.run_until_idle()
            leaks += self._left_of_the_fabric()
            for process in self.processes:
                if process.is_crashed:
                    process.bury()
        return leaks

    def _let_tasks_end(self) -> None:
        end = self.now + SECONDS_OF_AN_END
        for _ in range(STEPS_OF_AN_END):
            if not any(p.waiting_tasks() for p in self.processes):
                return
            if not self.step():
                due = self.next_due()
                if due is None or due > end:
                    return
                self.advance(due)

    def _left_of_the_fabric(self) -> list[str]:
        network: Any = self.network
        leaks = [f"device {device} is left" for device in network._devices.values()]  # noqa: SLF001
        pairs = network._queue_pairs.values()  # noqa: SLF001
        return leaks + [f"queue pair {pair} is left" for pair in pairs]


def _condition(
    until: Callable[[], bool] | asyncio.Future[Any] | float | None,
) -> tuple[Callable[[], bool] | None, float | None]:
    if until is None:
        return None, None
    if isinstance(until, int | float):
        return None, float(until)
    if callable(until):
        return until, None
    return until.done, None


@contextlib.contextmanager
def _in_charge() -> Iterator[None]:
    """Let objects die by their references alone: that happens at the same points."""
    was_on, hooks = gc.isenabled(), sys.get_asyncgen_hooks()
    gc.disable()
    try:
        yield
    finally:
        sys.set_asyncgen_hooks(*hooks)
        if was_on:
            gc.enable()


def describe(task: asyncio.Task[Any]) -> str:
    """Name a task and where it waits."""
    where: Any = task.get_coro()
    name = getattr(where, "__qualname__", "?")
    while (inner := getattr(where, "cr_await", None)) is not None:
        where = inner
        name = getattr(where, "__qualname__", name)
    return f"{task.get_name()} in {name}"
