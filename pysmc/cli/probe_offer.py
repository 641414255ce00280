"""What a probe offers: the Proposal that a connection from here would begin with.

Decides EIDs, GID and limits from the configuration and from what the kernel shows of
RDMA devices. It opens no device, so that it needs neither a verbs library nor memory
that can be pinned: whatever the peer answers, the probe declines.

Source: RFC 7609 A.2.2; version 2: Linux net/smc/smc_clc.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pysmc.aio.identity import new_peer_id
from pysmc.discovery.address import MAPPED_PREFIX, bound_device, endpoint
from pysmc.errors import FabricError
from pysmc.fabric.shm import host_eid
from pysmc.fabric.verbs_route import PortFinder
from smcproto import clc, clc_v2
from smcproto.constants import PathType

if TYPE_CHECKING:
    import socket

    from pysmc.config import Config
    from pysmc.fabric.verbs_ports import RdmaPort

__all__ = ["Offer", "make_offer"]


class Offer(NamedTuple):
    """A Proposal, and where it comes from."""

    proposal: clc.Proposal
    """With a peer ID that nobody has had: no peer knows a link group of ours."""
    device: str
    """The RDMA port of its GID as `Config.rdma_device` takes it; empty without one."""
    note: str
    """What could not be offered for real, in one sentence; empty when all could."""

    @property
    def eids(self) -> tuple[str, ...]:
        """The EIDs in it, in order of preference."""
        assert self.proposal.v2 is not None
        return self.proposal.v2.eids


def make_offer(config: Config, sock: socket.socket) -> Offer:
    """Say what this machine offers over a connection.

    Args:
        config: ``fabrics``, ``ueids``, ``rdma_device`` and the limits.
        sock: Connected.

    Raises:
        OSError: It is not connected any more.
    """
    eids: list[str] = []
    notes = []
    if "shm" in config.fabrics:
        try:
            eids.append(host_eid())
        except OSError as error:
            notes.append(f"no EID of shared memory, for /proc does not tell ({error})")
    eids += config.ueids
    port: RdmaPort | None = None
    if config.ueids:
        port, why = _find_port(config, sock)
        if why:
            notes.append(
                f"no RDMA device of this machine fits ({why}): the GID is only the"
                " address of this connection"
            )
    else:
        notes.append(
            "no UEID is set (PYSMC_UEIDS, --ueid): no peer on another host can accept"
        )
    local = endpoint(sock.getsockname())
    assert local is not None, "a connected TCP socket has an address"
    peer_id = new_peer_id()
    packed = local.packed
    own_gid = MAPPED_PREFIX + packed if len(packed) == 4 else packed
    proposal = clc.Proposal(
        version=2,
        peer_id=peer_id,
        gid=bytes(16),
        mac=port.mac if port else peer_id[2:],
        typev1=PathType.NONE,
        typev2=PathType.SMCR,
        ip_area=None,
        v2=clc_v2.ProposalExtension(
            eids=tuple(dict.fromkeys(eids)),
            release=config.release,
            gid=port.gid if port else own_gid,
            max_connections=config.max_connections if config.release else 0,
            max_links=config.max_links if config.release else 0,
        ),
    )
    note = f"{'; '.join(notes)}." if notes else ""
    return Offer(proposal, port.name if port else "", note[:1].upper() + note[1:])


def _find_port(config: Config, sock: socket.socket) -> tuple[RdmaPort | None, str]:
    """Find the RDMA port that such a connection would use, or say why there is none."""
    local, peer = endpoint(sock.getsockname()), endpoint(sock.getpeername())
    assert local is not None, "a connected TCP socket has an address"
    assert peer is not None, "a connected TCP socket has a peer"
    finder = PortFinder(config)
    try:
        interface = bound_device(sock) or peer.scope
        return finder.find(local.packed, peer.packed, interface), ""
    except FabricError as error:
        return None, error.detail
    finally:
        finder.close()
