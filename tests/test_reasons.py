from __future__ import annotations

import re

import pytest

from pysmc.cli import SUBCOMMANDS
from pysmc.reasons import REASONS, Reason, reason
from smcproto.diagnosis import describe

COMMAND = re.compile(r"'pysmc (\w+)")
NAMES = [
    "NOT_MARKED",
    "DISABLED",
    "SETUP_MISSING",
    "PEER_NO_SMC",
    "MARK_LOST",
    "NO_DEVICE",
    "NO_COMMON_EID",
    "FOREIGN_USER",
    "MODE",
    "VERSION",
    "RELEASE",
    "SUBNET",
    "VLAN",
    "ROUTE",
    "NO_MEMORY",
    "MEMLOCK",
    "LIMIT",
    "IPSEC",
    "LINK_FAILED",
    "OUT_OF_SYNC",
    "PEER_DECLINED",
    "INTERNAL",
]


def test_the_names_that_programs_rely_on() -> None:
    assert list(REASONS) == NAMES


def test_each_row_is_two_whole_sentences() -> None:
    for name, row in REASONS.items():
        assert row.name == name
        for text in (row.sentence, row.advice):
            assert text[0].isupper(), text
            assert text.endswith("."), text


def test_commands_that_are_advised_exist() -> None:
    advised = [m for row in REASONS.values() for m in COMMAND.findall(row.advice)]
    assert len(advised) >= 5
    assert set(advised) <= set(SUBCOMMANDS)


def test_codes_are_decline_codes_with_a_name() -> None:
    for row in REASONS.values():
        if row.code is not None:
            assert not describe(row.code).name.startswith("UNKNOWN"), row


def test_a_reason_is_its_row_with_the_facts_between() -> None:
    why = reason("LIMIT", "local", "max_handshakes is 1.")
    assert why.name == "LIMIT"
    assert why.code == 0x01010000
    assert why.text == (
        "A limit is reached. max_handshakes is 1."
        " Raise the limit named, or close connections."
    )
    assert str(why).startswith("LIMIT 01010000 (local): A limit is reached.")


def test_a_reason_without_a_code_shows_none() -> None:
    assert str(reason("NOT_MARKED", "local")).startswith("NOT_MARKED (local): ")


def test_more_exact_codes() -> None:
    why = reason("NO_COMMON_EID", "peer", code=0x03030008, peer_code=0x03030002)
    assert why == Reason(
        code=0x03030008,
        name="NO_COMMON_EID",
        side="peer",
        text=why.text,
        peer_code=0x03030002,
    )


def test_an_unknown_name_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        reason("BAD_LUCK", "local")
