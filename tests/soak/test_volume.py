"""Many gibibytes through one connection over shared memory, every byte checked."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.load]

GIBIBYTE = 1 << 30
DEADLINE = 3600.0
"""Seconds for all of it; other work makes each turn of both ends long."""


@pytest.mark.slow
def test_many_gibibytes_through_one_connection(long_run, peers) -> None:
    server, client = peers.start("server"), peers.start("client")
    port = server.ask("serve", kind="check")["port"]
    with long_run("soak-shm-volume", small=1, full=64) as run:
        total = run.count * GIBIBYTE
        began = time.monotonic()
        done = client.ask("upload", port=port, total=total, deadline=DEADLINE)
        seconds = time.monotonic() - began
        assert done["mode"] == "smcr"
        assert done["got"]["received"] == total
        assert done["got"]["wrong_at"] is None
        assert len(done["sent"]) == run.count + 1
        # One sum a gibibyte: a fault is placed, and the last one is over everything.
        assert done["got"]["sums"] == done["sent"]
        run.add(gibibytes=run.count)
        run.tell(mebibytes_a_second=round(total / seconds / (1 << 20)))
        run.tell(crc32_of_all=f"{done['sent'][-1]:08x}")


@pytest.fixture
def stream():
    """The module that both programs check with."""
    path = Path(__file__).parent / "programs" / "stream.py"
    spec = importlib.util.spec_from_file_location("soak_stream", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faults(stream, data: bytearray) -> dict[str, bytes]:
    """What could go wrong with three blocks of a stream, and what would come."""
    size = stream.BLOCK_BYTES
    one, two, three = (bytes(data[at : at + size]) for at in range(0, 3 * size, size))
    flipped = bytearray(data)
    flipped[-1] ^= 1
    return {
        "flipped": bytes(flipped),
        "lost": bytes(data[:100] + data[101:]),
        "doubled": bytes(data[:100] + data[99:]),
        "swapped": one + three + two,
        "stale": one + one + three,
        "cut": bytes(data[:-1]),
    }


@pytest.mark.parametrize(
    "fault", ["flipped", "lost", "doubled", "swapped", "stale", "cut"]
)
def test_the_checker_finds_every_kind_of_fault(stream, fault) -> None:
    """By both ways: the comparison, and the sum that knows nothing of the code."""
    good = b"".join(map(stream.block, range(3)))
    bad = faults(stream, bytearray(good))[fault]
    checker, sums = stream.Checker(), stream.Sums()
    sums.take(good)
    for at in range(0, len(bad), 1000):
        checker.take(bad[at : at + 1000])
    record = checker.record()
    assert record["sums"] != sums.sums
    if fault == "cut":
        assert record["received"] == len(good) - 1
    else:
        firsts = (i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b)
        assert record["wrong_at"] == next(firsts)


def test_the_sums_of_both_ends_agree_however_the_stream_was_cut(stream) -> None:
    stream.GIBIBYTE = 150_000  # three of them, cut by no piece
    total = 16 * stream.BLOCK_BYTES
    sums, checker = stream.Sums(), stream.Checker()
    for data in stream.blocks(total):
        sums.take(data)
    whole = b"".join(stream.blocks(total))
    place = 0
    for size in [1, 7, 65535, 65536, 65537, 100_000, 149_999]:
        checker.take(whole[place : place + size])
        place += size
    for at in range(place, total, 99_999):
        checker.take(whole[at : at + 99_999])
    record = checker.record()
    assert record == {"received": total, "sums": sums.sums, "wrong_at": None}
    assert len(sums.sums) == total // 150_000 + 1
