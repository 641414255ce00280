"""The kernel's SMC as client of a pysmc server: every cell of the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.matrix import CELLS, Cell
from tests.lab.playing import cases, play

if TYPE_CHECKING:
    from tests.lab.matrix import Kind

PAIR: tuple[Kind, Kind] = ("kernel", "pysmc")
NOT_EVERY_TIME = frozenset({"connect and close", "no UEID in common"})
"""Of those that are in every run with a kernel server."""
QUICK = frozenset(cell.name for cell in CELLS if cell.is_quick) - NOT_EVERY_TIME


@pytest.mark.usefixtures("option")
@pytest.mark.parametrize("cell", cases(QUICK))
def test_a_kernel_client(cell: Cell, ends, kernel, record_property) -> None:
    play(cell, PAIR, ends, record_property, kernel)
