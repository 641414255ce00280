"""A link group: the links to one peer, the connections on them, the memory between.

`LinkGroup` keeps who belongs to it and whether another connection has room; it sends
nothing. `GroupTable` decides whether a connection reuses a group or makes first
contact, which is what the two ends have to agree on. LLC messages are `llc_flows`.

There is one link a group today. Its places for more are kept open: RToken tables and
rkeys are kept by link, and ``links`` is a list.

Reference: RFC 7609 sections 2.2.2, 3.5.2 and 4.3.6; kernel counterpart: smc_core.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pysmc.core.rmb import RmbPool, RTokenTable
from pysmc.core.roles import Role

if TYPE_CHECKING:
    from collections.abc import Hashable

    from pysmc.config import Config
    from pysmc.core.connection import Connection
    from pysmc.core.link import Link

__all__ = ["GroupTable", "LinkGroup"]


class LinkGroup:
    """The links to one peer and what they carry.

    Args:
        number: The group's number in this process.
        role: Fixed by who opened the TCP connection that made it.
        peer_id: The peer's ID, 8 bytes.
        peer_key: Who the peer was on the TCP side; a peer ID is only a claim.
        fabric: Name of the fabric.
        device: Name of the device, which is one of that fabric.
        eid: The EID that was agreed on.
        release: 0 for version 2.0, 1 for 2.1.
        max_connections: Negotiated, 16-255.
        max_links: Negotiated, 1 or more.
        config: For the size of the pool.
    """

    def __init__(
        self,
        *,
        number: int,
        role: Role,
        peer_id: bytes,
        peer_key: Hashable,
        fabric: str,
        device: str,
        eid: str,
        release: int,
        max_connections: int,
        max_links: int,
        config: Config,
    ) -> None:
        self.number = number
        self.role = role
        self.peer_id = peer_id
        self.peer_key = peer_key
        self.fabric = fabric
        self.device = device
        self.eid = eid
        self.release = release
        self.max_connections = max_connections
        self.max_links = max_links
        self.handle: Any = None
        self.links: list[Link] = []
        self.connections: dict[int, Connection] = {}
        self.pool = RmbPool(config.max_idle_rmbs)
        self.rtokens = RTokenTable()
        # Connections and handshakes that hold a place, so that the 256th handshake in
        # flight already makes another group.
        self.places_taken = 0
        self.rmb_bytes = 0
        # No new connection may join: the peer lost it, or it is being deleted.
        self.is_closed_to_new = False
        # Of connections that we gave up the peer may have some still.
        self.peer_may_have_more = False
        self.is_ended = False

    def __repr__(self) -> str:
        return (
            f"<LinkGroup {self.number} {self.role.value} {self.fabric}"
            f" connections={len(self.connections)}>"
        )

    @property
    def version(self) -> str:
        """SMC-R version of the group."""
        return "2.1" if self.release else "2.0"

    @property
    def active_link(self) -> Link | None:
        """The link that a new connection gets."""
        return next((link for link in self.links if link.is_active), None)

    @property
    def has_room(self) -> bool:
        """Whether another connection may join."""
        return (
            not self.is_closed_to_new
            and self.places_taken < self.max_connections
            and self.active_link is not None
        )

    def is_in_use(self, rkey: int, address: int) -> bool:
        """Whether a connection of ours still writes to this element of the peer.

        A peer gives its element to another connection only after both ends have closed
        the last one. Whoever names one that is in use would lead two streams into it.

        Args:
            rkey: 32 bits.
            address: Where the element begins, 64 bits.

        Reference: RFC 7609 section 4.4.2.
        """
        return any(
            connection.remote_rkey == rkey
            and connection.remote_address == address
            and not connection.we_ended
            for connection in self.connections.values()
        )

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses it."""
        return self.places_taken == 0 and not self.connections


class GroupTable:
    """All link groups of an endpoint."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._groups: dict[int, LinkGroup] = {}
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._groups)

    def all(self) -> list[LinkGroup]:
        """Give a snapshot of the groups; the table may change while one walks it."""
        return list(self._groups.values())

    def add(
        self,
        *,
        role: Role,
        peer_id: bytes,
        peer_key: Hashable,
        fabric: str,
        device: str,
        eid: str,
        release: int,
        max_connections: int,
        max_links: int,
    ) -> LinkGroup:
        """Make a group after first contact was decided."""
        group = LinkGroup(
            number=self._next_number,
            role=role,
            peer_id=peer_id,
            peer_key=peer_key,
            fabric=fabric,
            device=device,
            eid=eid,
            release=release,
            max_connections=max_connections,
            max_links=max_links,
            config=self._config,
        )
        self._next_number += 1
        self._groups[group.number] = group
        return group

    def remove(self, group: LinkGroup) -> None:
        """Forget a group; nothing when it is not there."""
        self._groups.pop(group.number, None)

    def of_peer(self, role: Role, peer_id: bytes) -> list[LinkGroup]:
        """Give the groups with one peer in one role."""
        return [
            group
            for group in self._groups.values()
            if group.role is role and group.peer_id == peer_id
        ]

    def count(self, role: Role, peer_id: bytes, peer_key: Hashable) -> int:
        """Count the groups with one peer in one role.

        Whoever borrows a peer's ID does not count against that peer.
        """
        of_peer = self.of_peer(role, peer_id)
        return sum(group.peer_key == peer_key for group in of_peer)

    def reusable_by_server(
        self, *, peer_id: bytes, peer_key: Hashable, gid: bytes, device: str, eid: str
    ) -> LinkGroup | None:
        """Find a group that a Proposal's connection can join.

        The key holds more than the peer ID, because that and the GID are only claims,
        and the answer discloses an rkey of the group.

        Reference: RFC 7609 section 3.5.2; kernel counterpart: smcr_lgr_match().
        """
        for group in self.of_peer(Role.SERVER, peer_id):
            link = group.active_link
            if (
                group.has_room
                and group.peer_key == peer_key
                and group.device == device
                and group.eid == eid
                and link is not None
                and link.remote is not None
                and link.remote.gid == gid
            ):
                return group
        return None

    def link_of_accept(
        self, *, peer_id: bytes, gid: bytes, qp_number: int, device: str
    ) -> tuple[LinkGroup | None, Link | None]:
        """Find the group and the link that a server's reuse Accept names.

        Args:
            peer_id: The server's, 8 bytes.
            gid: The server's, 16 bytes.
            qp_number: The server's, 24 bits.
            device: Ours that the connection is to use.

        Returns:
            (None, None) when no group fits: the ends are out of sync. (group, None)
            when only the link is missing.

        Reference: RFC 7609 section 3.5.2.2.
        """
        candidates = [
            group
            for group in self.of_peer(Role.CLIENT, peer_id)
            if not group.is_closed_to_new
        ]
        for group in candidates:
            for link in group.links:
                remote = link.remote
                if (
                    link.is_active
                    and group.device == device
                    and remote is not None
                    and remote.gid == gid
                    and remote.qp_number == qp_number
                ):
                    return group, link
        return (candidates[0], None) if candidates else (None, None)
