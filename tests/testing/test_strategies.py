"""The public strategies: what they draw the wire can carry, and it comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given

from pysmc.core.cursor import Cursor, Ring
from pysmc.testing import strategies
from smcproto import cdc, clc, llc

if TYPE_CHECKING:
    from pysmc.core.connection import Update


@given(strategies.clc_messages())
def test_clc_messages_come_back(message: clc.ClcMessage) -> None:
    assert clc.parse(message.build()) == message


@pytest.mark.parametrize("version", [1, 2])
def test_llc_messages_come_back(version: int) -> None:
    seen = set()

    @given(strategies.llc_messages(version))
    def comes_back(message: llc.LlcMessage) -> None:
        seen.add(type(message))
        assert message.version == version
        assert llc.parse(message.build()) == message

    comes_back()
    assert len(seen) > 4


@given(strategies.updates())
def test_updates_come_back(update: Update) -> None:
    assert cdc.unpack(cdc.pack(*update)) == update


@given(strategies.updates(token=7, size=32768))
def test_updates_can_have_a_token(update: Update) -> None:
    assert update[1] == 7


@given(strategies.cursors(40, base=4))
def test_cursors_lie_in_the_element(cursor: Cursor) -> None:
    assert 4 <= cursor.count < 40
    position = cursor.wrap * 36 + cursor.count - 4
    assert Ring(40, base=4).cursor(position) == cursor


@given(strategies.rmbe_sizes(1 << 20), strategies.eids())
def test_sizes_and_eids_are_those_of_clc(size: int, eid: str) -> None:
    assert 16384 <= size <= 1 << 20
    assert size & (size - 1) == 0
    assert clc.is_valid_eid(eid)
