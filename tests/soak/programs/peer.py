"""One end of a soak: it takes orders, and tells exactly what it holds.

Orders and answers are JSON, one a line, over standard input and output. A server keeps
one loop for its life. A client carries out every order on a loop of its own: what is
left after an order is then left for good.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import ctypes
import gc
import json
import os
import re
import socket
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import stream  # type: ignore[import-not-found]

import pysmc
import pysmc.aio.loop
import pysmc.fabric.shm

HOST = "127.0.0.1"
PATIENCE = 30.0
"""Seconds that one connection may take."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def descriptors() -> dict[str, int]:
    """Count the descriptors by kind, and the pages of memory files among them."""
    found: collections.Counter[str] = collections.Counter()
    pages = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            kind = os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]
            found[kind] += 1
            if kind.startswith("/memfd:"):
                pages += os.stat(f"/proc/self/fd/{name}").st_blocks * 512 // 4096
    return dict(sorted(found.items())) | {"memory file pages": pages}


def mapped() -> int:
    """Tell how many bytes of memory files are mapped."""
    found = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*memfd:", Path("/proc/self/maps").read_text(), re.M
    )
    return sum(int(end, 16) - int(start, 16) for start, end in found)


def held_by(loop: asyncio.AbstractEventLoop) -> dict[str, int]:
    """Count what a running loop of ours holds for its connections."""
    state = {"tasks": len(asyncio.all_tasks(loop))}
    if not isinstance(loop, pysmc.Loop):
        return state
    driver = loop.driver
    inner: Any = loop
    timers = [one for one in inner._scheduled if not one.cancelled()]
    state |= {
        "timers": len([one for one in timers if one is not driver._timer]),
        "watched": len(inner._selector.get_map()),
        "transports": len(driver.transports),
        "negotiations": len(driver.negotiations),
        "queue pairs": len(driver._links),
    }
    if driver._endpoint is not None:
        endpoint = driver.endpoint
        endpoint.check()
        groups = endpoint.groups
        state |= {
            "handshakes": endpoint.handshake_count,
            "deadlines": len(endpoint._context.timers),
            "link groups": len(groups),
            "connections": sum(len(group.connections) for group in groups),
        }
        devices: list[Any] = driver.devices
        domains = [domain for device in devices for domain in device.domains]
        state["domains"] = len(domains)
        state["arenas"] = sum(len(domain.arenas) for domain in domains)
        used = sum(len(domain._regions) for domain in domains)
        state["regions in use"] = used - sum(len(group.pool) for group in groups)
    return state


async def settled(loop: asyncio.AbstractEventLoop) -> dict[str, int]:
    """Wait until the last connections are given back; gives what a loop holds then."""
    async with asyncio.timeout(PATIENCE):
        while (state := held_by(loop)).get("connections"):
            await asyncio.sleep(0.001)
    return state


def facts() -> dict[str, Any]:
    """Tell what this process holds."""
    gc.collect()
    held: dict[str, Any] = {"descriptors": descriptors(), "mapped": mapped()}
    with contextlib.suppress(RuntimeError):
        held |= held_by(asyncio.get_running_loop())
    size = Path("/proc/self/statm").read_text().split()[1]
    return {
        "held": held,
        "traced": tracemalloc.get_traced_memory()[0],
        "blocks": sys.getallocatedblocks(),
        "heap": heap_in_use(),
        "rss": int(size) * os.sysconf("SC_PAGESIZE"),
    }


class Mallinfo(ctypes.Structure):
    """What mallinfo2(3) gives."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def heap_in_use() -> int:
    """Tell how many bytes of C's heap are in use; 0 where that cannot be asked."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = Mallinfo
    info = ask()
    return int(info.uordblks + info.hblkhd)


class Server:
    """Listens, and counts what came."""

    def __init__(self) -> None:
        self.modes: collections.Counter[str] = collections.Counter()
        self.ended = 0
        self.streams: list[dict[str, Any]] = []
        self.server: asyncio.Server | None = None
        self.before: tracemalloc.Snapshot | None = None

    async def do_serve(self, kind: str) -> dict[str, Any]:
        """Listen; gives the port."""
        handler = getattr(self, kind)
        self.server = await asyncio.start_server(handler, HOST, 0, backlog=1024)
        return {"port": self.server.sockets[0].getsockname()[1]}

    async def echo(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Give back what comes."""
        self.modes[mode_of(writer)] += 1
        while data := await reader.read(1 << 16):
            writer.write(data)
        await self.finish(writer)

    async def hush(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Say nothing, whatever comes."""
        with contextlib.suppress(ConnectionError):
            await reader.read()
        await self.finish(writer)

    async def check(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Take a position-coded stream, and answer with its sums."""
        self.modes[mode_of(writer)] += 1
        checker = stream.Checker()
        while data := await reader.read(stream.WRITE_BYTES):
            checker.take(data)
        writer.write(json.dumps(checker.record()).encode())
        await self.finish(writer)

    async def finish(self, writer: asyncio.StreamWriter) -> None:
        """Close."""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.ended += 1

    async def do_facts(self) -> dict[str, Any]:
        """Tell what this process holds."""
        return facts()

    async def do_modes(self) -> dict[str, Any]:
        """Tell how the connections went; forgets them."""
        modes, self.modes = self.modes, collections.Counter()
        ended, self.ended = self.ended, 0
        return {"modes": modes, "ended": ended}

    async def do_remember(self) -> dict[str, Any]:
        """Keep a picture of what is allocated."""
        gc.collect()
        self.before = tracemalloc.take_snapshot()
        return {}

    async def do_grown(self) -> dict[str, Any]:
        """Name the places where the most was allocated since that picture."""
        gc.collect()
        assert self.before is not None
        now = tracemalloc.take_snapshot()
        return {"grown": stream.grown(self.before, now)}


def mode_of(writer: asyncio.StreamWriter) -> str:
    """Say what a connection runs over, and why if it is TCP."""
    info = writer.get_extra_info("smc")
    if info is None:
        return "unknown"
    return info.mode if info.reason is None else str(info.reason.name)


class Client:
    """Connects; every method is one order, on a loop of its own."""

    async def do_facts(self) -> dict[str, Any]:
        """Tell what this process holds."""
        return facts()

    async def do_cycles(self, port: int, count: int, at_once: int) -> dict[str, Any]:
        """Connect, echo and close; gives what the loop held early on, and at last."""
        loop = asyncio.get_running_loop()
        modes: collections.Counter[str] = collections.Counter()
        await self._run(echo_once, port, max(count // 10, 4 * at_once), at_once, modes)
        first = await settled(loop)
        await self._run(echo_once, port, count, at_once, modes)
        then = await settled(loop)
        return {"modes": modes, "first": first, "then": then}

    async def do_attempts(
        self, kind: str, port: int, count: int, at_once: int
    ) -> dict[str, Any]:
        """Try to connect; gives how the attempts ended."""
        modes: collections.Counter[str] = collections.Counter()
        await self._run(ATTEMPTS[kind], port, count, at_once, modes)
        return {"modes": modes}

    async def do_upload(self, port: int, total: int) -> dict[str, Any]:
        """Send a position-coded stream; gives what both ends made of it."""
        reader, writer = await asyncio.open_connection(HOST, port)
        mode = mode_of(writer)
        sums = stream.Sums()
        for data in stream.blocks(total):
            writer.write(data)
            sums.take(data)
            await writer.drain()
        writer.write_eof()
        got = json.loads(await reader.read())
        writer.close()
        await writer.wait_closed()
        return {"mode": mode, "sent": sums.sums, "got": got}

    @staticmethod
    async def _run(once: Any, port: int, count: int, at_once: int, modes: Any) -> None:
        left = iter(range(count))

        async def some() -> None:
            for number in left:
                async with asyncio.timeout(PATIENCE):
                    modes[await once(port, number)] += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(some())


async def echo_once(port: int, number: int) -> str:
    """Connect, say something, hear it, close."""
    data = number.to_bytes(8, "big") * 25
    reader, writer = await asyncio.open_connection(HOST, port)
    mode = mode_of(writer)
    writer.write(data)
    is_right = await reader.readexactly(len(data)) == data
    writer.close()
    await writer.wait_closed()
    return mode if is_right else "wrong bytes"


async def refused_once(port: int, number: int) -> str:
    """Connect where nobody listens, or nobody answers; gives the error's name."""
    del number
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except (OSError, TimeoutError) as error:
        return type(error).__name__
    writer.close()
    return "connected"


async def silent_once(port: int, number: int) -> str:
    """Connect by a plain socket, and say nothing until the server gives up."""
    del number
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, (HOST, port))
        try:
            data = await loop.sock_recv(sock, 1024)
        except ConnectionResetError:
            return "reset"
    return "end of file" if not data else f"{len(data)} bytes"


ATTEMPTS = {
    "refused": refused_once,
    "declined": echo_once,
    "hushed": refused_once,
    "silent": silent_once,
}


async def obey(program: Any, line: str) -> str:
    """Carry out one order; an error is an answer too."""
    order = json.loads(line)
    try:
        answer = await getattr(program, "do_" + order.pop("do"))(**order)
    except Exception as error:  # noqa: BLE001  # told to whoever gave the order
        answer = {"error": repr(error)}
    return json.dumps(answer)


async def serve() -> None:
    """Take orders on one loop until standard input ends."""
    loop = asyncio.get_running_loop()
    orders, server = asyncio.StreamReader(), Server()
    protocol = asyncio.StreamReaderProtocol(orders)
    pipe, _ = await loop.connect_read_pipe(lambda: protocol, sys.stdin)
    print(json.dumps({"ready": True}), flush=True)
    while line := await orders.readline():
        print(await obey(server, line.decode()), flush=True)
    pipe.close()
    if server.server is not None:
        server.server.close()
        await server.server.wait_closed()


def main() -> None:
    """Run one of the roles."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("server", "client"))
    parser.add_argument("--stock", action="store_true", help="on asyncio's own loop")
    parser.add_argument("--eid", help="another one than this host's")
    options = parser.parse_args()
    if options.eid:
        pysmc.fabric.shm.host_eid = lambda: options.eid
    run = asyncio.run if options.stock else pysmc.run
    if options.role == "server":
        run(serve())
        return
    client = Client()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if json.loads(line)["do"] == "facts":
            print(json.dumps(facts()), flush=True)  # without a loop
        else:
            print(run(obey(client, line)), flush=True)


if __name__ == "__main__":
    main()
