"""The door: it passes over what is gone, and time and shutdown end things."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pysmc.core.actions import CreateQueuePair, PublishUpdate, SendClc
from pysmc.core.connection import Connection
from pysmc.core.endpoint import DEADLINES_AT_ONCE, Endpoint, Identity
from pysmc.core.events import Failed, FellBack, News
from pysmc.core.handshake import HandshakeState
from pysmc.core.rmb import RmbState
from pysmc.core.roles import Role
from pysmc.errors import ConnectionReset
from pysmc.reasons import reason
from pysmc.testing.pair import SMALL, CorePair, CountingTokens
from smcproto import clc, llc

Ends = tuple[Connection, Connection]


def test_an_endpoint_without_a_device_can_still_decline() -> None:
    endpoint = Endpoint(Identity(bytes(8), "host"), (), SMALL, CountingTokens())
    why = reason("NO_DEVICE", "local")
    handshake = endpoint.connect("peer", 0.0, why)
    (action,) = endpoint.take_actions()
    (event,) = endpoint.take_events()
    assert isinstance(action, SendClc)
    assert clc.Decline.parse(action.data).diagnosis == 0x03030000
    assert isinstance(event, FellBack)
    assert event.reason is why
    assert handshake.is_over
    assert endpoint.next_timer() is None


def test_room_is_bounded() -> None:
    pair = CorePair(replace(SMALL, max_handshakes=2))
    assert pair.client.endpoint.has_room()
    first, _ = pair.connect()
    pair.connect()
    assert not pair.client.endpoint.has_room()
    assert pair.client.endpoint.handshake_count == 2
    pair.abandon(first)
    assert pair.client.endpoint.has_room()


def test_what_comes_for_a_handshake_that_is_over_is_passed_over() -> None:
    pair = CorePair()
    client, server = pair.connect()
    pair.drive()
    endpoint = pair.client.endpoint
    endpoint.receive_tcp(client, b"GET / HT", pair.now)
    endpoint.tcp_lost(client, pair.now, None)
    endpoint.tcp_quiet(client, pair.now)
    endpoint.abandon(client, pair.now)
    assert client.link is not None
    endpoint.pair_created(client.link, client.link.local.qp_number, pair.now)
    endpoint.pair_connecting(client.link, pair.now)
    endpoint.pair_connected(client.link, pair.now)
    assert (endpoint.take_actions(), endpoint.take_events()) == ([], [])
    assert pair.connection(client).is_open
    assert pair.connection(server).is_open


def test_what_comes_for_a_group_that_is_gone_is_passed_over() -> None:
    pair = CorePair()
    client, _ = pair.establish()
    link = client.link
    pair.shutdown()
    endpoint = pair.client.endpoint
    endpoint.receive_message(link, bytes(44), pair.now)
    endpoint.link_down(link, "flushed", "", pair.now)
    endpoint.reap(client, pair.now)
    update = (1, client.alert_token, 0, 0, 0)
    assert endpoint.receive_update(link, update, pair.now) is None
    assert endpoint.connection_of(link, client.alert_token) is None
    assert (endpoint.take_actions(), endpoint.take_events()) == ([], [])


def test_an_unknown_token_is_passed_over_and_other_groups_are_not_searched() -> None:
    pair = CorePair()
    first, _ = pair.establish()
    other, there = pair.establish(peer_key="other")
    for token in (0, 0xFFFFFFFF, other.peer_token):
        pair.send_update(first, token=token, flags=0x20)
        pair.drive()
    assert there.is_open
    assert pair.news.get(there, 0) == 0


def test_the_end_of_tcp_names_what_was_awaited() -> None:
    pair = CorePair()
    pair.hold("tcp", pair.server)
    client, _ = pair.connect()
    pair.client.endpoint.tcp_lost(client, pair.now, OSError("cable"))
    pair.settle(pair.client)
    verdict = pair.verdict(client)
    assert isinstance(verdict, Failed)
    assert isinstance(verdict.error, ConnectionReset)
    assert str(verdict.error) == (
        "TCP connection ended while awaiting the Accept: cable"
    )
    client, _ = pair.connect()
    pair.cut_tcp(client)
    pair.drive()
    verdict = pair.verdict(client)
    assert isinstance(verdict, Failed)
    assert str(verdict.error).endswith("closed it")


def test_bytes_that_are_no_clc_fail_the_handshake() -> None:
    pair = CorePair()
    client, server = pair.connect()
    pair.tcp(server).transit[:] = b"GET / HTTP/1.1\r\n"
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, Failed)
    assert "no CLC message" in str(verdict.error)
    assert isinstance(pair.verdict(client), Failed)


# Updates that come before the handshake is over


def early_pair() -> tuple[CorePair, Connection, Connection]:
    """Let a client write before the server has its Confirm; gives both connections."""
    pair = CorePair()
    first = pair.establish()
    pair.close(pair.client, first[0])
    pair.close(pair.server, first[1])
    pair.drive()
    client, server = pair.connect()
    pair.drive_until(lambda: server.state is HandshakeState.AWAIT_CONFIRM)
    pair.hold("tcp", pair.server)
    pair.drive()
    assert server.connection is not None
    return pair, pair.connection(client), server.connection


def test_what_was_written_before_the_confirm_came_is_there_afterwards() -> None:
    pair, client, server = early_pair()
    pair.write(pair.client, client, b"early")
    pair.write(pair.client, client, b" bird")
    pair.drive()
    assert (server.is_established, server.readable) == (False, 0)
    pair.release("tcp")
    pair.drive()
    assert pair.news[server] & News.DATA
    assert pair.read(pair.server, server, 99) == b"early bird"


def test_a_lie_before_the_confirm_came_ends_the_connection_afterwards() -> None:
    pair, client, server = early_pair()
    pair.send_update(client, producer=0xFFFFFFFF)
    pair.drive()
    pair.release("tcp")
    pair.drive()
    assert server.error is not None
    assert pair.news[server] & News.ABORTED
    assert client.peer_aborted
    assert pair.server.endpoint.groups[0].is_idle


def test_an_answer_to_what_came_before_is_ordered() -> None:
    pair, client, server = early_pair()
    pair.send_update(client, consumer=7)
    pair.drive()
    pair.release("tcp")
    ordered: list[PublishUpdate] = []
    pair.server._orders[PublishUpdate] = ordered.append
    pair.drive()
    assert [action.connection for action in ordered] == [server]


def test_news_for_a_client_that_still_looks_at_tcp_is_kept() -> None:
    """First contact: the server may write as soon as it has the client's answer."""
    pair = CorePair(replace(SMALL, release=0))
    client, server = pair.connect()
    pair.drive_until(lambda: client.state is HandshakeState.AWAIT_ADD_LINK)
    connection = client.connection
    assert connection is not None
    there = server.connection
    assert there is not None
    assert (
        pair.client.endpoint.receive_update(
            connection.link, (1, connection.alert_token, 3, 0, 0), pair.now
        )
        is None
    )
    assert connection.readable == 3
    pair.drive()
    assert pair.news[connection] & News.DATA


# Time


def test_there_is_no_timer_when_there_is_nothing() -> None:
    pair = CorePair()
    assert pair.next_timer() is None
    pair.client.endpoint.handle_timer(1000.0)
    assert pair.client.endpoint.take_events() == []


def test_deadlines_of_one_moment_end_a_handshake_once() -> None:
    """CONFIRM RKEY and the handshake run out together: one verdict."""
    config = replace(SMALL, llc_wait=2.0, accept_wait=2.5)
    pair = CorePair(config)
    pair.establish()
    pair.hold("send", pair.server)
    client, server = pair.connect()
    pair.advance(10)
    assert [type(pair.verdict(each)) for each in (client, server)] == [
        FellBack,
        FellBack,
    ]


def test_the_whole_handshake_is_bounded() -> None:
    pair = CorePair()
    pair.hold("tcp", pair.server)
    client, server = pair.connect()
    pair.advance(5.9)
    pair.release("tcp")
    pair.drive_until(lambda: server.state is HandshakeState.AWAIT_CONFIRM)
    pair.hold("tcp")
    pair.advance(4.2)
    assert isinstance(pair.verdict(server), Failed)
    assert client.is_over


@pytest.mark.parametrize("is_told_at_last", [True, False])
def test_a_post_that_is_never_completed_ends_its_link(is_told_at_last: bool) -> None:
    pair = CorePair(publish_later=True)
    client, _ = pair.establish()
    pair.hold("publish", pair.client)
    pair.write(pair.client, client, b"x")
    pair.advance(61)
    assert client.link.is_suspect
    assert not pair.client.lost, "it has one more interval"
    if is_told_at_last:
        pair.release("publish")
    pair.advance(60)
    assert client.link.is_active is is_told_at_last
    assert bool(pair.client.lost) is not is_told_at_last
    assert not (is_told_at_last and client.link.is_suspect)


# The end


@pytest.mark.parametrize("step", range(16))
def test_shutdown_at_any_step_gives_everything_back(step: int) -> None:
    pair = CorePair()
    established = pair.establish()
    waiting = [pair.connect() for _ in range(3)]
    waiting += [pair.connect(peer_key=key) for key in ("a", "a", "a")]
    for _ in range(4 * step):
        pair.step()
    for end in pair.ends:
        end.endpoint.shutdown(pair.now)
        pair.settle(end)
    for end in pair.ends:
        assert end.endpoint.next_timer() is None
        assert not end.queue_pairs
        assert end.memory_bytes == 0
    pair.advance(20)
    pair.check_released()
    assert all(each.is_over for both in waiting for each in both)
    for end, connection in zip(pair.ends, established, strict=True):
        assert connection in [event.connection for event in end.lost]


def test_shutdown_tells_the_peer() -> None:
    pair = CorePair(silent_close=True)
    _, server = pair.establish()
    pair.client.endpoint.shutdown(pair.now)
    pair.settle(pair.client)
    pair.drive()
    assert [event.connection for event in pair.server.lost] == [server]
    assert "reason 00030000" in str(server.error)
    pair.check_released()


def test_shutdown_begins_no_first_contact_for_those_who_waited() -> None:
    pair = CorePair()
    pair.hold("tcp", pair.client)
    pair.connect()
    pair.drive()
    for _ in range(5):
        pair.connect()
    pair.drive()
    created: list[CreateQueuePair] = []
    pair.server._orders[CreateQueuePair] = created.append
    pair.server.endpoint.shutdown(pair.now)
    pair.settle(pair.server)
    assert created == []


def test_two_ends_of_one_endpoint_talk() -> None:
    pair = CorePair(loopback=True)
    client, server = pair.establish()
    assert client.group is not server.group
    assert {client.role, server.role} == {Role.CLIENT, Role.SERVER}
    pair.write(pair.client, client, b"to myself")
    pair.drive()
    assert pair.read(pair.client, server, 99) == b"to myself"
    pair.shutdown()


def test_delete_link_during_the_handshake_ends_it(verdicts_fit) -> None:
    message = llc.DeleteLink(
        version=2, response=False, whole_group=True, link_number=0, reason=0x00040000
    )
    for to_client in (True, False):
        for step in range(12):
            pair = CorePair()
            client, server = pair.connect()
            for _ in range(step):
                pair.step()
            end = pair.client if to_client else pair.server
            for stub in end.queue_pairs.values():
                stub.sends.append(message.build())
            pair.advance(30)
            verdicts_fit(pair, client, server)
            pair.shutdown()


# The invariants can see


def test_the_checks_see_what_they_are_there_to_see() -> None:
    def broken(change: object) -> str:
        pair = CorePair()
        client, _server = pair.establish()
        waiting, _ = pair.connect()
        change(pair, client, waiting)  # type: ignore[operator]
        with pytest.raises(AssertionError) as caught:
            pair.check()
        return str(caught.value)

    def lose_place(pair: CorePair, client: Connection, waiting: object) -> None:
        client.group.places_taken += 1

    def lose_timer(pair: CorePair, client: Connection, waiting: object) -> None:
        pair.client.endpoint._context.timers.cancel(("handshake", waiting))

    def keep_timer(pair: CorePair, client: Connection, waiting: object) -> None:
        pair.client.endpoint._context.timers.set(("close", "nobody"), 5.0)

    def keep_idle_timer(pair: CorePair, client: Connection, waiting: object) -> None:
        pair.client.endpoint._context.timers.set(("idle", client.group), 5.0)

    def share_memory(pair: CorePair, client: Connection, waiting: object) -> None:
        client.group.pool.give(client.rmb)

    def leak_domain(pair: CorePair, client: Connection, waiting: object) -> None:
        pair.client.endpoint._keeper.groups.remove(client.group)
        del pair.client.endpoint._keeper.flows[client.group]
        pair.client.endpoint._keeper.rmb_bytes = 0
        pair.client.endpoint._keeper.rmb_bytes_of.clear()
        pair.client.endpoint._context.timers.cancel(("test link", client.link))

    def end_twice(pair: CorePair, client: Connection, waiting: object) -> None:
        client._rx_reported = 5

    def lose_state(pair: CorePair, client: Connection, waiting: object) -> None:
        client.rmb.state = RmbState.GONE

    assert "places and users differ" in broken(lose_place)
    assert "no timer" in broken(lose_timer)
    assert "is gone" in broken(keep_idle_timer)
    assert "RMB used twice" in broken(share_memory)
    assert "memory of a group that ended" in broken(leak_domain)
    assert broken(end_twice)
    assert "gone" in broken(lose_state)
    with pytest.raises(AttributeError, match="group"):
        broken(keep_timer)


def test_deadlines_are_handled_so_many_at_once() -> None:
    pair = CorePair()
    endpoint = pair.server.endpoint
    stalled = [endpoint.accept(f"host {n}", 0.0) for n in range(DEADLINES_AT_ONCE + 1)]
    endpoint.handle_timer(6.0)
    assert sum(handshake.is_over for handshake in stalled) == DEADLINES_AT_ONCE
    assert endpoint.next_timer() == 6.0, "the driver comes back at once"
    endpoint.handle_timer(6.0)
    assert all(handshake.is_over for handshake in stalled)
    assert endpoint.next_timer() is None
