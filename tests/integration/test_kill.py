"""kill -9 of either process at random moments.

Each run has its own seed, which is in the message of a failure.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

pytestmark = pytest.mark.load

RUNS = 250
"""Of each role; 500 in all."""
MOMENTS = ((0, 0.02), (0.02, 0.1))
"""Seconds from the fork in which a victim dies: first it connects, then it streams."""
MOST_SECONDS = 2.0
QUIET_SOON = {"PYSMC_IDLE_GROUP_WAIT": "0.3"}


def assert_ended_well(record, killed_at, seed):
    """A prefix was delivered, and then a ConnectionError came, soon."""
    assert record["wrong_at"] is None, seed
    seconds = record["ended_at"] - killed_at
    assert seconds < MOST_SECONDS, (seed, record)
    if record["info"]["mode"] == "smcr":
        assert record["is_connection_error"], (seed, record)


def baseline(survivor, kept, wait_until):
    wait_until(lambda: kept(survivor.pid)["memory"], [])
    return kept(survivor.pid), survivor.ask("facts")


def assert_nothing_left(survivor, kept, wait_until, before):
    held, facts = before
    wait_until(lambda: kept(survivor.pid), held)
    now = survivor.ask("facts")
    assert now["tasks"] == facts["tasks"]
    assert now["rss"] - facts["rss"] < 32 << 20


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_client_is_killed(programs, kept, wait_until):
    # Being watched would make it too slow for how soon its peers are killed.
    survivor = programs.agent(env=QUIET_SOON, is_measured=False)
    port = survivor.ask("serve", kind="both_ways")["port"]
    victims = programs.script("victims", is_measured=False)
    assert victims.json() == {"ready": True}
    modes: Counter[str] = Counter()
    delivered, before = 0, None
    for seed in range(RUNS):
        after = random.Random(seed).uniform(*MOMENTS[seed % 2])
        victims.tell(role="client", port=port, after=after)
        killed = victims.json()
        assert not killed["early"], (seed, victims.complaint())
        for record in survivor.ask("streams")["records"]:
            assert_ended_well(record, killed["killed_at"], seed)
            modes[record["info"]["mode"]] += 1
            delivered += record["received"] > 0
        if seed == 10:
            before = baseline(survivor, kept, wait_until)
    # Most died on SMC-R, many of them in mid-stream, some before there was a stream.
    assert modes["smcr"] > RUNS // 3
    assert delivered > RUNS // 4
    assert_nothing_left(survivor, kept, wait_until, before)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_server_is_killed(programs, kept, wait_until):
    survivor = programs.agent(env=QUIET_SOON)
    victims = programs.script("victims", is_measured=False)
    assert victims.json() == {"ready": True}
    endings: Counter[str] = Counter()
    delivered, before = 0, None
    for seed in range(RUNS):
        after = random.Random(seed).uniform(*MOMENTS[seed % 2])
        victims.tell(role="server", after=after)
        survivor.tell(do="both_ways", port=victims.json()["port"])
        killed, record = victims.json(), survivor.json()
        assert not killed["early"], (seed, victims.complaint())
        if "error" in record and "wrong_at" not in record:
            # It died before there was a connection.
            assert record["is_connection_error"], (seed, record)
            endings[record["error"]] += 1
            continue
        assert_ended_well(record, killed["killed_at"], seed)
        endings[record["info"]["mode"]] += 1
        delivered += record["received"] > 0
        if before is None and seed >= 10:
            before = baseline(survivor, kept, wait_until)
    assert endings["smcr"] > RUNS // 3, endings
    assert delivered > RUNS // 4
    assert_nothing_left(survivor, kept, wait_until, before)
