"""Kernels and peers of a kernel that go away, or forget, or are not who they seem.

Whatever goes, whoever is left is told by one error within the stated time, what was
delivered is a prefix of what was written, and a connection afterwards is on SMC-R.
"""

# ruff: noqa: T201  # the views of a scenario are in its output

from __future__ import annotations

import signal
import subprocess
import time
from functools import partial

import pytest

from tests.lab.kernel_smc import load, set_up
from tests.lab.network_faults import DEVICES, impaired, run
from tests.lab.odd_ends import rest
from tests.lab.playing import wait_until

LONG = pytest.mark.lab_long(seconds=90)
QUICK = {"test_link_interval": 2.0, "test_link_wait": 2.0}
SILENCE = 4.0
"""Seconds in which an end of ours notices silence, and a kernel with `QUICK_KERNEL`."""
QUICK_KERNEL = 2
RETRIES = 6.0
SLACK = 5.0
"""Seconds that an emulated machine may be late."""
ENDLESS = 1 << 30
MANY = 20
KERNEL_SILENCE = 45.0
"""More than `net.smc.smcr_testlink_time` as it is by itself, and what follows it."""
MOMENT = 1.0
ANY_IP = "ip dst 10.0.0.0/24"
TWIN = "0badc0de02000001"


def introduce(meetings, client_is_ours: bool, **changes):
    """Start both ends and connect them; gives client, server, and the server's port."""
    ours, theirs = meetings.ours("ours", **(QUICK | changes)), meetings.theirs("theirs")
    client, server = (ours, theirs) if client_is_ours else (theirs, ours)
    port = server.ask("serve")["port"]
    assert meetings.connect(client, server, port) == "smcr"
    return client, server, port


def stream(*pair) -> None:
    """Let both ends send for ever, and give them a moment."""
    for end in pair:
        end.tell("exchange", count=ENDLESS)
    rest(MOMENT)


def ended(end, since: float, within: float):
    """Wait until an exchange has failed; gives the error."""
    answer = end.answer(within + SLACK)
    seconds = time.monotonic() - since
    print(f"{end.name} after {seconds:.2f} s: {answer}")
    assert "error" in answer
    return answer


def assert_recovers(meetings, client, server, port: int) -> None:
    """Connections go on at once, and on SMC-R before long.

    A server of ours may still have the group that the kernel has lost: it offers that
    once, learns from the kernel's Decline, and asks the link.
    """
    for _ in range(3):
        mode = meetings.connect(client, server, port)
        print(mode)
        meetings.use(client, server)
        if mode == "smcr":
            return
        rest(SILENCE)
    pytest.fail("no connection is on SMC-R again")


def assert_prefix(*pair) -> None:
    """What either has received is where the other's has been; closes both."""
    here, there = (end.ask("told")["lines"][-1] for end in pair)
    for sender, receiver in ((here, there), (there, here)):
        assert receiver["received"][0] <= sender["sent"][0]


# Many behind one device


@LONG
def test_several_processes_behind_one_device(kernel, meetings):
    """Each is a peer of its own to the kernel: one that dies takes only its own."""
    server = meetings.theirs("their server")
    port = server.ask("serve")["port"]
    clients = [meetings.ours(f"client {n}", **QUICK) for n in range(3)]
    for client in clients:
        assert meetings.connect(client, server, port) == "smcr"
    servers = [meetings.ours(f"server {n}", **QUICK) for n in range(2)]
    client = meetings.theirs("their client")
    for ours in servers:
        own_port = ours.ask("serve")["port"]
        assert meetings.connect(client, ours, own_port) == "smcr"
    found = kernel.sockets()
    print(found)
    assert [one.mode for one in found] == 5 * ["smcr"]
    clients[0].signal(signal.SIGKILL)
    servers[0].signal(signal.SIGKILL)
    # The newest of each is what these end with, and those live.
    meetings.use(clients[-1], server)
    meetings.use(client, servers[-1])
    client.clean_up()
    server.clean_up()


# Out of step


@LONG
def test_two_processes_with_one_peer_id(kernel, meetings):
    """The kernel takes both for one: the second says so, and the first's group ends."""
    server = meetings.theirs("server")
    port = server.ask("serve")["port"]
    first, second = meetings.ours("first", **QUICK), meetings.ours("second", **QUICK)
    for end in (first, second):
        end.ask("be_a_twin", peer_id=TWIN)
    assert meetings.connect(first, server, port) == "smcr"
    server.tell("take")
    opened = second.ask("open", port=port)
    (info,) = opened["infos"]
    print(info, kernel.sockets())
    assert (info["mode"], info["reason"]["name"]) == ("tcp", "OUT_OF_SYNC")
    assert first.ask("reset")["failed"] is not None
    # With its group the kernel ends the connection that has just fallen back as well:
    # accept() passes over it, if that came first, and the order is for the next one.
    second.ask("close")
    (info,) = first.ask("open", port=port)["infos"]
    if server.answer()["ports"] == opened["ports"]:
        server.ask("take")
    assert info["mode"] == "smcr"
    meetings.use(first, server)


# A kernel that begins anew


def reload() -> None:
    """Take the kernel's SMC out, and put it back."""
    subprocess.run(["rmmod", "smc_diag"], check=True)
    # Sockets whose peer an earlier scenario has killed are on their way out until TEST
    # LINK ends their link.
    leave = partial(subprocess.run, ["rmmod", "smc"], check=False, capture_output=True)
    wait_until(lambda: leave().returncode == 0, lambda: "smc is in use", KERNEL_SILENCE)
    load.cache_clear()
    set_up()


@LONG
@pytest.mark.parametrize("client_is_ours", [True, False], ids=["ours", "theirs"])
def test_the_kernels_smc_is_reloaded(kernel, meetings, client_is_ours):
    """It ends its groups by DELETE LINK: the next connection is a first contact."""
    client, server, _ = introduce(meetings, client_is_ours)
    meetings.use(client, server)
    ours, theirs = (client, server) if client_is_ours else (server, client)
    theirs.clean_up()
    kernel.wait_until_gone()
    assert ours.ask("groups")["connections"] == [0]
    reload()
    assert ours.ask("groups")["connections"] == []
    theirs = meetings.theirs("again")
    client, server = (ours, theirs) if client_is_ours else (theirs, ours)
    port = server.ask("serve")["port"]
    assert meetings.connect(client, server, port) == "smcr"
    meetings.use(client, server)
    assert ours.finish() == 0


@LONG
@pytest.mark.parametrize("client_is_ours", [True, False], ids=["ours", "theirs"])
def test_the_kernels_smc_is_reloaded_and_says_nothing(kernel, meetings, client_is_ours):
    """Its DELETE LINK is lost; our server's offer of the old group is declined."""
    client, server, _ = introduce(meetings, client_is_ours, test_link_interval=30.0)
    meetings.use(client, server)
    ours, theirs = (client, server) if client_is_ours else (server, client)
    theirs.clean_up()
    kernel.wait_until_gone()
    with impaired("loss 100%"):
        reload()
    assert ours.ask("groups")["connections"] == [0]
    theirs = meetings.theirs("again")
    client, server = (ours, theirs) if client_is_ours else (theirs, ours)
    port = server.ask("serve")["port"]
    modes = []
    for _ in range(2):
        modes.append(meetings.connect(client, server, port))
        print(kernel.sockets())
        meetings.use(client, server)
        rest(SILENCE)
    assert modes == (["smcr", "smcr"] if client_is_ours else ["tcp", "smcr"])


# Devices


@LONG
@pytest.mark.parametrize("client_is_ours", [True, False], ids=["ours", "theirs"])
def test_the_kernels_device_is_removed(kernel, meetings, client_is_ours):
    """Both ends are told at once; the removal waits until the kernel's end closes."""
    client, server, port = introduce(meetings, client_is_ours)
    stream(client, server)
    since = time.monotonic()
    device = "va" if client_is_ours else "vb"
    with subprocess.Popen(["rdma", "link", "del", DEVICES[device]]) as removal:
        for end in (client, server):
            ended(end, since, RETRIES)
        assert_prefix(client, server)
        assert removal.wait(20) == 0
    run(f"rdma link add {DEVICES[device]} type rxe netdev {device}")
    set_up()
    assert_recovers(meetings, client, server, port)


@LONG
def test_our_device_is_removed(kernel, meetings):
    """The kernel's SMC lets go of it at once; we do when we close."""
    client, server, _ = introduce(meetings, client_is_ours=True)
    with subprocess.Popen(["rdma", "link", "del", "rxe1"]) as removal:
        meetings.exchange(client, server)
        print(kernel.sockets(), removal.poll())
        meetings.part(client, server)
        server.clean_up()
        assert client.finish() == 0
        assert removal.wait(10) == 0
    run("rdma link add rxe1 type rxe netdev vb")


# Peers that vanish


@LONG
@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
@pytest.mark.parametrize("client_is_ours", [True, False], ids=["ours", "theirs"])
def test_our_process_is_killed(kernel, meetings, client_is_ours, is_busy):
    """The kernel takes no notice of the end of TCP: TEST LINK ends it."""
    kernel.sysctl("smcr_testlink_time", QUICK_KERNEL)
    client, server, _ = introduce(meetings, client_is_ours)
    ours, theirs = (client, server) if client_is_ours else (server, client)
    if is_busy:
        stream(client, server)
    else:
        theirs.tell("exchange", count=1)
    since = ours.signal(signal.SIGKILL)
    ended(theirs, since, SILENCE + SILENCE)
    theirs.ask("told")
    kernel.wait_until_gone()
    other = meetings.ours("other", **QUICK)
    theirs = meetings.theirs("again")
    client, server = (other, theirs) if client_is_ours else (theirs, other)
    port = server.ask("serve")["port"]
    assert meetings.connect(client, server, port) == "smcr"
    meetings.use(client, server)


@LONG
@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("client_is_ours", [True, False], ids=["ours", "theirs"])
def test_our_loop_ends_before_theirs_has_closed(
    kernel, meetings, client_is_ours, is_closed
):
    """What the kernel says of each connection at its end is acknowledged.

    Else its `close()` would wait for that for ever: nobody could kill the process.
    """
    ours, theirs = meetings.ours("ours"), meetings.theirs("theirs")
    theirs.may_be_lost = True
    client, server = (ours, theirs) if client_is_ours else (theirs, ours)
    port = server.ask("serve")["port"]
    server.tell("take", count=MANY)
    client.ask("open", port=port, count=MANY)
    assert "error" not in server.answer()
    meetings.talk(client, server)
    assert {one.mode for one in kernel.sockets()} == {"smcr"}
    if is_closed:
        ours.ask("close_all")
    since = time.monotonic()
    assert ours.finish() == 0
    print(f"ours has ended after {time.monotonic() - since:.2f} s")
    theirs.ask("close_all", deadline=SLACK)
    kernel.wait_until_gone()
    assert theirs.finish() == 0


@LONG
@pytest.mark.parametrize("client_is_ours", [True, False], ids=["ours", "theirs"])
def test_our_process_stops_for_good(kernel, meetings, client_is_ours):
    """Its device still acknowledges; only TEST LINK tells."""
    kernel.sysctl("smcr_testlink_time", QUICK_KERNEL)
    client, server, port = introduce(meetings, client_is_ours)
    ours, theirs = (client, server) if client_is_ours else (server, client)
    stream(client, server)
    since = ours.signal(signal.SIGSTOP)
    ended(theirs, since, SILENCE)
    ours.signal(signal.SIGCONT)
    ended(ours, time.monotonic(), SILENCE)
    assert_prefix(client, server)
    assert_recovers(meetings, client, server, port)


@LONG
@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
@pytest.mark.parametrize("client_is_ours", [True, False], ids=["ours", "theirs"])
def test_the_network_is_cut_without_a_word(kernel, meetings, client_is_ours, is_busy):
    """Neither TCP nor RoCE: each end notices for itself."""
    kernel.sysctl("smcr_testlink_time", QUICK_KERNEL)
    client, server, port = introduce(meetings, client_is_ours)
    if is_busy:
        stream(client, server)
    else:
        for end in (client, server):
            end.tell("exchange", count=1)
            # Each byte arrives; what comes next does not.
        for end in (client, server):
            assert "error" not in end.answer()
            end.tell("reset")
    with impaired("loss 100%", ANY_IP):
        since = time.monotonic()
        for end in (client, server):
            answer = end.answer(SILENCE + RETRIES + SLACK)
            print(f"{end.name} after {time.monotonic() - since:.2f} s: {answer}")
            assert answer.get("error") or answer.get("failed")
    assert_prefix(client, server)
    assert_recovers(meetings, client, server, port)
