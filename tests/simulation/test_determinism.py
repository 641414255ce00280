"""The same seed, the same trace: twice here, and in a process of another hash seed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pysmc.testing.simulation.swarm import run_seed

pytestmark = pytest.mark.usefixtures("quiet")

SEEDS = 200
ELSEWHERE = 60
PROGRAM = """
import logging
from pysmc.testing.simulation.swarm import run_seed
logging.disable()
for seed in range({count}):
    print(run_seed(seed, trace=True).digest)
"""


@pytest.mark.simulate
@pytest.mark.timeout(300)
def test_the_same_seed_gives_the_same_trace() -> None:
    digests = []
    for seed in range(SEEDS):
        first, again = (run_seed(seed, trace=True) for _ in range(2))
        assert first.trace == again.trace, seed
        assert first.digest == again.digest
        digests.append(first.digest)
    assert len(set(digests)) == SEEDS, "another seed, another trace"
    assert elsewhere(hash_seed="77") == digests[:ELSEWHERE]


def elsewhere(hash_seed: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(count=ELSEWHERE)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        check=True,
        timeout=120,
    )
    return done.stdout.split()


def test_a_trace_changes_nothing() -> None:
    for seed in range(20):
        with_trace, without = (run_seed(seed, trace=each) for each in (True, False))
        assert without.trace == []
        assert (with_trace.steps, with_trace.seconds, with_trace.counts) == (
            without.steps,
            without.seconds,
            without.counts,
        )
