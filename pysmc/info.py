"""What an application may know of its connection: is it on SMC-R, and why not?

A plain record; it decides nothing and knows no sockets.

Source: RFC 7609 section 3.5.1; kernel counterpart: smc_diag.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pysmc.reasons import Reason

__all__ = ["ConnectionInfo"]


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """Mode, identity and sizes of one connection; `reason` when it is plain TCP.

    Got by ``transport.get_extra_info("smc")`` on every connection of a pysmc loop.
    ``mode == "tcp"`` means that the transport is the loop's own stock transport on the
    very same socket.
    """

    mode: Literal["smcr", "tcp"]
    """What carries the bytes."""
    role: Literal["client", "server"]
    """Which end of the TCP connection this is."""
    version: str | None = None
    """SMC-R version: "1", "2.0" or "2.1"."""
    fabric: str | None = None
    """What moves the memory: "shm", "verbs" or "sim"."""
    reason: Reason | None = None
    """Why it is not SMC-R; None when it is."""
    link_group: int | None = None
    """Number of the link group in this process."""
    links: tuple[int, ...] = ()
    """Link numbers (0-255) of the group's active links."""
    eid: str | None = None
    """The EID that both ends agreed on."""
    local_gid: str | None = None
    """Our GID as an IPv6 address text."""
    peer_gid: str | None = None
    """The peer's GID as an IPv6 address text."""
    rmbe_bytes: int | None = None
    """Size of our receive buffer in bytes."""
    peer_rmbe_bytes: int | None = None
    """Size of the peer's receive buffer in bytes."""
    discovery: str | None = None
    """How the peer showed that it speaks SMC: "tcp_option", "local" or "static"; None
    when it did not."""
