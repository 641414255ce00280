"""A peer that floods its link with messages that bring nothing, over shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Process

pytestmark = [pytest.mark.soak, pytest.mark.load, pytest.mark.slow]

MIB = 1 << 20
P99_MAX = 50.0
"""Milliseconds in which 99 of 100 bytes are back."""
NOISE = 5.0
"""So many times the same without a flood, on a machine that is busy."""
ATTEMPTS = 3
"""The first that keeps the bound counts: other work of the machine only ever adds to
the times, and a fault of ours would add to all."""
LLC_A_SECOND = 1000


def dropped_requests(facts: dict[str, Any]) -> int:
    """Tell how many LLC requests were dropped since the beginning."""
    return int(facts["excess"].get("max_llc_requests_per_second", 0))


@pytest.mark.parametrize("kind", ["llc", "cdc"])
def test_a_flood_leaves_others_their_share(crowd, long_run, kind: str) -> None:
    """The work of a turn is bounded: what a peer sends more often waits, or is lost."""
    with long_run(f"flood-{kind}", small=2, full=30) as run:
        victim: Process = crowd.start("victim")
        port = victim.ask("serve")["port"]
        good: Process = crowd.start("prober")
        flooder: Process = crowd.start("flooder")
        assert flooder.ask("begin", port=port) == {"mode": "smcr"}
        for _ in range(ATTEMPTS):
            quiet = good.ask("pings", port=port, count=500)
            flooder.ask("flood", kind=kind, seconds=1)
            before = victim.ask("facts")
            flooder.tell(do="flood", kind=kind, seconds=run.count)
            crowded = good.ask("pings", port=port, count=500)
            flood = flooder.json(run.count + 30)
            facts = victim.ask("facts")
            if crowded["p99"] < max(P99_MAX, NOISE * quiet["p99"]):
                break
        dropped = dropped_requests(facts) - dropped_requests(before)
        grown = facts["memory"]["VmRSS"] - before["memory"]["VmRSS"]
        run.add(messages=flood["sent"], dropped=dropped)
        run.tell(p99_ms=crowded["p99"], p99_ms_without=quiet["p99"], grown=grown)
        assert quiet["modes"] == crowded["modes"] == {"smcr": 500}
        assert flood["sent"] > 1000
        if crowded["p99"] >= max(P99_MAX, NOISE * quiet["p99"]):
            run.fail(f"p99 of a byte and back: {crowded['p99']} ms")
        if grown > MIB:
            run.fail(f"resident memory grew by {grown}")
        # Beside what is answered in the first moment, so many a second.
        answered_at_most = LLC_A_SECOND * (run.count + 2)
        if kind == "llc":
            assert dropped >= flood["sent"] - answered_at_most
        # The link of the flood is still good, and ends as any other.
        flooder.ask("end")
        assert good.ask("pings", port=port, count=10)["modes"] == {"smcr": 10}
