"""Which commit is tested, and what follows from its number."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

__all__ = ["commit", "rotation", "trees"]

ROOT = Path(__file__).resolve().parents[1]
TESTED = ("pysmc", "proto", "tests")
"""What a report is about."""


@cache
def commit() -> str:
    """Tell the commit that is tested, with a `+` when files differ from it."""
    head = _git("rev-parse", "HEAD")
    if head.returncode != 0:
        return "unknown"
    changed = _git("diff", "--quiet", "HEAD", "--", *TESTED)
    return head.stdout.strip() + ("+" if changed.returncode else "")


@cache
def trees() -> dict[str, str]:
    """Tell git's names of the folders that are tested, as they are in the commit.

    A commit may be made anew before it lands, and then has another name. These have
    not: `git rev-parse COMMIT:pysmc` tells whether it is the code that was tested.
    """
    names = _git("rev-parse", *(f"HEAD:{folder}" for folder in TESTED))
    if names.returncode != 0:
        return {}
    return dict(zip(TESTED, names.stdout.split(), strict=True))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    git = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(git, capture_output=True, text=True, check=False)


def rotation(parts: int) -> int:
    """Choose one of so many parts, another one with another commit."""
    digits = commit().rstrip("+")
    return 0 if digits == "unknown" else int(digits, 16) % parts
