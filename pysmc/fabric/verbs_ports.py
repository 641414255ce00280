"""The RoCE ports of this machine, as the kernel shows them, and which one fits.

Decides which port and GID a connection gets: that of the network device which carries
its TCP connection, active, with a RoCEv2 GID of the connection's own address, else of
its subnet. Reads files and nothing else; it needs no verbs library and no privilege.

Source: `Documentation/ABI/stable/sysfs-class-infiniband`; the rule is that of the
kernel's SMC (smc_pnet.c, smc_ib_determine_gid()), without PNET tables.
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from pysmc.errors import FabricError, FabricUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "INFINIBAND",
    "ROCE_V2",
    "RdmaPort",
    "choose",
    "device_names",
    "list_ports",
    "mtu_code_of",
    "raise_shortage",
    "read_port",
    "refuse",
    "usable",
]

INFINIBAND: Final = Path("/sys/class/infiniband")
"""Where the kernel shows RDMA devices; network devices are in ``net`` beside it."""
ROCE_V2: Final = "RoCE v2"
"""The type of a GID whose packets are UDP."""
ACTIVE: Final = "ACTIVE"
SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
EMPTY_GIDS_IN_A_ROW: Final = 64
"""A table has up to 1,024 places of which a few are taken, and each look costs a system
call or three. A new GID gets the first free place, so that what is taken is in front;
only what was removed leaves holes."""
ENTRY_BYTES: Final = 4096
"""A file there has at most a page."""
HEADERS_BYTES: Final = 96
"""What RoCEv2 puts around a payload within the network device's MTU, as the kernel
reckons it: IPv6, UDP, BTH, XRC and atomic headers, ICRC."""

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """One GID of one port of an RDMA device."""

    device: str
    """The RDMA device's name, "rxe0" for example."""
    port: int
    """1-255."""
    gid_index: int
    """Place in the port's table, from 0."""
    gid: bytes
    """16 bytes."""
    gid_type: str
    """As the kernel names it: "RoCE v2", or "IB/RoCE v1"."""
    netdev: str
    """The network device, which may be a VLAN of the port's; empty on InfiniBand."""
    mac: bytes
    """6 bytes, the network device's; zeros when it has none."""
    state: str
    """"ACTIVE", "DOWN", "INIT" or what else the kernel says."""
    mtu_code: int
    """1-5 for 256-4096 bytes, the most that fits the network device's MTU."""

    @property
    def name(self) -> str:
        """As `Config.rdma_device` takes it."""
        return f"{self.device}:{self.port}:{self.gid_index}"

    @property
    def address(self) -> Address:
        """The GID as an IP address; IPv4 when it is mapped."""
        address = ipaddress.IPv6Address(self.gid)
        return address.ipv4_mapped or address

    @property
    def problem(self) -> str:
        """Why no connection can use it, as half a sentence; empty when one can."""
        if self.gid_type != ROCE_V2:
            return f"is of type {self.gid_type or 'unknown'}, not {ROCE_V2}"
        if self.address.is_link_local:
            return "is link-local, which cannot be routed"
        if self.state != ACTIVE:
            return f"belongs to a port that is {self.state or 'unknown'}"
        return ""


# Reading


def device_names(root: Path = INFINIBAND) -> list[str]:
    """Name the RDMA devices; empty also where the kernel knows nothing of RDMA."""
    try:
        return sorted(entry.name for entry in root.iterdir())
    except OSError as error:
        raise_shortage(error)
        return []


def list_ports(root: Path = INFINIBAND) -> list[RdmaPort]:
    """List every GID of every port, usable or not, by device, port and index.

    What goes away while it is read is left out.

    Raises:
        FabricError: Status ``NO_MEMORY``: no descriptors are left to look with.
    """
    ports: list[RdmaPort] = []
    for device in device_names(root):
        for number in _numbers(root / device / "ports"):
            ports += _read_table(root, device, number)
    return ports


def read_port(
    device: str, port: int, gid_index: int, root: Path = INFINIBAND
) -> RdmaPort | None:
    """Read one GID as it is now, None when there is no such one.

    Args:
        device: The RDMA device's name.
        port: From 1.
        gid_index: From 0.
        root: Where the kernel shows RDMA devices.
    """
    # As text: each connection comes here, and paths cost more than reading them.
    base = f"{root}/{device}/ports/{port}"
    gid = _read_gid(f"{base}/gids/{gid_index}")
    if gid is None:
        return None
    netdev = _read(f"{base}/gid_attrs/ndevs/{gid_index}")
    mac, mtu = _read_netdev(f"{root.parent}/net/{netdev}") if netdev else (bytes(6), 0)
    return RdmaPort(
        device=device,
        port=port,
        gid_index=gid_index,
        gid=gid,
        gid_type=_read(f"{base}/gid_attrs/types/{gid_index}"),
        netdev=netdev,
        mac=mac,
        state=_read(f"{base}/state").partition(":")[2].strip(),
        mtu_code=mtu_code_of(mtu),
    )


def mtu_code_of(netdev_mtu: int) -> int:
    """Give the code of the largest RoCE MTU that fits a network device's.

    Args:
        netdev_mtu: In bytes.

    Returns:
        1-5 for 256-4096 bytes; 1 also where not even that fits.

    Reference: kernel, iboe_get_mtu().
    """
    room = netdev_mtu - HEADERS_BYTES
    return max((code for code in range(1, 6) if 128 << code <= room), default=1)


def _read_table(root: Path, device: str, port: int) -> Iterator[RdmaPort]:
    gids = root / device / "ports" / str(port) / "gids"
    empty = 0
    for index in itertools.count():
        if empty == EMPTY_GIDS_IN_A_ROW or not _read(f"{gids}/{index}"):
            return
        found = read_port(device, port, index, root)
        if found is None:
            empty += 1
        else:
            empty = 0
            yield found


def _read(path: str) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(descriptor, ENTRY_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:  # a place without an entry gives EINVAL
        raise_shortage(error)
        return ""
    return data.decode("ascii", errors="replace").strip()


def _read_gid(path: str) -> bytes | None:
    try:
        gid = ipaddress.IPv6Address(_read(path)).packed
    except ValueError:
        return None
    return gid if any(gid) else None


def _read_netdev(path: str) -> tuple[bytes, int]:
    try:
        mac = bytes.fromhex(_read(f"{path}/address").replace(":", ""))
        mtu = int(_read(f"{path}/mtu"))
    except ValueError:
        return bytes(6), 0
    return (mac if len(mac) == 6 else bytes(6)), mtu


def _numbers(path: Path) -> list[int]:
    try:
        return sorted(int(entry.name) for entry in path.iterdir())
    except ValueError:
        return []
    except OSError as error:
        raise_shortage(error)
        return []


# Choosing


def usable(ports: Iterable[RdmaPort]) -> list[RdmaPort]:
    """Give those that some connection could use."""
    return [port for port in ports if not port.problem]


def choose(
    ports: Sequence[RdmaPort],
    *,
    local: Address,
    netdevs: Sequence[str],
    subnets: Sequence[Interface] = (),
    configured: str = "",
) -> RdmaPort:
    """Choose the port and GID for a connection.

    Args:
        ports: All there are, as `list_ports` gives them.
        local: Our own address of the TCP connection; IPv4 when it is mapped.
        netdevs: The network device that carries it, then the devices below that may
            stand in for it.
        subnets: The addresses of the first of these devices, with their networks.
        configured: ``Config.rdma_device``; it decides alone when it is given.

    Raises:
        FabricUnavailable: None fits; the detail is one sentence.
    """
    if not ports:
        refuse("this machine has no RDMA device")
    if configured:
        found, where = _configured(ports, configured), f"the GIDs of {configured}"
    else:
        found, where = [], f"network device {netdevs[0]}"
        for netdev in netdevs:
            found = found or [port for port in ports if port.netdev == netdev]
        if not found:
            refuse(f"{where} carries the connection, but no RDMA device")
    good = usable(found)
    if not good:
        # The one that lacks least: everything but an active port, if there is such.
        best = min(found, key=lambda port: replace(port, state=ACTIVE).problem != "")
        refuse(f"{where}: GID {best.address} {best.problem}")
    if configured.count(":") == 2:
        return good[0]
    return _nearest(good, where, local, subnets, anywhere=bool(configured))


def _configured(ports: Sequence[RdmaPort], wanted: str) -> list[RdmaPort]:
    words = wanted.split(":")
    found = [port for port in ports if port.name.split(":")[: len(words)] == words]
    if not found:
        there = ", ".join(dict.fromkeys(port.name for port in ports))
        refuse(f"rdma_device {wanted} is not there; there are {there}")
    return found


def _nearest(
    good: Sequence[RdmaPort],
    where: str,
    local: Address,
    subnets: Sequence[Interface],
    *,
    anywhere: bool,
) -> RdmaPort:
    networks = [each.network for each in subnets if local in each.network]
    of_family = [port for port in good if port.address.version == local.version]
    for port in of_family:
        if port.address == local:
            return port
    for port in of_family:
        if any(port.address in network for network in networks):
            return port
    if anywhere:
        return (of_family or good)[0]
    there = ", ".join(str(port.address) for port in good)
    return refuse(f"{where}: no GID is in the subnet of {local}; there are {there}")


def raise_shortage(error: OSError, operation: str = "look for RoCE ports") -> None:
    """Tell a lack of descriptors or memory from what is not there.

    Args:
        error: What went wrong.
        operation: What was tried.

    Raises:
        FabricError: Status ``NO_MEMORY``, with the errno's name in the detail.
    """
    if error.errno in SHORTAGES:
        detail = f"{errno.errorcode[error.errno]}: {error.strerror}"
        raise FabricError(operation, "NO_MEMORY", detail) from error


def refuse(detail: str, status: str = "UNAVAILABLE") -> NoReturn:
    """Say why there is no port for a connection.

    Args:
        detail: One sentence without its full stop.
        status: Name of the condition.

    Raises:
        FabricUnavailable: Always.
    """
    operation = "open the verbs fabric"
    raise FabricUnavailable(operation, status, detail)
