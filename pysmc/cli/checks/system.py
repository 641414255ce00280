"""Checks of the machine and of the settings, before any fabric.

Decides whether the kernel, the environment and the limits allow what pysmc needs, and
what it means that this is a container. Knows nothing of devices and sockets.

Source: getrlimit(2), cgroups(7), user_namespaces(7), tcp(7) for the oldest kernel.
"""

from __future__ import annotations

import difflib
import platform
import re
import resource
from dataclasses import fields
from typing import TYPE_CHECKING

from pysmc.cli.checks.check import check, fail, ok, warn
from pysmc.cli.checks.machine import size
from pysmc.config import Config

if TYPE_CHECKING:
    from pysmc.cli.checks.check import Finding
    from pysmc.cli.checks.machine import Machine

__all__ = ["CHECKS"]

PREFIX = "PYSMC_"
KERNEL_LEAST = (4, 2)
"""The first with TCP_SAVE_SYN; memfds, seals and eventfds are older."""
DESCRIPTORS_LEAST = 4096
"""Below that, a server of a thousand connections comes to its end."""
RELEASE = re.compile(r"(\d+)\.(\d+)")
CONTAINER_FILES = {
    "/.dockerenv": "docker",
    "/run/.containerenv": "podman",
    "/run/systemd/container": "systemd",
}


@check(
    "kernel",
    looks_at="The kernel's name and release, the machine's kind, and the Python.",
    means="pysmc needs Linux: every fabric and every way of discovery uses calls that"
    " other systems do not have. Connections stay TCP.",
    remedy="Run it on Linux 4.2 or later.",
)
def kernel(machine: Machine) -> Finding:
    """Look at the kernel, the architecture and the interpreter."""
    seen = (
        f"{machine.system} {machine.release}, {machine.architecture},"
        f" Python {platform.python_version()}."
    )
    if machine.system != "Linux":
        return fail(seen)
    found = RELEASE.match(machine.release)
    if found and (int(found[1]), int(found[2])) < KERNEL_LEAST:
        return fail(seen, "This kernel has no TCP_SAVE_SYN, which discovery needs.")
    return ok(seen)


@check(
    "configuration",
    looks_at="Every variable of the environment that begins with PYSMC_: whether its"
    " value is allowed, and whether its name is a misspelt one of a setting.",
    means="pysmc.Config.from_env(), and with it every loop, raises this error.",
    remedy="Correct the variable, or unset it; docs/reference/config.md lists them.",
)
def configuration(machine: Machine) -> Finding:
    """Look at the settings of the environment."""
    names = sorted(name for name in machine.environ if name.startswith(PREFIX))
    known = {f"{PREFIX}{field.name.upper()}" for field in fields(Config)}
    try:
        Config.from_env(machine.environ)
    except ValueError as error:
        return fail(f"{error}.")
    misspelt = [text for name in names if (text := _nearest(name, known))]
    if misspelt:
        return warn(
            " ".join(misspelt),
            "A variable that names no setting is ignored, so its default holds.",
            "Correct the name.",
        )
    found = [f"{n}={machine.environ[n]}" for n in names if n in known]
    if not found:
        return ok("No setting is made by a variable PYSMC_...: all defaults hold.")
    return ok(f"Set: {', '.join(found)}.")


def _nearest(name: str, known: set[str]) -> str:
    """Say what a name that is no setting may be meant for; others are not ours."""
    if name in known:
        return ""
    words = {setting.removeprefix(PREFIX): setting for setting in sorted(known)}
    near = difflib.get_close_matches(name.removeprefix(PREFIX), words, n=1)
    return f"{name} is no setting; {words[near[0]]} is." if near else ""


@check(
    "descriptors",
    looks_at="RLIMIT_NOFILE. pysmc raises the soft limit to the hard one by itself.",
    means="A connection takes a descriptor for TCP, and a link a few more; when they"
    " run out, new connections stay TCP (LIMIT), or are not accepted at all.",
    remedy="Raise the hard limit: LimitNOFILE= of the service, 'ulimit -Hn' of a"
    " shell, --ulimit nofile= of a container.",
)
def descriptors(machine: Machine) -> Finding:
    """Look at the limit of open descriptors."""
    soft, hard = machine.limit(resource.RLIMIT_NOFILE)
    seen = f"At most {_limit(hard)} descriptors (soft limit {_limit(soft)})."
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS_LEAST:
        return warn(seen)
    return ok(seen)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


@check(
    "memory",
    looks_at="The memory limit of the control group against max_pinned_bytes.",
    means="Receive buffers count there. Where the limit of a control group is reached,"
    " the kernel kills.",
    remedy="Raise the limit, or set PYSMC_MAX_PINNED_BYTES to a part of it.",
)
def memory(machine: Machine) -> Finding:
    """Look at the control group's memory limit."""
    limit = memory_limit(machine)
    if limit is None:
        return ok("No memory limit of a control group is seen.")
    most = machine.config.max_pinned_bytes
    seen = (
        f"The control group's limit is {size(limit)}; receive buffers may take"
        f" {size(most)} of it (max_pinned_bytes)."
    )
    return warn(seen) if limit < 2 * most else ok(seen)


def memory_limit(machine: Machine) -> int | None:
    """Tell the smallest memory limit of the process's control groups in bytes.

    Within a container the group's own path is often not to be seen; then the limit of
    the hierarchy's top, as it is mounted here, is the container's.

    Reference: cgroups(7); memory.max of version 2, memory.limit_in_bytes of version 1.
    """
    limits = []
    for line in (machine.text("/proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, file = (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            if controllers
            else ("/sys/fs/cgroup", "memory.max")
        )
        parts = [part for part in group.split("/") if part]
        for count in range(len(parts) + 1):
            name = "/".join([top, *parts[:count], file])
            limits.append(machine.number(name))
    # Version 1 says "no limit" by a number of nearly 2 to the power of 63.
    known = [limit for limit in limits if limit is not None and limit < 1 << 60]
    return min(known, default=None)


@check(
    "container",
    looks_at="Signs of a container, and whether the user is in a user namespace.",
    means="It never fails: it says what follows from it.",
    remedy="Nothing.",
)
def container(machine: Machine) -> Finding:
    """Tell whether this is a container, and what that means for pysmc."""
    kind = container_kind(machine)
    rows = (machine.text("/proc/self/uid_map") or "").splitlines()
    is_mapped = bool(rows) and rows[0].split() != ["0", "0", str(0xFFFFFFFF)]
    seen = [f"This is a container ({kind})." if kind else "No container is seen."]
    if kind:
        seen.append(
            "Shared memory reaches only processes of the same network namespace, for"
            " example of one pod, or with --network container:NAME; RDMA needs the"
            " devices of /dev/infiniband inside and a memlock limit of its own."
        )
    if is_mapped:
        seen.append(
            "The user is in a user namespace: users of other namespaces look all alike"
            " there, and are refused over shared memory."
        )
    return ok(" ".join(seen))


def container_kind(machine: Machine) -> str:
    """Tell which container this is; empty when nothing speaks for one."""
    for name, kind in CONTAINER_FILES.items():
        if machine.path(name).exists():
            return machine.text(name) or kind if kind == "systemd" else kind
    if "KUBERNETES_SERVICE_HOST" in machine.environ:
        return "kubernetes"
    return machine.environ.get("container", "")


CHECKS = (kernel, configuration, descriptors, memory, container)
