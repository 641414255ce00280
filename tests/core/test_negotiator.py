"""What both roles share: reasons of the fabric, partial messages, endings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pysmc.core.actions import ConnectQueuePair, CreateQueuePair, RegisterMemory
from pysmc.core.context import Context
from pysmc.core.events import Failed, FellBack
from pysmc.core.handshake import Handshake, HandshakeState
from pysmc.core.keeper import Keeper
from pysmc.core.negotiator import Negotiator, reason_of_status
from pysmc.core.roles import Role
from pysmc.errors import ConnectionReset, HandshakeTimeout, RemoteProtocolError
from pysmc.testing.pair import SMALL, CorePair, CountingTokens
from smcproto import clc

DECLINE = clc.Decline(
    version=2, out_of_sync=False, peer_id=bytes(8), diagnosis=0x12345678, os_type=1
)


@pytest.mark.parametrize(
    ("status", "detail", "name"),
    [
        ("foreign user", "", "FOREIGN_USER"),
        ("unreachable", "no such endpoint", "NO_DEVICE"),
        ("no memory", "ENOMEM: 1 GiB", "NO_MEMORY"),
        ("no memory", "EMFILE: too many open files", "LIMIT"),
        ("no memory", "ENFILE", "LIMIT"),
        ("no memory", "ENOMEM: RLIMIT_MEMLOCK allows 65536", "MEMLOCK"),
        ("no route", "10.0.0.9 does not answer", "ROUTE"),
        ("timed out", "EMFILE", "LINK_FAILED"),
        ("peer gone", "", "LINK_FAILED"),
    ],
)
def test_how_a_fabric_operation_ended_becomes_a_reason(
    status: str, detail: str, name: str
) -> None:
    why = reason_of_status(status, detail)
    assert (why.name, why.side) == (name, "local")
    assert status in why.text
    assert detail in why.text


@pytest.mark.parametrize(
    "order",
    [CreateQueuePair, RegisterMemory, ConnectQueuePair],
    ids=lambda o: o.__name__,
)
@pytest.mark.parametrize("by", ["client", "server"])
def test_an_order_that_fails_is_a_fallback_with_its_reason(
    order: type, by: str
) -> None:
    pair = CorePair()
    end = pair.client if by == "client" else pair.server
    pair.fail_next(end, order, "foreign user", "uid 7")
    client, server = pair.connect()
    pair.advance(6)
    here, there = (client, server) if by == "client" else (server, client)
    verdict = pair.verdict(here)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == "FOREIGN_USER"
    assert "uid 7" in verdict.reason.text
    other = pair.verdict(there)
    assert isinstance(other, FellBack)
    # A client that sees the server's queue pair go declines by itself.
    if order is not ConnectQueuePair or by == "client":
        assert other.reason.peer_code == 0x03030000
    pair.check_released()


def test_an_unknown_code_of_the_peer_is_passed_on() -> None:
    pair = CorePair()
    client, _ = pair.connect()
    pair.tcp(client).transit += DECLINE.build()
    pair.drive()
    verdict = pair.verdict(client)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.peer_code == 0x12345678
    assert "12345678" in verdict.reason.text
    assert "UNKNOWN" in verdict.reason.text


def at(state: HandshakeState, *, role: str) -> tuple[CorePair, Handshake, Handshake]:
    """Bring one end into AWAIT_LINK, AWAIT_DECLINE or HANDOVER, with half a Decline."""
    pair = CorePair()
    client, server = pair.connect()
    pair.hold("send")
    pair.drive()
    here, there = (client, server) if role == "client" else (server, client)
    pair.send_tcp(there, DECLINE.build()[:20])
    pair.drive()
    if state is HandshakeState.AWAIT_DECLINE:
        pair.hold("tcp", pair.tcp(here).end)
        if role == "client":
            pair.advance(4.1)
        else:
            assert server.link is not None
            pair.cut_link(server.link, pair.server, status="timed out")
            pair.drive()
    elif state is HandshakeState.HANDOVER:
        pair.release("send")
        pair.drive()
    assert here.state is state
    return pair, here, there


@pytest.mark.parametrize("role", ["client", "server"])
def test_half_a_decline_in_the_wait_for_one_breaks_the_stream(role: str) -> None:
    pair, here, there = at(HandshakeState.AWAIT_DECLINE, role=role)
    pair.advance(9.1)
    verdict = pair.verdict(here)
    assert isinstance(verdict, Failed)
    if role == "client":
        assert isinstance(verdict.error, RemoteProtocolError)
        assert "CLC message broke off" in str(verdict.error)
    else:
        assert isinstance(verdict.error, HandshakeTimeout)
        assert "did not decline in time" in str(verdict.error)
    assert isinstance(pair.verdict(there), Failed | FellBack)


@pytest.mark.parametrize("role", ["client", "server"])
def test_half_a_decline_at_the_hand_over_is_waited_for(role: str) -> None:
    for rest in (True, False):
        pair, here, there = at(HandshakeState.HANDOVER, role=role)
        if rest:
            pair.send_tcp(there, DECLINE.build()[20:] + b"hello")
        pair.advance(10)
        verdict = pair.verdict(here)
        if rest:
            assert isinstance(verdict, FellBack)
            assert pair.tcp(here).arrived == b"hello"
        else:
            assert isinstance(verdict, Failed)
            assert isinstance(verdict.error, HandshakeTimeout)
        pair.advance(100)
        pair.shutdown()


def test_half_a_decline_does_not_hold_up_version_20_for_ever() -> None:
    """ADD LINK does not come either: what is left to wait for has a deadline."""
    pair = CorePair(replace(SMALL, release=0))
    client, server = pair.connect()
    pair.drive_until(lambda: client.state is HandshakeState.AWAIT_ADD_LINK)
    pair.hold("send", pair.client)
    pair.send_tcp(server, DECLINE.build()[:7])
    pair.drive()
    pair.advance(2.1)
    assert client.state is HandshakeState.HANDOVER
    pair.advance(1.0)
    verdict = pair.verdict(client)
    assert isinstance(verdict, Failed)
    assert isinstance(verdict.error, HandshakeTimeout)
    pair.advance(100)
    pair.shutdown()


def test_half_a_decline_keeps_a_client_from_declining_at_once() -> None:
    pair, client, server = at(HandshakeState.AWAIT_LINK, role="client")
    assert client.link is not None
    pair.drop("send", pair.client)
    pair.cut_link(client.link, pair.client)
    pair.drive()
    assert client.state is HandshakeState.AWAIT_DECLINE
    pair.send_tcp(server, DECLINE.build()[20:])
    pair.drive()
    assert isinstance(pair.verdict(client), FellBack)


def test_a_client_whose_link_fails_late_leaves_time_for_a_decline_of_linux() -> None:
    pair = CorePair()
    pair.hold("send")
    client, server = pair.connect()
    pair.drive()
    pair.advance(2.5)
    assert client.link is not None
    pair.drop("send", pair.client)
    pair.cut_link(client.link, pair.client, status="timed out")
    pair.drive()
    assert client.state is HandshakeState.AWAIT_DECLINE
    pair.advance(4.4)
    assert not client.is_over
    pair.advance(0.2)
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == "PEER_DECLINED"
    assert isinstance(pair.verdict(client), FellBack)
    declines = [line for line in pair.trace if "Decline" in line]
    assert len(declines) == 1
    assert "client: " in declines[0]


def test_a_server_never_declines_after_the_confirm() -> None:
    """Its Decline could cross the client's, however long that took."""
    pair = CorePair()
    pair.hold("send")
    client, server = pair.connect()
    pair.drive()
    pair.hold("tcp", pair.server)
    pair.advance(8.9)
    assert isinstance(pair.verdict(client), FellBack)
    assert not server.is_over
    pair.advance(0.2)
    verdict = pair.verdict(server)
    assert isinstance(verdict, Failed)
    assert isinstance(verdict.error, HandshakeTimeout)
    assert "did not decline in time" in str(verdict.error)
    assert not any("server: tcp 256 sends Decline" in line for line in pair.trace)
    assert any("client: tcp 256 sends Decline" in line for line in pair.trace)


def test_a_queue_pair_that_is_ready_too_late_is_not_used() -> None:
    pair = CorePair()
    pair.hold("connected", pair.server)
    _, server = pair.connect()
    pair.advance(7.1)
    assert isinstance(pair.verdict(server), FellBack)
    pair.release("connected")
    pair.drive()
    said = [line.replace("CONFIRM_LINK_TIMEOUT", "") for line in pair.trace]
    assert not any("CONFIRM_LINK" in line for line in said)


def is_in(handshake: Handshake, state: HandshakeState) -> bool:
    return handshake.state is state


def test_a_queue_pair_that_was_lost_is_not_used_though_it_was_connected() -> None:
    pair = CorePair()
    pair.hold("connected", pair.server)
    _, server = pair.connect()
    pair.drive()
    assert server.link is not None
    link, endpoint = server.link, pair.server.endpoint
    endpoint.link_down(link, "timed out", "", pair.now)
    assert is_in(server, HandshakeState.AWAIT_DECLINE)
    list(endpoint.take_actions())
    endpoint.pair_connected(link, pair.now)
    assert not list(endpoint.take_actions())


def test_a_link_that_fails_twice_is_waited_for_once() -> None:
    pair = CorePair()
    pair.hold("send")
    client, _ = pair.connect()
    pair.drive()
    pair.advance(2.5)
    assert client.link is not None
    for detail in ("first", "second"):
        pair.client.endpoint._client.link_lost(
            client, reason_of_status("timed out", detail), pair.now
        )
    assert client.problem is not None
    assert "first" in client.problem.text
    pair.advance(10)
    assert client.is_over


@pytest.mark.parametrize("version_2_0", [True, False])
def test_a_link_lost_after_confirm_link_is_no_fallback(version_2_0: bool) -> None:
    pair = CorePair(replace(SMALL, release=0) if version_2_0 else SMALL)
    client, server = pair.connect()
    pair.hold("send", pair.client)
    pair.drive()
    # Half a Decline holds the client at the hand-over.
    pair.send_tcp(server, DECLINE.build()[:9])
    pair.drive()
    pair.release("send")
    pair.drive_until(lambda: client.state.name in {"HANDOVER", "AWAIT_ADD_LINK"})
    assert client.link is not None
    pair.client.endpoint.link_down(client.link, "timed out", "cable", pair.now)
    pair.settle(pair.client)
    verdict = pair.verdict(client)
    assert isinstance(verdict, Failed)
    assert isinstance(verdict.error, ConnectionReset)
    assert "cable" in str(verdict.error)
    assert verdict.error.diagnosis == 0x02010000


def test_tokens_are_unique_in_their_group() -> None:
    class Repeating(CountingTokens):
        def alert_token(self) -> int:
            self.given = getattr(self, "given", 0) + 1
            return self.given // 3 + 1

    pair = CorePair()
    pair.client.endpoint._context.tokens = Repeating()
    tokens = [pair.establish()[0].alert_token for _ in range(5)]
    assert len(set(tokens)) == 5


def test_the_shared_half_is_no_role() -> None:
    context = Context(
        CorePair().client.endpoint._context.identity, (), SMALL, CountingTokens()
    )
    negotiator = Negotiator(context, Keeper(context, CorePair().client.endpoint))
    handshake = Handshake(Role.CLIENT, "host", 1.0)
    with pytest.raises(NotImplementedError):
        negotiator.memory_ready(handshake, 0.0)
    with pytest.raises(NotImplementedError):
        negotiator.begin_add_link(handshake)
    with pytest.raises(NotImplementedError):
        negotiator.await_link(handshake, 0.0)
    with pytest.raises(NotImplementedError):
        _ = negotiator.decline_due
    with pytest.raises(NotImplementedError):
        negotiator.decline_wait_over(handshake, 0.0)
