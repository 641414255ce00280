"""What discovery finds before anybody was asked: reasons for TCP, as constants.

Decides the words. They are compared by identity where speed counts, because a plain
connection must cost as little as can be.

Source: `pysmc.reasons`.
"""

from __future__ import annotations

from pysmc.reasons import Reason, reason

__all__ = [
    "BOUND_TO_DEVICE",
    "INCOMPLETE",
    "NOT_INSTALLED",
    "NOT_LISTED",
    "NOT_MARKED",
    "NOT_TCP",
    "NO_CLC",
    "NO_OPTION_HERE",
    "NO_SYN_KEPT",
    "OTHER_CGROUP",
    "OWN_TOS",
    "PEER_NO_SMC",
    "TOO_LATE",
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


NO_OPTION_HERE = reason(
    "PEER_NO_SMC",
    "peer",
    "Only peers of this host can show it: the TCP option is not installed here"
    " ('pysmc option attach').",
)
NOT_INSTALLED = setup_missing(
    "The TCP option is not installed for this process's cgroup: run"
    " 'pysmc option attach' as root."
)
OTHER_CGROUP = setup_missing(
    "The socket was made in another cgroup, for which the TCP option is not installed:"
    " run 'pysmc option attach' as root, for a cgroup that both are in."
)
INCOMPLETE = setup_missing(
    "The TCP option's set-up is incomplete, or was taken down meanwhile: run"
    " 'pysmc option attach' again."
)
TOO_LATE = reason(
    "NOT_MARKED",
    "local",
    "The TCP option has to be asked for before listen() or connect(), on a plain TCP"
    " socket.",
)
NO_CLC = reason(
    "MARK_LOST",
    "peer",
    "Its TCP option came, but no SMC message followed: ours was lost on the way.",
)
NOT_TCP = setup_missing("This is not a TCP socket with a numeric address.")
OWN_TOS = setup_missing(
    "The application chose the socket's TOS or priority, so it cannot be marked."
)
BOUND_TO_DEVICE = setup_missing(
    "The socket is bound to a device (SO_BINDTODEVICE), which 'local' does not follow."
)
