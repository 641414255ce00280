"""Where the end of a connection over SMC-R is not what it is over TCP, and why.

Checked in both directions by `test_close_matrix`: a difference that is not here fails,
and so does a row whose difference is gone. `docs/reference/tcp-differences.md` says the
same to users, and a test compares the two.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.aio.close_matrix import ACTIONS, LATE, SITUATIONS, Cell

__all__ = ["DIFFERENCES", "RACY", "REASONS", "Difference", "difference_of"]

REASONS = {
    "a part is not the whole": (
        "Bytes were written and will not arrive. TCP ends the stream with an end of "
        "file, which the other end cannot tell from a proper one. SMC-R says reset: "
        "an end of file is only delivered after every byte that was written."
    ),
    "no connection before both agreed": (
        "A TCP connection is made by the kernels, and a server's program gets it as "
        "soon as it accepts. One over SMC-R is made by the two programs together: "
        "when one of them stops before that, the other one's program never sees it."
    ),
}
"""Name of a reason to its sentences."""


class Difference(NamedTuple):
    """Cells that differ in the same way; None where an end is told what TCP tells."""

    reason: str
    ones: tuple[str, ...]
    others: tuple[str, ...]
    situations: tuple[str, ...]
    one: tuple[str, ...] | None
    other: tuple[str, ...] | None

    def cells(self) -> list[Cell]:
        """List the cells."""
        return [
            Cell(one, other, situation)
            for situation in self.situations
            for one in self.ones
            for other in self.others
        ]


_MADE, _RESET = "connection_made", "connection_lost(ConnectionResetError ECONNRESET)"
_NOT_CONNECTED = "write_eof: OSError ENOTCONN"
_WAITING = ("unsent data", "blocked writer")
_EARLY = ("mid-handshake",)

DIFFERENCES = (
    Difference(
        "a part is not the whole",
        ("abort", "process exit"),
        ("write_eof",),
        _WAITING,
        one=None,
        other=(_MADE, _NOT_CONNECTED, "data: some", _RESET),
    ),
    Difference(
        "a part is not the whole",
        ("abort", "process exit"),
        ("write_eof + close",),
        _WAITING,
        one=None,
        other=(_MADE, _NOT_CONNECTED, "connection_lost(None)"),
    ),
    Difference(
        "no connection before both agreed",
        ("close", "abort", "write_eof + close"),
        ("cancel",),
        _EARLY,
        one=None,
        other=(),
    ),
    Difference(
        "no connection before both agreed",
        ("write_eof",),
        ("cancel",),
        _EARLY,
        one=(_MADE, _RESET),
        other=(),
    ),
    Difference(
        "no connection before both agreed",
        ("cancel", "process exit"),
        ACTIONS[:-1],
        (LATE,),
        one=None,
        other=(),
    ),
    Difference(
        "no connection before both agreed",
        ("drop the last reference",),
        ("cancel",),
        (LATE,),
        one=(_MADE, _RESET),
        other=(),
    ),
    Difference(
        "no connection before both agreed",
        ("drop the last reference",),
        ("process exit",),
        (LATE,),
        one=(
            "create_connection: ConnectionResetError ECONNRESET",
            "Task exception was never retrieved",
        ),
        other=None,
    ),
)

RACY: dict[Cell, str] = {}
"""Cells in which TCP's own answer depends on chance, with the reason.

Empty: the players take turns, so that nothing is under way when one of them acts.
"""


def difference_of(cell: Cell) -> Difference | None:
    """Find the row of a cell."""
    rows = [row for row in DIFFERENCES if cell in row.cells()]
    assert len(rows) <= 1, f"{cell} is listed twice"
    assert cell.situation in (*SITUATIONS, LATE)
    return rows[0] if rows else None
