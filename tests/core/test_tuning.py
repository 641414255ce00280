"""Counters about to wrap, and elements of a few bytes: the same bytes arrive."""

from __future__ import annotations

import pytest

from pysmc.core.tuning import AS_SPECIFIED, Tuning
from pysmc.testing.pair import CorePair


def test_all_of_the_memory_is_used_unless_told_otherwise() -> None:
    assert AS_SPECIFIED.element(16384) == 16384
    assert Tuning(element_bytes=20).element(16384) == 20
    assert Tuning(element_bytes=20).element(16) == 16


@pytest.mark.parametrize("newest_only", [False, True])
@pytest.mark.parametrize("size", [1, 3, 16, 0])
def test_counters_pass_their_last_value(size: int, newest_only: bool) -> None:
    pair = CorePair(newest_only=newest_only)
    for end in pair.ends:
        end.endpoint.tuning = Tuning(size, first_wrap=65_530, first_sequence=65_530)
        assert end.endpoint.tuning.element_bytes == size
    client, server = pair.establish()
    for turn in range(40):
        data = bytes([turn, turn ^ 255, 7])
        for there, back in ((client, server), (server, client)):
            writer, reader = (
                (pair.client, pair.server)
                if there is client
                else (pair.server, pair.client)
            )
            left, got = data, b""
            while left:
                left = left[pair.write(writer, there, left) :]
                pair.drive()
                got += pair.read(reader, back, 3)
                pair.drive()
            assert got == data
    assert client.take_update()[0] < 65_530, "the sequence number has wrapped"
    if size:
        assert client.rmbe_bytes == client.peer_rmbe_bytes == size


def test_the_first_update_may_end_at_the_place_where_all_begin() -> None:
    """One whole element, from the last wrap number: the cursor is then all zeros."""
    pair = CorePair()
    for end in pair.ends:
        end.endpoint.tuning = Tuning(16, first_wrap=0xFFFF)
    client, server = pair.establish()
    assert pair.write(pair.client, client, bytes(range(16))) == 16
    pair.drive()
    assert pair.read(pair.server, server, 16) == bytes(range(16))
    pair.drive()
    assert pair.write(pair.client, client, b"again") == 5, "the peer's cursor counts"
