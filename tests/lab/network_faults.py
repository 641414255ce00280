"""What can go wrong between the two ends of the lab: each fault and how to undo it.

Faults are put on the veth pair with iproute2. Those of one protocol alone use a band of
its own in a prio queue, so that RoCE (UDP port 4791) can be hurt while TCP lives, and
the other way round.

Soft-RoCE of Linux 6.12 ends a queue pair whose packet the network device refuses, and
one does while its queue is exchanged for another. So `bands` come before what streams,
and go after it; what is done to the bands in between nothing notices but its packets.
"""

from __future__ import annotations

import json
import select
import subprocess
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "DEVICES",
    "TCP",
    "Impaired",
    "bands",
    "gid_index",
    "impaired",
    "impaired_packets",
    "link_down",
    "more_than",
    "no_rdma_device",
    "resources",
    "run",
    "silent_neighbour",
    "wait_for_resources",
]

DEVICES = {"va": "rxe0", "vb": "rxe1"}
"""Network devices and the RDMA devices on them."""
ROCE = "ip dport 4791 0xffff match ip protocol 17 0xff"
TCP = "ip protocol 6 0xff"


def run(command: str) -> str:
    """Run a command; it has to succeed."""
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode} {done.stderr}"
    return done.stdout


@contextmanager
def bands(devices: Iterable[str] = tuple(DEVICES)) -> Iterator[None]:
    """Give network devices a band to be hurt in, while the block lasts.

    Args:
        devices: Which ones; one that has it keeps it.
    """
    given = [device for device in devices if not _has_bands(device)]
    for device in given:
        run(
            f"tc qdisc add dev {device} root handle 1: prio bands 4"
            " priomap 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0"
        )
    try:
        yield
    finally:
        for device in given:
            run(f"tc qdisc del dev {device} root")


def _has_bands(device: str) -> bool:
    queues = json.loads(run(f"tc -j qdisc show dev {device}"))
    return any(queue["kind"] == "prio" for queue in queues)


@contextmanager
def impaired(
    how: str,
    match: str = ROCE,
    devices: Iterable[str] = tuple(DEVICES),
    room: int = 10_000,
) -> Iterator[None]:
    """Hurt one protocol while the block lasts, in both directions.

    Args:
        how: What netem does, as tc wants it: "loss 1%".
        match: Whom it is done to, as tc's u32 classifier wants it.
        devices: On whose way out.
        room: Packets that may wait there; a device refuses what comes beyond.
    """
    with ExitStack() as undo:
        undo.enter_context(bands(devices))
        for device in devices:
            queue = f"dev {device} parent 1:4 handle 40:"
            run(f"tc qdisc add {queue} netem {how} limit {room}")
            undo.callback(run, f"tc qdisc del {queue}")
            those = f"dev {device} parent 1: protocol ip prio 1"
            run(f"tc filter add {those} u32 match {match} flowid 1:4")
            undo.callback(run, f"tc filter del {those}")
        yield


class Impaired(NamedTuple):
    """What went through what `impaired` has put there."""

    packets: int
    """All of them."""
    dropped: int
    """Those of them that went no further."""


def impaired_packets() -> Impaired:
    """Count the packets that went through what `impaired` has put there."""
    passed = dropped = 0
    for device in DEVICES:
        for queue in json.loads(run(f"tc -s -j qdisc show dev {device}")):
            if queue["kind"] == "netem":
                passed += queue["packets"]
                dropped += queue["drops"]
    return Impaired(passed + dropped, dropped)


@contextmanager
def link_down(device: str) -> Iterator[None]:
    """Take a network device down while the block lasts; its routes come back after."""
    routes = run(f"ip route show table all dev {device}").splitlines()
    run(f"ip link set {device} down")
    try:
        yield
    finally:
        run(f"ip link set {device} up")
        for route in routes:
            words = route.split()
            if "table" in words and words[words.index("table") + 1] != "local":
                run(f"ip route replace {route} dev {device}")


@contextmanager
def no_rdma_device(*devices: str) -> Iterator[None]:
    """Remove the RDMA devices of network devices while the block lasts."""
    for device in devices:
        run(f"rdma link del {DEVICES[device]}")
    try:
        yield
    finally:
        for device in devices:
            run(f"rdma link add {DEVICES[device]} type rxe netdev {device}")


@contextmanager
def silent_neighbour(address: str) -> Iterator[None]:
    """Give vb an address that answers no ARP request, while the block lasts.

    The addresses of the TCP connections stay known: they are put into the tables of
    neighbours for good. RoCE to the new address finds its network, and nobody there.
    """
    where = {"va": ("10.0.0.2", "vb"), "vb": ("10.0.0.1", "va")}
    for device, (host, other) in where.items():
        mac = json.loads(run(f"ip -j link show dev {other}"))[0]["address"]
        run(f"ip neigh replace {host} lladdr {mac} nud permanent dev {device}")
    run("sysctl -qw net.ipv4.conf.vb.arp_ignore=8")
    run(f"ip addr add {address}/24 dev vb")
    run(f"ip rule add pref 12 iif lo to {address} lookup 102")
    run(f"ip route add {address} dev va src 10.0.0.1 table 102")
    try:
        yield
    finally:
        run(f"ip route del {address} dev va table 102")
        run("ip rule del pref 12")
        run(f"ip addr del {address}/24 dev vb")
        run("sysctl -qw net.ipv4.conf.vb.arp_ignore=0")
        for device, (host, _) in where.items():
            run(f"ip neigh del {host} dev {device}")


def gid_index(address: str, device: str) -> int:
    """Find the RoCEv2 GID of an address."""
    port = Path("/sys/class/infiniband") / device / "ports" / "1"
    wanted = ip_address(f"::ffff:{address}")
    for place in sorted((port / "gids").iterdir(), key=lambda path: int(path.name)):
        if ip_address(place.read_text().strip()) == wanted:
            return int(place.name)
    message = f"{device} has no GID of {address}"
    raise AssertionError(message)


def resources() -> dict[str, dict[str, int]]:
    """Count what the kernel holds for each RDMA device: qp, mr, cq, pd, ctx."""
    found = {}
    for row in json.loads(run("rdma -j resource show")):
        found[row["ifname"]] = {
            kind: count for kind, count in row.items() if isinstance(count, int)
        }
        found[row["ifname"]].pop("ifindex", None)
    return found


def wait_for_resources(expected: dict[str, dict[str, int]]) -> None:
    """Wait until the kernel holds for each device no more than it held before.

    It may hold less: what failed in an earlier scenario is destroyed seconds later.
    """
    end = time.monotonic() + 10.0
    while more := more_than(resources(), expected):
        assert time.monotonic() < end, f"{more} more than before: {expected}"
        select.select([], [], [], 0.1)


def more_than(
    found: dict[str, dict[str, int]], expected: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Tell what is found of each device beyond what was expected; empty if nothing."""
    left = {name: Counter(found[name]) - Counter(expected[name]) for name in expected}
    return {name: dict(counts) for name, counts in left.items() if counts}
