"""Declines between the kernel's SMC and ours, by either side at every point.

The same TCP connection then carries the data: every byte of it is compared, so that a
byte of a CLC message that reached an application would be found, and one that was lost.
"""

# ruff: noqa: T201  # the views of a scenario are in its output

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.testing.simulation.stream import Flow
from smcproto import clc
from smcproto.diagnosis import PeerDiagnosis
from tests.lab.network_faults import no_rdma_device
from tests.lab.odd_clc import OddListener, call, decline
from tests.lab.odd_ends import CLIENT, COUNT, SERVER, SHORTAGE

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tests.lab.kernel_smc import Kernel

LAB = pytest.mark.lab(seconds=40)
LONG = pytest.mark.lab_long(seconds=60)
PEER_DECLINED = PeerDiagnosis.PEER_DECLINED
CODE = SHORTAGE.code
NO_ANSWER = PeerDiagnosis.CONFIRM_LINK_TIMEOUT


def in_lane(name: str, quick: bool) -> Any:
    return pytest.param(name, marks=LAB if quick else LONG, id=name.replace(" ", "-"))


def meet_their_server(server, client):
    """Let a client of ours connect to the kernel; gives what it is told, and a port."""
    port = server.ask("serve")["port"]
    server.tell("take")
    answer = client.ask("open", port=port)
    taken = server.answer()
    assert "error" not in taken, taken
    print(f"after {answer['seconds']:.2f} s: {answer['infos'][0]}")
    return answer["infos"][0], answer["ports"][0]


def meet_their_client(server, client):
    """Let the kernel connect to a server of ours; gives the same."""
    port = server.ask("serve")["port"]
    server.tell("take")
    answer = client.ask("open", port=port)
    taken = server.answer()
    print(f"after {answer['seconds']:.2f} s: {taken['infos'][0]}")
    return taken["infos"][0], answer["ports"][0]


def assert_fallen_back(info, seen, name: str, reason: int, code: int | None) -> None:
    """Both ends say that it is TCP, and why."""
    print(seen)
    assert (info["mode"], info["reason"]["name"]) == ("tcp", name), info
    assert (seen.mode, seen.reason, seen.peer_diagnosis) == ("tcp", reason, code), seen


# Ours


@pytest.mark.parametrize(
    "step",
    [
        in_lane("client begins", quick=False),
        in_lane("client has the Accept", quick=False),
        in_lane("client has its memory", quick=False),
        in_lane("client has CONFIRM LINK", quick=False),
    ],
)
def test_our_client_declines(kernel, meetings, step):
    server, client = meetings.theirs("server"), meetings.ours("client")
    client.ask("decline_at", step=step)
    info, port = meet_their_server(server, client)
    (seen,) = kernel.sockets(peer_port=port)
    assert_fallen_back(info, seen, SHORTAGE.name, PEER_DECLINED, CODE)
    meetings.use(client, server)


@pytest.mark.parametrize(
    "step",
    [
        in_lane("server has the Proposal", quick=True),
        in_lane("server has its memory", quick=False),
    ],
)
def test_our_server_declines(kernel, meetings, step):
    server, client = meetings.ours("server"), meetings.theirs("client")
    server.ask("decline_at", step=step)
    info, port = meet_their_client(server, client)
    (seen,) = kernel.sockets(port=port)
    assert_fallen_back(info, seen, SHORTAGE.name, PEER_DECLINED, CODE)
    meetings.use(client, server)


@LONG
def test_our_server_cannot_follow_the_confirm(kernel, meetings):
    """After the Accept only the client declines: the kernel does, in five seconds."""
    server, client = meetings.ours("server"), meetings.theirs("client")
    server.ask("decline_at", step="server has the Confirm")
    info, port = meet_their_client(server, client)
    (seen,) = kernel.sockets(port=port)
    assert_fallen_back(info, seen, SHORTAGE.name, NO_ANSWER, 0)
    meetings.use(client, server)


# The kernel's


def no_ueid(kernel: Kernel) -> AbstractContextManager[None]:
    return kernel.no_ueid()


def other_ueid(kernel: Kernel) -> AbstractContextManager[None]:
    return kernel.no_ueid("OTHER.LAB")


def no_device_of_server(kernel: Kernel) -> AbstractContextManager[None]:
    return no_rdma_device("va")


def no_device_of_client(kernel: Kernel) -> AbstractContextManager[None]:
    return no_rdma_device("vb")


def nothing(kernel: Kernel) -> AbstractContextManager[None]:
    return nullcontext()


@pytest.mark.parametrize(
    ("want", "deaf_at", "code"),
    [
        pytest.param(other_ueid, "", 0x03030000, id="another-ueid", marks=LONG),
        pytest.param(no_ueid, "", 0x03030000, id="no-ueid", marks=LONG),
        pytest.param(no_device_of_server, "", 0x03030002, id="no-device", marks=LONG),
        pytest.param(
            nothing,
            "client has CONFIRM LINK",
            NO_ANSWER,
            id="confirm-link-unanswered",
            marks=LONG,
        ),
    ],
)
def test_their_server_declines(kernel, meetings, want, deaf_at, code):
    server, client = meetings.theirs("server"), meetings.ours("client")
    if deaf_at:
        client.ask("be_deaf_at", step=deaf_at)
        client.ask("time_declines")
    with want(kernel):
        info, port = meet_their_server(server, client)
        (seen,) = kernel.sockets(peer_port=port)
        assert (info["mode"], seen.mode, seen.reason) == ("tcp", "tcp", code), info
        assert info["reason"]["code"] == code or info["reason"]["peer_code"] == code
        meetings.use(client, server)
    if deaf_at:
        print(client.ask("declines"))


@pytest.mark.parametrize(
    ("want", "deaf_at", "code"),
    [
        pytest.param(no_ueid, "", 0x03030000, id="no-ueid", marks=LAB),
        pytest.param(no_device_of_client, "", 0x03030000, id="no-device", marks=LONG),
        pytest.param(
            nothing,
            "server has its queue pair",
            NO_ANSWER,
            id="no-confirm-link",
            marks=LONG,
        ),
    ],
)
def test_their_client_declines(kernel, meetings, want, deaf_at, code):
    server, client = meetings.ours("server"), meetings.theirs("client")
    if deaf_at:
        server.ask("be_deaf_at", step=deaf_at)
    with want(kernel):
        info, port = meet_their_client(server, client)
        (seen,) = kernel.sockets(port=port)
        assert (info["mode"], seen.mode, seen.reason) == ("tcp", "tcp", code), info
        assert info["reason"]["peer_code"] == code
        meetings.use(client, server)


@LONG
@pytest.mark.parametrize("role", ["client", "server"])
def test_confirm_rkey_is_not_answered(kernel, meetings, role):
    """The kernel declines for want of it; the first connection of the group lives."""
    if role == "client":
        ours, theirs = meetings.ours("client"), meetings.theirs("server")
        server, client = theirs, ours
    else:
        ours, theirs = meetings.ours("server"), meetings.theirs("client")
        server, client = ours, theirs
    port = server.ask("serve")["port"]
    infos = []
    for _ in range(2):
        server.tell("take")
        opened = client.ask("open", port=port)
        taken = server.answer()
        infos.append((opened if role == "client" else taken)["infos"][0])
        print(f"after {opened['seconds']:.2f} s: {infos[-1]}")
        if len(infos) == 1:
            meetings.exchange(client, server)
            ours.ask("be_deaf_at", step="either has CONFIRM RKEY")
    print(kernel.sockets())
    assert [info["mode"] for info in infos] == ["smcr", "tcp"]
    assert infos[1]["reason"]["peer_code"] == PeerDiagnosis.REGISTRATION
    meetings.exchange(client, server)
    meetings.talk(client, server)


# By hand


def flow(port: int, role: str) -> bytes:
    """Give what the kernel's end expects from an end of ours."""
    return Flow(f"{port}/{role}").take(COUNT)


@LONG
@pytest.mark.parametrize("version", [1, 2])
def test_a_decline_after_the_accept(kernel, meetings, version):
    """Both its forms are good there, and what follows in the segment is data."""
    server = meetings.theirs("server")
    port = server.ask("serve")["port"]
    server.tell("take")
    with call(CLIENT, (SERVER, port)) as odd:
        odd.propose()
        assert isinstance(odd.hear(), clc.Accept)
        odd.say(decline(version=version), flow(odd.port, "client"))
        assert server.answer()["ports"] == [odd.port]
        (seen,) = kernel.sockets(peer_port=odd.port)
        assert (seen.mode, seen.reason) == ("tcp", PEER_DECLINED)
        assert seen.peer_diagnosis == PeerDiagnosis.NO_DEVICE
        server.ask("receive", count=COUNT)


@LONG
def test_a_decline_of_a_wrong_length(kernel, meetings):
    """28 bytes that say version 2: the kernel drops TCP, and goes on listening."""
    server = meetings.theirs("server")
    port = server.ask("serve")["port"]
    server.tell("take")
    with call(CLIENT, (SERVER, port)) as odd:
        odd.propose()
        odd.hear()
        wrong = bytearray(decline(version=1).build())
        wrong[7] = 0x20
        odd.say(bytes(wrong))
        print(odd.rest())
    assert not kernel.sockets()
    client = meetings.ours("client")
    info = client.ask("open", port=port)["infos"][0]
    assert info["mode"] == "smcr"
    assert "error" not in server.answer()
    meetings.use(client, server)


@LONG
def test_a_client_that_never_answers_confirm_link(kernel, meetings):
    """The kernel's own Decline comes within four seconds, and then its data."""
    server = meetings.theirs("server")
    port = server.ask("serve")["port"]
    server.tell("take")
    with call(CLIENT, (SERVER, port)) as odd:
        odd.propose()
        odd.confirm()
        since = time.monotonic()
        said = odd.hear()
        print(f"after {time.monotonic() - since:.2f} s: {said}")
        assert isinstance(said, clc.Decline)
        assert "error" not in server.answer()
        server.ask("send", count=COUNT)
        server.ask("close")
        assert said.diagnosis == NO_ANSWER
        assert odd.rest() == flow(odd.port, "server")


@LONG
def test_a_late_decline_of_the_server(kernel, meetings):
    """The kernel's client looks for it when it has waited for CONFIRM LINK."""
    client = meetings.theirs("client")
    with OddListener(SERVER) as listener:
        client.tell("open", port=listener.port)
        with listener.accept() as odd:
            odd.accept()
            assert isinstance(odd.hear(), clc.Confirm)
            port = odd.sock.getpeername()[1]
            odd.say(decline(), flow(port, "server"))
            answer = client.answer()
            print(answer)
            (seen,) = kernel.sockets(port=port)
            assert (seen.mode, seen.reason) == ("tcp", PEER_DECLINED)
            client.ask("receive", count=COUNT)
