"""The fabric contract as checks: whoever builds a fabric runs them against it.

Decides whether a pair of devices keeps the rules of `pysmc.fabric.base`. Knows no
fabric and no test framework: a check gets a function that makes a pair of devices,
returns None, and raises `ConformanceFailure` with a sentence when a rule is broken.

::

    from pysmc.testing import check_device

    def test_my_fabric():
        check_device(make_pair)

``make_pair()`` is a context manager that gives ``(device_a, device_b, pump)`` with two
open devices that can reach each other; ``pump()`` lets things move where somebody has
to (it steps a simulated network; a real fabric needs nothing). At its end it closes
both.

Source: pysmc.fabric.base; RFC 7609 sections 2.1 and 4 for what the core relies on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pysmc.disposal import wait_closed
from pysmc.testing import conformance_links as links
from pysmc.testing import conformance_memory as memory
from pysmc.testing.conformance_bench import (
    KIB,
    Bench,
    ConformanceFailure,
    MakePair,
    Writer,
    expect,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CHECKS", "REMOTE_CHECKS", "ConformanceFailure", "MakePair", "check_device"]

_ON_A_BENCH: list[Callable[[Bench], None]] = [
    links.check_identity,
    links.check_connect,
    links.check_loopback,
    links.check_connect_to_nobody,
    links.check_connect_to_a_wrong_number,
    links.check_sends,
    links.check_arm,
    links.check_no_lost_wakeup,
    links.check_own_news_wakes,
    links.check_down,
    links.check_posts_after_down,
    links.check_closing,
    links.check_fork,
    memory.check_write,
    memory.check_data_is_taken,
    memory.check_write_out_of_bounds,
    memory.check_unknown_rkey,
    memory.check_order,
    memory.check_newest_update,
    memory.check_newest_consumer,
    memory.check_coalescing,
    memory.check_send_and_update_order,
    memory.check_publish_completes,
    memory.check_region_reuse,
    memory.check_clear_forgets_updates,
    memory.check_rkeys_per_link,
    memory.check_isolation,
    memory.check_many_regions,
]


def check_descriptor_balance(make_pair: MakePair) -> None:
    """What was opened is closed again, whatever was left open."""
    counts = []
    for _ in range(4):
        with make_pair() as (device_a, device_b, pump):
            bench = Bench(device_a, device_b, pump)
            near, far = bench.link()
            for end in (near, far):
                end.domain.register(16 * KIB)
            Writer(near, far.domain.register(16 * KIB << 10), far.queue_pair).write(
                0, b"1"
            )
            bench.end(bench.a).queue_pair.connect(far.remote(1), 1, passive=True)
            bench.move()
        wait_closed(5)
        counts.append(len(os.listdir("/proc/self/fd")))
    expect(len(set(counts[1:])) == 1, f"descriptors after each round: {counts}")


def _on_a_bench(check: Callable[[Bench], None]) -> Callable[[MakePair], None]:
    def run(make_pair: MakePair) -> None:
        with make_pair() as (device_a, device_b, pump):
            check(Bench(device_a, device_b, pump))

    run.__doc__ = check.__doc__
    return run


CHECKS: list[tuple[str, Callable[[MakePair], None]]] = [
    *(
        (check.__name__.removeprefix("check_"), _on_a_bench(check))
        for check in _ON_A_BENCH
    ),
    ("descriptor_balance", check_descriptor_balance),
]
"""Every check by name; each takes ``make_pair``."""

REMOTE_CHECKS: frozenset[str] = frozenset(name for name, _ in CHECKS) - {
    "fork",
    "descriptor_balance",
}
"""Those that also hold when device B is a stand-in for one in another process."""


def check_device(make_pair: MakePair) -> None:
    """Hold a fabric to its contract: run every check.

    Args:
        make_pair: See the module's text.

    Raises:
        ConformanceFailure: A rule is broken; the text starts with the check's name.
    """
    for name, check in CHECKS:
        try:
            check(make_pair)
        except ConformanceFailure as exc:
            text = f"{name}: {exc}"
            raise ConformanceFailure(text) from exc
