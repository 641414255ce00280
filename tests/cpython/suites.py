"""CPython's own asyncio tests on pysmc's loops; any Python runs it, it answers in JSON.

    python suites.py REPORT < ORDERS

ORDERS is an object: name of a world to the tests to run there, each the name of a class
(``test_events.EPollEventLoopTests``) or of a test in one, as `test.test_asyncio` has
them. REPORT gets an object: the release of Python, and world to test to `Outcome`.

The worlds:

* plain: nothing is marked, every connection is plain TCP.
* local: as users have it. Connections with both ends in the test's loop move to SMC-R,
  those with a raw socket at one end stay on TCP.
* shm, sim: for tests with a transport at both ends. Two things that keep them from
  SMC-R are bent: a blocking ``connect`` goes through the loop, and a Unix socket's path
  stands for a port. CPython's code is not touched.
* declined: the same over a network on which no queue pair comes up: both ends speak CLC
  to the Decline, then go on with the stock transport on the same socket.
"""

from __future__ import annotations

import asyncio
import asyncio.selector_events
import asyncio.unix_events
import contextlib
import errno
import faulthandler
import importlib
import importlib.util
import json
import os
import socket
import sys
import time
import traceback
import unittest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import pysmc
from pysmc.aio.devices import CODEC
from pysmc.aio.transport import SmcTransport
from pysmc.config import KIB
from pysmc.fabric.base import Status
from pysmc.fabric.sim import SimNetwork
from pysmc.testing.loops import SimLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOST = "127.0.0.1"
INET = (socket.AF_INET, socket.AF_INET6)
TAKEN = f"[Errno {errno.EADDRINUSE}]"
TRIES = 3
"""For a test whose port was taken."""
TOO_LONG = float(os.environ.get("SUITES_DEADLINE", "240"))
"""Seconds after which the program says where it hangs, and ends."""


class Outcome(NamedTuple):
    """What became of one test."""

    result: str
    """"passed", "failed", "skipped" or "missing" (this Python has no such test)."""
    detail: str
    """The traceback, or why it was skipped."""
    pairs: list[tuple[str, str]]
    """Connections with a transport at both ends: what carries each of the two."""
    alone: list[str]
    """The same of transports whose other end is something else."""
    reasons: list[str]
    """Why transports are on TCP, where they know."""
    seconds: float


# What the loops made


class Made(NamedTuple):
    """A transport of a TCP socket."""

    carrier: str
    ends: tuple[Any, Any]
    reason: str


made: list[Made] = []


def watch(transports: type[Any]) -> None:
    """Note every transport of a kind."""
    original = transports.__init__

    def made_and_noted(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        extra = self._extra
        if getattr(self._sock, "family", None) in INET:
            info = extra.get("smc")
            carrier = "tcp" if info is None else info.fabric or info.mode
            reason = info.reason.name if info is not None and info.reason else ""
            ends = (extra.get("sockname"), extra.get("peername"))
            made.append(Made(carrier, ends, reason))

    transports.__init__ = made_and_noted


def sort_out() -> tuple[list[tuple[str, str]], list[str]]:
    """Find which transports are the two ends of one connection."""
    pairs: list[tuple[str, str]] = []
    waiting: list[Made] = []
    for one in made:
        other = next((o for o in waiting if o.ends == one.ends[::-1]), None)
        if other is None:
            waiting.append(one)
        else:
            waiting.remove(other)
            pairs.append((other.carrier, one.carrier))
    return pairs, [one.carrier for one in waiting]


# The worlds


class PlainLoop(pysmc.Loop):
    """Takes no part."""

    def __new__(cls) -> Any:
        return super().__new__(cls, pysmc.Config(discovery=()))

    def __init__(self) -> None:
        super().__init__()


class LocalLoop(pysmc.Loop):
    """As users have it."""

    def __new__(cls) -> Any:
        return super().__new__(cls, pysmc.Config())

    def __init__(self) -> None:
        super().__init__()


class PathsArePorts(pysmc.Loop):
    """A Unix socket's path stands for a port."""

    async def create_unix_server(  # type: ignore[override]
        self, factory: Any, path: Any = None, **options: Any
    ) -> Any:
        server = await self.create_server(factory, HOST, 0, **options)
        ports = self.__dict__.setdefault("_ports", {})
        ports[os.fspath(path)] = server.sockets[0].getsockname()[1]
        return server

    async def create_unix_connection(  # type: ignore[override]
        self, factory: Any, path: Any = None, **options: Any
    ) -> Any:
        port = self.__dict__["_ports"][os.fspath(path)]
        return await self.create_connection(factory, HOST, port, **options)


SMALL = pysmc.Config(rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB)
"""Some tests rely on a file that does not fit in the small buffers of their sockets."""


class ShmLoop(PathsArePorts):
    """Over shared memory."""

    def __new__(cls) -> Any:
        return super().__new__(cls, SMALL)

    def __init__(self) -> None:
        super().__init__()


class SimulatedLoop(PathsArePorts, SimLoop):
    """Over a network of its own."""

    def __new__(cls) -> Any:
        return super().__new__(cls, SMALL, cls.new_network())

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def new_network() -> SimNetwork:
        return SimNetwork(codec=CODEC, auto=True)


class DeadNetwork(SimNetwork):
    """No queue pair ever connects."""

    def introduce(self, queue_pair: Any) -> None:
        self.fail_connect(Status.TIMED_OUT)
        super().introduce(queue_pair)


class DeclinedLoop(SimulatedLoop):
    """Every handshake ends in a Decline."""

    @staticmethod
    def new_network() -> SimNetwork:
        return DeadNetwork(codec=CODEC, auto=True)


class World:
    """Where tests run: every loop that they make is one of its own.

    Args:
        loops: The kind of loop.
        is_bent: Whether a blocking connect goes through the loop.
    """

    def __init__(self, loops: Callable[[], Any], *, is_bent: bool = False) -> None:
        self._loops = loops
        self._is_bent = is_bent
        self._latest: Any = None

    def make(self) -> Any:
        self._latest = self._loops()
        return self._latest

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have whatever makes a loop get one of this world."""
        policy: Any = asyncio.unix_events._UnixDefaultEventLoopPolicy
        make = staticmethod(self.make)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(policy, "_loop_factory", make))
            stack.enter_context(mock.patch.object(asyncio, "SelectorEventLoop", make))
            if self._is_bent:
                connect = self._connect_in_loop()
                stack.enter_context(
                    mock.patch.object(socket.socket, "connect", connect)
                )
            yield
        self._latest = None

    def _connect_in_loop(self) -> Callable[[socket.socket, Any], None]:
        original = socket.socket.connect

        def connect(sock: socket.socket, address: Any) -> None:
            loop = self._latest
            if sock.gettimeout() is not None or loop is None or loop.is_running():
                original(sock, address)
                return
            sock.setblocking(False)
            try:
                loop.run_until_complete(loop.sock_connect(sock, address))
            finally:
                sock.setblocking(True)

        return connect


WORLDS = {
    "plain": World(PlainLoop),
    "local": World(LocalLoop),
    "shm": World(ShmLoop, is_bent=True),
    "sim": World(SimulatedLoop, is_bent=True),
    "declined": World(DeclinedLoop, is_bent=True),
}


# The tests


def derive(name: str, world: World) -> Any:
    """Derive from a class of CPython's; None where this Python has no such class.

    Args:
        name: Module and class in `test.test_asyncio`.
        world: Where its tests run.
    """
    module, _, kind = name.partition(".")
    if importlib.util.find_spec(f"test.test_asyncio.{module}") is None:
        return None
    base = getattr(importlib.import_module(f"test.test_asyncio.{module}"), kind, None)
    if base is None:
        return None

    def run(self: Any, result: Any = None) -> Any:
        # Not setUp: IsolatedAsyncioTestCase has made its loop by then.
        with world.entered():
            return base.run(self, result)

    def make(self: Any) -> Any:
        del self
        return world.make()

    names = {"run": run, "create_event_loop": make, "new_loop": make}
    return type(kind, (base,), {**names, "__module__": module, "__qualname__": kind})


def collect(name: str, world: World) -> unittest.TestSuite | None:
    """Find the tests of a class, or one test."""
    parts = name.split(".")
    derived = derive(".".join(parts[:2]), world)
    if derived is None:
        return None
    if len(parts) == 2:
        return unittest.defaultTestLoader.loadTestsFromTestCase(derived)
    return (
        unittest.TestSuite([derived(parts[2])]) if hasattr(derived, parts[2]) else None
    )


class Result(unittest.TestResult):
    """Keeps an outcome of every test."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, Outcome] = {}
        self._bad: list[str] = []
        self._skipped = ""
        self._began = 0.0

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().startTest(test)
        made.clear()
        self._bad.clear()
        self._skipped = ""
        self._began = time.monotonic()

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().stopTest(test)
        result = "failed" if self._bad else "skipped" if self._skipped else "passed"
        pairs, alone = sort_out()
        self.outcomes[test.id()] = Outcome(
            result,
            "\n".join(self._bad) or self._skipped,
            pairs,
            alone,
            [one.reason for one in made if one.reason],
            round(time.monotonic() - self._began, 3),
        )

    def addError(self, test: Any, err: Any) -> None:  # noqa: N802
        super().addError(test, err)
        self._note(test, err)

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        super().addFailure(test, err)
        self._note(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._note(subtest, err)

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        super().addSkip(test, reason)
        self._skipped = reason

    def addUnexpectedSuccess(self, test: Any) -> None:  # noqa: N802
        super().addUnexpectedSuccess(test)
        self._bad.append("passed, but was expected to fail")

    def _note(self, test: Any, err: Any) -> None:
        text = "".join(traceback.format_exception(*err))
        self._bad.append(text)
        if not isinstance(test, unittest.TestCase):
            # What a class's own set-up raised belongs to no test.
            self.outcomes[str(test)] = Outcome("failed", text, [], [], [], 0.0)


def run(world: World, names: list[str]) -> dict[str, Outcome]:
    """Run tests in a world."""
    result = Result()
    missing: dict[str, Outcome] = {}
    suite = unittest.TestSuite()
    for name in names:
        tests = collect(name, world)
        if tests is None:
            missing[name] = Outcome("missing", "", [], [], [], 0.0)
        else:
            suite.addTests(tests)
    suite.run(result)
    for name in [name for name in result.outcomes if lost_a_race(result, name)]:
        for _ in range(TRIES):
            if tests := collect(name, world):
                tests.run(result)
            if not lost_a_race(result, name):
                break
    return result.outcomes | missing


def lost_a_race(result: Result, name: str) -> bool:
    """Tell whether a test failed because somebody else took its port.

    CPython's tests look for a free port, let it go, and bind it later; a few lanes and
    whatever else this machine tests do the same.
    """
    outcome = result.outcomes[name]
    return outcome.result == "failed" and TAKEN in outcome.detail


def main() -> None:
    """Do what the orders say."""
    faulthandler.dump_traceback_later(TOO_LONG, exit=True)
    watch(SmcTransport)
    watch(asyncio.selector_events._SelectorSocketTransport)  # type: ignore[attr-defined]
    orders = json.load(sys.stdin)
    worlds = {
        world: {name: one._asdict() for name, one in run(WORLDS[world], names).items()}
        for world, names in orders.items()
    }
    version = ".".join(map(str, sys.version_info[:3]))
    report = json.dumps({"version": version, "worlds": worlds})
    Path(sys.argv[1]).write_text(report, encoding="utf-8")
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
