"""Type and length of LLC messages."""

from __future__ import annotations

import pytest

from smcproto.constants import LlcType
from smcproto.errors import DecodeError, EncodeError
from smcproto.llc_header import (
    FLAGS_AT,
    announced_count,
    build_message,
    is_ignorable,
    is_question,
    open_frame,
)

V1_TYPES = {1, 2, 3, 4, 6, 7, 8, 9}
V2_TYPES = {0x21, 0x22, 0x24, 0x25, 0x26, 0x27, 0x29}


@pytest.mark.parametrize("number", range(256))
def test_every_type_number_is_known_or_refused(number):
    data = bytes((number, 44)) + bytes(42)
    if number in V1_TYPES:
        assert open_frame(data) == (LlcType(number), 1, data)
    elif number in V2_TYPES:
        assert open_frame(data) == (LlcType(number - 0x20), 2, data)
    else:
        with pytest.raises(DecodeError) as caught:
            open_frame(data)
        assert caught.value.field == "type"
        assert caught.value.offset == 0


@pytest.mark.parametrize("size", [0, 1, 43, 45, 88, 8192, 8193])
def test_version_1_has_44_bytes(size):
    with pytest.raises(DecodeError) as caught:
        open_frame(bytes((7, 44)).ljust(size, b"\0")[:size])
    assert caught.value.field == "length"


@pytest.mark.parametrize(("size", "good"), [(43, False), (44, True), (8192, True),
                                            (8193, False), (65536, False)])  # fmt: skip
def test_version_2_has_44_to_8192_bytes(size, good):
    data = b"\x22".ljust(size, b"\1")
    if good:
        assert open_frame(data)[1:] == (2, data)
    else:
        with pytest.raises(DecodeError):
            open_frame(data)


@pytest.mark.parametrize("length", [0, 43, 45, 255])
def test_the_length_byte_of_version_1_must_be_44(length):
    with pytest.raises(DecodeError, match=f"44 bytes that says {length}"):
        open_frame(bytes((7, length)) + bytes(42))


@pytest.mark.parametrize(
    ("number", "ignorable"),
    [
        (0x0A, False),
        (0x40, False),
        (0x7F, False),
        (0x80, True),
        (0xBF, True),
        (0xC0, False),
        (0xFE, False),
    ],
)
def test_the_two_highest_bits_tell_what_may_be_ignored(number, ignorable):
    """RFC 7609 A.3: 10 is optional, 00 has to be supported."""
    assert is_ignorable(number) is ignorable


@pytest.mark.parametrize(
    ("start", "holds_up"),
    [
        ("07 2c 00 00", True),
        ("27 00 2c 00", True),
        ("29 2c 00 40", True),
        ("26 2c 00 80", False),
        ("24 2c 00 60", False),
        ("fe 2c 00 00", False),
        ("29 2c 00", False),
        ("", False),
    ],
)
def test_what_holds_its_sender_up_is_a_question(start, holds_up):
    data = bytes.fromhex(start)
    assert is_question(data) is holds_up


def test_a_body_is_padded_and_framed():
    assert build_message(LlcType.TEST_LINK, 1, b"\x80") == b"\7,\0\x80" + bytes(40)
    assert build_message(LlcType.TEST_LINK, 2, b"\x80") == b"'\0,\x80" + bytes(40)
    long = build_message(LlcType.ADD_LINK, 2, bytes(100))
    assert long == b"\x22\0\x67" + bytes(100)
    assert len(long) == FLAGS_AT + 100


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        (LlcType.REQUEST_ADD_LINK, 1),
        (LlcType.ADD_LINK_CONTINUATION, 2),
        (LlcType.CONFIRM_RKEY_CONTINUATION, 2),
        (LlcType.TEST_LINK, 0),
        (LlcType.TEST_LINK, 3),
    ],
)
def test_a_version_that_lacks_the_message_is_refused(kind, version):
    with pytest.raises(EncodeError, match=f"does not exist in version {version}"):
        build_message(kind, version, bytes(41))


def test_a_full_message_may_announce_more():
    assert announced_count("n", 2, None, 2) == 2
    assert announced_count("n", 1, 1, 2) == 1
    assert announced_count("n", 2, 7, 2) == 7
    for listed, announced in ((1, 2), (2, 1), (0, 5)):
        with pytest.raises(EncodeError):
            announced_count("n", listed, announced, 2)
