"""Both ends of a connection in one loop, and other processes, for the asyncio room."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import importlib.util
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pytest
import uvloop

import pysmc
from pysmc.config import Config
from pysmc.disposal import wait_closed, wait_unmapped
from pysmc.testing.authority import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

ROOT = Path(__file__).resolve().parents[2]


def _load(name: str, folder: str = "tests.aio") -> None:
    """Load a helper under the name that test modules import."""
    qualified = f"{folder}.{name}"
    if qualified not in sys.modules:
        path = ROOT.joinpath(*folder.split("."), f"{name}.py")
        spec = importlib.util.spec_from_file_location(qualified, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)


_load("every_await_points")
_load("every_await_state")
_load("every_await")
_load("option_ends")
_load("pythons")
_load("random_programs")
_load("random_ends")
_load("random_player")
_load("streams_player")
_load("tls_kit")
_load("other_fabric", "tests")
other_fabric: Any = sys.modules["tests.other_fabric"]
HOST: str = other_fabric.HOST
PATIENCE = 20.0
"""Seconds after which something that should have happened will not."""
CLOSING_SECONDS = 2.0
"""In which what a scenario leaves behind has to close its descriptors."""


def count_descriptors() -> int:
    """Count our descriptors; the one that lists them is always among them."""
    gc.collect()
    wait_closed(5)  # what another test left is not in this one's count
    return len(os.listdir("/proc/self/fd"))


class Recorder(asyncio.Protocol):
    """Remembers what a transport did, and wakes whoever waits for it."""

    def __init__(self, *, keep_open: bool = False, pause: bool = False) -> None:
        self.calls: list[str] = []
        self.data = bytearray()
        self.error: BaseException | None = None
        self.keep_open = keep_open
        self.pause = pause
        self.transport: Any = None
        self.info_when_made: Any = None
        self._changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.info_when_made = transport.get_extra_info("smc")
        if self.pause:
            self.transport.pause_reading()
        self._note("made")

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.data += data
        self._note("data")

    def eof_received(self) -> bool:
        self._note("eof")
        return self.keep_open

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self._note("lost")

    def pause_writing(self) -> None:
        self._note("pause_writing")

    def resume_writing(self) -> None:
        self._note("resume_writing")

    def _note(self, call: str) -> None:
        if call != "data" or self.calls[-1:] != ["data"]:
            self.calls.append(call)
        self._changed.set()

    async def until(self, done: Callable[[], Any]) -> None:
        """Wait until something is so, looking after each call."""
        async with asyncio.timeout(PATIENCE):
            while not done():
                self._changed.clear()
                await self._changed.wait()

    async def until_call(self, call: str) -> None:
        await self.until(lambda: call in self.calls)

    async def until_bytes(self, count: int) -> None:
        await self.until(lambda: len(self.data) >= count)


class Ends(NamedTuple):
    """Both ends of one connection."""

    client: Any
    server: Any

    @property
    def transports(self) -> tuple[Any, Any]:
        return self.client.transport, self.server.transport


def keep_turning(loop: asyncio.AbstractEventLoop) -> None:
    """Wake a foreign loop twice a second."""
    if not isinstance(loop, asyncio.SelectorEventLoop):
        loop.call_later(0.5, keep_turning, loop)


class Kit:
    """Runs scenarios on a loop of ours, and checks what they leave behind."""

    Recorder = Recorder
    Ends: ClassVar = Ends
    host = HOST
    count_descriptors = staticmethod(count_descriptors)

    def __init__(self) -> None:
        self.problems: list[dict[str, Any]] = []
        self.children: list[subprocess.Popen[str]] = []

    def run(
        self,
        scenario: Callable[..., Coroutine[Any, Any, Any]],
        *args: Any,
        config: Config | None = None,
        factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        problems: int = 0,
    ) -> Any:
        """Run a scenario on a new loop.

        Args:
            scenario: A coroutine function.
            args: For the scenario.
            config: Of the loop.
            factory: Makes a loop of another kind.
            problems: How often the loop's exception handler is expected to be called.
        """
        before = count_descriptors()
        children = len(self.children)
        config = other_fabric.adapted(config or Config())
        is_watched = factory is None and other_fabric.FABRIC
        if factory is None:
            make = other_fabric.WatchedLoop if is_watched else pysmc.new_event_loop
            factory = lambda: make(config)  # noqa: E731
        self.problems.clear()
        with asyncio.Runner(loop_factory=factory) as runner:
            loop = runner.get_loop()
            loop.set_exception_handler(lambda _, context: self.problems.append(context))
            # uvloop was seen to miss a wake-up by its own thread pool, without an end:
            # a timer makes it come round.
            keep_turning(loop)
            result = runner.run(self._bounded(scenario, args))
        if is_watched:
            other_fabric.check(loop.seen, config)
        assert len(self.problems) == problems, self.problems
        self.problems.clear()
        self.end(children)
        assert wait_unmapped(30)
        # A thread that played the peer may be on its way out.
        until = time.monotonic() + CLOSING_SECONDS
        while count_descriptors() != before and time.monotonic() < until:
            os.sched_yield()
        assert count_descriptors() == before, "descriptors were left open"
        return result

    async def _bounded(self, scenario: Any, args: Any) -> Any:
        async with asyncio.timeout(PATIENCE * 2):
            result = await scenario(*args)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:  # an accept on its last step
            _, left = await asyncio.wait(left, timeout=2)
        assert not left, f"tasks were left running: {left}"
        return result

    @contextlib.asynccontextmanager
    async def serving(
        self, factory: Callable[[], asyncio.BaseProtocol], **options: Any
    ) -> AsyncIterator[int]:
        """Serve in the running loop; gives the port."""
        loop = asyncio.get_running_loop()
        where: dict[str, Any] = {"host": HOST, "port": 0, **options}
        server = await loop.create_server(factory, **where)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            await server.wait_closed()

    @contextlib.asynccontextmanager
    async def connected(
        self,
        client: Callable[[], Any] = Recorder,
        server: Callable[[], Any] = Recorder,
        **options: Any,
    ) -> AsyncIterator[Any]:
        """Connect two protocols in the running loop; afterwards both are aborted."""
        loop = asyncio.get_running_loop()
        accepted: list[Any] = []

        def make() -> Any:
            accepted.append(server())
            return accepted[-1]

        async with self.serving(make) as port:
            _, protocol = await loop.create_connection(client, HOST, port, **options)
            async with asyncio.timeout(PATIENCE):
                while not accepted or getattr(accepted[0], "transport", 1) is None:
                    await asyncio.sleep(0)
            ends = Ends(protocol, accepted[0])
            try:
                yield ends
            finally:
                for end in ends:
                    if "lost" not in getattr(end, "calls", ["lost"]):
                        end.transport.abort()
                        await end.until_call("lost")

    def spawn(self, code: str, *args: Any, **options: Any) -> subprocess.Popen[str]:
        """Run Python code in a process of its own; its lines are read by `lines`."""
        child = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-c",
                textwrap.dedent(code),
                *map(str, args),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            **options,
        )
        self.children.append(child)
        return child

    def end(self, first: int = 0) -> None:
        """End the processes that were spawned, from one on."""
        for child in self.children[first:]:
            child.kill()
            child.communicate(timeout=PATIENCE)
        del self.children[first:]


@pytest.fixture(scope="session", autouse=True)
def _uvloop_has_its_pipe() -> None:
    """libuv opens a pipe for signals with its first loop, and keeps it."""
    uvloop.new_event_loop().close()


@pytest.fixture(scope="module", autouse=True)
def _collects_quickly(quick_collections: None) -> None:
    """Descriptors are counted before and after each scenario."""


@pytest.fixture
def kit() -> Iterator[Kit]:
    made = Kit()
    yield made
    made.end()


@pytest.fixture(params=["smcr", "tcp"])
def mode(request: pytest.FixtureRequest) -> str:
    """What carries the connection: the contract is the same."""
    return str(request.param)


@pytest.fixture
def config(mode: str) -> Config:
    return Config() if mode == "smcr" else Config(discovery=())


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Certificates, good and bad."""
    now = datetime.datetime.now(datetime.UTC)
    return Authority(tmp_path_factory.mktemp("authority"), now)
