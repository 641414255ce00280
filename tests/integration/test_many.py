"""Many connections, at once and one after another, and what they leave behind."""

from __future__ import annotations

import os
from collections import Counter

import pytest

pytestmark = pytest.mark.load

IDLE_SOON = {"PYSMC_IDLE_GROUP_WAIT": "0.3"}
"""Link groups without connections end soon, so that the test need not wait."""
PATIENT = IDLE_SOON | {
    "PYSMC_DISCOVERY_WAIT": "15",
    "PYSMC_ACCEPT_WAIT": "30",
    "PYSMC_CONFIRM_WAIT": "30",
    "PYSMC_HANDSHAKE_WAIT": "60",
    "PYSMC_CONFIRM_LINK_SERVER_WAIT": "10",
    "PYSMC_CONFIRM_LINK_CLIENT_WAIT": "20",
}
"""A thousand handshakes at once are seconds of work for each process. On a machine that
has other work they may be more than the protocol's waits, which are not the subject."""
MEBIBYTE = 1 << 20


def modes(infos):
    return Counter(
        info["reason"]["text"] if info["reason"] else info["mode"] for info in infos
    )


def files_in_memory():
    """Names below /dev/shm; another program of this machine may have some too."""
    return {name for name in os.listdir("/dev/shm") if "smc" in name}


class Balance:
    """What both processes held at one moment, to be compared later."""

    def __init__(self, processes, kept):
        self._processes = processes
        self._kept = kept
        self._files = files_in_memory()
        self._held = [kept(process.pid) for process in processes]
        self._facts = [process.ask("facts") for process in processes]

    def check(self, wait_until, *, rss, traced=0):
        """Wait until everything is back: memory up to so many bytes."""
        for process, held, facts in zip(
            self._processes, self._held, self._facts, strict=True
        ):
            wait_until(lambda: self._now(process.pid, held), held)  # noqa: B023
            now = process.ask("facts")
            assert now["tasks"] == facts["tasks"]
            assert now["rss"] - facts["rss"] < rss
            assert now["traced"] - facts["traced"] <= traced
        assert files_in_memory() == self._files

    def _now(self, pid, held):
        """List what it holds; a thread that was there may have done its work."""
        now = self._kept(pid)
        if set(now["threads"]) <= set(held["threads"]):
            now["threads"] = held["threads"]
        return now


def open_use_close(server, client, port, count):
    infos = client.ask("connect", port=port, count=count)["infos"]
    assert modes(infos) == {"smcr": count}
    assert client.ask("talk", size=5000) == {"equal": count}
    assert client.ask("close") == {"closed": count}
    accepted = server.ask("accepted", count=count, ended=True)["connections"]
    assert modes(one["info"] for one in accepted) == {"smcr": count}
    assert {one["received"] for one in accepted} == {5000}
    assert {one["error"] for one in accepted} == {None}


def quiet(kept, process):
    """Tell whether every link group of a process has ended."""
    return not kept(process.pid)["memory"]


@pytest.mark.slow
def test_a_thousand_connections_at_once_leave_nothing(pair, kept, wait_until):
    server, client, port = pair(PATIENT, PATIENT, is_measured=False)
    # Warm: allocators and caches have their size after a run like the real one.
    open_use_close(server, client, port, 300)
    wait_until(lambda: quiet(kept, server) and quiet(kept, client), True)
    balance = Balance((server, client), kept)
    open_use_close(server, client, port, 1000)
    # One receive buffer a connection would be 250 MiB.
    balance.check(wait_until, rss=32 * MEBIBYTE)


def cycles(pair, kept, wait_until, count, *arguments):
    """Connect, echo and close so many times; descriptors, tasks and memory are back."""
    server, client, port = pair(
        IDLE_SOON, IDLE_SOON, arguments, arguments, is_measured=False
    )

    def run(number):
        done = client.ask("cycles", port=port, count=number, at_once=10)
        assert done == {"modes": {"smcr": number}, "wrong": 0}
        accepted = server.ask("accepted", count=number, ended=True)["connections"]
        assert modes(one["info"] for one in accepted) == {"smcr": number}

    run(300)
    wait_until(lambda: quiet(kept, server) and quiet(kept, client), True)
    balance = Balance((server, client), kept)
    for _ in range(count // 500):
        run(500)
    # A leak of one small object a connection would be more than this.
    balance.check(wait_until, rss=8 * MEBIBYTE, traced=48 * count)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ten_thousand_times_connect_echo_close_leave_nothing(pair, kept, wait_until):
    cycles(pair, kept, wait_until, 10_000)


@pytest.mark.slow
def test_what_was_allocated_is_free_after_many_cycles(pair, kept, wait_until):
    cycles(pair, kept, wait_until, 1000, "--tracemalloc")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_what_was_allocated_is_free_after_ten_thousand(pair, kept, wait_until):
    cycles(pair, kept, wait_until, 10_000, "--tracemalloc")
