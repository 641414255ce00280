"""Two ends, every fault at every step: their verdicts fit, and nothing is left over."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pysmc.core.actions import (
    ConnectQueuePair,
    CreateQueuePair,
    PostSend,
    RegisterMemory,
)
from pysmc.core.events import Established, FellBack
from pysmc.core.handshake import Handshake, HandshakeInput, HandshakeState
from pysmc.core.machine import ForbiddenInput
from pysmc.core.roles import Role
from pysmc.testing.pair import SMALL, CorePair, PairEnd
from smcproto import clc
from tests.core.old_kernel import put_the_old_kernel_in

Check = Callable[[CorePair, Handshake, Handshake], tuple[str, str]]
Fault = Callable[[CorePair, Handshake, Handshake], object]

KINDS: dict[str, Callable[[], CorePair]] = {
    "every update": CorePair,
    "newest update": lambda: CorePair(newest_only=True),
    "silent close": lambda: CorePair(silent_close=True),
    "version 2.0": lambda: CorePair(replace(SMALL, release=0)),
    "loopback": lambda: CorePair(loopback=True),
}


def cut_links(pair: CorePair, *ends: PairEnd) -> None:
    for end in ends or pair.ends:
        for group in end.endpoint.groups:
            for link in group.links:
                if link.handle is not None:
                    pair.cut_link(link, *ends)


def give_up(pair: CorePair, *handshakes: Handshake) -> None:
    for handshake in handshakes:
        pair.abandon(handshake)


def shut_down(pair: CorePair, end: PairEnd) -> None:
    end.endpoint.shutdown(pair.now)
    pair.settle(end)


FAULTS: dict[str, Fault] = {
    "nothing": lambda pair, client, server: None,
    "client gives up": lambda pair, client, server: pair.abandon(client),
    "server gives up": lambda pair, client, server: pair.abandon(server),
    "both give up": lambda pair, client, server: give_up(pair, server, client),
    "TCP ends": lambda pair, client, server: pair.cut_tcp(client),
    "TCP ends for the client": lambda pair, client, server: pair.cut_tcp(
        client, pair.client
    ),
    "link fails": lambda pair, client, server: cut_links(pair),
    "link fails for the client": lambda pair, client, server: cut_links(
        pair, pair.client
    ),
    "link fails for the server": lambda pair, client, server: cut_links(
        pair, pair.server
    ),
    "SENDs are lost": lambda pair, client, server: (
        pair.drop("send", pair.client),
        pair.drop("send", pair.server),
    ),
    "SENDs are late": lambda pair, client, server: pair.hold("send"),
    "SENDs to the server are late": lambda pair, client, server: pair.hold(
        "send", pair.server
    ),
    "never connected": lambda pair, client, server: pair.hold("connected"),
    "TCP to the client is late": lambda pair, client, server: pair.hold(
        "tcp", pair.client
    ),
    "TCP to the server is late": lambda pair, client, server: pair.hold(
        "tcp", pair.server
    ),
    "client shuts down": lambda pair, client, server: shut_down(pair, pair.client),
    "server shuts down": lambda pair, client, server: shut_down(pair, pair.server),
    "client's memory is late": lambda pair, client, server: pair.withhold(
        pair.client, RegisterMemory
    ),
    "server's memory is late": lambda pair, client, server: pair.withhold(
        pair.server, RegisterMemory
    ),
    "client's connect is late": lambda pair, client, server: pair.withhold(
        pair.client, ConnectQueuePair
    ),
    "server's queue pair is late": lambda pair, client, server: pair.withhold(
        pair.server, CreateQueuePair
    ),
    "client has no memory": lambda pair, client, server: pair.fail_next(
        pair.client, RegisterMemory, "no memory"
    ),
    "server has no memory": lambda pair, client, server: pair.fail_next(
        pair.server, RegisterMemory, "no memory"
    ),
    "client cannot connect": lambda pair, client, server: pair.fail_next(
        pair.client, ConnectQueuePair, "unreachable"
    ),
    "server cannot connect": lambda pair, client, server: pair.fail_next(
        pair.server, ConnectQueuePair, "unreachable"
    ),
    "client has no queue pair": lambda pair, client, server: pair.fail_next(
        pair.client, CreateQueuePair, "no memory", "EMFILE"
    ),
    "server has no queue pair": lambda pair, client, server: pair.fail_next(
        pair.server, CreateQueuePair, "no memory"
    ),
}


def begin(kind: str, *, reuse: bool) -> tuple[CorePair, Handshake, Handshake]:
    pair = KINDS[kind]()
    if reuse:
        pair.establish()
    return pair, *pair.connect()


CASES = [(kind, False) for kind in KINDS if kind != "newest update"]
CASES += [("every update", True), ("silent close", True)]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("kind", "reuse"), CASES)
def test_verdicts_fit(kind: str, reuse: bool, fault: str, verdicts_fit: Check) -> None:
    pair, *_ = begin(kind, reuse=reuse)
    steps = pair.drive()
    found: Counter[tuple[str, str]] = Counter()
    for step in range(steps + 1):
        pair, client, server = begin(kind, reuse=reuse)
        for _ in range(step):
            pair.step()
        FAULTS[fault](pair, client, server)
        pair.advance(50)
        # Late is not lost: everything arrives in the end, and hurts nobody.
        for late in ("send", "tcp", "connected"):
            pair.release(late)
        for end in pair.ends:
            end.withheld.clear()
        pair.advance(50)
        found[verdicts_fit(pair, client, server)] += 1
        pair.shutdown()
    if fault == "nothing":
        assert found == {("Established", "Established"): steps + 1}
    assert sum(found.values()) == steps + 1


@pytest.mark.parametrize(("kind", "reuse"), CASES)
def test_every_order_of_delivery_leads_to_a_connection(kind: str, reuse: bool) -> None:
    @given(st.randoms(use_true_random=False))
    def in_any_order(random: object) -> None:
        pair, client, server = begin(kind, reuse=reuse)
        while choices := pair.pending():
            pair.step(random.choice(choices))  # type: ignore[attr-defined]
        assert pair.connection(client).peer_token == pair.connection(server).alert_token

    in_any_order()


# Late Declines

TICK = 0.125


def run_with_delay(
    pair: CorePair,
    client: Handshake,
    server: Handshake,
    delay: float,
    losses: dict[float, PairEnd],
) -> None:
    """Let 17 s pass while TCP bytes take ``delay`` seconds and links fail at times."""
    pair.hold("tcp")
    since: dict[int, float] = {}
    moment = 0.0
    while moment < 17:
        for when, end in losses.items():
            if when == moment:
                cut_links(pair, end)
        pair.advance(0)
        for end in pair.ends:
            for delivery in list(end.pending()):
                if delivery.kind != "tcp":
                    continue
                sent = since.setdefault(id(delivery.place), moment)
                if moment >= sent + delay or not delivery.place.transit:
                    since.pop(id(delivery.place))
                    pair.step(delivery)
        pair.advance(TICK)
        moment += TICK


@given(
    delay=st.sampled_from([0.0, TICK, 0.5, 0.875, 2.0, 3.5]),
    client_loses=st.none() | st.integers(0, 80).map(lambda n: n * TICK),
    server_loses=st.none() | st.integers(0, 80).map(lambda n: n * TICK),
    lose_sends=st.sampled_from(["none", "client", "server"]),
    server_first=st.booleans(),
    kind=st.sampled_from(["every update", "silent close", "version 2.0"]),
)
@example(
    delay=0.875,
    client_loses=3.0,
    server_loses=1.0,
    lose_sends="none",
    server_first=True,
    kind="silent close",
)
@example(
    delay=0.5,
    client_loses=None,
    server_loses=1.0,
    lose_sends="client",
    server_first=False,
    kind="every update",
)
def test_two_declines_never_cross(
    delay: float,
    client_loses: float | None,
    server_loses: float | None,
    lose_sends: str,
    server_first: bool,
    kind: str,
) -> None:
    """Whatever fails when: no end reads the other's Decline as application data."""
    pair, client, server = begin(kind, reuse=False)
    pair.server_first = server_first
    if lose_sends != "none":
        end = pair.client if lose_sends == "client" else pair.server
        end._orders[PostSend] = lambda action: None
    losses = {}
    if client_loses is not None:
        losses[client_loses] = pair.client
    if server_loses is not None and server_loses not in losses:
        losses[server_loses] = pair.server
    run_with_delay(pair, client, server, delay, losses)
    assert client.is_over
    assert server.is_over
    if isinstance(pair.verdict(client), FellBack):
        for handshake in (client, server):
            tcp = pair.tcp(handshake)
            assert not tcp.arrived + tcp.transit, "\n".join(pair.trace)


def silent_link(client_wait: float, server_wait: float) -> tuple[bytes, bytes]:
    """Let CONFIRM LINK get lost; what would each application read from TCP?"""
    config = replace(SMALL)
    # A Config refuses waits with which Declines of a kernel's server would cross ours.
    object.__setattr__(config, "confirm_link_client_wait", client_wait)
    object.__setattr__(config, "confirm_link_server_wait", server_wait)
    pair = CorePair(config)
    pair.hold("send")
    client, server = pair.connect()
    pair.drive()
    while pair.next_timer() is not None and not client.is_over & server.is_over:
        when = pair.next_timer()
        assert when is not None
        pair.wire.now = when
        pair.run_timers()
        pair.drive()
    assert isinstance(pair.verdict(client), FellBack)
    assert isinstance(pair.verdict(server), FellBack)
    return bytes(pair.tcp(client).arrived), bytes(pair.tcp(server).arrived)


def test_a_silent_link_leaves_nothing_on_tcp() -> None:
    assert silent_link(4.0, 2.0) == (b"", b"")
    assert silent_link(2.0, 2.0) == (b"", b"")


def test_a_server_that_declines_as_the_kernel_did_crosses_the_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test of the tests above: they see what they are there to see."""
    put_the_old_kernel_in(monkeypatch)
    assert silent_link(4.0, 2.0) == (b"", b"")
    to_client, to_server = silent_link(2.0, 2.0)
    assert to_client[:4] == to_server[:4] == b"\xe2\xd4\xc3\xd9"


def test_the_deadline_of_the_handshake_does_not_shorten_the_waits() -> None:
    """Cut at 10 s, both waits would end together, however long they were meant."""
    pair = CorePair()
    pair.hold("send")
    client, server = pair.connect()
    pair.hold("tcp", pair.server)
    pair.advance(4.75)
    pair.release("tcp")
    pair.withhold(pair.client, ConnectQueuePair)
    pair.advance(3.75)
    pair.answer(pair.client, ConnectQueuePair)
    pair.drive()
    assert client.state is server.state is HandshakeState.AWAIT_LINK
    pair.advance(3.75)
    assert client.state is server.state is HandshakeState.AWAIT_LINK
    pair.advance(3.5)
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == "PEER_DECLINED"
    assert isinstance(pair.verdict(client), FellBack)
    assert pair.tcp(client).arrived == pair.tcp(server).arrived == b""


def is_in(handshake: Handshake, state: HandshakeState) -> bool:
    return handshake.state is state


def test_a_decline_in_the_last_moment_wins_over_the_link() -> None:
    """The hand-over looks at TCP once more, and a part of a Decline is a Decline."""
    decline = clc.Decline(
        version=2, out_of_sync=False, peer_id=bytes(8), diagnosis=0x01010000
    ).build()
    for first in (len(decline), 8, 3):
        pair = CorePair()
        client, server = pair.connect()
        pair.drive_until(partial(is_in, client, HandshakeState.AWAIT_LINK))
        pair.hold("tcp", pair.client)
        pair.send_tcp(server, decline[:first])
        tcp = pair.tcp(client)
        tcp.arrived += tcp.transit
        tcp.transit.clear()
        pair.drive()
        assert client.state is HandshakeState.HANDOVER
        pair.send_tcp(server, decline[first:] + b"hello")
        pair.release("tcp")
        pair.drive()
        verdict = pair.verdict(client)
        assert isinstance(verdict, FellBack)
        assert verdict.reason.peer_code == 0x01010000
        assert tcp.arrived + tcp.transit == b"hello"


# What stays of a handshake

OUTCOMES: dict[str, Fault] = {
    name: FAULTS[name]
    for name in (
        "nothing",
        "client gives up",
        "TCP ends",
        "link fails",
        "client cannot connect",
        "server cannot connect",
    )
}


@pytest.mark.parametrize("fault", OUTCOMES)
def test_nothing_of_an_ended_handshake_is_kept(fault: str) -> None:
    pair, client, server = begin("every update", reuse=False)
    pair.drive_until(lambda: bool(pair.server.endpoint.groups))
    OUTCOMES[fault](pair, client, server)
    pair.advance(20)
    gone = [weakref.ref(client), weakref.ref(server)]
    if fault != "nothing":
        assert [end.endpoint.groups for end in pair.ends] == [[], []]
    for end in pair.ends:
        end.tcp.clear()
        end.events.clear()
        end.lost.clear()
    pair.news.clear()
    del client, server
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_nothing_of_an_ended_connection_is_kept() -> None:
    pair = CorePair()
    client, server = pair.establish()
    gone = [weakref.ref(client), weakref.ref(server)]
    pair.close(pair.client, client)
    pair.drive()
    pair.close(pair.server, server)
    pair.drive()
    for end in pair.ends:
        end.tcp.clear()
        end.events.clear()
        end.queue_pairs.clear()
    pair.news.clear()
    del client, server
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


# The object itself


def test_it_says_what_it_is_and_reads_only_where_it_may() -> None:
    handshake = Handshake(Role.CLIENT, "host", 10.0)
    assert repr(handshake) == "<Handshake client awaiting the Accept>"
    assert (handshake.wanted, handshake.is_over) == (8, False)
    assert handshake.move(HandshakeInput.ACCEPT)
    assert handshake.wanted == 0
    assert handshake.move(HandshakeInput.UNABLE)
    assert handshake.is_over
    assert not handshake.move(HandshakeInput.BROKEN)
    assert handshake.state is HandshakeState.FELL_BACK


def test_a_forbidden_input_does_not_move_it() -> None:
    handshake = Handshake(Role.SERVER, "host", 10.0)
    with pytest.raises(ForbiddenInput, match="server handshake: QUIET in state AWAIT"):
        handshake.move(HandshakeInput.QUIET)
    assert handshake.state is HandshakeState.AWAIT_PROPOSAL


def test_established_is_told_once() -> None:
    pair = CorePair()
    client, server = pair.establish()
    for end in pair.ends:
        assert [type(event) for event in end.events] == [Established]
    assert client.peer_token == server.alert_token
