"""The CLC handshake: one object for a TCP connection's way to SMC-R or back to TCP.

A `Handshake` is private until it is over: the application never sees a connection that
may still change what carries it. It ends in exactly one of three ways: ESTABLISHED,
FELL_BACK (both ends go on with TCP, where nothing but CLC bytes were read) or FAILED
(the TCP stream cannot be trusted, it has to be closed). The tables of both roles stand
here; `client` and `server` carry out what follows from a row.

On first contact a Decline may still come while the first link is confirmed (the *late
Decline*), so a reader stays on TCP until HANDOVER, the one place where the driver looks
at TCP a last time. Two late Declines must never cross, or each end would read the
other's as application data. No wait is long enough for that, because TCP may hold up
what was sent in time. So after the Accept only the client declines. The server waits
for the client's answer to CONFIRM LINK or its Decline, and fails when neither comes.

Linux declines as a server too: when no answer to CONFIRM LINK came within 2 s it looks
for a Decline for 1 s, then sends DELETE LINK, for which it takes up to 2 s if the link
is dead. A client therefore declines in the first 2 s or after 7 s, and takes the
server's Decline at any time; when its own answer left late it waits for that.

Reference: RFC 7609 sections 3.5.1 and 3.5.2; kernel counterparts: smc_clc.c, af_smc.c.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pysmc.core.clc_stream import ClcStream
from pysmc.core.machine import Table
from pysmc.core.roles import Role

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from pysmc.core.connection import Connection
    from pysmc.core.context import FabricOffer
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup
    from pysmc.core.rmb import Rmb
    from pysmc.reasons import Reason
    from smcproto import clc

__all__ = [
    "CLIENT",
    "LOOKING_AT_TCP",
    "NOTHING_ABSENT",
    "SERVER",
    "Handshake",
    "HandshakeInput",
    "HandshakeState",
    "Proposed",
]


class HandshakeState(Enum):
    """Where a handshake stands."""

    AWAIT_PROPOSAL = "awaiting the Proposal"  # server
    QUEUED = "behind another first contact with the same peer"  # server
    AWAIT_ACCEPT = "awaiting the Accept"  # client
    PREPARING = "preparing queue pair and memory"
    AWAIT_CONFIRM = "awaiting the Confirm"  # server
    AWAIT_LINK = "awaiting CONFIRM LINK"
    AWAIT_ADD_LINK = "awaiting ADD LINK"  # version 2.0
    AWAIT_DECLINE = "awaiting a late Decline"
    HANDOVER = "looking at TCP for the last time"
    LATE = "awaiting a Decline of a server that had no answer in time"  # client
    ESTABLISHED = "established"
    FELL_BACK = "fell back to TCP"
    FAILED = "failed"


class HandshakeInput(Enum):
    """What moves a handshake."""

    PROPOSAL = "Proposal"
    BUSY = "first contact in progress"  # with the same peer
    ACCEPT = "Accept"
    CONFIRM_FIRST = "Confirm of first contact"
    CONFIRM_REUSE = "Confirm of a reused link"
    READY = "queue pair and memory ready"
    READY_REUSE = "memory ready on a reused link"
    LINK_CONFIRMED = "link confirmed"
    LINK_CONFIRMED_V20 = "link confirmed, version 2.0"
    ADD_LINK_DONE = "ADD LINK over"
    LINK_FAILED = "link lost, or no CONFIRM LINK in time"
    QUIET = "nothing on TCP"
    LATE = "the answer to CONFIRM LINK left late"
    DECLINED = "Decline received"
    UNABLE = "we decline"
    BROKEN = "stream broken or time over"


_S, _I = HandshakeState, HandshakeInput

OVER = frozenset({_S.ESTABLISHED, _S.FELL_BACK, _S.FAILED})
"""Nothing follows these."""

LOOKING_AT_TCP = frozenset({_S.AWAIT_DECLINE, _S.HANDOVER, _S.LATE})
"""In these the driver may be asked whether a Decline is there."""

_TOO_LATE = frozenset(
    {
        # The link is lost a second time, or after the wait for it.
        (_S.AWAIT_DECLINE, _I.LINK_FAILED),
        # What ends a handshake twice, from two sides at once.
        *((over, happened) for over in OVER for happened in _I),
    }
)

CLIENT = Table(
    "client handshake",
    {
        (_S.AWAIT_ACCEPT, _I.ACCEPT): _S.PREPARING,
        (_S.AWAIT_ACCEPT, _I.DECLINED): _S.FELL_BACK,
        (_S.AWAIT_ACCEPT, _I.UNABLE): _S.FELL_BACK,
        (_S.AWAIT_ACCEPT, _I.BROKEN): _S.FAILED,
        (_S.PREPARING, _I.READY): _S.AWAIT_LINK,
        (_S.PREPARING, _I.READY_REUSE): _S.ESTABLISHED,
        (_S.PREPARING, _I.UNABLE): _S.FELL_BACK,
        (_S.PREPARING, _I.BROKEN): _S.FAILED,
        (_S.AWAIT_LINK, _I.LINK_CONFIRMED): _S.HANDOVER,
        (_S.AWAIT_LINK, _I.LINK_CONFIRMED_V20): _S.AWAIT_ADD_LINK,
        (_S.AWAIT_LINK, _I.LINK_FAILED): _S.AWAIT_DECLINE,
        (_S.AWAIT_LINK, _I.DECLINED): _S.FELL_BACK,
        (_S.AWAIT_LINK, _I.BROKEN): _S.FAILED,
        (_S.AWAIT_DECLINE, _I.DECLINED): _S.FELL_BACK,
        (_S.AWAIT_DECLINE, _I.UNABLE): _S.FELL_BACK,
        (_S.AWAIT_DECLINE, _I.BROKEN): _S.FAILED,
        (_S.AWAIT_ADD_LINK, _I.ADD_LINK_DONE): _S.HANDOVER,
        (_S.AWAIT_ADD_LINK, _I.DECLINED): _S.FELL_BACK,
        (_S.AWAIT_ADD_LINK, _I.BROKEN): _S.FAILED,
        (_S.HANDOVER, _I.QUIET): _S.ESTABLISHED,
        (_S.HANDOVER, _I.LATE): _S.LATE,
        (_S.HANDOVER, _I.DECLINED): _S.FELL_BACK,
        (_S.HANDOVER, _I.BROKEN): _S.FAILED,
        (_S.LATE, _I.QUIET): _S.ESTABLISHED,
        (_S.LATE, _I.DECLINED): _S.FELL_BACK,
        (_S.LATE, _I.BROKEN): _S.FAILED,
    },
    ignored=_TOO_LATE,
)

SERVER = Table(
    "server handshake",
    {
        (_S.AWAIT_PROPOSAL, _I.PROPOSAL): _S.PREPARING,
        (_S.AWAIT_PROPOSAL, _I.BUSY): _S.QUEUED,
        (_S.AWAIT_PROPOSAL, _I.DECLINED): _S.FELL_BACK,
        (_S.AWAIT_PROPOSAL, _I.UNABLE): _S.FELL_BACK,
        (_S.AWAIT_PROPOSAL, _I.BROKEN): _S.FAILED,
        (_S.QUEUED, _I.PROPOSAL): _S.PREPARING,
        (_S.QUEUED, _I.BUSY): _S.QUEUED,
        (_S.QUEUED, _I.UNABLE): _S.FELL_BACK,
        (_S.QUEUED, _I.BROKEN): _S.FAILED,
        (_S.PREPARING, _I.READY): _S.AWAIT_CONFIRM,
        (_S.PREPARING, _I.READY_REUSE): _S.AWAIT_CONFIRM,
        (_S.PREPARING, _I.UNABLE): _S.FELL_BACK,
        (_S.PREPARING, _I.BROKEN): _S.FAILED,
        (_S.AWAIT_CONFIRM, _I.CONFIRM_FIRST): _S.AWAIT_LINK,
        (_S.AWAIT_CONFIRM, _I.CONFIRM_REUSE): _S.ESTABLISHED,
        (_S.AWAIT_CONFIRM, _I.DECLINED): _S.FELL_BACK,
        (_S.AWAIT_CONFIRM, _I.BROKEN): _S.FAILED,
        (_S.AWAIT_LINK, _I.LINK_CONFIRMED): _S.HANDOVER,
        (_S.AWAIT_LINK, _I.LINK_CONFIRMED_V20): _S.AWAIT_ADD_LINK,
        (_S.AWAIT_LINK, _I.LINK_FAILED): _S.AWAIT_DECLINE,
        (_S.AWAIT_LINK, _I.DECLINED): _S.FELL_BACK,
        (_S.AWAIT_LINK, _I.BROKEN): _S.FAILED,
        (_S.AWAIT_DECLINE, _I.DECLINED): _S.FELL_BACK,
        (_S.AWAIT_DECLINE, _I.BROKEN): _S.FAILED,
        (_S.AWAIT_ADD_LINK, _I.ADD_LINK_DONE): _S.HANDOVER,
        (_S.AWAIT_ADD_LINK, _I.DECLINED): _S.FELL_BACK,
        (_S.AWAIT_ADD_LINK, _I.BROKEN): _S.FAILED,
        (_S.HANDOVER, _I.QUIET): _S.ESTABLISHED,
        (_S.HANDOVER, _I.DECLINED): _S.FELL_BACK,
        (_S.HANDOVER, _I.BROKEN): _S.FAILED,
    },
    ignored=_TOO_LATE,
)

_READING = frozenset(
    {
        _S.AWAIT_PROPOSAL,
        _S.AWAIT_ACCEPT,
        _S.AWAIT_CONFIRM,
        _S.AWAIT_LINK,
        _S.AWAIT_ADD_LINK,
        _S.AWAIT_DECLINE,
        _S.HANDOVER,
        _S.LATE,
    }
)


NOTHING_ABSENT: Final[Mapping[str, Reason]] = {}
"""Every device of ours fits the connection."""


class Proposed(NamedTuple):
    """What is kept of a Proposal: whoever stalls behind it costs little."""

    peer_id: bytes
    """8 bytes."""
    gid: bytes
    """16 bytes."""
    mac: bytes
    """6 bytes; may be zero."""
    release: int
    """0 for version 2.0, 1 for 2.1."""
    max_connections: int
    max_links: int


class Handshake:
    """One TCP connection on its way.

    Args:
        role: Which end of it we are.
        peer_key: Who is at the other end of it.
        ends_at: When the whole handshake has to be over, in seconds of the caller's
            clock.
        offers: The devices that this connection may use, in order of preference.
        absent: Why a device is not among them, by the EIDs that would select it.
    """

    __slots__ = (
        "__weakref__",
        "absent",
        "accept",
        "answer_by",
        "confirmed_at",
        "connection",
        "due_at",
        "eid",
        "ends_at",
        "first_contact",
        "group",
        "handle",
        "link",
        "offer",
        "offers",
        "peer_key",
        "problem",
        "proposed",
        "refusal",
        "rmb",
        "role",
        "state",
        "stream",
        "version",
    )

    def __init__(
        self,
        role: Role,
        peer_key: Hashable,
        ends_at: float,
        offers: Sequence[FabricOffer] = (),
        absent: Mapping[str, Reason] = NOTHING_ABSENT,
    ) -> None:
        self.role = role
        self.peer_key = peer_key
        self.ends_at = ends_at
        self.handle: Any = None
        self.state = _S.AWAIT_ACCEPT if role is Role.CLIENT else _S.AWAIT_PROPOSAL
        self.stream = ClcStream()
        self.first_contact = False
        # CLC version of our Decline: what the peer has shown that it can read.
        self.version = 2
        # When the present state has lasted long enough.
        self.due_at = ends_at
        # When the server has to have answered the Proposal.
        self.answer_by = ends_at
        # When the Confirm of first contact was sent, or received.
        self.confirmed_at = 0.0
        # Why the first link cannot be used, once that is known.
        self.problem: Reason | None = None
        # What a server answers the Proposal with, when it cannot be SMC-R.
        self.refusal: Reason | None = None
        self.proposed: Proposed | None = None
        self.accept: clc.Accept | None = None
        # The devices that fit this connection, in order of preference.
        self.offers = offers
        # EIDs that would select a device of ours, which this connection cannot have.
        self.absent = absent
        self.offer: FabricOffer | None = None
        self.eid = ""
        self.group: LinkGroup | None = None
        self.link: Link | None = None
        self.rmb: Rmb | None = None
        self.connection: Connection | None = None

    def __repr__(self) -> str:
        return f"<Handshake {self.role.value} {self.state.value}>"

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state in OVER

    @property
    def wanted(self) -> int:
        """Bytes that may be taken from TCP now; 0: leave TCP alone."""
        return self.stream.wanted if self.state in _READING else 0

    def move(self, happened: HandshakeInput) -> bool:
        """Follow the role's table.

        Returns:
            True when the state changed.
        """
        table = CLIENT if self.role is Role.CLIENT else SERVER
        before = self.state
        self.state = table.after(before, happened)
        return self.state is not before
