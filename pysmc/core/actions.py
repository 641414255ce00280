"""Orders of the core to its driver, and nothing else.

An action is an order to do I/O; its outcome comes back by a method of `Endpoint` that
the action's docstring names. Actions have to be carried out in the order in which
`Endpoint.take_actions` gives them.

Reference: RFC 7609 section 3.5 (what is sent when); kernel counterpart: smc_core.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pysmc.core.connection import Connection
    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link, LinkEnd
    from pysmc.core.link_group import LinkGroup
    from pysmc.core.rmb import Rmb

__all__ = [
    "Action",
    "CheckTcp",
    "ClearMemory",
    "CloseGroup",
    "CloseQueuePair",
    "ConnectQueuePair",
    "CreateQueuePair",
    "DeregisterMemory",
    "PostSend",
    "PublishUpdate",
    "RegisterMemory",
    "SendClc",
]


@dataclass(frozen=True, slots=True, eq=False)
class SendClc:
    """Write these bytes to the handshake's TCP socket, all of them.

    On failure call `Endpoint.tcp_lost`.
    """

    handshake: Handshake
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class CheckTcp:
    """Look once more, without waiting, whether TCP bytes of the handshake are there.

    Give them to `Endpoint.receive_tcp`; when there are none call `Endpoint.tcp_quiet`.
    This is the hand-over point: after it the TCP socket carries no Decline any more.
    """

    handshake: Handshake


@dataclass(frozen=True, slots=True, eq=False)
class CreateQueuePair:
    """Create a queue pair on the device ``link.group.device``.

    Answer with `Endpoint.pair_created` or `Endpoint.pair_failed`.
    """

    link: Link


@dataclass(frozen=True, slots=True, eq=False)
class ConnectQueuePair:
    """Begin to connect the link's queue pair.

    Answer with `Endpoint.pair_connecting` when it began without an error, later with
    `Endpoint.pair_connected`, or with `Endpoint.pair_failed`.
    """

    link: Link
    remote: LinkEnd
    passive: bool


@dataclass(frozen=True, slots=True, eq=False)
class CloseQueuePair:
    """Close the link's queue pair; no answer.

    ``in_use`` when the peer may have connections on it that it has not closed: what it
    has to say of them is to be acknowledged for a while.
    """

    link: Link
    in_use: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class CloseGroup:
    """Close the group's protection domain with all its memory; no answer."""

    group: LinkGroup


@dataclass(frozen=True, slots=True, eq=False)
class RegisterMemory:
    """Register memory of ``rmb.length`` bytes in the domain of ``rmb.group``.

    Answer with `Endpoint.memory_registered` or `Endpoint.memory_failed`.
    """

    rmb: Rmb


@dataclass(frozen=True, slots=True, eq=False)
class ClearMemory:
    """Fill the RMB's first bytes with zeros before another connection gets it.

    No answer.
    """

    rmb: Rmb
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class DeregisterMemory:
    """Deregister the RMB; no answer."""

    rmb: Rmb


@dataclass(frozen=True, slots=True, eq=False)
class PostSend:
    """SEND an LLC message on the link; no answer (a failure is the link's end)."""

    link: Link
    payload: bytes


@dataclass(frozen=True, slots=True, eq=False)
class PublishUpdate:
    """Publish the connection's state; see `Connection.take_update`."""

    connection: Connection


Action = (
    SendClc
    | CheckTcp
    | CreateQueuePair
    | ConnectQueuePair
    | CloseQueuePair
    | CloseGroup
    | RegisterMemory
    | ClearMemory
    | DeregisterMemory
    | PostSend
    | PublishUpdate
)
