"""LLC on one link: every order of every message, doubled, early, late and in a flood.

An endpoint in a state gets sequences of LLC messages, all of them up to a length; what
it answers is compared with what the wire format's table of flows says of each message
alone, because with one link no request of the peer depends on another.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.testing.deliver import Delivered, EndpointIn, TimePasses
from pysmc.testing.messages import genuine
from pysmc.testing.pair import SMALL
from smcproto import llc

if TYPE_CHECKING:
    from collections.abc import Callable

STATES = [
    f"{role}/{rest}"
    for role in ("client", "server")
    for rest in (
        "active",
        "link/tested",
        "link/delete-rkey",
        "link/idle",
        "reuse/preparing/rkey",
        "handover",
    )
]
FLOWS = [each for each in STATES if each.endswith(("tested", "delete-rkey", "rkey"))]
"""Those in which a request of ours waits for its answer."""
ANSWERED = (llc.ConfirmRkey, llc.DeleteRkey, llc.TestLink, llc.RequestAddLink)
"""Requests that each have one answer, whatever else is going on."""
LATE = "2 s later"


def inputs(endpoint: EndpointIn) -> dict[str, Any]:
    messages: dict[str, Any] = {
        name: message
        for name, message in genuine(endpoint).items()
        if isinstance(message, llc.LlcMessage)
    }
    messages[LATE] = TimePasses(2.0)
    return messages


def check_answer(endpoint: EndpointIn, what: Any, seen: Delivered, ended: bool) -> None:
    """Check what one message did."""
    of_llc = [each for each in seen.said if isinstance(each, llc.LlcMessage)]
    responses = [each for each in of_llc if each.response]
    if ended:
        # No queue pair is there any more.
        assert not of_llc, seen
        return
    if isinstance(what, TimePasses):
        assert not responses, seen
        return
    if what.response or isinstance(
        what, llc.AddLinkContinuation | llc.ConfirmRkeyContinuation | llc.ConfirmLink
    ):
        # An answer is never answered; what belongs to further links is passed over.
        assert not responses, seen
        assert seen.after.groups == seen.before.groups
        return
    is_client = endpoint.scene.role.value == "client"
    match what:
        case llc.AddLink():
            # Only a server may ask; a client refuses, having one port.
            assert [type(each) for each in responses] == [llc.AddLink] * is_client
            assert all(getattr(each, "rejected", False) for each in responses)
        case llc.DeleteLink():
            link = endpoint.link
            assert link is not None
            ends = what.whole_group or what.link_number == link.number
            assert (seen.after.link == "DOWN") == ends, seen
            answered = is_client and not what.whole_group
            assert [type(each) for each in responses] == [llc.DeleteLink] * answered
        case _:
            assert isinstance(what, ANSWERED)
            assert [type(each) for each in responses] == [type(what)], seen
            assert seen.after.groups == seen.before.groups


def play(state: str, names: tuple[str, ...]) -> None:
    endpoint = EndpointIn(state)
    messages = inputs(endpoint)
    for name in names:
        what = messages[name]
        ended = endpoint.link is None or endpoint.link.state.name == "DOWN"
        seen = endpoint.deliver(what)
        try:
            check_answer(endpoint, what, seen, ended)
        except AssertionError as error:
            text = f"{state}: {' / '.join(names)}, at {name}: {error}"
            raise AssertionError(text) from error


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_every_order_of_two(state: str) -> None:
    names = list(inputs(EndpointIn(state)))
    assert len(names) == 21
    for pair in product(names, repeat=2):
        play(state, pair)


@pytest.mark.slow
@pytest.mark.simulate
def test_every_order_of_three(long_run: Callable[..., Any]) -> None:
    with long_run("llc-model", small=1, full=len(STATES)) as run:
        for number in run.seeds():
            state = STATES[number]
            names = list(inputs(EndpointIn(state)))
            chosen = names if run.is_full else names[::4]
            for three in product(chosen, repeat=3):
                play(state, three)
                run.add(sequences=1)


@pytest.mark.parametrize("state", FLOWS)
def test_our_own_flow_ends_once_whatever_comes(state: str) -> None:
    """Its answer comes, twice; or it never does, and then it does after all."""
    for order in (("answer", "answer", LATE), (LATE, "answer", LATE)):
        endpoint = EndpointIn(state)
        (answer,) = (
            each
            for each in endpoint.awaited
            if isinstance(each, llc.LlcMessage) and each.response
        )
        for what in order:
            seen = endpoint.deliver(TimePasses(2.0) if what == LATE else answer)
        assert seen.after.memory != "CONFIRMING", seen
        assert seen.after.memory != "DELETING", seen
        assert seen.after.timer is None or seen.after.timer >= 0


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_flood_is_answered_up_to_the_limit(role: str) -> None:
    config = replace(SMALL, max_llc_requests_per_second=10)
    endpoint = EndpointIn(f"{role}/active", config)
    request = llc.TestLink(version=2, response=False, user_data=b"flood" + bytes(11))
    answers = sum(len(endpoint.deliver(request).said) for _ in range(200))
    # CONFIRM LINK was a request too, to the client and a moment ago.
    assert answers == (9 if role == "client" else 10)
    endpoint.deliver(TimePasses(1.0))
    assert len(endpoint.deliver(request).said) == 1
    assert endpoint.look().connection == "ACTIVE"


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_flood_of_keys_fills_a_table_and_no_more(role: str) -> None:
    endpoint = EndpointIn(f"{role}/active")
    kept = 0
    for rkey in range(400):
        request = llc.ConfirmRkey(
            version=2, response=False, rkey=0x10000 + rkey, virtual_address=rkey << 12
        )
        (answer,) = endpoint.deliver(request).said
        assert isinstance(answer, llc.ConfirmRkey)
        kept += not answer.refused
    assert kept == 254, "one is the connection's own"
    assert endpoint.link is not None
    assert len(endpoint.link.group.rtokens) == 255
