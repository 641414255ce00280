"""The pair itself: its hooks do what they say, and its checks see faults."""

from __future__ import annotations

import pytest

from pysmc.core.actions import RegisterMemory
from pysmc.core.events import Failed
from pysmc.testing.pair import CorePair
from smcproto import cdc


def test_the_example_of_its_documentation() -> None:
    pair = CorePair()
    client, server = pair.establish()
    pair.write(pair.client, client, b"hello")
    pair.drive()
    assert pair.read(pair.server, server, 100) == b"hello"
    assert pair.peer_of(pair.client, client) is server
    pair.close(pair.server, server)
    pair.close(pair.client, client)
    pair.drive()
    assert pair.peer_of(pair.client, client) is None


def test_what_is_held_waits_and_what_is_dropped_is_gone() -> None:
    pair = CorePair()
    client, server = pair.establish()
    pair.hold("update", pair.server)
    pair.write(pair.client, client, b"one")
    pair.drive()
    assert server.readable == 0
    assert not pair.step()
    pair.release("update")
    pair.drive()
    assert server.readable == 3
    pair.write(pair.client, client, b"two")
    assert pair.drop("update", pair.server) == 1
    pair.drive()
    assert server.readable == 3
    pair.write(pair.client, client, b"six")
    pair.drive()
    assert pair.read(pair.server, server, 99) == b"onetwosix", "an update says it all"


def test_only_the_newest_update_is_kept_of_each_connection() -> None:
    pair = CorePair(newest_only=True)
    first, there = pair.establish()
    second, _ = pair.establish()
    for _ in range(3):
        pair.write(pair.client, first, b"x")
        pair.write(pair.client, second, b"y")
    assert len(first.link.handle.peer.updates) == 2
    pair.drive()
    assert there.readable == 3


def test_a_write_outside_the_peers_memory_breaks_the_link_and_is_noted() -> None:
    pair = CorePair()
    client, _ = pair.establish()
    client.remote_rkey = 0xBAD
    pair.write(pair.client, client, b"x")
    pair.drive()
    assert len(pair.faults) == 1
    assert "with rkey bad" in pair.faults[0]
    assert [len(end.lost) for end in pair.ends] == [1, 1]


def test_what_is_written_to_a_link_that_is_gone_is_gone() -> None:
    pair = CorePair(silent_close=True)
    client, server = pair.establish()
    pair.cut_link(client.link, pair.server)
    pair.drive()
    assert pair.write(pair.client, client, b"into the void") == 13
    assert pair.faults == []
    assert "an update is lost" in "\n".join(pair.trace)
    assert server.error is not None


def test_a_livelock_is_a_failure() -> None:
    pair = CorePair()
    client, _ = pair.establish()
    pair.write(pair.client, client, b"x")
    with pytest.raises(AssertionError, match="no end after 0 steps"):
        pair.drive_bounded(0)
    assert pair.drive_bounded(1) == 1
    assert pair.drive() == 0


def test_what_never_comes_is_a_failure_with_the_trace() -> None:
    pair = CorePair()
    client, _ = pair.connect()
    pair.hold("tcp")
    with pytest.raises(AssertionError, match="sends Proposal version=2"):
        pair.drive_until(lambda: client.is_over)
    with pytest.raises(AssertionError, match="the verdict is None"):
        pair.connection(client)


def test_orders_can_wait_for_their_answers() -> None:
    pair = CorePair()
    pair.withhold(pair.server, RegisterMemory)
    _, server = pair.connect()
    pair.drive()
    assert server.state.name == "PREPARING"
    pair.answer(pair.server, RegisterMemory)
    pair.drive()
    assert pair.connection(server).is_open


def test_tcp_can_be_cut_on_one_end_or_both() -> None:
    pair = CorePair()
    client, server = pair.connect()
    pair.cut_tcp(client, pair.server)
    pair.drive_until(lambda: server.is_over)
    assert isinstance(pair.verdict(server), Failed)


def test_what_is_left_over_is_seen() -> None:
    pair = CorePair()
    pair.establish()
    with pytest.raises(AssertionError, match="client: left over"):
        pair.check_released()
    pair.shutdown()


def test_the_trace_tells_a_life_in_words() -> None:
    pair = CorePair()
    client, _ = pair.establish()
    pair.write(pair.client, client, b"x")
    pair.send_message(client.link, b"\xff")
    pair.send_message(client.link, cdc.pack(1, 2, 3, 4, 0))
    pair.drive()
    pair.close(pair.client, client)
    pair.shutdown()
    trace = "\n".join(pair.trace)
    for words in (
        "client: tcp 256 sends Proposal",
        "server: tcp 256 sends Accept",
        "sends CONFIRM_LINK",
        "client: tcp 256 established 00010002",
        "client: publishes update 1 to 00020002 producer=000000000001",
        "client: closes 00010002",
        "server: lost 00020002: ",
    ):
        assert words in trace, words
    assert repr(pair.client) == "<PairEnd client>"


def test_verdicts_and_strangers_in_words() -> None:
    pair = CorePair()
    client, server = pair.connect()
    pair.tcp(server).transit[:] = b"GET / HTTP/1.1"
    pair.drive()
    assert any("server: tcp 256 failed: " in line for line in pair.trace)
    pair = CorePair()
    pair.fail_next(pair.client, RegisterMemory, "no memory", "full")
    client, server = pair.connect()
    pair.drive()
    assert any("fell back: NO_MEMORY" in line for line in pair.trace)
    assert any("RegisterMemory fails: no memory" in line for line in pair.trace)
    assert client.is_over
    assert server.is_over


def test_only_what_there_is_can_be_held() -> None:
    with pytest.raises(ValueError, match="'sends'.*send, update"):
        CorePair().hold("sends")
