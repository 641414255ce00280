"""RoCE over a network that loses, delays, doubles, swaps and spoils packets."""

# ruff: noqa: T201  # the figures of a scenario are in its output

from __future__ import annotations

import pytest

from tests.lab.network_faults import impaired, impaired_packets

EVERYTHING = "delay 10ms loss 1% duplicate 1% corrupt 0.2% reorder 2%"
EACH = {
    "loss": "loss 1%",
    "delay": "delay 10ms",
    "reordering": "delay 2ms reorder 5%",
    "duplication": "duplicate 5%",
    "corruption": "corrupt 1%",
}
DROPS_FROM = 2000
"""Packets, of which one in a hundred is lost: that none was is not to be thought of."""
PACKET_BYTES = 1024
"""Most bytes of a RoCE packet on a network device with an MTU of 1,500."""


def stream_through(ends, how: str, total: int) -> None:
    """Send both ways at once: every byte arrives, and the fault was there."""
    server, client = ends.pair(total=0)
    with impaired(how):
        server.ask("go_on", total=total)
        client.ask("go_on", total=total)
        for end in (server, client):
            (record,) = end.ask("records", deadline=500.0)["records"]
            assert record["error"] is None, record
            assert record["wrong"] is None
            assert (record["received"], record["eof"]) == (total, True)
        hurt = impaired_packets()
    print(f"{how}: {hurt} for {total} bytes each way")
    assert hurt.packets > 2 * total // PACKET_BYTES
    assert hurt.dropped or hurt.packets < DROPS_FROM or "loss" not in how


@pytest.mark.lab(seconds=90)
def test_every_byte_is_right_on_a_network_with_every_fault(ends):
    stream_through(ends, EVERYTHING, 128 * 1024)


@pytest.mark.lab_long(seconds=600)
@pytest.mark.parametrize("fault", EACH)
def test_every_byte_is_right_with_one_fault(ends, fault):
    stream_through(ends, EACH[fault], 4 << 20)
