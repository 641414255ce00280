"""Finds Pythons, and has `suites.py` run on each by `lanes.py`."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
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


class Reports:
    """Has the lanes that are asked for run, each once, by a process of their own.

    Args:
        folder: For the plan, and for what the other Pythons need.
        shared: Where the lanes leave their results. Processes that test at the same
            time have the same, and whoever comes first runs a lane.
        lanes: What is asked for.
    """

    def __init__(self, folder: Path, shared: Path, lanes: list[Lane]) -> None:
        self._shared = shared
        # The other Pythons have nothing of ours installed, and need only this.
        (folder / "site").mkdir()
        package = Path(construct.__file__).parent
        (folder / "site" / "construct").symlink_to(package)
        plans = [self._plan(lane, folder / "site") for lane in lanes]
        (folder / "plan.json").write_text(json.dumps(plans), encoding="utf-8")
        with (folder / "said").open("wb") as said:
            self._runner = subprocess.Popen(
                [sys.executable, str(HERE / "lanes.py"), str(folder / "plan.json")],
                env=without_ours(),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # ends with all that it has started
            )
        self._said = folder / "said"

    def of(self, lane: Lane) -> dict[str, Any]:
        """Give a lane's result, when it is there."""
        result = self._folder(lane) / "result.json"
        until = time.monotonic() + DEADLINE * 2
        pause = threading.Event()
        while not result.exists():
            # Asked before the file is looked for once more: its last act may be that.
            is_over = self._runner.poll() is not None or time.monotonic() > until
            if is_over and not result.exists():
                code = self._runner.returncode
                said = self._said.read_text(encoding="utf-8", errors="replace")
                return {"broken": f"no result of {lane}, exit code {code}:\n{said}"}
            pause.wait(0.1)
        found = json.loads(result.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        if self._runner.poll() is None:
            os.killpg(self._runner.pid, signal.SIGKILL)
            self._runner.wait()

    def _folder(self, lane: Lane) -> Path:
        return self._shared / f"{lane.name}-{lane.python}"

    def _plan(self, lane: Lane, site: Path) -> dict[str, Any]:
        environment = without_ours()
        path = [site, ROOT, ROOT / "proto"]
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
        environment["SUITES_DEADLINE"] = str(DEADLINE)
        if lane.name == "strict":
            environment["PYTHONASYNCIODEBUG"] = "1"
            environment["PYTHONHASHSEED"] = "random"
        return {
            "python": lane.python,
            "programs": pythons()[lane.python],
            "flags": STRICT if lane.name == "strict" else (),
            "folder": str(self._folder(lane)),
            "environment": environment,
            "orders": orders_of(lane),
        }


def without_ours() -> dict[str, str]:
    """Give the environment without what is meant for the tests' own process."""
    ours = ("PYTHON", "PYSMC_", "COVERAGE_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


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
