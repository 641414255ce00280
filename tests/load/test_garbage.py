"""Garbage at a listener, beside a stream over SMC-R.

Attackers and victim share the machine, so the stream beside the garbage is compared
with the same stream while as much garbage is thrown at a plain asyncio server in a
process of its own: what remains is what garbage costs us. Both figures are told, and
the rate without any. A connection that finds the kernel's queue of the listener full is
counted as refused; the attackers go on all the same.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Process

pytestmark = [pytest.mark.soak, pytest.mark.load, pytest.mark.slow]

MIB = 1 << 20
PROCESSES = 2
WANTED = 10_000
"""Connections a second that the attackers try to make, in all."""
REACHING_MIN = 200
"""Connections a second that are not refused, on the slowest machine."""
SHARE_MIN = 0.8
"""Of its rate beside garbage for others, that the stream keeps."""
SHARE_MIN_BRIEFLY = 0.5
"""The same in rounds of a second, which other work of the machine may fall into."""
GROWTH_MAX = 32 * MIB
LEFT_MAX = MIB
ROUNDS = 8
MARKED = 20
"""Percent of the connections that claim to speak SMC."""


class Scene:
    """A victim with a stream, a plain server beside it, and those who throw."""

    def __init__(self, crowd: Any) -> None:
        self.crowd = crowd
        self.victim: Process = crowd.start("victim")
        self.plain: Process = crowd.start("victim", "--plain")
        self.ports = {
            "smc": self.victim.ask("serve")["port"],
            "plain": self.plain.ask("serve")["port"],
        }
        self.good: Process = crowd.start("prober")
        self.throwers = [crowd.start("garbage") for _ in range(PROCESSES)]

    def throw(self, target: str, seconds: float) -> dict[str, float]:
        """Throw garbage at a server, and measure the stream meanwhile."""
        for thrower in self.throwers:
            thrower.tell(
                do="throw",
                port=self.ports[target],
                seconds=seconds,
                rate=WANTED / PROCESSES,
                marked=MARKED,
            )
        rate = self.good.ask("rate", seconds=seconds * 0.9)["rate"]
        thrown = [thrower.json() for thrower in self.throwers]
        return {
            "stream": rate,
            "thrown": sum(each["thrown"] for each in thrown),
            "garbage": sum(each["rate"] for each in thrown),
            "refused": sum(each["refused"] for each in thrown),
        }


def test_a_stream_beside_garbage(crowd, long_run) -> None:
    with long_run("garbage", small=4, full=30) as run:
        scene = Scene(crowd)
        assert scene.good.ask("begin", port=scene.ports["smc"])["mode"] == "smcr"
        scene.throw("smc", 3)  # whatever is made once is made, and a burst is over
        before = crowd.when(scene.victim, is_quiet)
        alone = scene.good.ask("rate", seconds=1)["rate"]
        rounds = []
        part = run.count / ROUNDS
        for number in range(ROUNDS):
            # In turn, and each first as often as second: the machine has other work.
            targets = ("plain", "smc") if number % 2 else ("smc", "plain")
            measured = {target: scene.throw(target, part) for target in targets}
            rounds.append(measured)
            thrown, refused = (measured["smc"][name] for name in ("thrown", "refused"))
            run.add(attempts=thrown, connections=thrown - refused)
        peak = scene.victim.ask("facts")
        after = crowd.settled(scene.victim, before)
        moved = {at: mean(rounds, at, "stream") for at in ("plain", "smc")}
        share = moved["smc"] / moved["plain"]
        grown = {
            "at_the_end": peak["memory"]["VmRSS"] - before["memory"]["VmRSS"],
            "afterwards": after["memory"]["VmRSS"] - before["memory"]["VmRSS"],
        }
        run.tell(
            share=round(share, 2),
            mib_alone=alone,
            mib_beside_garbage_for_others=moved["plain"],
            mib_beside_garbage=moved["smc"],
            attempts_a_second=mean(rounds, "smc", "garbage"),
            refused_a_second=round(mean(rounds, "smc", "refused") / part),
            **{f"bytes_grown_{when}": size for when, size in grown.items()},
        )
        # Garbage that never gets there shows nothing.
        assert run.counts["connections"] >= REACHING_MIN * run.count
        if share < (SHARE_MIN if run.is_full else SHARE_MIN_BRIEFLY):
            run.fail(f"the stream kept {share:.0%} of its rate: {rounds}")
        if grown["at_the_end"] > GROWTH_MAX or grown["afterwards"] > LEFT_MAX:
            run.fail(f"resident memory grew by {grown}")
        assert scene.good.ask("end")["moved"] > 0


def mean(rounds: list[dict[str, Any]], where: str, what: str) -> float:
    """Give the mean of a figure."""
    return round(float(statistics.mean(each[where][what] for each in rounds)), 1)


def is_quiet(facts: dict[str, Any]) -> bool:
    """Whether only the stream is left."""
    held = facts["held"]
    return bool(held["handshakes"] == 0 and held["tasks"] == 2)
