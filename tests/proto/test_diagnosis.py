"""Every Decline code has words, and no code is without."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smcproto.diagnosis import PeerDiagnosis, describe


@pytest.mark.parametrize("code", PeerDiagnosis)
def test_every_code_has_a_sentence_and_advice(code):
    text = describe(code)
    assert text.code == code
    assert text.name == code.name
    for sentence in (text.meaning, text.advice):
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert "  " not in sentence
    assert str(text) == f"{code.name} ({code:08x}): {text.meaning} {text.advice}"


def test_no_two_codes_share_their_meaning():
    meanings = [describe(code).meaning for code in PeerDiagnosis]
    assert len(set(meanings)) == len(meanings)


@given(st.integers(-(1 << 40), 1 << 40))
def test_any_number_has_words(code):
    text = describe(code)
    assert text.meaning
    assert text.advice
    assert (text.name == "UNKNOWN") is (code not in set(map(int, PeerDiagnosis)))


def test_the_codes_are_those_of_linux():
    """Kernel: smc_clc.h, SMC_CLC_DECL_*."""
    assert sorted(f"{code:08x}" for code in PeerDiagnosis) == [
        "01010000", "02010000", "02020000", "03000000", "03010000", "03020000",
        "03030000", "03030001", "03030002", "03030003", "03030004", "03030005",
        "03030006", "03030007", "03030008", "03030009", "0303000a", "0303000b",
        "03040000", "03050000", "03060000", "03070000", "03080000", "03090000",
        "030a0000", "030b0000", "030c0000", "030d0000", "030e0000", "030f0000",
        "04000000", "05000000", "09990000", "09990001", "09990002", "09990003",
    ]  # fmt: skip
