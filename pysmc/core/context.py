"""What every machine of one endpoint shares: who we are, orders, news, deadlines.

Decides nothing. `Context` is how a machine asks for I/O without knowing who does it.

Reference: RFC 7609 section 3.5.1 (peer ID); kernel counterpart: smc_core.c.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pysmc.core.events import LimitReached
from pysmc.core.timers import Timers
from pysmc.core.tuning import AS_SPECIFIED, Tuning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pysmc.config import Config
    from pysmc.core.actions import Action
    from pysmc.core.events import Event
    from pysmc.core.handshake import Handshake
    from pysmc.core.tokens import TokenSource

__all__ = ["Context", "FabricOffer", "Identity"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are on the wire."""

    peer_id: bytes
    """8 bytes: instance number and MAC; one per process and loop, because a peer with
    a known ID reuses the link group of whoever had it first."""
    host_name: str
    """Up to 32 ASCII characters, for people at the other end."""


@dataclass(frozen=True, slots=True)
class FabricOffer:
    """One device that connections may use."""

    fabric: str
    """Name of the fabric."""
    eids: tuple[str, ...]
    """EIDs that select it, in order of preference."""
    gid: bytes
    """16 bytes."""
    mac: bytes
    """6 bytes."""
    mtu_code: int
    """1-5 for 256-4096 bytes."""
    device: str = ""
    """Name of the device, for link groups stay on theirs; the fabric's name where that
    has only one."""

    def __post_init__(self) -> None:
        """A fabric with one device names it too."""
        if not self.device:
            object.__setattr__(self, "device", self.fabric)


@dataclass(slots=True)
class Context:
    """Shared by the machines of one endpoint."""

    identity: Identity
    offers: Sequence[FabricOffer]
    """The devices of connections that are begun without their own."""
    config: Config
    tokens: TokenSource
    actions: list[Action] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    timers: Timers[tuple[str, Any]] = field(default_factory=Timers)
    handshakes: set[Handshake] = field(default_factory=set)
    """Those in progress."""
    tuning: Tuning = AS_SPECIFIED
    """How connections begin."""
    excess: Counter[str] = field(default_factory=Counter)
    """How often each limit was exceeded."""

    def count_excess(self, name: str, limit: int) -> None:
        """Count what goes beyond a limit; the first of each kind is news.

        Args:
            name: The limit's name.
            limit: Its value.
        """
        self.excess[name] += 1
        if self.excess[name] == 1:
            self.events.append(LimitReached(name, limit))
