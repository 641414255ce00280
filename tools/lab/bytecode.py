"""Bytecode of the checkout for the guest, where compiling is ten times dearer.

The host may not keep any (PYTHONDONTWRITEBYTECODE), or not that of the newest edit. So
it is written into the cache of the lab, and packed where Python in the guest looks for
it: beside the sources. What pytest has rewritten for its assertions comes along.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from lab import pack
from lab.places import ROOT, cache

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

WAIT = 300.0
"""Seconds for all of it on a slow host; without it the guest is only slower."""


def folder() -> Path:
    """Give the folder below which bytecode lies as its source does below the root."""
    return cache() / "pycache"


def compile_tree() -> None:
    """Compile what has changed in the checkout."""
    names = [name for name in pack.TREE if (ROOT / name).is_dir()]
    _run(["-m", "compileall", "-q", *names])


def rewrite(files: Iterable[str]) -> None:
    """Let pytest rewrite test modules whose bytecode is older than they are.

    Args:
        files: Paths relative to the checkout.
    """
    paths = [ROOT / name for name in files]
    if all(_is_rewritten(path) for path in paths):
        return
    words = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    _run([*words, *map(str, paths)])


def _is_rewritten(path: Path) -> bool:
    place = folder() / path.parent.relative_to("/")
    since = path.stat().st_mtime
    found = place.glob(f"{path.stem}.{pack.TAG}-pytest-*.pyc")
    return any(one.stat().st_mtime >= since for one in found)


def _run(words: list[str]) -> None:
    own = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    own["PYTHONPYCACHEPREFIX"] = str(folder())
    subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=WAIT,
        check=False,
    )


def of_tree(sources: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    """Give bytecode files, each after the path that it has in the guest.

    Args:
        sources: Python files of the checkout.
    """
    for source in sources:
        place = folder() / source.parent.relative_to("/")
        for path in place.glob(f"{source.stem}.{pack.TAG}*.pyc"):
            if ".opt-" not in path.name:
                yield source.parent / "__pycache__" / path.name, path
