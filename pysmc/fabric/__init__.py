"""The fabrics: what moves memory between two processes.

`base` is the contract; `shm`, `sim` and later `verbs` fulfil it. A fabric knows nothing
of SMC-R's messages. Kernel counterpart: smc_ib.c.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pysmc.errors import FabricUnavailable

if TYPE_CHECKING:
    from pysmc.config import Config
    from pysmc.fabric.base import Device, UpdateCodec
    from pysmc.fabric.verbs_ports import RdmaPort
    from pysmc.fabric.verbs_route import PortFinder

__all__ = ["open_device", "open_finder"]


def open_finder(name: str, config: Config) -> PortFinder | None:
    """Give what finds the port of each connection, where a fabric has many devices.

    Args:
        name: "shm" or "verbs".
        config: Which RDMA device to use, and the EIDs.

    Returns:
        None for a fabric with one device, which `open_device` opens.
    """
    if name != "verbs":
        return None
    from pysmc.fabric.verbs_route import PortFinder

    return PortFinder(config)


def open_device(
    name: str,
    *,
    peer_id: bytes,
    config: Config,
    codec: UpdateCodec,
    port: RdmaPort | None = None,
) -> Device:
    """Open the device of a fabric.

    Args:
        name: "shm" or "verbs". A "sim" device belongs to a network and comes from
            `pysmc.fabric.sim.SimNetwork.device`.
        peer_id: 8 bytes, unique for this process and loop.
        config: Who may share memory, and which RDMA device to use.
        codec: For fabrics whose updates travel as bytes; shm has no use for it.
        port: Of a verbs device, which has a device for each port and GID.

    Raises:
        FabricUnavailable: There is no such device here; the text says what is missing.
        FabricError: Status ``NO_MEMORY``: there is, but no descriptors are left.
    """
    operation = f"open the {name} fabric"
    if name == "shm":
        if not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"):
            reason = "it needs Linux: memfds, eventfds and epoll"
            raise FabricUnavailable(operation, "UNAVAILABLE", reason)
        from pysmc.fabric.shm import ShmDevice

        return ShmDevice(peer_id, allowed_uids=config.allowed_uids)
    if name == "verbs" and port is not None:
        from pysmc.fabric.verbs import VerbsDevice

        return VerbsDevice(port, codec=codec, config=config)
    reasons = {
        "verbs": "a connection's route decides which port it uses, and none was given",
        "sim": "a simulated device belongs to a network: use SimNetwork.device()",
    }
    reason = reasons.get(name, f"there is no fabric {name!r}; there are shm and verbs")
    raise FabricUnavailable(operation, "UNAVAILABLE", reason)
