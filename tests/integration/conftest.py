"""Real programs in real processes, spoken to over pipes with deadlines.

No loop of pysmc runs in the process of the tests. What a program writes to standard
error is kept, shown when a test fails, and must not contain a traceback or a warning
about something that was left open.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest

from doc_recipes import Recipe
from pysmc.testing.invariants import ENVIRONMENT
from tests import free_ports

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
DEADLINE = 30.0
"""Seconds that anything may take, unless a test says otherwise."""

COMPLAINTS = re.compile(
    r"Traceback|ResourceWarning|never retrieved|never awaited|was destroyed but|"
    r"Exception ignored|Fatal Python error"
)


class Process:
    """A program with pipes; its lines are read with a deadline."""

    def __init__(
        self,
        arguments: list[str],
        errors: Path,
        environment: dict[str, str],
        **options: Any,
    ) -> None:
        self.errors = errors
        self._file: IO[bytes] = errors.open("wb")
        self._buffer = b""
        self.popen = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            env=environment,
            **options,
        )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def line(self, deadline: float = DEADLINE) -> str:
        """Read the next line of standard output."""
        assert self.popen.stdout is not None
        descriptor = self.popen.stdout.fileno()
        end = time.monotonic() + deadline
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                pytest.fail(f"no line within {deadline} s\n{self.complaint()}")
            data = os.read(descriptor, 1 << 16)
            if not data:
                code = self.popen.wait(DEADLINE)
                pytest.fail(f"ended with exit code {code}\n{self.complaint()}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def json(self, deadline: float = DEADLINE) -> Any:
        """Read the next line as JSON."""
        return json.loads(self.line(deadline))

    def tell(self, **order: Any) -> None:
        """Write one order."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(order).encode() + b"\n")
        self.popen.stdin.flush()

    def ask(self, do: str, *, deadline: float = DEADLINE, **order: Any) -> Any:
        """Write one order and read the answer; an order that failed fails the test."""
        answer = self.attempt(do, deadline=deadline, **order)
        assert "error" not in answer, f"{answer}\n{self.complaint()}"
        return answer

    def attempt(self, do: str, *, deadline: float = DEADLINE, **order: Any) -> Any:
        """Write one order and read the answer, which may be an error."""
        self.tell(do=do, **order)
        return self.json(deadline)

    def complaint(self) -> str:
        """What it wrote to standard error."""
        return self.errors.read_text(errors="replace")

    def wait_complaint(self, pattern: str, count: int = 1) -> list[Any]:
        """Wait until standard error contains a pattern so many times."""
        end = time.monotonic() + DEADLINE
        while len(found := re.findall(pattern, self.complaint())) < count:
            if time.monotonic() > end or self.popen.poll() is not None:
                pytest.fail(f"{pattern!r} is not in\n{self.complaint()}")
            select.select([], [], [], 0.01)
        return found

    def finish(self, deadline: float = DEADLINE) -> int:
        """End its input, wait for its end and give the exit code."""
        assert self.popen.stdin is not None
        if not self.popen.stdin.closed:
            self.popen.stdin.close()
        try:
            return self.popen.wait(deadline)
        except subprocess.TimeoutExpired:
            return pytest.fail(f"did not end within {deadline} s\n{self.complaint()}")

    def rest(self, deadline: float = DEADLINE) -> str:
        """Wait for a good end, and give the rest of its standard output."""
        code = self.finish(deadline)
        assert code == 0, f"exit code {code}\n{self.complaint()}"
        assert self.popen.stdout is not None
        data: bytes = self._buffer + self.popen.stdout.read()
        return data.decode()

    def interrupt(self, number: int = signal.SIGINT, deadline: float = DEADLINE) -> int:
        """Send a signal, wait for the end and give the exit code."""
        self.popen.send_signal(number)
        return self.finish(deadline)

    def clean_up(self) -> None:
        """End it, whatever it does."""
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._file.close()


class Programs:
    """Starts programs, and ends them when the test does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[Process] = []
        self.may_complain: set[Process] = set()

    def start(self, *arguments: Any, **options: Any) -> Process:
        """Start Python with arguments; the options are those of `program`."""
        return self.program(sys.executable, *arguments, **options)

    def program(
        self,
        *command: Any,
        env: dict[str, str] | None = None,
        is_measured: bool = True,
        **options: Any,
    ) -> Process:
        """Start a program with arguments.

        PYSMC_ variables are those of env only. With is_measured=False the process does
        not take part in a measurement of coverage, which would only make it slow.
        """
        left_out = "PYSMC_" if is_measured else ("PYSMC_", "COVERAGE_PROCESS_")
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(left_out)
        }
        environment |= {"PYTHONUNBUFFERED": "1"} | (env or {})
        options.setdefault("cwd", self._folder)
        process = Process(
            [*map(str, command)],
            self._folder / f"stderr-{len(self.started)}.txt",
            environment,
            **options,
        )
        self.started.append(process)
        return process

    def script(
        self, name: str, *arguments: Any, flags: tuple[str, ...] = (), **options: Any
    ) -> Process:
        """Start one of the programs of this folder on its own, with Python's flags."""
        return self.start(*flags, PROGRAMS / f"{name}.py", *arguments, **options)

    def under_pysmc(
        self, name: str, *arguments: Any, flags: tuple[str, ...] = (), **options: Any
    ) -> Process:
        """Start one of the programs of this folder with ``pysmc run``."""
        run = (*flags, "-m", "pysmc", "run", PROGRAMS / f"{name}.py")
        return self.start(*run, *arguments, **options)

    def agent(self, *arguments: Any, **options: Any) -> Process:
        """Start an agent, and wait until it takes orders."""
        if options.get("is_measured", True):  # of speed or memory, it would be a part
            options["env"] = {ENVIRONMENT: "1"} | (options.get("env") or {})
        process = self.script("agent", *arguments, **options)
        assert process.json() == {"ready": True}
        return process

    def clean_up(self) -> list[str]:
        """End all; give what they complained about."""
        complaints = []
        for process in self.started:
            process.clean_up()
            text = process.complaint()
            if process not in self.may_complain and COMPLAINTS.search(text):
                complaints.append(text)
        return complaints


@pytest.fixture
def programs(tmp_path: Path):
    started = Programs(tmp_path)
    yield started
    complaints = started.clean_up()
    assert complaints == [], "\n".join(complaints)


@pytest.fixture
def pair(programs: Programs):
    """Make a serving agent and a connecting agent; gives (server, client, port)."""

    def make(
        server_env: dict[str, str] | None = None,
        client_env: dict[str, str] | None = None,
        server_arguments: tuple[Any, ...] = (),
        client_arguments: tuple[Any, ...] = (),
        **options: Any,
    ):
        server = programs.agent(*server_arguments, env=server_env, **options)
        client = programs.agent(*client_arguments, env=client_env, **options)
        return server, client, server.ask("serve")["port"]

    return make


def kept_by(pid: int) -> dict[str, list[str]]:
    """List what a living process holds: descriptors by kind, and names in the system.

    Keys: "descriptors" (what each leads to, without numbers), "names" (its abstract
    Unix names), "memory" (its mapped memfds), "threads".
    """
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(entry))
        except FileNotFoundError:
            continue  # closed meanwhile
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    names = []
    for row in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        columns = row.split()
        if len(columns) > 7 and columns[6] in inodes:
            names.append(columns[7])
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {
        "descriptors": sorted(re.sub(r"\d+", "", link) for link in links),
        "names": sorted(names),
        "memory": sorted(re.findall(r"/memfd:\S+", maps)),
        "threads": [entry.name for entry in Path(f"/proc/{pid}/task").iterdir()],
    }


@pytest.fixture
def kept():
    return kept_by


@pytest.fixture
def wait_until():
    """Wait until a function gives what is expected; show both when it never does."""

    def wait(ask, expected, deadline: float = DEADLINE) -> None:
        end = time.monotonic() + deadline
        while (found := ask()) != expected:
            if time.monotonic() > end:
                assert found == expected
            select.select([], [], [], 0.02)

    return wait


@pytest.fixture
def wait_announced(wait_until):
    """Wait until a port has a listener of pysmc; its beacon's name has it."""

    def wait(port: int | str) -> None:
        names = Path("/proc/net/unix")
        wait_until(lambda: f"@pysmc/b/1/{port}\n" in names.read_text(), True)

    return wait


@pytest.fixture
def free_port() -> int:
    """Find a TCP port for a program that cannot choose one and tell it."""
    return free_ports.free_port()


@pytest.fixture
def follow(programs: Programs, tmp_path: Path):
    """Carry out a how-to page as it stands there, but for the ports; all of it.

    Called with the page's name and its ports, gives the recipe and what starts one of
    its commands.
    """
    recipes: list[Recipe] = []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

    def make(page: str, ports: dict[int, int]):
        text = (ROOT / "docs" / "howto" / f"{page}.md").read_text(encoding="utf-8")
        recipe = Recipe(text, tmp_path, ports)
        recipes.append(recipe)

        def start(command: str, **options: Any) -> Process:
            arguments, settings = recipe.take_command(command)
            env = {"PATH": path, "HOME": str(tmp_path)} | settings
            env |= options.pop("env", {})
            return programs.program(*arguments, env=env, is_measured=False, **options)

        return recipe, start

    yield make
    assert [recipe.unused() for recipe in recipes] == [[]] * len(recipes)


@pytest.fixture
def root() -> Path:
    return ROOT
