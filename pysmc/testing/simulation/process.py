"""A simulated process: a loop, descriptors, an address, a device of its own.

Decides what a process can do in its world, and what its end leaves: a crash closes its
sockets as the kernel would and takes its queue pairs away, and nothing of its Python
runs any more.

Reference: `pysmc.testing.simulation.world`, which decides when it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from typing import TYPE_CHECKING, Any

from pysmc.aio import cpython
from pysmc.testing.simulation.device import WorldDevice
from pysmc.testing.simulation.loop import WorldLoop
from pysmc.testing.simulation.sockets import Descriptors, KernelSocket, SimSocket

if TYPE_CHECKING:
    import random
    from collections import deque
    from collections.abc import Coroutine

    from pysmc.aio.driver import Driver
    from pysmc.config import Config
    from pysmc.testing.simulation.sockets import Address
    from pysmc.testing.simulation.world import World

__all__ = ["Process"]

CLOSES_OF_A_COROUTINE = 8
"""A coroutine that waits again where it should end is told so often."""
TASKS_KEPT = 64
"""Entries of tasks that are gone are forgotten when there may be so many."""
PLAIN_TURNS = 0.25
"""Part of the turns that run in asyncio's own order."""


class Process:
    """One process of a world; made by `World.process`.

    Args:
        world: Where it lives.
        name: For people, and for its random numbers.
        config: How it takes part.
        number: What its kernel calls it; its address is made of it.
    """

    def __init__(self, world: World, name: str, config: Config, number: int) -> None:
        self.world = world
        self.number = number
        self.name = name
        self.config = config
        self.host = f"10.0.{number >> 8}.{number & 0xFF}"
        """Its numeric address."""
        self.entropy: random.Random = world.stream(f"process {name}")
        """Where its peer IDs and tokens come from."""
        self._dead: list[asyncio.Task[Any]] = []
        self._tasks: list[weakref.ref[asyncio.Task[Any]]] = []
        """In their order; also some that are gone."""
        self._tasks_max = TASKS_KEPT
        self.is_stopped = False
        self.is_crashed = False
        self.turns = 0
        """Turns that its loop has run."""
        self._chance = world.chance
        self._cancels: dict[asyncio.Task[Any], int] = {}
        self.descriptors = Descriptors(self._touch)
        self.loop = WorldLoop(self)
        self._selector = self.loop.selector
        self._ready = cpython.ready_handles(self.loop)
        self._run_turn = cpython.turn_runner(self.loop)

    def __repr__(self) -> str:
        return f"<Process {self.name}>"

    # What a program in it does

    @property
    def driver(self) -> Driver:
        """What does SMC-R in its loop."""
        return self.loop.driver

    def listen(self, port: int = 0, backlog: int = 128) -> SimSocket:
        """Bind a listener, for ``loop.create_server(..., sock=listener)``.

        Args:
            port: 0 takes a free one.
            backlog: Connections that may wait to be accepted.

        Raises:
            OSError: The port is in use, or no descriptor is left.
        """
        sock = self.world.tcp.socket(self.descriptors, self.host, port)
        try:
            sock.listen(backlog)
        except OSError:
            sock.close()
            raise
        return sock

    async def dial(self, address: Address | SimSocket) -> SimSocket:
        """Connect a socket, for ``loop.create_connection(factory, sock=...)``.

        Args:
            address: Host and port, or a listener of the world.

        Raises:
            OSError: What TCP says.
        """
        if isinstance(address, SimSocket):
            address = address.name
        sock: Any = self.world.tcp.socket(self.descriptors, self.host)
        try:
            await self.loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock  # type: ignore[no-any-return]

    async def open_connection(
        self, address: Address | SimSocket, **options: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Dial, and give asyncio's streams."""
        sock: Any = await self.dial(address)
        return await asyncio.open_connection(sock=sock, **options)

    def start(
        self, coroutine: Coroutine[Any, Any, Any], name: str | None = None
    ) -> asyncio.Task[Any]:
        """Start a task in it."""
        return self.loop.create_task(coroutine, name=name)

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """Its tasks, in their order."""
        return [task for known in self._tasks if (task := known()) is not None]

    def add_task(self, task: asyncio.Task[Any]) -> None:
        """Know a task for as long as anybody else does."""
        # A WeakKeyDictionary costs more than many a short task.
        if len(self._tasks) >= self._tasks_max:
            self._tasks = [known for known in self._tasks if known() is not None]
            self._tasks_max = 2 * len(self._tasks) + TASKS_KEPT
        self._tasks.append(weakref.ref(task))

    # What happens to it

    def cancel_at(self, task: asyncio.Task[Any], nth: int) -> None:
        """Cancel a task at its n-th step from now, in place of that step.

        Args:
            task: Of this process.
            nth: From 1.
        """
        self._cancels[task] = nth

    def stop(self) -> None:
        """Let it run no more, as SIGSTOP does; its kernel goes on."""
        self.is_stopped = True
        self.world.note(f"{self.name} stops")

    def resume(self) -> None:
        """Let it run again."""
        self.is_stopped = False
        self.world.note(f"{self.name} resumes")

    def crash(self) -> None:
        """End it as SIGKILL does, between two steps of the world. Idempotent.

        Of what its queue pairs have posted only a part still arrives, where the fabric
        treats updates as RDMA does: a network interface forgets the rest.
        """
        if self.is_crashed:
            return
        self.world.note(f"{self.name} crashes")
        self.is_crashed = True
        # The collector would let them run to their ends.
        self._dead = self.tasks
        for owner in list(self.descriptors.owners.values()):
            if isinstance(owner, WorldDevice):
                owner.forget_posts(self._chance)
            owner.close()  # type: ignore[attr-defined]

    # What the world asks

    @property
    def is_alive(self) -> bool:
        """Whether it can still run."""
        return not (self.is_crashed or self.loop.is_closed())

    @property
    def made_driver(self) -> Driver | None:
        """Its driver, None as long as nothing needed one."""
        return self.loop._driver  # noqa: SLF001  # asking would make one

    def is_ready(self, now: float) -> bool:
        """Whether a turn of its loop would do something."""
        if self.is_crashed or self.is_stopped:
            return False
        if self._ready:
            return True
        selector = self._selector
        if (selector.hot or selector.devices) and selector.has_events():
            return True
        return cpython.has_timer(self.loop, now)

    def step(self) -> None:
        """Run one turn of its loop."""
        self.turns += 1
        if self.world.is_tracing:
            self.world.note(f"{self.name} turn {self.turns}")
        self._run_turn()

    def next_due(self) -> float | None:
        """When time alone gives it something to do."""
        if self.is_stopped or not self.is_alive:
            return None
        return self.loop.next_timer()

    def waiting_tasks(self) -> list[asyncio.Task[Any]]:
        """Its tasks that are not done."""
        if not self.is_alive:
            return []
        return [task for task in self.tasks if not task.done()]

    def take_error(
        self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]
    ) -> None:
        """Keep what a loop reports, for the world; the dead report nothing."""
        del loop
        if self.is_crashed:
            return
        error = context.get("exception")
        told = "" if error is None else f": {type(error).__name__}: {error}"
        self.world.take_error(f"{self.name}: {context.get('message')}{told}", error)

    # What is shuffled

    def shuffle(self, items: list[Any]) -> None:
        """Bring into an order of the seed's choice."""
        if self.world.is_shuffling:
            chance = self._chance
            for last in range(len(items) - 1, 0, -1):
                other = int(chance() * (last + 1))
                items[last], items[other] = items[other], items[last]

    def jitter(self) -> float:
        """A number from 0 to 1, for what happens at the same instant."""
        return self._chance() if self.world.is_shuffling else 0.0

    def order(self) -> None:
        """Put the steps of tasks of one turn in order, and cancel where it is due."""
        ready = self._ready
        if not (self._cancels or (len(ready) > 1 and self.world.is_shuffling)):
            return
        owners = [cpython.callback_owner(handle) for handle in ready]
        steps = [n for n, owner in enumerate(owners) if isinstance(owner, asyncio.Task)]
        if not steps:
            return
        if self._cancels:
            for n in steps:
                self._count_step(owners[n])
        if self.world.is_shuffling and len(ready) > 1:
            self._mix(ready, steps)

    def _mix(self, ready: deque[asyncio.Handle], steps: list[int]) -> None:
        """Move the steps of tasks behind what was ready with them, or leave them."""
        chance, count = self._chance, len(ready)
        if chance() < PLAIN_TURNS:
            return
        # Each step gets a place at or behind its own; callbacks keep theirs.
        places = [float(n) for n in range(count)]
        for n in steps:
            places[n] = n + chance() * (count - n)
        handles = list(ready)
        ready.clear()
        ready.extend(handles[n] for n in sorted(range(count), key=places.__getitem__))

    def _count_step(self, task: asyncio.Task[Any]) -> None:
        left = self._cancels.get(task)
        if left is None:
            return
        if left > 1:
            self._cancels[task] = left - 1
            return
        del self._cancels[task]
        self.world.note(f"{task.get_name()} is cancelled")
        task.cancel()

    # Its end

    def _touch(self, fd: int) -> None:
        self._selector.touch(fd)

    def _forget_tasks(self) -> None:
        for task in self.tasks:
            if not task.done():
                cpython.forget_pending(task)
                coroutine: Any = task.get_coro()
                for _ in range(CLOSES_OF_A_COROUTINE):
                    try:
                        coroutine.close()
                    except BaseException:  # noqa: BLE001  # it is dead, and says so
                        continue
                    break

    def check(self) -> None:
        """Check the core's invariants; see `Endpoint.check`.

        Raises:
            AssertionError: One does not hold.
        """
        driver = self.made_driver
        if driver is not None and self.is_alive:
            endpoint = driver._endpoint  # noqa: SLF001  # asking would demand one
            if endpoint is not None:
                endpoint.check()

    def names_of_waiting(self) -> list[str]:
        """Name its tasks that are not done."""
        tasks = self.waiting_tasks()
        return [f"{self.name}: task {task.get_name()} waits" for task in tasks]

    def open_sockets(self) -> list[str]:
        """Name the sockets that its program has not closed."""
        driver = self.made_driver
        closed = set() if driver is None else driver.lingering.descriptors()
        return [
            f"{self.name}: socket {owner.label} is open"
            for number, owner in self.descriptors.owners.items()
            if isinstance(owner, KernelSocket) and self.is_alive
            if number not in closed
        ]

    def end(self) -> list[str]:
        """Close the loop, and name what is left afterwards."""
        if not self.is_alive:
            return []
        tasks = self.waiting_tasks()
        left = [f"{self.name}: task {task.get_name()} never ends" for task in tasks]
        driver = self.made_driver
        if driver is not None:
            left += [f"{self.name}: {driver!r} negotiates"] * len(driver.negotiations)
        self.loop.close()
        when = self.loop.next_timer()
        if when is not None:
            left.append(f"{self.name}: a timer is set for {when:.6f}")
        self._forget_tasks()
        cpython.disown_transports(self.loop)
        for owner in list(self.descriptors.owners.values()):
            if isinstance(owner, KernelSocket):
                owner.close()
            else:
                left.append(f"{self.name}: its device is open")
        return left

    def bury(self) -> None:
        """Let what a crash has left be forgotten, without running on."""
        # First: whoever drops a stream closes it.
        cpython.disown_transports(self.loop)
        driver = self.made_driver
        if driver is not None:
            driver.disown()
        self._forget_tasks()
        self._dead.clear()
        with contextlib.suppress(BaseException):
            self.loop.close()
