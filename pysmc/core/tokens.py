"""Where the core's random numbers come from: an argument, so that runs can be replayed.

None of them is a secret: the fabric's protection domains are the protection, these are
robustness against late messages.

Reference: RFC 7609 A.2.2 (alert token, PSN) and A.3.1 (link user ID).
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["TokenSource"]


class TokenSource(Protocol):
    """Three kinds of random numbers."""

    def psn(self) -> int:
        """A first packet sequence number, 24 bits."""

    def alert_token(self) -> int:
        """An RMBE alert token, 32 bits, never 0."""

    def user_id(self) -> int:
        """A link user ID, 32 bits."""
