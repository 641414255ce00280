"""The hook that delivers a message to an endpoint in a state."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from pysmc.testing.deliver import (
    Answer,
    Delivered,
    EndpointIn,
    LinkLost,
    OnLink,
    OnTcp,
    PairConnected,
    PublishCompleted,
    TcpLost,
    TimePasses,
    deliver,
)
from pysmc.testing.messages import genuine
from pysmc.testing.states import STATES
from smcproto import cdc, clc, llc
from smcproto.errors import DecodeError


def answered(state: str) -> tuple[EndpointIn, Delivered]:
    """Let the first message that is awaited arrive."""
    endpoint = EndpointIn(state)
    return endpoint, endpoint.deliver(endpoint.awaited[0])


def test_the_example_of_its_documentation() -> None:
    endpoint = EndpointIn("client/await-link")
    (request,) = endpoint.awaited
    assert isinstance(request, llc.ConfirmLink)
    seen = endpoint.deliver(replace(request, qp_number=7))
    assert seen.before.handshake == "AWAIT_LINK"
    # It is the client's turn to decline, and TCP is quiet.
    assert seen.after.handshake == "FELL_BACK"
    assert [type(message) for message in seen.said] == [clc.Decline]


@pytest.mark.parametrize(
    ("state", "after", "said"),
    [
        ("client/await-accept", "AWAIT_LINK", ["Confirm"]),
        ("client/await-link", "ESTABLISHED", ["ConfirmLink"]),
        ("client/await-add-link", "ESTABLISHED", ["AddLink"]),
        ("client/reuse/await-accept", "PREPARING", ["ConfirmRkey"]),
        ("client/reuse/preparing/rkey", "ESTABLISHED", ["Confirm"]),
        ("server/await-proposal", "AWAIT_CONFIRM", ["Accept"]),
        ("server/await-confirm", "AWAIT_LINK", []),
        ("server/await-confirm/link-lost", "AWAIT_DECLINE", []),
        ("server/await-link", "ESTABLISHED", []),
        ("server/await-add-link", "ESTABLISHED", []),
        ("server/reuse/preparing/rkey", "AWAIT_CONFIRM", ["Accept"]),
        ("server/reuse/await-confirm", "ESTABLISHED", []),
        ("server/reuse/await-confirm/group-ended", "FAILED", []),
    ],
)
def test_what_is_awaited_leads_on(state: str, after: str, said: list[str]) -> None:
    _, seen = answered(state)
    assert seen.after.handshake == after, seen
    assert [type(message).__name__ for message in seen.said] == said, seen


@pytest.mark.parametrize(
    ("state", "order", "after"),
    [
        ("client/preparing/queue-pair", "CreateQueuePair", "AWAIT_LINK"),
        ("client/preparing/memory", "RegisterMemory", "AWAIT_LINK"),
        ("client/preparing/connecting", "ConnectQueuePair", "AWAIT_LINK"),
        ("client/reuse/preparing/memory", "RegisterMemory", "PREPARING"),
        ("client/handover", "CheckTcp", "ESTABLISHED"),
        ("server/preparing/queue-pair", "CreateQueuePair", "AWAIT_CONFIRM"),
        ("server/preparing/memory", "RegisterMemory", "AWAIT_CONFIRM"),
        ("server/handover", "CheckTcp", "ESTABLISHED"),
    ],
)
def test_withheld_orders_are_answered_one_by_one(
    state: str, order: str, after: str
) -> None:
    endpoint = EndpointIn(state)
    assert list(endpoint.unanswered) == [order]
    seen = endpoint.deliver(Answer())
    assert seen.after.handshake == after, seen
    assert endpoint.unanswered == ()
    if order != "CheckTcp":
        (failed,) = deliver(state, Answer("no memory", "ENOMEM"))
        assert failed.after.handshake == "FELL_BACK", failed
        assert [type(message) for message in failed.said] == [clc.Decline]


def test_everything_that_can_happen_can_be_delivered() -> None:
    (seen,) = deliver("client/await-accept", TcpLost())
    assert (seen.after.handshake, seen.news) == ("FAILED", ("Failed",))
    (seen,) = deliver("client/await-accept", TcpLost("no route"))
    assert "no route" in str(seen)
    (seen,) = deliver("client/active", LinkLost("timed out"))
    assert (seen.after.link, seen.news) == ("DOWN", ("ConnectionLost",))
    (seen,) = deliver("server/await-link/connecting", PairConnected())
    assert [type(message) for message in seen.said] == [llc.ConfirmLink]
    (seen,) = deliver("server/await-link/connecting", PairConnected("unreachable"))
    assert seen.after.handshake == "AWAIT_DECLINE"
    (seen,) = deliver("client/active/posted", PublishCompleted())
    assert seen.before.writable < seen.after.writable or not seen.actions
    (seen,) = deliver("client/await-accept", TimePasses(60))
    assert (seen.after.handshake, seen.after.timer) == ("FAILED", None)
    (seen,) = deliver("client/active", TimePasses(30.0))
    assert [type(message) for message in seen.said] == [llc.TestLink]


def test_bytes_can_be_delivered_in_any_pieces() -> None:
    (accept,) = EndpointIn("client/await-accept").awaited
    data = accept.build()
    whole = deliver("client/await-accept", OnTcp(data))[-1]
    pieces = deliver("client/await-accept", *(OnTcp(bytes((b,))) for b in data))[-1]
    assert str(whole.after) == str(pieces.after)
    assert whole.after.handshake == "AWAIT_LINK"
    (request,) = EndpointIn("client/await-link").awaited
    assert deliver("client/await-link", OnLink(request.build()))[0].said
    update = genuine(EndpointIn("client/active"))["CDC, one more byte"].build()
    assert deliver("client/active", OnLink(update))[0].after.readable == 1
    with pytest.raises(DecodeError):
        deliver("client/active", OnLink(update[:-1]))


def test_what_is_not_read_is_told() -> None:
    decline = clc.Decline(
        version=2, out_of_sync=False, peer_id=bytes(8), diagnosis=0x03030000
    ).build()
    (seen,) = deliver("client/await-accept", OnTcp(decline + b"HTTP/1.1 200"))
    assert (seen.news, seen.left) == (("FellBack",), b"HTTP/1.1 200")
    assert "HTTP" in bytes.fromhex(str(seen).split("left:")[1].strip()).decode()


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ("client/await-accept", LinkLost()),
        ("client/await-accept", PairConnected()),
        ("client/await-accept", PublishCompleted()),
        ("client/await-accept", Answer()),
        ("client/await-accept", OnLink(b"")),
        ("server/await-proposal", llc.TestLink(version=2, response=False)),
    ],
)
def test_what_cannot_arrive_is_refused(state: str, what: Any) -> None:
    assert not EndpointIn(state).takes(type(what))
    with pytest.raises(ValueError, match="cannot arrive"):
        deliver(state, what)


def test_updates_move_the_connection() -> None:
    endpoint = EndpointIn("server/active")
    messages = genuine(endpoint)
    seen = endpoint.deliver(messages["CDC, one more byte"])
    assert (seen.before.readable, seen.after.readable) == (0, 1)
    seen = endpoint.deliver(messages["CDC, another token"])
    assert not seen.changed
    update = messages["CDC, closed"]
    assert isinstance(update, cdc.CdcMessage)
    # It says less than the one before: the cursor is ignored, the flags count.
    seen = endpoint.deliver(replace(update, sequence=update.sequence + 1))
    assert seen.after.connection == "APPCLOSEWAIT1"


def test_each_endpoint_is_its_own() -> None:
    first, second = EndpointIn("client/active"), EndpointIn("client/active")
    first.deliver(LinkLost())
    assert first.look() != second.look()
    assert second.look() == EndpointIn("client/active").look()
    third = copy.copy(second)
    assert repr(third) == repr(second)
    assert "ESTABLISHED" in repr(second)


@pytest.mark.parametrize("state", STATES)
def test_the_same_delivery_does_the_same(state: str) -> None:
    """Word for word: no number, order or time depends on anything but the state."""

    def everything() -> list[str]:
        texts = []
        for name, message in genuine(EndpointIn(state)).items():
            texts.append(f"{name}: {EndpointIn(state).deliver(message)}")
        return texts

    assert everything() == everything()


def test_an_unknown_state_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        EndpointIn("client/dreaming")
