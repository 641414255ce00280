"""Every table, state and input: what moves, what is ignored, what is neither."""

from __future__ import annotations

from collections import Counter
from enum import Enum
from itertools import product
from typing import Any

import pytest

from pysmc.core import close, handshake, link
from pysmc.core.machine import ForbiddenInput, Table

Row = tuple[Table[Any, Any], type[Enum], type[Enum], dict[str, int]]

TABLES: dict[str, Row] = {
    "close": (
        close.SIDE,
        close.Side,
        close.CloseInput,
        {"moves": 5, "ignored": 7},
    ),
    "link": (
        link.LINK,
        link.LinkState,
        link.LinkInput,
        {"moves": 5, "ignored": 4, "forbidden": 3},
    ),
    "client": (
        handshake.CLIENT,
        handshake.HandshakeState,
        handshake.HandshakeInput,
        {"moves": 22, "ignored": 46, "forbidden": 112},
    ),
    "server": (
        handshake.SERVER,
        handshake.HandshakeState,
        handshake.HandshakeInput,
        {"moves": 32, "ignored": 46, "forbidden": 102},
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_state_and_input(name: str) -> None:
    table, states, inputs, expected = TABLES[name]
    found: Counter[str] = Counter()
    texts: list[tuple[str, str]] = []
    for state, happened in product(states, inputs):
        try:
            after = table.after(state, happened)
        except ForbiddenInput as error:
            found["forbidden"] += 1
            texts.append((str(error), f"{happened.name} in state {state.name}"))
        else:
            moves = (state, happened) in table.rows
            assert (after is state) or moves
            assert moves != ((state, happened) in table.ignored)
            found["moves" if moves else "ignored"] += 1
    assert found == expected
    assert all(wanted in text for text, wanted in texts)


STARTS_AND_ENDS: dict[str, tuple[Enum, frozenset[Any]]] = {
    "close": (close.Side.OPEN, close.ENDED),
    "link": (link.LinkState.INACTIVE, frozenset({link.LinkState.DOWN})),
    "client": (handshake.HandshakeState.AWAIT_ACCEPT, handshake.OVER),
    "server": (handshake.HandshakeState.AWAIT_PROPOSAL, handshake.OVER),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_state_can_be_reached_and_left(name: str) -> None:
    table, states, _, _ = TABLES[name]
    start, ends = STARTS_AND_ENDS[name]
    reached = {start}
    while (
        more := {after for (state, _), after in table.rows.items() if state in reached}
        - reached
    ):
        reached |= more
    other_role = {
        "client": {"AWAIT_PROPOSAL", "QUEUED", "AWAIT_CONFIRM"},
        "server": {"AWAIT_ACCEPT"},
    }.get(name, set())
    assert {state.name for state in states} - {s.name for s in reached} == other_role
    for state in reached - ends:
        assert any(source is state for source, _ in table.rows), state
    assert not any(state in ends for state, _ in table.rows)


@pytest.mark.parametrize("name", ["client", "server"])
def test_a_broken_stream_fails_every_handshake_that_is_not_over(name: str) -> None:
    table = TABLES[name][0]
    states = handshake.HandshakeState
    broken = handshake.HandshakeInput.BROKEN
    for state, _ in table.rows:
        assert table.after(state, broken) is states.FAILED


def test_who_reads_tcp_understands_a_decline() -> None:
    """A late Decline must find a row wherever bytes may still be read."""
    declined = handshake.HandshakeInput.DECLINED
    for table in (handshake.CLIENT, handshake.SERVER):
        states = {state for state, _ in table.rows}
        for state in states & handshake._READING:
            assert table.after(state, declined) is handshake.HandshakeState.FELL_BACK


def test_the_joint_states_of_the_close_are_figure_22() -> None:
    assert set(close.JOINT) == set(product(close.Side, close.Side))
    assert set(close.JOINT.values()) == {
        "ACTIVE",
        "APPCLOSEWAIT1",
        "APPFINCLOSEWAIT",
        "CLOSED",
        "PEERABORTWAIT",
        "PEERCLOSEWAIT1",
        "PEERCLOSEWAIT2",
        "PEERFINCLOSEWAIT",
        "PROCESSABORT",
    }
