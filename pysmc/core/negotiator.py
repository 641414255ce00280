"""What both roles' handshakes have in common: deadlines, Declines, endings.

`Negotiator` moves a handshake through its table and gives back what it held when it
ends. What the messages say belongs to `client` and `server`.

Reference: RFC 7609 section 3.5.1.6 (Decline), A.2.5; kernel counterpart: af_smc.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysmc.core.actions import CheckTcp, PublishUpdate, SendClc
from pysmc.core.connection import Connection
from pysmc.core.events import Established, Failed, FellBack
from pysmc.core.handshake import Handshake, HandshakeInput, HandshakeState
from pysmc.core.link import LinkState
from pysmc.core.rmb import RmbState
from pysmc.core.roles import Role
from pysmc.errors import (
    ConnectionReset,
    HandshakeTimeout,
    RemoteProtocolError,
    SmcError,
)
from pysmc.reasons import Reason, reason
from smcproto import clc
from smcproto.constants import DeleteLinkReason, OsType, rmbe_bytes
from smcproto.diagnosis import PeerDiagnosis, describe

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from pysmc.core.context import Context
    from pysmc.core.keeper import Keeper
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup
    from pysmc.core.llc_flows import LlcFlows
    from smcproto import llc

__all__ = ["Negotiator", "reason_of_status"]

NO_EYECATCHER = 0x03
"""CONFIRM LINK: our RMBEs have no eye catcher; Linux wants at least one bit."""
NO_DEVICE_CODES = 0x0303
"""Upper half of the Decline codes that say that there is no device."""

_STATUS_REASONS = {
    "foreign user": "FOREIGN_USER",
    "unreachable": "NO_DEVICE",
    "no route": "ROUTE",
    "no memory": "NO_MEMORY",
}
_SHORTAGES = {"EMFILE": "LIMIT", "ENFILE": "LIMIT", "RLIMIT_MEMLOCK": "MEMLOCK"}
"""What a fabric names when something else than memory ran out."""


def reason_of_status(status: str, detail: str) -> Reason:
    """Translate how a fabric operation ended into a reason.

    Args:
        status: Value of the fabric's status.
        detail: The fabric's sentence; names the errno or the limit where one is known.
    """
    name = _STATUS_REASONS.get(status, "LINK_FAILED")
    if name == "NO_MEMORY":
        short = (why for word, why in _SHORTAGES.items() if word in detail)
        name = next(short, name)
    return reason(name, "local", f"{status}: {detail}." if detail else f"{status}.")


class Negotiator:
    """The part of a handshake that both roles share.

    Args:
        context: Orders, news and deadlines go there.
        keeper: Groups and memory come from there.
    """

    def __init__(self, context: Context, keeper: Keeper) -> None:
        self._context = context
        self._keeper = keeper
        self._config = context.config

    def start(self, handshake: Handshake, seconds: float, now: float) -> Handshake:
        """Count a new handshake and give it its first deadline."""
        self._context.handshakes.add(handshake)
        self.wait(handshake, seconds, now)
        return handshake

    def use_link(self, handshake: Handshake, link: Link) -> None:
        """Let the handshake take a place on a link's group."""
        handshake.group, handshake.link = link.group, link
        if handshake.first_contact:
            link.handshake = handshake
        self._keeper.join(link.group)

    def take_memory(self, handshake: Handshake, now: float) -> None:
        """Find memory for the connection; goes on with `memory_ready`."""
        group = handshake.group
        assert group is not None
        rmb = self._keeper.take_rmb(group)
        if rmb is None:
            self.decline(handshake, self.over_limit(self._keeper.short_of(group)), now)
            return
        handshake.rmb = rmb
        rmb.handshake = handshake
        if rmb.state is RmbState.CONFIRMED:
            self.memory_ready(handshake, now)

    def memory_ready(self, handshake: Handshake, now: float) -> None:
        """The memory can be used: do this role's next step."""
        raise NotImplementedError

    # Limits

    def over_limit(self, name: str) -> Reason:
        """Count one that goes beyond a limit of the configuration, and say so."""
        limit = getattr(self._config, name)
        self._context.count_excess(name, limit)
        return reason("LIMIT", "local", f"{name} is {limit}.")

    def group_problem(
        self, role: Role, peer_id: bytes, peer_key: Hashable
    ) -> Reason | None:
        """Say why no further link group can be made with a peer, if so."""
        groups = self._keeper.groups
        if len(groups) >= self._config.max_link_groups:
            return self.over_limit("max_link_groups")
        if groups.count(role, peer_id, peer_key) >= (
            self._config.max_link_groups_per_peer
        ):
            return self.over_limit("max_link_groups_per_peer")
        return None

    # Deadlines

    def wait(self, handshake: Handshake, seconds: float, now: float) -> None:
        """Give the present state its deadline, within that of the whole handshake."""
        self._set_deadline(handshake, min(now + seconds, handshake.ends_at))

    def await_link(self, handshake: Handshake, now: float) -> None:
        """The Confirm is through: CONFIRM LINK has its time, whatever went before.

        The deadline of the whole handshake counts no longer, because it would bring
        the two ends' Declines together.
        """
        handshake.confirmed_at = now
        self._set_deadline(handshake, now + self.link_wait)

    @property
    def link_wait(self) -> float:
        """Seconds that this role waits for CONFIRM LINK."""
        raise NotImplementedError

    def _set_deadline(self, handshake: Handshake, when: float) -> None:
        handshake.due_at = when
        self._context.timers.set(("handshake", handshake), when)

    def time_over(self, handshake: Handshake, now: float) -> None:
        """The present state's deadline has come."""
        state = HandshakeState
        match handshake.state:
            case state.PREPARING | state.QUEUED:
                text = "Preparing the link took too long."
                self.decline(handshake, reason("LINK_FAILED", "local", text), now)
            case state.AWAIT_LINK:
                self.link_failed(handshake, reason("LINK_FAILED", "local"))
            case state.AWAIT_DECLINE:
                self.decline_wait_over(handshake, now)
            case state.AWAIT_ADD_LINK:
                # Linux goes on with one link, and so do we. Half a Decline may be
                # there, whose rest never comes.
                self._set_deadline(handshake, now + self._config.decline_wait)
                self.add_link_over(handshake)
            case state.LATE if handshake.stream.is_empty:
                self._set_deadline(handshake, now + self._config.decline_wait)
                self._context.actions.append(CheckTcp(handshake))
            case _:
                message = (
                    f"{handshake.role.value} handshake: peer was silent for too long"
                    f" while {handshake.state.value}; it said that it speaks SMC"
                )
                self.fail(handshake, HandshakeTimeout(message), now)

    # Messages

    def send(self, handshake: Handshake, message: clc.ClcMessage) -> None:
        """Order a CLC message to be sent."""
        self._context.actions.append(SendClc(handshake, message.build()))

    def decline(
        self,
        handshake: Handshake,
        why: Reason,
        now: float,
        *,
        out_of_sync: bool = False,
    ) -> None:
        """Say Decline and fall back.

        Reference: RFC 7609 section 3.5.1.6. Version 2 of the message has 44 bytes.
        """
        if not handshake.stream.is_empty:
            # The rest of what the peer has begun would be read by the application.
            text = f"peer's CLC message broke off while {handshake.state.value}"
            error = RemoteProtocolError(text, section="RFC 7609 section 3.5.1")
            self.fail(handshake, error, now)
            return
        self.send(
            handshake,
            clc.Decline(
                version=handshake.version,
                out_of_sync=out_of_sync,
                peer_id=self._context.identity.peer_id,
                diagnosis=why.code or PeerDiagnosis.INTERNAL,
                os_type=OsType.LINUX if handshake.version > 1 else 0,
            ),
        )
        handshake.move(HandshakeInput.UNABLE)
        self._fall_back(handshake, why, now)

    def declined(self, handshake: Handshake, message: clc.Decline, now: float) -> None:
        """The peer said Decline: fall back; nothing is answered."""
        code = message.diagnosis
        words = describe(code)
        detail = f"Its code is {code:08x} ({words.name}): {words.meaning}"
        why = reason("PEER_DECLINED", "peer", detail, peer_code=code)
        problem = handshake.problem
        if problem is not None and problem.name != "LINK_FAILED":
            # What we found out ourselves explains more than a Decline that follows.
            why = problem
        elif handshake.absent and code >> 16 == NO_DEVICE_CODES:
            # The server found no device for the EIDs that we could offer. It is ours
            # that are missing: the others would have been offered as well.
            why = next(iter(handshake.absent.values()))
        sync_lost = (
            message.out_of_sync
            and handshake.role is Role.SERVER
            and handshake.state is HandshakeState.AWAIT_CONFIRM
            and not handshake.first_contact
        )
        group = handshake.group
        handshake.move(HandshakeInput.DECLINED)
        self._fall_back(handshake, why, now)
        if sync_lost and group is not None and not group.is_ended:
            self._doubt(group, now)

    def _doubt(self, group: LinkGroup, now: float) -> None:
        """A peer says that it no longer has a group: ask on the link itself.

        Linux ends the group at once. But whoever knows a peer's ID can say so over TCP,
        while a peer that has really lost the group has closed its queue pair too.
        """
        group.is_closed_to_new = True
        link = group.active_link
        assert link is not None, "a reused group has a link until it ends"
        self.flows(link).test_link(link, now)

    def wrong_message(
        self, handshake: Handshake, message: clc.ClcMessage, now: float
    ) -> None:
        """A CLC message came that has no place here: the stream cannot be trusted."""
        text = f"peer sent {type(message).__name__} while {handshake.state.value}"
        error = RemoteProtocolError(text, section="RFC 7609 section 3.5.1")
        self.fail(handshake, error, now)

    # The link of first contact

    def link_confirmed(self, handshake: Handshake, now: float) -> None:
        """CONFIRM LINK went both ways."""
        link, group, rmb = handshake.link, handshake.group, handshake.rmb
        assert link is not None
        assert group is not None
        assert rmb is not None
        needs_add_link = not group.release
        happened = (
            HandshakeInput.LINK_CONFIRMED_V20
            if needs_add_link
            else HandshakeInput.LINK_CONFIRMED
        )
        handshake.move(happened)
        self._keeper.activate(link, now)
        rmb.state = RmbState.CONFIRMED
        if needs_add_link:
            self.wait(handshake, self._config.llc_wait, now)
            self.begin_add_link(handshake)
        else:
            self._context.actions.append(CheckTcp(handshake))

    def begin_add_link(self, handshake: Handshake) -> None:
        """Version 2.0: do this role's part of ADD LINK."""
        raise NotImplementedError

    def add_link_over(self, handshake: Handshake) -> None:
        """ADD LINK was answered, or did not come."""
        handshake.move(HandshakeInput.ADD_LINK_DONE)
        self._context.actions.append(CheckTcp(handshake))

    def link_lost(self, handshake: Handshake, why: Reason, now: float) -> None:
        """The queue pair failed while the first link was being made."""
        state = HandshakeState
        match handshake.state:
            case state.PREPARING:
                self.decline(handshake, why, now)
            case state.AWAIT_CONFIRM:
                # A Decline takes the place of a message of ours, and now it is the
                # client's turn: what it says will be answered.
                handshake.problem = why
            case state.AWAIT_LINK | state.AWAIT_DECLINE:
                self.link_failed(handshake, why)
            case state.LATE:
                # A server that has given up closes its queue pair before it declines.
                handshake.problem = why
            case _:
                # CONFIRM LINK is through, so a Decline is no longer allowed.
                self._fail_link(handshake, why, now)

    def tcp_quiet(self, handshake: Handshake, now: float) -> None:
        """No Decline is there where one would have to be: hand the connection out."""
        if handshake.problem is not None:
            self._fail_link(handshake, handshake.problem, now)
        else:
            handshake.move(HandshakeInput.QUIET)
            self.establish(handshake, now)

    def _fail_link(self, handshake: Handshake, why: Reason, now: float) -> None:
        text = f"the first link failed while {handshake.state.value}: {why.text}"
        error = ConnectionReset(text, diagnosis=why.code or 0)
        self.fail(handshake, error, now)

    def link_failed(self, handshake: Handshake, why: Reason) -> None:
        """There will be no link: wait for the Decline that says so to both."""
        if not handshake.move(HandshakeInput.LINK_FAILED):
            return
        handshake.problem = why
        self._set_deadline(handshake, handshake.confirmed_at + self.decline_due)

    @property
    def decline_due(self) -> float:
        """Seconds after the Confirm at which this role's wait for a Decline ends."""
        raise NotImplementedError

    def decline_wait_over(self, handshake: Handshake, now: float) -> None:
        """No late Decline came: do what this role does then."""
        raise NotImplementedError

    # Endings

    def establish(self, handshake: Handshake, now: float) -> None:
        """It runs over SMC-R: hand the connection out, once and for good."""
        connection = handshake.connection
        assert connection is not None
        connection.is_established = True
        self._over(handshake)
        if connection.update_due:
            # Something that the peer published before is to be answered.
            self._context.actions.append(PublishUpdate(connection))
        self._context.events.append(Established(handshake, connection))
        self.ended(handshake, now)

    def fail(self, handshake: Handshake, error: SmcError, now: float) -> None:
        """The TCP stream cannot be trusted: the connection is lost."""
        handshake.move(HandshakeInput.BROKEN)
        self._over(handshake)
        self._context.events.append(Failed(handshake, error))
        self.release(handshake, now, clean=False)
        self.ended(handshake, now)

    def abandon(self, handshake: Handshake, now: float) -> None:
        """The driver gave up: give everything back, without news. Idempotent."""
        if not handshake.move(HandshakeInput.BROKEN):
            return
        self._over(handshake)
        self.release(handshake, now, clean=False)
        self.ended(handshake, now)

    def ended(self, handshake: Handshake, now: float) -> None:
        """A handshake has ended and holds nothing any more; roles may add to it."""

    def release(self, handshake: Handshake, now: float, *, clean: bool) -> None:
        """Give back group, memory and connection of a handshake that came to nothing.

        Args:
            handshake: Which one; it keeps nothing afterwards.
            now: The time in seconds.
            clean: True when the peer has certainly not begun to write.
        """
        group, rmb = handshake.group, handshake.rmb
        connection = handshake.connection
        handshake.group = handshake.rmb = handshake.connection = None
        if group is None:
            return
        if handshake.first_contact:
            # Its link may be confirmed, and in use at the other end.
            self._keeper.end_group(
                group,
                now,
                error=ConnectionReset("the first contact of this link group failed"),
                tell=DeleteLinkReason.PROGRAM,
            )
        elif connection is not None:
            self._keeper.remove_connection(connection, now, clean=clean)
        else:
            if rmb is not None:
                self._keeper.give_rmb(rmb, now, clean=clean)
            self._keeper.leave(group, now)

    def _fall_back(self, handshake: Handshake, why: Reason, now: float) -> None:
        self._over(handshake)
        self._context.events.append(FellBack(handshake, why))
        self.release(handshake, now, clean=True)
        self.ended(handshake, now)

    def _over(self, handshake: Handshake) -> None:
        self._context.handshakes.discard(handshake)
        self._context.timers.cancel(("handshake", handshake))
        if handshake.link is not None and handshake.link.handshake is handshake:
            handshake.link.handshake = None
        if handshake.rmb is not None:
            handshake.rmb.handshake = None

    # Small things

    def flows(self, link: Link) -> LlcFlows:
        """The LLC flows of a link's group."""
        return self._keeper.flows[link.group]

    def make_connection(self, handshake: Handshake) -> Connection:
        """Make the connection and publish it: updates may come from now on."""
        link, group, rmb = handshake.link, handshake.group, handshake.rmb
        assert link is not None
        assert group is not None
        assert rmb is not None
        connection = Connection(
            role=handshake.role,
            group=group,
            link=link,
            rmb=rmb,
            alert_token=self._new_token(group.connections),
            sndbuf_bytes=self._config.sndbuf_bytes,
            tuning=self._context.tuning,
        )
        handshake.connection = connection
        self._keeper.add_connection(connection)
        return connection

    def _new_token(self, taken: Iterable[int]) -> int:
        known = set(taken)
        while (token := self._context.tokens.alert_token()) in known:
            pass
        return token

    def is_link_of(self, handshake: Handshake, message: llc.ConfirmLink) -> bool:
        """Whether CONFIRM LINK names the queue pair that CLC named."""
        link = handshake.link
        return (
            link is not None
            and link.remote is not None
            and link.remote.qp_number == message.qp_number
            and link.state is LinkState.ACTIVATING
        )


def peer_element(message: clc.Accept | clc.Confirm) -> int:
    """Tell the size of the peer's RMBE in bytes."""
    return rmbe_bytes(message.rmbe_size_code)


def element_address(message: clc.Accept | clc.Confirm) -> int:
    """Tell where the peer's RMBE begins: elements are counted from 1."""
    return message.virtual_address + peer_element(message) * (message.rmbe_index - 1)
