"""Every table, state and input: what moves, what is ignored, what is neither.

The files in ``tables/`` state the same once more, for people: one grid a machine, and
what each message really does in each state. A change of behaviour is a change of these
files, to be read and committed with it (``PYSMC_WRITE_TABLES=1`` writes them anew).
"""

from __future__ import annotations

import os
from collections import Counter
from enum import Enum
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.core import close, handshake, link
from pysmc.core.machine import ForbiddenInput, Table
from pysmc.testing.deliver import (
    Answer,
    EndpointIn,
    Input,
    LinkLost,
    PairConnected,
    PublishCompleted,
    TcpLost,
)
from pysmc.testing.messages import at_bounds, genuine
from pysmc.testing.states import STATES

if TYPE_CHECKING:
    from collections.abc import Callable

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
        {"moves": 26, "ignored": 49, "forbidden": 133},
    ),
    "server": (
        handshake.SERVER,
        handshake.HandshakeState,
        handshake.HandshakeInput,
        {"moves": 30, "ignored": 49, "forbidden": 129},
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
        "server": {"AWAIT_ACCEPT", "LATE"},
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


# The same, written down

FOLDER = Path(__file__).parent / "tables"


def check_written(name: str, text: str) -> None:
    """Compare with what is written down, or write it."""
    path = FOLDER / f"{name}.txt"
    if os.environ.get("PYSMC_WRITE_TABLES"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    written = path.read_text(encoding="utf-8") if path.exists() else ""
    assert text.splitlines() == written.splitlines(), f"{path.name} says otherwise"


@pytest.mark.parametrize("name", TABLES)
def test_the_grid_of_a_machine_is_the_one_that_is_written_down(name: str) -> None:
    table, states, inputs, _ = TABLES[name]
    width = max(len(each.name) for each in inputs)
    lines = [f"{table.name}: input, then what each state becomes; . stays, x forbidden"]
    for happened in inputs:
        lines.append(f"\n{happened.name}: {happened.value}")
        for state in states:
            try:
                after = table.after(state, happened)
            except ForbiddenInput:
                after = None
            ignored = (state, happened) in table.ignored
            word = "x" if after is None else "." if ignored else after.name
            lines.append(f"  {state.name:{width}} {word}")
    check_written(name, "\n".join(lines) + "\n")


HAPPENS: dict[str, Input] = {
    "TCP ends": TcpLost(),
    "the link is lost": LinkLost(),
    "the queue pair is connected": PairConnected(),
    "the queue pair cannot connect": PairConnected("unreachable"),
    "the order is done": Answer(),
    "the order fails": Answer("no memory"),
    "a publish completes": PublishCompleted(),
}


def everything_for(state: str) -> dict[str, Input]:
    endpoint = EndpointIn(state)
    happens = {n: each for n, each in HAPPENS.items() if endpoint.takes(type(each))}
    return {**genuine(endpoint), **happens}


def outcome(state: str, what: Input) -> str:
    """Say in one line what a delivery does."""
    seen = EndpointIn(state).deliver(what)
    parts = [
        f"{field} {after or '-'}"
        for field in ("handshake", "link", "connection", "memory")
        if (after := getattr(seen.after, field)) != getattr(seen.before, field)
    ]
    if seen.after.readable != seen.before.readable:
        parts.append(f"{seen.after.readable} readable")
    if seen.after.error != seen.before.error:
        parts.append(f"error {seen.after.error}")
    parts += [f"says {type(message).__name__}" for message in seen.said]
    parts += [f"tells {name}" for name in seen.news]
    orders = [name for name in seen.orders if name not in {"SendClc", "PostSend"}]
    parts += [f"orders {name}" for name in orders if name != "PublishUpdate"]
    if seen.left:
        parts.append("is not read")
    return ", ".join(parts) or "nothing"


@pytest.mark.slow
@pytest.mark.parametrize("role", ["client", "server"])
def test_what_happens_is_what_is_written_down(role: str) -> None:
    """Every state and every message as an honest peer would make it."""
    lines = [f"What each message does to a {role}, state by state"]
    for state, row in STATES.items():
        if row.role.value != role:
            continue
        outcomes: dict[str, list[str]] = {}
        for name, what in everything_for(state).items():
            outcomes.setdefault(outcome(state, what), []).append(name)
        lines.append(f"\n{state}: {row.words}")
        for text, names in sorted(outcomes.items()):
            lines += [f"  {text}:", *(f"    {name}" for name in names)]
    check_written(f"{role}-in-every-state", "\n".join(lines) + "\n")


# What no message may do, whatever it says


def is_over(state: str) -> bool:
    return EndpointIn(state).look().handshake in {"ESTABLISHED", "FELL_BACK", "FAILED"}


def is_of_clc(name: str) -> bool:
    return name.startswith(("Proposal", "Accept", "Confirm", "Decline", "SMC-D"))


@cache
def variants(message: Any) -> tuple[Any, ...]:
    return tuple(changed for _, changed in at_bounds(message))


def check_wrong_messages(state: str, part: int, parts: int) -> int:
    """Deliver one of so many parts of the wrong messages; gives how many.

    Invariants are checked by the delivery itself. A CLC message may end its handshake,
    an LLC message its group, an update its connection.
    """
    over, delivered = is_over(state), 0
    fellows_before = EndpointIn(state, bystanders=True).scene.bystanders[1:]
    messages = [
        (name, changed)
        for name, message in genuine(EndpointIn(state)).items()
        for changed in variants(message)
        if not (over and is_of_clc(name))
    ]
    for name, changed in messages[part::parts]:
        endpoint = EndpointIn(state, bystanders=True)
        seen = endpoint.deliver(changed)
        somebody_else, *fellows = endpoint.scene.bystanders
        assert somebody_else.error is None, seen
        assert somebody_else.state == "ACTIVE", seen
        if is_of_clc(name) or name.startswith("CDC"):
            # It is not about the others of the group.
            for fellow, before in zip(fellows, fellows_before, strict=True):
                assert fellow.state == before.state, (name, str(seen))
        delivered += 1
    return delivered


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_a_wrong_message_ends_at_most_its_own(state: str) -> None:
    """Fields of messages at their bounds: nothing raises, and bystanders live.

    One message in forty here, other ones in every state; all of them below.
    """
    number = sorted(STATES).index(state)
    has_ended = state in {"client/fell-back", "client/failed"} | {
        "server/fell-back",
        "server/failed",
    }
    # There is nothing left that a message could arrive at.
    assert check_wrong_messages(state, number % 40, 40) >= (0 if has_ended else 5)


@pytest.mark.slow
@pytest.mark.fuzz
def test_every_wrong_message_ends_at_most_its_own(
    long_run: Callable[..., Any],
) -> None:
    with long_run("wrong-messages", small=3, full=len(STATES)) as run:
        for number in run.seeds():
            parts = 1 if run.is_full else 20
            state = sorted(STATES)[number]
            run.add(messages=check_wrong_messages(state, 0, parts), states=1)
