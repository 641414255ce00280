"""Links and memory: who has them, and that they are given back once and in order."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from pysmc.core.actions import CloseQueuePair, RegisterMemory
from pysmc.core.connection import Connection
from pysmc.core.events import ConnectionLost, Established, FellBack
from pysmc.core.rmb import RmbState
from pysmc.errors import ConnectionReset
from pysmc.testing.pair import SMALL, CorePair
from smcproto import llc

Ends = tuple[Connection, Connection]
WAYS = ["close", "abort", "done", "nothing"]


def close_both(pair: CorePair, ends: Ends) -> None:
    pair.close(pair.client, ends[0])
    pair.drive()
    pair.close(pair.server, ends[1])
    pair.drive()


def deletions(pair: CorePair, name: str) -> int:
    return sum(
        line[10:].startswith(f"{name}: ")
        and "DELETE_RKEY" in line
        and "request" in line
        for line in pair.trace
    )


# Memory


def test_memory_of_a_closed_connection_is_used_again_and_clean() -> None:
    pair = CorePair()
    ends = pair.establish()
    pair.write(pair.client, ends[0], b"secret")
    pair.drive()
    pair.read(pair.server, ends[1], 99)
    old = ends[1].rmb
    close_both(pair, ends)
    assert [end.memory_bytes for end in pair.ends] == [16384, 16384]
    again = pair.establish()
    assert again[1].rmb is old
    assert again[1].rmb.handle.memory == bytes(16384)
    assert again[1].alert_token != ends[1].alert_token
    assert deletions(pair, "server") == 0


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_link_is_said_to_be_in_use_while_the_peer_has_connections(
    is_closed: bool,
) -> None:
    pair = CorePair()
    ends = pair.establish()
    if is_closed:
        close_both(pair, ends)
    else:
        pair.close(pair.client, ends[0])
    endpoint = pair.client.endpoint
    endpoint.take_actions()
    endpoint.shutdown(pair.now)
    orders = [one for one in endpoint.take_actions() if type(one) is CloseQueuePair]
    assert [order.in_use for order in orders] == [not is_closed]


def test_so_it_is_when_the_peer_did_not_close_in_time() -> None:
    """We have forgotten the connection by then, and the peer has not."""
    pair = CorePair()
    ours, theirs = pair.establish()
    pair.close(pair.client, ours)
    pair.drive()
    pair.advance(pair.client.endpoint._context.config.close_wait + 1)
    endpoint = pair.client.endpoint
    assert [len(group.connections) for group in endpoint.groups] == [0]
    assert not theirs.we_ended
    endpoint.take_actions()
    endpoint.shutdown(pair.now)
    orders = [one for one in endpoint.take_actions() if type(one) is CloseQueuePair]
    assert [order.in_use for order in orders] == [True]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_the_surplus_of_the_pool_is_deleted(kept: int) -> None:
    pair = CorePair(replace(SMALL, max_idle_rmbs=kept))
    all_of_them = [pair.establish() for _ in range(3)]
    for ends in all_of_them:
        close_both(pair, ends)
    for end in pair.ends:
        assert end.memory_bytes == 16384 * kept
        assert deletions(pair, end.name) == 3 - kept
    assert len(pair.client.endpoint.groups[0].rtokens) == kept
    again = [pair.establish() for _ in range(3)]
    assert len({id(connection.rmb) for connection, _ in again}) == 3


def test_memory_of_a_peer_that_broke_a_rule_is_not_used_again() -> None:
    pair = CorePair()
    client, server = pair.establish()
    old = server.rmb
    pair.send_update(client, producer=0xFFFFFFFF)
    pair.drive()
    assert server.error is not None
    assert deletions(pair, "server") == 1
    assert old.state is RmbState.GONE
    assert pair.server.memory_bytes == 0
    pair.establish()
    assert pair.server.memory_bytes == 16384


def test_a_deletion_that_is_not_answered_is_over_in_the_end() -> None:
    pair = CorePair(replace(SMALL, max_idle_rmbs=0))
    ends = pair.establish()
    pair.hold("send")
    close_both(pair, ends)
    pair.advance(1.9)
    assert pair.server.memory_bytes == 16384
    pair.advance(0.2)
    assert [end.memory_bytes for end in pair.ends] == [0, 0]
    pair.release("send")
    pair.advance(1)
    pair.establish()


def test_given_back_while_it_is_confirmed_it_goes_to_the_pool() -> None:
    """Deregistered at once, it would stay in the peer's table for ever."""
    pair = CorePair()
    pair.establish()
    pair.hold("send", pair.server)
    client, server = pair.connect()
    pair.drive()
    rmb = server.rmb
    assert rmb is not None
    states = [rmb.state]
    pair.abandon(server)
    states.append(rmb.state)
    pair.release("send")
    pair.drive()
    states.append(rmb.state)
    confirming = RmbState.CONFIRMING
    assert states == [confirming, confirming, RmbState.CONFIRMED]
    assert list(rmb.group.pool) == [rmb]
    _, there = pair.establish()
    assert there.rmb is rmb
    assert client.is_over


def test_given_back_while_it_is_confirmed_and_refused_it_goes() -> None:
    pair = CorePair()
    pair.establish()
    pair.hold("send", pair.server)
    _, server = pair.connect()
    pair.drive()
    pair.abandon(server)
    pair.advance(2.1)
    assert pair.server.memory_bytes == 16384
    assert not any(group.pool for end in pair.ends for group in end.endpoint.groups)


def test_given_back_before_it_was_there_it_goes_when_it_comes() -> None:
    pair = CorePair()
    pair.establish()
    pair.withhold(pair.server, RegisterMemory)
    _, server = pair.connect()
    pair.drive()
    pair.abandon(server)
    assert pair.server.memory_bytes == 32768
    pair.answer(pair.server, RegisterMemory)
    pair.drive()
    assert pair.server.memory_bytes == 16384


def test_given_back_before_it_failed_it_is_nobodys() -> None:
    pair = CorePair()
    pair.establish()
    pair.withhold(pair.server, RegisterMemory)
    pair.fail_next(pair.server, RegisterMemory, "no memory")
    _, server = pair.connect()
    pair.drive()
    pair.abandon(server)
    pair.answer(pair.server, RegisterMemory)
    pair.drive()
    assert pair.server.memory_bytes == 16384
    pair.establish()


def test_buffers_get_smaller_when_memory_runs_out() -> None:
    """Each takes its share of what is left, down to the smallest, and then none."""
    pair = CorePair(replace(SMALL, rmbe_bytes=1 << 17, max_pinned_bytes=1 << 25))
    pair.checking = False
    keeper = pair.client.endpoint._keeper
    first, there = pair.establish()
    sizes = [first.rmbe_bytes]
    for elsewhere in (12 << 20, 10 << 20, 7 << 20):
        # As if many other connections had taken so much.
        keeper.rmb_bytes += elsewhere
        sizes.append(pair.establish()[0].rmbe_bytes)
    assert sizes == [1 << 17, 1 << 16, 1 << 15, 1 << 14]
    # What lies in the pool is taken, whatever its size.
    close_both(pair, (first, there))
    again, _ = pair.establish()
    assert again.rmb is first.rmb


@pytest.mark.parametrize("given_up", [True, False])
def test_memory_that_comes_after_its_group_went_with_it(given_up: bool) -> None:
    pair = CorePair()
    first, _ = pair.establish()
    pair.withhold(pair.server, RegisterMemory)
    client, server = pair.connect()
    pair.drive()
    if given_up:
        pair.abandon(server)
    pair.cut_link(first.link)
    pair.drive()
    pair.answer(pair.server, RegisterMemory)
    pair.drive()
    if not given_up:
        verdict = pair.verdict(server)
        assert isinstance(verdict, FellBack)
        assert "The link group ended" in verdict.reason.text
        assert isinstance(pair.verdict(client), FellBack)
    pair.check_released()


def test_a_reuse_whose_group_ends_while_its_memory_is_confirmed_falls_back() -> None:
    pair = CorePair()
    first, _ = pair.establish()
    pair.hold("send")
    client, server = pair.connect()
    pair.drive()
    pair.hold("send")
    pair.server.endpoint.link_down(
        pair.server.endpoint.groups[0].links[0], "timed out", "no answer", pair.now
    )
    pair.settle(pair.server)
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == "LINK_FAILED"
    assert isinstance(pair.verdict(client), FellBack)
    assert first.group.is_ended is False
    pair.release("send")
    pair.drive()
    assert first.group.is_ended


def test_memory_that_was_given_back_cannot_be_read_any_more() -> None:
    """The next connection's bytes are none of the last one's."""
    pair = CorePair()
    client, server = pair.establish()
    pair.abort(pair.client, client)
    pair.write(pair.server, server, b"too late")
    pair.drive()
    again, there = pair.establish()
    assert again.rmb is client.rmb
    pair.write(pair.server, there, b"not yours")
    pair.drive()
    assert pair.read(pair.client, client, 99) == b""
    assert pair.read(pair.client, again, 99) == b"not yours"


# Groups


def test_an_idle_group_is_ended_by_its_server() -> None:
    pair = CorePair()
    ends = pair.establish()
    close_both(pair, ends)
    pair.advance(599)
    assert [len(end.endpoint.groups) for end in pair.ends] == [1, 1]
    pair.advance(2)
    pair.check_released()
    deleted = [line for line in pair.trace if "DELETE_LINK" in line]
    assert len(deleted) == 1
    assert "server: " in deleted[0]
    sent = [what for _, _, what in pair.wire.notes if isinstance(what, bytes) and what]
    message = llc.parse(next(data for data in sent if data[0] == 0x24))
    assert isinstance(message, llc.DeleteLink)
    assert (message.whole_group, message.link_number) == (True, 0)
    assert pair.client.lost == []


def test_an_idle_group_whose_server_is_silent_is_ended_by_its_client() -> None:
    pair = CorePair(SMALL, replace(SMALL, idle_group_wait=5000.0))
    ends = pair.establish()
    close_both(pair, ends)
    pair.advance(609)
    assert len(pair.client.endpoint.groups) == 1
    pair.advance(2)
    pair.check_released()


def test_a_group_in_use_is_not_idle() -> None:
    pair = CorePair(replace(SMALL, idle_group_wait=10.0))
    first = pair.establish()
    close_both(pair, first)
    pair.advance(9)
    pair.establish()
    pair.advance(100)
    assert [len(end.endpoint.groups) for end in pair.ends] == [1, 1]


@pytest.mark.parametrize("by", ["client", "server"])
def test_the_end_of_a_group_is_the_end_of_its_connections_only(by: str) -> None:
    pair = CorePair()
    ends = [pair.establish() for _ in range(3)]
    other = pair.establish(peer_key="other")
    end = pair.client if by == "client" else pair.server
    group = ends[0][0 if by == "client" else 1].group
    error = ConnectionReset("an operator ended the group")
    end.endpoint._end_group(group, error, 0x00020000, pair.now)
    pair.settle(end)
    pair.drive()
    for here in pair.ends:
        assert len(here.lost) == 3
        assert len(here.endpoint.groups) == 1
        assert here.memory_bytes == 16384
    there = pair.server if by == "client" else pair.client
    assert "reason 00020000" in str(there.lost[0].error)
    pair.write(pair.client, other[0], b"x")
    pair.drive()
    assert pair.read(pair.server, other[1], 9) == b"x"


def test_who_has_closed_is_told_no_loss() -> None:
    pair = CorePair()
    first, _ = pair.establish()
    second, _ = pair.establish()
    pair.hold("update")
    pair.close(pair.client, first)
    pair.cut_link(first.link)
    pair.release("update")
    pair.drive()
    lost = [event.connection for event in pair.client.lost]
    assert lost == [second]
    assert all(isinstance(event, ConnectionLost) for event in pair.client.lost)


def test_a_broken_rule_and_the_end_of_the_link_are_told_as_one_loss() -> None:
    """Whoever is given the connection only then finds its memory gone."""
    pair = CorePair()
    client, server = pair.establish()
    pair.write(pair.client, client, b"honest")
    pair.drive()
    # Before whoever has it could publish, and so give it back.
    server.receive_update((2, server.alert_token, 0xFFFFFFFF, 0, 0))
    assert server.error is not None
    pair.cut_link(server.link)
    pair.drive()
    (lost,) = [event for event in pair.server.lost if event.connection is server]
    assert lost.error is server.error


def test_withdrawn_memory_and_the_end_of_the_link_are_told_as_one_loss() -> None:
    """Whoever copied out what had arrived would find nothing the second time."""
    pair = CorePair()
    _, server = pair.establish()
    endpoint = pair.server.endpoint
    endpoint.take_events()
    endpoint.rkeys_withdrawn(server.group, [server.remote_rkey])
    endpoint.link_down(server.link, "peer gone", "test", pair.now)
    (lost,) = [
        event for event in endpoint.take_events() if type(event) is ConnectionLost
    ]
    assert lost.error is server.error


# Connections


@pytest.mark.parametrize("newest_only", [True, False])
@pytest.mark.parametrize("ways", [*permutations(WAYS, 2)])
def test_every_pair_of_ends(ways: tuple[str, str], newest_only: bool) -> None:
    pair = CorePair(newest_only=newest_only)
    ends = pair.establish()
    pair.hold("update")
    for end, connection, way in zip(pair.ends, ends, ways, strict=True):
        if way == "close":
            pair.close(end, connection)
        elif way == "abort":
            pair.abort(end, connection)
        elif way == "done":
            pair.shutdown_write(end, connection)
    pair.release("update")
    pair.drive()
    over = {"close", "abort"}
    both = set(ways) <= over or "abort" in ways
    assert pair.client.endpoint.groups[0].is_idle == both
    if not both:
        close_both(pair, ends)
    assert [end.endpoint.groups[0].is_idle for end in pair.ends] == [True, True]
    assert [len(end.endpoint.groups[0].pool) for end in pair.ends] == [1, 1]


def test_a_peer_that_never_closes_loses_our_memory() -> None:
    pair = CorePair()
    client, server = pair.establish()
    pair.close(pair.client, client)
    pair.drive()
    assert server.peer_closed
    pair.advance(9.9)
    assert pair.client.memory_bytes == 16384
    pair.advance(0.2)
    assert pair.client.memory_bytes == 0
    assert pair.client.endpoint.groups[0].is_idle
    # It closes at last, and nobody is hurt.
    pair.close(pair.server, server)
    pair.drive()
    assert pair.server.memory_bytes == 16384
    pair.establish()


def test_a_peer_cannot_prolong_the_wait_for_its_close() -> None:
    pair = CorePair()
    client, server = pair.establish()
    pair.close(pair.client, client)
    for _ in range(11):
        pair.advance(1)
        pair.send_update(server)
        pair.drive()
        pair.client.endpoint.reap(client, pair.now)
    assert pair.client.memory_bytes == 0


def test_giving_back_twice_is_once() -> None:
    pair = CorePair()
    ends = pair.establish()
    close_both(pair, ends)
    for end, connection in zip(pair.ends, ends, strict=True):
        keeper = end.endpoint._keeper
        for _ in range(2):
            end.endpoint.reap(connection, pair.now)
            keeper.remove_connection(connection, pair.now, clean=False)
            pair.settle(end)
    assert [end.endpoint.groups[0].places_taken for end in pair.ends] == [0, 0]


def test_a_token_of_a_later_connection_is_not_taken_for_an_earlier_one() -> None:
    pair = CorePair()
    ends = pair.establish()
    close_both(pair, ends)
    later, _ = pair.establish()
    group = later.group
    del group.connections[later.alert_token]
    later.alert_token = ends[0].alert_token
    group.connections[later.alert_token] = later
    pair.client.endpoint.reap(ends[0], pair.now)
    assert group.connections[later.alert_token] is later


def test_a_place_given_back_twice_is_caught() -> None:
    pair = CorePair()
    ends = pair.establish()
    close_both(pair, ends)
    with pytest.raises(AssertionError, match="given back twice"):
        pair.client.endpoint._keeper.leave(ends[0].group, pair.now)


def test_many_connections_come_and_go() -> None:
    pair = CorePair()
    for turn in range(5):
        ends = [pair.establish() for _ in range(12)]
        for position, each in enumerate(ends):
            if position % 3:
                close_both(pair, each)
            else:
                pair.abort(pair.server, each[1])
                pair.drive()
        assert pair.client.memory_bytes <= 16 * 16384, turn
    assert [end.endpoint.groups[0].places_taken for end in pair.ends] == [0, 0]
    verdicts = [event for event in pair.client.events if isinstance(event, Established)]
    assert len(verdicts) == 60
    pair.shutdown()
