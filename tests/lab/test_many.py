"""Many connections over RoCE: at once, one after the other, and idle."""

from __future__ import annotations

import pytest

from tests.lab.measuring import Measuring, show
from tests.lab.network_faults import resources, wait_for_resources

KIB = 1 << 10
SMALL = {"rmbe_bytes": 16 * KIB, "sndbuf_bytes": 16 * KIB}
DEADLINE = 1500.0
"""Seconds for an order; a scenario has a limit of its own."""
AT_ONCE = 4
"""Connections at a time where thousands are made one after the other."""
GROWTH_MAX = 64 * KIB
"""Bytes that a process may hold more than after its warm-up, whatever the number of
connections since. A word kept for each of 5,000 would be 40,000."""
BLOCKS_MAX = GROWTH_MAX // 64
"""The same as a number of Python's own blocks, most of which are as small as that."""
RSS_MAX = 2048 * KIB
"""Resident memory comes by arenas of up to a megabyte: a second witness."""


def ready(ends, **changes):
    """Start a server and a client; gives both, and the port."""
    ends.kind = Measuring
    server = ends.start("server", **SMALL, **changes)
    client = ends.start("client", **SMALL, **changes)
    return server, client, server.ask("serve_echo")["port"]


def finish(*processes) -> None:
    for process in processes:
        assert process.finish() == 0


@pytest.mark.lab_long(seconds=90)
@pytest.mark.timeout(150)
def test_300_connections_in_two_link_groups(ends) -> None:
    """A group has at most 255; every byte of every connection is right."""
    before = resources()
    server, client, port = ready(ends, max_connections=255)
    kind = f"smcr 2.1 {ends.place.fabric}"
    held = client.ask("hold", port=port, count=300, at_once=8, deadline=DEADLINE)
    show(f"300 connections were made within {held['seconds']:.1f} s")
    for told in (held, server.ask("accepted", count=300)):
        assert told["kinds"] == {kind: 300}
        assert sorted(told["groups"].values()) == [45, 255]
    # All of them at the same time, each with another size.
    assert client.ask("talk", size=5000, deadline=DEADLINE) == {"count": 300}
    client.ask("let_go", deadline=DEADLINE)
    for end in (server, client):
        end.ask("settle")
    finish(client, server)
    wait_for_resources(before)


def cycles(server, client, port: int, count: int, at_once: int = AT_ONCE) -> float:
    """Connect, echo and close, so many times; gives the seconds."""
    order = {"port": port, "count": count, "at_once": at_once, "deadline": DEADLINE}
    done = client.ask("cycles", **order)
    told = server.ask("accepted", count=count)
    assert len(done["kinds"]) == 1, done
    assert done["kinds"] == told["kinds"]
    assert next(iter(done["kinds"])).startswith("smcr 2.1")
    for end in (server, client):
        end.ask("settle")
    return float(done["seconds"])


def churn(ends, count: int, *, is_traced: bool) -> None:
    """Go through many connections; what is held afterwards is what was held before."""
    before = resources()
    server, client, port = ready(ends)
    both = (server, client)
    if is_traced:
        for end in both:
            end.ask("trace")
    # One link group, and in its pools as many RMBs as are ever wanted at once: a client
    # may be at its next connection before its server has put away the last one's.
    cycles(server, client, port, 1)
    cycles(server, client, port, max(count // 10, 40), at_once=2 * AT_ONCE)
    kernel, facts = resources(), [end.ask("held") for end in both]
    points = []
    for _ in range(4):
        seconds = cycles(server, client, port, count // 4)
        show(f"{count // 4} connections: {seconds / count * 4 * 1000:.1f} ms each")
        points.append([end.ask("held") for end in both])
    wait_for_resources(kernel)
    measures = {"rss": RSS_MAX, "blocks": BLOCKS_MAX, "heap": GROWTH_MAX}
    if is_traced:
        measures = {"rss": RSS_MAX, "traced": GROWTH_MAX}
    for number, was in enumerate(facts):
        rows = [point[number] for point in points]
        assert all(row["counts"] == was["counts"] for row in rows), (was, rows)
        for name, most in measures.items():
            growth = [row[name] - was[name] for row in rows]
            show(f"{both[number].name}: {name} grew by {growth}")
            assert growth[-1] <= most, (name, growth)
    finish(client, server)
    wait_for_resources(before)


@pytest.mark.lab(seconds=120)
@pytest.mark.timeout(180)
def test_500_connections_leave_nothing(ends) -> None:
    churn(ends, 500, is_traced=False)


@pytest.mark.lab_long(seconds=3000)
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("is_traced", [False, True], ids=["plain", "traced"])
def test_5000_connections_leave_nothing(ends, is_traced: bool) -> None:
    churn(ends, 5000, is_traced=is_traced)


IDLE_SECONDS = 6.0
TEST_LINK_SECONDS = 1.5
WAKES_OF_A_TEST = 6
"""The timer, the request's completion, the answer, the timer for it; the peer's
request, and the completion of our answer."""


@pytest.mark.lab(seconds=60)
@pytest.mark.timeout(90)
def test_100_idle_connections_cost_nothing(ends) -> None:
    """One link is tested for all of them, and nothing else wakes either end."""
    before = resources()
    server, client, port = ready(ends, test_link_interval=TEST_LINK_SECONDS)
    both = (server, client)
    client.ask("hold", port=port, count=100, at_once=8, deadline=DEADLINE)
    for end in both:
        end.tell("idle", seconds=IDLE_SECONDS)
    most = WAKES_OF_A_TEST * (IDLE_SECONDS // TEST_LINK_SECONDS + 1) + 2
    for end in both:
        told = end.answer()
        rate = told["wakes"] / IDLE_SECONDS
        share = told["cpu"] / IDLE_SECONDS
        show(f"{end.name}: {rate:.1f} wake-ups a second, {share:.2%} of a processor")
        assert told["wakes"] <= most, told
        assert share < 0.05, told
    assert client.ask("talk", size=1000) == {"count": 100}
    client.ask("let_go")
    finish(client, server)
    wait_for_resources(before)
