"""What the status of a failed work completion means."""

from __future__ import annotations

import pytest

from pysmc.fabric.base import Status
from pysmc.fabric.verbs_status import describe, name_of, status_of


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [
        (0, "IBV_WC_SUCCESS", Status.FLUSHED),
        (1, "IBV_WC_LOC_LEN_ERR", Status.BROKEN_RULE),
        (2, "IBV_WC_LOC_QP_OP_ERR", Status.BROKEN_RULE),
        (4, "IBV_WC_LOC_PROT_ERR", Status.FLUSHED),
        (5, "IBV_WC_WR_FLUSH_ERR", Status.FLUSHED),
        (9, "IBV_WC_REM_INV_REQ_ERR", Status.REMOTE_ACCESS),
        (10, "IBV_WC_REM_ACCESS_ERR", Status.REMOTE_ACCESS),
        (11, "IBV_WC_REM_OP_ERR", Status.PEER_GONE),
        (12, "IBV_WC_RETRY_EXC_ERR", Status.TIMED_OUT),
        (13, "IBV_WC_RNR_RETRY_EXC_ERR", Status.TIMED_OUT),
        (21, "IBV_WC_GENERAL_ERR", Status.FLUSHED),
        (23, "IBV_WC_TM_RNDV_INCOMPLETE", Status.FLUSHED),
        (24, "status 24", Status.FLUSHED),
        (-1, "status -1", Status.FLUSHED),
    ],
)
def test_numbers_have_names_and_meanings(
    number: int, name: str, status: Status
) -> None:
    assert name_of(number) == name
    assert status_of(number) is status
    assert describe(number).endswith(f"({name}, {number})")


def test_a_flushed_request_blames_nobody() -> None:
    """Its port may have gone down, of which the kernel tells later."""
    assert "peer" not in describe(5)


def test_a_device_may_say_more() -> None:
    text = describe(12, 0x81)
    assert text.startswith("the peer did not acknowledge")
    assert text.endswith("(IBV_WC_RETRY_EXC_ERR, 12, vendor error 0x81)")
