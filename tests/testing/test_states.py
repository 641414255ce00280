"""The table of states: every recipe leads to what its name says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pysmc.core.close import JOINT, Side
from pysmc.core.handshake import HandshakeState
from pysmc.core.link import LinkState
from pysmc.core.rmb import RmbState
from pysmc.testing.deliver import EndpointIn
from pysmc.testing.pair import SMALL
from pysmc.testing.states import STATES, Scene

ADDED = {
    "queue-pair": "PREPARING",
    "memory": "PREPARING",
    "connecting": "PREPARING",
    "rkey": "PREPARING",
    "link-lost": "AWAIT_CONFIRM",
    "heard": "AWAIT_CONFIRM",
    "group-ended": "AWAIT_CONFIRM",
}


def expected_handshake(name: str) -> str:
    """Read the state of the handshake off the name of a state."""
    words = name.split("/")[1:]
    if words[0] in {"active", "close", "link", "link-lost", "group-deleted"}:
        return "ESTABLISHED"
    if words[-1] == "doubted":
        return "FELL_BACK"
    if words == ["await-link", "connecting"]:
        return "AWAIT_LINK"
    return ADDED.get(words[-1], words[-1].replace("-", "_").upper())


@pytest.mark.parametrize("name", STATES)
def test_a_recipe_leads_to_what_its_name_says(name: str) -> None:
    endpoint = EndpointIn(name)
    look = endpoint.look()
    role = name.split("/", maxsplit=1)[0]
    assert endpoint.scene.role.value == STATES[name].role.value == role
    assert look.handshake == expected_handshake(name)
    if "/close/" in name:
        ours, peers = (Side(word) for word in name.split("/")[2].split("-"))
        assert look.connection == JOINT[ours, peers]
        assert look.readable == (100 if name.endswith("/unread") else 0)
        assert look.error == ""


def test_every_state_of_every_machine_is_there() -> None:
    looks = {name: EndpointIn(name).look() for name in STATES}
    handshakes = {
        role: {look.handshake for name, look in looks.items() if name.startswith(role)}
        for role in ("client", "server")
    }
    of_server = {"AWAIT_PROPOSAL", "QUEUED", "AWAIT_CONFIRM"}
    everything = {state.name for state in HandshakeState}
    # What only the client has: AWAIT_ACCEPT and LATE.
    assert handshakes["client"] == everything - of_server | {"FELL_BACK"}
    assert handshakes["server"] == everything - {"AWAIT_ACCEPT", "LATE"}
    assert {look.link for look in looks.values()} == {
        "",
        *(state.name for state in LinkState),
    }
    memory = {look.memory for look in looks.values() if look.memory}
    # GONE lasts no longer than it takes to forget it.
    assert memory == {state.name for state in RmbState} - {"GONE"}


def test_every_row_says_what_it_is() -> None:
    assert all(row.words for row in STATES.values())
    words = [f"{row.role.value} {row.words}" for row in STATES.values()]
    of_close = [
        text for name, text in zip(STATES, words, strict=True) if "/close/" in name
    ]
    assert len(of_close) == len(set(of_close)) == 2 * (15 + 7)


def test_bystanders_are_there_and_untouched() -> None:
    scene: Scene = STATES["client/active"].scene(bystanders=True)
    somebody_else, fellow = scene.bystanders
    assert scene.connection is not None
    assert fellow.group is scene.connection.group
    assert somebody_else.group is not scene.connection.group
    assert scene.connection not in scene.bystanders
    alone = STATES["server/await-proposal"].scene(bystanders=True)
    assert len(alone.bystanders) == 1


def test_the_release_is_the_one_that_the_state_needs() -> None:
    def release(name: str, most: int) -> int:
        endpoint = EndpointIn(name, replace(SMALL, release=most))
        assert endpoint.link is not None
        return endpoint.link.group.release

    assert release("client/await-add-link", 1) == 0
    assert release("client/active", 1) == 1
    assert release("client/active", 0) == 0
