"""The client's decisions: what it proposes, what it follows, what it declines."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.core.actions import RegisterMemory
from pysmc.core.endpoint import FabricOffer
from pysmc.core.events import Established, Failed, FellBack
from pysmc.core.handshake import Handshake, HandshakeState
from pysmc.errors import ConnectionReset, HandshakeTimeout, RemoteProtocolError
from pysmc.reasons import reason
from pysmc.testing.pair import SMALL, CorePair, make_offer
from smcproto import clc, clc_smcd, clc_v2, llc
from smcproto.constants import PathType

if TYPE_CHECKING:
    from collections.abc import Callable


def proposal_of(pair: CorePair) -> clc.Proposal:
    _, server = pair.connect()
    message = clc.parse(bytes(pair.tcp(server).transit))
    assert isinstance(message, clc.Proposal)
    return message


def test_a_proposal_of_version_2_1() -> None:
    proposal = proposal_of(CorePair())
    assert (proposal.version, proposal.typev1, proposal.typev2) == (
        2,
        PathType.NONE,
        PathType.SMCR,
    )
    assert proposal.ip_area is None
    assert proposal.v2 == clc_v2.ProposalExtension(
        eids=("PAIR",),
        release=1,
        gid=bytes(15) + b"\1",
        max_connections=255,
        max_links=1,
    )


def test_a_proposal_of_version_2_0_has_no_limits() -> None:
    v2 = proposal_of(CorePair(replace(SMALL, release=0))).v2
    assert v2 is not None
    assert (v2.release, v2.max_connections, v2.max_links) == (0, 0, 0)


def test_eids_are_in_order_and_the_port_is_a_real_one() -> None:
    offers = (
        make_offer(7, "shm", "HERE", "BOTH"),
        make_offer(8, "verbs", "BOTH", "LAN"),
    )
    proposal = proposal_of(CorePair(offers=offers))
    assert proposal.v2 is not None
    assert proposal.v2.eids == ("HERE", "BOTH", "LAN")
    assert proposal.v2.gid == offers[1].gid
    assert proposal.mac == offers[1].mac


def test_the_servers_choice_of_eid_selects_the_device() -> None:
    offers = (make_offer(7, "shm", "HERE"), make_offer(8, "verbs", "LAN"))
    pair = CorePair(offers=offers, server_offers=(make_offer(9, "verbs", "LAN"),))
    client, _ = pair.establish()
    assert (client.group.fabric, client.group.eid) == ("verbs", "LAN")
    assert client.link.local.gid == offers[1].gid


@pytest.mark.parametrize(
    ("offered", "side"), [("OTHER", "local"), ("LAN", "peer")], ids=["EID", "later"]
)
def test_a_device_of_ours_that_is_absent_is_the_reason_for_no_common_eid(
    offered: str, side: str
) -> None:
    """Only shared memory was left to offer, and the server is on another host."""
    pair = CorePair()
    why = reason("NO_DEVICE", "local", "Network device lo carries the connection.")
    server_why = None if offered == "OTHER" else reason("IPSEC", "local")
    client, server = pair.connect(
        offers=(make_offer(7, "shm", "HERE"),),
        absent={"LAN": why},
        server_offers=(make_offer(9, "verbs", offered),),
        server_refusal=server_why,
    )
    pair.drive()
    verdict = pair.verdict(client)
    assert isinstance(verdict, FellBack)
    assert (verdict.reason is why) == (side == "local")
    assert verdict.reason.side == side
    assert isinstance(pair.verdict(server), FellBack)


def answer_with(
    pair: CorePair, change: Callable[[Any], clc.ClcMessage]
) -> tuple[object, object]:
    """Change the Accept, and give both verdicts."""
    pair.hold("tcp", pair.client)
    client, server = pair.connect()
    pair.drive()
    pair.rewrite(client, change)
    pair.release("tcp")
    pair.advance(20)
    return pair.verdict(client), pair.verdict(server)


def with_contact(**changes: Any) -> Callable[[clc.Accept], clc.Accept]:
    def change(accept: clc.Accept) -> clc.Accept:
        assert accept.v2 is not None
        assert accept.v2.first_contact is not None
        first = replace(accept.v2.first_contact, **changes)
        return replace(accept, v2=replace(accept.v2, first_contact=first))

    return change


REFUSED: dict[str, tuple[Callable[[Any], clc.ClcMessage], str, int]] = {
    "version 1": (
        lambda accept: replace(accept, version=1, v2=None),
        "VERSION",
        0x030C0000,
    ),
    "foreign EID": (
        lambda accept: replace(accept, v2=replace(accept.v2, eid="OTHER")),
        "NO_COMMON_EID",
        0x03030000,
    ),
    "MTU code": (lambda accept: replace(accept, mtu_code=9), "INTERNAL", 0x09990000),
    "release": (with_contact(release=2), "RELEASE", 0x03030009),
    "few connections": (with_contact(max_connections=15), "RELEASE", 0x03030009),
    "no link": (with_contact(max_links=0), "RELEASE", 0x03030009),
    "many links": (with_contact(max_links=2), "RELEASE", 0x03030009),
    "SMC-D": (
        lambda accept: clc_smcd.SmcdAccept(
            version=1,
            first_contact=True,
            gid=1,
            token=2,
            dmbe_index=0,
            dmbe_size_code=0,
            link_id=0,
        ),
        "MODE",
        0x03040000,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_accept_that_cannot_be_followed_is_declined(what: str) -> None:
    change, name, code = REFUSED[what]
    pair = CorePair()
    client, server = answer_with(pair, change)
    assert isinstance(client, FellBack)
    assert (client.reason.name, client.reason.side) == (name, "local")
    assert isinstance(server, FellBack)
    assert server.reason.peer_code == code
    assert (server.reason.name, server.reason.side) == ("PEER_DECLINED", "peer")
    assert not pair.client.endpoint.groups
    pair.shutdown()


def test_a_decline_has_the_version_of_the_accept() -> None:
    pair = CorePair()
    answer_with(pair, REFUSED["version 1"][0])
    sent = [line for line in pair.trace if "client: tcp" in line and "Decline" in line]
    assert len(sent) == 1
    assert "Decline version=1" in sent[0]


def test_a_message_out_of_turn_breaks_the_stream() -> None:
    pair = CorePair()
    client, _ = answer_with(pair, lambda accept: clc.parse(bytes.fromhex(CONFIRM_V1)))
    assert isinstance(client, Failed)
    assert isinstance(client.error, RemoteProtocolError)
    assert "peer sent Confirm while awaiting the Accept" in str(client.error)


CONFIRM_V1 = (
    "e2d4c3d903004418123402005e005301fe8000000000000000005efffe00530102005e0053010001111"
    "11111010100000101230000007f1111100000000a0b0ce2d4c3d9"
)


def test_an_smcd_accept_out_of_turn_breaks_the_stream() -> None:
    pair = CorePair()
    pair.hold("send")
    client, server = pair.connect()
    pair.drive()
    assert client.state is HandshakeState.AWAIT_LINK
    pair.send_tcp(server, REFUSED["SMC-D"][0](None).build())
    pair.drive()
    assert isinstance(pair.verdict(client), Failed)


@pytest.mark.parametrize(("ours", "theirs"), [(3, 5), (5, 3), (4, 4)])
def test_both_ends_use_the_smaller_mtu_from_first_contact_on(
    ours: int, theirs: int
) -> None:
    pair = CorePair(
        offers=(replace(make_offer(1), mtu_code=ours),),
        server_offers=(replace(make_offer(2), mtu_code=theirs),),
    )
    client, server = pair.establish()
    for connection in (client, server):
        assert connection.link.remote is not None
        assert connection.link.remote.mtu_code == min(ours, theirs)
    # A reused link keeps its own, whatever the Accept says.
    _, there = reused(pair)
    pair.rewrite(pair.tcp(there).peer.handshake, lambda a: replace(a, mtu_code=1))
    pair.release("tcp")
    pair.drive()
    assert pair.connection(there).link.remote == server.link.remote


# Reuse


def reused(pair: CorePair) -> tuple[Handshake, Handshake]:
    """Begin a handshake that reuses a link; its Accept is on its way."""
    pair.establish()
    pair.hold("tcp", pair.client)
    client, server = pair.connect()
    pair.drive()
    return client, server


def test_a_forged_reuse_is_declined_and_ends_the_group_of_nobody() -> None:
    """Who answers may know the addresses of a group, but not its RTokens."""
    for change in (
        lambda accept: replace(accept, rkey=0xBAD),
        lambda accept: replace(accept, virtual_address=0),
    ):
        pair = CorePair()
        client, server = reused(pair)
        pair.rewrite(client, change)
        pair.release("tcp")
        pair.drive()
        verdict = pair.verdict(client)
        assert isinstance(verdict, FellBack)
        assert verdict.reason.name == "OUT_OF_SYNC"
        assert "RMB that was never announced" in verdict.reason.text
        assert isinstance(pair.verdict(server), FellBack)
        assert [len(end.endpoint.groups) for end in pair.ends] == [1, 1]
        pair.establish()


def test_a_link_that_we_do_not_have_is_declined_with_its_own_code() -> None:
    pair = CorePair()
    client, server = reused(pair)
    pair.rewrite(client, lambda accept: replace(accept, qp_number=0xBAD))
    pair.release("tcp")
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.peer_code == 0x030B0000
    assert [len(end.endpoint.groups) for end in pair.ends] == [1, 1]


def test_a_group_that_we_do_not_have_is_out_of_sync() -> None:
    """Only then, and only to a reuse, the Decline says so; the server then forgets."""
    pair = CorePair(silent_close=True)
    client, server = reused(pair)
    old = pair.server.endpoint.groups[0]
    pair.hold("send")
    pair.client.endpoint.link_down(
        pair.client.endpoint.groups[0].links[0], "timed out", "", pair.now
    )
    pair.settle(pair.client)
    pair.release("tcp")
    pair.drive()
    assert isinstance(pair.verdict(client), FellBack)
    assert isinstance(pair.verdict(server), FellBack)
    assert old.is_closed_to_new
    assert pair.server.endpoint.groups == [old]
    pair.advance(3)  # nobody answers TEST LINK
    assert old.is_ended
    assert not pair.server.endpoint.groups
    assert len(pair.server.lost) == 1
    assert "TEST LINK was not answered" in str(pair.server.lost[0].error)
    pair.release("send")
    pair.establish()


def test_memory_without_end_is_refused() -> None:
    config = replace(SMALL, max_pinned_bytes=1 << 20)
    pair = CorePair(config, SMALL)
    for _ in range(64):
        pair.establish()
    client, server = pair.connect()
    pair.drive()
    verdict = pair.verdict(client)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == "LIMIT"
    assert "max_pinned_bytes is 1048576" in verdict.reason.text
    assert isinstance(pair.verdict(server), FellBack)
    assert pair.client.memory_bytes == 1 << 20
    # What lies in the pool counts already, and may be used again.
    first = next(iter(pair.client.endpoint.groups[0].connections.values()))
    peer = pair.peer_of(pair.client, first)
    assert peer is not None
    pair.close(pair.client, first)
    pair.close(pair.server, peer)
    pair.drive()
    pair.establish()


# First contact


def test_confirm_link_of_another_queue_pair_is_declined() -> None:
    pair = CorePair()
    client, server = pair.connect()
    pair.hold("send", pair.client)
    pair.drive()
    assert client.link is not None
    sends = client.link.handle.sends
    message = llc.parse(sends[0])
    assert isinstance(message, llc.ConfirmLink)
    wrong = [
        replace(message, response=True),
        replace(message, qp_number=1),
    ]
    sends.clear()
    sends.extend(each.build() for each in wrong)
    pair.release("send")
    pair.drive()
    verdict = pair.verdict(client)
    assert isinstance(verdict, FellBack)
    assert "CONFIRM LINK names another queue pair" in verdict.reason.text
    there = pair.verdict(server)
    assert isinstance(there, FellBack)
    assert there.reason.name == "PEER_DECLINED"


@pytest.mark.parametrize("bits", [0, 1, 2, 3])
def test_a_server_with_eye_catchers_is_declined(bits: int) -> None:
    pair = CorePair()
    client, _ = pair.connect()
    pair.hold("send", pair.client)
    pair.drive()
    assert client.link is not None
    sends = client.link.handle.sends
    message = llc.parse(sends.popleft())
    assert isinstance(message, llc.ConfirmLink)
    sends.append(replace(message, no_eyecatcher=bits, link_number=7).build())
    pair.release("send")
    pair.drive()
    verdict = pair.verdict(client)
    if bits:
        assert isinstance(verdict, Established)
        assert verdict.connection.link.number == 7
    else:
        assert isinstance(verdict, FellBack)
        assert verdict.reason.code == 0x03050000


def test_add_link_at_the_wrong_time_changes_nothing() -> None:
    pair = CorePair()
    client, _ = pair.connect()
    pair.hold("send", pair.client)
    pair.drive()
    assert client.link is not None
    add_link = llc.AddLink(
        version=2,
        response=False,
        mac=bytes(6),
        gid=bytes(16),
        qp_number=5,
        link_number=2,
        mtu_code=3,
        psn=1,
    )
    client.link.handle.sends.appendleft(add_link.build())
    client.link.handle.sends.appendleft(replace(add_link, response=True).build())
    pair.release("send")
    pair.drive()
    assert isinstance(pair.verdict(client), Established)
    # The same again in a group of version 2.0 that waits for the request.
    pair = CorePair(replace(SMALL, release=0))
    client, _ = pair.connect()
    pair.drive_until(lambda: client.state is HandshakeState.AWAIT_ADD_LINK)
    assert client.link is not None
    client.link.handle.sends.appendleft(replace(add_link, response=True).build())
    pair.hold("send", pair.server)
    pair.step()
    assert client.state is HandshakeState.AWAIT_ADD_LINK


@pytest.mark.parametrize("state", ["AWAIT_ACCEPT", "AWAIT_LINK"])
def test_a_silent_server_is_an_error_before_and_a_decline_after_the_accept(
    state: str,
) -> None:
    pair = CorePair()
    client, _ = pair.connect()
    pair.hold("send")
    if state == "AWAIT_ACCEPT":
        pair.hold("tcp", pair.client)
    pair.advance(5.9)
    assert not client.is_over
    pair.advance(0.2 if state == "AWAIT_ACCEPT" else 1.2)
    verdict = pair.verdict(client)
    if state == "AWAIT_ACCEPT":
        assert isinstance(verdict, Failed)
        assert isinstance(verdict.error, HandshakeTimeout)
        assert isinstance(verdict.error, TimeoutError)
        assert "silent for too long while awaiting the Accept" in str(verdict.error)
    else:
        assert isinstance(verdict, FellBack)


def test_version_2_0_goes_on_without_add_link() -> None:
    pair = CorePair(replace(SMALL, release=0))
    client, _ = pair.connect()
    pair.drive_until(lambda: client.state is HandshakeState.AWAIT_ADD_LINK)
    pair.drop("send", pair.client)
    pair.drop("send", pair.server)
    pair.hold("send", pair.client)
    pair.advance(1.9)
    assert client.state is HandshakeState.AWAIT_ADD_LINK
    pair.advance(0.2)
    assert isinstance(pair.verdict(client), Established)


def test_slow_memory_is_a_decline_in_place_of_the_confirm() -> None:
    pair = CorePair()
    pair.withhold(pair.client, RegisterMemory)
    client, server = pair.connect()
    pair.advance(4.1)
    verdict = pair.verdict(client)
    assert isinstance(verdict, FellBack)
    assert "Preparing the link took too long" in verdict.reason.text
    assert isinstance(pair.verdict(server), FellBack)
    pair.answer(pair.client, RegisterMemory)
    pair.drive()
    assert pair.client.memory_bytes == 0


def test_an_offer_is_a_plain_record() -> None:
    assert make_offer(1) == FabricOffer(
        "sim", ("PAIR",), bytes(15) + b"\1", b"\2\0\0\0\0\1", 3
    )


def test_a_server_that_names_an_element_in_use_is_declined() -> None:
    pair = CorePair()
    _, first = pair.establish()
    used = first.rmb.tokens[first.link]
    client, server = pair.connect()
    pair.drive_until(lambda: server.state is HandshakeState.AWAIT_CONFIRM)
    pair.rewrite(
        client,
        lambda accept: replace(
            accept, rkey=used.rkey, virtual_address=used.virtual_address
        ),
    )
    pair.drive()
    verdict = pair.verdict(client)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == "OUT_OF_SYNC"
    assert "another connection is using" in verdict.reason.text
    assert pair.client.lost == []


def test_memory_that_is_withdrawn_before_the_confirm_is_not_written_to() -> None:
    """It would break the link, and with it the connections of others."""
    pair = CorePair()
    fellow, there = pair.establish()
    pair.withhold(pair.client, RegisterMemory)
    client, _ = pair.connect()
    pair.drive()
    assert client.accept is not None
    assert client.link is not None
    withdrawn = llc.DeleteRkey(2, response=False, rkeys=(client.accept.rkey,))
    pair.send_message(there.link, withdrawn.build())
    pair.drive()
    pair.answer(pair.client, RegisterMemory)
    pair.drive()
    verdict = pair.verdict(client)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == "OUT_OF_SYNC"
    assert not pair.faults
    assert fellow.is_open


def confirmed_late(release: int = 1) -> tuple[CorePair, Handshake, Handshake]:
    """Let CONFIRM LINK reach a client that could not look for 2.5 seconds."""
    pair = CorePair(replace(SMALL, release=release))
    pair.hold("send", pair.client)
    client, server = pair.connect()
    pair.advance(2.5)
    pair.release("send")
    pair.drive()
    return pair, client, server


LATE_DECLINE = clc.Decline(
    version=2, out_of_sync=False, peer_id=bytes(8), diagnosis=0x02010000
).build()


@pytest.mark.parametrize("is_link_lost_first", [False, True])
def test_a_late_answer_to_confirm_link_may_meet_a_decline(
    is_link_lost_first: bool,
) -> None:
    """A kernel's server gives up after two seconds, and declines one second later."""
    pair, client, server = confirmed_late()
    if is_link_lost_first:
        assert client.link is not None
        pair.client.endpoint.link_down(client.link, "peer gone", "over", pair.now)
    pair.advance(0.5)
    pair.send_tcp(server, LATE_DECLINE + b"hello")
    pair.drive()
    verdict = pair.verdict(client)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.peer_code == 0x02010000
    tcp = pair.tcp(client)
    assert tcp.arrived + tcp.transit == b"hello"
    assert not pair.client.endpoint.groups


def test_a_late_answer_may_have_been_in_time() -> None:
    pair, client, server = confirmed_late()
    assert isinstance(pair.verdict(server), Established)
    pair.advance(2.9)
    assert pair.verdict(client) is None
    pair.advance(0.2)
    assert isinstance(pair.verdict(client), Established)


def test_the_end_of_tcp_after_a_late_answer_is_no_decline() -> None:
    """A server may have written all that it had, and closed."""
    pair, client, _ = confirmed_late()
    pair.client.endpoint.tcp_lost(client, pair.now, None)
    pair.settle(pair.client)
    assert isinstance(pair.verdict(client), Established)


def test_half_a_decline_after_a_late_answer_ends_it() -> None:
    pair, client, server = confirmed_late()
    pair.send_tcp(server, LATE_DECLINE[:20])
    pair.advance(3.1)
    verdict = pair.verdict(client)
    assert isinstance(verdict, Failed)
    assert isinstance(verdict.error, HandshakeTimeout)


def test_a_decline_that_comes_with_the_last_look_wins() -> None:
    pair, client, server = confirmed_late()
    pair.hold("tcp", pair.client)
    pair.send_tcp(server, LATE_DECLINE[:20])
    tcp = pair.tcp(client)
    tcp.arrived += tcp.transit
    tcp.transit.clear()
    pair.advance(3.1)
    assert client.state is HandshakeState.LATE
    pair.send_tcp(server, LATE_DECLINE[20:])
    pair.release("tcp")
    pair.drive()
    assert isinstance(pair.verdict(client), FellBack)


def test_add_link_says_that_a_late_answer_was_in_time() -> None:
    pair, client, _ = confirmed_late(release=0)
    assert isinstance(pair.verdict(client), Established)


def test_a_late_link_that_is_lost_without_a_decline_is_a_reset() -> None:
    pair, client, _ = confirmed_late()
    assert client.link is not None
    pair.client.endpoint.link_down(client.link, "timed out", "cable", pair.now)
    pair.advance(2.9)
    assert pair.verdict(client) is None
    pair.advance(0.2)
    verdict = pair.verdict(client)
    assert isinstance(verdict, Failed)
    assert isinstance(verdict.error, ConnectionReset)
    assert "cable" in str(verdict.error)
