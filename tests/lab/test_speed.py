"""What pysmc over RoCE costs beside TCP on the same wire, and beside RoCE itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.measuring import show
from tests.lab.network_faults import resources, wait_for_resources

BENCH = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_verbs.py"


@pytest.mark.lab_long(seconds=900)
@pytest.mark.timeout(900)
def test_ratios_to_tcp_and_to_the_fabric(place) -> None:
    """Figures are shown and not judged, but that all three were measured is."""
    before = resources()
    hosts = f"{place.server_host},{place.client_host}"
    words = [BENCH, "--hosts", hosts, "--devices", "rxe0,rxe1"]
    done = subprocess.run(
        [sys.executable, *map(str, words), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for row in report["cells"]:
        low, high = row["range"]
        show(
            f"{row['cell']:<18} {row['config']:<16} {row['median']:>9.1f} {row['unit']}"
            f"  {row['times_tcp']:.2f} times TCP ({low:.2f} to {high:.2f})"
        )
        assert row["median"] > 0
    configs = {row["config"] for row in report["cells"]}
    assert configs == {"asyncio-tcp", "pysmc-verbs", "ibv_rc_pingpong", "ib_write_bw"}
    wait_for_resources(before)
