"""LLC messages about remote keys."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smcproto.errors import DecodeError, EncodeError
from smcproto.llc_rkeys import (
    ConfirmRkey,
    ConfirmRkeyContinuation,
    DeleteRkey,
    OtherLink,
)

LINK = OtherLink(2, 3, 4)
CONFIRM = ConfirmRkey(
    version=1, response=False, rkey=1, virtual_address=2, other_links=(LINK,)
)
DELETE = DeleteRkey(version=2, response=False, rkeys=(1, 2))


def test_the_answer_repeats_the_request():
    request = CONFIRM.build()
    answer = replace(CONFIRM, response=True).build()
    assert answer == request[:3] + b"\x80" + request[4:]


def test_a_refusal_may_ask_to_try_again(proto):
    found = ConfirmRkey.parse(proto.hex_of("L13"))
    assert (found.refused, found.retry) == (True, True)
    assert "refused retry" in str(found)


def test_further_links_follow_in_continuations():
    first = replace(CONFIRM, other_links=(LINK, LINK), other_count=5)
    assert first.build()[4] == 5
    assert ConfirmRkey.parse(first.build()) == first
    rest = ConfirmRkeyContinuation(1, False, (LINK,) * 3)
    assert rest.build()[4] == 3
    assert ConfirmRkeyContinuation.parse(rest.build()) == rest
    assert "remaining=3" in str(rest)
    more = replace(rest, remaining=4, refused=True)
    assert ConfirmRkeyContinuation.parse(more.build()) == more
    assert "refused remaining=4" in str(more)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 255])
def test_a_version_2_request_has_room_for_its_keys(count):
    message = replace(DELETE, rkeys=tuple(range(count)))
    assert len(message.build()) == max(44, 8 + 4 * count)
    assert DeleteRkey.parse(message.build()) == message


@pytest.mark.parametrize("count", range(9))
def test_a_version_1_request_has_up_to_8_keys(count):
    message = DeleteRkey(1, False, tuple(range(count)))
    assert len(message.build()) == 44
    assert DeleteRkey.parse(message.build()) == message


@pytest.mark.parametrize("count", [1, 9, 10, 200, 255])
def test_linux_answers_with_44_bytes_and_the_count(count):
    """Kernel: smc_llc.c, smc_llc_rmt_delete_rkey; the keys are zeroed."""
    data = bytes((0x29, 0x2C, 0, 0xA0, count, 3)) + bytes(38)
    found = DeleteRkey.parse(data)
    assert found.refused
    assert found.invalid_count == 3
    assert found.rkeys == (0,) * min(count, 9)
    assert found.count == (count if count > 9 else None)
    assert DeleteRkey.parse(found.build()) == found


def test_an_answer_may_repeat_all_keys():
    data = replace(DELETE, rkeys=tuple(range(20))).build()
    answer = data[:3] + b"\x80" + data[4:]
    assert DeleteRkey.parse(answer).rkeys == tuple(range(20))


def test_errors_are_a_mask_in_version_1_and_a_number_in_version_2():
    one = DeleteRkey(1, True, (1,), refused=True, error_mask=0x80)
    assert DeleteRkey.parse(one.build()) == one
    two = DeleteRkey(2, True, (1,), refused=True, invalid_count=1)
    assert DeleteRkey.parse(two.build()) == two
    assert one.build()[5] == 0x80
    assert two.build()[5] == 1


def test_more_keys_than_there_is_room_for_are_refused():
    with pytest.raises(DecodeError, match="9 keys, at most 8"):
        DeleteRkey.parse(bytes((9, 44, 0, 0, 9)) + bytes(39))
    with pytest.raises(DecodeError, match="44 bytes received where the content has 48"):
        DeleteRkey.parse(bytes((0x29, 0, 44, 0, 10)) + bytes(39))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (replace(CONFIRM, version=3), "version"),
        (replace(CONFIRM, other_links=(LINK,) * 3), "other_links"),
        (replace(CONFIRM, other_count=2), "other_count"),
        (replace(CONFIRM, rkey=1 << 32), "rkey"),
        (replace(CONFIRM, other_links=(OtherLink(256, 1, 1),)), "other_links"),
        (ConfirmRkeyContinuation(2, False), "version"),
        (ConfirmRkeyContinuation(1, False, (LINK,) * 4), "other_links"),
        (ConfirmRkeyContinuation(1, False, (LINK,), remaining=2), "remaining"),
        (DeleteRkey(1, False, (1,) * 9), "rkeys"),
        (replace(DELETE, rkeys=(1,) * 256), "rkeys"),
        (replace(DELETE, rkeys=(1 << 32,)), "rkeys"),
        (replace(DELETE, rkeys=(-1,)), "rkeys"),
        (replace(DELETE, count=9), "count"),
        (DeleteRkey(1, True, (1,), count=2), "count"),
        (DeleteRkey(2, True, (1,), count=2), "count"),
        (DeleteRkey(2, True, (1,), error_mask=1), "error_mask"),
        (DeleteRkey(1, True, (1,), invalid_count=1), "invalid_count"),
        (DeleteRkey(2, True, (1,), invalid_count=256), "invalid_count"),
        (replace(DELETE, version=3), "version"),
    ],
)
def test_what_does_not_fit_is_not_built(message, field):
    with pytest.raises(EncodeError) as caught:
        message.build()
    assert caught.value.field == field


def test_they_can_be_logged():
    assert "link 2: rkey=0x3 va=0x4" in str(CONFIRM)
    assert str(DELETE) == "DELETE_RKEY version=2 request rkeys=0x1,0x2"
    assert "refused" in str(replace(DELETE, refused=True))
