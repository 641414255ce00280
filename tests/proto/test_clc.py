"""CLC as a whole: what is built is read again, and nothing else can happen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smcproto import clc
from smcproto.constants import EYECATCHER_SMCR, OsType, PathType
from smcproto.diagnosis import PeerDiagnosis
from smcproto.errors import DecodeError, EncodeError


def unsigned(width: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << width) - 1)


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


TEXTS = st.text(
    st.characters(max_codepoint=255), max_size=32
).filter(lambda text: not text.endswith(" "))  # fmt: skip
UEIDS = st.from_regex(r"[A-Z0-9](?:[A-Z0-9-]|\.(?=[A-Z0-9])){0,31}", fullmatch=True)

IP_AREAS = st.builds(
    clc.IpArea,
    subnet=exactly(4),
    prefix_length=unsigned(8),
    ipv6_prefixes=st.lists(
        st.builds(clc.Ipv6Prefix, exactly(16), unsigned(8)), max_size=8
    ).map(tuple),
)
SMCD_PARTS = st.builds(
    clc.SmcdExtension,
    seid=TEXTS,
    gids=st.lists(st.builds(clc.IsmGid, unsigned(64), unsigned(16)), max_size=8).map(
        tuple
    ),
)


@st.composite
def proposals(draw: st.DrawFn) -> clc.Proposal:
    version = draw(st.integers(1, 15))
    typev1 = draw(st.sampled_from(PathType))
    typev2 = draw(st.sampled_from(PathType))
    if version == 1:
        typev1 = draw(st.sampled_from([PathType.SMCR, PathType.SMCD, PathType.BOTH]))
        typev2 = PathType.NONE
    v2 = None
    if typev2 is not PathType.NONE and draw(st.booleans()):
        v2 = clc.ProposalExtension(
            eids=tuple(draw(st.lists(TEXTS, max_size=8))),
            release=draw(unsigned(4)),
            gid=draw(exactly(16)),
            max_connections=draw(unsigned(8)),
            max_links=draw(unsigned(8)),
            feature_mask=draw(unsigned(16)),
            seid_offered=draw(st.booleans()),
            smcd=draw(SMCD_PARTS | st.none()) if typev2.offers_smcd else None,
        )
    return clc.Proposal(
        version=version,
        peer_id=draw(exactly(8)),
        gid=draw(exactly(16)),
        mac=draw(exactly(6)),
        typev1=typev1,
        typev2=typev2,
        ip_area=None if typev1 is PathType.NONE else draw(IP_AREAS),
        ism_gid=draw(unsigned(64)) if version > 1 else 0,
        ism_chid=draw(unsigned(16)) if version > 1 else 0,
        v2=v2,
    )


FIRST_CONTACTS = st.builds(
    clc.FirstContactExtension,
    direct=st.booleans(),
    os_type=unsigned(4),
    release=unsigned(4),
    host_name=TEXTS,
    max_connections=unsigned(8),
    max_links=unsigned(8),
    feature_mask=unsigned(16),
    vendor_options=unsigned(32),
)
CONTACT_FIELDS: dict[str, Any] = {
    "peer_id": exactly(8),
    "gid": exactly(16),
    "mac": exactly(6),
    "qp_number": unsigned(24),
    "rkey": unsigned(32),
    "rmbe_index": st.integers(1, 255),
    "alert_token": unsigned(32),
    "rmbe_size_code": unsigned(4),
    "mtu_code": unsigned(4),
    "virtual_address": unsigned(64),
    "psn": unsigned(24),
}


@st.composite
def accepts(draw: st.DrawFn) -> clc.Accept:
    fields = {name: draw(strategy) for name, strategy in CONTACT_FIELDS.items()}
    first_contact = draw(st.booleans())
    version = draw(st.sampled_from([1, 2]))
    v2 = None
    if version == 2:
        contact = draw(FIRST_CONTACTS) if first_contact else None
        v2 = clc.AcceptExtension(draw(TEXTS), contact)
    return clc.Accept(version=version, first_contact=first_contact, v2=v2, **fields)


@st.composite
def confirms(draw: st.DrawFn) -> clc.Confirm:
    fields = {name: draw(strategy) for name, strategy in CONTACT_FIELDS.items()}
    first_contact = draw(st.booleans())
    version = draw(st.sampled_from([1, 2]))
    v2 = None
    if version == 2:
        has_part = first_contact or draw(st.booleans())
        v2 = clc.ConfirmExtension(
            draw(TEXTS),
            draw(FIRST_CONTACTS) if has_part else None,
            tuple(draw(st.lists(exactly(16), max_size=4))) if has_part else (),
        )
    return clc.Confirm(version=version, first_contact=first_contact, v2=v2, **fields)


@st.composite
def smcd_contacts(draw: st.DrawFn) -> Any:
    version = draw(st.sampled_from([1, 2]))
    v2 = None
    if version == 2:
        contact = draw(FIRST_CONTACTS | st.none())
        if contact is not None and contact.release == 0:
            contact = clc.FirstContactExtension(
                contact.direct, contact.os_type, 0, contact.host_name
            )
        v2 = clc.SmcdAcceptExtension(draw(unsigned(16)), draw(TEXTS), contact)
    return draw(st.sampled_from([clc.SmcdAccept, clc.SmcdConfirm]))(
        version=version,
        first_contact=draw(st.booleans()),
        gid=draw(unsigned(64)),
        token=draw(unsigned(64)),
        dmbe_index=draw(unsigned(8)),
        dmbe_size_code=draw(unsigned(4)),
        link_id=draw(unsigned(32)),
        v2=v2,
    )


@st.composite
def declines(draw: st.DrawFn) -> clc.Decline:
    version = draw(st.integers(1, 15))
    return clc.Decline(
        version=version,
        out_of_sync=draw(st.booleans()),
        peer_id=draw(exactly(8)),
        diagnosis=draw(unsigned(32) | st.sampled_from(PeerDiagnosis)),
        os_type=draw(unsigned(4)) if version > 1 else 0,
        extra=draw(st.tuples(*[unsigned(32)] * 4)) if version > 1 else (0, 0, 0, 0),
    )


MESSAGES = proposals() | accepts() | confirms() | smcd_contacts() | declines()


@given(MESSAGES)
def test_what_is_built_is_read_again(message):
    data = message.build()

    assert clc.parse(data) == message
    assert type(message).parse(data) == message
    assert clc.parse(data).build() == data


@given(MESSAGES)
def test_the_header_tells_how_much_to_read(message):
    data = message.build()

    header = clc.parse_header(data[:8])

    assert header.length == len(data)
    assert header.type is message.TYPE
    assert header.smcd is isinstance(message, clc.SmcdAccept | clc.SmcdConfirm)
    assert header.version == message.version


@given(MESSAGES, st.data())
def test_a_damaged_message_is_refused_or_a_message(message, data):
    damaged = bytearray(message.build())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(unsigned(8))
    try:
        found = clc.parse(bytes(damaged))
    except DecodeError:
        return
    assert clc.parse(found.build()) == found


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_a_message(data):
    try:
        message = clc.parse(data)
    except DecodeError:
        return
    assert clc.parse(message.build()) == message


@given(st.integers(1, 4), unsigned(8), st.binary(max_size=700))
def test_a_framed_body_is_refused_or_a_message(kind, versions, body):
    """Past the frame, so that the bodies' own checks are reached."""
    length = 8 + len(body) + 4
    head = bytes((kind,)) + length.to_bytes(2, "big") + bytes((versions,))
    try:
        message = clc.parse(EYECATCHER_SMCR + head + body + EYECATCHER_SMCR)
    except DecodeError:
        return
    assert clc.parse(message.build()) == message


def test_a_message_of_another_kind_is_refused(proto):
    with pytest.raises(DecodeError, match="DECLINE where Accept was expected"):
        clc.Accept.parse(proto.hex_of("C9"))
    with pytest.raises(DecodeError, match="SMC-D ACCEPT where Accept was expected"):
        clc.Accept.parse(proto.hex_of("S1"))
    with pytest.raises(DecodeError, match="ACCEPT where SmcdAccept was expected"):
        clc.SmcdAccept.parse(proto.hex_of("C6"))


DECLINE = clc.Decline(1, out_of_sync=False, peer_id=bytes(8), diagnosis=0)


def test_a_known_diagnosis_is_a_member_and_another_a_number(proto):
    known = clc.Decline.parse(proto.hex_of("C11"))
    assert known.diagnosis is PeerDiagnosis.NO_SMCR_DEVICE
    assert known.os_type is OsType.LINUX

    unknown = clc.Decline(2, out_of_sync=False, peer_id=bytes(8), diagnosis=0x12345678)
    found = clc.Decline.parse(unknown.build())
    assert found.diagnosis == 0x12345678
    assert not isinstance(found.diagnosis, PeerDiagnosis)
    assert "12345678 UNKNOWN" in str(found)


@pytest.mark.parametrize(("version", "size"), [(1, 28), (2, 44), (3, 44)])
def test_a_decline_has_the_size_of_its_version(version, size):
    decline = clc.Decline(version, out_of_sync=True, peer_id=bytes(8), diagnosis=1)
    assert len(decline.build()) == size
    assert "out-of-sync" in str(decline)


@pytest.mark.parametrize(
    ("decline", "field"),
    [
        (clc.Decline(0, False, bytes(8), 0), "version"),
        (clc.Decline(16, False, bytes(8), 0), "version"),
        (clc.Decline(1, False, bytes(7), 0), "peer_id"),
        (clc.Decline(1, False, bytes(8), 1 << 32), "diagnosis"),
        (clc.Decline(1, False, bytes(8), -1), "diagnosis"),
        (clc.Decline(1, False, bytes(8), 0, os_type=2), "extra"),
        (clc.Decline(1, False, bytes(8), 0, extra=(1, 0, 0, 0)), "extra"),
        (clc.Decline(2, False, bytes(8), 0, os_type=16), "os_type"),
        (clc.Decline(2, False, bytes(8), 0, extra=(1 << 32, 0, 0, 0)), "extra"),
        (clc.Decline(2, False, bytes(8), 0, extra=(1, 2, 3)), "extra"),  # type: ignore[arg-type]
    ],
)
def test_a_decline_that_does_not_fit_is_not_built(decline, field):
    with pytest.raises(EncodeError) as caught:
        decline.build()
    assert caught.value.field == field


def test_reserved_bits_of_a_decline_are_ignored():
    """Linux validated them until 6.12.48, and so broke newer peers."""
    data = bytearray(DECLINE.build())
    data[7] |= 0x07
    data[20:24] = b"\xff\xff\xff\xff"
    assert clc.parse(bytes(data)) == DECLINE
