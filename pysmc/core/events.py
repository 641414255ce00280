"""News of the core for its driver; nothing has to be answered.

Reference: RFC 7609 sections 3.5.1 and 4.8; kernel counterpart: af_smc.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pysmc.core.connection import Connection
    from pysmc.core.handshake import Handshake
    from pysmc.errors import SmcError
    from pysmc.reasons import Reason

__all__ = [
    "ConnectionLost",
    "Established",
    "Event",
    "Failed",
    "FellBack",
    "LimitReached",
    "News",
]


class News:
    """What one update of the peer brought to a connection: bits of an int.

    Not an `enum.IntFlag`, whose arithmetic costs more than the whole update.
    """

    NOTHING: Final = 0
    DATA: Final = 1  # more bytes can be read
    SPACE: Final = 2  # more bytes can be written
    DONE: Final = 4  # the peer has finished writing: EOF follows the bytes there
    CLOSED: Final = 8  # the peer has closed both ways (DONE is set too)
    ABORTED: Final = 16  # the peer, or a rule it broke, ended it abnormally
    PUBLISH: Final = 32  # an update of ours is due


@dataclass(frozen=True, slots=True, eq=False)
class Established:
    """The connection runs over SMC-R from now on."""

    handshake: Handshake
    connection: Connection


@dataclass(frozen=True, slots=True, eq=False)
class FellBack:
    """Both ends go on with TCP; every CLC byte was consumed, no other byte was read."""

    handshake: Handshake
    reason: Reason


@dataclass(frozen=True, slots=True, eq=False)
class Failed:
    """The connection is lost: its TCP stream cannot be trusted any more; close it."""

    handshake: Handshake
    error: SmcError


@dataclass(frozen=True, slots=True, eq=False)
class ConnectionLost:
    """An established connection ended by something that is not the peer's update."""

    connection: Connection
    error: SmcError


@dataclass(frozen=True, slots=True, eq=False)
class LimitReached:
    """A limit was exceeded for the first time; `Endpoint.excess` counts on."""

    name: str
    limit: int


Event = Established | FellBack | Failed | ConnectionLost | LimitReached
