"""No message and no field is without words, and no words are without a field."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_args

import pytest

from smcproto import clc, clc_v2, llc, words
from smcproto.clc_proposal import IpArea, Ipv6Prefix
from smcproto.constants import AddLinkReject, DeleteLinkReason, OsType, PathType
from smcproto.decode import Message

PARTS = [
    IpArea,
    Ipv6Prefix,
    clc_v2.IsmGid,
    clc_v2.SmcdExtension,
    clc_v2.ProposalExtension,
    clc_v2.FirstContactExtension,
    clc_v2.AcceptExtension,
    clc_v2.ConfirmExtension,
    clc_v2.SmcdAcceptExtension,
    llc.RkeyPair,
    llc.OtherLink,
]
HOLD_PARTS = {"v2", "ip_area", "smcd", "first_contact"}


def field_names(kind: type) -> set[str]:
    if is_dataclass(kind):
        return {field.name for field in fields(kind)}
    return set(kind._fields)  # type: ignore[attr-defined]


def test_every_message_is_in_the_table():
    assert set(words.MESSAGES) == {kind.__name__ for kind in get_args(Message)}


def test_every_field_has_words_and_no_words_are_left_over():
    names = set().union(*(field_names(kind) for kind in (*get_args(Message), *PARTS)))
    assert names - set(words.FIELDS) <= HOLD_PARTS
    assert set(words.FIELDS) - names == set()
    assert names >= words.HEXADECIMAL
    assert set(words.MEANINGS) <= names


@pytest.mark.parametrize(
    ("field", "codes"),
    [
        ("os_type", OsType),
        ("reason", DeleteLinkReason),
        ("reject_reason", AddLinkReject),
        ("typev1", PathType),
        ("typev2", PathType),
    ],
)
def test_every_code_has_a_meaning(field, codes):
    meanings = {words.MEANINGS[field](code) for code in codes}
    assert len(meanings) == len(codes)


def test_unknown_codes_have_words_too():
    assert words.MEANINGS["os_type"](15) == "unknown"
    assert words.MEANINGS["reason"](1) == "unknown"
    assert words.MEANINGS["reject_reason"](9) == "none given"
    assert words.MEANINGS["mtu_code"](0) == "reserved"
    assert words.MEANINGS["mtu_code"](6) == "reserved"
    assert words.MEANINGS["rmbe_size_code"](15) == "524288 KiB"


def test_every_clc_class_is_known_by_name():
    assert {kind.__name__ for kind in get_args(clc.ClcMessage)} <= set(words.MESSAGES)
