"""Demands on the core that no other test asks: ends at every step, in every order."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.config import KIB, Config
from pysmc.core.actions import CreateQueuePair, RegisterMemory
from pysmc.core.events import Established, FellBack, News
from pysmc.testing.pair import SMALL, CorePair, PairEnd

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.core.handshake import Handshake

WAY = pytest.mark.parametrize("way", ["first contact", "reuse"])
STEPS_MAX = 200
NUMBERS = re.compile(r"(?<==)\S+|\d+(\.\d+)?")


def begin(way: str, **options: Any) -> tuple[CorePair, Handshake, Handshake]:
    """Begin a handshake that makes first contact, or one that reuses a group."""
    pair = CorePair(**options)
    if way == "reuse":
        pair.establish()
    return pair, *pair.connect()


def every_step(way: str, strike: Callable[[CorePair, Any, Any], bool]) -> int:
    """Strike after 0, 1, 2 ... steps of a handshake; gives how many steps it has.

    A strike returns False where there is nothing to strike yet.
    """
    struck = 0
    for step in range(STEPS_MAX):
        pair, client, server = begin(way)
        taken = sum(pair.step() for _ in range(step))
        if strike(pair, client, server):
            struck += 1
            pair.advance(60)
            for side, end in zip(pair.ends, (client, server), strict=True):
                assert end.is_over, "\n".join(pair.trace)
                come_again(pair, side, end)
            pair.shutdown()
        if taken < step:
            return struck
    raise AssertionError("the handshake has no end")


def come_again(pair: CorePair, side: PairEnd, handshake: Handshake) -> None:
    """Clean up once more by both paths, when all is over."""
    verdict = pair.verdict(handshake)
    if isinstance(verdict, Established):
        verdict.connection.abort()
        side.endpoint.reap(verdict.connection, pair.now)
    side.endpoint.abandon(handshake, pair.now)
    pair.settle(side)


@WAY
@pytest.mark.parametrize("end", ["client", "server", "both"])
def test_a_link_that_is_lost_at_any_step_leaves_nothing(way, end) -> None:
    """A group that ends while memory is made for a connection on it."""

    def lose(pair: CorePair, client: Handshake, server: Handshake) -> bool:
        links = [
            link for side in pair.ends for g in side.endpoint.groups for link in g.links
        ]
        links = [link for link in links if link.handle is not None]
        if not links:
            return False
        ends = {"client": (pair.client,), "server": (pair.server,), "both": pair.ends}
        pair.cut_link(links[0], *ends[end])
        return True

    assert every_step(way, lose) > 5


@WAY
@pytest.mark.parametrize("end", ["client", "server", "both"])
def test_giving_up_at_any_step_gives_back_once(way, end) -> None:
    """Two paths that clean up: whoever comes second finds nothing to do."""

    def give_up(pair: CorePair, client: Handshake, server: Handshake) -> bool:
        chosen = {"client": [client], "server": [server], "both": [client, server]}[end]
        for handshake in chosen:
            if not handshake.is_over:
                for _ in range(2):
                    pair.abandon(handshake)
        # Over already: it is the application that ends it, then both paths again.
        for side, handshake in zip(pair.ends, (client, server), strict=True):
            verdict = pair.verdict(handshake)
            if handshake in chosen and isinstance(verdict, Established):
                for _ in range(2):
                    pair.abort(side, verdict.connection)
                side.endpoint.abandon(handshake, pair.now)
                pair.settle(side)
        return True

    assert every_step(way, give_up) > 5


@WAY
def test_everything_can_be_shown_at_any_step(way) -> None:
    """Diagnostics meet what is half made and what is half gone."""
    pair, *handshakes = begin(way)
    shown: set[str] = set()

    def show() -> None:
        for side in pair.ends:
            for group in side.endpoint.groups:
                things = [group, *group.links, *group.connections.values(), *group.pool]
                things += [each.rmb for each in group.connections.values()]
                shown.update(f"{each!r} {each}" for each in things)
                shown.add(f"{group.version} {group.active_link} {group.is_idle}")
                for each in group.connections.values():
                    shown.add(f"{each.state} {each.readable} {each.writable}")
        shown.update(f"{each!r}" for each in handshakes)

    while pair.step():
        show()
    for side, handshake in zip(pair.ends, handshakes, strict=True):
        verdict = pair.verdict(handshake)
        assert isinstance(verdict, Established)
        pair.close(side, verdict.connection)
        show()
        while pair.step():
            show()
    for side in pair.ends:
        side.endpoint.shutdown(pair.now)
        pair.settle(side)
        show()
    assert len(shown) > 20


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("how", ["success", "link lost", "never"])
@pytest.mark.parametrize("ending", ["close", "abort"])
def test_writes_that_complete_after_the_close_touch_nothing(count, how, ending) -> None:
    pair = CorePair(publish_later=True)
    client, server = pair.establish()
    other, _ = pair.establish()
    pair.hold("publish", pair.client)
    for number in range(count):
        assert pair.write(pair.client, client, bytes([number]) * 10) == 10
    assert client.oldest_post is not None
    getattr(pair, ending)(pair.client, client)
    pair.drive()
    if ending == "close":  # an abort is answered by one
        memory, found = client.rmb, pair.client.endpoint.connection_of
        assert memory not in list(client.group.pool), "the peer may still write there"
        assert found(client.link, client.alert_token) is client
        sent = b"".join(bytes([number]) * 10 for number in range(count))
        assert pair.read(pair.server, server, 1000) == sent
    pair.news.clear()
    if how == "link lost":
        pair.cut_link(client.link)
    if how != "never":
        pair.release("publish", pair.client)
    pair.drive()
    assert not pair.news.get(client), "an ended connection is told of its completions"
    pair.close(pair.server, server)
    pair.drive()
    if how != "link lost":
        # The other connection of the link goes on with its own completions.
        pair.release("publish", pair.client)
        assert pair.write(pair.client, other, b"on") == 2
        pair.drive()
        assert pair.peer_of(pair.client, other) is not None
    pair.shutdown()


@pytest.mark.parametrize("first", ["the close", "the update"])
def test_an_update_and_a_close_in_one_turn(first) -> None:
    """The token is looked up, and its connection goes before it is used."""
    pair = CorePair()
    client, server = pair.establish()
    pair.close(pair.client, client)
    pair.drive()
    pair.news.clear()
    if first == "the update":
        pair.send_update(client)
        pair.step()
        pair.close(pair.server, server)
    else:
        pair.close(pair.server, server)
        assert not server.group.connections, "both have ended it"
        pair.send_update(client)
    pair.drive()
    assert server not in pair.news or not pair.news[server] & News.DATA
    assert pair.server.endpoint.connection_of(server.link, server.alert_token) is None
    pair.shutdown()


def test_a_late_update_does_not_meet_the_next_connection_of_its_memory() -> None:
    pair = CorePair()
    client, server = pair.establish()
    memory, token = server.rmb, server.alert_token
    pair.close(pair.client, client)
    pair.drive()
    pair.close(pair.server, server)
    pair.drive()
    _, following = pair.establish()
    assert following.rmb is memory, "the memory is used again"
    assert following.alert_token != token
    pair.news.clear()
    # What the old connection would have said: 9 bytes, and a close behind them.
    found = pair.server.endpoint.receive_update(
        following.link, (77, token, 9, 0, 0x0010), pair.now
    )
    assert found is None
    assert following.readable == 0
    assert following.is_open
    pair.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_full_group_ends_while_its_connections_are_closed(seed) -> None:
    """255 of them, closed and aborted by both ends in any order around the loss."""
    count = 255 if seed == 0 else 25
    draw = random.Random(seed)
    limits = Config(
        rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB, max_pinned_bytes=1 << 30
    )
    pair = CorePair(limits, silent_close=bool(seed % 2))
    pair.checking = False  # quadratic with so many; what is left is checked at the end
    both = [pair.establish() for _ in range(count)]
    assert len({client.group for client, _ in both}) == 1
    ends = [
        (side, connection)
        for pairing in both
        for side, connection in zip(pair.ends, pairing, strict=True)
    ]
    draw.shuffle(ends)
    lost_at = draw.randrange(len(ends))
    for number, (side, connection) in enumerate(ends):
        if number == lost_at:
            pair.cut_link(both[0][0].link, *draw.sample(pair.ends, draw.randint(1, 2)))
        draw.choice((pair.close, pair.abort))(side, connection)
        for _ in range(draw.randrange(4)):
            pair.step()
    pair.drive()
    pair.check()
    pair.advance(60)
    told = [event.connection for side in pair.ends for event in side.lost]
    assert len(told) == len(set(told)), "a loss is told once"
    pair.shutdown()


@pytest.mark.parametrize("others", [0, 1, 2])
@pytest.mark.parametrize("order", [CreateQueuePair, RegisterMemory])
@pytest.mark.parametrize("end", ["client", "server"])
def test_a_first_contact_that_fails_unlists_no_other_group(others, order, end) -> None:
    pair = CorePair(SMALL)
    living = [pair.establish(peer_key=f"host {number}") for number in range(others)]
    listed = [list(side.endpoint.groups) for side in pair.ends]
    side = getattr(pair, end)
    pair.fail_next(side, order, "no memory", "ENOMEM")
    handshakes = pair.connect(peer_key="another host")
    pair.advance(30)
    for handshake in handshakes:
        assert isinstance(pair.verdict(handshake), FellBack), "\n".join(pair.trace)
    assert [list(side.endpoint.groups) for side in pair.ends] == listed
    for client, server in living:
        assert pair.write(pair.client, client, b"still there") == 11
        pair.drive()
        assert pair.read(pair.server, server, 20) == b"still there"
    pair.shutdown()


@WAY
@pytest.mark.parametrize("order", [CreateQueuePair, RegisterMemory])
@pytest.mark.parametrize("end", ["client", "server"])
def test_an_attempt_after_a_failed_one_is_like_a_first_one(way, order, end) -> None:
    """Nothing of the failed attempt is in the way: the same words on the wire."""

    def attempt(pair: CorePair) -> dict[str, list[str]]:
        begun = len(pair.trace)
        client, server = pair.connect()
        pair.drive()
        assert isinstance(pair.verdict(client), Established), "\n".join(pair.trace)
        assert isinstance(pair.verdict(server), Established)
        said = [line for line in pair.trace[begun:] if " sends " in line]
        return {
            side.name: [
                NUMBERS.sub("#", line) for line in said if f" {side.name}: " in line
            ]
            for side in pair.ends
        }

    fresh, failed = CorePair(), CorePair()
    for pair in (fresh, failed):
        if way == "reuse":
            pair.establish()
    failed.fail_next(getattr(failed, end), order, "no memory", "ENOMEM")
    handshakes = failed.connect()
    failed.drive()
    used = not getattr(failed, end).failures
    if used:
        for handshake in handshakes:
            assert isinstance(failed.verdict(handshake), FellBack)
        again, first = attempt(failed), attempt(fresh)
        # On a reused group the other end's memory lies in its pool, confirmed.
        assert again == first if way == "first contact" else again
    else:
        assert (way, order) == ("reuse", CreateQueuePair), "it was never ordered"
    for pair in (fresh, failed):
        getattr(pair, end).failures.clear()
        pair.shutdown()
