"""Why a step of the set-up failed, and what to do, in words.

Decides by the errno, by what the step needs, and by what this process may do.

Source: bpf(2), capabilities(7), user_namespaces(7); kernel counterpart:
kernel/bpf/syscall.c, kernel/bpf/cgroup.c (what each errno stands for).
"""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from pysmc.discovery.option.bpf import BpfError, Capability, Command
from pysmc.discovery.option.cgroup import PROC

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Process", "Trouble", "explain", "this_process"]

FIRST_KERNEL: Final = "5.15"
"""The first with all that the programs call; 6.1 is the oldest that was tried."""
WHOLE_RANGE: Final = ["0", "0", "4294967295"]
"""The uid map of the first user namespace."""


class Advice(NamedTuple):
    """What a failure stands for."""

    cause: str
    remedy: str


NO_BPF: Final = Advice(
    "There is no bpf(2) here: the kernel was built without it, a sandbox hides it, or"
    " its number is not known for this machine.",
    "Run it on the host, outside of the sandbox; the kernel needs CONFIG_BPF_SYSCALL"
    " and CONFIG_CGROUP_BPF.",
)
USER_NAMESPACE: Final = Advice(
    "This is a user namespace; its capabilities do not count for bpf(2).",
    "Run it on the host, as root.",
)
FORBIDDEN: Final = Advice(
    "bpf(2) is forbidden although the capabilities are there: by a container's seccomp"
    " filter, by lockdown or by a security module.",
    "Run it on the host; it has to be done once, and for all containers below.",
)
EXCLUSIVE: Final = Advice(
    "A program of somebody else is attached to this cgroup, or to a parent, and allows"
    " no other beside it.",
    'Look for it (bpftool cgroup tree) and attach it with the flag "multi", or choose'
    " another cgroup.",
)
NO_BPF_FILES: Final = Advice(
    "The folder is not in a BPF file system.",
    "mount -t bpf bpf /sys/fs/bpf, and choose a folder there.",
)
REFUSED: Final = Advice(
    "The kernel's verifier refused the program.",
    f"Take a newer kernel (at least {FIRST_KERNEL}), or report this log.",
)
BY_NUMBER: Final[Mapping[int, Advice]] = {
    errno.EINVAL: Advice(
        "This kernel does not know what was asked of it.",
        f"Take a newer kernel (at least {FIRST_KERNEL}) with CONFIG_CGROUP_BPF and"
        " CONFIG_INET.",
    ),
    errno.EBADF: Advice(
        "This directory is not a cgroup of version 2.",
        "Give a directory below the mount of cgroup2 (findmnt -t cgroup2).",
    ),
    errno.E2BIG: Advice(
        "There are 64 programs at this cgroup, and no more may be.",
        "Detach some of them (bpftool cgroup show).",
    ),
    errno.ENOMEM: Advice(
        "The kernel has no memory left for it.",
        "Free some, or raise the limit of this process's memory cgroup.",
    ),
    errno.EEXIST: Advice(
        "Something is there already.",
        "Try again: somebody else may be setting up at the same time.",
    ),
}
UNKNOWN: Final = Advice("The kernel did not do it.", "See bpf(2) for this errno.")


class Process(NamedTuple):
    """What this process may do, and on which kernel."""

    release: str
    """The kernel's, as uname(2) says it."""
    capabilities: int
    """CapEff of /proc/self/status."""
    in_user_namespace: bool
    """Whether its capabilities are only of a user namespace of its own."""


class Trouble(NamedTuple):
    """A failed step, explained."""

    step: str
    """What was tried, and the errno."""
    cause: str
    remedy: str
    facts: str
    """Kernel and capabilities."""
    log: str
    """The end of the verifier's log, or nothing."""

    def __str__(self) -> str:
        lines = [
            self.step,
            f"cause: {self.cause}",
            f"remedy: {self.remedy}",
            self.facts,
        ]
        if self.log:
            lines += ["the verifier said:", self.log]
        return "\n  ".join("\n".join(lines).splitlines())


def this_process(proc: Path = PROC) -> Process:
    """Look at this process."""
    text = _read(proc / "status")
    found = re.search(r"^CapEff:\s*([0-9a-fA-F]+)", text, re.MULTILINE)
    uids = _read(proc / "uid_map").split()
    release = os.uname().release
    capabilities = int(found[1], 16) if found else 0
    return Process(release, capabilities, bool(uids) and uids != WHOLE_RANGE)


def explain(error: BpfError, process: Process) -> Trouble:
    """Say why a step failed and what to do.

    Args:
        error: The step with its errno.
        process: From `this_process`.
    """
    # To bpf(2), CAP_SYS_ADMIN stands for the younger and smaller two as well.
    has_all = process.capabilities & Capability.SYS_ADMIN
    missing = 0 if has_all else error.needs & ~process.capabilities
    advice = _advice(error, missing, process)
    facts = f"Linux {process.release}, CapEff {process.capabilities:016x}"
    if missing:
        facts += f" (without {_names(missing)})"
    return Trouble(str(error), *advice, facts, error.log)


def _advice(error: BpfError, missing: int, process: Process) -> Advice:
    number = error.errno
    if number == errno.ENOSYS:
        return NO_BPF
    if number in {errno.EPERM, errno.EACCES} and missing:
        return Advice(
            f"This process lacks {_names(missing)}.",
            f"Run it as root, or with {_names(error.needs)} (AmbientCapabilities= in a"
            " unit of systemd, or setpriv --ambient-caps).",
        )
    if number == errno.EPERM and process.in_user_namespace:
        return USER_NAMESPACE
    if number == errno.EPERM:
        special = {Command.PROG_ATTACH: EXCLUSIVE, Command.OBJ_PIN: NO_BPF_FILES}
        return special.get(error.command, FORBIDDEN)
    if error.log:
        return REFUSED
    return BY_NUMBER.get(number or 0, UNKNOWN)


def _names(capabilities: int) -> str:
    rows = [f"CAP_{one.name}" for one in Capability if one & capabilities]
    return " and ".join(sorted(rows))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
