"""Whose turn a first contact is, and how long one that stalls is waited for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pysmc.core.actions import RegisterMemory
from pysmc.core.events import Established, FellBack
from pysmc.core.first_contacts import (
    FIRST_CONTACT_TURN,
    FIRST_CONTACTS_PER_PEER,
    ContactKey,
    FirstContacts,
)
from pysmc.core.handshake import Handshake, HandshakeState
from pysmc.core.roles import Role
from pysmc.testing.pair import SMALL, CorePair, make_offer

if TYPE_CHECKING:
    from smcproto import clc


def make_key(peer_id: bytes = b"A", peer_key: str = "host") -> ContactKey:
    return ContactKey(peer_key, peer_id, "shm", "EID")


def hands(count: int) -> list[Handshake]:
    return [Handshake(Role.SERVER, "host", 10.0) for _ in range(count)]


def stall(pair: CorePair, peer_key: str = "host") -> Handshake:
    """Let a client go silent after its Proposal; give the server's handshake."""
    pair.hold("tcp", pair.client)
    _, server = pair.connect(peer_key=peer_key)
    pair.drive()
    return server


def test_one_of_a_kind_at_a_time() -> None:
    contacts, (first,) = FirstContacts(), hands(1)
    assert contacts.begins_at(make_key(), 1.0) == 1.0
    contacts.begin(first, make_key(), 1.0)
    assert contacts.begins_at(make_key(), 1.25) == 1.0 + FIRST_CONTACT_TURN
    assert contacts.begins_at(make_key(), 2.0) == 2.0
    for other in (make_key(b"B"), make_key(peer_key="elsewhere")):
        assert contacts.begins_at(other, 1.25) == 1.25
    assert contacts.leave(first, make_key())
    assert not contacts.leave(first, make_key())
    assert contacts.begins_at(make_key(), 1.25) == 1.25


def test_so_many_of_one_peer_whatever_it_calls_itself() -> None:
    contacts = FirstContacts()
    some = hands(FIRST_CONTACTS_PER_PEER)
    for number, each in enumerate(some):
        key = make_key(bytes([number]))
        assert contacts.begins_at(key, 1.0) == 1.0
        contacts.begin(each, key, 1.0)
    assert contacts.begins_at(make_key(b"other"), 1.0) is None
    assert contacts.begins_at(make_key(b"other", "elsewhere"), 1.0) == 1.0


def test_who_waits_is_taken_in_order() -> None:
    contacts, (going, *waiting, other) = FirstContacts(), hands(5)
    contacts.begin(going, make_key(), 1.0)
    for each in waiting:
        contacts.wait(each, make_key())
    contacts.wait(other, make_key(b"B"))
    assert contacts.take_next("host", 1.0) is other
    assert contacts.take_next("host", 1.0) is None
    contacts.leave(going, make_key())
    assert contacts.take_next("host", 1.0) is waiting[0]
    assert contacts.take_partners(make_key()) == waiting[1:]
    assert contacts.take_partners(make_key()) == []


def test_the_checks_see_who_is_over_or_waits_for_nobody() -> None:
    contacts, (going, waiting) = FirstContacts(), hands(2)
    contacts.wait(waiting, make_key())
    with pytest.raises(AssertionError, match="waits"):
        contacts.check()
    waiting.state = HandshakeState.QUEUED
    with pytest.raises(AssertionError, match="behind nobody"):
        contacts.check()
    contacts.begin(going, make_key(), 1.0)
    contacts.check()
    going.state = HandshakeState.FAILED
    with pytest.raises(AssertionError, match="holds up others"):
        contacts.check()


# With everything around them


def test_a_stalled_first_contact_holds_up_its_peer_id_for_half_a_second() -> None:
    pair = CorePair()
    stalled = stall(pair)
    client, server = pair.connect()
    pair.drive()
    states = []
    for seconds in (0, FIRST_CONTACT_TURN - 0.01, 0.02):
        pair.advance(seconds)
        states.append(server.state.name)
    assert states == ["QUEUED", "QUEUED", "AWAIT_CONFIRM"]
    assert stalled.state is HandshakeState.AWAIT_CONFIRM
    pair.tcp(stalled).peer.is_cut = True
    pair.release("tcp")
    pair.drive()
    assert isinstance(pair.verdict(client), Established)
    pair.check()


def test_who_comes_later_does_not_wait_at_all() -> None:
    pair = CorePair()
    stall(pair)
    pair.advance(FIRST_CONTACT_TURN)
    _, server = pair.connect()
    pair.drive()
    assert server.state is HandshakeState.AWAIT_CONFIRM


def test_a_stalled_first_contact_holds_up_nobody_else() -> None:
    """Not even whoever has the peer ID that it claims."""
    pair = CorePair()
    stall(pair, peer_key="process 1")
    for number in range(2, 12):
        _, server = pair.connect(peer_key=f"process {number}")
        pair.drive()
        assert server.state is HandshakeState.AWAIT_CONFIRM
    assert pair.server.endpoint.excess == {}


def test_one_peer_has_so_many_first_contacts_and_the_rest_falls_back_in_time() -> None:
    patient = replace(SMALL, confirm_wait=30, handshake_wait=60)
    pair = CorePair(replace(patient, accept_wait=30), patient)
    for _ in range(FIRST_CONTACTS_PER_PEER):
        assert stall(pair).state is HandshakeState.AWAIT_CONFIRM
        pair.advance(FIRST_CONTACT_TURN)
    buffers = pair.server.memory_bytes
    assert buffers == FIRST_CONTACTS_PER_PEER * 16384
    client, server = pair.connect()
    pair.drive()
    pair.advance(4.7)
    assert server.state is HandshakeState.QUEUED
    assert stall(pair, peer_key="elsewhere").state is HandshakeState.AWAIT_CONFIRM
    pair.advance(0.2)
    assert pair.server.memory_bytes == buffers + 16384
    pair.release("tcp")
    pair.drive()
    assert isinstance(pair.verdict(server), FellBack)
    assert isinstance(pair.verdict(client), FellBack)


def test_whoever_proposes_late_waits_no_longer_than_its_handshake_lasts() -> None:
    """The end of its handshake comes before that of the client's patience."""
    pair = CorePair()
    _, late = pair.connect()
    pair.tcp(late).is_deaf = True
    pair.drive()
    pair.advance(3.55)
    for _ in range(FIRST_CONTACTS_PER_PEER):
        pair.advance(FIRST_CONTACT_TURN)
        assert stall(pair).state is HandshakeState.AWAIT_CONFIRM
    pair.tcp(late).is_deaf = False
    pair.drive()
    assert late.state is HandshakeState.QUEUED
    pair.advance(SMALL.handshake_wait - pair.now + 0.01)
    assert isinstance(pair.verdict(late), FellBack)


def test_whoever_waits_joins_the_first_group_that_is_made() -> None:
    """Also while another first contact of the same kind still has its turn."""
    pair = CorePair()
    first = stall(pair)
    pair.advance(FIRST_CONTACT_TURN)
    second = stall(pair)
    pair.tcp(second).peer.is_deaf = True
    client, server = pair.connect()
    pair.drive()
    assert server.state is HandshakeState.QUEUED
    pair.release("tcp")
    pair.drive()
    assert second.state is HandshakeState.AWAIT_CONFIRM
    for each in (first, server, client):
        assert isinstance(pair.verdict(each), Established)
    assert server.group is first.group


def test_the_end_of_one_lets_just_the_next_begin() -> None:
    pair = CorePair()
    pair.withhold(pair.server, RegisterMemory)
    first = stall(pair)
    others = [stall(pair) for _ in range(3)]
    assert [each.state.name for each in others] == ["QUEUED"] * 3
    pair.abandon(first)
    assert [each.state.name for each in others] == ["PREPARING", "QUEUED", "QUEUED"]
    pair.advance(FIRST_CONTACT_TURN)
    assert [each.state.name for each in others] == ["PREPARING"] * 2 + ["QUEUED"]
    pair.advance(20)
    pair.check_released()


def as_linux_proposes(proposal: clc.Proposal) -> clc.Proposal:
    """A kernel without RoCEv1 fills neither its ID nor the version 1 path."""
    return replace(proposal, peer_id=bytes(8), gid=bytes(16), mac=bytes(6))


def test_a_peer_that_proposes_no_id_is_known_by_its_gid() -> None:
    """Linux 6.12 tells its ID with the Confirm alone."""
    pair = CorePair(server_offers=(make_offer(1, "verbs", "LAN"),))
    groups = []
    for number in (5, 5, 6):
        _, server = pair.connect(offers=(make_offer(number, "verbs", "LAN"),))
        pair.rewrite(server, as_linux_proposes)
        pair.drive()
        connection = pair.connection(server)
        remote = connection.link.remote
        assert remote is not None
        assert any(remote.peer_id), "taken from the Confirm"
        assert any(remote.mac)
        groups.append(connection.group.number)
    assert groups == [1, 1, 2]
    pair.shutdown()
