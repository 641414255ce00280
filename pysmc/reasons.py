"""Why a connection is not on SMC-R: one table of names, codes, sentences and advice.

The table decides the words; it knows nothing of sockets or messages. The codes are the
Decline codes that Linux uses; the RFC leaves their values to the implementation.

Source: RFC 7609 section 3.5.1.6 and A.2.4 (Decline); kernel counterpart: smc_clc.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["REASONS", "Reason", "ReasonText", "Side", "reason"]

Side = Literal["local", "peer"]


@dataclass(frozen=True, slots=True)
class ReasonText:
    """One row of the table: what a reason's name means and what to do about it."""

    name: str
    """Name in capitals, the key that programs compare with."""
    code: int | None
    """Decline code (32 bits) that goes on the wire, None when nothing is sent."""
    sentence: str
    """What happened, as one sentence."""
    advice: str
    """What to do, as one sentence."""


_ROWS = (
    ReasonText(
        "NOT_MARKED",
        None,
        "The socket was connected or listening before pysmc saw it.",
        "Let the pysmc loop connect or listen, or use pysmc.open_connection().",
    ),
    ReasonText(
        "DISABLED",
        None,
        "No fabric or no discovery is enabled by the configuration.",
        "Set PYSMC_FABRICS and PYSMC_DISCOVERY (for example shm and local).",
    ),
    ReasonText(
        "SETUP_MISSING",
        None,
        "No way of discovery works here.",
        "Enable one that does, 'tcp_option' for every peer ('pysmc option attach'),"
        " 'local' on this host or 'static' for listed peers; 'pysmc doctor' tries"
        " them.",
    ),
    ReasonText(
        "PEER_NO_SMC",
        0x03010000,
        "The peer did not show that it speaks SMC.",
        "Run the peer on pysmc, or on a kernel with AF_SMC.",
    ),
    ReasonText(
        "MARK_LOST",
        0x03010000,
        "What showed SMC was lost on the way, or another listener took the connection.",
        "Look for SYN cookies, a redirect, a middlebox that takes TCP options away, or"
        " a listener on a more specific address.",
    ),
    ReasonText(
        "NO_DEVICE",
        0x03030000,
        "There is no usable device or GID.",
        "Run 'pysmc doctor' on the side named: it says what is missing.",
    ),
    ReasonText(
        "NO_COMMON_EID",
        0x03030000,
        "The two ends share no EID.",
        "Give both the same UEID, or run both in one host and network namespace.",
    ),
    ReasonText(
        "FOREIGN_USER",
        0x03030000,
        "The peer on this host belongs to a user who is not allowed.",
        "Add the user to PYSMC_ALLOWED_UIDS on both ends if it is trusted.",
    ),
    ReasonText(
        "MODE",
        0x03040000,
        "The peer offers SMC, but not SMC-R.",
        "Enable SMC-R on the peer.",
    ),
    ReasonText(
        "VERSION",
        0x030C0000,
        "The two ends share no SMC version.",
        "Update the older end; pysmc speaks SMC-R 2.0 and 2.1.",
    ),
    ReasonText(
        "RELEASE",
        0x03030009,
        "The two ends do not agree on the release or its limits.",
        "Compare release, max_connections and max_links of both ends.",
    ),
    ReasonText(
        "SUBNET",
        0x03070000,
        "The two ends are not in the same IP subnet.",
        "Use SMC-R version 2, which is routable, or put both into one subnet.",
    ),
    ReasonText(
        "VLAN",
        0x03080000,
        "The VLAN of the TCP connection has no RoCE device.",
        "Configure the VLAN on the RoCE device too.",
    ),
    ReasonText(
        "ROUTE",
        0x030E0000,
        "There is no route between the RoCE devices.",
        "Check the routes of both ends: 'pysmc doctor --peer HOST'.",
    ),
    ReasonText(
        "NO_MEMORY",
        0x01010000,
        "Buffers could not be had.",
        "Free memory, raise the limit named, or use a smaller rmbe_bytes.",
    ),
    ReasonText(
        "MEMLOCK",
        0x01010000,
        "The limit of pinned memory is reached.",
        "Raise RLIMIT_MEMLOCK ('ulimit -l', LimitMEMLOCK= of a service);"
        " 'pysmc doctor' counts what fits.",
    ),
    ReasonText(
        "LIMIT",
        0x01010000,
        "A limit is reached.",
        "Raise the limit named, or close connections.",
    ),
    ReasonText(
        "IPSEC",
        0x03020000,
        "The connection is protected by IPsec, which RDMA would bypass.",
        "Nothing: this connection belongs on TCP.",
    ),
    ReasonText(
        "LINK_FAILED",
        0x02010000,
        "The first link was not confirmed in time.",
        "Check that the devices of both ends reach each other:"
        " 'pysmc doctor --peer HOST'.",
    ),
    ReasonText(
        "OUT_OF_SYNC",
        0x04000000,
        "The server reused a link that the client does not have.",
        "Nothing: the next connection makes a new link group.",
    ),
    ReasonText(
        "PEER_DECLINED",
        0x05000000,
        "The peer declined SMC-R.",
        "Look up the peer's own code.",
    ),
    ReasonText(
        "INTERNAL",
        0x09990000,
        "Something inside failed.",
        "Report it with the log.",
    ),
)

REASONS: dict[str, ReasonText] = {row.name: row for row in _ROWS}
"""Every reason by its name."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one connection is TCP and not SMC-R."""

    code: int | None
    """Decline code (32 bits), None when the reason never goes on the wire."""
    name: str
    """Key of `REASONS`."""
    side: Side
    """Which end the reason was found on, as this end knows it."""
    text: str
    """What happened and what to do, for people."""
    peer_code: int | None = None
    """The peer's own Decline code (32 bits) behind PEER_DECLINED."""

    def __str__(self) -> str:
        code = "" if self.code is None else f" {self.code:08x}"
        return f"{self.name}{code} ({self.side}): {self.text}"


def reason(
    name: str,
    side: Side,
    detail: str = "",
    *,
    code: int | None = None,
    peer_code: int | None = None,
) -> Reason:
    """Make a `Reason` from its row of the table.

    Args:
        name: Key of `REASONS`.
        side: The end on which it was found.
        detail: What exactly, put between the row's sentence and its advice.
        code: A more exact Decline code than the row's.
        peer_code: The peer's own code, for PEER_DECLINED.

    Raises:
        KeyError: There is no such name.
    """
    row = REASONS[name]
    words = [row.sentence, detail, row.advice]
    return Reason(
        code=row.code if code is None else code,
        name=name,
        side=side,
        text=" ".join(word for word in words if word),
        peer_code=peer_code,
    )
