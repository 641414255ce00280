"""The server's decisions: which device, first contact or reuse, and in which turn."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.core.actions import RegisterMemory
from pysmc.core.events import Established, Failed, FellBack
from pysmc.core.handshake import Handshake, HandshakeState
from pysmc.errors import HandshakeTimeout, RemoteProtocolError
from pysmc.reasons import reason
from pysmc.testing.pair import SMALL, CorePair, make_offer
from smcproto import clc, llc
from smcproto.constants import PathType

if TYPE_CHECKING:
    from pysmc.core.endpoint import FabricOffer


def propose(pair: CorePair, **changes: Any) -> FellBack:
    """Change the Proposal, and give the server's verdict, which is a fallback."""
    client, server = pair.connect()
    pair.rewrite(server, lambda proposal: replace(proposal, **changes))
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    there = pair.verdict(client)
    assert isinstance(there, FellBack)
    assert there.reason.peer_code == verdict.reason.code
    pair.shutdown()
    return verdict


def extension(pair: CorePair, **changes: Any) -> Any:
    _, server = pair.connect()
    message = clc.parse(bytes(pair.tcp(server).transit))
    assert isinstance(message, clc.Proposal)
    assert message.v2 is not None
    pair.abandon(server)
    pair.drive()
    return replace(message.v2, **changes)


@pytest.mark.parametrize(
    ("changes", "name", "code"),
    [
        ({"eids": ()}, "NO_COMMON_EID", 0x03030008),
        ({"eids": ("OTHER", "THIRD")}, "NO_COMMON_EID", 0x03030000),
        ({"max_connections": 15}, "RELEASE", 0x0303000A),
        ({"max_links": 0}, "RELEASE", 0x0303000B),
    ],
)
def test_a_proposal_that_cannot_be_taken(
    changes: dict[str, Any], name: str, code: int
) -> None:
    pair = CorePair()
    verdict = propose(pair, v2=extension(pair, **changes))
    assert (verdict.reason.name, verdict.reason.code) == (name, code)
    assert verdict.reason.side == "local"
    if "eids" in changes:
        assert (", ".join(changes["eids"]) or "none") in verdict.reason.text


def test_limits_do_not_count_for_version_2_0() -> None:
    pair = CorePair(SMALL, replace(SMALL, release=0))
    v2 = extension(pair, max_connections=0, max_links=0)
    _, server = pair.connect()
    pair.rewrite(server, lambda proposal: replace(proposal, v2=v2))
    pair.drive()
    assert isinstance(pair.verdict(server), Established)


@pytest.mark.parametrize("release", [0, 1])
def test_version_1_alone_is_declined_in_its_own_version(release: int) -> None:
    pair = CorePair(replace(SMALL, release=release))
    client, server = pair.connect()
    v1 = bytes.fromhex(
        "e2d4c3d901003410123402005e005301fe8000000000000000005efffe00530102005e005301"
        "0000c000020018000000e2d4c3d9"
    )
    pair.rewrite(server, lambda _: clc.parse(v1))
    pair.hold("tcp", pair.client)
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == "VERSION"
    decline = clc.parse(bytes(pair.tcp(client).transit))
    assert isinstance(decline, clc.Decline)
    assert (decline.version, decline.os_type, len(decline.build())) == (1, 0, 28)


def test_smcd_alone_is_another_mode() -> None:
    pair = CorePair()
    client, server = pair.connect()

    def smcd_only(proposal: clc.Proposal) -> clc.Proposal:
        assert proposal.v2 is not None
        return replace(proposal, typev2=PathType.SMCD)

    pair.rewrite(server, smcd_only)
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == "VERSION"
    client, server = pair.connect()
    pair.rewrite(
        server, lambda proposal: replace(proposal, typev2=PathType.SMCD, v2=None)
    )
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == "MODE"
    assert isinstance(pair.verdict(client), FellBack)


def test_the_clients_first_eid_that_is_ours_selects_the_device() -> None:
    offers = (make_offer(3, "verbs", "LAN"), make_offer(4, "shm", "HERE"))
    there = (
        make_offer(1, "shm", "OTHER", "HERE"),
        make_offer(2, "verbs", "LAN"),
    )
    pair = CorePair(offers=there, server_offers=offers)
    _, server = pair.establish()
    assert (server.group.fabric, server.group.eid) == ("shm", "HERE")
    assert server.link.local.gid == offers[1].gid


def _two_ports() -> list[FabricOffer]:
    return [
        replace(make_offer(number, "verbs", "LAN"), device=f"verbs {number}")
        for number in (1, 2)
    ]


def test_a_connection_uses_the_device_of_its_own_route() -> None:
    ours, theirs = _two_ports(), _two_ports()
    pair = CorePair(offers=(make_offer(9, "shm", "HERE"),))
    groups = []
    for number in (0, 1, 0, 1):
        client, server = pair.connect(
            offers=ours[number : number + 1], server_offers=theirs[number : number + 1]
        )
        pair.drive()
        for end, offers in ((client, ours), (server, theirs)):
            connection = pair.connection(end)
            assert connection.group.device == f"verbs {number + 1}"
            assert connection.link.local.gid == offers[number].gid
        groups.append(pair.connection(server).group.number)
    assert groups == [1, 2, 1, 2], "a group stays on its device"


def test_the_same_peer_at_another_port_of_ours_makes_another_group() -> None:
    pair = CorePair()
    theirs = _two_ports()
    groups = set()
    for offer in theirs:
        client, server = pair.connect(
            offers=(make_offer(7, "verbs", "LAN"),), server_offers=(offer,)
        )
        pair.drive()
        groups.add(pair.connection(server).group)
        remote = pair.connection(client).link.remote
        assert remote is not None
        assert remote.gid == offer.gid
    assert {group.device for group in groups} == {"verbs 1", "verbs 2"}


@pytest.mark.parametrize("here", [(), (make_offer(9, "shm", "HERE"),)])
def test_an_eid_without_a_device_on_this_route_is_declined_with_its_reason(
    here: tuple[FabricOffer, ...],
) -> None:
    pair = CorePair()
    why = reason("NO_DEVICE", "local", "Network device lo carries the connection.")
    client, server = pair.connect(
        offers=(make_offer(7, "verbs", "OTHER", "LAN"),),
        server_offers=here,
        server_absent={"LAN": why},
    )
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    assert verdict.reason is why
    verdict = pair.verdict(client)
    assert isinstance(verdict, FellBack)
    assert (verdict.reason.name, verdict.reason.side) == ("PEER_DECLINED", "peer")
    assert verdict.reason.peer_code == why.code


def test_a_decline_in_place_of_the_proposal_is_a_fallback() -> None:
    pair = CorePair()
    _, server = pair.connect()
    decline = clc.Decline(
        version=1, out_of_sync=True, peer_id=bytes(8), diagnosis=0x03020000
    )
    pair.rewrite(server, lambda _: decline)
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.peer_code == 0x03020000
    assert "IPSEC" in verdict.reason.text


@pytest.mark.parametrize("stage", ["AWAIT_PROPOSAL", "AWAIT_CONFIRM"])
def test_a_silent_client_is_an_error(stage: str) -> None:
    pair = CorePair()
    pair.hold("tcp", pair.server if stage == "AWAIT_PROPOSAL" else pair.client)
    _, server = pair.connect()
    pair.advance(5.9)
    assert server.state.name == stage
    pair.advance(0.2)
    verdict = pair.verdict(server)
    assert isinstance(verdict, Failed)
    assert isinstance(verdict.error, HandshakeTimeout)
    pair.advance(20)
    pair.check_released()


# First contacts in turn


def test_connections_of_one_moment_share_a_group() -> None:
    pair = CorePair()
    both = [pair.connect() for _ in range(20)]
    pair.drive()
    groups = {pair.connection(each).group for hands in both for each in hands}
    assert len(groups) == 2, "one at each end"
    assert pair.server.endpoint.groups[0].places_taken == 20


def test_each_peer_key_and_direction_has_its_own_group() -> None:
    pair = CorePair()
    first, _ = pair.establish(peer_key="a")
    second, _ = pair.establish(peer_key="b")
    third, _ = pair.establish(pair.server, peer_key="a")
    assert len({first.group, second.group, third.group}) == 3
    assert len(pair.server.endpoint.groups) == 3


def test_the_next_in_the_queue_begins_when_the_first_fails() -> None:
    pair = CorePair()
    pair.hold("tcp", pair.client)
    first, first_there = pair.connect()
    pair.drive()
    others = [pair.connect() for _ in range(3)]
    pair.drive()
    states = [there.state for _, there in others]
    assert states == [HandshakeState.QUEUED] * 3
    assert [there.wanted for _, there in others] == [0] * 3
    pair.abandon(first)
    pair.drive()
    assert isinstance(pair.verdict(first_there), Failed)
    assert [there.state.name for _, there in others] == [
        "AWAIT_CONFIRM",
        "QUEUED",
        "QUEUED",
    ]
    pair.release("tcp")
    pair.drive()
    groups = {pair.connection(there).group for _, there in others}
    assert len(groups) == 1


def test_the_queue_forgets_who_leaves_it() -> None:
    pair = CorePair()
    pair.hold("tcp", pair.client)
    pair.connect()
    pair.drive()
    others = [pair.connect() for _ in range(3)]
    pair.drive()
    for _, there in others[::2]:
        pair.abandon(there)
    assert others[1][1].state is HandshakeState.QUEUED
    pair.abandon(others[1][1])
    pair.release("tcp")
    pair.drive()
    assert pair.server.endpoint.handshake_count == 0


def test_preparing_that_takes_too_long_falls_back_in_time() -> None:
    """A client waits 6 s for its Accept: a Decline has to come before."""
    pair = CorePair()
    pair.withhold(pair.server, RegisterMemory)
    client, server = pair.connect()
    pair.drive()
    pair.advance(4.7)
    assert server.state is HandshakeState.PREPARING
    pair.advance(0.2)
    verdict = pair.verdict(client)
    assert isinstance(verdict, FellBack)
    assert isinstance(pair.verdict(server), FellBack)
    assert verdict.reason.peer_code == 0x02010000


def test_the_256th_connection_makes_a_second_group() -> None:
    pair = CorePair()
    pair.checking = False
    for _ in range(256):
        pair.establish()
    pair.check()
    sizes = [len(group.connections) for group in pair.server.endpoint.groups]
    assert sizes == [255, 1]
    assert [len(g.connections) for g in pair.client.endpoint.groups] == [255, 1]
    pair.shutdown()


def test_negotiated_limits_are_the_lesser_ones() -> None:
    pair = CorePair(
        replace(SMALL, max_connections=20), replace(SMALL, max_connections=30)
    )
    client, server = pair.establish()
    assert (client.group.max_connections, server.group.max_connections) == (20, 20)
    pair = CorePair(replace(SMALL, release=0))
    client, server = pair.establish()
    assert (client.group.max_connections, client.group.version) == (255, "2.0")


# The Confirm


def change_confirm(
    pair: CorePair, change: Any, *, reuse: bool = False
) -> tuple[Handshake, Handshake]:
    """Change the Confirm of a handshake, and let it go on."""
    if reuse:
        pair.establish()
    client, server = pair.connect()
    pair.drive_until(lambda: server.state is HandshakeState.AWAIT_CONFIRM)
    pair.hold("tcp", pair.server)
    pair.drive()
    pair.rewrite(server, change)
    pair.release("tcp")
    pair.drive()
    return client, server


def with_first(**changes: Any) -> Any:
    def change(confirm: clc.Confirm) -> clc.Confirm:
        assert confirm.v2 is not None
        assert confirm.v2.first_contact is not None
        first = replace(confirm.v2.first_contact, **changes)
        return replace(confirm, v2=replace(confirm.v2, first_contact=first))

    return change


def without_first(confirm: clc.Confirm) -> clc.Confirm:
    assert confirm.v2 is not None
    v2 = replace(confirm.v2, first_contact=None, gids=())
    return replace(confirm, first_contact=False, v2=v2)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda c: replace(c, version=1, v2=None), "VERSION"),
        (lambda c: replace(c, v2=replace(c.v2, eid="OTHER")), "VERSION"),
        (with_first(release=0), "RELEASE"),
        (with_first(max_connections=16), "RELEASE"),
        (with_first(max_links=2), "RELEASE"),
        (without_first, "RELEASE"),
        (lambda c: replace(c, mtu_code=0), "INTERNAL"),
        (lambda c: replace(c, mtu_code=6), "INTERNAL"),
    ],
)
def test_a_confirm_that_repeats_something_else_gets_no_link(
    change: Any, name: str
) -> None:
    """Only the client may still decline, and it does when CONFIRM LINK stays away."""
    pair = CorePair()
    client, server = change_confirm(pair, change)
    pair.advance(6.9)
    assert not client.is_over
    pair.advance(0.2)
    verdict = pair.verdict(server)
    assert isinstance(verdict, FellBack)
    assert verdict.reason.name == name
    there = pair.verdict(client)
    assert isinstance(there, FellBack)
    assert there.reason.name == "LINK_FAILED"
    assert not pair.tcp(server).arrived
    pair.shutdown()


def test_a_confirm_without_the_flag_is_first_contact_all_the_same() -> None:
    pair = CorePair()
    _, server = change_confirm(pair, lambda c: replace(c, first_contact=False))
    assert isinstance(pair.verdict(server), Established)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: replace(c, rkey=0xBAD), "an RMB that it never announced"),
        (lambda c: replace(c, virtual_address=0), "an RMB that it never announced"),
        (lambda c: replace(c, v2=replace(c.v2, eid="OTHER")), "another version or EID"),
    ],
)
def test_a_wrong_confirm_of_a_reused_link_fails(change: Any, text: str) -> None:
    """The client has gone on: a Decline would reach its application."""
    pair = CorePair()
    client, server = change_confirm(pair, change, reuse=True)
    verdict = pair.verdict(server)
    assert isinstance(verdict, Failed)
    assert isinstance(verdict.error, RemoteProtocolError)
    assert text in str(verdict.error)
    # The client learns it, because the memory is withdrawn that it may write to.
    assert [event.connection for event in pair.client.lost] == [pair.connection(client)]
    assert [end.endpoint.groups[0].places_taken for end in pair.ends] == [1, 1]


def test_a_decline_in_place_of_the_confirm_of_a_reused_link_keeps_the_group() -> None:
    pair = CorePair()
    pair.establish()
    pair.withhold(pair.client, RegisterMemory)
    client, server = pair.connect()
    pair.drive()
    pair.advance(5)
    assert isinstance(pair.verdict(client), FellBack)
    assert isinstance(pair.verdict(server), FellBack)
    assert pair.server.endpoint.groups[0].places_taken == 1


def test_a_message_out_of_turn_breaks_the_stream() -> None:
    pair = CorePair()
    _, server = change_confirm(
        pair,
        lambda c: clc.Decline(
            version=2, out_of_sync=True, peer_id=bytes(8), diagnosis=1, os_type=2
        ),
    )
    assert isinstance(pair.verdict(server), FellBack)
    pair = CorePair()
    client, server = pair.connect()
    proposal = bytes(pair.tcp(server).transit)
    pair.drive_until(lambda: server.state is HandshakeState.AWAIT_CONFIRM)
    pair.hold("tcp")
    pair.drive()
    pair.tcp(server).transit[:] = proposal
    pair.release("tcp")
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, Failed)
    assert "peer sent Proposal while awaiting the Confirm" in str(verdict.error)
    assert not client.is_over or isinstance(pair.verdict(client), Failed)


def test_an_out_of_sync_decline_counts_only_for_a_reused_link() -> None:
    pair = CorePair()
    pair.establish()
    _, server = pair.connect(peer_key="other")
    pair.drive_until(lambda: server.state is HandshakeState.AWAIT_CONFIRM)
    pair.hold("tcp", pair.server)
    pair.drive()
    decline = clc.Decline(
        version=2, out_of_sync=True, peer_id=bytes(8), diagnosis=0x04000000, os_type=2
    )
    pair.rewrite(server, lambda _: decline)
    pair.release("tcp")
    pair.drive()
    assert isinstance(pair.verdict(server), FellBack)
    assert len(pair.server.endpoint.groups) == 1
    assert pair.server.lost == []


def test_whoever_says_out_of_sync_ends_nothing_that_lives() -> None:
    pair = CorePair()
    client, server = pair.establish()
    _, victim = pair.connect()
    pair.drive_until(lambda: victim.state is HandshakeState.AWAIT_CONFIRM)
    pair.hold("tcp", pair.server)
    pair.drive()
    forged = clc.Decline(
        version=2, out_of_sync=True, peer_id=bytes(8), diagnosis=0x04000000, os_type=2
    )
    pair.rewrite(victim, lambda _: forged)
    pair.release("tcp")
    pair.drive()
    assert isinstance(pair.verdict(victim), FellBack)
    # The group takes nobody new, but what lives on it goes on: TEST LINK was answered.
    (group,) = pair.server.endpoint.groups
    assert group.is_closed_to_new
    pair.advance(5)
    assert pair.server.lost == []
    pair.write(pair.client, client, b"still here")
    pair.drive()
    assert pair.read(pair.server, server, 100) == b"still here"


def test_an_element_in_use_is_given_to_nobody_else() -> None:
    pair = CorePair()
    client, _ = pair.establish()
    used = client.rmb.tokens[client.link]
    _, second = change_confirm(
        pair,
        lambda c: replace(c, rkey=used.rkey, virtual_address=used.virtual_address),
    )
    verdict = pair.verdict(second)
    assert isinstance(verdict, Failed)
    assert "another connection is using" in str(verdict.error)
    assert pair.server.lost == []


@pytest.mark.parametrize("end", ["client", "server"])
def test_a_refusal_that_was_known_before_is_a_decline(end: str) -> None:
    pair = CorePair()
    why = reason("LIMIT", "local", "max_handshakes is 1.")
    if end == "client":
        client, server = pair.connect(client_refusal=why)
    else:
        client, server = pair.connect(server_refusal=why)
    pair.drive()
    own, other = (client, server) if end == "client" else (server, client)
    mine, theirs = pair.verdict(own), pair.verdict(other)
    assert isinstance(mine, FellBack)
    assert mine.reason is why
    assert isinstance(theirs, FellBack)
    assert theirs.reason.peer_code == 0x01010000
    assert pair.server.endpoint.groups == []


# CONFIRM LINK and ADD LINK


def answer_link(pair: CorePair, **changes: Any) -> tuple[Handshake, Handshake]:
    """Change the client's answer to CONFIRM LINK."""
    client, server = pair.connect()
    pair.hold("send", pair.server)
    pair.drive()
    assert server.link is not None
    sends = server.link.handle.sends
    message = llc.parse(sends.popleft())
    sends.append(replace(message, **changes).build())
    pair.release("send")
    pair.drive()
    return client, server


@pytest.mark.parametrize("changes", [{"qp_number": 1}, {"no_eyecatcher": 0}])
def test_a_wrong_answer_to_confirm_link_fails(changes: dict[str, int]) -> None:
    """The client has gone on: a Decline would reach its application."""
    pair = CorePair()
    client, server = answer_link(pair, **changes)
    verdict = pair.verdict(server)
    assert isinstance(verdict, Failed)
    assert "names another queue pair or eye catchers" in str(verdict.error)
    assert len(pair.client.lost) == 1
    assert isinstance(pair.verdict(client), Established)


def test_a_request_in_place_of_the_answer_is_passed_over() -> None:
    pair = CorePair()
    _, server = answer_link(pair, response=False)
    assert server.state is HandshakeState.AWAIT_LINK


def test_a_wrong_answer_behind_half_a_decline_breaks_the_stream() -> None:
    """Nothing is declined, and the rest of theirs reaches nobody."""
    pair = CorePair()
    client, server = pair.connect()
    pair.hold("send", pair.server)
    pair.drive()
    assert server.link is not None
    pair.send_tcp(client, b"\xe2\xd4\xc3\xd9\x04")
    pair.drive()
    sends = server.link.handle.sends
    message = llc.parse(sends.popleft())
    assert isinstance(message, llc.ConfirmLink)
    sends.append(replace(message, qp_number=1).build())
    pair.release("send")
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, Failed)
    assert "names another queue pair" in str(verdict.error)
    assert not any("server: tcp 256 sends Decline" in line for line in pair.trace)


@pytest.mark.parametrize("rejected", [True, False])
def test_add_link_of_version_2_0_is_answered_either_way(rejected: bool) -> None:
    pair = CorePair(replace(SMALL, release=0))
    _, server = pair.connect()
    pair.drive_until(lambda: server.state is HandshakeState.AWAIT_ADD_LINK)
    pair.hold("send", pair.server)
    pair.drive()
    assert server.link is not None
    sends = server.link.handle.sends
    message = llc.parse(sends.popleft())
    assert isinstance(message, llc.AddLink)
    assert message.rejected
    request = replace(message, response=False, rejected=False)
    sends.append(request.build())
    sends.append(replace(message, rejected=rejected).build())
    pair.release("send")
    pair.drive()
    assert isinstance(pair.verdict(server), Established)
    withdrawn = [line for line in pair.trace if "DELETE_LINK" in line]
    if rejected:
        assert withdrawn == []
    else:
        # Withdrawn, and answered: the client never had it.
        assert len(withdrawn) == 2
        assert "00100000" in withdrawn[1] or "UNKNOWN" in withdrawn[1]
    pair.establish()


def test_version_2_0_goes_on_without_an_answer_to_add_link() -> None:
    pair = CorePair(replace(SMALL, release=0))
    _, server = pair.connect()
    pair.drive_until(lambda: server.state is HandshakeState.AWAIT_ADD_LINK)
    pair.hold("send", pair.server)
    pair.advance(2.1)
    assert isinstance(pair.verdict(server), Established)
    # It comes at last, and twice.
    assert server.link is not None
    server.link.handle.sends.extend(list(server.link.handle.sends))
    pair.release("send")
    pair.drive()


def test_add_link_before_its_time_is_passed_over() -> None:
    pair = CorePair()
    _, server = pair.connect()
    pair.hold("send", pair.server)
    pair.drive()
    assert server.link is not None
    answer = llc.AddLink(
        version=2,
        response=True,
        mac=bytes(6),
        gid=bytes(16),
        qp_number=5,
        link_number=2,
        mtu_code=3,
        psn=1,
    )
    server.link.handle.sends.appendleft(answer.build())
    pair.release("send")
    pair.drive()
    assert isinstance(pair.verdict(server), Established)


# A link that is lost before the Confirm


def test_a_link_lost_before_the_confirm_is_declined_behind_it() -> None:
    """Declined at once, the Confirm on its way would be read by our application."""
    pair = CorePair(silent_close=True)
    client, server = pair.connect()
    pair.drive_until(lambda: server.state is HandshakeState.AWAIT_CONFIRM)
    assert server.link is not None
    pair.server.endpoint.link_down(server.link, "timed out", "", pair.now)
    pair.settle(pair.server)
    assert not server.is_over
    pair.advance(20)
    for handshake in (client, server):
        assert isinstance(pair.verdict(handshake), FellBack)
        assert not pair.tcp(handshake).arrived
    pair.check_released()


def test_a_reused_link_lost_before_the_confirm_is_a_failure() -> None:
    pair = CorePair(silent_close=True)
    first, there = pair.establish()
    # Both ends have idle memory, so that no CONFIRM RKEY is needed.
    pair.close(pair.client, first)
    pair.close(pair.server, there)
    pair.drive()
    client, server = pair.connect()
    pair.drive_until(lambda: server.state is HandshakeState.AWAIT_CONFIRM)
    assert server.link is not None
    pair.server.endpoint.link_down(server.link, "timed out", "", pair.now)
    pair.settle(pair.server)
    pair.drive()
    verdict = pair.verdict(server)
    assert isinstance(verdict, Failed)
    assert "link group ended before the Confirm came" in str(verdict.error)
    assert isinstance(pair.verdict(client), Established)
