"""pysmc and the kernel's SMC as each other's peers, beside the kernel with itself.

Two addresses of this machine with an RDMA device each, whose kernel has SMC set up (a
PNETID for each device, a UEID) and the SMC option attached, as in the lab
(``docs/howto/lab.md``)::

    python benchmarks/bench_linux.py --hosts 10.0.0.1,10.0.0.2 --ueid PYSMC.LAB

Every pair of client and server lives through the whole run, and all take turns within a
round: ratios to the kernel with itself mean something where the figures do not. What is
written is the same in all: a kernel's end is this file with blocking sockets of
IPPROTO_SMC, an end of ours is ``pysmc.cli.bench_worker`` on the pysmc loop.

Connects come first. Link groups are limited to 16 connections, and 16 stay open in each
round, so that the first of a round is a first contact (queue pairs, memory, CONFIRM
LINK). Then some are opened and closed, one after the other ("reuse"); then the others
are opened ("one more"). A short rest before each lets what came before come to its end.

A fifth pair knows nothing of SMC: a client of plain TCP connects, sends as much as a
Proposal has, and waits for an answer of as many bytes from a bare asyncio server. No
server on asyncio's own loop can send its Accept sooner, so that no connect to one can
take less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysmc.cli.bench import ask, end

if TYPE_CHECKING:
    from collections.abc import Callable

IPPROTO_SMC = 256
GROUP = 16
"""The least that may be agreed upon as the number of connections of a link group."""
GROUPS = 64
"""Most link groups of a pair, of which each round opens one: beyond the usual limit of
ours connections would be TCP, and a kernel client would not say so."""
REUSES = 8
REST = 0.05
"""Seconds before each connect."""
GROUP_SETTING = Path("/proc/sys/net/smc/smcr_max_conns_per_lgr")
BASE = "kernel-kernel"
PAIRS = (BASE, "pysmc-kernel", "kernel-pysmc", "pysmc-pysmc")
"""Client and server."""
BARE = "tcp-asyncio"
PROPOSAL = bytes(156)
"""As many bytes as a Proposal of ours."""
SIZES = {"64 B": 64, "1 KiB": 1024, "16 KiB": 16 * 1024}
WRITES = {"64 KiB": 65_536}
ECHO, SINK, HEADER_BYTES = b"E", b"S", 8
READ_BYTES = 1 << 18
TIMEOUT = 60.0
"""Seconds that one call of a kernel's end may take."""


# A kernel's end


def kernel_socket() -> socket.socket:
    """Make a socket of the kernel's SMC."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SMC)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def kernel_server(host: str) -> None:
    """Serve connections, each in a process of its own, until standard input ends."""
    listener = kernel_socket()
    listener.bind((host, 0))
    listener.listen(GROUP * 2)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how one ended
    print(listener.getsockname()[1], flush=True)
    if os.fork():
        listener.close()
        sys.stdin.read()
        os.killpg(0, signal.SIGKILL)
    while True:
        sock, _ = listener.accept()
        if not os.fork():
            listener.close()
            with contextlib.suppress(OSError):
                serve(sock)
            os._exit(0)
        sock.close()


def serve(sock: socket.socket) -> None:
    """Echo, or swallow an announced number of bytes and then say one."""
    if sock.recv(1) == ECHO:
        while data := sock.recv(READ_BYTES):
            sock.sendall(data)
        return
    while head := sock.recv(HEADER_BYTES, socket.MSG_WAITALL):
        left = int.from_bytes(head, "big")
        while left:
            data = sock.recv(min(left, READ_BYTES))
            if not data:
                return
            left -= len(data)
        sock.sendall(b"!")


def kernel_client(host: str, port: int, local: str) -> None:
    """Run cells until standard input ends."""

    def connect() -> socket.socket:
        sock = kernel_socket()
        sock.settimeout(TIMEOUT)
        sock.bind((local, 0))
        sock.connect((host, port))
        return sock

    run_cells(connect)


def run_cells(connect: Callable[[], socket.socket]) -> None:
    """Run cells until standard input ends."""
    held: list[socket.socket] = []
    for line in sys.stdin:
        cell = json.loads(line)
        if cell["test"] == "connect":
            result: dict[str, Any] = connects(cell, connect, held)
        elif cell["test"] == "close":
            while held:
                held.pop().close()
            result = {}
        else:
            with connect() as sock:
                result = traffic(sock, cell)
        print(json.dumps(result), flush=True)


def connects(
    cell: dict[str, Any],
    connect: Callable[[], socket.socket],
    held: list[socket.socket],
) -> dict[str, Any]:
    """Open the connections of one link group; gives the times, in milliseconds."""

    def timed() -> float:
        time.sleep(cell["rest"])
        began = time.perf_counter()
        held.append(connect())
        return (time.perf_counter() - began) * 1000

    first, reuse = timed(), []
    for _ in range(cell["reuses"]):
        reuse.append(timed())
        held.pop().close()
    more = [timed() for _ in range(cell["count"] - 1)]
    return {"first": first, "reuse": reuse, "more": more}


def traffic(sock: socket.socket, cell: dict[str, Any]) -> dict[str, Any]:
    """Ping, or stream; gives the figure."""
    payload = bytes(cell["size"])
    if cell["test"] == "latency":
        sock.sendall(ECHO)
        times = []
        for _ in range(cell["count"] * 11 // 10):
            began = time.perf_counter()
            sock.sendall(payload)
            left = len(payload)
            while left:
                left -= len(sock.recv(left))
            times.append(time.perf_counter() - began)
        return {"p50_us": statistics.median(times[cell["count"] // 10 :]) * 1e6}
    sock.sendall(SINK)
    for total in (max(cell["total"] // 8, cell["size"]), cell["total"]):
        began = time.perf_counter()
        sock.sendall(total.to_bytes(HEADER_BYTES, "big"))
        for _ in range(total // cell["size"]):
            sock.sendall(payload)
        sock.recv(1)
        seconds = time.perf_counter() - began
    return {"gb_per_s": cell["total"] / seconds / 1e9}


# The ends of the bare pair


class Answer(asyncio.Protocol):
    """Sends back what comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


def bare_server(host: str) -> None:
    """Answer on plain TCP until standard input ends."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Answer, host, 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await loop.run_in_executor(None, sys.stdin.read)
        server.close()

    asyncio.run(work())


def bare_client(host: str, port: int, local: str) -> None:
    """Connect over plain TCP, and wait for an answer each time."""

    def connect() -> socket.socket:
        sock = socket.create_connection((host, port), TIMEOUT, (local, 0))
        sock.sendall(PROPOSAL)
        left = len(PROPOSAL)  # MSG_WAITALL waits for nothing where there is a time-out
        while left:
            piece = sock.recv(left)
            if not piece:
                message = "the server ended before it had answered"
                raise ConnectionError(message)
            left -= len(piece)
        return sock

    run_cells(connect)


SERVERS = {"kernel": kernel_server, "asyncio": bare_server}
CLIENTS = {"kernel": kernel_client, "tcp": bare_client}


# The run


class Bench:
    """One run.

    Args:
        options: The command line.
        stack: Ends the processes.
    """

    def __init__(
        self, options: argparse.Namespace, stack: contextlib.ExitStack
    ) -> None:
        self._ueid = options.ueid
        self._hosts = options.hosts.split(",")
        self._stack = stack
        self._began = time.monotonic()
        self._clients = self._start_all()

    def _start_all(self) -> dict[str, subprocess.Popen[str]]:
        """Start every process; a start of Python may take seconds, so at once."""
        host, local = self._hosts
        servers = {
            pair: self._start(pair.split("-")[1], "server", host)
            for pair in (*PAIRS, BARE)
        }
        clients = {}
        for pair, serving in servers.items():
            assert serving.stdout is not None
            port = serving.stdout.readline().strip()
            if not port:
                message = f"the server of {pair} ended with {serving.wait()}"
                raise RuntimeError(message)
            kind = pair.split("-")[0]
            clients[pair] = self._start(kind, "client", host, port, local)
        return clients

    def _start(self, kind: str, role: str, *arguments: str) -> subprocess.Popen[str]:
        command = [__file__, f"--{role}", kind, *arguments]
        if kind == "pysmc":
            worker = ["-m", "pysmc.cli.bench_worker", role, "pysmc-verbs", "-"]
            command = [*worker, *arguments]
        environment = os.environ | {
            "PYSMC_FABRICS": "verbs",
            "PYSMC_DISCOVERY": "tcp_option",
            "PYSMC_UEIDS": self._ueid,
            "PYSMC_MAX_CONNECTIONS": str(GROUP),
            "PYSMC_MAX_LINK_GROUPS_PER_PEER": str(GROUPS),
            "PYSMC_RMBE_BYTES": str(64 * 1024),
            "PYSMC_SNDBUF_BYTES": str(64 * 1024),
        }
        process = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                process_group=0,
            )
        )
        self._stack.callback(end, process)
        return process

    def measure(self, pair: str, cell: dict[str, Any]) -> dict[str, Any]:
        """Have one cell done by one pair; says so first, for whoever waits."""
        seconds = time.monotonic() - self._began
        words = " ".join(str(word) for word in (cell["test"], cell.get("size", "")))
        print(f"{seconds:7.1f} s: {pair}, {words}", file=sys.stderr, flush=True)
        row = ask(self._clients[pair], cell)
        if row.get("mode", "smcr") != "smcr":
            message = f"{pair} was {row['mode']}"
            raise RuntimeError(message)
        return row


def measure_connects(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """Open the connections of one link group a round and pair; they stay open."""
    rows = []
    cell = {"test": "connect", "count": GROUP, "reuses": REUSES, "rest": REST}
    for number in range(-1, rounds):
        for pair in (*_in_turn(number), BARE):
            found = bench.measure(pair, cell)
            figures = {
                "first contact": found["first"],
                "reuse": statistics.median(found["reuse"]),
                "one more": statistics.median(found["more"]),
            }
            rows += [
                {"round": number, "cell": f"connect, {name}", "config": pair}
                | {"figure": figure, "unit": "ms"}
                for name, figure in figures.items()
            ]
    for pair in (*PAIRS, BARE):
        bench.measure(pair, {"test": "close"})
    return rows


def measure_traffic(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ping and stream, round for round."""
    cells: dict[str, dict[str, Any]] = {}
    for name, size in SIZES.items():
        row = {"test": "latency", "size": size, "count": options.count}
        cells[f"latency {name}"] = row
    for name, size in WRITES.items():
        total = options.mebibytes << 20
        cells[f"throughput {name}"] = {"test": "stream", "size": size, "total": total}
    rows = []
    for number in range(-1, options.rounds):
        for name, cell in cells.items():
            for pair in _in_turn(number):
                row = bench.measure(pair, cell)
                is_latency = cell["test"] == "latency"
                figure = row["p50_us"] if is_latency else row["gb_per_s"] * 1000
                rows.append(
                    {"round": number, "cell": name, "config": pair, "figure": figure}
                    | {"unit": "us" if is_latency else "MB/s"}
                )
    return rows


def _in_turn(number: int) -> tuple[str, ...]:
    """Let another pair begin each round."""
    start = number % len(PAIRS)
    return PAIRS[start:] + PAIRS[:start]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give medians, and how many times what the kernel gives within each round."""
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
                    "unit": own[0]["unit"],
                    "median": statistics.median(row["figure"] for row in own),
                    "times_kernel": statistics.median(ratios),
                    "range": [ratios[0], ratios[-1]],
                }
            )
    return result


@contextlib.contextmanager
def small_groups() -> Any:
    """Limit the kernel's link groups while the block lasts."""
    before = GROUP_SETTING.read_text()
    GROUP_SETTING.write_text(str(GROUP))
    try:
        yield
    finally:
        GROUP_SETTING.write_text(before)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all; the first round of each part warms up."""
    with small_groups(), contextlib.ExitStack() as stack:
        bench = Bench(options, stack)
        rows = measure_connects(bench, options.rounds)
        if not options.connects_only:
            rows += measure_traffic(bench, options)
    rows = [row for row in rows if row["round"] >= 0]
    machine = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "rounds": options.rounds,
    }
    return {"machine": machine, "cells": summary(rows), "rows": rows}


def show(report: dict[str, Any]) -> None:
    """Print the table as the docs have it."""
    machine = report["machine"]
    print(
        f"Python {machine['python']}, Linux {machine['kernel']},"
        f" {machine['cpus']} CPUs, {machine['rounds']} rounds\n"
    )
    print("| | client-server | median | times the kernel (smallest to largest) |")
    print("|---|---|---:|---|")
    for row in report["cells"]:
        low, high = row["range"]
        ratio = f"{row['times_kernel']:.2f} ({low:.2f} to {high:.2f})"
        figure = f"{row['median']:.1f} {row['unit']}"
        print(f"| {row['cell']} | {row['config']} | {figure} | {ratio} |")


def main() -> None:
    """Read the command line, measure, print; or be a kernel's end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hosts", metavar="SERVER,CLIENT")
    parser.add_argument("--ueid", help="that the kernel and pysmc have in common")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=100, help="round trips of a cell")
    parser.add_argument("--mebibytes", type=int, default=4, help="of a stream")
    parser.add_argument("--connects-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--server", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.server:
        kind, host = options.server
        SERVERS[kind](host)
    elif options.client:
        kind, host, port, local = options.client
        CLIENTS[kind](host, int(port), local)
    elif not options.hosts or not options.ueid:
        parser.error("--hosts and --ueid are needed")
    else:
        report = run(options)
        if options.json:
            print(json.dumps(report))
        else:
            show(report)


if __name__ == "__main__":
    main()
