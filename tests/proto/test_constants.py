"""Size codes and MTU codes."""

from __future__ import annotations

import pytest

from smcproto.constants import (
    EYECATCHER_SMCD,
    EYECATCHER_SMCR,
    PathType,
    mtu_bytes,
    rmbe_bytes,
    rmbe_size_code,
)


def test_the_eye_catchers_are_ebcdic():
    assert EYECATCHER_SMCR.decode("cp500") == "SMCR"
    assert EYECATCHER_SMCD.decode("cp500") == "SMCD"


@pytest.mark.parametrize("code", range(16))
def test_a_size_code_and_its_bytes_belong_together(code):
    assert rmbe_bytes(code) == 16384 * 2**code
    assert rmbe_size_code(rmbe_bytes(code)) == code


@pytest.mark.parametrize("code", [-1, 16])
def test_a_size_code_has_four_bits(code):
    with pytest.raises(ValueError, match=f"size code {code} is outside 0 to 15"):
        rmbe_bytes(code)


@pytest.mark.parametrize("size", [-16384, 0, 1, 8192, 16383, 16385, 49152, 1 << 30])
def test_a_size_without_a_code_is_refused(size):
    with pytest.raises(ValueError, match="power of two from 16384 to 536870912"):
        rmbe_size_code(size)


def test_mtu_codes_are_powers_of_two():
    assert [mtu_bytes(code) for code in range(1, 6)] == [256, 512, 1024, 2048, 4096]
    for code in (0, 6, 15):
        with pytest.raises(ValueError, match=f"MTU code {code} is reserved"):
            mtu_bytes(code)


@pytest.mark.parametrize(
    ("path", "smcr", "smcd"),
    [
        (PathType.SMCR, True, False),
        (PathType.SMCD, False, True),
        (PathType.NONE, False, False),
        (PathType.BOTH, True, True),
    ],
)
def test_a_path_offers_what_it_says(path, smcr, smcd):
    assert (path.offers_smcr, path.offers_smcd) == (smcr, smcd)
