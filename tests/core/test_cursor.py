"""Positions and cursors: every edge, and every lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysmc.core.cursor import Cursor, Ring
from pysmc.errors import RemoteProtocolError

BASES = st.sampled_from([0, 4])
SIZES = st.integers(5, 40) | st.sampled_from([16384, 65536, 512 << 20])
# Positions near the beginning, near the end of an element, and near the end of all the
# wraps that 16 bits can count.
WRAPS = st.sampled_from([0, 1, 2, 65534, 65535, 65536, 65537, 200_000])


def near(ring: Ring, wrap: int, delta: int) -> int:
    return max(0, wrap * ring.capacity + delta)


@given(SIZES, BASES, WRAPS, st.integers(-3, 3))
def test_a_cursor_is_wraps_and_an_offset_in_the_element(
    size: int, base: int, wrap: int, delta: int
) -> None:
    ring = Ring(size, base)
    position = near(ring, wrap, delta)
    cursor = ring.cursor(position)
    assert cursor.packed == ring.pack(position)
    assert cursor.wrap == position // (size - base) % 65536
    assert base <= cursor.count < size
    assert cursor.count == ring.offset(position)


@given(SIZES, BASES, WRAPS, st.integers(-3, 3), st.data())
def test_every_allowed_step_is_followed(
    size: int, base: int, wrap: int, delta: int, data: st.DataObject
) -> None:
    ring = Ring(size, base)
    position = near(ring, wrap, delta)
    allowed = data.draw(st.integers(0, ring.capacity), "allowed")
    step = data.draw(st.sampled_from([0, allowed, allowed // 2]), "step")
    packed = ring.pack(position + step)
    assert ring.advance(position, packed, allowed, "producer") == position + step


@given(SIZES, BASES, WRAPS, st.integers(-3, 3), st.data())
def test_a_step_too_far_is_refused_and_a_step_back_ignored(
    size: int, base: int, wrap: int, delta: int, data: st.DataObject
) -> None:
    ring = Ring(size, base)
    position = near(ring, wrap, delta)
    allowed = data.draw(st.integers(0, ring.capacity), "allowed")
    half = ring.modulus >> 1
    beyond = data.draw(st.sampled_from([allowed + 1, half - 1]), "beyond")
    with pytest.raises(RemoteProtocolError, match=f"advanced {beyond} bytes; allowed"):
        ring.advance(position, ring.pack(position + beyond), allowed, "consumer")
    back = data.draw(st.sampled_from([1, ring.capacity, half]), "back")
    older = ring.pack((position - back) % ring.modulus)
    assert ring.advance(position, older, allowed, "producer") == position


@given(SIZES, BASES, st.integers(0, 65535), st.data())
def test_a_cursor_outside_the_element_is_refused(
    size: int, base: int, wrap: int, data: st.DataObject
) -> None:
    ring = Ring(size, base)
    outside = [size, size + 1, 0xFFFFFFFF, *([0, base - 1] if base else [])]
    count = data.draw(st.sampled_from(outside))
    packed = Cursor(wrap, count).packed
    with pytest.raises(RemoteProtocolError, match=rf"cursor {count} lies outside"):
        ring.advance(0, packed, ring.capacity, "producer")


@given(SIZES, BASES, st.integers(0, (1 << 48) - 1), st.data())
def test_whatever_the_wire_says_a_position_never_leaves_its_window(
    size: int, base: int, packed: int, data: st.DataObject
) -> None:
    ring = Ring(size, base)
    position = near(ring, data.draw(WRAPS), 0)
    allowed = data.draw(st.integers(0, ring.capacity))
    try:
        after = ring.advance(position, packed, allowed, "producer")
    except RemoteProtocolError:
        return
    assert position <= after <= position + allowed


@given(SIZES, BASES, WRAPS, st.integers(-3, 3), st.data())
def test_pieces_cover_the_range_once_and_in_order(
    size: int, base: int, wrap: int, delta: int, data: st.DataObject
) -> None:
    ring = Ring(size, base)
    position = near(ring, wrap, delta)
    count = data.draw(st.sampled_from([0, 1, ring.capacity // 2, ring.capacity]))
    pieces = ring.pieces(position, count)
    assert sum(length for _, length in pieces) == count
    assert len(pieces) <= 2
    assert all(length > 0 for _, length in pieces)
    at = position
    for offset, length in pieces:
        assert offset == ring.offset(at)
        assert offset + length <= size
        at += length


def test_an_element_keeps_its_eye_catcher() -> None:
    """RFC 7609 4.7.2: with an eye catcher, cursors begin at 4 and wrap to 4."""
    ring = Ring(16384, base=4)
    assert ring.capacity == 16380
    assert ring.cursor(0) == Cursor(0, 4)
    assert ring.cursor(16379) == Cursor(0, 16383)
    assert ring.cursor(16380) == Cursor(1, 4)
    assert ring.advance(0, Cursor(1, 4).packed, ring.capacity, "producer") == 16380


def test_an_element_without_room_is_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match="the data area is empty"):
        Ring(4, base=4)
