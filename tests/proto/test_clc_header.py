"""The first eight bytes decide how much is read, and refuse early."""

from __future__ import annotations

import pytest

from smcproto.clc_header import ClcHeader, open_frame, parse_header
from smcproto.constants import EYECATCHER_SMCD, EYECATCHER_SMCR, ClcType
from smcproto.errors import DecodeError


def header(kind: int, length: int, version: int, *, smcd: bool = False) -> bytes:
    eyecatcher = EYECATCHER_SMCD if smcd else EYECATCHER_SMCR
    return eyecatcher + bytes((kind,)) + length.to_bytes(2, "big") + bytes((version,))


def possible(kind: int, version: int, *, smcd: bool = False) -> list[int]:
    """Every length that a header may declare; far from any limit in steps."""
    lengths = []
    for length in [*range(1500), *range(1500, 65536, 127), 65535]:
        try:
            found = parse_header(header(kind, length, version << 4, smcd=smcd))
        except DecodeError:
            continue
        assert found == ClcHeader(ClcType(kind), length, version, smcd)
        lengths.append(length)
    return lengths


@pytest.mark.parametrize(
    ("kind", "version", "smcd", "lengths"),
    [
        (1, 1, False, range(52, 653)),
        (1, 2, False, range(52, 653)),
        (2, 1, False, [68]),
        (2, 2, False, [108, 160]),
        (2, 1, True, [48]),
        (2, 2, True, [78, 114, 130]),
        (3, 1, False, [68]),
        (3, 2, False, [108, *range(164, 1025, 16)]),
        (3, 2, True, [78, 114, 130]),
        (4, 1, False, [28]),
        (4, 2, False, [44]),
    ],
)
def test_every_length_is_judged_at_the_header(kind, version, smcd, lengths):
    assert possible(kind, version, smcd=smcd) == list(lengths)


@pytest.mark.parametrize("kind", [0, 5, 6, 255])
def test_an_unknown_type_is_refused(kind):
    with pytest.raises(DecodeError, match=f"type {kind} is unknown"):
        parse_header(header(kind, 68, 0x10))


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_version_0_is_refused(kind):
    with pytest.raises(DecodeError, match="of version 0"):
        parse_header(header(kind, 68, 0x0F))


@pytest.mark.parametrize("kind", [2, 3])
def test_an_answer_of_an_unknown_version_is_refused(kind):
    with pytest.raises(DecodeError, match="of version 3"):
        parse_header(header(kind, 108, 0x30))


@pytest.mark.parametrize(("kind", "length"), [(1, 92), (4, 44)])
def test_an_offer_of_a_later_version_is_read_as_version_2(kind, length):
    assert parse_header(header(kind, length, 0xF0)).version == 15


@pytest.mark.parametrize(("kind", "length"), [(1, 52), (4, 28)])
def test_the_eye_catcher_of_smcd_is_for_answers_only(kind, length):
    with pytest.raises(DecodeError, match="eye catcher of SMC-D"):
        parse_header(header(kind, length, 0x10, smcd=True))


@pytest.mark.parametrize("size", range(8))
def test_less_than_a_header_is_refused(size):
    with pytest.raises(DecodeError) as caught:
        parse_header(header(4, 28, 0x10)[:size])
    assert caught.value.field == "length"
    assert caught.value.offset == size


def test_what_follows_the_header_is_not_looked_at():
    assert parse_header(header(4, 28, 0x10) + b"GET / HTTP/1.1").length == 28


def test_application_data_is_never_taken_for_a_message():
    with pytest.raises(DecodeError, match="47455420 are no eye catcher"):
        parse_header(b"GET / HTTP/1.1\r\n")


def test_a_frame_ends_where_its_header_says(proto):
    data = proto.hex_of("C9")
    found, message = open_frame(bytearray(data))
    assert found.type is ClcType.DECLINE
    assert message == data
    for wrong in (data[:-1], data + b"x"):
        with pytest.raises(DecodeError, match="the header says 28"):
            open_frame(wrong)
    with pytest.raises(DecodeError) as caught:
        open_frame(data[:-4] + EYECATCHER_SMCD)
    assert (caught.value.field, caught.value.offset) == ("trailer", 24)
