"""One link: a queue pair between two ports, and how far its set-up has come.

The states are those of the RFC's link (section 2.2.2): the queue pair is made
(INACTIVE), connected and being confirmed (ACTIVATING), usable (ACTIVE), and gone
(DOWN, ours). A link that went down never comes back; another one takes its place.

Reference: RFC 7609 sections 2.2.2 and 3.5.5; kernel counterpart: smc_llc.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from pysmc.core.machine import Table

if TYPE_CHECKING:
    from pysmc.core.handshake import Handshake
    from pysmc.core.link_group import LinkGroup

__all__ = ["LINK", "Link", "LinkEnd", "LinkInput", "LinkState"]


class LinkState(Enum):
    """How far a link's set-up has come."""

    INACTIVE = "inactive"  # the queue pair is not connected
    ACTIVATING = "activating"  # connecting, or CONFIRM LINK is awaited
    ACTIVE = "active"  # confirmed by both ends
    DOWN = "down"  # the queue pair is gone


class LinkInput(Enum):
    """What moves a link."""

    CONNECT = "connect"  # both ends' queue pair numbers are known
    CONFIRMED = "confirmed"  # CONFIRM LINK went both ways
    LOST = "lost"  # it failed, was deleted or was given up


LINK = Table(
    "link",
    {
        (LinkState.INACTIVE, LinkInput.CONNECT): LinkState.ACTIVATING,
        (LinkState.ACTIVATING, LinkInput.CONFIRMED): LinkState.ACTIVE,
        (LinkState.INACTIVE, LinkInput.LOST): LinkState.DOWN,
        (LinkState.ACTIVATING, LinkInput.LOST): LinkState.DOWN,
        (LinkState.ACTIVE, LinkInput.LOST): LinkState.DOWN,
    },
    ignored={
        # CONFIRM LINK sent twice, and what still arrives for a link that is gone.
        (LinkState.ACTIVE, LinkInput.CONFIRMED),
        (LinkState.DOWN, LinkInput.CONFIRMED),
        (LinkState.DOWN, LinkInput.LOST),
        (LinkState.DOWN, LinkInput.CONNECT),
    },
)


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """One end of a link, as CLC messages name it."""

    peer_id: bytes
    """8 bytes."""
    gid: bytes
    """16 bytes."""
    mac: bytes
    """6 bytes."""
    qp_number: int
    """24 bits; 0 while the queue pair is not made."""
    psn: int
    """24 bits: the first packet sequence number that this end sends."""
    mtu_code: int
    """1-5 for 256-4096 bytes."""


class Link:
    """One link of a link group.

    Args:
        group: The group it belongs to.
        number: Link number, 8 bits, assigned by the server; 0 while it is unknown.
        local: Our end.
    """

    __slots__ = (
        "__weakref__",
        "group",
        "handle",
        "handshake",
        "is_suspect",
        "last_received",
        "local",
        "number",
        "open_posts",
        "remote",
        "state",
        "user_id",
    )

    def __init__(
        self, group: LinkGroup, number: int, local: LinkEnd, user_id: int
    ) -> None:
        self.group = group
        self.number = number
        self.local = local
        self.remote: LinkEnd | None = None
        self.user_id = user_id
        self.handle: Any = None
        # The first contact that makes it, until that is over.
        self.handshake: Handshake | None = None
        self.state = LinkState.INACTIVE
        self.last_received = 0.0
        # What was posted and had not completed at the last look, by alert token; and
        # whether something had been open for the whole time between two looks.
        self.open_posts: dict[int, tuple[int, int]] = {}
        self.is_suspect = False

    def __repr__(self) -> str:
        return f"<Link {self.group.number}.{self.number} {self.state.value}>"

    @property
    def is_active(self) -> bool:
        """Whether connections may use it."""
        return self.state is LinkState.ACTIVE

    def move(self, happened: LinkInput) -> LinkState:
        """Follow the table; gives the state before."""
        before = self.state
        self.state = LINK.after(before, happened)
        return before
