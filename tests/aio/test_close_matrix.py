"""Every way to end a connection at one end, times every way at the other.

TCP is the oracle: each scenario is played over it and over SMC-R, and the calls of
both protocols have to be equal, with their exceptions, but for the rows of
`close_matrix_table`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pysmc.config import Config
from pysmc.testing.loops import SimLoop
from tests.aio.close_matrix import (
    ACTIONS,
    CELLS,
    LATE_CELLS,
    SITUATIONS,
    Cell,
    Stage,
    Told,
    play_here,
)
from tests.aio.close_matrix_player import SIMPLE
from tests.aio.close_matrix_table import (
    DIFFERENCES,
    RACY,
    REASONS,
    Difference,
    difference_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).resolve().parents[2] / "docs/reference/tcp-differences.md"
RUNS = 4
"""Further runs over TCP, which show whether its own answer varies."""


CELLS_OF_ONE_LOOP = [
    cell
    for cell in CELLS
    if cell.situation != "mid-handshake" and "process exit" not in cell[:2]
]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as made:
        yield made


def told(one: Told) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return one.one, one.other


def expected_by(row: Difference, over_tcp: Told) -> Told:
    return Told(
        over_tcp.one if row.one is None else row.one,
        over_tcp.other if row.other is None else row.other,
    )


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS + LATE_CELLS, ids=str)
def test_the_end_is_what_it_is_over_tcp(stage: Stage, cell: Cell) -> None:
    over_tcp = stage.play(cell, "tcp")
    over_smcr = stage.play(cell, "smcr")
    assert_over_smcr(cell, over_smcr)
    row = difference_of(cell)
    if row is not None:
        assert told(over_smcr) != told(over_tcp), "take it out of the table"
        assert told(over_smcr) == told(expected_by(row, over_tcp))
        return
    answers = {told(over_tcp)}
    if told(over_smcr) not in answers:
        answers |= {told(stage.play(cell, "tcp")) for _ in range(RUNS)}
        assert len(answers) == 1 or cell in RACY, f"TCP varies: {answers}"
    assert told(over_smcr) in answers


@pytest.mark.parametrize("cell", CELLS_OF_ONE_LOOP, ids=str)
def test_the_end_is_the_same_over_a_simulated_network(cell: Cell) -> None:
    over_tcp = play_here(cell, asyncio.SelectorEventLoop())
    over_sim = play_here(cell, SimLoop(Config(close_wait=60)))
    assert over_sim.carriers == ("smcr", "smcr")
    row = difference_of(cell)
    expected = over_tcp if row is None else expected_by(row, over_tcp)
    assert told(over_sim) == told(expected)


def assert_over_smcr(cell: Cell, play: Told) -> None:
    """See to it that the connection was what the scenario is about."""
    if not cell.situation.startswith("mid-handshake"):
        assert play.carriers == ("smcr", "smcr")
    elif cell.one in SIMPLE:
        assert play.carriers[0] == "smcr"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_tcp_itself_does_not_vary(stage: Stage) -> None:
    varying = {
        cell
        for cell in CELLS
        if len({told(stage.play(cell, "tcp")) for _ in range(RUNS)}) > 1
    }
    assert varying == set(RACY)


def test_the_matrix_is_whole() -> None:
    assert (len(ACTIONS), len(SITUATIONS)) == (7, 5)
    assert len(set(CELLS)) == len(CELLS) == 245
    assert len(CELLS_OF_ONE_LOOP) == 6 * 6 * 4
    assert len(set(LATE_CELLS) - set(CELLS)) == len(LATE_CELLS) == 21


def test_the_table_names_cells_of_the_matrix_once() -> None:
    listed = [cell for row in DIFFERENCES for cell in row.cells()]
    assert len(set(listed)) == len(listed) == 12 + 14
    assert set(listed) <= {*CELLS, *LATE_CELLS}
    assert len(set(listed) & set(CELLS)) == 12
    assert {row.reason for row in DIFFERENCES} == set(REASONS)
    assert all(row.one is not None or row.other is not None for row in DIFFERENCES)


def describe(row: Difference) -> str:
    """Write a row as the page has it."""

    def names(some: tuple[str, ...]) -> str:
        return ", ".join(some)

    def says(calls: tuple[str, ...] | None) -> str:
        if calls is None:
            return "as over TCP"
        return "<br>".join(f"`{call}`" for call in calls) or "nothing"

    cells = [names(row.situations), names(row.ones), names(row.others)]
    return f"| {' | '.join([*cells, says(row.one), says(row.other)])} |"


def test_the_page_says_what_the_table_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    written = [
        line for line in rows if not line.startswith(("| what is going on", "| --"))
    ]
    assert written == [describe(row) for row in DIFFERENCES]
    words = " ".join(page.split())
    for sentences in REASONS.values():
        assert sentences in words
