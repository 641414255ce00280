"""Which RDMA port carries the data of a TCP connection: the one beside its route.

Decides whether this machine can use RoCE at all, and finds the port and GID of each
connection: the kernel is asked for the connection's route, `verbs_ports` chooses among
the GIDs of that network device. It opens no RDMA device.

Source: rtnetlink(7), `Documentation/ABI/testing/sysfs-class-net` (lower_*); kernel
counterpart: smc_pnet_find_roce_resource() and pnet_find_base_ndev().
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Final

from pysmc.fabric.netlink import Address, Netlink
from pysmc.fabric.verbs_loading import find_pyverbs
from pysmc.fabric.verbs_ports import (
    INFINIBAND,
    RdmaPort,
    choose,
    device_names,
    list_ports,
    raise_shortage,
    read_port,
    refuse,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pysmc.config import Config

__all__ = ["PortFinder"]

KNOWN_MAX: Final = 64
"""Network devices and addresses whose port is remembered."""
LAYERS_MAX: Final = 4
"""Network devices below one another that are followed."""


class PortFinder:
    """Finds the RDMA port of connections.

    Args:
        config: ``ueids`` and ``rdma_device``.
        root: Where the kernel shows RDMA devices.
    """

    def __init__(self, config: Config, root: Path = INFINIBAND) -> None:
        self.eids = config.ueids
        """EIDs that select this fabric."""
        self._configured = config.rdma_device
        self._root = root
        self._netlink: Netlink | None = None
        self._known: dict[tuple[str, Address], RdmaPort] = {}

    def check(self) -> None:
        """Refuse when no connection at all could use RoCE here.

        Raises:
            FabricUnavailable: The detail says in one sentence what is missing.
            FabricError: Status ``NO_MEMORY``: no descriptors are left to look with.
        """
        if not self.eids:
            refuse(
                "RoCE needs an EID that both ends share: set ueids (PYSMC_UEIDS), the "
                "same at both"
            )
        if not device_names(self._root):
            refuse("this machine has no RDMA device")
        # Last, because loading takes long.
        try:
            problem = find_pyverbs().problem
        except OSError as error:
            raise_shortage(error)
            problem = f"pyverbs cannot be looked for: {error}"
        if problem:
            refuse(problem)

    def find(self, local: bytes, peer: bytes, interface: int = 0) -> RdmaPort:
        """Find the port of a connection.

        Args:
            local: Our address, 4 or 16 bytes; IPv4 when it is mapped.
            peer: The peer's.
            interface: Number of the network device that the connection is bound to, or
                that a link-local address belongs to; 0 for none.

        Raises:
            FabricUnavailable: There is none; the detail says in one sentence why.
            FabricError: Status ``NO_MEMORY``: no descriptors are left to look with.
        """
        ours = ipaddress.ip_address(local)
        if self._configured:
            netdev, number = "", 0
        else:
            netdev, number = self._device_of_route(ours, peer, interface)
        known = self._known.get((netdev, ours))
        if known is not None and self._read_again(known) == known:
            return known
        port = self._choose(ours, netdev, number)
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        self._known[netdev, ours] = port
        return port

    def close(self) -> None:
        """Close what was opened. Idempotent."""
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def _device_of_route(
        self, ours: Address, peer: bytes, interface: int
    ) -> tuple[str, int]:
        to = ipaddress.ip_address(peer)
        try:
            if self._netlink is None:
                self._netlink = Netlink()
            number = self._netlink.route(to, ours, interface).interface
            return socket.if_indextoname(number), number
        except OSError as error:
            raise_shortage(error)
            why = error.strerror or str(error)
            return refuse(f"the route from {ours} to {to} cannot be found: {why}")

    def _read_again(self, port: RdmaPort) -> RdmaPort | None:
        return read_port(port.device, port.port, port.gid_index, self._root)

    def _choose(self, ours: Address, netdev: str, number: int) -> RdmaPort:
        subnets = []
        if number and self._netlink is not None:
            try:
                subnets = self._netlink.addresses(number)
            except OSError as error:
                raise_shortage(error)
                refuse(f"the addresses of {netdev} cannot be read: {error.strerror}")
        net = self._root.parent / "net"
        ports = list_ports(self._root)
        if _is_vlan(net / netdev) and all(port.netdev != netdev for port in ports):
            refuse(f"network device {netdev} is a VLAN without a GID", "VLAN")
        return choose(
            ports,
            local=ours,
            netdevs=[netdev, *_devices_below(net, netdev)] if netdev else (),
            subnets=subnets,
            configured=self._configured,
        )


def _devices_below(net: Path, netdev: str) -> list[str]:
    """List the network devices that may stand in for one, the nearest first.

    A bridge's port, or a bond's, carries its packets as they are. A VLAN's do not: they
    have a tag that only the VLAN's own GIDs put on.
    """
    found: list[str] = []
    layer = [netdev]
    for _ in range(LAYERS_MAX):
        layer = [below for upper in layer for below in _lower(net / upper)]
        found += [name for name in layer if name not in found]
    return found


def _is_vlan(path: Path) -> bool:
    try:
        return b"DEVTYPE=vlan" in (path / "uevent").read_bytes()
    except OSError:
        return False


def _lower(path: Path) -> list[str]:
    if _is_vlan(path):
        return []
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError:
        return []
    return [name.removeprefix("lower_") for name in names if name.startswith("lower_")]
