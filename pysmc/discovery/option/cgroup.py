"""Where cgroups of version 2 are mounted, and in which of them this process is.

Source: cgroups(7), proc_pid_mountinfo(5), Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["NoCgroupError", "mount_point", "own_cgroup"]

PROC = Path("/proc/self")
OCTAL = re.compile(r"\\([0-7]{3})")


class NoCgroupError(Exception):
    """There is no cgroup of version 2 here; the text says what is missing."""


def mount_point(proc: Path = PROC) -> Path:
    """Find where cgroup2 is mounted: with its root, if it is mounted several times.

    Raises:
        NoCgroupError: It is not mounted.
    """
    found = []
    for line in _read(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            root, point = (_unquoted(part) for part in before.split(" ")[3:5])
            found.append((root != "/", Path(point)))
    if not found:
        message = "no cgroup2 file system is mounted (a hybrid set-up is enough)"
        raise NoCgroupError(message)
    return min(found, key=lambda row: row[0])[1]


def own_cgroup(proc: Path = PROC) -> Path:
    """Find the directory of this process's cgroup.

    Raises:
        NoCgroupError: cgroup2 is not mounted, or the process is in none.
    """
    for line in _read(proc / "cgroup").splitlines():
        if line.startswith("0::"):
            return mount_point(proc) / line.removeprefix("0::").lstrip("/")
    message = f"{proc / 'cgroup'} has no line of version 2 (0::)"
    raise NoCgroupError(message)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror}"
        raise NoCgroupError(message) from error


def _unquoted(text: str) -> str:
    return OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
