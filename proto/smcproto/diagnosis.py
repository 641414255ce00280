"""Why a peer declined: every known diagnosis code with its meaning and advice.

Decides the words for the four bytes that a CLC Decline carries. The RFC leaves
the values to each implementation, so the codes are text for people: nothing but
the out-of-sync flag of the Decline itself may steer behaviour.

Source: RFC 7609 A.2.5; the values are those of Linux (net/smc/smc_clc.h,
``SMC_CLC_DECL_*``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class PeerDiagnosis(IntEnum):
    """Diagnosis codes of a CLC Decline. Kernel: smc_clc.h, ``SMC_CLC_DECL_*``."""

    NO_MEMORY = 0x01010000
    CONFIRM_LINK_TIMEOUT = 0x02010000
    ADD_LINK_TIMEOUT = 0x02020000
    CONFIGURATION = 0x03000000
    PEER_NO_SMC = 0x03010000
    IPSEC = 0x03020000
    NO_DEVICE = 0x03030000
    NO_SMCD_DEVICE = 0x03030001
    NO_SMCR_DEVICE = 0x03030002
    NO_ISMV2 = 0x03030003
    NO_V2_EXTENSION = 0x03030004
    NO_SMCD_V2_EXTENSION = 0x03030005
    NO_SEID = 0x03030006
    NO_SMCD_V2_DEVICE = 0x03030007
    NO_UEID = 0x03030008
    RELEASE_MISMATCH = 0x03030009
    MAX_CONNECTIONS = 0x0303000A
    MAX_LINKS = 0x0303000B
    MODE = 0x03040000
    RMBE_EYECATCHER = 0x03050000
    SOCKET_OPTION = 0x03060000
    SUBNET = 0x03070000
    VLAN = 0x03080000
    ISM_VLAN = 0x03090000
    NO_ACTIVE_LINK = 0x030A0000
    UNKNOWN_LINK = 0x030B0000
    VERSION = 0x030C0000
    DMB_LIMIT = 0x030D0000
    NO_ROUTE = 0x030E0000
    ROUTE_NOT_INDIRECT = 0x030F0000
    OUT_OF_SYNC = 0x04000000
    PEER_DECLINED = 0x05000000
    INTERNAL = 0x09990000
    RTOKEN = 0x09990001
    QUEUE_PAIR = 0x09990002
    REGISTRATION = 0x09990003


@dataclass(frozen=True, slots=True)
class DiagnosisText:
    """A diagnosis code in words."""

    code: int
    """The 32 bits of the Decline."""
    name: str
    """Name of the ``PeerDiagnosis`` member, or ``UNKNOWN``."""
    meaning: str
    """One sentence: what the sender of the Decline found."""
    advice: str
    """One sentence: what to look at or to change."""

    def __str__(self) -> str:
        return f"{self.name} ({self.code:08x}): {self.meaning} {self.advice}"


_D: Final = PeerDiagnosis

_TEXTS: Final[dict[int, tuple[str, str]]] = {
    _D.NO_MEMORY: (
        "The sender has no memory or no buffer left for this connection.",
        (
            "Raise its locked-memory limit, ask for smaller buffers, or close "
            "connections."
        ),
    ),
    _D.CONFIRM_LINK_TIMEOUT: (
        "The sender waited in vain for CONFIRM LINK on the new link.",
        (
            "Check that RDMA traffic (for RoCEv2: UDP port 4791) passes between the "
            "two devices."
        ),
    ),
    _D.ADD_LINK_TIMEOUT: (
        "The sender waited in vain for ADD LINK after the first link.",
        ("Check the path between the devices; the peer's log says why it was silent."),
    ),
    _D.CONFIGURATION: (
        "The sender's configuration gives it no usable IP prefix.",
        "Give its interface an address with a prefix that the peer shares.",
    ),
    _D.PEER_NO_SMC: (
        "The other end of the TCP connection did not signal SMC.",
        "Enable SMC there, and check that nothing on the path strips TCP options.",
    ),
    _D.IPSEC: (
        "The TCP connection is protected by IPsec, which SMC-R would bypass.",
        "Exempt the connection from IPsec, or stay with TCP.",
    ),
    _D.NO_DEVICE: (
        "The sender has no device that this connection could use.",
        (
            "Check there that an RDMA device is up on the connection's network, and "
            "that PNETIDs and UEIDs agree."
        ),
    ),
    _D.NO_SMCD_DEVICE: (
        "The sender has no SMC-D (ISM) device for this connection.",
        "Offer SMC-R as well, or give the sender an ISM device.",
    ),
    _D.NO_SMCR_DEVICE: (
        "The sender has no SMC-R (RoCE) device for this connection.",
        "Check there that an RDMA device is up on the connection's network.",
    ),
    _D.NO_ISMV2: (
        "The sender's system does not support version 2 of ISM.",
        "Offer SMC-Rv2 or version 1 instead.",
    ),
    _D.NO_V2_EXTENSION: (
        "The Proposal offers version 2 but has no version 2 extension.",
        "This is a fault of the proposing side: report it to its maintainer.",
    ),
    _D.NO_SMCD_V2_EXTENSION: (
        "The Proposal offers SMC-Dv2 but has no SMC-Dv2 extension.",
        "This is a fault of the proposing side: report it to its maintainer.",
    ),
    _D.NO_SEID: (
        "The Proposal offers SMC-Dv2 without a system EID.",
        "Enable the system EID on the proposing side, or use UEIDs.",
    ),
    _D.NO_SMCD_V2_DEVICE: (
        "The sender has no SMC-Dv2 device for this connection.",
        "Offer SMC-Rv2 as well, or give the sender an ISM device.",
    ),
    _D.NO_UEID: (
        "The Proposal offers SMC-Rv2 without a single UEID.",
        "Configure the same UEID on both hosts (Linux: smcd ueid add).",
    ),
    _D.RELEASE_MISMATCH: (
        "The Confirm names another release than the Accept.",
        "This is a fault of the client: report it to its maintainer.",
    ),
    _D.MAX_CONNECTIONS: (
        "The limits of connections for each link group do not agree.",
        "Set the limit to 16 or more on both sides.",
    ),
    _D.MAX_LINKS: (
        "The limits of links for each link group do not agree.",
        "Set the limit to 1 or 2 on both sides.",
    ),
    _D.MODE: (
        "The peer does not offer the kind of SMC that the sender wants.",
        "Enable the same kind, SMC-R, on both sides.",
    ),
    _D.RMBE_EYECATCHER: (
        "The peer keeps an eye catcher in its RMB elements, the sender does not.",
        "Set both no-eye-catcher bits in CONFIRM LINK, as Linux expects.",
    ),
    _D.SOCKET_OPTION: (
        "A socket option is set that SMC does not support (TCP fast open).",
        "Switch the option off for this socket.",
    ),
    _D.SUBNET: (
        "The two ends are in different IP subnets, which version 1 does not cross.",
        (
            "Use version 2 with a common UEID, or put both into one subnet with equal "
            "prefix lengths."
        ),
    ),
    _D.VLAN: (
        "The sender could not find the VLAN of the TCP connection.",
        "Check the VLAN set-up of its network interface.",
    ),
    _D.ISM_VLAN: (
        "The sender could not register the VLAN with its ISM device.",
        "Check the VLAN set-up of its ISM device.",
    ),
    _D.NO_ACTIVE_LINK: (
        "The link group to be reused has no active link.",
        "Try again: the next connection makes a new link group.",
    ),
    _D.UNKNOWN_LINK: (
        "The client does not know the link that the server chose.",
        "Try again: the next connection makes a new link group.",
    ),
    _D.VERSION: (
        "The two sides do not agree on the version of SMC.",
        "Enable a common version on both sides.",
    ),
    _D.DMB_LIMIT: (
        "The sender's ISM device has no direct memory buffer left.",
        "Close connections, or use SMC-R.",
    ),
    _D.NO_ROUTE: (
        "The sender finds no route from its RoCE device to the peer's.",
        "Check routes and neighbours on the interface of its RDMA device.",
    ),
    _D.ROUTE_NOT_INDIRECT: (
        "One side says that a gateway lies between the devices, the other not.",
        "Check that the routes of both hosts agree.",
    ),
    _D.OUT_OF_SYNC: (
        "The client has no link that matches a reused link group.",
        (
            "Nothing to do: the server drops the stale group and the next connection "
            "makes a new one."
        ),
    ),
    _D.PEER_DECLINED: (
        "The other side declined first.",
        "Look at the diagnosis that the other side gave.",
    ),
    _D.INTERNAL: (
        "The sender met an internal error.",
        "Its own log says more; report it to its maintainer.",
    ),
    _D.RTOKEN: (
        "The sender could not store the peer's remote key.",
        "Close connections of this link group; report it if it stays.",
    ),
    _D.QUEUE_PAIR: (
        "The sender could not bring its queue pair into the ready state.",
        "Check that its RDMA device and port are up and that the GID still exists.",
    ),
    _D.REGISTRATION: (
        "The sender could not register a buffer on every link.",
        "Raise its locked-memory limit; the connection itself works over TCP.",
    ),
}


def describe(code: int) -> DiagnosisText:
    """Put a diagnosis code into words; never fails.

    Args:
        code: The 32 bits of a Decline, known or not.

    Returns:
        The words; for an unknown code the name ``UNKNOWN`` and where to look.

    Reference: RFC 7609 A.2.5, "Peer Diagnosis Information".
    """
    known = _TEXTS.get(code)
    if known is None:
        return DiagnosisText(
            code=code,
            name="UNKNOWN",
            meaning=f"The sender gave code {code:08x}, which is not in our table.",
            advice="Look it up in the documentation of the peer's system.",
        )
    meaning, advice = known
    return DiagnosisText(code, PeerDiagnosis(code).name, meaning, advice)
