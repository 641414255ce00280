"""What the pysmc loop costs a program whose peers are plain TCP.

Connect, one request of 64 bytes, one answer, close: on the stock loop and on the pysmc
loop, in turns. A pair is one block of each, in changing order, against the same plain
peer in a process of its own; what is printed is the ratio of the pair's times, stock
divided by pysmc, as a median with its 95 % interval (bootstrap). 1.00 is no difference,
0.95 is a pysmc loop that takes 5 % more time.

    python benchmarks/bench_plain.py [--pairs 60] [--block 200] [--role client|server]
                                     [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time

import pysmc
from pysmc.config import Config

HOST = "127.0.0.1"
REQUEST = b"q" * 64
WARM_UP_PAIRS = 3


class Answer(asyncio.Protocol):
    """The server's side: answers what it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to answer."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer."""
        self.transport.write(data)


class Ask(asyncio.Protocol):
    """The client's side: one request, one answer."""

    def __init__(self, done: asyncio.Future[None]) -> None:
        self.done = done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.transport = transport
        transport.write(REQUEST)

    def data_received(self, data: bytes) -> None:  # asyncio's signature
        """Take the answer, and close."""
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that it is over."""
        self.done.set_result(None)


async def ask(port: int, count: int) -> float:
    """Make so many requests, one after another; the seconds that it took."""
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    for _ in range(count):
        done = loop.create_future()
        await loop.create_connection(lambda done=done: Ask(done), HOST, port)
        await done
    return time.perf_counter() - began


async def serve() -> None:
    """Answer until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answer, HOST, 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    end = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), end.set)
    await end.wait()


def loop_of(kind: str) -> asyncio.AbstractEventLoop:
    """Make a loop: "pysmc" or "stock"."""
    return (
        pysmc.new_event_loop(Config()) if kind == "pysmc" else asyncio.new_event_loop()
    )


@contextlib.contextmanager
def server_of(kind: str):
    """Run a server on a loop of a kind in another process; gives its port."""
    command = [sys.executable, __file__, "--serve", kind]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield int(child.stdout.readline())
    finally:
        child.stdin.close()
        child.wait(10)


def measure(role: str, pairs: int, block: int) -> list[float]:
    """Time pairs of blocks; the ratio of each, stock divided by pysmc."""
    ratios = []
    with contextlib.ExitStack() as stack:
        ports = {
            kind: stack.enter_context(server_of(kind if role == "server" else "stock"))
            for kind in ("stock", "pysmc")
        }
        runners = {
            kind: stack.enter_context(
                asyncio.Runner(
                    loop_factory=lambda kind=kind: loop_of(
                        kind if role == "client" else "stock"
                    )
                )
            )
            for kind in ("stock", "pysmc")
        }
        for number in range(pairs + WARM_UP_PAIRS):
            order = ("stock", "pysmc") if number % 2 else ("pysmc", "stock")
            seconds = {
                kind: runners[kind].run(ask(ports[kind], block)) for kind in order
            }
            if number >= WARM_UP_PAIRS:
                ratios.append(seconds["stock"] / seconds["pysmc"])
    return ratios


def interval(ratios: list[float], resamples: int = 4000) -> tuple[float, float, float]:
    """Give the median with its 95 % interval, by resampling."""
    chance = random.Random(0)
    medians = sorted(
        statistics.median(chance.choices(ratios, k=len(ratios)))
        for _ in range(resamples)
    )
    low, high = medians[resamples // 40], medians[-resamples // 40]
    return low, statistics.median(ratios), high


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--block", type=int, default=200)
    parser.add_argument("--role", choices=("client", "server", "both"), default="both")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=("stock", "pysmc"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        with asyncio.Runner(loop_factory=lambda: loop_of(options.serve)) as runner:
            runner.run(serve())
        return
    roles = ("client", "server") if options.role == "both" else (options.role,)
    result = {}
    for role in roles:
        low, median, high = interval(measure(role, options.pairs, options.block))
        result[role] = {"low": low, "median": median, "high": high}
        if not options.json:
            print(
                f"pysmc {role}, plain peer: stock/pysmc {median:.3f}"
                f"  (95 % interval {low:.3f} to {high:.3f},"
                f" {options.pairs} pairs of {options.block} connections)"
            )
    if options.json:
        print(json.dumps({"cpus": os.cpu_count(), "pairs": options.pairs} | result))


if __name__ == "__main__":
    main()
