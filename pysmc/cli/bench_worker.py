"""One end of a benchmark: an echo and sink server, or the client that times it.

``server CONFIG CPU HOST`` prints its port and serves until standard input ends.
``client CONFIG CPU HOST PORT LOCAL`` reads one JSON cell a line from standard input and
prints one JSON result a line. CONFIG is asyncio-tcp, uvloop-tcp, or pysmc-shm and the
like; it decides the loop and nothing else, so that every configuration runs the same
protocol code. What a pysmc loop does stands in the environment. CPU is "-" for any.

Method: ``performance`` notes in benchmarks/README.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Callable

ECHO, SINK = b"E", b"S"
HEADER_BYTES = 8
WARM_UP_BYTES = 8 << 20
CONGESTION = ("cubic", "reno")
"""The machine's default may be bbr, which loses up to five times on loopback."""


def loop_factory(config: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Give the maker of a configuration's loop."""
    if config == "uvloop-tcp":
        import uvloop

        return uvloop.new_event_loop
    if config.startswith("pysmc-"):
        import pysmc

        return pysmc.new_event_loop
    return asyncio.SelectorEventLoop


def tune(transport: asyncio.BaseTransport) -> None:
    """Give TCP the congestion control that suits a loopback."""
    sock = transport.get_extra_info("socket")
    for name in CONGESTION:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
            return


class Server(asyncio.Protocol):
    """Echoes, or swallows an announced number of bytes and then says one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        tune(transport)
        # Not isinstance: uvloop's transports do not derive from asyncio's.
        self.transport = cast("asyncio.Transport", transport)
        self.is_echo: bool | None = None
        self.head = b""
        self.left = 0

    def data_received(self, data: bytes) -> None:
        """Do what the first byte asked for."""
        if self.is_echo:
            self.transport.write(data)
        elif self.is_echo is None:
            self.is_echo = data[:1] == ECHO
            if data[1:]:
                self.data_received(data[1:])
        else:
            self._swallow(data)

    def _swallow(self, data: bytes) -> None:
        if not self.left:
            self.head += data[: HEADER_BYTES - len(self.head)]
            if len(self.head) < HEADER_BYTES:
                return
            data = data[HEADER_BYTES:]
            self.left = int.from_bytes(self.head, "big")
            self.head = b""
        self.left -= len(data)
        if not self.left:
            self.transport.write(b"!")


class Client(asyncio.Protocol):
    """Ping-pong or a stream; one future at a time tells when it is through."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        tune(transport)
        self.transport = cast("asyncio.Transport", transport)
        self.received = 0
        self.wanted = 0
        self.on_message: Callable[[], None] = lambda: None
        self.may_write = asyncio.Event()
        self.may_write.set()

    def data_received(self, data: bytes) -> None:
        """Count, and report a whole message."""
        self.received += len(data)
        if self.received >= self.wanted:
            self.received = 0
            self.on_message()

    def pause_writing(self) -> None:
        """The transport has enough."""
        self.may_write.clear()

    def resume_writing(self) -> None:
        """The transport wants more."""
        self.may_write.set()

    async def ping(self, size: int, count: int) -> list[float]:
        """Time round trips of ``size`` bytes, in seconds."""
        clock, payload = time.perf_counter, bytes(size)
        times: list[float] = []
        done = asyncio.get_running_loop().create_future()
        start = 0.0

        def next_round() -> None:
            nonlocal start
            now = clock()
            times.append(now - start)
            if len(times) > count:
                done.set_result(None)
                return
            start = clock()
            self.transport.write(payload)

        self.wanted, self.on_message = size, next_round
        next_round()
        await done
        return times[1:]

    async def stream(self, size: int, total: int) -> float:
        """Time ``total`` bytes in writes of ``size``, acknowledged once, in seconds."""
        payload = bytes(size)
        done = asyncio.get_running_loop().create_future()
        self.wanted, self.on_message = 1, lambda: done.set_result(None)
        start = time.perf_counter()
        self.transport.write(total.to_bytes(HEADER_BYTES, "big"))
        for _ in range(total // size):
            self.transport.write(payload)
            if not self.may_write.is_set():
                await self.may_write.wait()
        await done
        return time.perf_counter() - start


class Place(NamedTuple):
    """Where a client connects to, and from where."""

    host: str
    port: int
    local: str


async def connect(place: Place, kind: bytes) -> Client:
    """Open a connection and say what it is for."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(
        Client, place.host, place.port, local_addr=(place.local, 0)
    )
    client.transport.write(kind)
    return client


async def run_cell(place: Place, cell: dict[str, Any]) -> dict[str, Any]:
    """Run one cell and give its figures."""
    cpu = time.process_time()
    if cell["test"] == "latency":
        client = await connect(place, ECHO)
        await client.ping(cell["size"], cell["count"] // 10)
        times = sorted(await client.ping(cell["size"], cell["count"]))
        figures = {
            "p50_us": times[len(times) // 2] * 1e6,
            "p99_us": times[len(times) * 99 // 100] * 1e6,
        }
    else:
        client = await connect(place, SINK)
        await client.stream(cell["size"], max(cell["total"] // 8, cell["size"]))
        seconds = await client.stream(cell["size"], cell["total"])
        figures = {"gb_per_s": cell["total"] / seconds / 1e9}
    info = client.transport.get_extra_info("smc")
    client.transport.close()
    mode, fabric = ("tcp", None) if info is None else (info.mode, info.fabric)
    cpu = time.process_time() - cpu
    return {**figures, "mode": mode, "fabric": fabric, "cpu_s": cpu}


async def run_connects(
    place: Place, cell: dict[str, Any], held: list[Client]
) -> dict[str, Any]:
    """Open connections one after the other and keep them, or close what is kept.

    Args:
        place: Where to.
        cell: ``connect``: the first of ``count``, then ``reuses`` that are closed at
            once, then the others, each after a rest of some seconds. ``close``.
        held: Those that are kept.
    """

    async def timed() -> float:
        await asyncio.sleep(cell["rest"])
        began = time.perf_counter()
        held.append(await connect(place, b""))
        return (time.perf_counter() - began) * 1000

    result: dict[str, Any] = {}
    if cell["test"] == "connect":
        result["first"] = await timed()
        result["reuse"] = []
        for _ in range(cell["reuses"]):
            result["reuse"].append(await timed())
            held.pop().transport.close()
        result["more"] = [await timed() for _ in range(cell["count"] - 1)]
    infos = [one.transport.get_extra_info("smc") for one in held]
    is_smcr = all(info is not None and info.mode == "smcr" for info in infos)
    while held and cell["test"] == "close":
        held.pop().transport.close()
    return {**result, "mode": "smcr" if is_smcr else "tcp"}


async def serve(host: str) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Server, host, 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await loop.run_in_executor(None, sys.stdin.read)


async def take_cells(place: Place) -> None:
    """Run cells until standard input ends."""
    loop = asyncio.get_running_loop()
    held: list[Client] = []
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        cell = json.loads(line)
        if cell["test"] in {"connect", "close"}:
            result = await run_connects(place, cell, held)
        else:
            result = await run_cell(place, cell)
        print(json.dumps(result), flush=True)


def main() -> None:
    """Be the end that the arguments name."""
    role, config, cpu, host = sys.argv[1:5]
    if cpu != "-":
        os.sched_setaffinity(0, {int(cpu)})
    # A fresh process pays an mmap for each of asyncio's 256 KiB reads until it has
    # once freed a large block; that is glibc's doing and not what is compared.
    del [bytearray(WARM_UP_BYTES)][:]
    if role == "server":
        work = serve(host)
    else:
        work = take_cells(Place(host, int(sys.argv[5]), sys.argv[6]))
    with asyncio.Runner(loop_factory=loop_factory(config)) as runner:
        runner.run(work)


if __name__ == "__main__":
    main()
