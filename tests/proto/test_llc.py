"""LLC as a whole: what is built is read again, and nothing else can happen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smcproto import llc
from smcproto.errors import DecodeError


def unsigned(width: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << width) - 1)


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def tuples(entries: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[Any]:
    return st.lists(entries, max_size=most).map(tuple)


VERSIONS = st.sampled_from([1, 2])
PAIRS = st.builds(llc.RkeyPair, unsigned(32), unsigned(32), unsigned(64))
OTHER_LINKS = st.builds(llc.OtherLink, unsigned(8), unsigned(32), unsigned(64))


@st.composite
def confirm_links(draw: st.DrawFn) -> llc.ConfirmLink:
    version = draw(VERSIONS)
    return llc.ConfirmLink(
        version=version,
        response=draw(st.booleans()),
        mac=draw(exactly(6)),
        gid=draw(exactly(16)),
        qp_number=draw(unsigned(24)),
        link_number=draw(unsigned(8)),
        link_user_id=draw(unsigned(32)),
        max_links=draw(unsigned(8)),
        max_connections=draw(unsigned(8)) if version == 2 else 0,
        no_eyecatcher=draw(unsigned(2)),
    )


@st.composite
def add_links(draw: st.DrawFn) -> llc.AddLink:
    version = draw(VERSIONS)
    response = draw(st.booleans())
    rejected = draw(st.booleans())
    target = draw(exactly(16) | st.none()) if version == 2 else None
    refusal = version == 1 and response and rejected
    return llc.AddLink(
        version=version,
        response=response,
        mac=draw(exactly(6)),
        gid=draw(exactly(16)),
        qp_number=draw(unsigned(24)),
        link_number=draw(st.integers(1, 255)),
        mtu_code=draw(unsigned(4)),
        psn=draw(unsigned(24)),
        rejected=rejected,
        reject_reason=draw(unsigned(4)) if refusal else 0,
        client_target_gid=target,
        direct=draw(st.booleans()) if target else False,
        rkeys=draw(tuples(PAIRS, 8)) if target else (),
    )


@st.composite
def add_link_continuations(draw: st.DrawFn) -> llc.AddLinkContinuation:
    rkeys = draw(tuples(PAIRS, 2))
    remaining = draw(st.integers(3, 255) | st.none()) if len(rkeys) == 2 else None
    return llc.AddLinkContinuation(
        1, draw(st.booleans()), draw(unsigned(8)), rkeys, remaining
    )


@st.composite
def confirm_rkeys(draw: st.DrawFn) -> llc.ConfirmRkey:
    others = draw(tuples(OTHER_LINKS, 2))
    return llc.ConfirmRkey(
        version=draw(VERSIONS),
        response=draw(st.booleans()),
        rkey=draw(unsigned(32)),
        virtual_address=draw(unsigned(64)),
        other_links=others,
        refused=draw(st.booleans()),
        retry=draw(st.booleans()),
        other_count=draw(st.integers(3, 255) | st.none()) if len(others) == 2 else None,
    )


@st.composite
def confirm_rkey_continuations(draw: st.DrawFn) -> llc.ConfirmRkeyContinuation:
    others = draw(tuples(OTHER_LINKS, 3))
    remaining = draw(st.integers(4, 255) | st.none()) if len(others) == 3 else None
    return llc.ConfirmRkeyContinuation(
        1, draw(st.booleans()), others, draw(st.booleans()), remaining
    )


@st.composite
def delete_rkeys(draw: st.DrawFn) -> llc.DeleteRkey:
    version = draw(VERSIONS)
    response = draw(st.booleans())
    rkeys = draw(tuples(unsigned(32), 8 if version == 1 else 20))
    count = None
    if version == 2 and response and len(rkeys) == 9:
        count = draw(st.integers(10, 255) | st.none())
    elif version == 2 and response and len(rkeys) > 9:
        response = False
    return llc.DeleteRkey(
        version=version,
        response=response,
        rkeys=rkeys,
        refused=draw(st.booleans()),
        error_mask=draw(unsigned(8)) if version == 1 else 0,
        invalid_count=draw(unsigned(8)) if version == 2 else 0,
        count=count,
    )


MESSAGES = (
    confirm_links()
    | add_links()
    | add_link_continuations()
    | st.builds(
        llc.DeleteLink,
        VERSIONS,
        st.booleans(),
        unsigned(8),
        unsigned(32),
        st.booleans(),
        st.booleans(),
    )
    | st.builds(llc.RequestAddLink, st.booleans(), tuples(exactly(16), 4))
    | confirm_rkeys()
    | confirm_rkey_continuations()
    | delete_rkeys()
    | st.builds(llc.TestLink, VERSIONS, st.booleans(), exactly(16))
)


@given(MESSAGES)
def test_what_is_built_is_read_again(message):
    data = message.build()

    assert llc.parse(data) == message
    assert type(message).parse(data) == message
    assert llc.parse(data).build() == data
    assert len(data) == 44 or message.version == 2


@given(MESSAGES, unsigned(16))
def test_the_length_field_of_version_2_is_not_looked_at(message, length):
    """Linux writes it in the byte order of its machine."""
    data = message.build()
    if message.version == 2:
        assert llc.parse(data[:1] + length.to_bytes(2, "big") + data[3:]) == message


@given(MESSAGES, st.data())
def test_a_damaged_message_is_refused_or_a_message(message, data):
    damaged = bytearray(message.build())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(unsigned(8))
    try:
        found = llc.parse(bytes(damaged))
    except DecodeError:
        return
    assert llc.parse(found.build()) == found


@given(unsigned(8), st.binary(max_size=120), st.booleans())
def test_arbitrary_bytes_are_refused_or_a_message(number, body, padded):
    data = bytes((number, 44)) + body
    try:
        message = llc.parse(data[:44].ljust(44, b"\0") if padded else data)
    except DecodeError:
        return
    assert llc.parse(message.build()) == message


def test_a_message_of_another_kind_is_refused(proto):
    with pytest.raises(DecodeError, match="CONFIRM_LINK where TEST_LINK was expected"):
        llc.TestLink.parse(proto.hex_of("L1"))
