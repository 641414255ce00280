"""How a connection ends: two small tables, and one that names their joint state.

Each end closes its own side once: it may first say that it has finished writing (D,
"done writing"), and then that it has closed (C) or given up (A, "abnormal close"). The
two sides do not restrict each other, so each is a machine of its own and the same
table serves both: it cannot treat the peer more kindly than us. The RFC's figure 22
names the joint states; `JOINT` is that figure, with Linux's state numbers behind it.

A connection's buffers are given back only when both ends have sent C or A (`ENDED`).
After C or A a side sends nothing more. Flags accumulate: D, then C, gives 0xC0.

Reference: RFC 7609 sections 4.8.1 (figure 22) and 4.8.2; kernel counterpart:
smc_close.c.
"""

from __future__ import annotations

from enum import Enum

from pysmc.core.machine import Table

__all__ = ["ENDED", "JOINT", "SIDE", "CloseInput", "Side"]


class Side(Enum):
    """How far one end has closed."""

    OPEN = "open"
    DONE = "done"  # said D: no more bytes will come from this end
    CLOSED = "closed"  # said C
    ABORTED = "aborted"  # said A, or the link to it is lost


class CloseInput(Enum):
    """What one end says about its side."""

    DONE = "done"
    CLOSED = "closed"
    ABORTED = "aborted"


SIDE = Table(
    "close",
    {
        (Side.OPEN, CloseInput.DONE): Side.DONE,
        (Side.OPEN, CloseInput.CLOSED): Side.CLOSED,
        (Side.OPEN, CloseInput.ABORTED): Side.ABORTED,
        (Side.DONE, CloseInput.CLOSED): Side.CLOSED,
        (Side.DONE, CloseInput.ABORTED): Side.ABORTED,
    },
    # Every update carries the whole state, so each of these is said again and again;
    # and what is said after the end no longer matters.
    ignored={
        (Side.DONE, CloseInput.DONE),
        (Side.CLOSED, CloseInput.DONE),
        (Side.CLOSED, CloseInput.CLOSED),
        (Side.CLOSED, CloseInput.ABORTED),
        (Side.ABORTED, CloseInput.DONE),
        (Side.ABORTED, CloseInput.CLOSED),
        (Side.ABORTED, CloseInput.ABORTED),
    },
)

ENDED = frozenset({Side.CLOSED, Side.ABORTED})
"""A side in one of these says nothing more."""

JOINT: dict[tuple[Side, Side], str] = {
    (Side.OPEN, Side.OPEN): "ACTIVE",
    (Side.OPEN, Side.DONE): "APPCLOSEWAIT1",
    (Side.OPEN, Side.CLOSED): "APPCLOSEWAIT1",
    (Side.OPEN, Side.ABORTED): "PROCESSABORT",
    (Side.DONE, Side.OPEN): "PEERCLOSEWAIT1",
    (Side.DONE, Side.DONE): "PEERCLOSEWAIT2",
    (Side.DONE, Side.CLOSED): "APPFINCLOSEWAIT",
    (Side.DONE, Side.ABORTED): "PROCESSABORT",
    (Side.CLOSED, Side.OPEN): "PEERCLOSEWAIT1",
    (Side.CLOSED, Side.DONE): "PEERFINCLOSEWAIT",
    (Side.CLOSED, Side.CLOSED): "CLOSED",
    (Side.CLOSED, Side.ABORTED): "CLOSED",
    (Side.ABORTED, Side.OPEN): "PEERABORTWAIT",
    (Side.ABORTED, Side.DONE): "PEERABORTWAIT",
    (Side.ABORTED, Side.CLOSED): "CLOSED",
    (Side.ABORTED, Side.ABORTED): "CLOSED",
}
"""(our side, the peer's side) to the RFC's name of the joint state."""
