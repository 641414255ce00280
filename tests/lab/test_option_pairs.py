"""Two of pysmc that learn of each other by the TCP option: every cell of the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.playing import cases, play

if TYPE_CHECKING:
    from tests.lab.matrix import Cell, Kind

PAIR: tuple[Kind, Kind] = ("pysmc", "pysmc")
QUICK = ("1 byte", "group reuse after idle", "decline by the server")


@pytest.mark.usefixtures("option")
@pytest.mark.parametrize("cell", cases(QUICK))
def test_two_of_pysmc(cell: Cell, ends, record_property) -> None:
    play(cell, PAIR, ends, record_property)
