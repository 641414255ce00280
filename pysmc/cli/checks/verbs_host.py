"""Checks of what the verbs fabric stands on: the library, the kernel, the devices.

Decides from files alone whether RDMA devices are there and may be used, and how to get
one (soft-RoCE needs no hardware). What a device does is tried in `checks.verbs`.

Source: kernel, `Documentation/ABI/stable/sysfs-class-infiniband`; rdma-link(8),
libibverbs' README, getrlimit(2).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pysmc.cli.checks.check import check, fail, ok, skip, warn
from pysmc.cli.checks.system import container_kind

if TYPE_CHECKING:
    from pysmc.cli.checks.check import Finding
    from pysmc.cli.checks.machine import Machine

__all__ = ["CHECKS", "soft_roce_commands"]

PROVIDERS = "/etc/libibverbs.d"
DEVICES = "/sys/class/infiniband"
VERBS = "/sys/class/infiniband_verbs"
NODES = "/dev/infiniband"
NETDEVS = "/sys/class/net"
ROUTES = "/proc/net/route"
SOFT_ROCE = "rdma_rxe"


@check(
    "verbs.pyverbs",
    looks_at="Whether python3-pyverbs is found, on the module path or where"
    " distributions put it, and can be loaded by this Python.",
    means="pysmc reaches RDMA devices through pyverbs; without it there is no fabric"
    " verbs, and everything else works as before.",
    remedy="apt install python3-pyverbs (dnf: the same name), and use a virtual"
    " environment of the distribution's own Python: pyverbs is built for that one.",
    seconds=20,
)
def pyverbs(machine: Machine) -> Finding:
    """Find and load pyverbs."""
    found = machine.find_pyverbs()
    if found.problem:
        return fail(f"{found.problem}.")
    version = f"rdma-core {found.version}" if found.version else "unknown version"
    return ok(f"pyverbs of {version}, for {found.interpreter}, in {found.path}.")


@check(
    "verbs.providers",
    looks_at="The files in /etc/libibverbs.d that tell libibverbs which devices it can"
    " drive.",
    means="libibverbs does not see the device, although the kernel has it.",
    remedy="apt install ibverbs-providers (dnf: libibverbs)",
    needs=("verbs.pyverbs", "verbs.devices"),
)
def providers(machine: Machine) -> Finding:
    """Look for the providers of libibverbs."""
    files = [n for n in machine.names(PROVIDERS) if n.endswith(".driver")]
    names = [name.removesuffix(".driver") for name in files]
    if not names:
        return fail(f"There is no provider in {PROVIDERS}.")
    soft = [name for name in machine.names(DEVICES) if _is_soft(machine, name)]
    if soft and "rxe" not in names:
        return fail(f"There is no provider for soft-RoCE ({', '.join(soft)}).")
    return ok(f"{len(names)} providers, {'with' if 'rxe' in names else 'without'} rxe.")


def _is_soft(machine: Machine, device: str) -> bool:
    # Only devices made of a network device have this file.
    return machine.path(f"{DEVICES}/{device}/parent").exists()


@check(
    "verbs.soft_roce",
    looks_at="Whether the kernel has, or can load, the module rdma_rxe (soft-RoCE), by"
    " which every network device becomes an RDMA device.",
    means="Without it RDMA needs an adapter; it is skipped, and does not fail.",
    remedy="Load it, or boot a kernel that has it.",
)
def soft_roce(machine: Machine) -> Finding:
    """Look for soft-RoCE; its absence is no fault where there is hardware."""
    commands = " && ".join(soft_roce_commands(machine))
    if machine.path(f"/sys/module/{SOFT_ROCE}").exists():
        return ok(f"The module {SOFT_ROCE} is loaded.")
    folder = f"/lib/modules/{machine.release}"
    lists = [f"{folder}/modules.dep", f"{folder}/modules.builtin"]
    found = [machine.has_line(name, f"/{SOFT_ROCE}.ko") for name in lists]
    if any(found):
        return ok(f"The module {SOFT_ROCE} can be loaded; as root: {commands}.")
    if not machine.names(folder):
        where = container_kind(machine) and " (in a container: ask the host)"
        return skip(f"The modules of this kernel are not to be seen here{where}.")
    return skip(
        f"This kernel ({machine.release}) comes without the module {SOFT_ROCE}.",
        "For soft-RoCE, boot a full kernel of the distribution (Debian:"
        " linux-image-amd64, not linux-image-cloud-amd64; Ubuntu: also"
        " linux-modules-extra).",
    )


def soft_roce_commands(machine: Machine) -> list[str]:
    """Give the commands that make a soft-RoCE device, for this machine's network."""
    netdev = _network_device(machine)
    return [
        f"modprobe {SOFT_ROCE}",
        f"rdma link add rxe0 type rxe netdev {netdev}",
    ]


def _network_device(machine: Machine) -> str:
    """Choose a network device: that of the default route, else the first one."""
    for line in (machine.text(ROUTES) or "").splitlines()[1:]:
        name, destination, *_ = line.split()
        if destination == "00000000":
            return name
    others = [name for name in machine.names(NETDEVS) if name != "lo"]
    return others[0] if others else "eth0"


@check(
    "verbs.devices",
    looks_at="The RDMA devices that the kernel has (/sys/class/infiniband).",
    means="There is nothing that could carry RDMA.",
    remedy="See verbs.soft_roce.",
)
def devices(machine: Machine) -> Finding:
    """Look for RDMA devices."""
    names = machine.names(DEVICES)
    if names:
        soft = [name for name in names if _is_soft(machine, name)]
        texts = [f"{n} (soft-RoCE)" if n in soft else n for n in names]
        return ok(f"{', '.join(texts)}.")
    commands = "; ".join(soft_roce_commands(machine))
    return fail(
        "The kernel has no RDMA device.",
        remedy="Install the adapter's driver; or have soft-RoCE, over any network"
        f" device, as root: {commands} (docs/howto/rdma.md).",
    )


@check(
    "verbs.permissions",
    looks_at="Whether the device files /dev/infiniband/uverbs* of the devices can be"
    " opened for reading and writing.",
    means="The device is there, but this process may not use it.",
    remedy='Give the user access: by a udev rule (KERNEL=="uverbs*", MODE="0666", or'
    ' GROUP= and MODE="0660"), for a try by chmod; in a container by'
    " --device=/dev/infiniband.",
    needs=("verbs.devices",),
)
def permissions(machine: Machine) -> Finding:
    """Try to open the device files."""
    good, bad = [], []
    for node, device in uverbs(machine).items():
        path = machine.path(f"{NODES}/{node}")
        error = machine.open_error(path)
        if error:
            bad.append(f"{NODES}/{node} ({device}): {error}{_mode(path)}")
        else:
            good.append(f"{NODES}/{node} ({device})")
    if not good and not bad:
        return fail(
            f"{VERBS} has no device.",
            "The kernel's module for access from user space is not loaded.",
            "As root: modprobe ib_uverbs",
        )
    if bad:
        seen = f"User {machine.euid} cannot open {'; '.join(bad)}."
        return warn(seen) if good else fail(seen)
    return ok(f"{', '.join(good)} can be opened.")


def uverbs(machine: Machine) -> dict[str, str]:
    """Map the names of device files to those of the RDMA devices."""
    nodes = [name for name in machine.names(VERBS) if name.startswith("uverbs")]
    return {node: machine.text(f"{VERBS}/{node}/ibdev") or "unknown" for node in nodes}


def _mode(path: os.PathLike[str]) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f", mode {found.st_mode & 0o777:04o}, owner {found.st_uid}:{found.st_gid}"


CHECKS = (pyverbs, soft_roce, devices, providers, permissions)
