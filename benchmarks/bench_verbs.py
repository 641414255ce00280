"""pysmc over RoCE, asyncio's TCP on the same wire, and the fabric without either.

Two addresses of this machine that reach each other over two RDMA devices, as in the lab
(``docs/howto/lab.md``) or over a cable between two ports::

    python benchmarks/bench_verbs.py --hosts 10.0.0.1,10.0.0.2 --devices rxe0,rxe1

All live through the whole run and take turns within a round, so that the ratios mean
something where the figures do not. What the fabric costs without any protocol is asked
of programs that others wrote: ``ibv_rc_pingpong`` (rdma-core) for latency, with events
as pysmc uses them, and ``ib_write_bw`` (perftest) for throughput.

From soft-RoCE follows nothing about hardware: it does in the kernel's software, packet
by packet, what an adapter does by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from typing import Any

from pysmc.cli.bench import ask, end

SIZES = {"64 B": 64, "1 KiB": 1024, "16 KiB": 16 * 1024}
WRITES = {"64 KiB": 65_536, "1 MiB": 1 << 20}
CONFIGS = ("asyncio-tcp", "pysmc-verbs")
BASE = "asyncio-tcp"
FABRIC = {"latency": "ibv_rc_pingpong", "throughput": "ib_write_bw"}
END_SECONDS = 30


def make_cells(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Give what is measured."""
    cells: dict[str, dict[str, Any]] = {}
    for name, size in SIZES.items():
        count = options.count if size < 10_000 else options.count // 2
        cells[f"latency {name}"] = {"test": "latency", "size": size, "count": count}
    for name, size in WRITES.items():
        total = options.mebibytes << 20
        cells[f"throughput {name}"] = {"test": "stream", "size": size, "total": total}
    return cells


class Bench:
    """One run.

    Args:
        options: The command line.
        stack: Ends the processes.
    """

    def __init__(
        self, options: argparse.Namespace, stack: contextlib.ExitStack
    ) -> None:
        self._options = options
        self._hosts = options.hosts.split(",")
        self._devices = options.devices.split(",")
        self._stack = stack
        self._clients = {config: self._pair(config) for config in CONFIGS}

    def _pair(self, config: str) -> subprocess.Popen[str]:
        host, local = self._hosts
        server = self._start("server", config, "-", host)
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        return self._start("client", config, "-", host, port, local)

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PYSMC_FABRICS": "verbs",
            "PYSMC_DISCOVERY": "static",
            "PYSMC_PEERS": self._options.hosts,
            "PYSMC_UEIDS": "PYSMC.BENCH",
            "PYTHONHASHSEED": "0",
        }
        process = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "pysmc.cli.bench_worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
        self._stack.callback(end, process)
        return process

    def measure(self, config: str, cell: dict[str, Any]) -> dict[str, Any]:
        """Have one cell done by one configuration."""
        row = ask(self._clients[config], cell)
        wanted = ("smcr", "verbs") if config == "pysmc-verbs" else ("tcp", None)
        if (row["mode"], row["fabric"]) != wanted:
            message = f"{config} was {row['mode']} over {row['fabric']}"
            raise RuntimeError(message)
        return row

    def measure_fabric(self, cell: dict[str, Any]) -> dict[str, float]:
        """Have the same done by programs that know nothing but verbs."""
        options = self._options
        size = str(cell["size"])
        if cell["test"] == "latency":
            # Events, as pysmc: without them it would burn a processor at each end.
            words = ["ibv_rc_pingpong", "-e", "-g", str(options.gid_index)]
            words += ["-s", size, "-n", str(cell["count"]), "-m", str(options.mtu)]
            found = self._both(words, r"= ([\d.]+) usec/iter")
            return {"p50_us": found}
        count = max(cell["total"] // cell["size"], 5)
        words = ["ib_write_bw", "-x", str(options.gid_index), "-s", size]
        words += ["-n", str(count), "-m", str(options.mtu), "-F"]
        row = rf"^\s*{size}\s+\d+\s+[\d.]+\s+([\d.]+)"
        return {"gb_per_s": self._both(words, row) * (1 << 20) / 1e9}

    def _both(self, words: list[str], pattern: str) -> float:
        """Run a program as server and as client; gives the client's figure."""
        first, second = self._devices
        with subprocess.Popen(
            [*words, "-d", first],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as server:
            try:
                text = self._ask([*words, "-d", second, self._hosts[0]], server)
            finally:
                server.terminate()
        found = re.search(pattern, text, re.MULTILINE)
        if found is None:
            message = f"{' '.join(words)} gave no figure:\n{text}"
            raise RuntimeError(message)
        return float(found[1])

    def _ask(self, words: list[str], server: subprocess.Popen[bytes]) -> str:
        """Run the client; a server that does not listen yet refuses it."""
        done = None
        while server.poll() is None:
            done = subprocess.run(
                words,
                capture_output=True,
                text=True,
                check=False,
                timeout=END_SECONDS * 4,
            )
            if done.returncode == 0:
                return done.stdout
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
        said = "" if done is None else done.stdout + done.stderr
        message = f"{' '.join(words)} failed:\n{said}"
        raise RuntimeError(message)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give medians, and how many times what TCP gives within each round."""
    result = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        mine = [row for row in rows if row["cell"] == cell]
        bases = {row["round"]: row["figure"] for row in mine if row["config"] == BASE}
        for config in dict.fromkeys(row["config"] for row in mine):
            own = [row for row in mine if row["config"] == config]
            ratios = sorted(row["figure"] / bases[row["round"]] for row in own)
            result.append(
                {
                    "cell": cell,
                    "config": config,
                    "unit": "us" if cell.startswith("latency") else "MB/s",
                    "median": statistics.median(row["figure"] for row in own),
                    "times_tcp": statistics.median(ratios),
                    "range": [ratios[0], ratios[-1]],
                }
            )
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cells, round for round; the first round warms up."""
    rows = []
    with contextlib.ExitStack() as stack:
        bench = Bench(options, stack)
        for number in range(-1, options.rounds):
            for name, cell in make_cells(options).items():
                kind = name.split()[0]
                found = {config: bench.measure(config, cell) for config in CONFIGS}
                if shutil.which(FABRIC[kind]) and number >= 0:
                    found[FABRIC[kind]] = bench.measure_fabric(cell)
                for config, row in found.items():
                    figure = row.get("p50_us") or row["gb_per_s"] * 1000
                    rows.append(
                        {"round": number, "cell": name, "config": config}
                        | {"figure": figure, "cpu_s": row.get("cpu_s")}
                    )
    rows = [row for row in rows if row["round"] >= 0]
    machine = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "roce_mtu": options.mtu,
        "rounds": options.rounds,
    }
    return {"machine": machine, "cells": summary(rows), "rows": rows}


def show(report: dict[str, Any]) -> None:
    """Print the table as the docs have it."""
    machine = report["machine"]
    print(
        f"Python {machine['python']}, Linux {machine['kernel']},"
        f" {machine['cpus']} CPUs, RoCE MTU {machine['roce_mtu']},"
        f" {machine['rounds']} rounds\n"
    )
    print("| | | median | times TCP (smallest to largest) |")
    print("|---|---|---:|---|")
    for row in report["cells"]:
        low, high = row["range"]
        ratio = f"{row['times_tcp']:.2f} ({low:.2f} to {high:.2f})"
        figure = f"{row['median']:.1f} {row['unit']}"
        print(f"| {row['cell']} | {row['config']} | {figure} | {ratio} |")


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hosts", required=True, metavar="SERVER,CLIENT")
    parser.add_argument("--devices", required=True, metavar="SERVER,CLIENT")
    parser.add_argument("--gid-index", type=int, default=1)
    parser.add_argument("--mtu", type=int, default=1024, help="of RoCE, in bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=200, help="round trips of a cell")
    parser.add_argument("--mebibytes", type=int, default=8, help="of a stream")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = run(options)
    if options.json:
        print(json.dumps(report))
    else:
        show(report)


if __name__ == "__main__":
    main()
