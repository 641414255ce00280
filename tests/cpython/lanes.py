"""Runs lanes: a Python each, a few at a time, in a process apart from the tests.

Tests count their process's descriptors while the lanes run, and whoever starts a
process or waits for a lock holds some. Started by conftest.py as::

    python lanes.py PLAN

The plan is a JSON list of lanes; each leaves ``result.json`` in its folder, whole or
not at all: the lane's report, or what is ``missing``, or what is ``broken``.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, TypedDict

HERE = Path(__file__).resolve().parent
AT_ONCE = 3
"""Lanes at a time: most of their time CPython's tests wait."""


class Plan(TypedDict):
    """What is known of a lane before it runs."""

    python: str
    """Minor version."""
    programs: list[str]
    """That may be it, the best first."""
    flags: list[str]
    folder: str
    """Shared by all who want the lane: whoever comes first runs it."""
    environment: dict[str, str]
    orders: dict[str, list[str]]
    """What `suites.py` reads."""


@cache
def complaint_of(program: str) -> str:
    """Say why a Python cannot run its own tests; empty when it can."""
    look = [program, "-c", "import test.test_asyncio.utils"]
    done = subprocess.run(look, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"{program}: {said[-1] if 'Error' in said[-1] else said[0]}"


def run(plan: Plan) -> None:
    """Leave a lane's result, unless somebody else has."""
    folder = Path(plan["folder"])
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "result.json").exists():
            draft = folder / "draft.json"
            draft.write_text(json.dumps(play(plan, folder)), encoding="utf-8")
            draft.rename(folder / "result.json")


def play(plan: Plan, folder: Path) -> dict[str, Any]:
    """Run `suites.py` on the first program that has its own tests."""
    complaints = {program: complaint_of(program) for program in plan["programs"]}
    usable = [program for program, complaint in complaints.items() if not complaint]
    if not usable:
        python = plan["python"]
        how = f"Debian: apt-get install libpython{python}-testsuite"
        why = "; ".join(complaints.values())
        return {"missing": f"needs python{python} with its own tests ({how}): {why}"}
    done = subprocess.run(
        [usable[0], *plan["flags"], str(HERE / "suites.py"), "report.json"],
        cwd=folder,
        env=plan["environment"],
        input=json.dumps(plan["orders"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"broken": f"no report:\n{done.stdout}\nexit code {done.returncode}"}
    assert isinstance(report, dict)
    return report


def main(path: str) -> None:
    """Run all lanes of a plan."""
    plans: list[Plan] = json.loads(Path(path).read_text(encoding="utf-8"))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for ended in [pool.submit(partial(run, plan)) for plan in plans]:
            ended.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
