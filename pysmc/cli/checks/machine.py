"""The machine as the checks see it: files, environment, limits, users.

Everything that a test has to fake goes through this object; what a check tries for real
(a socket, shared memory) it tries itself. Decides nothing.

Source: proc(5), sysfs(5), capabilities(7), cgroups(7).
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pysmc.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pysmc.cli.checks.kernel_smc_tables import Tables
    from pysmc.discovery.option.trial import Trial
    from pysmc.fabric.verbs_loading import Pyverbs

__all__ = ["KIB", "MIB", "Machine", "size"]

KIB = 1024
MIB = 1024 * KIB
START_SECONDS = 30.0
"""How long the start and the end of a Python may take at most."""
TEXT_BYTES = 64 * KIB
"""Most that is read of one file of /proc or /sys."""


def _open_error(path: Path) -> str:
    """Open a device for reading and writing; tells what went wrong, or nothing."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _find_pyverbs() -> Pyverbs:
    from pysmc.fabric.verbs_loading import find_pyverbs

    return find_pyverbs()


def _socket_error(family: int, protocol: int) -> int:
    try:
        socket.socket(family, socket.SOCK_STREAM, protocol).close()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _smc_tables() -> Tables:
    from pysmc.cli.checks.kernel_smc_tables import read_tables

    return read_tables()


def _try_option() -> Trial:
    from pysmc.discovery.option.trial import try_option

    return try_option()


def _option_cgroups() -> list[str]:
    from pysmc.discovery.option.cgroup import NoCgroupError
    from pysmc.discovery.option.install import find_all

    try:
        return sorted({str(one.cgroup) for one in find_all()})
    except (NoCgroupError, OSError):
        return []


def _exchange(ports: Sequence[str], seconds: float) -> list[str]:
    """Try ports in a process of its own; tells of each what went wrong, or nothing.

    Raises:
        OSError: There is no such process to be had.
    """
    command = [sys.executable, "-m", "pysmc.cli.checks.exchange", str(seconds), *ports]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=len(ports) * seconds + START_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return [f"no end within {error.timeout:g} s"] * len(ports)
    found = done.stdout.splitlines()
    last = (done.stderr.strip().splitlines() or [""])[-1]
    why = last or f"it ended with code {done.returncode}"
    return found + [why] * (len(ports) - len(found))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is looked at; by default this machine and this process."""

    root: Path = Path("/")
    """Where /proc, /sys, /dev, /etc and so on are."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    """The environment variables."""
    system: str = field(default_factory=platform.system)
    """The kernel's name, "Linux"."""
    release: str = field(default_factory=platform.release)
    """The kernel's release, for example "6.12.41+deb12-amd64"."""
    architecture: str = field(default_factory=platform.machine)
    """The machine's kind, for example "x86_64"."""
    euid: int = field(default_factory=os.geteuid)
    """The effective user."""
    limit: Callable[[int], tuple[int, int]] = resource.getrlimit
    """Gives the soft and the hard limit of a resource of `resource`."""
    open_error: Callable[[Path], str] = _open_error
    """Tells why a device cannot be opened for reading and writing; empty if it can."""
    find_pyverbs: Callable[[], Pyverbs] = _find_pyverbs
    """Finds pyverbs, as `pysmc.fabric.verbs_loading` does."""
    exchange: Callable[[Sequence[str], float], list[str]] = _exchange
    """Tries RDMA ports, each for some seconds; tells why each failed; empty if not."""
    socket_error: Callable[[int, int], int] = _socket_error
    """Makes a stream socket of a family and protocol; gives the errno, or 0."""
    smc_tables: Callable[[], Tables] = _smc_tables
    """Reads the tables of the kernel's SMC."""
    try_option: Callable[[], Trial] = _try_option
    """Tries the TCP option with sockets of this process."""
    option_cgroups: Callable[[], list[str]] = _option_cgroups
    """Names the cgroups that have the programs for it, as far as they can be seen."""
    peer: str = ""
    """A peer that was asked about, as host."""

    def path(self, name: str) -> Path:
        """Find an absolute name on this machine."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str | None:
        """Read a small file, without blanks at its ends; None when it cannot be."""
        try:
            with self.path(name).open("rb") as file:
                return file.read(TEXT_BYTES).decode("utf-8", "replace").strip()
        except OSError:
            return None

    def number(self, name: str) -> int | None:
        """Read a whole number; None when there is none ("max" is none, too)."""
        try:
            return int(self.text(name) or "")
        except ValueError:
            return None

    def names(self, folder: str) -> list[str]:
        """List what a folder has; nothing when it is not there."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except OSError:
            return []

    def has_line(self, name: str, words: str) -> bool:
        """Tell whether a line of a file of any length has these words."""
        try:
            with self.path(name).open(encoding="utf-8", errors="replace") as file:
                return any(words in line for line in file)
        except OSError:
            return False

    def has_capability(self, bit: int) -> bool:
        """Tell whether the process has a capability of capabilities(7), by its bit."""
        for line in (self.text("/proc/self/status") or "").splitlines():
            key, _, value = line.partition(":")
            if key == "CapEff":
                return bool(int(value, 16) >> bit & 1)
        return False

    @property
    def config(self) -> Config:
        """The configuration of the environment; the defaults when it is not valid."""
        try:
            return Config.from_env(self.environ)
        except ValueError:
            return Config()


def size(count: int) -> str:
    """Say a number of bytes in words: "16 KiB"."""
    for unit, name in ((1024 * MIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} bytes"
