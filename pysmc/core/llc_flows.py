"""LLC flows of one link group: a request, its answer, and how long to wait for it.

`LlcFlows` decides which request goes out when, answers the peer's, and tells its
listener how a flow ended. It does not know handshakes or sockets. Our own RKEY flows go
one after another, because a kernel peer remembers just one postponed event and drops
the rest; TEST LINK goes at any time; both directions may overlap.

Reference: RFC 7609 sections 3.5.5, 4.4 and A.3; kernel counterpart: smc_llc.c.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pysmc.core.actions import PostSend
from pysmc.core.rate import Rate
from pysmc.core.rmb import Rmb, RmbState, RToken
from pysmc.core.roles import Role
from smcproto import llc
from smcproto.constants import DeleteLinkReason
from smcproto.errors import DecodeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pysmc.core.context import Context
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup

__all__ = ["FlowListener", "LlcFlows"]

LLC_VERSION = 2
"""A group is entirely v1 or entirely v2; version 1 groups are not built yet."""

Request = llc.ConfirmRkey | llc.DeleteRkey


class FlowListener(Protocol):
    """Who wants to know how flows end: the endpoint."""

    def confirm_link_received(
        self, link: Link, message: llc.ConfirmLink, now: float
    ) -> None:
        """CONFIRM LINK came, a request or a response."""

    def add_link_received(self, link: Link, message: llc.AddLink) -> None:
        """ADD LINK came: a request that we have refused, or a response."""

    def rkey_confirmed(self, rmb: Rmb, now: float, *, accepted: bool) -> None:
        """The peer answered CONFIRM RKEY, or did not in time (not accepted)."""

    def rkey_deleted(self, rmb: Rmb) -> None:
        """DELETE RKEY was answered, or its time is over: the memory is free."""

    def rkeys_withdrawn(self, group: LinkGroup, rkeys: Sequence[int]) -> None:
        """The peer's DELETE RKEY came: nobody may write there any more."""

    def link_unanswered(self, link: Link, now: float) -> None:
        """TEST LINK was not answered."""

    def delete_link_received(
        self, link: Link, message: llc.DeleteLink, now: float
    ) -> None:
        """The peer gives up the link or the group (a request)."""


@dataclass(slots=True, eq=False)
class _Flow:
    """One request of ours that is waiting for its turn or its answer."""

    link: Link
    request: Request
    rmb: Rmb


class LlcFlows:
    """The flows of one group.

    Args:
        group: Whose flows.
        context: Orders and deadlines go there.
        listener: Is told how flows end.
    """

    def __init__(
        self, group: LinkGroup, context: Context, listener: FlowListener
    ) -> None:
        self._group = group
        self._context = context
        self._listener = listener
        self._waiting: deque[_Flow] = deque()
        self._current: _Flow | None = None
        self._testing: dict[Link, float] = {}
        self._rates: dict[Link, Rate] = {}

    # Requests of ours

    def confirm_link(self, link: Link, *, response: bool) -> None:
        """Send CONFIRM LINK, the request (server) or the response (client)."""
        message = llc.ConfirmLink(
            version=LLC_VERSION,
            response=response,
            mac=link.local.mac,
            gid=link.local.gid,
            qp_number=link.local.qp_number,
            link_number=link.number,
            link_user_id=link.user_id,
            max_links=self._group.max_links,
            max_connections=self._group.max_connections if self._group.release else 0,
        )
        self._send(link, message)

    def add_link(self, link: Link) -> None:
        """Offer a further link, as a version 2.0 server always has to.

        There is no other port to offer, so a peer of one port will refuse.

        Reference: RFC 7609 section 3.5.5.1; wire order of first contact, step 7.
        """
        message = llc.AddLink(
            version=LLC_VERSION,
            response=False,
            mac=link.local.mac,
            gid=link.local.gid,
            qp_number=link.local.qp_number,
            link_number=link.number + 1,
            mtu_code=link.local.mtu_code,
            psn=link.local.psn,
            client_target_gid=link.local.gid,
        )
        self._send(link, message)

    def confirm_rkey(self, link: Link, rmb: Rmb, now: float) -> None:
        """Announce an RMB to the peer; ends with `FlowListener.rkey_confirmed`."""
        token = rmb.tokens[link]
        message = llc.ConfirmRkey(
            version=LLC_VERSION,
            response=False,
            rkey=token.rkey,
            virtual_address=token.virtual_address,
        )
        self._enqueue(_Flow(link, message, rmb), now)

    def delete_rkey(self, link: Link, rmb: Rmb, now: float) -> None:
        """Withdraw an RMB from the peer; ends with `FlowListener.rkey_deleted`."""
        rmb.state = RmbState.DELETING
        message = llc.DeleteRkey(
            version=LLC_VERSION, response=False, rkeys=(rmb.tokens[link].rkey,)
        )
        self._enqueue(_Flow(link, message, rmb), now)

    def delete_group(self, link: Link, *, orderly: bool = True, reason: int) -> None:
        """Tell the peer that the whole group ends; no answer is awaited."""
        message = llc.DeleteLink(
            version=LLC_VERSION,
            response=False,
            whole_group=True,
            orderly=orderly,
            link_number=0,
            reason=reason,
        )
        self._send(link, message)

    def delete_link(self, link: Link, number: int) -> None:
        """Withdraw one link that was never used."""
        message = llc.DeleteLink(
            version=LLC_VERSION,
            response=False,
            whole_group=False,
            orderly=False,
            link_number=number,
            reason=DeleteLinkReason.LOST_PATH,
        )
        self._send(link, message)

    def answer_delete_link(self, link: Link, message: llc.DeleteLink) -> None:
        """Answer a server's DELETE LINK of one link.

        Reference: RFC 7609 section 3.5.5.2 and A.3.4.
        """
        known = message.link_number == link.number
        answer = llc.DeleteLink(
            version=LLC_VERSION,
            response=True,
            link_number=message.link_number,
            reason=DeleteLinkReason.OK if known else DeleteLinkReason.UNKNOWN_LINK,
            orderly=message.orderly,
        )
        self._send(link, answer)

    def test_link(self, link: Link, now: float) -> None:
        """Ask the peer for a sign of life; silence ends with `link_unanswered`."""
        self._testing[link] = now
        self._send(
            link,
            llc.TestLink(version=LLC_VERSION, response=False, user_data=bytes(16)),
        )
        wait = self._context.config.test_link_wait
        self._context.timers.set(("test answer", link), now + wait)

    def test_link_due(self, link: Link, now: float) -> None:
        """Judge the link when the wait for TEST LINK's answer is over."""
        asked = self._testing.pop(link, None)
        # Anything that arrived since is a sign of life as good as the answer.
        if asked is not None and link.last_received <= asked:
            self._listener.link_unanswered(link, now)

    def answer_due(self, now: float) -> None:
        """Give up the current request; its time is over."""
        assert self._current is not None, "nobody waits for an answer"
        self._finish(self._current, accepted=False, now=now)

    def end(self, now: float) -> None:
        """The group ends: whoever waits for an answer gets none."""
        self._context.timers.cancel(("llc", self._group))
        for link in self._group.links:
            self._context.timers.cancel(("test answer", link))
        self._testing.clear()
        flows = [self._current, *self._waiting]
        self._current = None
        self._waiting.clear()
        for flow in flows:
            if flow is not None:
                self._report(flow, accepted=False, now=now)

    # What the peer sends

    def receive(self, link: Link, payload: bytes, now: float) -> None:
        """Take one LLC message.

        A message that cannot be read is dropped, as Linux does: a newer peer may know
        types that we do not.
        """
        link.last_received = now
        try:
            message = llc.parse(payload)
        except DecodeError:
            return
        if message.response:
            self._receive_response(link, message, now)
        elif self._is_within_rate(link, now):
            self._receive_request(link, message, now)

    def _is_within_rate(self, link: Link, now: float) -> bool:
        """Whether a request of the peer may be looked at; else it is dropped.

        Each makes us work and answer, and none is kept for later. An honest peer asks
        for two of its connections at most, and each of those takes a handshake.
        """
        limit = self._context.config.max_llc_requests_per_second
        rate = self._rates.get(link)
        if rate is None:
            rate = self._rates[link] = Rate(limit)
        if rate.take(now):
            return True
        self._context.count_excess("max_llc_requests_per_second", limit)
        return False

    def _receive_request(self, link: Link, message: llc.LlcMessage, now: float) -> None:
        match message:
            case llc.ConfirmLink():
                self._listener.confirm_link_received(link, message, now)
            case llc.AddLink():
                self._refuse_add_link(link, message)
            case llc.DeleteLink():
                self._listener.delete_link_received(link, message, now)
            case llc.ConfirmRkey():
                self._answer_confirm_rkey(link, message)
            case llc.DeleteRkey():
                self._answer_delete_rkey(link, message)
            case llc.TestLink():
                self._send(
                    link,
                    llc.TestLink(
                        version=LLC_VERSION, response=True, user_data=message.user_data
                    ),
                )
            case llc.RequestAddLink():
                self._send(link, llc.RequestAddLink(version=LLC_VERSION, response=True))
            case _:
                # Continuations belong to groups of version 1 or of several links.
                return

    def _receive_response(
        self, link: Link, message: llc.LlcMessage, now: float
    ) -> None:
        match message:
            case llc.ConfirmLink():
                self._listener.confirm_link_received(link, message, now)
            case llc.AddLink():
                self._listener.add_link_received(link, message)
            case llc.ConfirmRkey():
                flow = self._current
                if (
                    flow is not None
                    and isinstance(flow.request, llc.ConfirmRkey)
                    and flow.request.rkey == message.rkey
                ):
                    self._finish(flow, accepted=not message.refused, now=now)
            case llc.DeleteRkey():
                flow = self._current
                if flow is not None and isinstance(flow.request, llc.DeleteRkey):
                    # Linux answers with its keys zeroed, so only the type can match.
                    self._finish(flow, accepted=not message.refused, now=now)
            case llc.TestLink():
                self._testing.pop(link, None)
                self._context.timers.cancel(("test answer", link))
            case _:
                # An answer to nothing that we asked.
                return

    def _refuse_add_link(self, link: Link, message: llc.AddLink) -> None:
        if self._group.role is Role.CLIENT:
            answer = llc.AddLink(
                version=LLC_VERSION,
                response=True,
                rejected=True,
                mac=message.mac,
                gid=message.gid,
                qp_number=message.qp_number,
                link_number=message.link_number,
                mtu_code=message.mtu_code,
                psn=message.psn,
            )
            self._send(link, answer)
        self._listener.add_link_received(link, message)

    def _answer_confirm_rkey(self, link: Link, message: llc.ConfirmRkey) -> None:
        token = RToken(message.rkey, message.virtual_address)
        kept = not message.other_links and self._group.rtokens.add(token)
        self._send(
            link,
            llc.ConfirmRkey(
                version=LLC_VERSION,
                response=True,
                refused=not kept,
                retry=not kept,
                rkey=message.rkey,
                virtual_address=message.virtual_address,
                other_links=message.other_links,
            ),
        )

    def _answer_delete_rkey(self, link: Link, message: llc.DeleteRkey) -> None:
        unknown = [
            rkey for rkey in message.rkeys if not self._group.rtokens.remove(rkey)
        ]
        self._listener.rkeys_withdrawn(self._group, message.rkeys)
        self._send(
            link,
            llc.DeleteRkey(
                version=LLC_VERSION,
                response=True,
                refused=bool(unknown),
                invalid_count=len(unknown),
                rkeys=tuple(unknown) if unknown else message.rkeys,
            ),
        )

    # The queue of our own requests

    def _send(self, link: Link, message: llc.LlcMessage) -> None:
        self._context.actions.append(PostSend(link, message.build()))

    def _enqueue(self, flow: _Flow, now: float) -> None:
        self._waiting.append(flow)
        if self._current is None:
            self._start_next(now)

    def _start_next(self, now: float) -> None:
        if not self._waiting:
            self._context.timers.cancel(("llc", self._group))
            return
        self._current = self._waiting.popleft()
        self._send(self._current.link, self._current.request)
        wait = self._context.config.llc_wait
        self._context.timers.set(("llc", self._group), now + wait)

    def _finish(self, flow: _Flow, *, accepted: bool, now: float) -> None:
        self._current = None
        self._start_next(now)
        self._report(flow, accepted=accepted, now=now)

    def _report(self, flow: _Flow, *, accepted: bool, now: float) -> None:
        if isinstance(flow.request, llc.ConfirmRkey):
            self._listener.rkey_confirmed(flow.rmb, now, accepted=accepted)
        else:
            self._listener.rkey_deleted(flow.rmb)
