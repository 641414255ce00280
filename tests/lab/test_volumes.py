"""Volumes over RoCE, in both directions at once, with every size of buffer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lab.measuring import Measuring, show
from tests.lab.network_faults import resources, wait_for_resources

KIB, MIB = 1 << 10, 1 << 20
SIZES = [16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB]
DEADLINE = 3000.0
"""Seconds for an order; a scenario has a limit of its own."""


def exchange(ends, total: int, **changes) -> list[dict[str, Any]]:
    """Let two ends exchange so many bytes; gives what each saw of it."""
    ends.kind = Measuring
    before = resources()
    server, client = ends.start("server", **changes), ends.start("client", **changes)
    port = server.ask("serve_exchange", total=total)["port"]
    seen = [
        client.ask("exchange", port=port, total=total, deadline=DEADLINE),
        server.ask("exchanged"),
    ]
    for one in seen:
        info = one["info"]
        found = (info["mode"], info["version"], info["fabric"])
        assert found == ("smcr", "2.1", ends.place.fabric)
        assert one["bytes"] == total
    assert seen[0]["sent"] == seen[1]["received"]
    assert seen[1]["sent"] == seen[0]["received"]
    assert seen[0]["sent"] != seen[1]["sent"]
    for end in (client, server):
        assert end.finish() == 0
    wait_for_resources(before)
    for one, name in zip(seen, ("client", "server"), strict=True):
        rate = 2 * total / one["seconds"] / MIB
        cpu = one["cpu"] / (2 * total / MIB) * 1000
        show(f"{name}: {rate:.1f} MiB/s both ways, {cpu:.1f} ms of CPU a MiB")
    return seen


@pytest.mark.lab(seconds=90)
@pytest.mark.timeout(150)
def test_64_mib_in_each_direction_at_once(ends) -> None:
    exchange(ends, 64 * MIB, rmbe_bytes=MIB, sndbuf_bytes=MIB)


@pytest.mark.lab_long(seconds=1800)
@pytest.mark.timeout(1800)
def test_1_gib_in_each_direction_at_once(ends) -> None:
    exchange(ends, 1024 * MIB, rmbe_bytes=MIB, sndbuf_bytes=MIB)


@pytest.mark.lab(seconds=60)
@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_buffer(ends, size: int) -> None:
    """More than one round through the buffer, but for the largest."""
    total = min(max(2 * size, MIB), 4 * MIB)
    # The share of one connection has to be as large as the largest.
    room = {"max_pinned_bytes": 1024 * MIB, "max_pinned_bytes_per_peer": 512 * MIB}
    for one in exchange(ends, total, rmbe_bytes=size, sndbuf_bytes=size, **room):
        info = one["info"]
        assert (info["rmbe_bytes"], info["peer_rmbe_bytes"]) == (size, size)
