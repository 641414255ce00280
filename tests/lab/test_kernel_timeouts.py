"""Ends of ours that are stopped in the middle of a handshake with the kernel.

The kernel waits 6 s for each CLC message, as a server 2 s for the answer to CONFIRM
LINK and then 1 s for a Decline, as a client 4 s and 1 s, and 2 s for CONFIRM RKEY.
Whoever goes on in time is on SMC-R, whoever is late is on TCP with every byte, or is
told of an error where CLC itself took too long. No CLC byte reaches an application.
"""

# ruff: noqa: T201  # the views of a scenario are in its output

from __future__ import annotations

import signal
from typing import NamedTuple

import pytest

from smcproto.diagnosis import PeerDiagnosis
from tests.lab.network_faults import TCP, impaired
from tests.lab.odd_ends import rest, wait_until_stopped

LAB = pytest.mark.lab(seconds=40)
LONG = pytest.mark.lab_long(seconds=60)
NO_ANSWER = PeerDiagnosis.CONFIRM_LINK_TIMEOUT


class Stop(NamedTuple):
    """One stop: where, for how long, and what comes of it."""

    step: str
    seconds: float
    mode: str
    """"smcr", "tcp", or "" when the connection fails."""
    is_quick: bool = False


def cases(*stops: Stop):
    return pytest.mark.parametrize(
        "stop",
        [
            pytest.param(
                stop,
                marks=LAB if stop.is_quick else LONG,
                id=f"{stop.step.replace(' ', '-')}-{stop.seconds:g}s",
            )
            for stop in stops
        ],
    )


def hold(end, seconds: float) -> None:
    """Let an end that stops itself stand for so long."""
    wait_until_stopped(end)
    rest(seconds)
    end.signal(signal.SIGCONT)


@cases(
    Stop("client begins", 7.5, ""),
    Stop("client has the Accept", 3.0, "smcr"),
    Stop("client has the Accept", 7.5, ""),
    Stop("client has CONFIRM LINK", 1.0, "smcr"),
    Stop("client has CONFIRM LINK", 2.5, "tcp"),
    Stop("client has CONFIRM LINK", 4.5, "tcp"),
)
def test_our_client_is_stopped(kernel, meetings, stop):
    server, client = meetings.theirs("server"), meetings.ours("client")
    client.ask("stop_at", step=stop.step)
    port = server.ask("serve")["port"]
    server.tell("take")
    client.tell("open", port=port)
    hold(client, stop.seconds)
    answer = client.answer()
    print(answer, kernel.sockets())
    if stop.mode:
        assert answer["infos"][0]["mode"] == stop.mode
        (seen,) = kernel.sockets(peer_port=answer["ports"][0])
        assert (seen.mode, seen.reason) == (
            stop.mode,
            NO_ANSWER if stop.mode == "tcp" else 0,
        )
        assert "error" not in server.answer()
        meetings.use(client, server)
    else:
        assert_failed(answer)
        assert not kernel.sockets()
    assert client.ask("groups")["connections"] == ([0] if stop.mode == "smcr" else [])
    assert client.finish() == 0


def assert_failed(answer) -> None:
    """It was told as an error that code written for TCP expects."""
    assert answer["is_connection_error"] or "Timeout" in answer["error"], answer


@cases(
    Stop("server has the Proposal", 3.0, "smcr"),
    Stop("server has the Proposal", 7.5, ""),
    Stop("server has the Confirm", 2.0, "smcr"),
    Stop("server has the Confirm", 4.5, "tcp"),
    Stop("server has the Confirm", 6.5, "tcp"),
    Stop("server has CONFIRM LINK", 4.0, "smcr"),
)
def test_our_server_is_stopped(kernel, meetings, stop):
    server, client = meetings.ours("server"), meetings.theirs("client")
    server.ask("stop_at", step=stop.step)
    port = server.ask("serve")["port"]
    client.tell("open", port=port)
    hold(server, stop.seconds)
    answer = client.answer()
    print(answer, kernel.sockets())
    if stop.mode:
        info = server.ask("take")["infos"][0]
        (seen,) = kernel.sockets(port=answer["ports"][0])
        print(info, seen)
        assert info["mode"] == stop.mode
        assert (seen.mode, seen.reason) == (
            stop.mode,
            NO_ANSWER if stop.mode == "tcp" else 0,
        )
        meetings.use(client, server)
    else:
        assert answer["error"] == "TimeoutError", answer
    # The listener is as good as before.
    server.tell("take")
    client.ask("open", port=port)
    assert server.answer()["infos"][0]["mode"] == "smcr"
    meetings.use(client, server)
    assert server.ask("groups")["connections"] == [0]
    assert server.finish() == 0


@LONG
@pytest.mark.parametrize("client_is_ours", [True, False], ids=["ours", "theirs"])
def test_roce_is_filtered(kernel, meetings, client_is_ours):
    """A firewall that drops UDP port 4791: the kernel takes longest to decline then."""
    ours, theirs = meetings.ours("ours"), meetings.theirs("theirs")
    client, server = (ours, theirs) if client_is_ours else (theirs, ours)
    ours.ask("time_declines")
    port = server.ask("serve")["port"]
    with impaired("loss 100%"):
        assert meetings.connect(client, server, port) == "tcp"
        (seen,) = kernel.sockets()
        print(seen, ours.ask("declines"))
        assert (seen.mode, seen.reason) == ("tcp", NO_ANSWER)
        meetings.use(client, server)


@LONG
@pytest.mark.parametrize("client_is_ours", [True, False], ids=["ours", "theirs"])
def test_declines_that_could_cross(kernel, meetings, client_is_ours):
    """Both give up the link while TCP is slow: neither reads the other's Decline."""
    ours, theirs = meetings.ours("ours"), meetings.theirs("theirs")
    if client_is_ours:
        client, server, step = ours, theirs, "client has CONFIRM LINK"
    else:
        client, server, step = theirs, ours, "server has its queue pair"
    ours.ask("be_deaf_at", step=step)
    port = server.ask("serve")["port"]
    with impaired("delay 500ms", TCP):
        assert meetings.connect(client, server, port) == "tcp"
        print(kernel.sockets())
        meetings.use(client, server)


@LONG
@pytest.mark.parametrize("seconds", [1.7, 2.3, 4.7])
def test_our_client_gives_up_the_link_late(kernel, meetings, seconds):
    """In the first two seconds it declines; then it waits for the kernel's Decline."""
    server, client = meetings.theirs("server"), meetings.ours("client")
    for what in ("decline_at", "stop_at"):
        client.ask(what, step="client has CONFIRM LINK")
    port = server.ask("serve")["port"]
    server.tell("take")
    client.tell("open", port=port)
    hold(client, seconds)
    answer = client.answer()
    assert "error" not in server.answer()
    (seen,) = kernel.sockets()
    print(answer, seen)
    assert (answer["infos"][0]["mode"], seen.mode) == ("tcp", "tcp")
    meetings.use(client, server)


@LONG
@pytest.mark.parametrize("role", ["client", "server"])
def test_confirm_rkey_is_answered_late(kernel, meetings, role):
    """The kernel declines after two seconds; the group's first connection lives."""
    ours = meetings.ours("ours")
    theirs = meetings.theirs("theirs")
    server, client = (theirs, ours) if role == "client" else (ours, theirs)
    port = server.ask("serve")["port"]
    modes = []
    for number in range(2):
        server.tell("take")
        client.tell("open", port=port)
        if number:
            hold(ours, 3.5)
        opened, taken = client.answer(), server.answer()
        modes.append((opened if role == "client" else taken)["infos"][0]["mode"])
        print(opened, taken, kernel.sockets())
        if not number:
            ours.ask("stop_at", step="either has CONFIRM RKEY")
    assert modes == ["smcr", "tcp"]
    meetings.talk(client, server)
