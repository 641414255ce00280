"""How one side closes: further, and never back."""

from __future__ import annotations

from itertools import product

import pytest

from pysmc.core.close import ENDED, JOINT, SIDE, CloseInput, Side

ORDER = [Side.OPEN, Side.DONE, Side.CLOSED]


@pytest.mark.parametrize(("side", "said"), [*product(Side, CloseInput)])
def test_a_side_only_goes_further(side: Side, said: CloseInput) -> None:
    after = SIDE.after(side, said)
    if side in ENDED:
        assert after is side
    elif said is CloseInput.ABORTED:
        assert after is Side.ABORTED
    else:
        assert ORDER.index(after) >= ORDER.index(side)


@pytest.mark.parametrize(("ours", "theirs"), [*product(Side, Side)])
def test_closed_means_that_both_have_ended(ours: Side, theirs: Side) -> None:
    both = ours in ENDED and theirs in ENDED
    assert (JOINT[ours, theirs] == "CLOSED") == both


@pytest.mark.parametrize(
    ("ours", "theirs", "name"),
    [
        # Active close: we say D, the peer answers D, then C.
        (Side.DONE, Side.OPEN, "PEERCLOSEWAIT1"),
        (Side.DONE, Side.DONE, "PEERCLOSEWAIT2"),
        (Side.DONE, Side.CLOSED, "APPFINCLOSEWAIT"),
        # Passive close: the peer says D, we close.
        (Side.OPEN, Side.DONE, "APPCLOSEWAIT1"),
        (Side.CLOSED, Side.DONE, "PEERFINCLOSEWAIT"),
        # Abnormal.
        (Side.OPEN, Side.ABORTED, "PROCESSABORT"),
        (Side.ABORTED, Side.OPEN, "PEERABORTWAIT"),
    ],
)
def test_the_names_of_figure_22(ours: Side, theirs: Side, name: str) -> None:
    assert JOINT[ours, theirs] == name
