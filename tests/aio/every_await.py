"""Strikes a coroutine at each of its points, and looks at what is left.

Every await of the coroutine, of the peer's coroutines and of the callbacks between them
has a point before and one behind it, so that a strike also meets results that are
decided and not yet taken. Points are counted, not timed (`every_await_points`).

A `Scene` is one public coroutine on one way of a connection. `strike_everywhere` plays
it again and again, strikes one point later each time, and stops when the coroutine has
ended before its point came. What is held afterwards is compared with what was held
before (`every_await_state`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
from typing import TYPE_CHECKING, Any

import pysmc
from tests.aio.every_await_points import Striker, Suspensions, watched
from tests.aio.every_await_state import (
    PATIENCE,
    memory_of,
    open_descriptors,
    settled,
    state_of,
    until,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine

HOST = "127.0.0.1"
ACCEPTING = ("_negotiate_and_accept", "_accept_settled", "_serve")
"""Coroutines in which an accepted connection lives until it has its transport."""
STOCK = "_accept_settled"
"""The one of them that awaits nothing but the stock loop's own."""


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


class Visit:
    """One end of a stream; looks to a stage like an `End`.

    Args:
        reader: Of the stream.
        writer: Of the stream.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.calls = ["made"]

    @property
    def transport(self) -> Any:
        return self.writer.transport

    @property
    def is_over(self) -> bool:
        return "lost" in self.calls

    def check(self) -> None:
        assert self.calls == ["made", "lost"], self.calls

    async def leave(self) -> None:
        """Close, and wait until the connection is gone."""
        self.writer.close()
        try:
            async with asyncio.timeout(PATIENCE):
                with contextlib.suppress(OSError):
                    await self.writer.wait_closed()
        finally:
            self.calls.append("lost")


def accepting_tasks() -> list[asyncio.Task[Any]]:
    """List the tasks of connections that were accepted and have no transport yet."""
    return [
        task
        for task in asyncio.all_tasks()
        if getattr(task.get_coro(), "__name__", "") in ACCEPTING
    ]


@functools.cache
def _periods(count: int) -> bytes:
    return bytes(range(251)) * count


def pattern(count: int, start: int = 0) -> bytes:
    """Make bytes that tell their position, from one position on."""
    start %= 251
    return _periods((start + count) // 251 + 1)[start : start + count]


async def echo(visit: Visit) -> None:
    """Send back what comes, up to the end."""
    while data := await visit.reader.read(64 * 1024):
        visit.writer.write(data)
        await visit.writer.drain()


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
        self.near: list[Any] = []
        """Ends on the side of the coroutine: `End` or `Visit`."""
        self.far: list[Any] = []
        """Ends of the peer."""
        self.cleaning = contextlib.AsyncExitStack()

    def make_near(self) -> End:
        end = End()
        self.near.append(end)
        return end

    def make_far(self) -> End:
        end = Echo()
        self.far.append(end)
        return end

    async def serve(self, make: Callable[[], Any] | None = None, **options: Any) -> int:
        """Serve on a port of its own until the play is over; gives the port."""
        where: dict[str, Any] = {"host": HOST, "port": 0, **options}
        server = await self.loop.create_server(make or self.make_far, **where)
        self.servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def serve_streams(
        self,
        serve: Callable[[Any], Coroutine[Any, Any, None]] | None = None,
        **options: Any,
    ) -> int:
        """Serve streams likewise; ``serve(visit)`` is called for each, or they echo."""

        async def on_visit(reader: Any, writer: Any) -> None:
            visit = Visit(reader, writer)
            self.far.append(visit)
            try:
                await (serve or echo)(visit)
            except (OSError, EOFError):
                writer.transport.abort()
            finally:
                await visit.leave()

        server = await pysmc.start_server(on_visit, HOST, 0, **options)
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
            if isinstance(end, Visit) and not end.is_over:
                await end.leave()
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

    errors: tuple[type[Exception], ...] = (OSError, EOFError)
    """What it may raise when a connection ends: what programs for TCP catch."""

    is_ended_by_others = False
    """Whether a cancellation may come too late to be told from its usual end."""

    async def prepare(self, stage: Stage) -> None:
        """Set up what the coroutine needs; not struck."""

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any] | asyncio.Task[Any]:
        """Give the coroutine, or the task that somebody else has made of it."""
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
    """Send bytes around over a new connection of any loop, and check each of them.

    Args:
        stage: Of the play.
        mode: What the connection has to run on; None is anything.
    """
    port = await stage.serve_streams()
    visit = Visit(*await pysmc.open_connection(HOST, port))
    sent = pattern(3000 + stage.number, stage.number)
    visit.writer.write(sent)
    visit.writer.write_eof()
    async with asyncio.timeout(PATIENCE):
        assert await visit.reader.read() == sent
    if mode is not None:
        assert visit.writer.get_extra_info("smc").mode == mode
    await visit.leave()


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


async def _limited(stage: Stage, coroutine: Any) -> Any:
    entered = False
    try:
        async with asyncio.timeout(None) as stage.limit:
            entered = True
            return await coroutine
    finally:
        if not entered and not isinstance(coroutine, asyncio.Task):
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
        has_come = await _play(scene, stage, strike, at)
    stage.target = stage.limit = None
    await scene.prove(stage)
    await stage.clear()
    del stage
    await settled(loop, before)
    return has_come


async def _play(scene: Scene, stage: Stage, strike: str, at: int) -> bool:
    loop = stage.loop
    coroutine: Any = scene.play(stage)
    if strike == "time out":
        coroutine = _limited(stage, coroutine)
    act = functools.partial(STRIKES[strike], stage)
    striker: Any
    if isinstance(loop, asyncio.SelectorEventLoop):
        is_task = isinstance(coroutine, asyncio.Task)
        target = coroutine if is_task else loop.create_task(coroutine)
        stage.target = target
        striker = Striker(target, at, act)
    else:
        striker = Suspensions(coroutine, at, act)
        stage.target = striker.target = target = loop.create_task(striker.play())
    done, _ = await asyncio.wait({target}, timeout=PATIENCE)
    striker.stop()
    assert done, f"hangs: {target!r}"
    if striker.has_struck:
        _check_end(scene, target, strike)
    else:
        target.result()
    await scene.check(stage, strike if striker.has_struck else "")
    return bool(striker.has_come)


def _check_end(scene: Scene, target: asyncio.Future[Any], strike: str) -> None:
    """Check how a coroutine that was struck has ended."""
    error = None if target.cancelled() else target.exception()
    if scene.is_ended_by_others:
        assert error is None or isinstance(error, scene.errors), repr(error)
    elif strike in {"cancel", "cancel twice"}:
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
        assert error is None or isinstance(error, scene.errors), repr(error)


async def strike_everywhere(scene: Scene, strike: str, *, most: int = 400) -> int:
    """Strike at each point of a scene in the running loop.

    Returns:
        At how many points it was struck.
    """
    loop = asyncio.get_running_loop()
    memory = 0
    for at in range(1, most):
        try:
            has_come = await strike_once(scene, strike, at)
        except BaseException as error:
            error.add_note(f"{type(scene).__name__}: {strike} at point {at}")
            raise
        if at == 2:  # both ends have their buffers by now
            memory = memory_of(loop)
        if not has_come:
            assert at < 3 or memory_of(loop) <= 4 * memory, "receive buffers pile up"
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


FAILED_AT_TLS = "Error on transport creation for incoming connection"


def keep_turning(loop: asyncio.AbstractEventLoop) -> None:
    """Wake uvloop now and then: it was seen to miss its own thread pool."""
    if not isinstance(loop, asyncio.SelectorEventLoop):
        loop.call_later(0.1, keep_turning, loop)


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

    def on_problem(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # Streams of Python 3.11 report it when a server's callback was cancelled, and
        # every loop in debug mode that a client left in the middle of TLS.
        error = context.get("exception")
        if loop.get_debug() and context["message"] == FAILED_AT_TLS:
            may_be: Any = (asyncio.CancelledError, ConnectionError)
        else:
            may_be = asyncio.CancelledError
        if not isinstance(error, may_be):
            problems.append(context)

    with asyncio.Runner(loop_factory=lambda: watched(factory())) as runner:
        loop = runner.get_loop()
        loop.set_exception_handler(on_problem)
        keep_turning(loop)
        task: asyncio.Task[Any] = loop.create_task(main())
        task.add_done_callback(lambda _: loop.stop())
        while not task.done():
            loop.run_forever()
        result = task.result()
    assert not problems, problems
    assert open_descriptors() == before
    return result
