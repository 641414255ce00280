"""The TCP option is found wherever it lies among others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smcproto.errors import DecodeError
from smcproto.tcp_option import KIND, OPTION_BYTES, SmcOption

OPTION = bytes.fromhex("fe06e2d4c3d9")
# Options that others send: none is ours, whatever is in it.
OTHERS = (
    st.just(b"\1")
    | st.binary(max_size=6).map(lambda body: bytes((8, 2 + len(body))) + body)
    | st.binary(max_size=6).map(lambda body: bytes((253, 2 + len(body))) + body)
    | st.just(bytes.fromhex("fe06e2d4c3c4"))
    | st.just(bytes.fromhex("fe04f989"))
)


def test_it_is_six_bytes():
    assert SmcOption().build() == OPTION
    assert len(OPTION) == OPTION_BYTES
    assert OPTION[0] == KIND
    assert bytes.fromhex("0101fe06e2d4c3d9") == SmcOption.NOP_PADDED + OPTION
    assert str(SmcOption()) == "TCP option 254: SMC-R"


@given(st.lists(OTHERS, max_size=4), st.binary(max_size=2))
def test_it_is_found_behind_others(before, behind):
    options = b"".join(before) + OPTION + behind
    assert SmcOption.parse(options[:40]) == SmcOption()


@given(st.lists(OTHERS, max_size=5))
def test_it_is_not_found_where_it_is_not(others):
    with pytest.raises(DecodeError):
        SmcOption.parse(b"".join(others))


def test_what_follows_the_end_of_the_list_is_padding():
    with pytest.raises(DecodeError) as caught:
        SmcOption.parse(b"\1\0" + OPTION)
    assert (caught.value.field, caught.value.offset) == ("kind", 2 - 1)


@pytest.mark.parametrize("size", [41, 44, 65536])
def test_more_than_a_segment_can_hold_is_refused(size):
    with pytest.raises(DecodeError, match=f"{size} bytes"):
        SmcOption.parse(OPTION.ljust(size, b"\1"))


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_or_the_option(data):
    try:
        found = SmcOption.parse(data)
    except DecodeError:
        return
    assert found == SmcOption()
    assert OPTION in data
