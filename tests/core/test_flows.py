"""The RFC's own ladders, replayed by two connections.

The flows are data (proto/flows). Their elements begin with an eye catcher of 4 bytes,
ours do not: a connection whose element is 4 bytes smaller counts 4 less everywhere.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.core.cursor import Cursor, Ring
from smcproto.constants import ConnectionStateFlags, ProducerFlags

if TYPE_CHECKING:
    from pysmc.core.connection import Connection
    from tests.core.conftest import Duo

FOLDER = Path(__file__).resolve().parents[2] / "proto" / "flows"
FLOWS: dict[str, dict[str, Any]] = {
    path.stem: tomllib.loads(path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.glob("*.toml"))
}
DATA = [name for name in FLOWS if name.startswith("4.7")]
CLOSING = [name for name in FLOWS if name.startswith("4.8")]
PLAIN = [
    name for name in DATA if not any(step.get("urgent") for step in FLOWS[name]["step"])
]
"""Without urgent data, which is not built: those flows check the cursors alone."""

SAME_FOR_US = {"APPCLOSEWAIT2": "PEERCLOSEWAIT2"}
"""Both ends have said D and no more; who was first changes nothing that follows."""


def position(ring: Ring, cursor: dict[str, int]) -> int:
    return cursor["wrap"] * ring.capacity + cursor["count"] - ring.base


def test_the_flows_are_there() -> None:
    assert len(DATA) == 6
    assert len(PLAIN) == 4
    assert len(CLOSING) == 5


@pytest.mark.parametrize("name", DATA)
def test_cursors_behind_an_eye_catcher(name: str) -> None:
    """Every write of the RFC ends where its cursors say, with the base at 4."""
    flow = FLOWS[name]
    ring = Ring(flow["rmbe_bytes"], flow["data_offset"])
    written = {
        actor: position(ring, flow["start"][actor]["producer"]) for actor in "AB"
    }
    seen = dict(written)
    for step in flow["step"]:
        actor = step["actor"]
        if step["action"] == "write":
            ((offset, length),) = ring.pieces(written[actor], step["bytes"])
            assert (offset, offset + length - 1) == (step["first"], step["last"])
            written[actor] += length
        elif step["action"] == "cdc":
            said = Cursor(**step["producer"])
            assert ring.cursor(written[actor]) == said
            moved = ring.advance(seen[actor], said.packed, ring.capacity, "producer")
            assert moved == written[actor]
            seen[actor] = moved


@pytest.mark.parametrize("name", PLAIN)
def test_data_flows(name: str, make_duo: type[Duo]) -> None:
    flow = FLOWS[name]
    base = flow["data_offset"]
    size = flow["rmbe_bytes"] - base
    duo = make_duo(left_bytes=size, right_bytes=size)
    ends = {"A": duo.left, "B": duo.right}
    begin(duo, flow["start"], Ring(size + base, base))
    waiting = {"A": 0, "B": 0}
    claimed: dict[str, list[tuple[int, int]]] = {"A": [], "B": []}
    for step in flow["step"]:
        actor = step["actor"]
        me = ends[actor]
        other = ends["B" if actor == "A" else "A"]
        match step["action"]:
            case "send":
                waiting[actor] += step["bytes"]
            case "write":
                if not claimed[actor]:
                    spans = me.claim(waiting[actor])
                    waiting[actor] -= sum(length for _, length in spans)
                    claimed[actor] = list(spans)
                address, length = claimed[actor].pop(0)
                first = address - me.remote_address + base
                assert (first, first + length - 1) == (step["first"], step["last"])
            case "receive":
                assert other is not me
                assert me.readable == step["bytes"]
                me.consume(step["bytes"])
            case _:
                assert not claimed[actor], "everything was written before it is told"
                _, _, producer, consumer, flags = me.take_update()
                me.published(completed=True)
                assert producer + base == Cursor(**step["producer"]).packed
                assert consumer + base == Cursor(**step["consumer"]).packed
                named = [flag.name for flag in ProducerFlags if flags >> 8 & flag]
                assert named == step["flags"]
                other.receive_update((me._sequence, 0, producer, consumer, flags))
    assert waiting == {"A": 0, "B": 0}
    assert (duo.left.error, duo.right.error) == (None, None)


def begin(duo: Duo, start: dict[str, Any], ring: Ring) -> None:
    """Bring two fresh connections to where a flow starts, by moving bytes."""
    for name, me, other in (
        ("A", duo.left, duo.right),
        ("B", duo.right, duo.left),
    ):
        there = "B" if name == "A" else "A"
        written = position(ring, start[name]["producer"])
        assert written == position(ring, start[there]["consumer"])
        while written:
            count = min(written, 3000)
            assert sum(length for _, length in me.claim(count)) == count
            duo.tell(other)
            other.consume(count)
            duo.tell(me)
            written -= count


@pytest.mark.parametrize("name", CLOSING)
def test_closing_flows(name: str, make_duo: type[Duo]) -> None:
    duo = make_duo(left_bytes=4096, right_bytes=4096)
    ends = {"A": duo.left, "B": duo.right}
    on_the_way: dict[str, Any] = {}
    for step in FLOWS[name]["step"]:
        actor = step["actor"]
        me = ends[actor]
        other = ends["B" if actor == "A" else "A"]
        action = step["action"]
        if action in {"cdc", "cdc_leaves"}:
            on_the_way[actor] = leave(me, step["flags"])
        if action in {"cdc", "cdc_arrives"}:
            other.receive_update(on_the_way.pop(actor))
        elif action != "cdc_leaves":
            act(me, action, step.get("bytes", 0))
        if action == "cdc":
            found = {end: connection.state for end, connection in ends.items()}
            named = {
                end: state.replace("_", "") for end, state in step["states"].items()
            }
            assert found == {
                end: SAME_FOR_US.get(state, state) for end, state in named.items()
            }
    assert [connection.state for connection in ends.values()] == ["CLOSED", "CLOSED"]
    assert duo.left.is_ended
    assert duo.right.is_ended


def leave(me: Connection, names: list[str]) -> tuple[int, int, int, int, int]:
    if names == ["ABNORMAL_CLOSE"]:
        me.abort()  # the answer to an abort is the application's only choice
    update = me.take_update()
    me.published(completed=True)
    said = ConnectionStateFlags(update[4] & 0xFF)
    assert [flag.name for flag in said] == names
    return update


def act(me: Connection, action: str, count: int) -> None:
    match action:
        case "close":
            me.close()
        case "shutdown_write":
            me.shutdown_write()
        case "abort":
            me.abort()
        case "send":
            assert me.claim(count)
        case "receive":
            assert me.readable == count
            me.consume(count)
        case _:
            assert action == "receive_end"
            assert me.peer_done
            assert me.readable == 0
