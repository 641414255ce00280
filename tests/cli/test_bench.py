"""``pysmc bench``: one run, every configuration, ratios within a round."""

from __future__ import annotations

import asyncio
import json

import pytest

import pysmc
from pysmc.cli import bench_worker, main

CONFIGS = ["asyncio-tcp", "uvloop-tcp", "pysmc-shm"]
CELLS = {"latency 64 B": "us", "throughput 64 KiB": "GB/s"}


@pytest.mark.slow
def test_quick_as_json(pysmc):
    done = pysmc("bench", "--quick", "--rounds", 1, "--pin", "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert set(report) == {"machine", "placement", "rounds", "cells", "rows"}
    assert (report["placement"], report["rounds"]) == ("split", 1)
    cells = report["cells"]
    assert [(row["cell"], row["config"], row["unit"]) for row in cells] == [
        (cell, config, unit) for cell, unit in CELLS.items() for config in CONFIGS
    ]
    for row in cells:
        assert row["median"] > 0
        low, high = row["times_better_range"]
        assert low <= row["times_better"] <= high
        if row["config"] == "asyncio-tcp":
            assert row["times_better"] == 1
    modes = {(row["config"], row["mode"]) for row in report["rows"]}
    assert ("pysmc-shm", "smcr") in modes
    assert {row["round"] for row in report["rows"]} == {0}


@pytest.mark.slow
def test_quick_in_words(pysmc):
    done = pysmc("bench", "--quick", "--rounds", 1)
    assert (done.code, done.err) == (0, "")
    lines = done.out.replace("\r", "\n").splitlines()
    for cell in CELLS:
        for config in CONFIGS:
            assert any(line.startswith(cell) and config in line for line in lines)


@pytest.mark.slow
def test_without_smc_it_is_no_comparison(pysmc):
    env = {"PYSMC_DISCOVERY": ""}
    done = pysmc("bench", "--quick", "--rounds", 1, "--json", env=env)
    assert done.code == 1
    assert json.loads(done.out)["cells"]


@pytest.mark.parametrize("rounds", ["0", "101", "-1"])
def test_a_wrong_number_of_rounds_is_a_mistake(rounds, capsys):
    assert main(["bench", "--rounds", rounds]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "pysmc bench: --rounds wants a number from 1 to 100\n"


@pytest.mark.parametrize(
    ("factory", "mode"),
    [(pysmc.new_event_loop, "smcr"), (asyncio.SelectorEventLoop, "tcp")],
    ids=["pysmc", "asyncio"],
)
def test_connects_are_timed_and_kept(factory, mode):
    cell = {"test": "connect", "count": 3, "reuses": 2, "rest": 0}

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(bench_worker.Server, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        place = bench_worker.Place("127.0.0.1", port, "127.0.0.1")
        held: list[bench_worker.Client] = []
        found = await bench_worker.run_connects(place, cell, held)
        assert (found["mode"], len(held)) == (mode, 3)
        assert (len(found["reuse"]), len(found["more"])) == (2, 2)
        assert all(ms > 0 for ms in (found["first"], *found["reuse"], *found["more"]))
        kept = [one.transport for one in held]
        found = await bench_worker.run_connects(place, {"test": "close"}, held)
        assert (set(found), held) == ({"mode"}, [])
        assert all(transport.is_closing() for transport in kept)
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
