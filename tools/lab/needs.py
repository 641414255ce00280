"""The one place that decides whether the lab can run here, and says why not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from lab.errors import LabMissing

PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "ip": "iproute2",
    "rdma": "iproute2",
    "tc": "iproute2",
    "nft": "nftables",
    "setpriv": "util-linux",
    "timeout": "coreutils",
    "ibv_rc_pingpong": "ibverbs-utils",
    "ib_write_bw": "perftest",
    "tcpdump": "tcpdump",
    "tshark": "tshark",
}
"""Program -> the Debian package that brings it. The guest uses the host's."""
PYVERBS = Path("/usr/lib/python3/dist-packages/pyverbs")
"""Debian's, which is the one that the guest uses."""
WANTED = "PYSMC_LAB"
"""Environment: "require" makes a lab that cannot run an error, "off" leaves it out."""


def missing() -> str:
    """Say why the lab cannot run on this machine; empty when it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86_64, and this is {platform.machine()}"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    packages = {
        package: None
        for program, package in PROGRAMS.items()
        if shutil.which(program, path=path) is None
    }
    if packages:
        return f"the lab needs programs: apt-get install -y {' '.join(packages)}"
    return _pyverbs_missing()


def _pyverbs_missing() -> str:
    """Debian builds pyverbs for its own Python only."""
    if not PYVERBS.is_dir():
        return "the lab needs pyverbs: apt-get install -y python3-pyverbs"
    tag = sys.implementation.cache_tag
    if not any(PYVERBS.glob(f"*.{tag}-*.so")):
        have = platform.python_version()
        return f"the lab needs a Python that pyverbs was built for: not {have}"
    return ""


def check() -> None:
    """Stop where the lab cannot run.

    Raises:
        LabMissing: It cannot.
    """
    why = missing()
    if why:
        raise LabMissing(why)


def is_required() -> bool:
    """Tell whether a lab that cannot run is an error."""
    return os.environ.get(WANTED, "") == "require"


def is_off() -> bool:
    """Tell whether the lab was turned off."""
    return os.environ.get(WANTED, "") == "off"
