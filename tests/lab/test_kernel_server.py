"""A pysmc client of the kernel's SMC as server: every cell of the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.matrix import (
    CELLS,
    CLOSES,
    READS_NOTHING,
    SEES_THE_END,
    STALLS,
    Cell,
    Stage,
    receives,
)
from tests.lab.playing import Play, cases, play

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


@pytest.mark.lab_long(seconds=60)
@pytest.mark.usefixtures("option")
def test_linux_gives_up_what_found_no_room_two_seconds_after_its_close(
    ends, kernel
) -> None:
    """What arrived is a prefix; that it is one, Linux tells nobody."""
    cell = Cell("close of the server with unsent data", is_broken=True)
    one = Play(cell, PAIR, ends, kernel)
    one.start("server")
    one.start("client")
    one.connect()
    info = one.infos["client"]
    assert info is not None
    room = info["rmbe_bytes"]
    one.stages(
        (
            Stage(READS_NOTHING, None),
            Stage(None, STALLS),
            Stage(None, CLOSES),
            Stage(receives(room), None),
            Stage(SEES_THE_END, None),
            Stage(CLOSES, None),
        )
    )
    told = {role: one.told(role)[one.ports[0]] for role in ("client", "server")}
    assert told["server"]["sent"][0] > told["client"]["received"][0] == room
    one.finish()
