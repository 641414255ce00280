"""Links that are cut and peers that go away, in the middle of a transfer.

In each case both ends get one ConnectionError within the time that
docs/reference/roce-faults.md states, what was delivered is a prefix of what was
written, the kernel's resources come back, and a later connection works.
"""

# ruff: noqa: T201  # the figures of a scenario are in its output

from __future__ import annotations

import select
import signal
import subprocess
import time
from typing import Any

import pytest

from tests.lab.network_faults import (
    TCP,
    bands,
    gid_index,
    impaired,
    link_down,
    resources,
    run,
    silent_neighbour,
    wait_for_resources,
)

pytestmark = pytest.mark.lab(seconds=60)
LONG = pytest.mark.lab_long(seconds=60)
"""Only by make lab-long: a near relative is in every run."""
IN_BANDS = pytest.mark.usefixtures("in_bands")
"""Set up before the ends, and undone when they have ended."""

QUICK = {"test_link_interval": 2.0, "test_link_wait": 2.0, "idle_group_wait": 0.5}
SILENCE = QUICK["test_link_interval"] + QUICK["test_link_wait"]
"""Seconds in which a silent peer is noticed."""
RETRIES = 6.0
"""Seconds in which a device gives up a packet: retry_cnt 6, time-out 15."""
SLACK = 3.0
"""Seconds that an emulated machine may be late."""
AT_ONCE = 0.5
MOMENT_BYTES = 96 * 1024
"""What each direction has carried when it happens."""
UNREACHABLE = 7.0
"""Seconds that a client waits for CONFIRM LINK, and then for a Decline."""
LONGEST_CALLBACK = 0.5
"""Seconds; address resolution in the kernel takes about one."""


def assert_cut(ends, server, client, since: float, within: float) -> None:
    """Both ends were told once, soon, and had received a prefix."""
    (at_server,) = server.ask("records")["records"]
    (at_client,) = client.ask("records")["records"]
    for record in (at_server, at_client):
        assert record["wrong"] is None
        assert record["lost_count"] == 1
        assert record["is_connection_error"], record
        assert not record["eof"]
        seconds = record["ended_at"] - since
        print(f"after {seconds:.2f} s: {record['error']}: {record['text']}")
        assert seconds < within + SLACK, record
    for end in (server, client):
        show_longest(end)
    assert at_server["received"] <= at_client["sent"]
    assert at_client["received"] <= at_server["sent"]


def show_longest(end) -> dict[str, Any]:
    """Show which callback of an end took longest; gives what it took."""
    facts = end.ask("facts")
    for what in ("by_wall", "by_cpu"):
        took = facts[what]
        times = f"{took['wall'] * 1000:.1f} ms, {took['cpu'] * 1000:.1f} ms of CPU"
        print(f"{end.name}: longest callback {what}: {times} ({took['name']})")
    longest: dict[str, Any] = facts["by_wall"]
    return longest


def assert_as_before(ends, server, client, before) -> None:
    """The ends go on with a new connection; then nothing is left of either."""
    ends.connect(server, client, total=64 * 1024)
    for end in (server, client):
        (record,) = end.ask("records")["records"]
        assert (record["error"], record["wrong"]) == (None, None)
        assert (record["received"], record["eof"]) == (64 * 1024, True)
        assert end.finish() == 0
    wait_for_resources(before)


def assert_they_go_on(*those) -> None:
    """Ends that stream without end receive more, and have not ended."""
    for end in those:
        wanted = end.ask("reach", received=0)["received"][0] + MOMENT_BYTES
        assert end.ask("reach", received=wanted)["received"][0] >= wanted, end.name


@pytest.fixture
def before():
    return resources()


@pytest.fixture
def in_bands():
    """Devices whose queues nobody has to exchange while something streams."""
    with bands():
        yield


@pytest.fixture
def streaming(ends):
    """Two ends that stream both ways without end, and are in the middle of it."""

    def make(**changes):
        server, client = ends.pair(**QUICK | changes)
        for end in (server, client):
            end.ask("reach", received=MOMENT_BYTES)
            end.ask("forget_callbacks")
        return server, client

    return make


@pytest.mark.parametrize("device", ["va", pytest.param("vb", marks=LONG)])
def test_a_network_device_goes_down(ends, streaming, before, device):
    server, client = streaming()
    with link_down(device):
        since = time.monotonic()
        assert_cut(ends, server, client, since, within=AT_ONCE)
    assert_as_before(ends, server, client, before)


def test_another_address_of_a_port_comes_and_goes(ends, streaming, before):
    """The device tells of it, and nothing changes for what has another GID."""
    server, client = streaming()
    run("ip addr add 10.0.0.77/24 dev vb")
    run("ip addr del 10.0.0.77/24 dev vb")
    assert_they_go_on(server, client)
    server.ask("close")
    for end in (server, client):
        (record,) = end.ask("records")["records"]
        assert record["wrong"] is None
    assert_as_before(ends, server, client, before)


@IN_BANDS
def test_roce_is_dropped_and_tcp_lives(ends, streaming, before):
    server, client = streaming()
    with impaired("loss 100%"):
        since = time.monotonic()
        assert_cut(ends, server, client, since, within=max(SILENCE, RETRIES))
    assert_as_before(ends, server, client, before)


@IN_BANDS
def test_roce_is_dropped_beneath_an_idle_connection(ends, before):
    server, client = ends.pair(total=0, **QUICK)
    for end in (server, client):
        end.ask("forget_callbacks")
    with impaired("loss 100%"):
        since = time.monotonic()
        assert_cut(ends, server, client, since, within=SILENCE + RETRIES)
    assert_as_before(ends, server, client, before)


@LONG
@IN_BANDS
def test_our_own_queue_is_full(ends, streaming, before):
    """Soft-RoCE of Linux 6.12 takes what its network device refuses for an error."""
    server, client = streaming()
    with impaired("delay 1s", devices=("vb",), room=1):
        since = time.monotonic()
        (ours,) = client.ask("records")["records"]
        (theirs,) = server.ask("records")["records"]
    assert "IBV_WC_WR_FLUSH_ERR" in ours["text"]
    for record in (ours, theirs):
        print(f"after {record['ended_at'] - since:.2f} s: {record['text']}")
        assert (record["wrong"], record["is_connection_error"]) == (None, True)
        assert record["ended_at"] - since < AT_ONCE + SLACK
    # The server's end of the link waits for acknowledgements that will not come.
    seconds = server.ask("groups_end")["at"] - since
    print(f"the link was gone after {seconds:.2f} s")
    assert seconds < RETRIES + SLACK
    assert_as_before(ends, server, client, before)


@LONG
@IN_BANDS
def test_tcp_is_dropped_and_roce_lives(ends, streaming, before):
    server, client = streaming()
    with impaired("loss 100%", TCP):
        assert_they_go_on(server, client)
    assert_they_go_on(server, client)
    server.ask("close")
    for end in (server, client):
        (record,) = end.ask("records")["records"]
        assert record["wrong"] is None
    assert_as_before(ends, server, client, before)


@pytest.mark.parametrize("victim", ["server", pytest.param("client", marks=LONG)])
def test_a_peer_is_killed(ends, streaming, before, victim):
    server, client = streaming()
    dead, survivor = (server, client) if victim == "server" else (client, server)
    since = dead.signal(signal.SIGKILL)
    assert dead.wait() == -signal.SIGKILL
    (record,) = survivor.ask("records")["records"]
    assert record["wrong"] is None
    assert record["lost_count"] == 1
    assert record["is_connection_error"], record
    print(f"after {record['ended_at'] - since:.2f} s: {record['text']}")
    # Its kernel resets or ends the TCP connection; a FIN alone is given a second.
    assert record["ended_at"] - since < 1.0 + SLACK
    other = ends.start("other", **QUICK)
    if victim == "server":
        assert_as_before(ends, other, survivor, before)
    else:
        assert_as_before(ends, survivor, other, before)


@LONG
def test_a_peer_stops_for_a_moment(ends, streaming):
    server, client = streaming(test_link_interval=30.0)
    client.signal(signal.SIGSTOP)
    rest(server)
    client.signal(signal.SIGCONT)
    assert_they_go_on(server, client)
    server.ask("close")
    for end in (server, client):
        (record,) = end.ask("records")["records"]
        assert record["wrong"] is None


def rest(end) -> None:
    """Wait until nothing arrives at an end any more."""
    seen = None
    while (now := end.ask("reach", received=0)["received"]) != seen:
        seen = now
        select.select([], [], [], 0.5)


def test_a_peer_stops_for_good(ends, streaming, before):
    server, client = streaming()
    since = client.signal(signal.SIGSTOP)
    (record,) = server.ask("records")["records"]
    print(f"after {record['ended_at'] - since:.2f} s: {record['text']}")
    assert record["is_connection_error"]
    assert record["ended_at"] - since < SILENCE + SLACK
    client.signal(signal.SIGCONT)
    (late,) = client.ask("records")["records"]
    assert (late["wrong"], late["is_connection_error"]) == (None, True), late
    assert_as_before(ends, server, client, before)


@LONG
def test_the_device_is_removed_in_use(ends, streaming, before):
    """Soft-RoCE of Linux 6.12 waits with that until the last user has closed it."""
    server, client = streaming()
    with subprocess.Popen(["rdma", "link", "del", "rxe0"]) as removal:
        assert_they_go_on(server, client)
        assert removal.poll() is None
        server.ask("close")
        for end in (server, client):
            (record,) = end.ask("records")["records"]
            assert record["wrong"] is None
            assert end.finish() == 0
        assert removal.wait(10) == 0
    run("rdma link add rxe0 type rxe netdev va")
    wait_for_resources(before)


def nobody_answers(ends):
    """Meet a peer whose GID nobody answers for; gives ends that could go on."""
    with silent_neighbour("10.0.0.77"):
        index = gid_index("10.0.0.77", "rxe1")
        # Devices are open then, and everything is loaded, which takes longer.
        server, client = ends.pair(total=0, **QUICK)
        odd = ends.start("odd", rdma_device=f"rxe1:1:{index}", **QUICK)
        port = server.ask("serve", total=0)["port"]
        server.ask("forget_callbacks")
        since = time.monotonic()
        answer = odd.attempt("connect", port=port, total=0)
        seconds = time.monotonic() - since
        print(f"after {seconds:.2f} s: {answer}")
        neighbour = run("ip neigh show 10.0.0.77")
        print(neighbour, run("ip route get 10.0.0.77 from 10.0.0.1 oif va"))
        assert "lladdr" not in neighbour
        assert show_longest(server)["wall"] < LONGEST_CALLBACK
        (info,) = answer["infos"]
        assert info["mode"] == "tcp"
        assert info["reason"]["name"] in {"LINK_FAILED", "ROUTE"}
        assert seconds < UNREACHABLE + SLACK
        odd.ask("close")
        odd.ask("records")
        assert odd.finish() == 0
    client.ask("close")
    server.ask("records")
    client.ask("records")
    odd.may_complain = server.may_complain = True
    return server, client


def test_nobody_answers_at_the_gid(ends):
    """Address resolution runs before a queue pair goes to RTR, and beside the loop."""
    for end in nobody_answers(ends):
        assert end.finish() == 0


@LONG
def test_a_connection_after_an_unreachable_gid(ends, before):
    server, client = nobody_answers(ends)
    assert_as_before(ends, server, client, before)
