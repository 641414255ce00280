"""LLC messages about links."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smcproto.constants import AddLinkReject, DeleteLinkReason, Mtu
from smcproto.errors import DecodeError, EncodeError
from smcproto.llc_links import (
    AddLink,
    AddLinkContinuation,
    ConfirmLink,
    DeleteLink,
    RequestAddLink,
    RkeyPair,
    TestLink,
)

GID = bytes(range(16))
CONFIRM = ConfirmLink(
    version=1,
    response=False,
    mac=bytes(6),
    gid=GID,
    qp_number=1,
    link_number=1,
    link_user_id=0x101,
    max_links=2,
)
ADD = AddLink(
    version=2,
    response=False,
    mac=bytes(6),
    gid=GID,
    qp_number=1,
    link_number=2,
    mtu_code=5,
    psn=3,
    client_target_gid=GID,
    direct=True,
    rkeys=(RkeyPair(1, 2, 3),),
)
ADD_V1 = replace(ADD, version=1, client_target_gid=None, direct=False, rkeys=())


def test_confirm_link_says_that_there_is_no_eye_catcher():
    """Linux aborts with RMBE_EYECATCHER unless one of the two bits is set."""
    assert CONFIRM.build()[3] == 0x03
    assert replace(CONFIRM, response=True).build()[3] == 0x83
    assert replace(CONFIRM, no_eyecatcher=0).build()[3] == 0


def test_max_connections_is_reserved_in_version_1():
    data = bytearray(CONFIRM.build())
    data[35] = 0xFF
    assert ConfirmLink.parse(bytes(data)) == CONFIRM
    with pytest.raises(EncodeError, match="version 1 has no max_connections"):
        replace(CONFIRM, max_connections=1).build()


@pytest.mark.parametrize("count", [0, 1, 2, 254, 255])
def test_the_number_of_keys_follows_from_the_length(count):
    message = replace(ADD, rkeys=tuple(RkeyPair(n, n, n) for n in range(count)))
    data = message.build()
    assert len(data) == 72 + 16 * count
    assert data[70:72] == count.to_bytes(2, "big")
    assert AddLink.parse(data) == message
    assert AddLink.parse(data[:70] + b"\xff\xff" + data[72:]) == message


def test_a_linux_of_either_byte_order_reads_the_number_of_keys():
    message = replace(ADD, rkeys=(RkeyPair(1, 2, 3),) * 200)
    data = message.build(for_linux=True)
    assert data[70:72] == b"\xc8\xc8"
    assert AddLink.parse(data) == message


def test_keys_and_target_need_the_extension():
    bare = replace(ADD, client_target_gid=None, direct=False, rkeys=())
    assert len(bare.build()) == 44
    assert AddLink.parse(bare.build()) == bare


def test_an_add_link_request_of_zeros_is_refused_both_ways():
    """Linux takes it for an event of its own."""
    zeros = replace(
        ADD_V1, gid=bytes(16), qp_number=0, link_number=0, mtu_code=0, psn=0
    )
    with pytest.raises(EncodeError, match="request of zeros"):
        zeros.build()
    answer = replace(zeros, response=True)
    assert AddLink.parse(answer.build()) == answer
    for noise in (bytes(40), bytes(6) + b"\xff\xff" + bytes(24) + b"\xff" * 8):
        with pytest.raises(DecodeError, match="request of zeros"):
            AddLink.parse(b"\2,\0\0" + noise)


def test_a_refusal_of_version_1_has_a_reason(proto):
    found = AddLink.parse(proto.hex_of("L5"))
    assert found.rejected
    assert found.reject_reason is AddLinkReject.NO_ALTERNATE_PATH
    assert "rejected=1" in str(found)
    data = bytearray(proto.hex_of("L3"))
    data[2] = 0x01  # Reserved in a request.
    assert AddLink.parse(bytes(data)) == AddLink.parse(proto.hex_of("L3"))


def test_an_invitation_of_a_version_1_client_is_read():
    """Only MAC and GID are filled in."""
    invitation = replace(ADD_V1, qp_number=0, link_number=0, mtu_code=0, psn=0)
    assert AddLink.parse(invitation.build()) == invitation


def test_known_codes_are_members_and_others_numbers():
    assert AddLink.parse(ADD.build()).mtu_code is Mtu.BYTES_4096
    assert AddLink.parse(replace(ADD, mtu_code=0).build()).mtu_code == 0
    delete = DeleteLink(1, response=False, link_number=1, reason=0x00010000)
    assert DeleteLink.parse(delete.build()).reason is DeleteLinkReason.LOST_PATH
    other = replace(delete, reason=0x77)
    assert DeleteLink.parse(other.build()) == other


def test_continuations_count_down():
    pairs = (RkeyPair(1, 2, 3), RkeyPair(4, 5, 6))
    first = AddLinkContinuation(1, False, 2, pairs, remaining=5)
    assert first.build()[5] == 5
    assert AddLinkContinuation.parse(first.build()) == first
    assert "remaining=5" in str(first)
    empty = AddLinkContinuation(1, True, 2)
    assert AddLinkContinuation.parse(empty.build()) == empty
    assert "remaining=0" in str(empty)


def test_entries_beyond_the_count_are_ignored():
    data = bytearray(AddLinkContinuation(1, False, 2, (RkeyPair(1, 2, 3),)).build())
    data[24:40] = b"\xff" * 16
    assert AddLinkContinuation.parse(bytes(data)).rkeys == (RkeyPair(1, 2, 3),)


@pytest.mark.parametrize(("count", "size"), [(0, 44), (1, 44), (2, 60), (255, 4108)])
def test_request_add_link_has_room_for_its_gids(count, size):
    message = RequestAddLink(response=False, gids=(GID,) * count)
    assert len(message.build()) == size
    assert RequestAddLink.parse(message.build()) == message


def test_a_refusal_of_linux_to_add_a_link_is_read():
    found = RequestAddLink.parse(b"\x25\x2c\0\x80" + bytes(40))
    assert found == RequestAddLink(response=True)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (replace(CONFIRM, version=3), "version"),
        (replace(CONFIRM, no_eyecatcher=4), "no_eyecatcher"),
        (replace(CONFIRM, max_links=256), "max_links"),
        (replace(CONFIRM, gid=b""), "gid"),
        (replace(ADD, version=1), "client_target_gid"),
        (replace(ADD, version=3), "version"),
        (replace(ADD, client_target_gid=None), "client_target_gid"),
        (replace(ADD_V1, direct=True), "client_target_gid"),
        (replace(ADD, rkeys=(RkeyPair(1, 2, 3),) * 256), "rkeys"),
        (replace(ADD, rkeys=(RkeyPair(1 << 32, 2, 3),)), "rkeys"),
        (replace(ADD, client_target_gid=bytes(15)), "client_target_gid"),
        (replace(ADD, reject_reason=1), "reject_reason"),
        (replace(ADD_V1, reject_reason=1), "reject_reason"),
        (replace(ADD_V1, response=True, reject_reason=1), "reject_reason"),
        (
            replace(ADD_V1, response=True, rejected=True, reject_reason=16),
            "reject_reason",
        ),
        (replace(ADD, psn=1 << 24), "psn"),
        (AddLinkContinuation(2, False, 1), "version"),
        (AddLinkContinuation(1, False, 1, (RkeyPair(1, 2, 3),) * 3), "rkeys"),
        (AddLinkContinuation(1, False, 1, (), remaining=1), "remaining"),
        (
            AddLinkContinuation(1, False, 1, (RkeyPair(1, 2, 3),) * 2, remaining=256),
            "remaining",
        ),
        (DeleteLink(1, False, 256, 0), "link_number"),
        (DeleteLink(1, False, 0, 1 << 32), "reason"),
        (DeleteLink(0, False, 0, 0), "version"),
        (RequestAddLink(False, (GID,), version=1), "version"),
        (RequestAddLink(False, (b"",)), "gids"),
        (RequestAddLink(False, (GID,) * 256), "gid_count"),
        (TestLink(1, False, bytes(15)), "user_data"),
        (TestLink(4, False), "version"),
    ],
)
def test_what_does_not_fit_is_not_built(message, field):
    with pytest.raises(EncodeError) as caught:
        message.build()
    assert caught.value.field == field


def test_they_can_be_logged():
    assert str(CONFIRM).startswith("CONFIRM_LINK version=1 request link=1")
    assert "rkeys=1" in str(ADD)
    whole = DeleteLink(2, True, 0, 0x00030000, whole_group=True, orderly=False)
    assert str(whole) == "DELETE_LINK version=2 response whole group reason=00030000"
    assert "link=3 orderly" in str(DeleteLink(1, False, 3, 0, orderly=True))
    assert GID.hex() in str(RequestAddLink(False, (GID,)))
    assert "user_data=00" in str(TestLink(1, False))
