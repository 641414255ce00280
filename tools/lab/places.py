"""Where the lab keeps what it needs and what it leaves: nothing of it in the tree."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
HERE = Path(__file__).resolve().parent
RUNS_KEPT = 12
"""Results of so many runs stay; older ones are removed with a new one."""
_NUMBERS = itertools.count(1)


def cache() -> Path:
    """Give the folder of the lab: PYSMC_LAB_CACHE, or one in the user's cache."""
    named = os.environ.get("PYSMC_LAB_CACHE")
    if named:
        path = Path(named)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "pysmc" / "lab"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def new_results() -> Path:
    """Make the folder of one run, which is also the guest's writable share."""
    runs = cache() / "results"
    runs.mkdir(exist_ok=True)
    old = sorted(path for path in runs.iterdir() if not path.is_symlink())
    for path in old[: -RUNS_KEPT + 1]:
        shutil.rmtree(path, ignore_errors=True)
    # One process may start several in a second.
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(_NUMBERS)}"
    result = runs / name
    result.mkdir()
    latest = runs / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(result.name)
    return result
