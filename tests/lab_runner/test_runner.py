"""The guest's side: each scenario in a child of its own, whatever becomes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import plugin, runner

pytestmark = pytest.mark.slow

TOOLS = Path(plugin.__file__).resolve().parents[1]
SCENARIOS = """
import os, signal, subprocess, sys, threading
from pathlib import Path
import pytest

pytestmark = pytest.mark.lab(seconds=30)
HELD = []

def test_good(record_property):
    print("said by a good one")
    record_property("speed", 7)
    HELD.append(1)
    assert Path(os.environ["PYSMC_LAB_FOLDER"]).is_dir()

def test_nothing_is_shared():
    assert HELD == []

def test_bad():
    print("said by a bad one")
    assert [1, 2] == [1, 3]

def test_skipped():
    pytest.skip("no reason")

@pytest.mark.lab(seconds=0.5)
def test_hanging():
    print("said before it hung", flush=True)
    threading.Event().wait()

def test_leaving():
    os._exit(3)

def test_killed():
    os.kill(os.getpid(), signal.SIGKILL)

def test_capturing():
    Path(os.environ["PYSMC_LAB_FOLDER"], "one.pcap").write_text("packets")

@pytest.fixture
def broken():
    yield
    raise RuntimeError("teardown")

def test_broken_teardown(broken): ...
"""
NAMES = [
    "test_good", "test_nothing_is_shared", "test_bad", "test_skipped", "test_hanging",
    "test_leaving", "test_killed", "test_capturing", "test_broken_teardown",
]  # fmt: skip
SEAMS = """
import os
from pathlib import Path
import lab.runner
lab.runner.SHARE = Path(os.environ["SHARE"])
lab.runner.CGROUPS = Path(os.environ["SHARE"]) / "cgroups"
lab.runner.rebuild_the_network = lambda: print("rebuilt", file=open(
    os.environ["SHARE"] + "/rebuilt", "a"))
pytest_plugins = ["lab.plugin", "lab.runner"]
"""


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run them all; gives the share with the results."""
    folder: Path = tmp_path_factory.mktemp("guest")
    share = folder / "share"
    (share / "cgroups").mkdir(parents=True)
    (folder / "test_it.py").write_text(SCENARIOS)
    (folder / "conftest.py").write_text(SEAMS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    wanted = [f"test_it.py::{name}" for name in [*NAMES, "test_nowhere"]]
    (share / "list").write_text("\n".join(wanted) + "\n")
    env = dict(os.environ, PYTHONPATH=str(TOOLS), SHARE=str(share))
    env |= {"PYSMC_LAB_GUEST": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    (share / "output").write_text(done.stdout + done.stderr)
    return share


def result(share: Path, name: str) -> dict[str, Any]:
    number = NAMES.index(name)
    data: dict[str, Any] = json.loads((share / f"{number}.json").read_text())
    return data


def outcomes(share: Path, name: str) -> list[tuple[str, str]]:
    return [(one["when"], one["outcome"]) for one in result(share, name)["reports"]]


GOOD = [("setup", "passed"), ("call", "passed"), ("teardown", "passed")]


@pytest.mark.parametrize(
    "name", ["test_good", "test_nothing_is_shared", "test_capturing"]
)
def test_what_passes_is_reported_whole(share: Path, name: str) -> None:
    assert outcomes(share, name) == GOOD


def test_output_and_properties_come_along(share: Path) -> None:
    call = result(share, "test_good")["reports"][1]
    assert ["Captured stdout call", "said by a good one\n"] in call["sections"]
    assert call["user_properties"] == [["speed", 7]]


def test_a_failure_shows_its_values_and_the_kernel_log(share: Path) -> None:
    call = result(share, "test_bad")["reports"][1]
    assert "[1, 3]" in json.dumps(call["longrepr"])
    sections = dict(call["sections"])
    assert sections["Captured stdout call"] == "said by a bad one\n"
    assert "the guest's kernel" in sections


def test_a_skip_is_a_skip(share: Path) -> None:
    assert outcomes(share, "test_skipped")[1] == ("call", "skipped")


def test_what_hangs_is_ended_at_its_limit_and_says_where(share: Path) -> None:
    (report,) = result(share, "test_hanging")["reports"]
    assert report["outcome"] == "failed"
    assert "did not end within its 0.5 seconds" in report["longrepr"]
    assert "in test_hanging" in report["longrepr"], "the stack"
    assert "said before it hung" in dict(report["sections"])["Captured stdout call"]


@pytest.mark.parametrize(("name", "code"), [("test_leaving", 3), ("test_killed", -9)])
def test_what_dies_is_a_failure(share: Path, name: str, code: int) -> None:
    (report,) = result(share, name)["reports"]
    assert report["outcome"] == "failed"
    assert f"it ended with {code} and without a report" in report["longrepr"]


def test_a_teardown_that_fails_is_a_failure(share: Path) -> None:
    assert outcomes(share, "test_broken_teardown")[2] == ("teardown", "failed")


def test_what_a_scenario_leaves_in_its_folder_is_kept(share: Path) -> None:
    number = NAMES.index("test_capturing")
    folder = share / f"{number}-test_capturing"
    assert [path.name for path in folder.iterdir()] == ["one.pcap"]
    assert not (share / "0-test_good").exists(), "an empty one is not"


def test_the_network_is_built_anew_after_every_failure(share: Path) -> None:
    failures = ["test_bad", "test_hanging", "test_leaving", "test_killed"]
    failures.append("test_broken_teardown")
    assert len((share / "rebuilt").read_text().splitlines()) == len(failures)


def test_one_that_is_not_found_is_told(share: Path) -> None:
    data = json.loads((share / f"{len(NAMES)}.json").read_text())
    assert "has not collected it" in data["error"]


def test_a_network_that_cannot_be_taken_away_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "said"
    (tmp_path / "guest").mkdir()
    script = f"echo $1 >>{said}; [ $1 = up ] || exec sleep 30"
    (tmp_path / "guest" / "network").write_text(script)
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(runner, "REBUILD_WAIT", 1.0)
    runner.rebuild_the_network()
    assert said.read_text().split() == ["down", "up"]
