"""The check of a peer: which RDMA device would carry a connection to it.

Decides by the same choice that a connection makes, and looks whether the kernel finds
the way to the peer's GID, which for RoCE is its address. It does not speak with the
peer's program: whether that speaks SMC is not known afterwards.

Source: rtnetlink(7); pysmc.fabric.verbs_route and verbs_reach.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import time
from typing import TYPE_CHECKING

from pysmc.cli.checks.check import check, fail, ok, skip
from pysmc.cli.checks.verbs_host import DEVICES
from pysmc.errors import FabricError

if TYPE_CHECKING:
    from pysmc.cli.checks.check import Finding
    from pysmc.cli.checks.machine import Machine
    from pysmc.fabric.verbs_ports import RdmaPort

__all__ = ["CHECKS"]

PORT = 9
"""Of a datagram socket that sends nothing (discard, RFC 863)."""
DEADLINE = 3.0
"""Seconds that the way to the peer may take to be found."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@check(
    "peer",  # not of the fabric: a peer that is not there says nothing of this machine
    looks_at="With --peer HOST: the address, the route, the RDMA device and GID that a"
    " connection to it would use, and whether the peer's address answers on that way.",
    means="A connection to this peer stays TCP, or goes over shared memory if it is of"
    " this host.",
    remedy="Give the network device of the route a GID (rdma link add, ip addr add), or"
    " name one by PYSMC_RDMA_DEVICE; see that the peer is there.",
    needs=("verbs.gids",),
    seconds=20,
)
def peer(machine: Machine) -> Finding:
    """Look for the way to a peer."""
    from pysmc.fabric.verbs_route import PortFinder

    if not machine.peer:
        return skip("No peer was named (--peer HOST).")
    try:
        there, here = _addresses(machine.peer)
    except OSError as error:
        return fail(f"{machine.peer}: {error.strerror or error}.")
    finder = PortFinder(machine.config, machine.path(DEVICES))
    try:
        port = finder.find(here.packed, there.packed)
        why = _why_unreachable(there, port)
    except FabricError as error:
        return fail(f"From {here} to {there}: {error.detail}.")
    finally:
        finder.close()
    way = f"From {here} to {there}: {port.name}, GID {port.address} on {port.netdev}"
    if why:
        return fail(f"{way}; but {why}.")
    return ok(f"{way}; the way to {there} is known.")


def _addresses(host: str) -> tuple[Address, Address]:
    """Find a host's address, and ours towards it.

    Raises:
        OSError: There is no such host, or no route.
    """
    found = socket.getaddrinfo(host, PORT, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.connect(address)  # which sends nothing
        ends = sock.getpeername()[0], sock.getsockname()[0]
    there, here = (ipaddress.ip_address(end.partition("%")[0]) for end in ends)
    return there, here


def _why_unreachable(there: Address, port: RdmaPort) -> str:
    """Tell why the peer's GID cannot be reached, or nothing."""
    from pysmc.fabric.verbs_reach import Reach

    if isinstance(there, ipaddress.IPv4Address):
        there = ipaddress.IPv6Address(f"::ffff:{there}")
    reach = Reach()
    try:
        reach.begin(1, there.packed, port)
        end = time.monotonic() + DEADLINE
        while not (answers := reach.poll()):
            left = end - time.monotonic()
            if left <= 0:
                return f"the way to it was not found within {DEADLINE:g} s"
            select.select([reach], [], [], left)
    finally:
        reach.close()
    (_, is_reachable, why) = answers[0]
    return "" if is_reachable else why


CHECKS = (peer,)
