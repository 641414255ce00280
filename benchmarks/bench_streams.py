"""Our StreamReader and StreamWriter against asyncio's: ratios of one run, side by side.

Three configurations, each a server and a client process that live through the run and
take turns cell by cell: our classes over shm, asyncio's classes over the same shm, and
asyncio's classes over TCP on loopback. The ratio within a round counts; the medians of
the ratios are printed with the smallest and the largest::

    python benchmarks/bench_streams.py [--rounds N] [--scale N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pysmc

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1024
MIB = KIB * KIB
OURS = "pysmc streams, shm"
CONFIGS = (OURS, "asyncio streams, shm", "asyncio streams, TCP")
# Bytes of a write, how it is read (0: read(64 KiB), else readexactly), bytes in all.
CELLS: dict[str, dict[str, int]] = {
    "16 KiB, read(64 KiB)": {"write": 16 * KIB, "exactly": 0, "total": 256 * MIB},
    "64 KiB, read(64 KiB)": {"write": 64 * KIB, "exactly": 0, "total": 512 * MIB},
    "1 MiB, read(64 KiB)": {"write": MIB, "exactly": 0, "total": 512 * MIB},
    "64 KiB, readexactly(1 MiB)": {
        "write": 64 * KIB, "exactly": MIB, "total": 512 * MIB,
    },
    "1 MiB, readexactly(1 MiB)": {"write": MIB, "exactly": MIB, "total": 512 * MIB},
    "1 MiB, readexactly(64 KiB)": {
        "write": MIB, "exactly": 64 * KIB, "total": 512 * MIB,
    },
    "lines of 100 B": {"write": 100 * 655, "exactly": -1, "total": 64 * MIB},
    "ping-pong 64 B": {"write": 64, "exactly": 64, "total": 0, "count": 20_000},
}  # fmt: skip


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take what the first line announces, then say so; or answer each request."""
    while line := await reader.readline():
        cell = json.loads(line)
        exactly, total = cell["exactly"], cell["total"]
        for _ in range(cell.get("count", 0)):
            writer.write(await reader.readexactly(exactly))
        if exactly > 0:
            for _ in range(total // exactly):
                await reader.readexactly(exactly)
        elif exactly < 0:
            line = b"?"
            while line != b"\n":
                line = await reader.readline()
        else:
            while total:
                total -= len(await reader.read(64 * KIB))
        writer.write(b"!")
    writer.close()


async def run_cell(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cell: dict[str, int]
) -> float:
    """Send one cell; seconds until the server has all of it."""
    writer.write(json.dumps(cell).encode() + b"\n")
    data = bytes(cell["write"])
    if cell["exactly"] < 0:
        data = (b"x" * 99 + b"\n") * (cell["write"] // 100)
    began = time.perf_counter()
    for _ in range(cell.get("count", 0)):
        writer.write(data)
        await reader.readexactly(len(data))
    for _ in range(cell["total"] // cell["write"]):
        writer.write(data)
        await writer.drain()
    if cell["exactly"] < 0:
        writer.write(b"\n")
    if await reader.readexactly(1) != b"!":
        message = "the server said something else"
        raise SystemExit(message)
    return time.perf_counter() - began


async def server_process(streams: Any) -> None:
    """Serve until the standard input ends."""
    server = await streams.start_server(serve, "127.0.0.1", 0)
    for listener in server.sockets:
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


async def client_process(streams: Any, port: int) -> None:
    """Run the cells that the standard input names, one a line."""
    reader, writer = await streams.open_connection("127.0.0.1", port)
    info = writer.get_extra_info("smc")
    print("tcp" if info is None else info.mode, flush=True)
    for line in iter(sys.stdin.readline, ""):
        print(await run_cell(reader, writer, json.loads(line)), flush=True)
    writer.close()
    await writer.wait_closed()


def worker(role: str, config: str, *port: str) -> None:
    """Be one of the processes."""
    bytearray(8 * MIB)  # once freed, glibc no longer maps and unmaps for each read
    streams = pysmc if config == OURS else asyncio
    run = asyncio.run if config.endswith("TCP") else pysmc.run
    if role == "server":
        run(server_process(streams))
    else:
        run(client_process(streams, int(port[0])))


def start(stack: contextlib.ExitStack, *arguments: str) -> subprocess.Popen[str]:
    """Start a process that ends with us."""
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, __file__, "--worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    assert process.stdin is not None
    stack.callback(process.stdin.close)
    return process


def ask(process: subprocess.Popen[str], question: str = "") -> str:
    """Write a line to a process, and read one."""
    assert process.stdin is not None
    assert process.stdout is not None
    if question:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


@contextlib.contextmanager
def clients() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Start every configuration."""
    with contextlib.ExitStack() as stack:
        found = {}
        for config in CONFIGS:
            port = ask(start(stack, "server", config))
            found[config] = start(stack, "client", config, port)
            mode = ask(found[config])
            if mode != ("tcp" if config.endswith("TCP") else "smcr"):
                message = f"{config} went over {mode}"
                raise SystemExit(message)
        yield found


def measure(rounds: int, scale: int, only: str) -> dict[str, list[dict[str, float]]]:
    """Run everything in turns; seconds of each cell, round and configuration."""
    rows: dict[str, list[dict[str, float]]] = {
        name: [] for name in CELLS if only in name
    }
    with clients() as processes:
        for number in range(-1, rounds):
            for name, row in rows.items():
                cell = {
                    key: value // scale if key in {"total", "count"} else value
                    for key, value in CELLS[name].items()
                }
                # Whoever comes after a rest is slower: each is in each place as often.
                first = number % len(CONFIGS)
                order = CONFIGS[first:] + CONFIGS[:first]
                took = {c: float(ask(processes[c], json.dumps(cell))) for c in order}
                if number >= 0:  # the first round warms up
                    row.append(took)
    return rows


def summary(name: str, row: list[dict[str, float]], scale: int) -> dict[str, Any]:
    """Tell the medians of one cell."""
    cell = CELLS[name]
    median = {c: statistics.median(took[c] for took in row) for c in CONFIGS}
    count = cell.get("count", 0) // scale
    figures = {
        config: round(seconds / count * 1e6, 1)
        if count
        else round(cell["total"] / scale / seconds / 1e9, 2)
        for config, seconds in median.items()
    }
    ratios = {}
    for other in CONFIGS[1:]:
        found = sorted(took[other] / took[OURS] for took in row)
        ratios[other] = [
            round(value, 2) for value in (statistics.median(found), found[0], found[-1])
        ]
    return {"cell": name, "GB/s or us": figures, "ratios": ratios}


def main() -> None:
    """Run and print."""
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=int, default=1, help="divides the work")
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.rounds, options.scale, options.only)
    report = [summary(name, row, options.scale) for name, row in rows.items()]
    facts = (
        f"{platform.machine()}, {os.cpu_count()} processors, {sys.version.split()[0]}"
    )
    if options.json:
        print(json.dumps({"machine": facts, "cells": report, "rows": rows}))
        return
    print(facts)
    for cell in report:
        figures = ", ".join(f"{v} {c}" for c, v in cell["GB/s or us"].items())
        print(f"{cell['cell']}: {figures}")
        for other, (median, least, most) in cell["ratios"].items():
            print(f"    {median} times {other} ({least} to {most})")


if __name__ == "__main__":
    main()
