"""What a connection with the kernel's SMC costs, and one of the kernel with itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.kernel_smc import UEID
from tests.lab.measuring import show

BENCH = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_linux.py"
PAIRS = {"kernel-kernel", "pysmc-kernel", "kernel-pysmc", "pysmc-pysmc"}
BARE = "tcp-asyncio"
CONNECTS = {f"connect, {name}" for name in ("first contact", "reuse", "one more")}


@pytest.mark.lab_long(seconds=600)
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("option")
def test_ratios_to_the_kernel_with_itself(place, kernel) -> None:
    """Figures are shown; that every pair was on SMC-R is judged by the benchmark."""
    hosts = f"{place.server_host},{place.client_host}"
    done = subprocess.run(
        [sys.executable, BENCH, "--hosts", hosts, "--ueid", UEID, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    for row in cells:
        low, high = row["range"]
        show(
            f"{row['cell']:<24} {row['config']:<14} {row['median']:>9.1f} {row['unit']}"
            f"  {row['times_kernel']:.2f} times the kernel ({low:.2f} to {high:.2f})"
        )
        assert row["median"] > 0
    assert {row["config"] for row in cells} == PAIRS | {BARE}
    assert {row["cell"] for row in cells if row["config"] == BARE} == CONNECTS
    assert {row["cell"] for row in cells} > CONNECTS
    kernel.wait_until_gone()
