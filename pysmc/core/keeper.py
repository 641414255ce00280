"""Who owns links and memory: made here, given back here, in one order.

`Keeper` opens a group at first contact, finds memory for a connection, and takes both
away again; every way in which something ends comes through its methods, and each of
them may be called twice. It does not know CLC messages.

The order of an end is: unpublish (no table finds it any more), stop timers, then the
queue pair, then the memory, then the news.

Reference: RFC 7609 sections 3.5.5 and 4.8.2; kernel counterpart: smc_core.c.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pysmc.config import RMBE_BYTES_MIN
from pysmc.core.actions import (
    ClearMemory,
    CloseGroup,
    CloseQueuePair,
    CreateQueuePair,
    DeregisterMemory,
    RegisterMemory,
)
from pysmc.core.events import ConnectionLost
from pysmc.core.link import Link, LinkEnd, LinkInput
from pysmc.core.link_group import GroupTable, LinkGroup
from pysmc.core.llc_flows import FlowListener, LlcFlows
from pysmc.core.rmb import Rmb, RmbState
from pysmc.core.roles import Role

if TYPE_CHECKING:
    from collections.abc import Hashable

    from pysmc.core.connection import Connection
    from pysmc.core.context import Context, FabricOffer
    from pysmc.errors import SmcError

__all__ = ["Keeper"]

SHARES = 256
"""A further RMB may take one of so many shares of the pinned memory that is left."""
SHARES_OF_PEER = 128
"""The same of what is left of its peer's."""
CLIENT_IDLE_EXTRA = 10.0
"""Seconds that a client keeps an idle group longer, so that the server ends it."""


class Keeper:
    """Opens and ends groups, links, RMBs and connections.

    Args:
        context: Orders, news and deadlines go there.
        listener: Is told how LLC flows end.
    """

    def __init__(self, context: Context, listener: FlowListener) -> None:
        self._context = context
        self._listener = listener
        self.groups = GroupTable(context.config)
        self.flows: dict[LinkGroup, LlcFlows] = {}
        self.rmb_bytes = 0
        self.rmb_bytes_of: Counter[Hashable] = Counter()
        """By who the peer is on the TCP side: a peer ID is only a claim."""

    # Groups and links

    def open_group(
        self,
        *,
        role: Role,
        peer_id: bytes,
        peer_key: Hashable,
        offer: FabricOffer,
        eid: str,
        release: int,
        max_connections: int,
        max_links: int,
    ) -> Link:
        """Make a group and its first link, and order the queue pair."""
        context = self._context
        group = self.groups.add(
            role=role,
            peer_id=peer_id,
            peer_key=peer_key,
            fabric=offer.fabric,
            device=offer.device,
            eid=eid,
            release=release,
            max_connections=max_connections,
            max_links=max_links,
        )
        self.flows[group] = LlcFlows(group, context, self._listener)
        local = LinkEnd(
            peer_id=context.identity.peer_id,
            gid=offer.gid,
            mac=offer.mac,
            qp_number=0,
            psn=context.tokens.psn(),
            mtu_code=offer.mtu_code,
        )
        # The server counts links from 1; a client learns the number by CONFIRM LINK.
        number = 1 if role is Role.SERVER else 0
        link = Link(group, number, local, context.tokens.user_id())
        group.links.append(link)
        context.actions.append(CreateQueuePair(link))
        return link

    def activate(self, link: Link, now: float) -> None:
        """The first link is confirmed: connections may use it."""
        link.move(LinkInput.CONFIRMED)
        link.last_received = now
        interval = self._context.config.test_link_interval
        self._context.timers.set(("test link", link), now + interval)

    def end_group(
        self,
        group: LinkGroup,
        now: float,
        *,
        error: SmcError,
        tell: int | None,
    ) -> None:
        """End a group with everything on it. Idempotent.

        Args:
            group: Which one.
            now: The time in seconds.
            error: What its connections are told.
            tell: Reason of the DELETE LINK that the peer gets; None says nothing.
        """
        if group.is_ended:
            return
        group.is_ended = group.is_closed_to_new = True
        self.groups.remove(group)
        flows = self.flows.pop(group)
        timers = self._context.timers
        timers.cancel(("idle", group))
        connections = list(group.connections.values())
        in_use = bool(connections) or group.peer_may_have_more
        for connection in connections:
            timers.cancel(("close", connection))
        for link in group.links:
            if tell is not None and link.is_active:
                flows.delete_group(link, reason=tell)
        flows.end(now)
        for link in group.links:
            link.move(LinkInput.LOST)
            timers.cancel(("test link", link))
            self._context.actions.append(CloseQueuePair(link, in_use))
        self._count(group, -group.rmb_bytes)
        group.pool.clear()
        self._context.actions.append(CloseGroup(group))
        group.connections.clear()
        for connection in connections:
            # Who has closed has no use for the news. Of a peer that broke a rule its
            # holder may not know yet, and this is the last time that memory is there.
            told = connection.error
            lost = connection.is_established and (told or not connection.we_ended)
            connection.link_lost(error)
            if lost and not connection.is_loss_told:
                news = ConnectionLost(connection, told or error)
                self._context.events.append(news)

    def leave(self, group: LinkGroup, now: float) -> None:
        """Give back a connection's place; an idle group gets its deadline."""
        group.places_taken -= 1
        assert group.places_taken >= 0, "a place was given back twice"
        if group.is_idle and not group.is_ended:
            wait = self._context.config.idle_group_wait
            if group.role is Role.CLIENT:
                wait += CLIENT_IDLE_EXTRA
            self._context.timers.set(("idle", group), now + wait)

    def join(self, group: LinkGroup) -> None:
        """Take a place for a connection on its way."""
        group.places_taken += 1
        self._context.timers.cancel(("idle", group))

    # Memory

    def take_rmb(self, group: LinkGroup) -> Rmb | None:
        """Find memory for a connection: confirmed and idle, or newly ordered.

        Returns:
            In state CONFIRMED it can be used at once; in REGISTERING an answer of the
            fabric has to be awaited. None when no more may be pinned.
        """
        length = config_length = self._context.config.rmbe_bytes
        affordable = self._affordable(group)
        while length > affordable and length > RMBE_BYTES_MIN:
            length >>= 1
        size = config_length
        while size >= length:
            rmb = group.pool.take(size)
            if rmb is not None:
                self._context.actions.append(ClearMemory(rmb, rmb.dirty_bytes))
                return rmb
            size >>= 1
        if length > min(self._left(group)):
            return None
        rmb = Rmb(group, length)
        self._count(group, length)
        self._context.actions.append(RegisterMemory(rmb))
        return rmb

    def _affordable(self, group: LinkGroup) -> int:
        """Tell how large a further RMB may be: each takes its share of what is left.

        So a few connections get large buffers, and thousands still get some.
        """
        left, left_of_peer = self._left(group)
        return min(left // SHARES, left_of_peer // SHARES_OF_PEER)

    def _left(self, group: LinkGroup) -> tuple[int, int]:
        """Tell how many bytes may still be pinned, in all and for a group's peer."""
        config = self._context.config
        of_peer = self.rmb_bytes_of[group.peer_key]
        return (
            config.max_pinned_bytes - self.rmb_bytes,
            config.max_pinned_bytes_per_peer - of_peer,
        )

    def short_of(self, group: LinkGroup) -> str:
        """Name the limit that keeps `take_rmb` from giving memory to a group."""
        left, left_of_peer = self._left(group)
        return "max_pinned_bytes" + ("_per_peer" if left_of_peer < left else "")

    def confirm_rmb(self, link: Link, rmb: Rmb, now: float) -> None:
        """Announce the RMB to the peer of a reused group."""
        rmb.state = RmbState.CONFIRMING
        self.flows[link.group].confirm_rkey(link, rmb, now)

    def give_rmb(self, rmb: Rmb, now: float, *, clean: bool) -> None:
        """Take memory back from a connection. Idempotent.

        Args:
            rmb: Which one.
            now: The time in seconds.
            clean: True when the peer has certainly finished with it. Otherwise the
                peer is told to forget it first.
        """
        group = rmb.group
        if group.is_ended or rmb.state in {
            RmbState.CONFIRMING,  # comes back here when the peer has answered
            RmbState.DELETING,
            RmbState.GONE,
        }:
            return
        link = group.active_link
        if rmb.state is not RmbState.CONFIRMED:
            self.drop_rmb(rmb)
            return
        assert link is not None, "an RMB is confirmed on an active link"
        if clean:
            surplus = group.pool.give(rmb)
            if surplus is not None:
                self.flows[group].delete_rkey(link, surplus, now)
        else:
            self.flows[group].delete_rkey(link, rmb, now)

    def drop_rmb(self, rmb: Rmb) -> None:
        """Deregister memory that no peer writes any more. Idempotent."""
        if rmb.state is RmbState.GONE or rmb.group.is_ended:
            return
        registered = rmb.state is not RmbState.REGISTERING
        rmb.state = RmbState.GONE
        self._count(rmb.group, -rmb.length)
        if registered:
            self._context.actions.append(DeregisterMemory(rmb))

    def _count(self, group: LinkGroup, length: int) -> None:
        group.rmb_bytes += length
        self.rmb_bytes += length
        self.rmb_bytes_of[group.peer_key] += length
        if not self.rmb_bytes_of[group.peer_key]:
            del self.rmb_bytes_of[group.peer_key]

    # Connections

    def add_connection(self, connection: Connection) -> None:
        """Publish a connection: updates that carry its token find it from now on."""
        connection.group.connections[connection.alert_token] = connection

    def remove_connection(
        self, connection: Connection, now: float, *, clean: bool
    ) -> None:
        """Unpublish a connection and give back what it held. Idempotent.

        Args:
            connection: Which one.
            now: The time in seconds.
            clean: True when the peer has certainly finished with it.
        """
        group = connection.group
        if not self.has_connection(connection):
            return
        group.peer_may_have_more |= not clean
        del group.connections[connection.alert_token]
        connection.forget_unread()
        connection.rmb.dirty_bytes = connection.dirty_bytes
        self._context.timers.cancel(("close", connection))
        self.give_rmb(connection.rmb, now, clean=clean)
        self.leave(group, now)

    def reap(self, connection: Connection, now: float) -> None:
        """Give back what both ends have finished with, or wait for the peer's end.

        The RFC wants a timer in the close-wait states: a peer that never says C would
        otherwise keep our memory for ever.

        Reference: RFC 7609 section 4.8.1.
        """
        if connection.is_ended:
            clean = not connection.suspect
            self.remove_connection(connection, now, clean=clean)
        elif connection.we_ended and self.has_connection(connection):
            due = ("close", connection)
            if due not in self._context.timers:
                # Set once: a peer must not prolong it by whatever it publishes.
                wait = self._context.config.close_wait
                self._context.timers.set(due, now + wait)

    def close_due(self, connection: Connection, now: float) -> None:
        """The peer did not close in time: its memory is withdrawn from it."""
        self.remove_connection(connection, now, clean=False)

    def has_connection(self, connection: Connection) -> bool:
        """Whether updates find this connection."""
        # By identity: the token may belong to a later connection.
        found = connection.group.connections.get(connection.alert_token)
        return found is connection

    # Invariants

    def check(self) -> None:
        """Check what must hold between any two calls.

        Raises:
            AssertionError: It does not; a fault of ours.
        """
        groups = self.groups.all()
        assert self.flows.keys() == set(groups), "flows of a group that is not there"
        assert self.rmb_bytes == sum([group.rmb_bytes for group in groups])
        assert self.rmb_bytes == sum(self.rmb_bytes_of.values())
        users = [
            handshake.group
            for handshake in self._context.handshakes
            if handshake.group is not None and handshake.connection is None
        ]
        users_of = Counter(users) if users else {}
        for group in groups:
            places = users_of.get(group, 0) + len(group.connections)
            assert group.places_taken == places, f"{group}: places and users differ"
            assert not group.is_ended, f"{group}: ended, and still listed"
            self._check_memory(group)
            for token, connection in group.connections.items():
                assert connection.alert_token == token
                connection.check()

    def _check_memory(self, group: LinkGroup) -> None:
        confirmed, registered = RmbState.CONFIRMED, RmbState.REGISTERED
        idle = list(group.pool)
        used = [connection.rmb for connection in group.connections.values()]
        assert len({*idle, *used}) == len(idle) + len(used), f"{group}: RMB used twice"
        for rmb in idle:
            assert rmb.state is confirmed, f"{rmb} lies in the pool"
            assert rmb.handshake is None, f"{rmb} lies in the pool, and is waited for"
        for rmb in used:
            assert rmb.state is confirmed or rmb.state is registered, rmb
