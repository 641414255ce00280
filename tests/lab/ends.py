"""Two ends in processes of their own, held by a scenario.

An end is forked from a process that has imported everything and opened nothing, so that
it costs milliseconds also where a start of Python costs seconds. What it does stands in
`streaming`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import pysmc

# Loaded before the fork, once for all.
import pysmc.aio.loop
import pysmc.fabric.shm
from pysmc.fabric import verbs_loading
from tests.lab.streaming import Obedience, be_an_end

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["NOBODY", "End", "Ends", "Limits", "Place"]

PATIENCE = 60.0
"""Seconds that an answer may take, unless a scenario says otherwise."""
LOADED_LATE = (
    "encodings.idna",
    "pysmc.discovery.static",
    "pysmc.fabric.verbs",
    "pysmc.fabric.verbs_reach",
    "pysmc.fabric.verbs_route",
)
CLONE_NEWNS = 0x00020000
NOBODY = 65534
"""A user without any privilege."""


@dataclass(frozen=True)
class Place:
    """Where the two ends are, and over what they talk."""

    fabric: str = "verbs"
    server_host: str = "10.0.0.1"
    client_host: str = "10.0.0.2"

    @classmethod
    def here(cls) -> Self:
        """Give the guest's; elsewhere both ends are on this host, over shm."""
        if os.environ.get("PYSMC_LAB_GUEST"):
            return cls()
        return cls("shm", "127.0.0.1", "127.0.0.1")

    def config(self, **changes: Any) -> pysmc.Config:
        """Give the configuration of either end."""
        settings: dict[str, Any] = {"fabrics": (self.fabric,)}
        if self.fabric == "verbs":
            settings |= {
                "discovery": ("static",),
                "peers": (self.server_host, self.client_host),
                "ueids": ("PYSMC.LAB",),
                "rmbe_bytes": 64 * 1024,
                "sndbuf_bytes": 64 * 1024,
            }
        return pysmc.Config(**(settings | changes))


@dataclass(frozen=True)
class Limits:
    """What is taken away from an end before its loop begins."""

    memlock_bytes: int | None = None
    uid: int | None = None
    without_pyverbs: bool = False

    def apply(self) -> None:
        """Take it away from this process."""
        if self.memlock_bytes is not None:
            both = (self.memlock_bytes, self.memlock_bytes)
            resource.setrlimit(resource.RLIMIT_MEMLOCK, both)
        if self.without_pyverbs:
            hide_pyverbs()
        if self.uid is not None:
            os.setgroups([])
            os.setgid(self.uid)
            os.setuid(self.uid)


def hide_pyverbs() -> None:
    """Let this process find no pyverbs: a namespace of its own has nothing there."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyverbs"]:
        del sys.modules[name]
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    for command in (
        ["mount", "--make-rprivate", "/"],
        *(["mount", "-t", "tmpfs", "none", str(place)] for place in _pyverbs_places()),
    ):
        subprocess.run(command, check=True)


def _load_what_verbs_need() -> None:
    """Load once for all ends: in each it would hold up the first callback.

    Besides, a user without privilege may not be able to read where it lies.
    """
    verbs_loading.find_pyverbs()
    for name in LOADED_LATE:
        importlib.import_module(name)


def _pyverbs_places() -> list[Path]:
    places = (Path(place, "pyverbs") for place in verbs_loading.PLACES)
    return [place for place in places if place.is_dir()]


@dataclass
class End:
    """The process of one end, as the scenario holds it."""

    name: str
    pid: int
    errors: Path
    _channel: socket.socket
    _buffer: bytes = b""
    _code: int | None = None
    may_complain: bool = False
    may_be_lost: bool = False
    """Whether the kernel may keep it for good: nobody waits for its end."""

    def tell(self, do: str, **order: Any) -> None:
        """Give an order."""
        self._channel.sendall(json.dumps({"do": do, **order}).encode() + b"\n")

    def answer(self, deadline: float = PATIENCE) -> Any:
        """Read the answer to the oldest order; it may be an error."""
        end = time.monotonic() + deadline
        while b"\n" not in self._buffer:
            left = max(0.0, end - time.monotonic())
            if not select.select([self._channel], [], [], left)[0]:
                self.fail(f"no answer within {deadline} s")
            data = self._channel.recv(1 << 16)
            if not data:
                self.fail(f"ended with {self.wait()}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def attempt(self, do: str, *, deadline: float = PATIENCE, **order: Any) -> Any:
        """Give an order and read its answer, which may be an error."""
        self.tell(do, **order)
        return self.answer(deadline)

    def ask(self, do: str, *, deadline: float = PATIENCE, **order: Any) -> Any:
        """Give an order and read its answer; an order that failed is a failure."""
        answer = self.attempt(do, deadline=deadline, **order)
        if "error" in answer:
            self.fail(f"{do}: {answer}")
        return answer

    def signal(self, number: int) -> float:
        """Send a signal; gives the moment."""
        moment = time.monotonic()
        os.kill(self.pid, number)
        return moment

    def complaint(self) -> str:
        """Give what it wrote to standard error."""
        return self.errors.read_text(errors="replace")

    def fail(self, what: str) -> NoReturn:
        """Say what went wrong, with what the process said about it."""
        message = f"the {self.name} end: {what}\n{self.complaint()}"
        raise AssertionError(message)

    def finish(self, deadline: float = PATIENCE) -> int:
        """Let it end by itself; gives its exit code."""
        self._channel.close()
        return self.wait(deadline)

    def wait(self, deadline: float = PATIENCE) -> int:
        """Wait for its end; gives its exit code, or minus its signal."""
        if self._code is None:
            handle = os.pidfd_open(self.pid)
            ended = select.select([handle], [], [], deadline)[0]
            os.close(handle)
            if not ended:
                self.fail(f"is still there after {deadline} s")
            status = os.waitpid(self.pid, 0)[1]
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def clean_up(self) -> None:
        """End it, whatever it does."""
        self._channel.close()
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            if not self.may_be_lost:
                self.wait()

    def where(self) -> str:
        """Tell where in the kernel it is."""
        return Path(f"/proc/{self.pid}/stack").read_text(encoding="utf-8")


def _live_as(
    channel: socket.socket,
    errors: int,
    place: Place,
    limits: Limits,
    be: Callable[[socket.socket, tuple[str, str]], None],
) -> NoReturn:
    """Be the forked process: an end and nothing else."""
    code = 1
    try:
        os.dup2(errors, 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # until the end
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # The framework's own, which belongs to its process.
        sys.unraisablehook = sys.__unraisablehook__
        warnings.resetwarnings()
        warnings.simplefilter("ignore", ResourceWarning)
        limits.apply()
        be(channel, (place.server_host, place.client_host))
        code = 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001  # whoever reads standard error learns it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Ends:
    """Starts ends, and ends them when the scenario does.

    Whatever an end writes to standard error at WARNING or above fails the scenario,
    unless `End.may_complain` is set: nothing is said without a need.
    """

    place: Place = field(default_factory=Place)
    kind: type[Obedience] = Obedience
    """What the ends can do."""
    started: list[End] = field(default_factory=list)
    _folder: Any = field(default_factory=tempfile.TemporaryDirectory)
    _numbers: Any = field(default_factory=lambda: itertools.count(1))

    def start(self, name: str, limits: Limits | None = None, **changes: Any) -> End:
        """Start an end.

        Args:
            name: Shown in failures.
            limits: What is taken away from it.
            changes: Of the configuration.
        """
        limits = limits or Limits()
        if self.place.fabric == "verbs" and not limits.without_pyverbs:
            _load_what_verbs_need()
        config = self.place.config(**changes)
        be = functools.partial(be_an_end, config=config, kind=self.kind)
        return self.start_as(name, be, limits)

    def start_as(
        self,
        name: str,
        be: Callable[[socket.socket, tuple[str, str]], None],
        limits: Limits | None = None,
    ) -> End:
        """Start an end that is something else than pysmc.

        Args:
            name: Shown in failures.
            be: What it does until no more orders come: takes where orders come from,
                and the addresses of server and client.
            limits: What is taken away from it.
        """
        ours, theirs = socket.socketpair()
        errors = Path(self._folder.name) / f"{next(self._numbers)}-{name}.txt"
        with errors.open("wb") as file:
            pid = os.fork()
            if pid == 0:
                for end in self.started:
                    end._channel.close()
                ours.close()
                number = file.fileno()
                _live_as(theirs, number, self.place, limits or Limits(), be)
        theirs.close()
        end = End(name, pid, errors, ours)
        self.started.append(end)
        return end

    def pair(
        self, total: int | None = None, count: int = 1, **changes: Any
    ) -> tuple[End, End]:
        """Start a server and a client with connections between them, all on SMC-R."""
        server, client = (
            self.start("server", **changes),
            self.start("client", **changes),
        )
        self.connect(server, client, total, count)
        return server, client

    def connect(
        self, server: End, client: End, total: int | None = None, count: int = 1
    ) -> int:
        """Connect two ends over the fabric of the place; gives the server's port."""
        port: int = server.ask("serve", total=total)["port"]
        infos = client.ask("connect", port=port, count=count, total=total)["infos"]
        for info in infos:
            found = (info["mode"], info["version"], info["fabric"])
            assert found == ("smcr", "2.1", self.place.fabric), info
        return port

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all; what one complained of fails the scenario."""
        for end in self.started:
            end.clean_up()
        complaints = [
            f"{end.name}: {end.complaint()}"
            for end in self.started
            if end.complaint() and not end.may_complain
        ]
        self._folder.cleanup()
        if kind is None:
            assert not complaints, "\n".join(complaints)
