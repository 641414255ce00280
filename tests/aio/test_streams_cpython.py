"""CPython's own tests of streams, with our classes and functions in asyncio's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import construct
import pytest

from tests.aio.pythons import need

ROOT = Path(__file__).resolve().parents[2]

# In each version at least so many, of which so many connect two streams of ours and
# have to move to SMC-R; the rest feed readers, or have raw sockets at one end. Nothing
# is left out, not even what looks at the reader's private buffer.
TESTS = {"3.11": 67, "3.12": 67, "3.13": 73}
OVER_SMCR = {"3.11": 4, "3.12": 4, "3.13": 5}
RUNNING = f"{sys.version_info[0]}.{sys.version_info[1]}"
RUNS = [
    *((version, kind) for version in TESTS for kind in ("classes", "asyncio", "pysmc")),
    (RUNNING, "uvloop"),  # compiled, so it is there for this one only
]

# CPython closes a loop's executor in a private way, which uvloop does not have.
CHILD = """
import asyncio, asyncio.streams, io, json, sys, unittest
import pysmc

asyncio.StreamReader = asyncio.streams.StreamReader = pysmc.StreamReader
asyncio.StreamWriter = asyncio.streams.StreamWriter = pysmc.StreamWriter
kind = sys.argv[1]
modes = []

async def open_connection(*args, **options):
    reader, writer = await pysmc.open_connection(*args, **options)
    modes.append(writer.get_extra_info("smc").mode)
    return reader, writer

if kind != "classes":
    asyncio.open_connection = open_connection
    asyncio.start_server = pysmc.start_server
if kind == "pysmc":
    asyncio.new_event_loop = pysmc.new_event_loop

from test.test_asyncio import test_streams, utils

if kind == "uvloop":
    import uvloop
    asyncio.new_event_loop = uvloop.new_event_loop
    utils.TestCase.close_loop = staticmethod(lambda loop: loop.close())

suite = unittest.defaultTestLoader.loadTestsFromTestCase(test_streams.StreamTests)
result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
failed = [(case.id(), text) for case, text in result.failures + result.errors]
skipped = [(case.id(), text) for case, text in result.skipped]
print(json.dumps([result.testsRun, failed, skipped, modes.count("smcr")]))
"""


def run_suite(version: str, kind: str) -> list[Any]:
    folders = [ROOT, ROOT / "proto", Path(construct.__file__).parents[1]]
    done = subprocess.run(
        [need(version), "-W", "ignore", "-c", CHILD, kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.slow
@pytest.mark.parametrize(("version", "kind"), RUNS)
def test_streams_as_cpython_tests_them(version, kind) -> None:
    ran, failed, skipped, over_smcr = run_suite(version, kind)
    assert failed == []
    assert skipped == []
    assert ran >= TESTS[version]
    assert over_smcr >= (0 if kind == "classes" else OVER_SMCR[version])
