"""State machines as tables: rows hold states, never functions.

`Table` decides whether an input moves a machine, is declared to change nothing, or
is forbidden; it does not know what the states mean. The rows are also what the docs'
diagrams and the exhaustive tests read.

Reference: RFC 7609 section 4.8.1, figure 22, is such a table; so are all of ours.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["ForbiddenInput", "Table"]

State = TypeVar("State", bound=Enum)
Input = TypeVar("Input", bound=Enum)


class ForbiddenInput(Exception):
    """The table has no row for this input in this state.

    Whose guilt that is only the machine's owner knows; it translates.
    """


class Table(Generic[State, Input]):
    """One machine's transition table.

    Args:
        name: The machine's name in error texts.
        rows: (state, input) to the next state.
        ignored: (state, input) pairs that change nothing and are no error: what was
            sent twice, or crossed something of ours.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[tuple[State, Input], State],
        ignored: Iterable[tuple[State, Input]] = (),
    ) -> None:
        self.name = name
        self.rows = dict(rows)
        self.ignored = frozenset(ignored)
        both = self.ignored & self.rows.keys()
        assert not both, f"{name}: {both} both move and are ignored"

    def after(self, state: State, happened: Input) -> State:
        """Tell the state after an input; the same state when it is ignored.

        Raises:
            ForbiddenInput: The table has no such row.
        """
        row = (state, happened)
        if row in self.rows:
            return self.rows[row]
        if row in self.ignored:
            return state
        expected = ", ".join(sorted(i.name for s, i in self.rows if s is state))
        message = (
            f"{self.name}: {happened.name} in state {state.name}; "
            f"expected {expected or 'nothing more'}"
        )
        raise ForbiddenInput(message)
