"""A tree of files like the kernel's, with RDMA and network devices of one's choice."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

EMPTY = ":".join(["0000"] * 8)


def gid_text(address: str) -> str:
    """Write an address as the kernel writes a GID; IPv4 is mapped."""
    text = address if ":" in address else f"::ffff:{address}"
    return ipaddress.IPv6Address(text).exploded


class Sysfs:
    """Builds ``class/infiniband`` and ``class/net`` below a folder."""

    def __init__(self, folder: Path) -> None:
        self.net = folder / "class" / "net"
        self.root = folder / "class" / "infiniband"
        self.net.mkdir(parents=True)

    def netdev(
        self, name: str, *, mtu: int = 1500, kind: str = "", below: str = ""
    ) -> Path:
        """Add a network device; ``below`` names one that it stands on."""
        path = self.net / name
        path.mkdir()
        number = len(list(self.net.iterdir()))
        (path / "address").write_text(f"02:00:00:00:00:{number:02x}\n")
        (path / "mtu").write_text(f"{mtu}\n")
        (path / "uevent").write_text(f"DEVTYPE={kind}\n" if kind else "\n")
        for lower in below.split():
            (path / f"lower_{lower}").mkdir()
        return path

    def port(self, device: str, number: int = 1, state: str = "4: ACTIVE") -> Path:
        """Add a port with an empty table of four places."""
        path = self.root / device / "ports" / str(number)
        for folder in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
            (path / folder).mkdir(parents=True)
        (path / "state").write_text(state + "\n")
        for index in range(4):
            (path / "gids" / str(index)).write_text(EMPTY + "\n")
        return path

    def gid(
        self, port: Path, index: int, address: str, netdev: str, kind: str = "RoCE v2"
    ) -> None:
        """Put a GID into a port's table."""
        for place in range(index):
            if not (port / "gids" / str(place)).exists():
                (port / "gids" / str(place)).write_text(EMPTY + "\n")
        (port / "gids" / str(index)).write_text(gid_text(address) + "\n")
        (port / "gid_attrs" / "types" / str(index)).write_text(kind + "\n")
        if netdev:
            (port / "gid_attrs" / "ndevs" / str(index)).write_text(netdev + "\n")

    def usual(self) -> Path:
        """Build what soft-RoCE on one network device shows."""
        self.netdev("va")
        port = self.port("rxe0")
        self.gid(port, 0, "fe80::1", "va")
        self.gid(port, 1, "10.0.0.1", "va")
        return port
