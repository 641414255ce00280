"""Strikes a coroutine at each of its points, and looks at what is left.

A point is the moment before a loop calls the next callback: every await of the
coroutine, of the peer's coroutines and of the callbacks between them has one before and
one behind it, so that a strike also meets results that are decided and not yet taken.
Points are counted, not timed. Loops without a queue that can be watched (uvloop) have
coarser ones: the suspensions of the coroutine itself.

A `Scene` is one public coroutine on one way of a connection. `strike_everywhere` plays
it again and again, strikes one point later each time, and stops when the coroutine has
ended before its point came.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import os
from typing import TYPE_CHECKING, Any

from pysmc.aio.loop import Loop

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine, Generator

HOST = "127.0.0.1"
PATIENCE = 15.0
"""Seconds after which something that should have happened will not."""
QUICK_TURNS = 60
"""Turns of the loop that are taken without a pause while something is awaited."""
ACCEPTING = ("_negotiate_and_accept", "_accept_connection2", "_serve")
"""Coroutines in which an accepted connection lives until it has its transport."""
STOCK = "_accept_connection2"
"""The one of them that is the stock loop's own."""


# Points


class Callbacks(collections.deque[Any]):
    """A loop's queue of callbacks, which can be interrupted before each of them."""

    before: Callable[[], None] | None = None

    def popleft(self) -> Any:
        handle = super().popleft()
        if self.before is not None and not handle._cancelled:
            self.before()
        return handle


def watched(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """Make a loop's points visible."""
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
        self.has_struck = True
        then = self._act()
        if callable(then):
            self._act = then
        else:
            self.stop()

    def stop(self) -> None:
        self._queue.before = None


class Suspensions:
    """An awaitable that acts at one of a coroutine's suspensions, on any loop.

    Args:
        coroutine: What is played.
        at: Which suspension, from 1.
        act: What to do in the turn after it.
    """

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], at: int, act: Callable[[], Any]
    ) -> None:
        self.has_struck = False
        self._coroutine = coroutine
        self._left = at
        self._act = act

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
                self.has_struck = True
                asyncio.get_running_loop().call_soon(self._act)
            error = value = None
            try:
                value = yield waited
            except BaseException as raised:  # noqa: BLE001  # passed on
                error = raised


# What may be left behind


def open_descriptors() -> dict[str, int]:
    """Count this process's descriptors by kind."""
    kinds: collections.Counter[str] = collections.Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            kinds[os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]] += 1
    return dict(kinds)


def own_names() -> list[str]:
    """List the kinds of the abstract names that this process holds."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:["):
                inodes.add(link[8:-1])
    names = []
    with open("/proc/self/net/unix", encoding="utf-8", errors="replace") as table:
        for line in table:
            words = line.split()
            if len(words) > 7 and words[6] in inodes:
                names.append("/".join(words[7].split("/")[:3])[:20])
    return sorted(names)


def driver_state(driver: Any) -> dict[str, Any]:
    """Count what a driver and its core hold for connections and handshakes."""
    discovery, endpoint = driver.discovery, driver._endpoint
    state = {
        "transports": len(driver.transports),
        "negotiations": len(driver.negotiations),
        "counted negotiations": driver._negotiations,
        "marks": len(discovery._open_marks),
        "offers": len(discovery._offers),
    }
    if endpoint is not None:
        endpoint.check()
        state["handshakes"] = endpoint.handshake_count
        state["groups"] = len(endpoint.groups)
        state["connections"] = sum(len(g.connections) for g in endpoint.groups)
        state["domains"] = sum(len(d.domains) for d in driver.devices)
    return state


def drivers_of(loop: asyncio.AbstractEventLoop) -> list[Any]:
    """Give every driver that serves a loop."""
    from pysmc.aio import foreign

    if isinstance(loop, Loop):
        return [loop.driver]
    return [entry[0] for entry in foreign._drivers.get(loop, {}).values()]


def state_of(loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """Say what the running loop holds, for a comparison later."""
    drivers = drivers_of(loop)
    state: dict[str, Any] = {"descriptors": open_descriptors()}
    state["tasks"] = len(asyncio.all_tasks())
    for number, driver in enumerate(drivers):
        for key, value in driver_state(driver).items():
            state[f"{key} of {number}"] = value
    if isinstance(loop, asyncio.SelectorEventLoop):
        rings = {driver._timer for driver in drivers}
        timers = [t for t in loop._scheduled if not t._cancelled and t not in rings]
        state["timers"] = len(timers)
        state["watched"] = len(loop._selector.get_map())
    if isinstance(loop, Loop):
        state["outcomes"] = len(loop._outcomes)
        state["announcements"] = len(loop._announcements)
    return state


def memory_of(loop: asyncio.AbstractEventLoop) -> int:
    """Count the bytes of receive buffers, also of those that are kept for reuse."""
    endpoints = [driver._endpoint for driver in drivers_of(loop)]
    return sum(end._keeper.rmb_bytes for end in endpoints if end is not None)


async def until(done: Callable[[], Any], what: Callable[[], str]) -> None:
    """Wait until something is so, with a deadline."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    turns = 0
    while not done():
        assert loop.time() < deadline, what()
        turns += 1
        await asyncio.sleep(0 if turns < QUICK_TURNS else 0.001)


async def settled(loop: asyncio.AbstractEventLoop, before: dict[str, Any]) -> None:
    """Wait until the loop holds what it held before, and no more.

    Raises:
        AssertionError: It still holds more when the time is over; says what.
    """

    def difference() -> str:
        now = state_of(loop)
        rows = [f"{k}: {before[k]} -> {now[k]}" for k in before if before[k] != now[k]]
        tasks = [task.get_coro() for task in asyncio.all_tasks()]
        return f"left behind: {rows}; names {own_names()}; tasks {tasks}"

    await until(lambda: state_of(loop) == before, difference)


# Both ends


class End(asyncio.Protocol):
    """One end of a connection; remembers what happened to it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.data = bytearray()
        self.error: BaseException | None = None
        self.transport: Any = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is to come: it never began, or it has ended."""
        return not self.calls or "lost" in self.calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.calls.append("made")

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> bool:
        self.calls.append("eof")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append("lost")
        self.error = exc

    def check(self) -> None:
        """Check the contract: connection_made first, connection_lost once and last."""
        if self.calls:
            assert self.calls[0] == "made", self.calls
            assert self.calls[-1] == "lost", self.calls
            assert self.calls.count("lost") == 1, self.calls
            assert self.calls.count("made") == 1, self.calls


class Echo(End):
    """An end that sends back what comes."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)


def accepting_tasks() -> list[asyncio.Task[Any]]:
    """List the tasks of connections that were accepted and have no transport yet."""
    return [
        task
        for task in asyncio.all_tasks()
        if getattr(task.get_coro(), "__name__", "") in ACCEPTING
    ]


def pattern(count: int, seed: int) -> bytes:
    """Make bytes that tell their position."""
    period = bytes((7 * i + seed) % 251 for i in range(251))
    return (period * (count // 251 + 1))[:count]


# Scenes


class Stage:
    """What a strike can reach in one play.

    Args:
        loop: The running loop.
        number: Of the play, for bytes that differ.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        self.loop = loop
        self.number = number
        self.target: asyncio.Future[Any] | None = None
        self.limit: asyncio.Timeout | None = None
        self.servers: list[asyncio.AbstractServer] = []
        self.near: list[End] = []
        """Ends on the side of the coroutine."""
        self.far: list[End] = []
        """Ends of the peer."""
        self.cleaning = contextlib.AsyncExitStack()

    def make_near(self) -> End:
        self.near.append(End())
        return self.near[-1]

    def make_far(self) -> End:
        self.far.append(Echo())
        return self.far[-1]

    async def serve(self, make: Callable[[], Any] | None = None, **options: Any) -> int:
        """Serve on a port of its own until the play is over; gives the port."""
        where: dict[str, Any] = {"host": HOST, "port": 0, **options}
        server = await self.loop.create_server(make or self.make_far, **where)
        self.servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    def own(self, sock: socket.socket) -> socket.socket:
        """Close a socket of the program's own when the play is over."""
        self.cleaning.callback(sock.close)
        return sock

    async def clear(self) -> None:
        """End the play: both ends are gone, and the servers are closed."""
        for end in self.near:
            if end.transport is not None:
                end.transport.abort()
        ends = self.near + self.far
        await until(
            lambda: all(end.is_over for end in ends) and not accepting_tasks(),
            lambda: f"{[end.calls for end in ends]}, {accepting_tasks()}",
        )
        for end in ends:
            end.check()
        for server in self.servers:
            server.close()
            await server.wait_closed()
        await self.cleaning.aclose()


class Scene:
    """One public coroutine on one way of a connection. Derive, and say what is done."""

    async def prepare(self, stage: Stage) -> None:
        """Set up what the coroutine needs; not struck."""

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        """Give the coroutine."""
        raise NotImplementedError

    def around(self, stage: Stage) -> contextlib.AbstractContextManager[Any]:
        """What else is different while the coroutine runs."""
        return contextlib.nullcontext()

    async def check(self, stage: Stage, strike: str) -> None:
        """Check what holds here alone, when the coroutine is over."""

    async def prove(self, stage: Stage) -> None:
        """Show that a connection between the same ends works afterwards."""
        await prove_by_streams(stage, mode=None)


async def prove_by_streams(stage: Stage, mode: str | None) -> None:
    """Send bytes around over a new connection, and check each of them.

    Args:
        stage: Of the play.
        mode: What the connection has to run on; None is anything.
    """
    port = await stage.serve()
    reader, writer = await asyncio.open_connection(HOST, port)
    sent = pattern(3000 + stage.number, stage.number)
    writer.write(sent)
    writer.write_eof()
    async with asyncio.timeout(PATIENCE):
        assert await reader.read() == sent
    if mode is not None:
        assert writer.get_extra_info("smc").mode == mode
    writer.close()
    async with asyncio.timeout(PATIENCE):
        await writer.wait_closed()


# Strikes


def _cancel(stage: Stage) -> None:
    assert stage.target is not None
    stage.target.cancel()


def _cancel_twice(stage: Stage) -> Callable[[], None]:
    _cancel(stage)
    return lambda: _cancel(stage)


def _time_out(stage: Stage) -> Any:
    if stage.limit is None:  # its task has not begun
        return lambda: _time_out(stage)
    stage.limit.reschedule(stage.loop.time() - 1)
    return None


def _end_far(stage: Stage, how: str) -> None:
    """End the peer's side, however far it has come."""
    living = [end for end in stage.far if not end.is_over]
    for end in living:
        getattr(end.transport, how)()
    _cancel_accepting(stage)
    if not living:
        for server in stage.servers:
            server.close()


def _end_near(stage: Stage, how: str) -> None:
    for end in stage.near:
        if end.transport is not None:
            getattr(end.transport, how)()


def _stop_loop(stage: Stage) -> None:
    stage.loop.stop()


def _close_servers(stage: Stage) -> None:
    for server in stage.servers:
        server.close()


def _cancel_accepting(stage: Stage) -> None:
    for task in accepting_tasks():
        if task.get_coro().__name__ != STOCK:
            task.cancel()


STRIKES: dict[str, Callable[[Stage], Any]] = {
    "cancel": _cancel,
    "cancel twice": _cancel_twice,
    "time out": _time_out,
    "peer closes": lambda stage: _end_far(stage, "close"),
    "peer aborts": lambda stage: _end_far(stage, "abort"),
    "close": lambda stage: _end_near(stage, "close"),
    "abort": lambda stage: _end_near(stage, "abort"),
    "stop the loop": _stop_loop,
    "close the server": _close_servers,
    "cancel the accept": _cancel_accepting,
}
"""What can happen, by name."""

BY_TASK = ("cancel", "cancel twice", "time out")
BY_PEER = ("peer closes", "peer aborts", "close the server", "cancel the accept")


async def _limited(stage: Stage, coroutine: Coroutine[Any, Any, Any]) -> Any:
    entered = False
    try:
        async with asyncio.timeout(None) as stage.limit:
            entered = True
            return await coroutine
    finally:
        if not entered:
            coroutine.close()


async def strike_once(
    scene: Scene, strike: str, at: int, expected: dict[str, Any] | None = None
) -> bool:
    """Play a scene and strike at one point.

    Args:
        scene: What is played.
        strike: One of `STRIKES`.
        at: The point, from 1.
        expected: The state of the loop afterwards; by default that of before.

    Returns:
        False when the coroutine had ended before that point.
    """
    loop = asyncio.get_running_loop()
    before = state_of(loop) if expected is None else expected
    stage = Stage(loop, at)
    with contextlib.ExitStack() as around:
        await scene.prepare(stage)
        around.enter_context(scene.around(stage))
        has_struck = await _play(scene, stage, strike, at)
    stage.target = stage.limit = None
    await scene.prove(stage)
    await stage.clear()
    del stage
    await settled(loop, before)
    return has_struck


async def _play(scene: Scene, stage: Stage, strike: str, at: int) -> bool:
    loop = stage.loop
    coroutine = scene.play(stage)
    if strike == "time out":
        coroutine = _limited(stage, coroutine)
    stage.target = target = loop.create_task(coroutine)
    striker = Striker(target, at, lambda: STRIKES[strike](stage))
    done, _ = await asyncio.wait({target}, timeout=PATIENCE)
    striker.stop()
    assert done, f"hangs: {target!r}"
    if striker.has_struck:
        _check_end(target, strike)
    else:
        target.result()
    await scene.check(stage, strike if striker.has_struck else "")
    return striker.has_struck


def _check_end(target: asyncio.Future[Any], strike: str) -> None:
    """Check how a coroutine that was struck has ended."""
    error = None if target.cancelled() else target.exception()
    if strike in {"cancel", "cancel twice"}:
        assert target.cancelled(), f"{target!r} was cancelled, and did not end by it"
    elif strike == "time out":
        # It rings a turn later; what is decided by then counts.
        assert error is None or isinstance(error, TimeoutError), repr(target)
        assert not target.cancelled(), repr(target)
    elif strike == "stop the loop":
        assert not target.cancelled(), repr(target)
        target.result()
    else:
        assert not target.cancelled(), repr(target)
        # Whoever writes programs for TCP catches OSError, and nothing else.
        assert error is None or isinstance(error, OSError | EOFError), repr(error)


async def strike_everywhere(scene: Scene, strike: str, *, most: int = 400) -> int:
    """Strike at each point of a scene in the running loop.

    Returns:
        At how many points it was struck.
    """
    loop = asyncio.get_running_loop()
    memory = 0
    for at in range(1, most):
        try:
            has_struck = await strike_once(scene, strike, at)
        except BaseException as error:
            error.add_note(f"{type(scene).__name__}: {strike} at point {at}")
            raise
        if at == 2:  # both ends have their buffers by now
            memory = memory_of(loop)
        if not has_struck:
            assert memory_of(loop) <= 4 * memory, "receive buffers pile up"
            return at - 1
    message = f"no end after {most} points"
    raise AssertionError(message)


def strike_first_contacts(
    scene: Scene,
    strike: str,
    factory: Callable[[], asyncio.AbstractEventLoop],
    *,
    most: int = 400,
) -> int:
    """Strike at each point of a scene, each time on a new loop.

    Returns:
        At how many points it was struck.
    """

    async def undisturbed() -> dict[str, Any]:
        stage = Stage(asyncio.get_running_loop(), 0)
        await scene.prove(stage)
        await stage.clear()
        await until(lambda: _is_calm(stage.loop), lambda: str(state_of(stage.loop)))
        return state_of(stage.loop)

    expected = run_on(factory, undisturbed)
    for at in range(1, most):
        try:
            if not run_on(factory, lambda: strike_once(scene, strike, at, expected)):  # noqa: B023  # called at once
                return at - 1
        except BaseException as error:
            error.add_note(f"{type(scene).__name__}: {strike} at point {at}")
            raise
    message = f"no end after {most} points"
    raise AssertionError(message)


def _is_calm(loop: asyncio.AbstractEventLoop) -> bool:
    state = state_of(loop)
    return not any(state.get(f"{key} of 0") for key in ("connections", "transports"))


def run_on(
    factory: Callable[[], asyncio.AbstractEventLoop],
    main: Callable[[], Coroutine[Any, Any, Any]],
) -> Any:
    """Run on a new loop with visible points; a stopped loop is run on.

    Checks that nothing was reported to the loop's exception handler, and that the loop
    leaves no descriptor behind.
    """
    gc.collect()  # what earlier tests left is none of this one's business
    before = open_descriptors()
    problems: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=lambda: watched(factory())) as runner:
        loop = runner.get_loop()
        loop.set_exception_handler(lambda _, context: problems.append(context))
        task: asyncio.Task[Any] = loop.create_task(main())
        task.add_done_callback(lambda _: loop.stop())
        while not task.done():
            loop.run_forever()
        result = task.result()
    assert not problems, problems
    assert open_descriptors() == before
    return result
