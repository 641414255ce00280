"""Link groups: whose they are, who has room, and which one a connection joins."""

from __future__ import annotations

from typing import Any

import pytest

from pysmc.config import Config
from pysmc.core.link import Link, LinkEnd, LinkInput
from pysmc.core.link_group import GroupTable, LinkGroup
from pysmc.core.roles import Role

PEER, GID = b"peer-id1", bytes(15) + b"\7"


def add(table: GroupTable, role: Role = Role.SERVER, **changes: Any) -> LinkGroup:
    """Add a group with one active link."""
    values: dict[str, Any] = {
        "peer_id": PEER,
        "peer_key": "host",
        "fabric": "sim",
        "device": "sim",
        "eid": "EID",
        "release": 1,
        "max_connections": 16,
        "max_links": 1,
    }
    group = table.add(role=role, **(values | changes))
    end = LinkEnd(PEER, GID, bytes(6), 0x111, 1, 3)
    link = Link(group, 1, end, 0)
    link.remote = end
    link.move(LinkInput.CONNECT)
    link.move(LinkInput.CONFIRMED)
    group.links.append(link)
    return group


@pytest.fixture
def table() -> GroupTable:
    return GroupTable(Config())


def reusable(table: GroupTable, **changes: Any) -> LinkGroup | None:
    values: dict[str, Any] = {
        "peer_id": PEER,
        "peer_key": "host",
        "gid": GID,
        "device": "sim",
        "eid": "EID",
    }
    return table.reusable_by_server(**(values | changes))


def test_numbers_are_not_used_again(table: GroupTable) -> None:
    first = add(table)
    table.remove(first)
    table.remove(first)
    assert (first.number, add(table).number, len(table)) == (1, 2, 1)


def test_a_server_finds_the_group_of_a_proposal(table: GroupTable) -> None:
    group = add(table)
    assert reusable(table) is group


@pytest.mark.parametrize(
    "changes",
    [
        {"peer_id": b"peer-id2"},
        {"peer_key": "other"},
        {"gid": bytes(16)},
        {"device": "sim 2"},
        {"eid": "OTHER"},
    ],
)
def test_everything_has_to_agree(table: GroupTable, changes: dict[str, Any]) -> None:
    add(table)
    assert reusable(table, **changes) is None


def test_a_client_group_is_never_a_servers(table: GroupTable) -> None:
    add(table, Role.CLIENT)
    assert reusable(table) is None


def test_a_group_without_room_is_passed_over(table: GroupTable) -> None:
    full, closed, dead, far = (add(table) for _ in range(4))
    full.places_taken = 16
    closed.is_closed_to_new = True
    dead.links[0].move(LinkInput.LOST)
    far.links[0].remote = None
    assert reusable(table) is None
    last = add(table)
    assert reusable(table) is last
    assert table.all() == [full, closed, dead, far, last]


def accepted(table: GroupTable, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "peer_id": PEER,
        "gid": GID,
        "qp_number": 0x111,
        "device": "sim",
    }
    return table.link_of_accept(**(values | changes))


def test_a_client_finds_the_link_of_an_accept(table: GroupTable) -> None:
    add(table, Role.CLIENT, peer_id=b"peer-id2")
    add(table, Role.SERVER)
    group = add(table, Role.CLIENT)
    assert accepted(table) == (group, group.links[0])


@pytest.mark.parametrize(
    "changes", [{"gid": bytes(16)}, {"qp_number": 0x222}, {"device": "sim 2"}]
)
def test_the_group_without_the_link(table: GroupTable, changes: dict[str, Any]) -> None:
    group = add(table, Role.CLIENT)
    assert accepted(table, **changes) == (group, None)


def test_neither_group_nor_link(table: GroupTable) -> None:
    closed = add(table, Role.CLIENT)
    closed.is_closed_to_new = True
    assert accepted(table) == (None, None)


def test_links_that_cannot_be_used_are_passed_over(table: GroupTable) -> None:
    group = add(table, Role.CLIENT)
    group.links[0].remote = None
    dead = add(table, Role.CLIENT)
    dead.links[0].move(LinkInput.LOST)
    assert accepted(table) == (group, None)


def test_it_says_what_it_is(table: GroupTable) -> None:
    group = add(table, release=0)
    assert repr(group) == "<LinkGroup 1 server sim connections=0>"
    assert group.version == "2.0"
    assert group.is_idle
    assert group.has_room
    assert repr(group.links[0]) == "<Link 1.1 active>"
