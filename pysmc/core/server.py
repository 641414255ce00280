"""The server's half of the CLC handshake: Proposal, Accept, Confirm.

`ServerNegotiator` decides which fabric and EID a connection gets, whether it joins a
link group or makes first contact, and checks that the Confirm repeats what was agreed.
Whose turn a first contact is says `first_contacts`: a peer that stalls holds up nobody
but itself.

Reference: RFC 7609 sections 3.5.1.3 to 3.5.1.6 and 3.5.2; kernel counterpart:
smc_listen_work().
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysmc.core.actions import ConnectQueuePair
from pysmc.core.first_contacts import ContactKey, FirstContacts
from pysmc.core.handshake import (
    Handshake,
    HandshakeInput,
    HandshakeState,
    Proposed,
)
from pysmc.core.link import LinkEnd, LinkInput
from pysmc.core.negotiator import (
    NO_EYECATCHER,
    Negotiator,
    element_address,
    peer_element,
)
from pysmc.core.rmb import RToken
from pysmc.core.roles import Role
from pysmc.errors import HandshakeTimeout, RemoteProtocolError
from pysmc.reasons import Reason, reason
from smcproto import clc, clc_v2
from smcproto.constants import OsType, rmbe_size_code
from smcproto.diagnosis import PeerDiagnosis

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from pysmc.core.context import Context, FabricOffer
    from pysmc.core.keeper import Keeper
    from smcproto import llc

__all__ = ["ServerNegotiator"]

CONNECTIONS_LEAST = 16
"""Fewest connections a group that a version 2.1 peer may offer (Linux)."""

ANSWER_SHARE = 0.8
"""Share of a client's wait for the Accept that we use at most: a Decline in time is a
fallback, one that comes later meets a client that has given up."""


class ServerNegotiator(Negotiator):
    """Handshakes of connections that this process accepted."""

    def __init__(self, context: Context, keeper: Keeper) -> None:
        super().__init__(context, keeper)
        self._first_contacts = FirstContacts()

    def begin(
        self,
        peer_key: Hashable,
        now: float,
        refusal: Reason | None,
        offers: Sequence[FabricOffer] | None,
        absent: Mapping[str, Reason],
    ) -> Handshake:
        """Start a handshake: the Proposal is awaited.

        Args:
            peer_key: Who is at the other end of TCP.
            now: The time in seconds.
            refusal: What the Proposal is answered with, when it cannot be SMC-R.
            offers: The devices that fit this connection; None is those of all.
            absent: What a Proposal is answered with that names only EIDs of devices
                which this connection cannot have.
        """
        ends_at = now + self._config.handshake_wait
        offers = self._context.offers if offers is None else offers
        handshake = Handshake(Role.SERVER, peer_key, ends_at, offers, absent)
        handshake.refusal = refusal
        return self.start(handshake, self._config.proposal_wait, now)

    def receive(
        self, handshake: Handshake, message: clc.ClcMessage, now: float
    ) -> None:
        """Take a CLC message of the client."""
        state = handshake.state
        if isinstance(message, clc.Decline):
            self.declined(handshake, message, now)
        elif (
            isinstance(message, clc.Proposal) and state is HandshakeState.AWAIT_PROPOSAL
        ):
            self._receive_proposal(handshake, message, now)
        elif isinstance(message, clc.Confirm) and state is HandshakeState.AWAIT_CONFIRM:
            self._receive_confirm(handshake, message, now)
        else:
            self.wrong_message(handshake, message, now)

    # The Proposal

    def _receive_proposal(
        self, handshake: Handshake, proposal: clc.Proposal, now: float
    ) -> None:
        handshake.version = min(proposal.version, 2)
        # Not later than the whole handshake ends: whoever waits for its turn until then
        # would otherwise be asked again and again at that very moment.
        answer_by = now + ANSWER_SHARE * self._config.accept_wait
        handshake.answer_by = min(answer_by, handshake.ends_at)
        problem = handshake.refusal or self._judge(proposal)
        if problem is not None:
            self.decline(handshake, problem, now)
            return
        assert proposal.v2 is not None
        offer, eid = _choose(handshake.offers, proposal.v2.eids)
        if offer is None:
            why = _no_device(handshake.absent, proposal.v2.eids)
            self.decline(handshake, why, now)
            return
        handshake.proposed = _kept(proposal, proposal.v2, offer)
        handshake.offer, handshake.eid = offer, eid
        self._decide(handshake, now)

    def _judge(self, proposal: clc.Proposal) -> Reason | None:
        if proposal.v2 is None and not (
            proposal.typev1.offers_smcr or proposal.typev2.offers_smcr
        ):
            return reason("MODE", "local", "The client offers no SMC-R.")
        if proposal.v2 is None or not proposal.typev2.offers_smcr:
            return reason("VERSION", "local", "The client offers no SMC-R version 2.")
        v2 = proposal.v2
        if min(v2.release, self._config.release):
            if v2.max_connections < CONNECTIONS_LEAST:
                text = f"The client allows {v2.max_connections} connections a group."
                code = PeerDiagnosis.MAX_CONNECTIONS
                return reason("RELEASE", "local", text, code=code)
            if v2.max_links < 1:
                text = "The client allows no link."
                code = PeerDiagnosis.MAX_LINKS
                return reason("RELEASE", "local", text, code=code)
        return None

    def _key(self, handshake: Handshake) -> ContactKey:
        proposed, offer = handshake.proposed, handshake.offer
        assert proposed is not None
        assert offer is not None
        return ContactKey(
            handshake.peer_key, proposed.peer_id, offer.device, handshake.eid
        )

    def _decide(self, handshake: Handshake, now: float) -> None:
        """First contact or reuse: the decision that the client will follow."""
        proposed, offer = handshake.proposed, handshake.offer
        assert proposed is not None
        assert offer is not None
        group = self._keeper.groups.reusable_by_server(
            peer_id=proposed.peer_id,
            peer_key=handshake.peer_key,
            gid=proposed.gid,
            device=offer.device,
            eid=handshake.eid,
        )
        if group is not None and group.active_link is not None:
            self.use_link(handshake, group.active_link)
            self._prepare(handshake, now)
            self.take_memory(handshake, now)
            return
        key = self._key(handshake)
        begins_at = self._first_contacts.begins_at(key, now)
        if begins_at != now:
            self._first_contacts.wait(handshake, key)
            handshake.move(HandshakeInput.BUSY)
            until = handshake.answer_by if begins_at is None else begins_at
            self.wait(handshake, min(until, handshake.answer_by) - now, now)
        elif problem := self.group_problem(Role.SERVER, key.peer_id, key.peer_key):
            self.decline(handshake, problem, now)
        else:
            self._first_contacts.begin(handshake, key, now)
            self._open_group(handshake)
            self._prepare(handshake, now)

    def time_over(self, handshake: Handshake, now: float) -> None:
        """The present state's deadline has come; in the queue it may be the turn."""
        if handshake.state is HandshakeState.QUEUED and now < handshake.answer_by:
            self._first_contacts.leave(handshake, self._key(handshake))
            self._decide(handshake, now)
        else:
            super().time_over(handshake, now)

    def _prepare(self, handshake: Handshake, now: float) -> None:
        handshake.move(HandshakeInput.PROPOSAL)
        self.wait(handshake, handshake.answer_by - now, now)

    def _open_group(self, handshake: Handshake) -> None:
        proposed, offer = handshake.proposed, handshake.offer
        assert proposed is not None
        assert offer is not None
        config = self._config
        release = min(proposed.release, config.release)
        link = self._keeper.open_group(
            role=Role.SERVER,
            peer_id=proposed.peer_id,
            peer_key=handshake.peer_key,
            offer=offer,
            eid=handshake.eid,
            release=release,
            max_connections=(
                min(proposed.max_connections, config.max_connections)
                if release
                else 255
            ),
            max_links=min(proposed.max_links, config.max_links) if release else 1,
        )
        handshake.first_contact = True
        self.use_link(handshake, link)

    def pair_created(self, handshake: Handshake, now: float) -> None:
        """First contact: the queue pair is there; now the memory."""
        self.take_memory(handshake, now)

    def memory_ready(self, handshake: Handshake, now: float) -> None:
        """The memory is there, and on a reused group the peer knows it: Accept."""
        link, rmb, group = handshake.link, handshake.rmb, handshake.group
        assert link is not None
        assert rmb is not None
        assert group is not None
        connection = self.make_connection(handshake)
        token = rmb.tokens[link]
        self.send(
            handshake,
            clc.Accept(
                version=2,
                first_contact=handshake.first_contact,
                peer_id=self._context.identity.peer_id,
                gid=link.local.gid,
                mac=link.local.mac,
                qp_number=link.local.qp_number,
                rkey=token.rkey,
                rmbe_index=1,
                alert_token=connection.alert_token,
                rmbe_size_code=rmbe_size_code(rmb.length),
                mtu_code=link.local.mtu_code,
                virtual_address=token.virtual_address,
                psn=link.local.psn,
                v2=clc_v2.AcceptExtension(
                    eid=group.eid, first_contact=self._first_contact(handshake)
                ),
            ),
        )
        handshake.move(HandshakeInput.READY)
        self.wait(handshake, self._config.confirm_wait, now)

    def _first_contact(
        self, handshake: Handshake
    ) -> clc_v2.FirstContactExtension | None:
        group = handshake.group
        assert group is not None
        if not handshake.first_contact:
            return None
        return clc_v2.FirstContactExtension(
            direct=True,
            os_type=OsType.LINUX,
            release=group.release,
            host_name=self._context.identity.host_name,
            max_connections=group.max_connections if group.release else 0,
            max_links=group.max_links if group.release else 0,
        )

    # The Confirm

    def _receive_confirm(
        self, handshake: Handshake, confirm: clc.Confirm, now: float
    ) -> None:
        # The link may have been lost before.
        problem = handshake.problem or self._judge_confirm(handshake, confirm)
        if problem is not None:
            self._refuse_confirm(handshake, problem, now)
            return
        link, connection = handshake.link, handshake.connection
        assert link is not None
        assert connection is not None
        token = RToken(confirm.rkey, confirm.virtual_address)
        if handshake.first_contact:
            link.group.rtokens.add(token)
        elif not link.group.rtokens.knows(token):
            text = "the client named an RMB that it never announced on this link"
            error = RemoteProtocolError(text, section="RFC 7609 section 4.5")
            self.fail(handshake, error, now)
            return
        element = element_address(confirm)
        if not handshake.first_contact and link.group.is_in_use(confirm.rkey, element):
            text = "the client named an RMBE that another connection is using"
            error = RemoteProtocolError(text, section="RFC 7609 section 4.4.2")
            self.fail(handshake, error, now)
            return
        connection.attach_peer(
            token=token,
            alert_token=confirm.alert_token,
            rmbe_bytes=peer_element(confirm),
            rmbe_index=confirm.rmbe_index,
        )
        if handshake.first_contact:
            self._connect(handshake, confirm, now)
        else:
            handshake.move(HandshakeInput.CONFIRM_REUSE)
            self.establish(handshake, now)

    def _judge_confirm(
        self, handshake: Handshake, confirm: clc.Confirm
    ) -> Reason | None:
        """The Confirm has to repeat what the Accept said."""
        group, v2 = handshake.group, confirm.v2
        assert group is not None
        if group.is_ended:
            text = "The link group ended before the Confirm came."
            return reason("LINK_FAILED", "local", text)
        if confirm.version != 2 or v2 is None or v2.eid != group.eid:
            text = "The Confirm repeats another version or EID than the Accept's."
            return reason("VERSION", "local", text)
        if not handshake.first_contact:
            return None
        expected = self._first_contact(handshake)
        first = v2.first_contact
        assert expected is not None
        if first is None or (
            first.release,
            first.max_connections,
            first.max_links,
        ) != (expected.release, expected.max_connections, expected.max_links):
            text = "The Confirm repeats another release or other limits."
            return reason("RELEASE", "local", text)
        if not 1 <= confirm.mtu_code <= 5:
            text = f"The client's MTU code {confirm.mtu_code} has no meaning."
            return reason("INTERNAL", "local", text)
        return None

    def _refuse_confirm(self, handshake: Handshake, why: Reason, now: float) -> None:
        if handshake.first_contact:
            # Only the client may still decline, and it will: there is no link.
            handshake.move(HandshakeInput.CONFIRM_FIRST)
            self.await_link(handshake, now)
            self.link_failed(handshake, why)
        else:
            # On a reused link the client has gone on already: a Decline would reach
            # its application.
            error = RemoteProtocolError(why.text, section="RFC 7609 section 3.5.2")
            self.fail(handshake, error, now)

    def _connect(self, handshake: Handshake, confirm: clc.Confirm, now: float) -> None:
        proposed, link = handshake.proposed, handshake.link
        assert proposed is not None
        assert link is not None
        link.remote = LinkEnd(
            peer_id=confirm.peer_id,
            # The address is the Proposal's; the rest of the port is the Confirm's.
            gid=proposed.gid,
            mac=proposed.mac if any(proposed.mac) else confirm.mac,
            qp_number=confirm.qp_number,
            psn=confirm.psn,
            mtu_code=min(confirm.mtu_code, link.local.mtu_code),
        )
        handshake.move(HandshakeInput.CONFIRM_FIRST)
        # One wait for connecting and for the answer.
        self.await_link(handshake, now)
        link.move(LinkInput.CONNECT)
        self._context.actions.append(ConnectQueuePair(link, link.remote, passive=True))

    @property
    def link_wait(self) -> float:
        """Seconds that a server waits for the answer to CONFIRM LINK, or a Decline.

        A client, of ours as of Linux, declines up to one `decline_wait` and one
        `llc_wait` after its own wait; TCP may take two more `decline_wait` with it.
        """
        config = self._config
        wait = config.confirm_link_client_wait + config.llc_wait
        return wait + 3 * config.decline_wait

    @property
    def decline_due(self) -> float:
        """The same: no Decline of the client comes any more."""
        return self.link_wait

    def decline_wait_over(self, handshake: Handshake, now: float) -> None:
        """Fail: a Decline of ours might cross the client's, however late that is."""
        assert handshake.problem is not None
        text = (
            "the first link came to nothing, and the client did not decline in time: "
            f"{handshake.problem.text}"
        )
        self.fail(handshake, HandshakeTimeout(text), now)

    def pair_connected(self, handshake: Handshake) -> None:
        """First contact: the queue pair works; CONFIRM LINK goes out on it."""
        link = handshake.link
        assert link is not None
        if handshake.state is HandshakeState.AWAIT_LINK:
            self.flows(link).confirm_link(link, response=False)

    def confirm_link_received(
        self, handshake: Handshake, message: llc.ConfirmLink, now: float
    ) -> None:
        """The answer to CONFIRM LINK.

        Reference: RFC 7609 section 3.5.5.1 and A.3.1.
        """
        if not message.response or handshake.state is not HandshakeState.AWAIT_LINK:
            return
        if not (
            self.is_link_of(handshake, message)
            and message.no_eyecatcher & NO_EYECATCHER
        ):
            # The client has gone on already: a Decline would reach its application.
            text = "CONFIRM LINK's answer names another queue pair or eye catchers"
            error = RemoteProtocolError(text, section="RFC 7609 section A.3.1")
            self.fail(handshake, error, now)
            return
        self.link_confirmed(handshake, now)

    def begin_add_link(self, handshake: Handshake) -> None:
        """Version 2.0: ADD LINK always follows, even with a single port."""
        link = handshake.link
        assert link is not None
        self.flows(link).add_link(link)

    def add_link_received(self, handshake: Handshake, message: llc.AddLink) -> None:
        """The client answered ADD LINK; there is no second port in any case."""
        link = handshake.link
        assert link is not None
        if not message.response or handshake.state is not HandshakeState.AWAIT_ADD_LINK:
            return
        if not message.rejected:
            self.flows(link).delete_link(link, message.link_number)
        self.add_link_over(handshake)

    # First contacts in turn

    def ended(self, handshake: Handshake, now: float) -> None:
        """Whoever waited for this first contact may go on."""
        if handshake.proposed is None or handshake.offer is None:
            return
        key = self._key(handshake)
        if not self._first_contacts.leave(handshake, key):
            return
        if handshake.state is HandshakeState.ESTABLISHED:
            for partner in self._first_contacts.take_partners(key):
                self._decide(partner, now)
        while following := self._first_contacts.take_next(key.peer_key, now):
            self._decide(following, now)

    def check(self) -> None:
        """Check that nobody waits for, or behind, a handshake that is over.

        Raises:
            AssertionError: Somebody does; a fault of ours.
        """
        self._first_contacts.check()


def _choose(
    offers: Sequence[FabricOffer], eids: tuple[str, ...]
) -> tuple[FabricOffer | None, str]:
    """Take the client's first EID that is ours too; it selects the device."""
    for eid in eids:
        for offer in offers:
            if eid in offer.eids:
                return offer, offer.eids[offer.eids.index(eid)]
    return None, ""


def _no_device(absent: Mapping[str, Reason], eids: tuple[str, ...]) -> Reason:
    """Say why none of the client's EIDs selects a device."""
    for eid in eids:
        if eid in absent:
            return absent[eid]
    text = f"The client offered {', '.join(eids) or 'none'}."
    code = None if eids else PeerDiagnosis.NO_UEID
    return reason("NO_COMMON_EID", "local", text, code=code)


def _kept(
    proposal: clc.Proposal, v2: clc_v2.ProposalExtension, offer: FabricOffer
) -> Proposed:
    """Keep what will be needed; the GID of a peer of this host is often our own."""
    return Proposed(
        peer_id=proposal.peer_id,
        gid=offer.gid if v2.gid == offer.gid else v2.gid,
        mac=proposal.mac,
        release=v2.release,
        max_connections=v2.max_connections,
        max_links=v2.max_links,
    )
