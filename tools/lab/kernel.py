"""The guest's kernel: the distribution's own package, unpacked into the cache.

Soft-RoCE that carries data needs Linux 6.12 (with 6.1 connections hang); Debian has it
as its own kernel (13) or among the security updates (12). Linux 6.1, the kernel of
Debian 12, is there as a peer that has to be declined. Only the image and the modules
that a guest without hardware can use are kept, and nothing is installed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import LabMissing, NotOffered
from lab.places import cache

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Series:
    """Kernels that do the same for the lab."""

    name: str
    """As `uname -r` begins."""
    package: re.Pattern[str]
    """What the distribution's packages are called."""
    variable: str
    """Environment: names a package to take in place of a download."""
    releases: tuple[str, ...]
    """Which of Debian have it."""

    @property
    def is_offered_here(self) -> bool:
        """Whether this distribution has it, if its index can be read."""
        try:
            here = platform.freedesktop_os_release()
        except OSError:
            return False
        return here["ID"] == "debian" and here.get("VERSION_ID") in self.releases


SERIES = {
    one.name: one
    for one in (
        Series(
            "6.12",
            re.compile(
                r"linux-image-6\.12\.(?P<patch>\d+)\+deb(?P<release>1[23])-amd64"
                r"(?P<rest>-unsigned)?"
            ),
            "PYSMC_LAB_KERNEL",
            ("12", "13"),
        ),
        Series(
            "6.1",
            re.compile(
                r"linux-image-6\.1\.(?P<release>0)-(?P<patch>\d+)-amd64"
                r"(?P<rest>-unsigned)?"
            ),
            "PYSMC_LAB_KERNEL_6_1",
            ("12",),
        ),
    )
}
USUAL = "6.12"
"""The series of a scenario that does not name one."""
KEPT = (
    "arch", "crypto", "lib", "net", "fs/9p", "fs/fscache", "fs/netfs", "fs/overlayfs",
    "drivers/infiniband", "drivers/virtio", "drivers/char/hw_random",
    "drivers/net/bonding", "drivers/net/*.ko*",
)  # fmt: skip
"""Below lib/modules/VERSION/kernel; the cloud images lack rdma_rxe and 9p."""
NEEDED = ("rdma_rxe", "ib_uverbs", "9pnet_virtio", "9p", "overlay", "veth", "sch_netem")
"""A package without one of these is of no use."""
DOWNLOAD_WAIT = 600.0
"""Seconds for a package of about 100 MB."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel."""

    folder: Path
    version: str
    """As `uname -r` says it."""

    @property
    def series(self) -> str:
        """The key of `SERIES`."""
        return ".".join(self.version.split(".")[:2])

    @property
    def image(self) -> Path:
        """What QEMU boots."""
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        """What is /lib/modules/VERSION in the guest."""
        return self.folder / "lib" / "modules" / self.version

    def load_order(self, *names: str) -> list[Path]:
        """List the files of modules after those that they depend on.

        Raises:
            LabMissing: The kernel lacks one.
        """
        found: dict[Path, None] = {}
        for name in names:
            command = ["modprobe", "--show-depends", "--ignore-install"]
            command += ["-d", str(self.folder), "-S", self.version, name]
            done = _run(command)
            if done.returncode != 0:
                text = "kernel {} has no module {}: {}"
                raise LabMissing(text, self.version, name, done.stderr.strip())
            for line in done.stdout.splitlines():
                if line.startswith("insmod "):
                    found[Path(line.split()[1])] = None
        return list(found)


def choose(names: Iterable[str], series: str = USUAL) -> str | None:
    """Choose a package by its name: the newest, signed rather than unsigned.

    Args:
        names: Packages that the distribution offers, in any order.
        series: One of `SERIES`.
    """
    package = SERIES[series].package
    found = [match for match in map(package.fullmatch, names) if match]

    def rank(match: re.Match[str]) -> tuple[int, int, bool]:
        return int(match["patch"]), int(match["release"]), match["rest"] is None

    return max(found, key=rank).group() if found else None


def cached(series: str = USUAL) -> Kernel | None:
    """Find the newest kernel of a series that lies in the cache."""
    folder = cache() / "kernels"
    found = [path.parent for path in folder.glob(f"{series}.*/complete")]
    if not found:
        return None
    newest = max(found, key=lambda path: _numbers(path.name))
    return Kernel(newest, newest.name)


def get(series: str = USUAL, *, is_newest_wanted: bool = False) -> Kernel:
    """Find a kernel in the cache, or fetch one into it.

    Args:
        series: One of `SERIES`.
        is_newest_wanted: Ask the package index even when there is one.

    Raises:
        LabMissing: None can be had.
        NotOffered: This distribution has none of a series that is not the usual one.
    """
    named = os.environ.get(SERIES[series].variable)
    if named:
        return unpack(Path(named))
    found = None if is_newest_wanted else cached(series)
    return found or _download(SERIES[series])


def _download(series: Series) -> Kernel:
    if shutil.which("apt-get") is None:
        text = "no apt-get: {} may name a Debian package ({}, amd64)"
        raise LabMissing(text, series.variable, series.name)
    options: list[str] = []
    name = _newest(series, options)
    if name is None:
        options = _own_lists()
        name = _newest(series, options)
    if name is None:
        text = "the index has no linux-image-{}.*-amd64 of Debian {}; {} may name one"
        releases = " or ".join(series.releases)
        is_extra = series.name != USUAL and not series.is_offered_here
        kind = NotOffered if is_extra else LabMissing
        raise kind(text, series.name, releases, series.variable)
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        # As root, apt would hand this to a user of its own, who may not write here.
        command = ["apt-get", *options, "-qq", "-o", "APT::Sandbox::User=root"]
        done = _run([*command, "download", name], cwd=folder)
        packages = list(Path(folder).glob("*.deb"))
        if done.returncode != 0 or not packages:
            text = "'apt-get download {}' failed: {}"
            raise LabMissing(text, name, done.stderr.strip())
        return unpack(packages[0])


def _newest(series: Series, options: list[str]) -> str | None:
    prefix = f"linux-image-{series.name}."
    offered = _run(["apt-cache", *options, "pkgnames", prefix]).stdout.split()
    return choose(offered, series.name)


def _own_lists() -> list[str]:
    """Fetch the package index into the cache, which needs no privilege."""
    own = cache() / "apt"
    (own / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (own / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::lists={own / 'lists'}", "-o", f"Dir::Cache={own}"]
    command = ["apt-get", *options, "-qq", "-o", "APT::Sandbox::User=root", "update"]
    done = _run(command)
    if done.returncode != 0:
        text = "'apt-get update' failed: {}"
        raise LabMissing(text, done.stderr.strip())
    return options


def unpack(package: Path) -> Kernel:
    """Take the image and the modules out of a package, into the cache.

    Args:
        package: A Debian package of a kernel.

    Raises:
        LabMissing: It is none, or it lacks a module.
    """
    if not package.is_file():
        text = "there is no kernel package {}"
        raise LabMissing(text, package)
    kernels = cache() / "kernels"
    kernels.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        whole = Path(folder) / "whole"
        done = _run(["dpkg-deb", "-x", str(package), str(whole)])
        images = list(whole.glob("boot/vmlinuz-*"))
        if done.returncode != 0 or not images:
            text = "{} is no kernel package: {}"
            raise LabMissing(text, package, done.stderr.strip())
        version = images[0].name.removeprefix("vmlinuz-")
        place = kernels / version
        if (place / "complete").exists():
            return Kernel(place, version)
        shutil.rmtree(place, ignore_errors=True)
        part = Path(folder) / version
        _keep(whole, part, version)
        kernel = Kernel(part, version)
        kernel.load_order(*NEEDED)
        (part / "complete").write_text(f"{package.name}\n", encoding="utf-8")
        part.rename(place)
    return Kernel(place, version)


def _keep(whole: Path, part: Path, version: str) -> None:
    # Debian 13 has merged /lib into /usr/lib.
    modules = next(whole.glob(f"**/lib/modules/{version}"))
    kept = part / "lib" / "modules" / version
    kept.mkdir(parents=True)
    for path in modules.glob("modules.*"):
        shutil.copy2(path, kept)
    for pattern in KEPT:
        for path in (modules / "kernel").glob(pattern):
            target = kept / "kernel" / path.relative_to(modules / "kernel")
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, symlinks=True)
            else:
                shutil.copy2(path, target)
    shutil.copy2(whole / "boot" / f"vmlinuz-{version}", part / "vmlinuz")
    done = _run(["depmod", "-b", str(part), version])
    if done.returncode != 0:
        text = "depmod failed: {}"
        raise LabMissing(text, done.stderr.strip())


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _run(
    command: list[str], cwd: str | None = None
) -> subprocess.CompletedProcess[str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    env = {
        **os.environ,
        "PATH": path,
        "LC_ALL": "C",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_WAIT,
            check=False,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"no {command[0]} here")
    except subprocess.TimeoutExpired:
        text = f"not done after {DOWNLOAD_WAIT:g} s"
        return subprocess.CompletedProcess(command, 124, "", text)
