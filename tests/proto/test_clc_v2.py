"""EIDs, and the parts of version 2."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smcproto.clc import Accept, Proposal
from smcproto.clc_v2 import (
    AcceptExtension,
    FirstContactExtension,
    IsmGid,
    ProposalExtension,
    SmcdExtension,
    is_valid_eid,
)
from smcproto.errors import EncodeError


@pytest.mark.parametrize(
    "eid", ["A", "0", "SMCV2-TEST-EID", "A" * 32, "A.B.C", "9-", "Z.", "0-.A"]
)
def test_a_ueid_is_valid(eid):
    assert is_valid_eid(eid)


@pytest.mark.parametrize(
    "eid",
    ["", ".A", "-A", "a", "Ab", "A..B", "A" * 33, "A B", "A ", " A", "Ä", "A_B", "A\0"],
)
def test_a_ueid_is_not_valid(eid):
    assert not is_valid_eid(eid)


@given(st.text("AZ09.- a_", max_size=34))
def test_what_is_valid_can_be_sent_and_follows_the_rules(eid):
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-")
    expected = (
        0 < len(eid) < 33
        and set(eid) <= allowed
        and not eid.startswith((".", "-"))
        and ".." not in eid
    )
    assert is_valid_eid(eid) is expected
    if expected:
        assert AcceptExtension(eid).build()[:32] == eid.encode("ascii").ljust(32)


EXTENSION = ProposalExtension(
    eids=("A", "B"),
    release=1,
    gid=bytes(16),
    max_connections=255,
    max_links=2,
    feature_mask=1,
)
CONTACT = FirstContactExtension(direct=True, os_type=2, release=1, host_name="h")


def test_no_eid_at_all_is_read(proto):
    """A server declines it with NO_UEID."""
    found = Proposal.parse(proto.hex_of("P13"))
    assert found.v2 is not None
    assert found.v2.eids == ()
    assert "eids= " in str(found)


def test_a_foreign_eid_is_read_as_it_is(proto):
    """Linux compares bytes; what is not ASCII simply matches nothing."""
    data = bytearray(proto.hex_of("C5"))
    data[120:124] = b"\xff\x00\x80a"
    found = Proposal.parse(bytes(data))
    assert found.v2 is not None
    assert found.v2.eids == ("\xff\0\x80a2-TEST-EID",)
    assert found.build() == bytes(data)


def test_blanks_pad_and_zeros_do_not(proto):
    data = bytearray(proto.hex_of("C14"))
    data[64:96] = b"AB".ljust(32)
    accept = Accept.parse(bytes(data))
    assert accept.v2 == AcceptExtension("AB")
    data[64:96] = b"AB".ljust(32, b"\0")
    assert Accept.parse(bytes(data)).v2 == AcceptExtension("AB" + "\0" * 30)


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (replace(EXTENSION, eids=("A",) * 9), "v2.eids"),
        (replace(EXTENSION, eids=("A" * 33,)), "v2.eids"),
        (replace(EXTENSION, eids=("A ",)), "v2.eids"),
        (replace(EXTENSION, eids=("\u20ac",)), "v2.eids"),
        (replace(EXTENSION, release=16), "release"),
        (replace(EXTENSION, gid=b""), "gid"),
        (replace(EXTENSION, max_connections=256), "max_connections"),
        (replace(EXTENSION, feature_mask=1 << 16), "feature_mask"),
        (
            replace(EXTENSION, smcd=SmcdExtension("S", (IsmGid(1, 1),) * 9)),
            "v2.smcd.gids",
        ),
        (
            replace(EXTENSION, smcd=SmcdExtension("S", (IsmGid(1 << 64, 1),))),
            "v2.smcd.gids",
        ),
        (replace(EXTENSION, smcd=SmcdExtension("S" * 33)), "v2.smcd.seid"),
        (AcceptExtension("E" * 33), "eid"),
        (replace(CONTACT, host_name="h" * 33), "host_name"),
        (replace(CONTACT, os_type=16), "os_type"),
        (replace(CONTACT, vendor_options=1 << 32), "vendor_options"),
        (replace(CONTACT, direct=2), "direct"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_not_built(part, field):
    with pytest.raises(EncodeError) as caught:
        part.build()
    assert caught.value.field == field


def test_the_parts_can_be_logged():
    assert "eids='A','B'" in str(EXTENSION)
    assert "direct" in str(CONTACT)
    assert "routed" in str(replace(CONTACT, direct=False))
    assert "host='h'" in str(AcceptExtension("E", CONTACT))
