"""Messages for deliveries: genuine ones are taken, and every bound is there."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from pysmc.testing.deliver import EndpointIn
from pysmc.testing.messages import at_bounds, genuine
from pysmc.testing.states import STATES
from smcproto import cdc, clc, llc
from smcproto.constants import ProducerFlags


@pytest.mark.parametrize("state", STATES)
def test_a_genuine_message_is_one_that_the_peer_sends_there(state: str) -> None:
    endpoint = EndpointIn(state)
    before = endpoint.look()
    kinds = {type(message) for message in genuine(endpoint).values()}
    assert {type(message) for message in endpoint.awaited} <= kinds
    assert endpoint.look() == before
    assert set(get_args(clc.ClcMessage)) - kinds == {clc.SmcdConfirm}
    if endpoint.link is not None:
        assert set(get_args(llc.LlcMessage)) <= kinds
        assert (cdc.CdcMessage in kinds) == (endpoint.connection is not None)


@pytest.mark.parametrize("state", ["client/active", "server/active/unread"])
def test_a_genuine_update_breaks_no_rule(state: str) -> None:
    for name, message in genuine(EndpointIn(state)).items():
        if isinstance(message, cdc.CdcMessage):
            seen = EndpointIn(state).deliver(message)
            assert seen.after.error == "", (name, str(seen))


def test_the_bounds_of_a_message() -> None:
    message = llc.TestLink(version=2, response=False, user_data=b"7" * 16)
    found = [changed for _, changed in at_bounds(message)]
    expected = [replace(message, user_data=data) for data in (bytes(16), b"\xff" * 16)]
    expected += [replace(message, version=1), replace(message, response=True)]
    assert len(found) == len(expected)
    assert all(each in found for each in expected)


def test_bounds_reach_into_extensions_lists_and_flags() -> None:
    (accept,) = EndpointIn("client/await-accept").awaited
    names = [name for name, _ in at_bounds(accept)]
    assert "v2.eid='A'" in names
    assert "v2.first_contact.release=15" in names
    assert f"qp_number={0xFFFFFF}" in names
    assert f"qp_number={0xFFFFFFFF}" not in names
    keys = llc.DeleteRkey(version=2, response=False, rkeys=(1, 2))
    assert {message.rkeys for _, message in at_bounds(keys)} >= {(1,), (1, 1), (1, 2)}
    update = cdc.CdcMessage(1, 2, 3, 4, 5, 6)
    flags = {message.producer_flags for _, message in at_bounds(update)}
    assert set(ProducerFlags) <= flags
    assert all(message.build() for _, message in at_bounds(update))


def test_bounds_reach_into_the_entries_of_lists() -> None:
    link = llc.OtherLink(1, 2, 3)
    keys = llc.ConfirmRkey(2, False, 0x10, 0x20, (link, link))
    names = [name for name, _ in at_bounds(keys)]
    assert f"other_links[1].rkey={0xFFFFFFFF}" in names
    assert f"other_links[1].link_number={0xFF}" in names
    found = {message.other_links for _, message in at_bounds(keys)}
    assert (link, link._replace(virtual_address=0)) in found
    rows = llc.DeleteRkey(version=2, response=False, rkeys=(1, 2))
    assert (1, 0xFFFFFFFF) in {message.rkeys for _, message in at_bounds(rows)}
    gids = llc.RequestAddLink(response=False, gids=(b"1" * 16, b"2" * 16))
    lists = {message.gids for _, message in at_bounds(gids)}
    assert (b"1" * 16, b"\xff" * 16) in lists
