"""The loop of a simulated process: pysmc's own, on a simulated kernel and clock.

Decides which turns of a loop are possible, and what is shuffled in one: only what
asyncio leaves open.

* Events of one select come in any order.
* Timers that are due at the same instant ring in any order.
* Steps of tasks that are ready in one turn run in any order among each other, and may
  come later than callbacks that were there before or after them. A task that is awoken
  cannot know what else the turn holds.

Callbacks keep their order among each other, and no step of a task overtakes one:
asyncio's transports, and ours, rely on that (connection_made, then the first bytes).

Source: asyncio/base_events.py and selector_events.py of CPython 3.11 to 3.13, the
asyncio documentation ("Event Loop", on call_at).
"""

from __future__ import annotations

import errno
import functools
import os
import selectors
import socket
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVarTuple, Unpack

from pysmc.aio import cpython
from pysmc.aio.driver import Driver
from pysmc.aio.loop import Loop
from pysmc.testing.simulation.device import WorldDevice
from pysmc.testing.simulation.recognition import SimDiscovery

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Mapping
    from contextvars import Context

    from pysmc.aio.selector import FabricSelector
    from pysmc.config import Config
    from pysmc.fabric.base import Device, UpdateCodec
    from pysmc.testing.simulation.process import Process
    from pysmc.testing.simulation.world import World

__all__ = ["SimSelector", "WorldLoop"]

JITTER_SECONDS = 5e-10
"""Less than asyncio's resolution: timers of one instant stay in one turn."""

_Args = TypeVarTuple("_Args")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class SimSelector:
    """A selector over simulated descriptors; it never waits.

    Args:
        process: Whose descriptors.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._owners = process.descriptors.owners
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._registered: dict[int, object] = {}
        """What the kernel has registered: a descriptor's number may be used again."""
        self.hot: dict[int, None] = {}
        """Descriptors that may be ready."""
        self.devices: list[tuple[Device, selectors.SelectorKey]] = []

    def touch(self, fd: int) -> None:
        """Hear that the readiness of a descriptor may have changed."""
        if fd in self._keys:
            self.hot[fd] = None

    def has_events(self) -> bool:
        """Whether a select would return something."""
        for device, _ in self.devices:
            if device.pending():
                return True
        hot = self.hot
        while hot:
            for fd in hot:
                if self._ready(fd):
                    return True
                break
            del hot[fd]
        return False

    def _ready(self, fd: int) -> int:
        key, owner = self._keys.get(fd), self._owners.get(fd)
        if key is None or owner is None or self._registered.get(fd) is not owner:
            return 0
        ready = 0
        sock: Any = owner
        if key.events & READ and sock.is_readable():
            ready |= READ
        if key.events & WRITE and sock.is_writable():
            ready |= WRITE
        return ready

    def select(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        """Give what is ready, in an order of the world's choice."""
        del timeout
        events = [(key, READ) for device, key in self.devices if device.pending()]
        for fd in list(self.hot):
            ready = self._ready(fd)
            if ready:
                events.append((self._keys[fd], ready))
            else:
                del self.hot[fd]
        if len(events) > 1:
            self._process.shuffle(events)
        return events

    def register(self, fd: int, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch a descriptor.

        Raises:
            KeyError: It is watched.
            OSError: EBADF, it is not open.
        """
        if fd in self._keys:
            message = f"{fd} is already registered"
            raise KeyError(message)
        if fd not in self._owners:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._registered[fd] = self._owners[fd]
        return self._set(fd, events, data)

    def modify(self, fd: int, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch a descriptor differently.

        Raises:
            KeyError: It is not watched.
            OSError: ENOENT, it was closed since, as epoll finds out.
        """
        old = self._keys[fd]
        if events != old.events and self._registered[fd] is not self._owners.get(fd):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        key = self._set(fd, events, data)
        self.devices = [
            (device, key if known is old else known) for device, known in self.devices
        ]
        return key

    def _set(self, fd: int, events: int, data: Any) -> selectors.SelectorKey:
        key = selectors.SelectorKey(fd, fd, events, data)
        self._keys[fd] = key
        self.hot[fd] = None
        return key

    def unregister(self, fd: int) -> selectors.SelectorKey:
        """Watch a descriptor no more.

        Raises:
            KeyError: It is not watched.
        """
        key = self._keys.pop(fd)
        del self._registered[fd]
        self.hot.pop(fd, None)
        return key

    def get_key(self, fd: int) -> selectors.SelectorKey:
        """Give what a descriptor was registered with.

        Raises:
            KeyError: It is not watched.
        """
        return self._keys[fd]

    def get_map(self) -> Mapping[int, selectors.SelectorKey]:
        """Give all registrations."""
        return self._keys

    def close(self) -> None:
        """Watch nothing any more."""
        self._keys.clear()
        self._registered.clear()
        self.hot.clear()
        self.devices = []

    def add_device(self, device: Device, activity: object) -> None:
        """Look at this device too; see `FabricSelector.add_device`."""
        del activity
        self.devices.append((device, self._keys[device.fileno()]))

    def remove_device(self, device: Device) -> None:
        """Look at it no more."""
        self.devices = [entry for entry in self.devices if entry[0] is not device]


class WorldLoop(Loop):
    """The loop of a simulated process.

    Everything but time, sockets, randomness and the device is the real library's. It
    has no threads and no real sockets: what needs them is refused.

    Args:
        process: Whose loop.
    """

    __slots__ = ("_made_tasks", "_world", "process", "selector")

    process: Process
    selector: SimSelector
    _world: World

    def __new__(cls, process: Process) -> Self:
        """Know the process before the loop begins."""
        loop = super().__new__(cls, process.config)
        loop.process = process
        loop._world = process.world
        return loop

    def __init__(self, process: Process) -> None:
        self._made_tasks = 0
        super().__init__(process.config)
        self.set_exception_handler(process.take_error)

    def _make_selector(self) -> FabricSelector:
        self.selector = SimSelector(self.process)
        selector: Any = self.selector
        return selector  # type: ignore[no-any-return]

    def _make_driver(self) -> Driver:
        process = self.process
        discovery: Any = SimDiscovery(
            self, self.config, process.world.tcp, process.number
        )
        driver = Driver(
            self,
            self.config,
            self._watch_device,
            self._open_device,
            clock=self.time,
            entropy=process.entropy,
            discovery=discovery,
            unwatch=self._unwatch_device,
        )
        driver.lookup = discovery.lookup()
        driver.admission.is_here = process.host.__eq__
        return driver

    def _open_device(
        self, name: str, *, peer_id: bytes, config: Config, codec: UpdateCodec
    ) -> Device:
        del name, config, codec
        make = functools.partial(WorldDevice, self.process)
        return self.process.world.network.device(peer_id, make)

    # One turn

    def next_timer(self) -> float | None:
        """When the next timer rings, None when none is armed."""
        return cpython.next_timer(self)

    def time(self) -> float:
        """Tell the world's time."""
        return self._world.now

    def _process_events(self, event_list: Any) -> None:
        if event_list:
            super()._process_events(event_list)  # type: ignore[misc]
        self.process.order()

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Args]], object],
        *args: *_Args,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call at a time; among timers of one instant the seed decides."""
        when += self.process.jitter() * JITTER_SECONDS
        return super().call_at(when, callback, *args, context=context)

    def create_task(
        self, coro: Any, *, name: object = None, **options: Any
    ) -> asyncio.Task[Any]:
        """Start a task; its name tells the process."""
        self._made_tasks += 1
        name = str(name or f"{self.process.name}-{self._made_tasks}")
        task = super().create_task(coro, name=name, **options)
        self.process.add_task(task)
        return task

    def __del__(self) -> None:
        """Say nothing: it holds nothing of this host."""

    # What a world has not

    def _make_self_pipe(self) -> None:
        """Need no pipe: nobody calls from another thread."""

    def _close_self_pipe(self) -> None:
        """Close nothing."""

    def _write_to_self(self) -> None:
        """Wake nobody: the world sees what is ready."""

    def run_in_executor(
        self,
        executor: Any,
        func: Callable[[Unpack[_Args]], Any],
        *args: *_Args,
    ) -> NoReturn:
        """Refuse: there are no threads in a world.

        Raises:
            RuntimeError: Always.
        """
        del executor, args
        message = f"a simulated process has no threads; {func!r} needs one"
        raise RuntimeError(message)

    async def getaddrinfo(
        self, host: Any, port: Any, *, family: int = 0, **options: Any
    ) -> list[Any]:
        """Resolve numeric addresses; there are no names in a world.

        Raises:
            socket.gaierror: It is a name.
        """
        del family, options
        try:
            socket.inet_pton(socket.AF_INET, host)
        except (OSError, TypeError):
            detail = f"there are no names in a world, but {host!r}"
            raise socket.gaierror(socket.EAI_NONAME, detail) from None
        kind, proto = socket.SOCK_STREAM, socket.IPPROTO_TCP
        return [(socket.AF_INET, kind, proto, "", (host, int(port or 0)))]

    def create_connection(
        self, *args: Any, **options: Any
    ) -> Coroutine[Any, Any, tuple[Any, Any]]:
        """Connect over a socket of `Process.dial`.

        Raises:
            ValueError: There is none.
        """
        if options.get("sock") is None:
            message = "a world has no real sockets: give sock=await process.dial(...)"
            raise ValueError(message)
        return super().create_connection(*args, **options)

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:
        """Serve on a listener of `Process.listen`.

        Raises:
            ValueError: There is none.
        """
        if options.get("sock") is None:
            message = "a world has no real sockets: give sock=process.listen(port)"
            raise ValueError(message)
        return await super().create_server(*args, **options)
