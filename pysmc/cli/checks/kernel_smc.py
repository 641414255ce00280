"""Checks of the kernel's own SMC on this machine: sockets, and what it is told.

Decides whether programs of this machine can use AF_SMC and IPPROTO_SMC, and what its
administrator has configured. pysmc needs none of it: it is a peer for other programs,
and a neighbour that shares the machine. Whether it is there is found by `socket()`, but
never so that the kernel would load a module for it, which any program's first socket of
the family does: the doctor changes nothing.

Source: kernel `net/smc/af_smc.c`, `smc_inet.c`, `smc_pnet.c`, `smc_clc.c`.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from pysmc.cli.checks.check import check, ok, skip, warn

if TYPE_CHECKING:
    from pysmc.cli.checks.check import Finding
    from pysmc.cli.checks.machine import Machine

__all__ = ["CHECKS"]

AF_SMC = 43
IPPROTO_SMC = 256
PROTOCOLS = "/proc/net/protocols"
ULPS = "/proc/sys/net/ipv4/tcp_available_ulp"
LOAD = (
    "As root: modprobe smc, if programs of this machine are to use it; pysmc does not"
    " need it."
)
ABSENT = {errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT}


@check(
    "kernel_smc.socket",
    looks_at="A socket of AF_SMC. It is tried where that loads nothing: where the"
    " kernel has the protocol already (/proc/net/protocols), or no module for it.",
    means="Something forbids this process what the kernel has.",
    remedy="Allow socket(AF_SMC) in the seccomp profile or sandbox, if programs there"
    " are meant to use the kernel's SMC; pysmc does not need it.",
)
def af_smc(machine: Machine) -> Finding:
    """Look for the kernel's AF_SMC."""
    if "SMC" not in _registered(machine):
        folder = f"/lib/modules/{machine.release}"
        if not machine.path(f"{folder}/modules.alias").exists():
            return skip(
                "The kernel does not have it at present. Whether there is a module for"
                " it cannot be seen here, so that it was not tried.",
                LOAD,
            )
        if machine.has_line(f"{folder}/modules.alias", f"alias net-pf-{AF_SMC} "):
            return skip(
                "The kernel does not have it at present, but a module for it: the first"
                " program that makes such a socket has it loaded. The doctor does not.",
                LOAD,
            )
    error = machine.socket_error(AF_SMC, 0)
    if not error:
        return ok("The kernel has AF_SMC: programs that use it can be peers.")
    if error in ABSENT:
        return skip("This kernel has no AF_SMC. pysmc does not need it.")
    return warn(f"socket(AF_SMC) gives {errno.errorcode.get(error, error)}.")


def _registered(machine: Machine) -> set[str]:
    """Name the protocols that the kernel has at present."""
    lines = (machine.text(PROTOCOLS) or "").splitlines()[1:]
    return {words[0] for line in lines if (words := line.split())}


@check(
    "kernel_smc.protocol",
    looks_at="A TCP socket with the protocol IPPROTO_SMC (256), which makes it one of"
    " the kernel's SMC (Linux 6.11).",
    means="Something forbids this process what the kernel has.",
    remedy="Allow socket(AF_INET, SOCK_STREAM, 256) in the seccomp profile or sandbox,"
    " if programs there are meant to use the kernel's SMC.",
    needs=("kernel_smc.socket",),
)
def ipproto_smc(machine: Machine) -> Finding:
    """Look for IPPROTO_SMC."""
    error = machine.socket_error(socket.AF_INET, IPPROTO_SMC)
    if not error:
        return ok("The kernel has IPPROTO_SMC.")
    if error in ABSENT:
        return skip(
            "This kernel has no IPPROTO_SMC; its programs use AF_SMC.",
            "It comes with Linux 6.11.",
        )
    return warn(f"The socket gives {errno.errorcode.get(error, error)}.")


@check(
    "kernel_smc.ulp",
    looks_at="Whether net.ipv4.tcp_available_ulp names smc; it is read only, for to set"
    " it on a socket can crash a kernel.",
    means="This kernel still converts live TCP sockets in place (TCP_ULP), a way that"
    " was removed because it is broken: a program with threads that uses it can crash"
    " Linux 6.1.",
    remedy="Update the kernel; let programs use AF_SMC, IPPROTO_SMC or pysmc instead.",
)
def ulp(machine: Machine) -> Finding:
    """Read the list of upper layer protocols."""
    text = machine.text(ULPS)
    if text is None:
        return ok("Not known here: net.ipv4.tcp_available_ulp cannot be read.")
    seen = f"net.ipv4.tcp_available_ulp is '{text}'"
    if "smc" in text.split():
        return warn(f"{seen}.")
    return ok(f"{seen}, without smc.")


@check(
    "kernel_smc.pnetids",
    looks_at="The PNETID table of the kernel's SMC (what smc_pnet shows).",
    means="A network device of the table has a PNETID that no RDMA device has: the"
    " kernel's SMC finds none for its connections, and declines (NO_DEVICE).",
    remedy="Give the RDMA device the same PNETID: smc_pnet -a NAME -D DEVICE.",
    needs=("kernel_smc.socket",),
)
def pnetids(machine: Machine) -> Finding:
    """Read the PNETID table."""
    try:
        rows = machine.smc_tables().pnetids
    except OSError as error:
        return skip(f"It cannot be read: {error.strerror or error}.")
    if rows is None:
        return skip("The kernel shows no such table.")
    if not rows:
        return ok("It is empty: devices have the PNETIDs of their hardware, or none.")
    devices: dict[str, list[str]] = {}
    for row in rows:
        devices.setdefault(row.name, []).append(row.device)
    texts = [f"{name}: {', '.join(names)}" for name, names in devices.items()]
    seen = f"{'; '.join(texts)}."
    lonely = [n for n, names in devices.items() if not any(":" in d for d in names)]
    return warn(seen) if lonely else ok(seen)


@check(
    "kernel_smc.ueids",
    looks_at="The UEIDs of the kernel's SMC (what smcr ueid shows) and PYSMC_UEIDS.",
    means="Without a UEID the kernel's SMC neither offers nor accepts version 2, the"
    " only one over RoCE v2, and with pysmc.",
    remedy="As root: smcr ueid add NAME, the same on the hosts of its peers.",
    needs=("kernel_smc.socket",),
)
def ueids(machine: Machine) -> Finding:
    """Read the UEIDs."""
    try:
        found = machine.smc_tables().ueids
    except OSError as error:
        return skip(f"They cannot be read: {error.strerror or error}.")
    if found is None:
        return skip("The kernel shows no such table.")
    if not found:
        return warn("The kernel's SMC has none.")
    ours = machine.config.ueids
    common = [name for name in found if name in ours]
    words = f"PYSMC_UEIDS has {', '.join(common) or 'none of them'}" if ours else ""
    return ok(f"{', '.join(found)}{'; ' if words else ''}{words}.")


CHECKS = (af_smc, ipproto_smc, ulp, pnetids, ueids)
