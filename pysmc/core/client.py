"""The client's half of the CLC handshake: Proposal, Accept, Confirm.

`ClientNegotiator` decides what to propose, whether an Accept can be followed, and when
the Confirm goes out. On first contact it has to propose the very port that it will use,
because a server builds its address vector from the Proposal.

Reference: RFC 7609 sections 3.5.1.3 to 3.5.1.5 and 3.5.2; wire order of first contact
in 3.5.5.1; kernel counterpart: smc_connect_rdma().
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysmc.core.actions import CheckTcp, ConnectQueuePair
from pysmc.core.handshake import Handshake, HandshakeInput, HandshakeState
from pysmc.core.link import LinkEnd, LinkInput
from pysmc.core.negotiator import (
    NO_EYECATCHER,
    Negotiator,
    element_address,
    peer_element,
)
from pysmc.core.rmb import RToken
from pysmc.core.roles import Role
from pysmc.reasons import Reason, reason
from smcproto import clc, clc_v2
from smcproto.constants import OsType, PathType, rmbe_size_code
from smcproto.diagnosis import PeerDiagnosis

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from pysmc.core.context import FabricOffer
    from pysmc.core.link import Link
    from smcproto import llc

__all__ = ["ClientNegotiator"]

EMPTY_GID = bytes(16)
MTU_CODES = range(1, 6)


class ClientNegotiator(Negotiator):
    """Handshakes of connections that this process opened."""

    def begin(
        self,
        peer_key: Hashable,
        now: float,
        refusal: Reason | None,
        offers: Sequence[FabricOffer] | None,
        absent: Mapping[str, Reason],
    ) -> Handshake:
        """Start a handshake: the Proposal goes out, or a Decline in its place.

        Args:
            peer_key: Who is at the other end of TCP.
            now: The time in seconds.
            refusal: Why it cannot be SMC-R, when that is certain already.
            offers: The devices that fit this connection; None is those of all.
            absent: Why others do not fit, by the EIDs that would select them: that is
                the reason when the server has none for those that were offered.
        """
        ends_at = now + self._config.handshake_wait
        offers = self._context.offers if offers is None else offers
        handshake = Handshake(Role.CLIENT, peer_key, ends_at, offers, absent)
        if refusal is not None:
            self.start(handshake, self._config.accept_wait, now)
            self.decline(handshake, refusal, now)
            return handshake
        self.send(handshake, self._proposal(offers))
        return self.start(handshake, self._config.accept_wait, now)

    def _proposal(self, offers: Sequence[FabricOffer]) -> clc.Proposal:
        identity = self._context.identity
        eids = tuple(dict.fromkeys(eid for offer in offers for eid in offer.eids))
        # The GID and MAC are those of a real port where there is one; the endpoint of
        # the shared-memory fabric follows from the peer ID.
        port = next((o for o in offers if o.fabric != "shm"), offers[0])
        release = self._config.release
        return clc.Proposal(
            version=2,
            peer_id=identity.peer_id,
            gid=EMPTY_GID,
            mac=port.mac,
            typev1=PathType.NONE,
            typev2=PathType.SMCR,
            ip_area=None,
            v2=clc_v2.ProposalExtension(
                eids=eids,
                release=release,
                gid=port.gid,
                max_connections=self._config.max_connections if release else 0,
                max_links=self._config.max_links if release else 0,
            ),
        )

    def receive(
        self, handshake: Handshake, message: clc.ClcMessage, now: float
    ) -> None:
        """Take a CLC message of the server."""
        if isinstance(message, clc.Decline):
            self.declined(handshake, message, now)
        elif (
            isinstance(message, clc.Accept)
            and handshake.state is HandshakeState.AWAIT_ACCEPT
        ):
            self._receive_accept(handshake, message, now)
        elif (
            isinstance(message, clc.SmcdAccept)
            and handshake.state is HandshakeState.AWAIT_ACCEPT
        ):
            text = "The server chose SMC-D, which was not offered."
            handshake.version = message.version
            self.decline(handshake, reason("MODE", "local", text), now)
        else:
            self.wrong_message(handshake, message, now)

    def _receive_accept(
        self, handshake: Handshake, accept: clc.Accept, now: float
    ) -> None:
        handshake.version = accept.version
        offer, problem = self._judge(handshake, accept)
        if problem is None and accept.first_contact:
            problem = self.group_problem(
                Role.CLIENT, accept.peer_id, handshake.peer_key
            )
        if problem is not None or offer is None:
            assert problem is not None
            self.decline(handshake, problem, now)
            return
        handshake.offer = offer
        handshake.first_contact = accept.first_contact
        if accept.first_contact:
            self._open_group(handshake, accept, offer)
        elif not self._find_link(handshake, accept, now):
            return
        handshake.move(HandshakeInput.ACCEPT)
        self.wait(handshake, 2 * self._config.llc_wait, now)
        # Kept until the Confirm is sent: where the server's element is.
        handshake.accept = accept
        if not accept.first_contact:
            self.take_memory(handshake, now)

    def _judge(
        self, handshake: Handshake, accept: clc.Accept
    ) -> tuple[FabricOffer | None, Reason | None]:
        """Decide whether we can follow; gives the device, or why not."""
        if accept.version != 2 or accept.v2 is None:
            text = f"The server answered in version {accept.version}."
            return None, reason("VERSION", "local", text)
        eid = accept.v2.eid
        offer = next((o for o in handshake.offers if eid in o.eids), None)
        if offer is None:
            text = f"The server chose {eid!r}, which was not offered."
            return None, reason("NO_COMMON_EID", "local", text)
        if accept.mtu_code not in MTU_CODES:
            text = f"The server's MTU code {accept.mtu_code} has no meaning."
            return None, reason("INTERNAL", "local", text)
        first = accept.v2.first_contact
        if first is not None and not self._limits_fit(first):
            text = (
                f"The server chose release {first.release}, {first.max_connections}"
                f" connections and {first.max_links} links."
            )
            return None, reason("RELEASE", "local", text)
        return offer, None

    def _limits_fit(self, first: clc_v2.FirstContactExtension) -> bool:
        config = self._config
        if first.release > config.release:
            return False
        return first.release == 0 or (
            16 <= first.max_connections <= config.max_connections
            and 1 <= first.max_links <= config.max_links
        )

    def _open_group(
        self, handshake: Handshake, accept: clc.Accept, offer: FabricOffer
    ) -> None:
        assert accept.v2 is not None
        first = accept.v2.first_contact
        assert first is not None, "the decoder ties the flag to the extension"
        limited = first.release > 0
        link = self._keeper.open_group(
            role=Role.CLIENT,
            peer_id=accept.peer_id,
            peer_key=handshake.peer_key,
            offer=offer,
            eid=accept.v2.eid,
            release=first.release,
            max_connections=first.max_connections if limited else 255,
            max_links=first.max_links if limited else 1,
        )
        link.remote = LinkEnd(
            peer_id=accept.peer_id,
            gid=accept.gid,
            mac=accept.mac,
            qp_number=accept.qp_number,
            psn=accept.psn,
            mtu_code=min(accept.mtu_code, offer.mtu_code),
        )
        self.use_link(handshake, link)

    def _find_link(self, handshake: Handshake, accept: clc.Accept, now: float) -> bool:
        """Find the link that the server wants to reuse; False when we declined.

        Reference: RFC 7609 section 3.5.2.2; the S flag is sent nowhere else.
        """
        assert handshake.offer is not None
        group, link = self._keeper.groups.link_of_accept(
            peer_id=accept.peer_id,
            gid=accept.gid,
            qp_number=accept.qp_number,
            device=handshake.offer.device,
        )
        if group is None:
            why = reason("OUT_OF_SYNC", "local")
            self.decline(handshake, why, now, out_of_sync=True)
            return False
        problem = ""
        if link is None:
            problem = "The server named a link that was never announced."
        elif not group.rtokens.knows(RToken(accept.rkey, accept.virtual_address)):
            problem = "The server named an RMB that was never announced."
        elif group.is_in_use(accept.rkey, element_address(accept)):
            problem = "The server named an RMBE that another connection is using."
        if problem or link is None:
            code = PeerDiagnosis.UNKNOWN_LINK if link is None else None
            why = reason("OUT_OF_SYNC", "local", problem, code=code)
            self.decline(handshake, why, now)
            return False
        self.use_link(handshake, link)
        return True

    def pair_created(self, handshake: Handshake, now: float) -> None:
        """First contact: the queue pair is there; now the memory."""
        self.take_memory(handshake, now)

    def memory_ready(self, handshake: Handshake, now: float) -> None:
        """The memory is there, and on a reused group the peer knows it."""
        link = handshake.link
        assert link is not None
        if handshake.first_contact:
            assert link.remote is not None
            link.move(LinkInput.CONNECT)
            self._context.actions.append(
                ConnectQueuePair(link, link.remote, passive=False)
            )
        elif not self._is_known(handshake):
            # A write to what was withdrawn would break the link, and all that use it.
            text = "The server withdrew its RMB before the Confirm."
            self.decline(handshake, reason("OUT_OF_SYNC", "local", text), now)
        else:
            self._send_confirm(handshake)
            handshake.move(HandshakeInput.READY_REUSE)
            self.establish(handshake, now)

    def _is_known(self, handshake: Handshake) -> bool:
        """Whether the server's RMB, announced on a reused link, still stands."""
        accept, group = handshake.accept, handshake.group
        assert accept is not None
        assert group is not None
        return group.rtokens.knows(RToken(accept.rkey, accept.virtual_address))

    def pair_connecting(self, handshake: Handshake, now: float) -> None:
        """First contact: our queue pair may receive, so the server may know it."""
        if handshake.state is HandshakeState.PREPARING:
            self._send_confirm(handshake)
            handshake.move(HandshakeInput.READY)
            self.await_link(handshake, now)

    @property
    def link_wait(self) -> float:
        """Seconds that a client waits for CONFIRM LINK."""
        return self._config.confirm_link_client_wait

    @property
    def decline_due(self) -> float:
        """Seconds after the Confirm at which we decline: no server does so later.

        A kernel's server whose link is dead sends DELETE LINK first, and waits
        `llc_wait` for its completion.
        """
        config = self._config
        return config.confirm_link_client_wait + config.decline_wait + config.llc_wait

    def link_failed(self, handshake: Handshake, why: Reason) -> None:
        """There will be no link; in the first seconds we decline at once."""
        super().link_failed(handshake, why)
        # A Decline of the server, sent before it closed its queue pair, comes first.
        self._context.actions.append(CheckTcp(handshake))

    def tcp_quiet(self, handshake: Handshake, now: float) -> None:
        """TCP is quiet: decline if the link failed, before a kernel's server would.

        Else the connection is handed out, unless that server may have given up: it
        waits for our answer, then one `decline_wait`, and then up to one `llc_wait`.
        Only now is it certain that the answer has left. In version 2.0 ADD LINK was
        awaited.
        """
        state, config, group = HandshakeState, self._config, handshake.group
        assert group is not None
        is_early = now < handshake.confirmed_at + config.confirm_link_server_wait
        if handshake.state is state.AWAIT_DECLINE:
            if is_early:
                self.decline_wait_over(handshake, now)
        elif handshake.state is state.HANDOVER and group.release and not is_early:
            handshake.move(HandshakeInput.LATE)
            self._set_deadline(handshake, now + config.decline_wait + config.llc_wait)
        else:
            super().tcp_quiet(handshake, now)

    def decline_wait_over(self, handshake: Handshake, now: float) -> None:
        """Decline: a server of ours never does so any more, and Linux did before."""
        assert handshake.problem is not None
        self.decline(handshake, handshake.problem, now)

    def _send_confirm(self, handshake: Handshake) -> None:
        accept, link, rmb = handshake.accept, handshake.link, handshake.rmb
        assert accept is not None
        assert accept.v2 is not None
        assert link is not None
        assert rmb is not None
        connection = self.make_connection(handshake)
        connection.attach_peer(
            token=RToken(accept.rkey, accept.virtual_address),
            alert_token=accept.alert_token,
            rmbe_bytes=peer_element(accept),
            rmbe_index=accept.rmbe_index,
        )
        if handshake.first_contact:
            link.group.rtokens.add(RToken(accept.rkey, accept.virtual_address))
        token = rmb.tokens[link]
        self.send(
            handshake,
            clc.Confirm(
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
                mtu_code=min(accept.mtu_code, link.local.mtu_code),
                virtual_address=token.virtual_address,
                psn=link.local.psn,
                v2=self._confirm_extension(accept.v2, link),
            ),
        )

    def _confirm_extension(
        self, accept: clc_v2.AcceptExtension, link: Link
    ) -> clc_v2.ConfirmExtension:
        first = accept.first_contact
        if first is None:
            return clc_v2.ConfirmExtension(eid=accept.eid, first_contact=None)
        return clc_v2.ConfirmExtension(
            eid=accept.eid,
            first_contact=clc_v2.FirstContactExtension(
                direct=first.direct,
                os_type=OsType.LINUX,
                release=first.release,
                host_name=self._context.identity.host_name,
                max_connections=first.max_connections,
                max_links=first.max_links,
            ),
            gids=(link.local.gid,),
        )

    def confirm_link_received(
        self, handshake: Handshake, message: llc.ConfirmLink, now: float
    ) -> None:
        """CONFIRM LINK request: answer it, and the link is ours.

        Reference: RFC 7609 section 3.5.5.1 and A.3.1.
        """
        if message.response or handshake.state is not HandshakeState.AWAIT_LINK:
            return
        link = handshake.link
        assert link is not None
        if not self.is_link_of(handshake, message):
            text = "CONFIRM LINK names another queue pair than the Accept."
            self.link_failed(handshake, reason("LINK_FAILED", "local", text))
            return
        if not message.no_eyecatcher & NO_EYECATCHER:
            text = "The server keeps eye catchers in its RMBEs."
            why = reason("INTERNAL", "local", text, code=PeerDiagnosis.RMBE_EYECATCHER)
            self.link_failed(handshake, why)
            return
        link.number = message.link_number
        self.flows(link).confirm_link(link, response=True)
        self.link_confirmed(handshake, now)

    def begin_add_link(self, handshake: Handshake) -> None:
        """Version 2.0: the server will ask; `add_link_received` refuses."""

    def add_link_received(self, handshake: Handshake, message: llc.AddLink) -> None:
        """ADD LINK of the server was refused by the flows; first contact goes on."""
        if not message.response and handshake.state is HandshakeState.AWAIT_ADD_LINK:
            self.add_link_over(handshake)
