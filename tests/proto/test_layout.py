"""construct's quirks stay inside the layouts."""

from __future__ import annotations

import gc
from enum import IntEnum, IntFlag
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import smcproto.clc
import smcproto.llc
import smcproto.tcp_option  # with these, all layouts are there
from smcproto.constants import (
    CDC_BYTES,
    CDC_TYPE,
    EYECATCHER_SMCD,
    EYECATCHER_SMCR,
)
from smcproto.errors import DecodeError, EncodeError
from smcproto.layout import (
    Bit,
    Layout,
    Rows,
    bits,
    code,
    constant,
    decode_text,
    encode_text,
    flags,
    raw,
    reserved,
    text,
    uint,
    words,
)


class Colour(IntEnum):
    RED = 1


class Switch(IntFlag):
    ON = 0x80
    LOUD = 0x01


LAYOUT = Layout(
    "sample",
    constant("magic", b"\xab"),
    uint("number", 3),
    code("colour", 2, Colour),
    flags("switches", Switch),
    reserved(1),
    bits(Bit("high", 0xE0), Bit("flag", 0x10, bool), Bit("low", 0x03)),
    raw("key", 2),
    text("name", 4),
    words("extra", 2),
    start=10,
)
BYTES = bytes.fromhex("ab 010203 0001 81 00 72 beef 41422020 00000001 ffffffff")
VALUES = {
    "number": 0x010203,
    "colour": Colour.RED,
    "switches": Switch.ON | Switch.LOUD,
    "high": 3,
    "flag": True,
    "low": 2,
    "key": b"\xbe\xef",
    "name": "AB",
    "extra": (1, 0xFFFFFFFF),
}


def test_a_layout_reads_and_writes_plain_values():
    assert LAYOUT.size == len(BYTES)
    assert LAYOUT.parse(BYTES) == VALUES
    assert type(LAYOUT.parse(BYTES)) is dict
    assert LAYOUT.build(VALUES) == BYTES
    assert LAYOUT.parse(b"??" + BYTES + b"??", 2) == VALUES


def test_members_are_members():
    values = LAYOUT.parse(BYTES)
    assert values["colour"] is Colour.RED
    assert isinstance(values["switches"], Switch)
    assert values["flag"] is True
    unknown = LAYOUT.parse(BYTES[:4] + b"\x00\x02" + BYTES[6:])
    assert unknown["colour"] == 2
    assert type(unknown["colour"]) is int


def test_reserved_bits_are_ignored_and_written_as_zeros():
    noisy = bytearray(BYTES)
    noisy[6] |= 0x7E
    noisy[7] = 0xFF
    noisy[8] |= 0x0C
    assert LAYOUT.parse(bytes(noisy)) == VALUES


def test_a_wrong_constant_is_refused_with_its_place():
    with pytest.raises(DecodeError) as caught:
        LAYOUT.parse(b"\xaa" + BYTES[1:])
    assert (caught.value.field, caught.value.offset) == ("magic", 10)


@pytest.mark.parametrize(
    ("field", "value", "offset"),
    [
        ("number", 1 << 24, 11),
        ("number", -1, 11),
        ("number", "1", 11),
        ("number", None, 11),
        ("colour", 1 << 16, 14),
        ("switches", 0x02, 16),
        ("high", 8, 18),
        ("high", -1, 18),
        ("high", "1", 18),
        ("low", 4, 18),
        ("flag", 2, 18),
        ("key", b"1", 19),
        ("key", b"123", 19),
        ("key", 258, 19),
        ("key", "ab", 19),
        ("name", "ABCDE", 21),
        ("name", "A ", 21),
        ("name", "\u20ac", 21),
        ("extra", (1,), 25),
        ("extra", (1, 1 << 32), 25),
        ("extra", 7, 25),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_place(field, value, offset):
    with pytest.raises(EncodeError) as caught:
        LAYOUT.build(VALUES | {field: value})
    assert (caught.value.field, caught.value.offset) == (field, offset)
    assert str(caught.value).startswith("sample: ")


def test_a_misspelt_or_missing_name_is_our_own_mistake():
    """construct would build without a word of complaint."""
    with pytest.raises(AssertionError, match="nmae"):
        LAYOUT.build(VALUES | {"nmae": "AB"})
    with pytest.raises(AssertionError, match="number"):
        LAYOUT.build(
            {name: value for name, value in VALUES.items() if name != "number"}
        )


def test_too_few_bytes_are_our_own_mistake():
    with pytest.raises(AssertionError, match="the caller checks"):
        LAYOUT.parse(BYTES[:-1])


def test_values_may_come_from_attributes():
    class Source:
        number = 1
        colour = 1
        switches = 0
        high = low = 0
        flag = False
        key = b"12"
        name = ""

    assert LAYOUT.build_from(Source(), extra=(0, 0))[-14:] == b"12" + b"    " + bytes(8)


@pytest.mark.parametrize("value", ["", "A", "AB CD", "\xff\0", "A" * 8])
def test_text_survives_its_padding(value):
    padded = encode_text(value, 8, "name")
    assert len(padded) == 8
    assert decode_text(padded) == value


ROWS = Rows("rows", "H4s")


def test_rows_are_read_and_written_at_once():
    data = b"?" + bytes.fromhex("0001 61626364 ffff 00000000") + b"?"
    rows = [(1, b"abcd"), (0xFFFF, bytes(4))]
    assert list(ROWS.parse(data, 1, 2)) == rows
    assert list(ROWS.parse(data, 1, 0)) == []
    assert ROWS.build(rows) == data[1:-1]
    assert ROWS.size == 6
    with pytest.raises(AssertionError, match="the caller checks"):
        ROWS.parse(data, 4, 2)


@pytest.mark.parametrize(
    "row", [(1, b"abc"), (1, b"abcde"), (1 << 16, b"abcd"), (-1, b"abcd")]
)
def test_a_row_that_does_not_fit_is_refused(row):
    with pytest.raises(EncodeError) as caught:
        ROWS.build([(1, b"abcd"), row])
    assert caught.value.field == "rows"


# struct's path and construct's: whatever is read or written is the same.


LAYOUTS = [each for each in gc.get_objects() if type(each) is Layout]
CONSTANTS = (
    b"",
    b"\xab",
    EYECATCHER_SMCR,
    EYECATCHER_SMCD,
    bytes((CDC_TYPE, CDC_BYTES)),
    bytes((smcproto.tcp_option.KIND, smcproto.tcp_option.OPTION_BYTES))
    + EYECATCHER_SMCR,
)
"""What layouts begin with that begin with something."""
ODD = st.one_of(
    st.sampled_from(
        [None, True, 1.0, "", "A", "A ", "\u20ac", (), (1,), (-1, 0, 0, 0)]
    ),
    st.sampled_from([b"", b"\0", b"\0" * 300, bytearray(4), memoryview(b"1234")]),
    st.sampled_from([Colour.RED, Switch.LOUD, -1, 0, 1, 7, 15, 1 << 32, 1 << 64]),
    st.builds(lambda bits: (1 << bits) - 1, st.integers(1, 64)),
    st.builds(lambda bits: 1 << bits, st.integers(1, 64)),
)
"""What may be given for a value."""


def well_begun(layout: Layout, message: bytes) -> bytes:
    """Put the layout's own constants at the beginning."""
    for constants in CONSTANTS:
        tried = constants + message[len(constants) :]
        try:
            layout.parse_by_construct(tried)
        except DecodeError:
            continue
        return tried
    raise AssertionError(layout.name)


def told(call: Any, *args: Any) -> Any:
    """Give what comes of a call, with the types of it, or all that its error says."""
    try:
        result = call(*args)
    except (DecodeError, EncodeError) as error:
        return type(error), error.field, error.offset, str(error)
    except (TypeError, AttributeError) as error:  # what no message can hold
        return type(error), str(error)
    if isinstance(result, dict):
        return {name: (type(value), value) for name, value in result.items()}
    return type(result), result


def test_all_layouts_are_found():
    assert len(LAYOUTS) >= 26
    assert {layout.name for layout in LAYOUTS} >= {"sample", "CDC", "SMC Decline"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.name)
@given(data=st.data())
def test_both_paths_read_the_same(layout, data):
    size = layout.size
    message = data.draw(st.binary(min_size=size, max_size=size))
    if data.draw(st.booleans()):
        message = well_begun(layout, message)
    before = data.draw(st.sampled_from([b"", b"????"]))
    place = (before + message + b"??", len(before))
    assert told(layout.parse, *place) == told(layout.parse_by_construct, *place)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.name)
@given(data=st.data())
def test_both_paths_write_the_same(layout, data):
    size = layout.size
    message = data.draw(st.binary(min_size=size, max_size=size))
    values = layout.parse(well_begun(layout, message))
    if layout.names:
        names = st.sampled_from(sorted(layout.names))
        values |= data.draw(st.dictionaries(names, ODD, max_size=2))
    assert told(layout.build, values) == told(layout.build_by_construct, values)
