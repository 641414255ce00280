"""The demo over RoCE: two unmodified aiohttp programs, real files, all bytes hashed."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from tests.lab.measuring import show
from tests.lab.network_faults import resources, wait_for_resources

SIZES = (0, 1, 1000, 65_536, 300_000, 2_000_000)


@pytest.mark.lab(seconds=120)
@pytest.mark.timeout(180)
def test_the_demo_between_two_addresses(place, tmp_path) -> None:
    for size in SIZES:
        (tmp_path / f"of {size} bytes").write_bytes(random.Random(size).randbytes(size))
    before = resources()
    words = [sys.executable, "-m", "pysmc", "demo", "--json", "--require"]
    words += ["--fabric", place.fabric, "--path", str(tmp_path), "--connections", "4"]
    words += ["--hosts", f"{place.server_host},{place.client_host}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    show(done.stdout)
    found = (report["mode"], report["version"], report["fabric"])
    assert found == ("smcr", "2.1", place.fabric)
    assert report["sha256_equal"] is True
    assert (report["files"], report["bytes"]) == (len(SIZES), sum(SIZES))
    assert report["reasons"] == {}
    wait_for_resources(before)
