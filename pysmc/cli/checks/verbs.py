"""Checks of RDMA devices in use: ports, GIDs, pinned memory, settings, an exchange.

Decides whether a connection could go over RDMA from this machine, and with --peer over
which device, by the same choice that a connection makes.

Source: kernel, `Documentation/ABI/stable/sysfs-class-infiniband`; getrlimit(2);
pysmc.fabric.verbs_ports.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

from pysmc.cli.checks.check import check, fail, ok, skip, warn
from pysmc.cli.checks.machine import size
from pysmc.cli.checks.verbs_host import DEVICES
from pysmc.fabric.verbs_ports import list_ports, usable

if TYPE_CHECKING:
    from pysmc.cli.checks.check import Finding
    from pysmc.cli.checks.machine import Machine
    from pysmc.fabric.verbs_ports import RdmaPort

__all__ = ["CHECKS"]

CAP_IPC_LOCK = 14
EXCHANGES_MOST = 4
"""Ports that are tried; a machine may have dozens of GIDs."""
EXCHANGE_SECONDS = 5.0
FEW_CONNECTIONS = 16


def _ports(machine: Machine) -> list[RdmaPort]:
    return list_ports(machine.path(DEVICES))


@check(
    "verbs.ports",
    looks_at="The state of each port of the devices.",
    means="A port that is not active carries nothing.",
    remedy="Bring the network device up (ip link set NAME up), look at the cable and at"
    " the switch.",
    needs=("verbs.devices",),
)
def ports(machine: Machine) -> Finding:
    """Look at the states of the ports."""
    states = {}
    for device in machine.names(DEVICES):
        for port in machine.names(f"{DEVICES}/{device}/ports"):
            text = machine.text(f"{DEVICES}/{device}/ports/{port}/state") or "unknown"
            states[f"{device}:{port}"] = text.rpartition(" ")[2]
    seen = f"{', '.join(f'{name} {state}' for name, state in states.items())}."
    if not states:
        return fail("The devices have no port.")
    active = [state == "ACTIVE" for state in states.values()]
    if all(active):
        return ok(seen)
    return warn(seen) if any(active) else fail(seen)


@check(
    "verbs.gids",
    looks_at="The GIDs of the active ports: type, address and network device. A usable"
    " one is of type RoCE v2, with an IPv4 or a global IPv6 address.",
    means="Without such a GID no connection can use the device (NO_DEVICE).",
    remedy="Give the network device an address (ip addr add ADDRESS/BITS dev NAME): its"
    " GID follows by itself.",
    needs=("verbs.ports",),
)
def gids(machine: Machine) -> Finding:
    """Look for GIDs that a connection could use."""
    found = _ports(machine)
    good = usable(found)
    if good:
        texts = [f"{port.name} {port.address} on {port.netdev}" for port in good]
        return ok(f"{'; '.join(texts)} (all {good[0].gid_type}).")
    return fail(f"No GID is usable: {_problems(found)}.")


def _problems(found: list[RdmaPort]) -> str:
    bad = [f"{port.name} {port.address} {port.problem}" for port in found]
    return "; ".join(bad) or "there is none"


@check(
    "verbs.memlock",
    looks_at="RLIMIT_MEMLOCK against what link groups and connections pin with the"
    " configured rmbe_bytes. CAP_IPC_LOCK lifts the limit.",
    means="Receive buffers are pinned memory. Where the limit is reached, connections"
    " stay TCP (MEMLOCK).",
    remedy="Raise it: LimitMEMLOCK=infinity in the service's unit, 'memlock unlimited'"
    " in /etc/security/limits.conf for logins, --ulimit memlock=-1 for a container; or"
    " set a smaller PYSMC_RMBE_BYTES.",
    needs=("verbs.devices",),
)
def memlock(machine: Machine) -> Finding:
    """Count the connections that fit the limit of pinned memory."""
    limit, _ = machine.limit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return ok("There is no limit of pinned memory.")
    if _may_lock(machine):
        return ok(f"The limit of {size(limit)} does not hold for us (CAP_IPC_LOCK).")
    group, each = pinned_bytes(machine)
    fitting = max(limit - group, 0) // each
    seen = (
        f"{size(limit)} may be pinned; a link group takes {size(group)}, each"
        f" connection {size(each)}: {fitting} connections fit."
    )
    if fitting == 0:
        return fail(seen)
    return warn(seen) if fitting < FEW_CONNECTIONS else ok(seen)


def _may_lock(machine: Machine) -> bool:
    # In a user namespace the kernel does not count it.
    rows = (machine.text("/proc/self/uid_map") or "").split()
    is_mapped = bool(rows) and rows[:3] != ["0", "0", str(0xFFFFFFFF)]
    return not is_mapped and machine.has_capability(CAP_IPC_LOCK)


def pinned_bytes(machine: Machine) -> tuple[int, int]:
    """Tell what a link group and a connection of it pin, in bytes."""
    from pysmc.fabric.verbs_memory import RECEIVE_BYTES, RECEIVES, SLAB_BYTES

    return RECEIVES * RECEIVE_BYTES + SLAB_BYTES, machine.config.rmbe_bytes


@check(
    "verbs.settings",
    looks_at="Whether the settings make use of the fabric: it has to be in"
    " PYSMC_FABRICS, with a UEID in PYSMC_UEIDS and a discovery that works between"
    " hosts; PYSMC_RDMA_DEVICE has to name a usable device, or none.",
    means="Connections to other hosts stay TCP.",
    remedy="Set on both hosts PYSMC_FABRICS=shm,verbs PYSMC_UEIDS=NAME (the same), and"
    " have the TCP option attached, or set PYSMC_DISCOVERY=local,static"
    " PYSMC_PEERS=ADDRESSES.",
)
def settings(machine: Machine) -> Finding:
    """Look whether somebody means to use it."""
    config = machine.config
    if "verbs" not in config.fabrics:
        hint = settings.remedy if machine.names(DEVICES) else ""
        return skip("PYSMC_FABRICS does not have 'verbs'.", hint)
    if not config.ueids:
        return fail(
            "PYSMC_UEIDS is empty.",
            "The two ends of a connection need a UEID in common; without one they stay"
            " TCP (NO_COMMON_EID).",
            "Set PYSMC_UEIDS to the same name at both ends, PYSMC_UEIDS=PROD.EAST for"
            " example.",
        )
    if problem := _configured_problem(machine, config.rdma_device):
        return fail(
            problem,
            "With PYSMC_RDMA_DEVICE no other device is used.",
            "Name another one, or unset it: the route of a connection then decides.",
        )
    ways = []
    if "tcp_option" in config.discovery and machine.try_option().works:
        ways.append("the TCP option")
    if "static" in config.discovery:
        ways.append("the list of peers")
    if not ways:
        return warn(
            f"PYSMC_DISCOVERY is {','.join(config.discovery) or 'empty'}.",
            "As things are, that recognises no peer of another host.",
            "As root: pysmc option attach, with 'tcp_option' in PYSMC_DISCOVERY; or add"
            " 'static' to it, and the peers to PYSMC_PEERS.",
        )
    return ok(f"UEIDs {', '.join(config.ueids)}; discovery by {' and '.join(ways)}.")


def _configured_problem(machine: Machine, wanted: str) -> str:
    """Say what is wrong with the configured device; nothing if all is well."""
    found = _ports(machine)
    if not wanted or not found:
        return ""  # without any device that is what to say
    words = wanted.split(":")
    named = [port for port in found if port.name.split(":")[: len(words)] == words]
    if not named:
        names = ", ".join(port.name for port in found)
        return f"PYSMC_RDMA_DEVICE is {wanted}, which is not there; there are {names}."
    if usable(named):
        return ""
    return f"PYSMC_RDMA_DEVICE is {wanted}, without a usable GID: {_problems(named)}."


@check(
    "verbs.exchange",
    looks_at="Two queue pairs on each usable device (on the first four): connected, one"
    " write, one update. In a process of its own.",
    means="The device is there, but does not move memory.",
    remedy="Look at the kernel's log (dmesg); report it, with the output of pysmc"
    " doctor --json.",
    needs=(
        "verbs.pyverbs",
        "verbs.providers",
        "verbs.permissions",
        "verbs.gids",
        "verbs.memlock",
    ),
    seconds=60,
)
def verbs_exchange(machine: Machine) -> Finding:
    """Have each device exchange a write with itself."""
    tried = [port.name for port in usable(_ports(machine))[:EXCHANGES_MOST]]
    try:
        found = machine.exchange(tried, EXCHANGE_SECONDS)
    except OSError as error:
        return skip(f"No process can be started for it: {error}.")
    bad = [f"{name}: {why}" for name, why in zip(tried, found, strict=True) if why]
    if bad:
        seen = f"{'; '.join(bad)}."
        return warn(seen) if len(bad) < len(tried) else fail(seen)
    return ok(f"A write arrived over {', '.join(tried)}.")


CHECKS = (ports, gids, memlock, settings, verbs_exchange)
