"""The door of the core: everything that one process and loop knows of SMC-R.

Three sources drive it: the TCP sockets and the fabric (``receive_*``, ``*_created``,
``link_down`` and the other answers), the application (`connect`, `accept` and the
methods of `Connection`), and time (`handle_timer`). After any call, carry out
`take_actions` until it is empty, then look at `take_events`, then arm one timer for
`next_timer`. Nothing here knows what time it is or what a socket is.

`Endpoint` only finds the machine that an input belongs to.

Reference: RFC 7609 section 3; kernel counterparts: smc_core.c, af_smc.c.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pysmc.core.actions import Action, DeregisterMemory, PublishUpdate
from pysmc.core.client import ClientNegotiator
from pysmc.core.context import Context, FabricOffer, Identity
from pysmc.core.events import ConnectionLost
from pysmc.core.handshake import (
    LOOKING_AT_TCP,
    NOTHING_ABSENT,
    Handshake,
    HandshakeState,
)
from pysmc.core.keeper import Keeper
from pysmc.core.negotiator import reason_of_status
from pysmc.core.rmb import Rmb, RmbState, RToken
from pysmc.core.roles import Role
from pysmc.core.server import ServerNegotiator
from pysmc.errors import ConnectionReset, RemoteProtocolError, SmcError
from pysmc.reasons import reason
from smcproto.constants import DeleteLinkReason
from smcproto.diagnosis import PeerDiagnosis

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from pysmc.config import Config
    from pysmc.core.connection import Connection, Update
    from pysmc.core.events import Event
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup
    from pysmc.core.tokens import TokenSource
    from pysmc.core.tuning import Tuning
    from pysmc.reasons import Reason
    from smcproto import llc

__all__ = ["DEADLINES_AT_ONCE", "Endpoint", "FabricOffer", "Identity", "Role"]

DEADLINES_AT_ONCE: Final = 256
"""Deadlines that one call handles. A thousand peers that stall are due together; and
should one ever be set again for the same moment, a loop still goes on."""


class Endpoint:
    """The SMC-R state of one process and loop.

    Args:
        identity: Who we are.
        offers: The devices of connections that are begun without their own, in order of
            preference. With none, those have to be begun with a refusal.
        config: Sizes, waits and limits.
        tokens: Where random numbers come from.
    """

    def __init__(
        self,
        identity: Identity,
        offers: Sequence[FabricOffer],
        config: Config,
        tokens: TokenSource,
    ) -> None:
        self._context = Context(identity, offers, config, tokens)
        self._keeper = Keeper(self._context, self)
        self._client = ClientNegotiator(self._context, self._keeper)
        self._server = ServerNegotiator(self._context, self._keeper)

    # What comes out

    def take_actions(self) -> list[Action]:
        """Take the orders given since the last call; carry them out in order."""
        actions, self._context.actions = self._context.actions, []
        return actions

    def take_events(self) -> list[Event]:
        """Take the news since the last call."""
        events, self._context.events = self._context.events, []
        return events

    def next_timer(self) -> float | None:
        """Tell when `handle_timer` has to be called, None for never."""
        return self._context.timers.next()

    @property
    def groups(self) -> list[LinkGroup]:
        """A snapshot of the link groups."""
        return self._keeper.groups.all()

    @property
    def handshake_count(self) -> int:
        """How many handshakes are in progress."""
        return len(self._context.handshakes)

    @property
    def excess(self) -> Mapping[str, int]:
        """How often each limit was exceeded, by its name."""
        return self._context.excess

    @property
    def tuning(self) -> Tuning:
        """How connections begin; only simulations change it, and at both ends alike."""
        return self._context.tuning

    @tuning.setter
    def tuning(self, tuning: Tuning) -> None:
        self._context.tuning = tuning

    def has_room(self) -> bool:
        """Whether another handshake may begin; if not, stay on TCP (LIMIT)."""
        return len(self._context.handshakes) < self._context.config.max_handshakes

    # Handshakes

    def connect(
        self,
        peer_key: Hashable,
        now: float,
        refusal: Reason | None = None,
        offers: Sequence[FabricOffer] | None = None,
        absent: Mapping[str, Reason] = NOTHING_ABSENT,
    ) -> Handshake:
        """Begin as the client; the Proposal is ordered to be sent.

        Args:
            peer_key: Who is at the other end of TCP, for example its host address.
            now: The time in seconds.
            refusal: Why it cannot be SMC-R: a Decline goes in the Proposal's place,
                because the server expects a CLC message.
            offers: The devices that fit this connection, in order of preference; with
                none there has to be a refusal.
            absent: Why others do not fit, by the EIDs that would select them.
        """
        return self._client.begin(peer_key, now, refusal, offers, absent)

    def accept(
        self,
        peer_key: Hashable,
        now: float,
        refusal: Reason | None = None,
        offers: Sequence[FabricOffer] | None = None,
        absent: Mapping[str, Reason] = NOTHING_ABSENT,
    ) -> Handshake:
        """Begin as the server; the Proposal is awaited.

        Args:
            peer_key: Who is at the other end of TCP, for example its host address.
            now: The time in seconds.
            refusal: Why it cannot be SMC-R: the Proposal is answered with a Decline,
                because the client sends one in any case.
            offers: The devices that fit this connection, in order of preference.
            absent: Why others do not fit, by the EIDs that would select them.
        """
        return self._server.begin(peer_key, now, refusal, offers, absent)

    def receive_tcp(self, handshake: Handshake, data: bytes, now: float) -> None:
        """Take TCP bytes of a handshake, at most ``handshake.wanted`` of them."""
        if handshake.is_over:
            return
        side = self._side(handshake)
        try:
            message = handshake.stream.feed(data)
        except RemoteProtocolError as error:
            side.fail(handshake, error, now)
        else:
            if message is not None:
                side.receive(handshake, message, now)

    def tcp_lost(
        self, handshake: Handshake, now: float, error: BaseException | None
    ) -> None:
        """The TCP connection of a handshake ended, or sending on it failed."""
        if handshake.is_over:
            return
        if (
            handshake.state is HandshakeState.LATE
            and error is None
            and handshake.stream.is_empty
        ):
            # No Decline comes any more: a peer may have written and closed by now.
            self._client.tcp_quiet(handshake, now)
            return
        how = "closed it" if error is None else str(error)
        text = f"TCP connection ended while {handshake.state.value}: {how}"
        self._side(handshake).fail(handshake, ConnectionReset(text), now)

    def tcp_quiet(self, handshake: Handshake, now: float) -> None:
        """Answer to `CheckTcp`: nothing was there, so no Decline can come any more."""
        if not handshake.stream.is_empty:
            # The rest of a Decline is on its way: the deadline decides.
            return
        if handshake.state in LOOKING_AT_TCP:
            self._side(handshake).tcp_quiet(handshake, now)

    def abandon(self, handshake: Handshake, now: float) -> None:
        """The driver gave up a handshake: give back what it holds. Idempotent."""
        self._side(handshake).abandon(handshake, now)

    def _side(self, handshake: Handshake) -> ClientNegotiator | ServerNegotiator:
        return self._client if handshake.role is Role.CLIENT else self._server

    # Answers to actions

    def pair_created(self, link: Link, number: int, now: float) -> None:
        """Answer to `CreateQueuePair`.

        Args:
            link: The action's.
            number: The queue pair's number, 24 bits.
            now: The time in seconds.
        """
        link.local = replace(link.local, qp_number=number)
        if link.handshake is not None:
            self._side(link.handshake).pair_created(link.handshake, now)

    def pair_connecting(self, link: Link, now: float) -> None:
        """Answer to `ConnectQueuePair`: it has begun; nothing is known to be wrong."""
        if link.handshake is not None and link.handshake.role is Role.CLIENT:
            self._client.pair_connecting(link.handshake, now)

    def pair_connected(self, link: Link, now: float) -> None:
        """Answer to `ConnectQueuePair`: SENDs may be posted."""
        if link.handshake is None:
            return
        if link.handshake.role is Role.CLIENT:
            self._client.pair_connecting(link.handshake, now)
        else:
            self._server.pair_connected(link.handshake)

    def pair_failed(self, link: Link, status: str, detail: str, now: float) -> None:
        """Answer to either: it failed.

        Args:
            link: The action's.
            status: Value of the fabric's status.
            detail: A sentence, with the errno's name where there is one.
            now: The time in seconds.
        """
        self.link_down(link, status, detail, now)

    def memory_registered(self, rmb: Rmb, address: int, rkey: int, now: float) -> None:
        """Answer to `RegisterMemory`.

        Args:
            rmb: The action's.
            address: Virtual address, 64 bits.
            rkey: Key on the group's link, 32 bits.
            now: The time in seconds.
        """
        if rmb.group.is_ended:
            # It went with the group; who waited for it on a reused one has to know.
            if rmb.handshake is not None:
                why = reason("LINK_FAILED", "local", "The link group ended.")
                self._side(rmb.handshake).decline(rmb.handshake, why, now)
            return
        if rmb.state is RmbState.GONE:
            # Whoever wanted it is gone too.
            self._context.actions.append(DeregisterMemory(rmb))
            return
        rmb.state = RmbState.REGISTERED
        for link in rmb.group.links:
            rmb.tokens[link] = RToken(rkey, address)
        handshake = rmb.handshake
        assert handshake is not None, "a handshake that ends drops its memory"
        if handshake.first_contact:
            # The CLC message carries its RToken.
            self._side(handshake).memory_ready(handshake, now)
        else:
            assert handshake.link is not None
            self._keeper.confirm_rmb(handshake.link, rmb, now)

    def memory_failed(self, rmb: Rmb, status: str, detail: str, now: float) -> None:
        """Answer to `RegisterMemory`: there is none.

        Args:
            rmb: The action's.
            status: Value of the fabric's status.
            detail: A sentence, with the errno's name where there is one.
            now: The time in seconds.
        """
        self._keeper.drop_rmb(rmb)
        if rmb.handshake is not None:
            why = reason_of_status(status, detail)
            self._side(rmb.handshake).decline(rmb.handshake, why, now)

    # News of the fabric

    def receive_message(self, link: Link, payload: bytes, now: float) -> None:
        """Take a SEND of the peer: an LLC message."""
        flows = self._keeper.flows.get(link.group)
        if flows is not None:
            flows.receive(link, payload, now)

    def receive_update(
        self, link: Link, update: Update, now: float
    ) -> tuple[Connection, int] | None:
        """Take an update of the peer.

        Args:
            link: Where it came.
            update: (sequence, alert token, producer, consumer, flags).
            now: The time in seconds.

        Returns:
            The connection and its `News`. None when there is nobody to tell: no
            connection of this link's group has the token, because it belonged to one
            that is gone, or its handshake is not over. Whoever gets such a connection
            by `Established` finds in its properties what came before.
        """
        link.last_received = now
        connection = link.group.connections.get(update[1])
        if connection is None:
            return None
        news = connection.receive_update(update)
        return (connection, news) if connection.is_established else None

    def connection_of(self, link: Link, token: int) -> Connection | None:
        """Find a connection by our alert token, for a PUBLISH completion."""
        return link.group.connections.get(token)

    def link_down(self, link: Link, status: str, detail: str, now: float) -> None:
        """The link's queue pair is gone.

        With further links its connections will move; with one they end.

        Args:
            link: Which one.
            status: Value of the fabric's status.
            detail: A sentence for people.
            now: The time in seconds.
        """
        handshake = link.handshake
        if handshake is not None:
            why = reason_of_status(status, detail)
            self._side(handshake).link_lost(handshake, why, now)
        text = f"the link to the peer is lost: {status}" + (
            f" ({detail})" if detail else ""
        )
        self._end_group(link.group, ConnectionReset(text), None, now)

    # The application's side

    def reap(self, connection: Connection, now: float) -> None:
        """Give back what both ends have finished with; else wait for the peer.

        Call it after a final update of either end was published or received.
        """
        self._keeper.reap(connection, now)

    def shutdown(self, now: float) -> None:
        """The loop closes: every peer is told, and everything is given back."""
        queued = HandshakeState.QUEUED
        # Those first: the end of a first contact would let them begin.
        for handshake in sorted(
            self._context.handshakes, key=lambda each: each.state is not queued
        ):
            self.abandon(handshake, now)
        for group in self.groups:
            error = ConnectionReset("the event loop was closed")
            self._end_group(group, error, DeleteLinkReason.PROGRAM, now)

    # Time

    def handle_timer(self, now: float) -> None:
        """Do what is due, so much of it that others have their turn soon.

        What is left stays due: `next_timer` tells so.
        """
        for _ in range(DEADLINES_AT_ONCE):
            due = self._context.timers.pop_due(now)
            if due is None:
                return
            kind, subject = due
            match kind:
                case "handshake":
                    self._side(subject).time_over(subject, now)
                case "llc":
                    self._keeper.flows[subject].answer_due(now)
                case "test link":
                    self._test_due(subject, now)
                case "test answer":
                    self._keeper.flows[subject.group].test_link_due(subject, now)
                case "close":
                    self._keeper.close_due(subject, now)
                case _:
                    assert kind == "idle", kind
                    error = ConnectionReset("the link group was idle for too long")
                    self._end_group(subject, error, DeleteLinkReason.PROGRAM, now)

    def _test_due(self, link: Link, now: float) -> None:
        interval = self._context.config.test_link_interval
        quiet_until = link.last_received + interval
        is_overdue = self._is_overdue(link)
        if is_overdue and link.is_suspect:
            self.link_down(link, "timed out", "a post was never completed", now)
            return
        link.is_suspect = is_overdue
        if quiet_until <= now or is_overdue:
            self._keeper.flows[link.group].test_link(link, now)
            quiet_until = now + interval
        self._context.timers.set(("test link", link), quiet_until)

    @staticmethod
    def _is_overdue(link: Link) -> bool:
        """Tell whether a publish has been open since the last look.

        A fabric answers every post, or its link goes down. One that does neither is
        not to be trusted: it is given one more interval, and an answer to TEST LINK.
        """
        before = link.open_posts
        link.open_posts = {
            connection.alert_token: connection.oldest_post
            for connection in link.group.connections.values()
            if connection.link is link and connection.oldest_post is not None
        }
        return any(before.get(token) == post for token, post in link.open_posts.items())

    def _end_group(
        self,
        group: LinkGroup,
        error: SmcError,
        tell: int | None,
        now: float,
    ) -> None:
        self._keeper.end_group(group, now, error=error, tell=tell)

    # FlowListener

    def confirm_link_received(
        self, link: Link, message: llc.ConfirmLink, now: float
    ) -> None:
        """CONFIRM LINK came, a request or a response."""
        if link.handshake is not None:
            side = self._side(link.handshake)
            side.confirm_link_received(link.handshake, message, now)

    def add_link_received(self, link: Link, message: llc.AddLink) -> None:
        """ADD LINK came: a request that we have refused, or a response."""
        if link.handshake is not None:
            side = self._side(link.handshake)
            side.add_link_received(link.handshake, message)

    def rkey_confirmed(self, rmb: Rmb, now: float, *, accepted: bool) -> None:
        """The peer answered CONFIRM RKEY, or did not in time."""
        rmb.state = RmbState.CONFIRMED if accepted else RmbState.REGISTERED
        handshake = rmb.handshake
        if handshake is None:
            self._keeper.give_rmb(rmb, now, clean=True)
        elif accepted:
            self._side(handshake).memory_ready(handshake, now)
        elif rmb.group.is_ended:
            why = reason("LINK_FAILED", "local", "The link group ended.")
            self._side(handshake).decline(handshake, why, now)
        else:
            text = "The peer did not accept our receive buffer on the reused link."
            code = PeerDiagnosis.REGISTRATION
            why = reason("INTERNAL", "peer", text, code=code)
            self._side(handshake).decline(handshake, why, now)

    def rkey_deleted(self, rmb: Rmb) -> None:
        """DELETE RKEY was answered, or its time is over: the memory is free."""
        self._keeper.drop_rmb(rmb)

    def rkeys_withdrawn(self, group: LinkGroup, rkeys: Sequence[int]) -> None:
        """The peer's DELETE RKEY came: connections that write there end.

        A write to a key that is gone would break the link, and with it connections
        that are none of this one's business.

        Reference: RFC 7609 section A.3.7.
        """
        text = "the peer withdrew the memory of a connection that it had not closed"
        for connection in list(group.connections.values()):
            if connection.remote_rkey in rkeys and connection.is_open:
                error = ConnectionReset(text)
                connection.peer_lost(error)
                actions, events = self._context.actions, self._context.events
                actions.append(PublishUpdate(connection))
                if connection.is_established:
                    connection.is_loss_told = True
                    events.append(ConnectionLost(connection, error))

    def link_unanswered(self, link: Link, now: float) -> None:
        """TEST LINK was not answered: the link is dead."""
        self.link_down(link, "timed out", "TEST LINK was not answered", now)

    def delete_link_received(
        self, link: Link, message: llc.DeleteLink, now: float
    ) -> None:
        """The peer gives up the link or the whole group.

        With one link both come to the same.

        Reference: RFC 7609 sections 3.5.5.2 and 4.8.2.
        """
        is_client = link.group.role is Role.CLIENT
        if is_client and not message.whole_group:
            self._keeper.flows[link.group].answer_delete_link(link, message)
        if not message.whole_group and message.link_number != link.number:
            # A further link that never came to be.
            return
        handshake = link.handshake
        why = f"the peer ended the link group, reason {message.reason:08x}"
        if handshake is not None:
            lost = reason_of_status("peer gone", why)
            self._side(handshake).link_lost(handshake, lost, now)
        # Only a server's DELETE LINK ends a group; the client's asks for it.
        tell = None if is_client else message.reason
        self._end_group(link.group, ConnectionReset(why), tell, now)

    # Invariants

    def check(self) -> None:
        """Check what must hold between any two calls; for tests and simulations.

        Raises:
            AssertionError: It does not; a fault of ours.
        """
        context, keeper = self._context, self._keeper
        for handshake in context.handshakes:
            assert not handshake.is_over, f"{handshake} is over, and still counted"
            assert ("handshake", handshake) in context.timers, f"{handshake}: no timer"
        keeper.check()
        self._server.check()
        groups = set(keeper.groups.all())
        for kind, subject in context.timers:
            match kind:
                case "handshake":
                    living = subject in context.handshakes
                case "idle":
                    living = subject in groups and subject.is_idle
                case "llc":
                    living = subject in groups
                case "close":
                    living = keeper.has_connection(subject)
                case _:
                    living = subject.group in groups and subject.is_active
            assert living, f"a timer for {kind} of {subject}, which is gone"
