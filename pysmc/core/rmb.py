"""Our RMBs and the peer's RTokens: which memory is in whose hands.

An `Rmb` is memory of ours that the peer may write; one connection uses it at a time, as
in Linux, and a peer with several RMBEs in one RMB is understood too. The pool decides
when memory may be given to the next connection: only after both ends have closed or
aborted the last one, because until then the peer may still write into it. It does not
know queue pairs or flows.

Reference: RFC 7609 sections 4.4.2, 4.5 and A.3.4; kernel counterpart: smc_core.c.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup

__all__ = ["RToken", "Rmb", "RmbPool", "RmbState"]

RTOKENS_MAX = 255
"""RTokens a group keeps for its peer (Linux: SMC_RMBS_PER_LGR_MAX)."""


class RToken(NamedTuple):
    """What a writer needs to reach an RMB over one link."""

    rkey: int
    """32 bits."""
    virtual_address: int
    """64 bits: where the RMB begins."""


class RmbState(Enum):
    """How far the peer knows an RMB."""

    REGISTERING = "registering"  # the fabric was asked for the memory
    REGISTERED = "registered"  # ours; the peer has no RToken for it
    CONFIRMING = "confirming"  # CONFIRM RKEY is on its way
    CONFIRMED = "confirmed"  # the peer has its RToken
    DELETING = "deleting"  # DELETE RKEY was sent
    GONE = "gone"  # deregistered


class Rmb:
    """One piece of our memory.

    Args:
        group: Whose peer may write it.
        length: Bytes, a power of two from 16 KiB.
    """

    __slots__ = (
        "dirty_bytes",
        "group",
        "handle",
        "handshake",
        "length",
        "state",
        "tokens",
    )

    def __init__(self, group: LinkGroup, length: int) -> None:
        self.group = group
        self.length = length
        # How many bytes from the beginning the last connection has received.
        self.dirty_bytes = 0
        self.handle: Any = None
        # Who waits until it can be used.
        self.handshake: Handshake | None = None
        self.state = RmbState.REGISTERING
        # One RToken a link: a kernel peer's RMB has a different rkey on every link, so
        # ours may too.
        self.tokens: dict[Link, RToken] = {}

    def __repr__(self) -> str:
        return f"<Rmb {self.length} {self.state.value}>"


class RmbPool:
    """The idle RMBs of one link group, by length.

    Args:
        limit: Most RMBs that stay confirmed while nobody uses them.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: list[Rmb] = []

    def __len__(self) -> int:
        return len(self._idle)

    def __iter__(self) -> Iterator[Rmb]:
        return iter(self._idle)

    def take(self, length: int) -> Rmb | None:
        """Take an idle RMB of exactly this length, the most recently used one."""
        for index in range(len(self._idle) - 1, -1, -1):
            if self._idle[index].length == length:
                return self._idle.pop(index)
        return None

    def give(self, rmb: Rmb) -> Rmb | None:
        """Give an RMB back; both ends have finished with it.

        Returns:
            The RMB that has to go because the pool is full, or None.
        """
        self._idle.append(rmb)
        if len(self._idle) > self._limit:
            return self._idle.pop(0)
        return None

    def clear(self) -> None:
        """Forget every RMB: the group's memory is gone as a whole."""
        self._idle.clear()


class RTokenTable:
    """The peer's RMBs, as it announced them on one link.

    A connection of a reused group may only name an RMB that stands here: the peer ID in
    a Proposal is a claim, and whoever else claims it must not lead our writes.

    Reference: RFC 7609 section 4.5; kernel counterpart: smc_rtoken_add().
    """

    def __init__(self) -> None:
        self._addresses: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def add(self, token: RToken) -> bool:
        """Remember an RToken; False when the table is full."""
        if token.rkey not in self._addresses and len(self) >= RTOKENS_MAX:
            return False
        self._addresses[token.rkey] = token.virtual_address
        return True

    def remove(self, rkey: int) -> bool:
        """Forget an RToken; False when it was not known."""
        return self._addresses.pop(rkey, None) is not None

    def knows(self, token: RToken) -> bool:
        """Tell whether the peer announced exactly this RToken."""
        return self._addresses.get(token.rkey) == token.virtual_address
