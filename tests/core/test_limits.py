"""Every limit of the core: what fits exactly, and what is one too many."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.config import Config
from pysmc.core.clc_stream import ClcStream
from pysmc.core.events import FellBack, LimitReached, News
from pysmc.core.rmb import RTOKENS_MAX
from pysmc.errors import RemoteProtocolError
from pysmc.testing.pair import SMALL, CorePair, PairEnd
from smcproto import llc
from smcproto.constants import CLC_MAX_BYTES, EYECATCHER_SMCR, PROPOSAL_MAX_BYTES

if TYPE_CHECKING:
    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link
    from pysmc.reasons import Reason
    from tests.core.conftest import Duo


def limited(config: Config, name: str, limit: int) -> Config:
    changes: dict[str, Any] = {name: limit}
    return replace(config, **changes)


def is_refused(pair: CorePair, end: PairEnd, name: str, limit: int, key: str) -> bool:
    """Connect once more; tell whether this end refuses it for the limit."""
    client, server = pair.connect(peer_key=key)
    pair.drive()
    here, there = (client, server) if end is pair.client else (server, client)
    if not isinstance(pair.verdict(here), FellBack):
        return False
    assert why(pair, here).name == "LIMIT"
    assert why(pair, here).side == "local"
    assert f"{name} is {limit}." in why(pair, here).text
    assert why(pair, there).name == "PEER_DECLINED"
    assert why(pair, there).peer_code == 0x01010000
    return True


def why(pair: CorePair, handshake: Handshake) -> Reason:
    verdict = pair.verdict(handshake)
    assert isinstance(verdict, FellBack)
    return verdict.reason


def check_told_once(end: PairEnd, name: str, limit: int, times: int) -> None:
    told = [event for event in end.events if isinstance(event, LimitReached)]
    assert [(event.name, event.limit) for event in told] == [(name, limit)]
    assert end.endpoint.excess == {name: times}


# Link groups and memory


@pytest.mark.parametrize("name", ["max_link_groups", "max_link_groups_per_peer"])
@pytest.mark.parametrize("role", ["server", "client"])
def test_link_groups(name: str, role: str) -> None:
    high = replace(SMALL, max_connections=16)
    low = limited(high, name, 2)
    pair = CorePair(*((low, high) if role == "client" else (high, low)))
    end = pair.client if role == "client" else pair.server
    pair.checking = False
    for _ in range(2 * 16):
        pair.establish(peer_key="a")
    assert end.endpoint.excess == {}
    for _ in range(3):
        assert is_refused(pair, end, name, 2, "a")
    check_told_once(end, name, 2, 3)
    # In all, or only with this peer: whoever borrows its ID is not this peer.
    assert is_refused(pair, end, name, 2, "b") == (name == "max_link_groups")
    pair.check()
    pair.shutdown()


@pytest.mark.parametrize("name", ["max_pinned_bytes", "max_pinned_bytes_per_peer"])
@pytest.mark.parametrize("role", ["server", "client"])
def test_pinned_memory(name: str, role: str) -> None:
    low, high = limited(SMALL, name, 1 << 20), SMALL
    pair = CorePair(*((low, high) if role == "client" else (high, low)))
    end = pair.client if role == "client" else pair.server
    pair.checking = False
    made = [pair.establish(peer_key="a") for _ in range((1 << 20) // SMALL.rmbe_bytes)]
    assert end.endpoint.excess == {}
    for _ in range(3):
        assert is_refused(pair, end, name, 1 << 20, "a")
    check_told_once(end, name, 1 << 20, 3)
    assert is_refused(pair, end, name, 1 << 20, "b") == (name == "max_pinned_bytes")
    for closer, connection in zip((pair.client, pair.server), made[0], strict=True):
        pair.close(closer, connection)
    pair.drive()
    pair.establish(peer_key="a")
    pair.check()
    pair.shutdown()


def test_one_peer_s_buffers_get_smaller_while_another_s_do_not() -> None:
    config = replace(SMALL, rmbe_bytes=1 << 17, max_pinned_bytes_per_peer=1 << 24)
    pair = CorePair(config)
    pair.checking = False
    sizes = [pair.establish(peer_key="a")[1].rmbe_bytes for _ in range(255)]
    assert sizes[:3] == [1 << 17, 1 << 16, 1 << 16]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1 << 15
    assert pair.establish(peer_key="b")[1].rmbe_bytes == 1 << 17


# LLC


TEST_LINK = llc.TestLink(version=2, response=False, user_data=bytes(16))


def ask(pair: CorePair, link: Link, message: llc.LlcMessage, count: int) -> int:
    """SEND a request of the client so many times; count the answers."""
    pair.hold("send", pair.client)
    for _ in range(count):
        pair.send_message(link, message.build())
    pair.drive()
    answers = len(link.handle.sends)
    link.handle.sends.clear()
    pair.release("send")
    return answers


def test_llc_requests_a_second() -> None:
    pair = CorePair()
    pair.checking = False
    client, server = pair.establish()
    pair.advance(5)
    assert ask(pair, client.link, TEST_LINK, 1000) == 1000
    assert pair.server.endpoint.excess == {}
    assert ask(pair, client.link, TEST_LINK, 3) == 0
    check_told_once(pair.server, "max_llc_requests_per_second", 1000, 3)
    pair.advance(0.0105)
    assert ask(pair, client.link, TEST_LINK, 20) == 10
    # It costs the peer its answers and nothing else.
    assert pair.write(pair.client, client, b"still here") == 10
    pair.drive()
    assert pair.read(pair.server, server, 10) == b"still here"
    pair.check()


def test_dropped_requests_change_nothing() -> None:
    pair = CorePair(replace(SMALL, max_llc_requests_per_second=10))
    client, server = pair.establish()
    pair.advance(5)
    assert ask(pair, client.link, TEST_LINK, 10) == 10
    withdraw = llc.DeleteRkey(version=2, response=False, rkeys=(server.remote_rkey,))
    end_all = llc.DeleteLink(
        version=2, response=False, whole_group=True, orderly=True, link_number=0,
        reason=1,
    )  # fmt: skip
    for message in (withdraw, end_all):
        assert ask(pair, client.link, message, 1) == 0
    assert server.is_open
    assert not server.group.is_ended


def test_rkeys_that_a_peer_may_announce() -> None:
    pair = CorePair()
    pair.checking = False
    client, server = pair.establish()
    room = RTOKENS_MAX - len(server.group.rtokens)
    for rkey in range(room + 1):
        message = llc.ConfirmRkey(
            version=2, response=False, rkey=0x1000 + rkey, virtual_address=0x1000
        )
        pair.hold("send", pair.client)
        pair.send_message(client.link, message.build())
        pair.drive()
        answer = llc.parse(client.link.handle.sends.popleft())
        assert isinstance(answer, llc.ConfirmRkey)
        assert answer.refused == (rkey == room)
    assert len(server.group.rtokens) == RTOKENS_MAX


# CDC


REQUESTED, BLOCKED = 0x1000, 0x8000


@pytest.mark.parametrize("flags", [REQUESTED, BLOCKED, REQUESTED | BLOCKED, 0])
def test_updates_without_anything_new_are_counted_and_not_answered(
    duo: Duo, flags: int
) -> None:
    for sequence in range(2, 10_002):
        news = duo.tell(duo.right, sequence=sequence & 0xFFFF, flags=flags)
        assert not news & News.PUBLISH
    assert not duo.right.update_due
    assert duo.right.empty_updates == 10_000
    assert "empty_updates=10000" in repr(duo.right)
    # What is new still counts.
    duo.left.claim(3)
    assert duo.tell(duo.right, sequence=20_000) & News.DATA
    assert duo.right.empty_updates == 10_000


def test_one_answer_for_each_change_of_the_window(duo: Duo) -> None:
    duo.left.claim(3)
    duo.tell(duo.right, sequence=1)
    answers = 0
    for step in range(3):
        assert duo.right.consume(1) is False
        for turn in range(100):
            sequence = 2 + 100 * step + turn
            news = duo.tell(duo.right, sequence=sequence, flags=REQUESTED)
            if news & News.PUBLISH:
                answers += 1
                duo.tell(duo.left)
            assert not duo.right.update_due
        duo.tell(duo.right, sequence=102 + 100 * step, flags=0)
    assert answers == 3


# CLC


def header(kind: int, length: int) -> bytes:
    return EYECATCHER_SMCR + bytes([kind]) + length.to_bytes(2, "big") + b"\x20"


@pytest.mark.parametrize(
    ("kind", "most", "step"), [(1, PROPOSAL_MAX_BYTES, 1), (3, CLC_MAX_BYTES - 12, 16)]
)
def test_the_size_of_a_clc_message(kind: int, most: int, step: int) -> None:
    """Too long is refused at its header: nothing of the rest is waited for."""
    stream = ClcStream()
    assert stream.feed(header(kind, most)) is None
    assert stream.wanted == most - 8
    assert stream.feed(bytes(most - 9)) is None
    with pytest.raises(RemoteProtocolError, match="cannot have"):
        ClcStream().feed(header(kind, most + step))
    with pytest.raises(RemoteProtocolError, match="cannot have"):
        ClcStream().feed(header(kind, 65535))


def test_the_defaults_are_those_of_the_documentation() -> None:
    config = Config()
    assert (PROPOSAL_MAX_BYTES, CLC_MAX_BYTES) == (652, 1024)
    assert config.proposal_wait == config.accept_wait == config.confirm_wait == 6
    assert config.handshake_wait == 10
    # The buffers of one peer leave room for others.
    assert 2 * config.max_pinned_bytes_per_peer == config.max_pinned_bytes
    assert config.max_llc_requests_per_second == 1000
