"""Finds Pythons, and runs `suites.py` on each: a process a lane, a few at a time."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import construct
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXPECTED = tomllib.loads((HERE / "expected.toml").read_text(encoding="utf-8"))
CLASSES = list(EXPECTED["tests"])
RUNNING = f"{sys.version_info[0]}.{sys.version_info[1]}"
DEADLINE = 400.0
"""Seconds for one lane; a quiet machine needs 5 to 60."""
AT_ONCE = 3
"""Lanes at a time: most of their time CPython's tests wait."""
STRICT = ("-X", "dev", "-W", "error")


class Lane(NamedTuple):
    """One run of a Python."""

    python: str
    """Minor version."""
    name: str
    """"plain": everything on TCP. "both": what has a transport at both ends, in the
    worlds where it moves to SMC-R or is declined. "strict": all of it as users have it,
    with every warning an error and asyncio's debug mode."""


def with_both_ends(python: str, world: str = "") -> list[str]:
    """Name the tests of a Python that have a transport at both ends.

    Args:
        python: Minor version.
        world: Leaves out what is excluded there.
    """
    excluded = tuple(
        f"{row['test']}."
        for row in EXPECTED["excluded"]
        if row["world"] == world and python in row["pythons"]
    )
    return [
        test
        for test, (since, until) in EXPECTED["both_ends"].items()
        if order(since) <= order(python) <= (order(until) or (9,))
        if not f"{test}.".startswith(excluded)
    ]


def order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


@cache
def pythons() -> dict[str, list[str]]:
    """Find programs of each minor version, the running one's first."""
    found: dict[str, list[str]] = {RUNNING: [sys.executable]}
    homes = [os.environ.get("PYENV_ROOT", ""), str(Path.home() / ".pyenv")]
    for minor in range(11, 20):
        version = f"3.{minor}"
        places = [shutil.which(f"python{version}") or ""]
        for home in filter(None, homes):
            pattern = f"{glob.escape(home)}/versions/{version}.*/bin/python{version}"
            places += sorted(glob.glob(pattern), key=order, reverse=True)
        if version != RUNNING and any(places):
            found[version] = [place for place in places if place]
    return found


@cache
def usable(python: str) -> tuple[str, str]:
    """Choose a program that starts and has the tests; else say what is missing."""
    complaints = []
    for program in pythons()[python]:
        look = [program, "-c", "import test.test_asyncio.utils"]
        done = subprocess.run(look, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return program, ""
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        complaint = said[-1] if "Error" in said[-1] else said[0]
        complaints.append(f"{program}: {complaint}")
    how = (
        f"needs python{python} with its own tests (Debian: apt-get install "
        f"libpython{python}-testsuite): {'; '.join(complaints)}"
    )
    return "", how


class Reports:
    """Runs the lanes that are asked for, each once.

    Args:
        folder: For what the other Pythons need.
        shared: Where the lanes leave their reports. Processes that test at the same
            time have the same, and whoever comes first runs a lane.
        lanes: What is asked for.
    """

    def __init__(self, folder: Path, shared: Path, lanes: list[Lane]) -> None:
        self._folder = folder
        self._shared = shared
        self._is_closed = False
        self._children: list[subprocess.Popen[str]] = []
        self._pool = ThreadPoolExecutor(AT_ONCE)
        # The other Pythons have nothing of ours installed, and need only this.
        (folder / "site").mkdir()
        package = Path(construct.__file__).parent
        (folder / "site" / "construct").symlink_to(package)
        self._runs: dict[Lane, Future[dict[str, Any]]] = {
            lane: self._pool.submit(self._run, lane) for lane in lanes
        }

    def of(self, lane: Lane) -> dict[str, Any]:
        """Give a lane's report, when it is there."""
        return self._runs[lane].result(DEADLINE * 2)

    def close(self) -> None:
        self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.kill()

    def _run(self, lane: Lane) -> dict[str, Any]:
        program, missing = usable(lane.python)
        if missing:
            return {"missing": missing}
        folder = self._shared / f"{lane.name}-{lane.python}"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "report.json").exists() and not self._is_closed:
                output = self._play(lane, program, folder)
                (folder / "output").write_text(output, encoding="utf-8")
        try:
            text = (folder / "report.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            output = (folder / "output").read_text(encoding="utf-8")
            return {"broken": f"no report of {lane}:\n{output}"}
        report = json.loads(text)
        assert isinstance(report, dict)
        return report

    def _play(self, lane: Lane, program: str, folder: Path) -> str:
        """Run `suites.py`; give what it printed."""
        flags = STRICT if lane.name == "strict" else ()
        orders = json.dumps(orders_of(lane))
        child = subprocess.Popen(
            [program, *flags, str(HERE / "suites.py"), "report.json"],
            cwd=folder,
            env=self._environment(lane),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._children.append(child)
        output, _ = child.communicate(orders)
        return f"{output}\nexit code {child.returncode}"

    def _environment(self, lane: Lane) -> dict[str, str]:
        ours = ("PYTHON", "PYSMC_", "COVERAGE_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        path = [self._folder / "site", ROOT, ROOT / "proto"]
        kept["PYTHONPATH"] = os.pathsep.join(map(str, path))
        kept["SUITES_DEADLINE"] = str(DEADLINE)
        if lane.name == "strict":
            kept["PYTHONASYNCIODEBUG"] = "1"
            kept["PYTHONHASHSEED"] = "random"
        return kept


def orders_of(lane: Lane) -> dict[str, list[str]]:
    worlds = {
        world: with_both_ends(lane.python, world)
        for world in ("shm", "sim", "declined")
    }
    match lane.name:
        case "plain":
            return {"plain": CLASSES}
        case "both":
            return worlds
        case _:
            return {"local": CLASSES, **worlds}


REPORTS = pytest.StashKey[Reports]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to run what the chosen tests ask for: other tests take their time."""
    wanted: set[Any] = {
        item.callspec.params["lane"]
        for item in session.items
        if isinstance(item, pytest.Function)
        and item.path.parent == HERE
        and hasattr(item, "callspec")
        and "lane" in item.callspec.params
    }
    if not wanted or session.config.option.collectonly:
        return
    names = ("strict", "plain", "both")  # the longest first
    lanes = sorted(wanted, key=lambda lane: (names.index(lane.name), lane.python))
    places = session.config._tmp_path_factory  # type: ignore[attr-defined]
    folder = shared = places.mktemp("cpython")
    if hasattr(session.config, "workerinput"):
        shared = places.getbasetemp().parent / "cpython-lanes"
        shared.mkdir(exist_ok=True)
    session.config.stash[REPORTS] = Reports(folder, shared, lanes)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what still runs."""
    if REPORTS in config.stash:
        config.stash[REPORTS].close()


@pytest.fixture(scope="session")
def reports(request: pytest.FixtureRequest) -> Reports:
    """Give what runs the lanes."""
    return request.config.stash[REPORTS]


class World(NamedTuple):
    """What happened in one world of a lane."""

    version: str
    outcomes: dict[str, dict[str, Any]]


@pytest.fixture
def look_up(reports: Reports) -> Any:
    """Give the function that finds a world of a lane, or skips."""

    def find(lane: Lane, world: str) -> World:
        report = reports.of(lane)
        if "missing" in report:
            if lane.python == RUNNING and os.environ.get("CI"):
                pytest.fail(report["missing"])
            pytest.skip(report["missing"])
        assert "broken" not in report, report["broken"]
        return World(report["version"], report["worlds"][world])

    return find


@pytest.fixture
def both_ends() -> Any:
    """Give the function that names the tests with a transport at both ends."""
    return with_both_ends


@pytest.fixture
def expected() -> dict[str, Any]:
    """Give the whole of expected.toml."""
    return EXPECTED


@pytest.fixture
def is_measured() -> Any:
    """Give the function that says whether the tests of a release were counted."""
    releases = {release for counts in EXPECTED["tests"].values() for release in counts}
    return releases.__contains__


@pytest.fixture
def expect() -> Any:
    """Give the function that holds a class's number of tests to the list."""

    def check(suite: str, version: str, count: int) -> None:
        counts = EXPECTED["tests"][suite]
        if version in counts:
            assert count == counts[version], f"{suite} on Python {version}"
        else:
            earlier = [one for one in counts if order(one) < order(version)]
            least = counts[max(earlier or counts, key=order)] * 9 // 10
            assert count >= least, f"{suite} on Python {version}"

    return check


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill in what a test asks for: lane and suite, lane and test, or a lane."""
    marker = metafunc.definition.get_closest_marker("lane")
    if marker is None:
        return
    (name, *world) = marker.args
    rows: list[tuple[Any, ...]] = []
    for python in [RUNNING] if name == "strict" else pythons():
        lane = Lane(python, name)
        if "suite" in metafunc.fixturenames:
            rows += [(lane, suite) for suite in CLASSES]
        elif "test" in metafunc.fixturenames:
            rows += [(lane, test) for test in with_both_ends(python, *world)]
        else:
            rows += [(lane,)]
    names = [n for n in ("lane", "suite", "test") if n in metafunc.fixturenames]
    values: list[Any] = rows if len(names) > 1 else [row[0] for row in rows]
    ids = ["-".join([row[0].python, *row[1:]]) for row in rows]
    metafunc.parametrize(",".join(names), values, ids=ids)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "lane(name, world): which run of suites.py a test judges"
    )
