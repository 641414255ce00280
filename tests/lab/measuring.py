"""Ends that move volumes, open many connections, and tell exactly what they hold."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import gc
import hashlib
import os
import random
import sys
import time
import tracemalloc
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from tests.lab.streaming import Obedience

__all__ = ["Measuring", "show"]

BLOCK_BYTES = 64 * 1024
PATIENCE = 30.0
"""Seconds that one connection of many may take."""


def show(text: str) -> None:
    """Write a figure into the test's output."""
    sys.stdout.write(text + "\n")


@cache
def _pattern(role: str) -> bytes:
    return random.Random(role).randbytes(BLOCK_BYTES - 8)


def _blocks(role: str, total: int) -> Any:
    """Give a stream in blocks that begin with their number; no two are equal."""
    pattern = _pattern(role)
    for number in range(total // BLOCK_BYTES):
        yield number.to_bytes(8, "big") + pattern


def _new_hash() -> Any:
    """Make a hash that is quick without the instructions which others need."""
    return hashlib.md5(usedforsecurity=False)


async def _exchange(
    role: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, total: int
) -> dict[str, Any]:
    """Send so many bytes, receive as many at the same time; gives both hashes."""
    sent, received, count = _new_hash(), _new_hash(), 0

    async def send() -> None:
        for block in _blocks(role, total):
            writer.write(block)
            sent.update(block)
            await writer.drain()
        writer.write_eof()

    async def receive() -> None:
        nonlocal count
        while data := await reader.read(4 * BLOCK_BYTES):
            received.update(data)
            count += len(data)

    began, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(send(), receive())
    return {
        "sent": sent.hexdigest(),
        "received": received.hexdigest(),
        "bytes": count,
        "seconds": time.monotonic() - began,
        "cpu": time.process_time() - cpu,
        "info": asdict(writer.get_extra_info("smc")),
    }


class Echo(asyncio.Protocol):
    """Gives back what comes, and remembers what carried it."""

    def __init__(self, infos: list[Any]) -> None:
        self._infos = infos

    def connection_made(self, transport: Any) -> None:
        """Note what carries it."""
        self.transport = transport
        self._infos.append(transport.get_extra_info("smc"))

    def data_received(self, data: bytes) -> None:
        """Give it back."""
        self.transport.write(data)

    def pause_writing(self) -> None:
        """Read no more for now."""
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read again."""
        self.transport.resume_reading()


class Measuring(Obedience):
    """Orders about volumes, numbers and idleness."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._infos: list[Any] = []
        self._exchanged: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._held: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def _open(self, port: int) -> Any:
        return await asyncio.open_connection(
            self._server_host, port, local_addr=(self._client_host, 0)
        )

    # Volumes

    async def do_serve_exchange(self, total: int) -> dict[str, Any]:
        """Listen for one exchange after the other; gives the port."""

        async def serve(reader: Any, writer: Any) -> None:
            answer = await _exchange("server", reader, writer, total)
            writer.close()
            await writer.wait_closed()
            self._exchanged.put_nowait(answer)

        server = await asyncio.start_server(serve, self._server_host, 0)
        self._servers.append(server)
        return {"port": server.sockets[0].getsockname()[1]}

    async def do_exchange(self, port: int, total: int) -> dict[str, Any]:
        """Exchange so many bytes in each direction; gives what was seen of it."""
        reader, writer = await self._open(port)
        answer = await _exchange("client", reader, writer, total)
        writer.close()
        await writer.wait_closed()
        return answer

    async def do_exchanged(self) -> dict[str, Any]:
        """Give what the server saw of the oldest exchange."""
        return await self._exchanged.get()

    # Numbers

    async def do_serve_echo(self) -> dict[str, Any]:
        """Listen; gives the port."""
        loop = asyncio.get_running_loop()
        host = self._server_host
        server = await loop.create_server(lambda: Echo(self._infos), host, 0)
        self._servers.append(server)
        return {"port": server.sockets[0].getsockname()[1]}

    async def do_accepted(self, count: int) -> dict[str, Any]:
        """Wait for so many connections; gives what carried them, and forgets them."""
        while len(self._infos) < count:
            await asyncio.sleep(0.02)
        infos, self._infos[:] = list(self._infos), []
        return _summary(infos)

    async def do_cycles(self, port: int, count: int, at_once: int) -> dict[str, Any]:
        """Connect, echo and close, so many times."""
        infos: list[Any] = []

        async def once(number: int) -> None:
            reader, writer = await self._open(port)
            infos.append(writer.get_extra_info("smc"))
            await _talk(reader, writer, number)
            writer.close()
            await writer.wait_closed()

        began = time.monotonic()
        await _some_at_once(once, count, at_once)
        return _summary(infos) | {"seconds": time.monotonic() - began}

    async def do_hold(self, port: int, count: int, at_once: int) -> dict[str, Any]:
        """Open connections and keep them; each says something of its own."""

        async def once(number: int) -> None:
            reader, writer = await self._open(port)
            self._held.append((reader, writer))
            await _talk(reader, writer, number)

        began = time.monotonic()
        await _some_at_once(once, count, at_once)
        infos = [writer.get_extra_info("smc") for _, writer in self._held]
        return _summary(infos) | {"seconds": time.monotonic() - began}

    async def do_talk(self, size: int) -> dict[str, Any]:
        """Say something else over each of the connections that are kept, all at once.

        Each says a size of its own and bytes of its own.
        """
        pairs = enumerate(self._held)
        await asyncio.gather(
            *(_talk(*pair, number, size + number) for number, pair in pairs)
        )
        return {"count": len(self._held)}

    async def do_let_go(self) -> dict[str, Any]:
        """Close the connections that are kept."""
        for _, writer in self._held:
            writer.close()
        for _, writer in self._held:
            await writer.wait_closed()
        self._held.clear()
        return {}

    async def do_idle(self, seconds: float) -> dict[str, Any]:
        """Do nothing for a while; gives how often the loop woke, and what it cost."""
        loop: Any = asyncio.get_running_loop()
        wakes = 0
        process = loop._process_events

        def counted(events: Any) -> None:
            nonlocal wakes
            wakes += 1  # called once whenever the selector has returned
            process(events)

        loop._process_events = counted
        try:
            cpu = time.process_time()
            # The span itself is what is measured: nothing is waited for.
            await asyncio.sleep(seconds)
            cpu = time.process_time() - cpu
        finally:
            del loop._process_events
        return {"wakes": wakes, "cpu": cpu}

    # What is held

    async def do_settle(self) -> dict[str, Any]:
        """Wait until no connection is left, also beneath the transports."""
        driver = _driver()
        async with asyncio.timeout(PATIENCE):
            while any(group.connections for group in driver.endpoint.groups):
                await asyncio.sleep(0.02)
        return {}

    async def do_held(self) -> dict[str, Any]:
        """Tell what this process holds."""
        gc.collect()
        driver = _driver()
        size = Path("/proc/self/statm").read_text().split()[1]  # noqa: ASYNC240
        return {
            "counts": {
                "descriptors": len(os.listdir("/proc/self/fd")),
                "tasks": len(asyncio.all_tasks()),
                "groups": len(driver.endpoint.groups),
                "transports": len(driver.transports),
                "pinned": sum(
                    one.count.bytes for one in driver.devices if one.fabric == "verbs"
                ),
            },
            "blocks": sys.getallocatedblocks(),
            "heap": _heap_in_use(),
            "traced": tracemalloc.get_traced_memory()[0],
            "rss": int(size) * os.sysconf("SC_PAGESIZE"),
        }

    async def do_trace(self) -> dict[str, Any]:
        """Begin to trace what Python allocates."""
        tracemalloc.start()
        return {}

    def close(self) -> None:
        """End what is open."""
        super().close()
        for _, writer in self._held:
            writer.close()


async def _talk(reader: Any, writer: Any, number: int, size: int = 200) -> None:
    said = random.Random(number).randbytes(size)
    writer.write(said)
    heard = await reader.readexactly(size)
    assert heard == said, f"connection {number} heard something else"


async def _some_at_once(once: Any, count: int, at_once: int) -> None:
    left = iter(range(count))

    async def some() -> None:
        for number in left:
            async with asyncio.timeout(PATIENCE):
                await once(number)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(some())


def _summary(infos: list[Any]) -> dict[str, Any]:
    """Count what carried connections: mode, version, fabric, or why it is TCP."""
    kinds = collections.Counter(
        " ".join(map(str, (info.mode, info.version, info.fabric)))
        if info.reason is None
        else f"{info.reason.name}: {info.reason.text}"
        for info in infos
    )
    groups = collections.Counter(str(info.link_group) for info in infos)
    return {"kinds": kinds, "groups": groups}


def _driver() -> Any:
    loop: Any = asyncio.get_running_loop()
    return loop.driver


class _Mallinfo(ctypes.Structure):
    """What mallinfo2(3) gives."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _heap_in_use() -> int:
    """Tell how many bytes of C's heap are in use; 0 where that cannot be asked."""
    with contextlib.suppress(AttributeError):
        ask = ctypes.CDLL(None).mallinfo2
        ask.restype = _Mallinfo
        info = ask()
        return int(info.uordblks + info.hblkhd)
    return 0
