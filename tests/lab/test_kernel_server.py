"""A pysmc client of the kernel's SMC as server: every cell of the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.matrix import CELLS, Cell
from tests.lab.playing import cases, play

if TYPE_CHECKING:
    from tests.lab.matrix import Kind

PAIR: tuple[Kind, Kind] = ("pysmc", "kernel")
NOT_EVERY_TIME = frozenset({"reconnect after the group died"})
"""A client keeps an idle group ten seconds longer than its settings say."""
QUICK = frozenset(cell.name for cell in CELLS if cell.is_quick) - NOT_EVERY_TIME


@pytest.mark.usefixtures("option")
@pytest.mark.parametrize("cell", cases(QUICK))
def test_a_kernel_server(cell: Cell, ends, kernel, record_property) -> None:
    play(cell, PAIR, ends, record_property, kernel)
