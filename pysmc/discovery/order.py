"""The order of discovery: which way decides for a connection, the same at both ends.

Several ways may show at once that a connection can be SMC-R: its SYN may carry the
option and the mark of `local`, and the peer may be listed as well. The first row that
fits decides, and what the others had begun is taken back:

========== =========================== ========================== =====================
way        the client sees             the server sees            then
========== =========================== ========================== =====================
tcp_option the SYN-ACK had the option  the SYN had it, and so did CLC comes first; the
                                       the SYN-ACK                mark is taken off,
                                                                  nobody looks for it
static     ``peers`` lists the server  ``peers`` lists the client CLC comes first
local      a beacon, so it marks       the mark                   the rendezvous says
(none)     nothing                     nothing                    TCP
========== =========================== ========================== =====================

A client opts in wherever the option is installed, and marks wherever there is a beacon:
which of them is answered is known only after the connect. Both ends go by what TCP
carried, so they decide alike. There is one exception: an option that was lost on the
way back to the client is found by the server from the first bytes
(`pysmc.aio.negotiation`).

Decides nothing else: how each is seen is the business of the way's own module.

Source: RFC 7609 section 3.1 (the option); design decisions "local" and "static".
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["ORDER", "Way", "choose"]


class Way(StrEnum):
    """A way of discovery, by its name in ``Config.discovery``."""

    OPTION = "tcp_option"
    STATIC = "static"
    LOCAL = "local"

    @property
    def is_binding(self) -> bool:
        """Whether the peer speaks CLC next, whatever we want: it must get an answer."""
        return self is not Way.LOCAL


ORDER = (Way.OPTION, Way.STATIC, Way.LOCAL)
"""Which way decides when several could."""


def choose(seen: set[Way]) -> Way | None:
    """Say which of the ways that were seen decides; None is TCP."""
    return next((way for way in ORDER if way in seen), None)
