"""Accept and Confirm: version, first contact and length go together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from smcproto.clc_contact import Accept, Confirm
from smcproto.clc_v2 import AcceptExtension, ConfirmExtension, FirstContactExtension
from smcproto.constants import Mtu
from smcproto.errors import DecodeError, EncodeError

FIELDS: dict[str, Any] = {
    "version": 1,
    "first_contact": True,
    "peer_id": bytes(8),
    "gid": bytes(16),
    "mac": bytes(6),
    "qp_number": 1,
    "rkey": 2,
    "rmbe_index": 1,
    "alert_token": 3,
    "rmbe_size_code": 2,
    "mtu_code": 5,
    "virtual_address": 4,
    "psn": 5,
}
ACCEPT = Accept(**FIELDS)
CONFIRM = Confirm(**FIELDS)
CONTACT = FirstContactExtension(
    direct=True, os_type=2, release=1, host_name="h", max_connections=16, max_links=1
)
ACCEPT_V2 = replace(ACCEPT, version=2, v2=AcceptExtension("EID", CONTACT))
CONFIRM_V2 = replace(
    CONFIRM, version=2, v2=ConfirmExtension("EID", CONTACT, (bytes(16),))
)


@pytest.mark.parametrize(
    ("message", "size", "byte_7"),
    [
        (ACCEPT, 68, 0x18),
        (replace(ACCEPT, first_contact=False), 68, 0x10),
        (CONFIRM, 68, 0x18),
        (replace(CONFIRM, first_contact=False), 68, 0x10),
        (ACCEPT_V2, 160, 0x28),
        (replace(ACCEPT_V2, first_contact=False, v2=AcceptExtension("E")), 108, 0x20),
        (CONFIRM_V2, 180, 0x28),
        (replace(CONFIRM_V2, v2=ConfirmExtension("E", CONTACT)), 164, 0x28),
        (
            replace(CONFIRM_V2, v2=ConfirmExtension("E", CONTACT, (bytes(16),) * 53)),
            1012,
            0x28,
        ),
        (replace(CONFIRM_V2, first_contact=False, v2=ConfirmExtension("E")), 108, 0x20),
    ],
)
def test_the_length_follows_from_version_and_first_contact(message, size, byte_7):
    data = message.build()
    assert (len(data), data[7]) == (size, byte_7)
    assert type(message).parse(data) == message


def test_a_confirm_of_first_contact_may_lack_the_flag():
    """RFC 7609 A.2.4 has no such flag; the length tells in version 2."""
    message = replace(CONFIRM_V2, first_contact=False)
    assert len(message.build()) == 180
    assert Confirm.parse(message.build()) == message


def test_a_reserved_mtu_code_is_a_number_for_the_core_to_decline():
    """RFC 7609: a reserved enumeration value means Decline, not an error."""
    found = Accept.parse(replace(ACCEPT, mtu_code=9).build())
    assert found.mtu_code == 9
    assert not isinstance(found.mtu_code, Mtu)
    assert Accept.parse(ACCEPT.build()).mtu_code is Mtu.BYTES_4096


@pytest.mark.parametrize("code", range(16))
def test_every_size_code_is_accepted(code):
    """The RFC stops at 5, Linux sends up to 15."""
    message = replace(ACCEPT, rmbe_size_code=code)
    assert Accept.parse(message.build()) == message


@pytest.mark.parametrize("message", [ACCEPT, CONFIRM, ACCEPT_V2, CONFIRM_V2])
def test_rmbe_index_0_is_refused_both_ways(message):
    with pytest.raises(EncodeError, match="indexes count from 1"):
        replace(message, rmbe_index=0).build()
    data = bytearray(message.build())
    data[45] = 0
    with pytest.raises(DecodeError, match="indexes count from 1"):
        type(message).parse(bytes(data))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (replace(ACCEPT, version=2), "v2"),
        (replace(ACCEPT_V2, version=1), "v2"),
        (replace(CONFIRM, version=2), "v2"),
        (replace(CONFIRM_V2, version=1), "v2"),
        (replace(ACCEPT, version=3), "version"),
        (replace(ACCEPT, version=0), "version"),
        (replace(ACCEPT_V2, version=3), "version"),
        (replace(CONFIRM, version=3), "version"),
        (replace(ACCEPT_V2, first_contact=False), "first_contact"),
        (replace(ACCEPT_V2, v2=AcceptExtension("E")), "first_contact"),
        (replace(CONFIRM_V2, v2=ConfirmExtension("E")), "first_contact"),
        (
            replace(
                CONFIRM_V2,
                first_contact=False,
                v2=ConfirmExtension("E", None, (bytes(16),)),
            ),
            "v2.gids",
        ),
        (
            replace(CONFIRM_V2, v2=ConfirmExtension("E", CONTACT, (bytes(16),) * 54)),
            "v2.gids",
        ),
        (
            replace(CONFIRM_V2, v2=ConfirmExtension("E", CONTACT, (bytes(15),))),
            "v2.gids",
        ),
        (replace(ACCEPT, qp_number=1 << 24), "qp_number"),
        (replace(ACCEPT, qp_number=-1), "qp_number"),
        (replace(ACCEPT, psn=1 << 24), "psn"),
        (replace(ACCEPT, rkey=1 << 32), "rkey"),
        (replace(ACCEPT, virtual_address=1 << 64), "virtual_address"),
        (replace(ACCEPT, rmbe_index=256), "rmbe_index"),
        (replace(ACCEPT, rmbe_size_code=16), "rmbe_size_code"),
        (replace(ACCEPT, mtu_code=16), "mtu_code"),
        (replace(ACCEPT, gid=bytes(15)), "gid"),
    ],
)
def test_what_does_not_fit_is_not_built(message, field):
    with pytest.raises(EncodeError) as caught:
        message.build()
    assert caught.value.field == field


def test_it_can_be_logged():
    assert str(ACCEPT).startswith("Accept version=1 first-contact")
    assert "first-contact" not in str(replace(ACCEPT, first_contact=False))
    assert "eid='EID'" in str(ACCEPT_V2)
    assert "gids=00000000000000000000000000000000" in str(CONFIRM_V2)
    reuse = replace(CONFIRM_V2, first_contact=False, v2=ConfirmExtension("E"))
    assert "gids" not in str(reuse)
