"""Memory in whose hands: the pool, and what the peer announced."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pysmc.core.rmb import Rmb, RmbPool, RToken, RTokenTable

if TYPE_CHECKING:
    from pysmc.core.link_group import LinkGroup


def rmb(length: int) -> Rmb:
    return Rmb(cast("LinkGroup", None), length)


def test_the_pool_gives_the_length_asked_for_and_the_latest_first() -> None:
    pool = RmbPool(limit=3)
    small, older, newer = rmb(16), rmb(32), rmb(32)
    for each in (older, newer, small):
        assert pool.give(each) is None
    assert pool.take(64) is None
    assert pool.take(32) is newer
    assert pool.take(32) is older
    assert pool.take(32) is None
    assert list(pool) == [small]


def test_a_full_pool_gives_up_the_oldest() -> None:
    pool = RmbPool(limit=2)
    first, second, third = rmb(16), rmb(16), rmb(16)
    assert [pool.give(each) for each in (first, second, third)] == [None, None, first]
    assert len(pool) == 2
    pool.clear()
    assert len(pool) == 0


def test_a_pool_of_nothing_keeps_nothing() -> None:
    pool = RmbPool(limit=0)
    only = rmb(16)
    assert pool.give(only) is only
    assert len(pool) == 0


def test_an_rtoken_is_known_by_key_and_address() -> None:
    table = RTokenTable()
    assert table.add(RToken(5, 0x1000))
    assert table.knows(RToken(5, 0x1000))
    assert not table.knows(RToken(5, 0x2000))
    assert not table.knows(RToken(6, 0x1000))
    assert table.remove(5)
    assert not table.remove(5)
    assert not table.knows(RToken(5, 0x1000))


def test_the_table_is_bounded_but_takes_a_known_key_again() -> None:
    table = RTokenTable()
    assert all(table.add(RToken(key, 0)) for key in range(255))
    assert not table.add(RToken(255, 0))
    assert table.add(RToken(254, 0x1000))
    assert table.knows(RToken(254, 0x1000))
    assert len(table) == 255


def test_an_rmb_says_what_it_is() -> None:
    assert repr(rmb(16384)) == "<Rmb 16384 registering>"
