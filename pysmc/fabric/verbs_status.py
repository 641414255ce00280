"""How a work request ended, in the numbers and names of the verbs library.

Decides what the status of a failed work completion says about a queue pair. Source:
libibverbs, ``enum ibv_wc_status``; InfiniBand Architecture Specification 1.4, section
11.6.2 (completion return status).
"""

from __future__ import annotations

from typing import Final

from pysmc.fabric.base import Status

__all__ = ["FLUSHED", "describe", "name_of", "status_of"]

FLUSHED: Final = 5
"""The queue pair was in the state ERROR before the request's turn came."""

_NAMES: Final = (
    "SUCCESS", "LOC_LEN_ERR", "LOC_QP_OP_ERR", "LOC_EEC_OP_ERR", "LOC_PROT_ERR",
    "WR_FLUSH_ERR", "MW_BIND_ERR", "BAD_RESP_ERR", "LOC_ACCESS_ERR", "REM_INV_REQ_ERR",
    "REM_ACCESS_ERR", "REM_OP_ERR", "RETRY_EXC_ERR", "RNR_RETRY_EXC_ERR",
    "LOC_RDD_VIOL_ERR", "REM_INV_RD_REQ_ERR", "REM_ABORT_ERR", "INV_EECN_ERR",
    "INV_EEC_STATE_ERR", "FATAL_ERR", "RESP_TIMEOUT_ERR", "GENERAL_ERR", "TM_ERR",
    "TM_RNDV_INCOMPLETE",
)  # fmt: skip

_MEANINGS: Final = {
    1: (Status.BROKEN_RULE, "the peer sent more than a receive takes"),
    # What soft-RoCE says of a SEND that is longer than its receive.
    2: (Status.BROKEN_RULE, "the device refused a request of the peer, or one of ours"),
    # A write outside our memory ends it in this way, and a port that goes down.
    5: (Status.FLUSHED, "the device ended the queue pair, and does not say why"),
    7: (Status.BROKEN_RULE, "the peer answered what was not asked"),
    9: (Status.REMOTE_ACCESS, "the peer found our request invalid"),
    10: (Status.REMOTE_ACCESS, "rkey and address are not the peer's memory"),
    11: (Status.PEER_GONE, "the peer could not complete our request"),
    12: (Status.TIMED_OUT, "the peer did not acknowledge, however often we tried"),
    13: (Status.TIMED_OUT, "the peer had no receive, however often we tried"),
    16: (Status.PEER_GONE, "the peer ended our request"),
    20: (Status.TIMED_OUT, "the peer's answer did not come"),
}
_OTHERS: Final = (Status.FLUSHED, "the device ended the queue pair")


def name_of(number: int) -> str:
    """Name a status as the library does: ``IBV_WC_RETRY_EXC_ERR``."""
    known = 0 <= number < len(_NAMES)
    return f"IBV_WC_{_NAMES[number]}" if known else f"status {number}"


def status_of(number: int) -> Status:
    """Tell what a failed completion makes of its queue pair."""
    return _MEANINGS.get(number, _OTHERS)[0]


def describe(number: int, vendor_error: int = 0) -> str:
    """Say what a failed completion means: the sentence, the name and the number.

    Args:
        number: The completion's status.
        vendor_error: The device's own code, 0 when it has none.
    """
    meaning = _MEANINGS.get(number, _OTHERS)[1]
    vendor = f", vendor error {vendor_error:#x}" if vendor_error else ""
    return f"{meaning} ({name_of(number)}, {number}{vendor})"
