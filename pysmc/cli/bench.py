"""Compare pysmc over shared memory with asyncio's and uvloop's TCP on loopback.

All configurations run in one run, turn by turn, with the same protocol code in two
processes; the figures that count are the ratios within a round. Method and what the
figures do not say: benchmarks/README.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

HELP = "compare shm with asyncio TCP and uvloop TCP on loopback"

HOST = "127.0.0.1"
BASE = "asyncio-tcp"
CONFIGS = (BASE, "uvloop-tcp", "pysmc-shm")
CELLS: dict[str, dict[str, Any]] = {
    "latency 64 B": {"test": "latency", "size": 64, "count": 5_000},
    "throughput 64 KiB": {"test": "stream", "size": 65_536, "total": 1 << 29},
}
FIGURE = {"latency": "p50_us", "stream": "gb_per_s"}
UNIT = {"latency": "us", "stream": "GB/s"}
QUICK = 16
"""--quick divides the work of a cell by this."""
END_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="rounds, 1-100 (default: 7)"
    )
    parser.add_argument(
        "--pin",
        action="store_true",
        help="pin server and client to different CPUs (default: the scheduler decides)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds, to see that it works"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def command(options: argparse.Namespace) -> int:
    """Run all cells; 1 when shm was not what carried the connections."""
    if not 1 <= options.rounds <= 100:
        print("pysmc bench: --rounds wants a number from 1 to 100", file=sys.stderr)
        return 2
    configs = [
        config
        for config in CONFIGS
        if config != "uvloop-tcp" or importlib.util.find_spec("uvloop")
    ]
    rows = _measure(configs, options)
    report = {
        "machine": _machine(),
        "placement": "split" if options.pin else "free",
        "rounds": options.rounds,
        "cells": _summary(configs, rows),
        "rows": rows,
    }
    if options.json:
        print(json.dumps(report))
    else:
        _print_report(report)
    modes = {row["mode"] for row in rows if row["config"] == "pysmc-shm"}
    return 0 if modes == {"smcr"} else 1


def _measure(configs: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        clients = {
            config: stack.enter_context(_pair(config, pin=options.pin))
            for config in configs
        }
        # Round -1 warms everything up and is thrown away.
        for number in range(-1, options.rounds):
            for name, cell in CELLS.items():
                for config in configs:
                    result = ask(clients[config], _sized(cell, quick=options.quick))
                    row = {"round": number, "cell": name, "config": config, **result}
                    if number >= 0:
                        rows.append(row)
            if not options.json:
                print(f"\rround {number + 1} of {options.rounds}", end="", flush=True)
    if not options.json:
        print("\r" + " " * 20 + "\r", end="")
    return rows


def _sized(cell: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    if not quick:
        return cell
    return {
        key: value // QUICK if key in {"count", "total"} else value
        for key, value in cell.items()
    }


@contextlib.contextmanager
def _pair(config: str, *, pin: bool) -> Iterator[subprocess.Popen[str]]:
    """Start a server and a client of one configuration; gives the client."""
    with contextlib.ExitStack() as stack:
        cpus = sorted(os.sched_getaffinity(0)) if pin else []
        places = (str(cpus[0]), str(cpus[-1])) if pin else ("-", "-")
        server = _start(stack, "server", config, places[0], HOST)
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        client = _start(stack, "client", config, places[1], HOST, port, HOST)
        yield client


def _start(stack: contextlib.ExitStack, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pysmc.cli.bench_worker", *arguments]
    process = stack.enter_context(
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    )
    stack.callback(end, process)
    return process


def end(process: subprocess.Popen[str]) -> None:
    """End a worker, by force when it does not obey."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def ask(client: subprocess.Popen[str], cell: dict[str, Any]) -> dict[str, Any]:
    """Have a client do one cell; gives its figures.

    Raises:
        RuntimeError: It ended before it answered.
    """
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(json.dumps(cell) + "\n")
    client.stdin.flush()
    line = client.stdout.readline()
    if not line:
        message = f"benchmark client ended early, exit code {client.wait()}"
        raise RuntimeError(message)
    result: dict[str, Any] = json.loads(line)
    return result


def _summary(configs: list[str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians, and how many times better than asyncio TCP within each round."""
    summary = []
    for name, cell in CELLS.items():
        figure = FIGURE[cell["test"]]
        values = {
            config: [
                row[figure]
                for row in rows
                if row["cell"] == name and row["config"] == config
            ]
            for config in configs
        }
        for config in configs:
            pairs = zip(values[config], values[BASE], strict=True)
            ratios = sorted(
                base / own if cell["test"] == "latency" else own / base
                for own, base in pairs
            )
            summary.append(
                {
                    "cell": name,
                    "config": config,
                    "unit": UNIT[cell["test"]],
                    "median": statistics.median(values[config]),
                    "times_better": statistics.median(ratios),
                    "times_better_range": [ratios[0], ratios[-1]],
                }
            )
    return summary


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def _print_report(report: dict[str, Any]) -> None:
    machine = report["machine"]
    print(
        f"Python {machine['python']}, Linux {machine['kernel']},"
        f" {machine['cpus']} CPUs, placement {report['placement']},"
        f" {report['rounds']} rounds"
    )
    print(f"{'':<20}{'':<14}{'median':>12}   times better than {BASE} (range)")
    for row in report["cells"]:
        low, high = row["times_better_range"]
        figure = f"{row['median']:>8.2f} {row['unit']:<4}"
        ratio = f"{row['times_better']:.2f} ({low:.2f} to {high:.2f})"
        print(f"{row['cell']:<20}{row['config']:<14}{figure}  {ratio}")
