"""CPython's own asyncio tests on our loops, on every Python that is here.

`suites.py` runs them; `expected.toml` says how many there are, and which of them have a
transport at both ends. Those run again over SMC-R, and with every handshake declined.
"""

from __future__ import annotations

from typing import Any

import pytest

# All wait for whole runs of other programs.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FABRICS = ("shm", "sim")


def passed(outcomes: dict[str, Any]) -> int:
    """Count tests; each has to have passed."""
    bad = [
        f"{name} {one['result']}\n{one['detail']}"
        for name, one in outcomes.items()
        if one["result"] not in {"passed", "missing"}
    ]
    assert not bad, "\n\n".join(bad)
    return sum(one["result"] == "passed" for one in outcomes.values())


def of_suite(outcomes: dict[str, Any], suite: str) -> dict[str, Any]:
    return {
        name: one
        for name, one in outcomes.items()
        if f"{name}.".startswith(f"{suite}.")
    }


@pytest.mark.lane("plain")
def test_all_pass_on_plain_tcp(lane, suite, look_up, expect) -> None:
    world = look_up(lane, "plain")
    outcomes = of_suite(world.outcomes, suite)
    expect(suite, world.version, passed(outcomes))
    carriers = {
        carrier
        for one in outcomes.values()
        for carrier in [*one["alone"], *(end for pair in one["pairs"] for end in pair)]
    }
    assert carriers <= {"tcp"}


@pytest.mark.lane("strict")
def test_all_pass_as_users_have_it_and_nothing_warns(
    lane, suite, look_up, expect
) -> None:
    world = look_up(lane, "local")
    expect(suite, world.version, passed(of_suite(world.outcomes, suite)))


@pytest.mark.lane("strict")
def test_whatever_can_move_does(
    lane, look_up, expected, both_ends, is_measured
) -> None:
    """A new test of CPython with a transport at both ends has to be listed."""
    version, outcomes = look_up(lane, "local")
    found = {
        name: {carrier for pair in one["pairs"] for carrier in pair}
        for name, one in outcomes.items()
        if one["pairs"]
    }
    listed = set(both_ends(lane.python)) & set(outcomes)
    assert set(found) >= listed - set(expected["paths"])
    if is_measured(version):
        assert set(found) == listed - set(expected["paths"])
    for name, carriers in found.items():
        # Without help a blocking connect goes past the loop.
        assert carriers == {"tcp" if name in expected["blocking"] else "shm"}


def only(world, test, is_measured) -> Any:
    """Find the outcome of a test, which must have passed."""
    outcome = world.outcomes[test]
    if outcome["result"] == "missing" and not is_measured(world.version):
        pytest.skip(f"Python {world.version} has no {test}; a later release may")
    assert outcome["result"] == "passed", f"{outcome['result']}\n{outcome['detail']}"
    return outcome


@pytest.mark.parametrize("fabric", FABRICS)
@pytest.mark.lane("both")
def test_both_ends_are_on_smcr(lane, test, fabric, look_up, is_measured) -> None:
    outcome = only(look_up(lane, fabric), test, is_measured)
    assert outcome["pairs"], "no connection had a transport at both ends"
    assert all(pair == [fabric, fabric] for pair in outcome["pairs"])
    assert outcome["alone"] == []


@pytest.mark.parametrize("world", [*FABRICS, "declined"])
@pytest.mark.lane("strict")
def test_both_ends_may_be_strict(lane, world, look_up) -> None:
    outcomes = look_up(lane, world).outcomes
    assert passed(outcomes) >= 25
    for one in outcomes.values():
        carriers = {carrier for pair in one["pairs"] for carrier in pair}
        assert carriers <= {"tcp" if world == "declined" else world}


@pytest.mark.lane("both", "declined")
def test_after_a_decline_it_is_the_stock_transport(
    lane, test, look_up, is_measured
) -> None:
    outcome = only(look_up(lane, "declined"), test, is_measured)
    assert outcome["pairs"]
    assert all(pair == ["tcp", "tcp"] for pair in outcome["pairs"])
    reasons = outcome["reasons"]
    assert set(reasons) == {"LINK_FAILED", "PEER_DECLINED"}
    assert len(reasons) == 2 * len(outcome["pairs"]), "each end knows why"


@pytest.mark.parametrize(
    ("python", "least"), [("3.11", 26), ("3.12", 26), ("3.13", 31)]
)
def test_how_many_have_both_ends(python, least, both_ends) -> None:
    assert len(both_ends(python)) == least


def test_every_row_is_about_a_test_that_is_run(expected) -> None:
    listed = set(expected["both_ends"])
    assert set(expected["paths"]) <= listed
    assert set(expected["blocking"]) <= listed
    for row in expected["excluded"]:
        assert any(f"{test}.".startswith(f"{row['test']}.") for test in listed)
        assert row["world"] == "declined"
        assert row["reason"].endswith(".")
    for name, reason in expected["left_out"].items():
        assert name not in expected["tests"]
        assert reason.endswith(".")


def test_a_lost_test_is_noticed(expect) -> None:
    suite = "test_streams.StreamTests"
    expect(suite, "3.11.7", 67)
    expect(suite, "3.11.99", 61)
    for version, count in [("3.11.7", 66), ("3.11.99", 59), ("3.20.0", 60)]:
        with pytest.raises(AssertionError):
            expect(suite, version, count)
