"""LLC: requests of ours in turn, answers to the peer's, and what nobody asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysmc.core.connection import Connection
from pysmc.core.events import Established, FellBack
from pysmc.core.rmb import RToken
from pysmc.testing.pair import SMALL, CorePair
from smcproto import llc

if TYPE_CHECKING:
    from pysmc.core.link import Link


def ask(pair: CorePair, link: Link, message: llc.LlcMessage) -> llc.LlcMessage | None:
    """SEND a request by the client, and give the server's answer."""
    pair.hold("send", pair.client)
    pair.send_message(link, message.build())
    pair.drive()
    sends = link.handle.sends
    answer = llc.parse(sends.popleft()) if sends else None
    pair.release("send")
    return answer


@pytest.fixture
def pair() -> CorePair:
    return CorePair()


@pytest.fixture
def ends(pair: CorePair) -> tuple[Connection, Connection]:
    return pair.establish()


Ends = tuple[Connection, Connection]


def test_test_link_comes_back_unchanged(pair: CorePair, ends: Ends) -> None:
    request = llc.TestLink(version=2, response=False, user_data=bytes(range(16)))
    assert ask(pair, ends[0].link, request) == replace(request, response=True)


def test_confirm_rkey_is_remembered(pair: CorePair, ends: Ends) -> None:
    request = llc.ConfirmRkey(
        version=2, response=False, rkey=0x77, virtual_address=0x1000
    )
    answer = ask(pair, ends[0].link, request)
    assert answer == replace(request, response=True)
    assert ends[1].group.rtokens.remove(0x77)


def test_confirm_rkey_for_links_that_we_do_not_have_is_refused(
    pair: CorePair, ends: Ends
) -> None:
    request = llc.ConfirmRkey(
        version=2,
        response=False,
        rkey=0x77,
        virtual_address=0x1000,
        other_links=(llc.OtherLink(2, 0x78, 0x1000),),
    )
    answer = ask(pair, ends[0].link, request)
    assert isinstance(answer, llc.ConfirmRkey)
    assert (answer.refused, answer.retry) == (True, True)
    assert not ends[1].group.rtokens.remove(0x77)


def test_delete_rkey_names_the_unknown_ones(pair: CorePair, ends: Ends) -> None:
    known = llc.ConfirmRkey(version=2, response=False, rkey=0x77, virtual_address=0)
    ask(pair, ends[0].link, known)
    request = llc.DeleteRkey(version=2, response=False, rkeys=(0x77, 0x78))
    answer = ask(pair, ends[0].link, request)
    assert isinstance(answer, llc.DeleteRkey)
    assert answer.refused
    assert (answer.invalid_count, answer.rkeys) == (1, (0x78,))
    known_only = llc.DeleteRkey(version=2, response=False, rkeys=(0x77,))
    ask(pair, ends[0].link, known)
    assert ask(pair, ends[0].link, known_only) == replace(known_only, response=True)


def test_a_connection_whose_memory_is_withdrawn_ends_alone(
    pair: CorePair, ends: Ends
) -> None:
    """One more write would break the link, and with it everybody else."""
    other, _ = pair.establish()
    client, server = ends
    rkey = server.remote_rkey
    ask(
        pair,
        client.link,
        llc.DeleteRkey(version=2, response=False, rkeys=(rkey,)),
    )
    pair.drive()
    assert [event.connection for event in pair.server.lost] == [server]
    assert "withdrew the memory" in str(server.error)
    assert pair.write(pair.client, other, b"x" * 99) == 99
    pair.drive()
    assert pair.faults == []
    assert server.group.places_taken == 1


def test_withdrawn_memory_of_a_connection_that_was_closed_is_no_loss(
    pair: CorePair, ends: Ends
) -> None:
    client, server = ends
    pair.close(pair.server, server)
    request = llc.DeleteRkey(version=2, response=False, rkeys=(server.remote_rkey,))
    ask(pair, client.link, request)
    assert pair.server.lost == []


def test_memory_withdrawn_during_the_handshake_is_told_afterwards(
    pair: CorePair, ends: Ends
) -> None:
    client, _ = ends
    pair.hold("tcp", pair.client)
    first, second = pair.connect()
    pair.drive()
    assert second.connection is not None
    second.connection.remote_rkey = 0x99
    ask(pair, client.link, llc.DeleteRkey(version=2, response=False, rkeys=(0x99,)))
    assert second.connection.error is not None
    assert pair.server.lost == []
    pair.abandon(first)
    pair.drive()


def test_request_add_link_is_refused(pair: CorePair, ends: Ends) -> None:
    request = llc.RequestAddLink(version=2, response=False)
    answer = ask(pair, ends[0].link, request)
    assert answer == llc.RequestAddLink(version=2, response=True)


def test_an_invitation_to_add_a_link_stays_unanswered(
    pair: CorePair, ends: Ends
) -> None:
    invitation = add_link()
    assert ask(pair, ends[0].link, invitation) is None


def add_link(**changes: Any) -> llc.AddLink:
    return replace(
        llc.AddLink(
            version=2,
            response=False,
            mac=bytes(5) + b"\7",
            gid=bytes(16),
            qp_number=5,
            link_number=2,
            mtu_code=3,
            psn=1,
        ),
        **changes,
    )


def test_a_client_refuses_add_link_at_any_time(pair: CorePair, ends: Ends) -> None:
    pair.hold("send", pair.server)
    pair.send_message(ends[1].link, add_link().build())
    pair.drive()
    answer = llc.parse(ends[1].link.handle.sends.popleft())
    assert answer == add_link(response=True, rejected=True)


@pytest.mark.parametrize("number", [1, 9])
def test_a_client_answers_the_deletion_of_one_link(
    pair: CorePair, ends: Ends, number: int
) -> None:
    client, server = ends
    pair.hold("send", pair.server)
    request = llc.DeleteLink(
        version=2, response=False, link_number=number, reason=0x00010000
    )
    sends = server.link.handle.sends
    pair.send_message(server.link, request.build())
    pair.step()
    answer = llc.parse(sends.popleft())
    code = 0 if number == 1 else 0x00100000
    assert answer == replace(request, response=True, reason=code)
    assert client.group.is_ended == (number == 1)


# What nobody asked for

CONFIRM_LINK = llc.ConfirmLink(
    version=2,
    response=True,
    mac=bytes(6),
    gid=bytes(16),
    qp_number=1,
    link_number=1,
    link_user_id=1,
    max_links=1,
    max_connections=16,
)
UNASKED: list[llc.LlcMessage] = [
    CONFIRM_LINK,
    replace(CONFIRM_LINK, response=False),
    add_link(response=True),
    add_link(response=True, rejected=True),
    llc.AddLinkContinuation(version=1, response=False, link_number=2),
    llc.AddLinkContinuation(version=1, response=True, link_number=2),
    llc.DeleteLink(version=2, response=True, link_number=1, reason=0),
    llc.DeleteLink(version=2, response=False, link_number=9, reason=0),
    llc.ConfirmRkey(version=2, response=True, rkey=1, virtual_address=1),
    llc.ConfirmRkeyContinuation(version=1, response=False),
    llc.DeleteRkey(version=2, response=True, rkeys=(1,)),
    llc.TestLink(version=2, response=True, user_data=bytes(16)),
    llc.RequestAddLink(version=2, response=True),
]


@pytest.mark.parametrize("message", UNASKED, ids=str)
@pytest.mark.parametrize("to_client", [True, False])
def test_what_nobody_asked_for_changes_nothing(
    pair: CorePair, ends: Ends, message: llc.LlcMessage, to_client: bool
) -> None:
    link = ends[1].link if to_client else ends[0].link
    for _ in range(2):
        pair.send_message(link, message.build())
        pair.drive()
    assert pair.write(pair.client, ends[0], b"still there") == 11
    pair.drive()
    assert pair.read(pair.server, ends[1], 99) == b"still there"
    pair.establish()


@given(
    st.lists(
        st.binary(max_size=60) | st.sampled_from(UNASKED).map(lambda m: m.build()),
        max_size=8,
    ),
    st.booleans(),
)
def test_no_bytes_whatever_raise(payloads: list[bytes], to_client: bool) -> None:
    pair = CorePair()
    client, server = pair.establish()
    for payload in payloads:
        link = server.link if to_client else client.link
        if link.handle.reaches is not None:
            pair.send_message(link, payload)
            pair.drive()
    pair.advance(5)
    pair.shutdown()


@given(
    st.lists(st.sampled_from(UNASKED), max_size=6), st.integers(0, 20), st.booleans()
)
def test_no_message_whatever_disturbs_first_contact_for_good(
    messages: list[llc.LlcMessage], step: int, version_2_0: bool
) -> None:
    pair = CorePair(replace(SMALL, release=0) if version_2_0 else SMALL)
    client, server = pair.connect()
    for _ in range(step):
        pair.step()
    for end in pair.ends:
        for stub in list(end.queue_pairs.values()):
            stub.sends.extend(message.build() for message in messages)
    pair.advance(20)
    assert client.is_over
    assert server.is_over
    pair.shutdown()


# TEST LINK


def test_a_quiet_link_is_tested_and_lives(pair: CorePair, ends: Ends) -> None:
    pair.advance(29.9)
    assert not any("TEST_LINK" in line for line in pair.trace)
    pair.advance(70)
    tests = [line for line in pair.trace if "TEST_LINK" in line and "request" in line]
    assert len(tests) >= 3
    assert not ends[0].group.is_ended


def test_a_busy_link_is_not_tested(pair: CorePair, ends: Ends) -> None:
    for _ in range(8):
        pair.advance(10)
        pair.write(pair.client, ends[0], b"x")
        pair.write(pair.server, ends[1], b"x")
        pair.drive()
    assert not any("TEST_LINK" in line for line in pair.trace)


def test_a_dead_link_is_found(pair: CorePair, ends: Ends) -> None:
    pair.hold("send")
    pair.hold("update")
    pair.advance(31)
    assert pair.client.lost == []
    pair.advance(1.1)
    for end in pair.ends:
        assert len(end.lost) == 1
        assert "TEST LINK was not answered" in str(end.lost[0].error)
    pair.release("send")
    pair.drive()
    pair.check_released()


def test_any_sign_of_life_will_do(pair: CorePair, ends: Ends) -> None:
    pair.advance(29.5)
    pair.hold("send", pair.client)
    pair.advance(1)
    pair.write(pair.server, ends[1], b"x")
    pair.advance(2)
    assert pair.client.lost == []


# Requests of ours, one after another


def test_confirm_rkey_requests_go_one_after_another(pair: CorePair, ends: Ends) -> None:
    pair.hold("send", pair.client)
    all_of_them = [pair.connect() for _ in range(3)]
    pair.drive()
    requests = [
        line for line in pair.trace if "server: " in line and "CONFIRM_RKEY" in line
    ]
    assert len(requests) == 1
    pair.release("send")
    pair.drive()
    for client, _ in all_of_them:
        assert isinstance(pair.verdict(client), Established)


@pytest.mark.parametrize("to_server", [True, False])
def test_confirm_rkey_refused(pair: CorePair, ends: Ends, to_server: bool) -> None:
    victim = pair.server if to_server else pair.client
    table = ends[0].group.rtokens if to_server else ends[1].group.rtokens
    while table.add(RToken(0x10000 + len(table), 0)):
        pass
    client, server = pair.connect()
    pair.drive()
    verdicts = [pair.verdict(client), pair.verdict(server)]
    assert all(isinstance(each, FellBack) for each in verdicts)
    here = verdicts[1] if to_server else verdicts[0]
    assert isinstance(here, FellBack)
    assert (here.reason.code, here.reason.side) == (0x09990003, "peer")
    assert victim.memory_bytes == 16384


@pytest.mark.parametrize("to_server", [True, False])
def test_confirm_rkey_unanswered(pair: CorePair, ends: Ends, to_server: bool) -> None:
    """Both decline in place of a message of theirs; the late answer hurts nobody."""
    victim = pair.server if to_server else pair.client
    pair.hold("send", victim)
    client, server = pair.connect()
    pair.advance(1.9)
    assert not client.is_over
    pair.advance(0.2)
    assert isinstance(pair.verdict(client), FellBack)
    assert isinstance(pair.verdict(server), FellBack)
    assert victim.memory_bytes == 16384
    pair.release("send")
    pair.drive()
    pair.establish()


def test_llc_is_served_while_clc_is_awaited(pair: CorePair, ends: Ends) -> None:
    """A server confirms its RMB before it accepts: the waiting client has to answer."""
    pair.hold("tcp", pair.client)
    client, server = pair.connect()
    pair.drive()
    answers = [
        line for line in pair.trace if "CONFIRM_RKEY" in line and "response" in line
    ]
    assert len(answers) == 1
    assert not client.is_over
    pair.release("tcp")
    pair.drive()
    assert isinstance(pair.verdict(server), Established)


def test_an_answer_for_another_key_is_not_ours(pair: CorePair, ends: Ends) -> None:
    pair.hold("send", pair.server)
    client, server = pair.connect()
    pair.drive()
    wrong = llc.ConfirmRkey(version=2, response=True, rkey=1, virtual_address=1)
    deletion = llc.DeleteRkey(version=2, response=True, rkeys=(1,))
    assert server.link is not None
    sends = server.link.handle.sends
    sends.appendleft(deletion.build())
    sends.appendleft(wrong.build())
    for _ in range(2):
        payload = sends.popleft()
        pair.server.endpoint.receive_message(server.link, payload, pair.now)
        pair.settle(pair.server)
    assert not server.is_over
    pair.release("send")
    pair.drive()
    assert isinstance(pair.verdict(client), Established)
