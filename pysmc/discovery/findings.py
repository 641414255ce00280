"""What discovery finds before anybody was asked: reasons for TCP, as constants.

Decides the words. They are compared by identity where speed counts, because a plain
connection must cost as little as can be.

Source: `pysmc.reasons`.
"""

from __future__ import annotations

from pysmc.reasons import Reason, reason

__all__ = [
    "BOUND_TO_DEVICE",
    "NOT_LISTED",
    "NOT_MARKED",
    "NOT_TCP",
    "NO_SYN_KEPT",
    "OPTION_NOT_BUILT",
    "OWN_TOS",
    "PEER_NO_SMC",
    "setup_missing",
]

PEER_NO_SMC = reason("PEER_NO_SMC", "peer")
NOT_MARKED = reason("NOT_MARKED", "local")
NOT_LISTED = reason("PEER_NO_SMC", "local", "PYSMC_PEERS does not list it.")
NO_SYN_KEPT = reason(
    "MARK_LOST", "local", "The kernel kept no SYN of this connection (SYN cookie)."
)


def setup_missing(detail: str) -> Reason:
    """Say that a way of discovery does not work here, and what is missing."""
    return reason("SETUP_MISSING", "local", detail)


OPTION_NOT_BUILT = setup_missing("Discovery 'tcp_option' is not built yet.")
NOT_TCP = setup_missing("This is not a TCP socket with a numeric address.")
OWN_TOS = setup_missing(
    "The application chose the socket's TOS or priority, so it cannot be marked."
)
BOUND_TO_DEVICE = setup_missing(
    "The socket is bound to a device (SO_BINDTODEVICE), which 'local' does not follow."
)
