"""The two roles; they are fixed for a link group by who opened the TCP connection.

Reference: RFC 7609 section 2.2; kernel counterpart: smc_core.h.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["Role"]


class Role(Enum):
    """Which end of the TCP connection this is."""

    CLIENT = "client"
    SERVER = "server"
