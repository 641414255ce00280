"""A good client: times handshakes, and moves a stream."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from orders import obey  # type: ignore[import-not-found]

import pysmc

HOST = "127.0.0.1"
PIECE = bytes(range(256)) * 1024


async def shake(port: int) -> tuple[float, str]:
    """Connect and exchange a byte; gives the seconds until then, and how it went."""
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"!")
    assert await reader.readexactly(1) == b"!"
    took = time.perf_counter() - begun
    info = writer.get_extra_info("smc")
    writer.close()
    await writer.wait_closed()
    return took, info.mode if info.reason is None else info.reason.name


async def handshakes(port: int, count: int) -> dict[str, Any]:
    """Shake hands, one after another."""
    results = [await shake(port) for _ in range(count)]
    return summary(results)


async def contacts(port: int, count: int) -> dict[str, Any]:
    """Make first contact again and again, each time as a peer that nobody knows."""

    def meet() -> None:
        results.append(pysmc.run(shake(port)))

    results: list[tuple[float, str]] = []
    for _ in range(count):
        thread = threading.Thread(target=meet)
        thread.start()
        await asyncio.to_thread(thread.join)
    return summary(results)


async def pings(port: int, count: int) -> dict[str, Any]:
    """Exchange a byte again and again over one connection."""
    reader, writer = await asyncio.open_connection(HOST, port)
    mode = writer.get_extra_info("smc").mode
    results = []
    for _ in range(count):
        begun = time.perf_counter()
        writer.write(b"!")
        assert await reader.readexactly(1) == b"!"
        results.append((time.perf_counter() - begun, mode))
    writer.close()
    await writer.wait_closed()
    return summary(results)


def summary(results: list[tuple[float, str]]) -> dict[str, Any]:
    """Give the median, the 99th percentile and the worst, in milliseconds."""
    times = sorted(1000 * took for took, _ in results)
    modes: dict[str, int] = {}
    for _, mode in results:
        modes[mode] = modes.get(mode, 0) + 1
    return {
        "modes": modes,
        "p50": round(times[len(times) // 2], 2),
        "p99": round(times[min(len(times) - 1, int(len(times) * 0.99))], 2),
        "worst": round(times[-1], 2),
    }


class Stream:
    """A stream there and back, over one connection."""

    def __init__(self) -> None:
        self.moved = 0
        self.mode = ""
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, port: int) -> dict[str, str]:
        """Begin to send and to receive; gives what carries it."""
        reader, writer = await asyncio.open_connection(HOST, port)
        info = writer.get_extra_info("smc")
        self.mode = "tcp" if info is None else info.mode
        self._tasks = [
            asyncio.create_task(self._send(writer)),
            asyncio.create_task(self._receive(reader)),
        ]
        return {"mode": self.mode}

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(PIECE)
            await writer.drain()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        at = 0
        while data := await reader.read(1 << 18):
            start = at % len(PIECE)
            assert data[:64] == (PIECE + PIECE)[start : start + len(data[:64])]
            at += len(data)
            self.moved = at
        raise ConnectionResetError

    async def rate(self, seconds: float) -> dict[str, float]:
        """Give the rate over so many seconds, in MiB a second."""
        begun, before = time.perf_counter(), self.moved
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, done.set)
        await done.wait()
        assert not any(task.done() for task in self._tasks), "the stream broke off"
        took = time.perf_counter() - begun
        return {"rate": round((self.moved - before) / took / (1 << 20), 1)}

    async def end(self) -> dict[str, int]:
        """Break it off."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        return {"moved": self.moved}


async def main() -> None:
    """Take orders."""
    stream = Stream()
    await obey(
        {
            "handshakes": handshakes,
            "contacts": contacts,
            "pings": pings,
            "begin": stream.begin,
            "rate": stream.rate,
            "end": stream.end,
        }
    )
    await stream.end()


if __name__ == "__main__":
    pysmc.run(main())
