"""An aiohttp client that visits the service, and prints what it saw as JSON.

The first argument says what to do, the second is the port.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WORDS = b"every connection says what it is; "
CHUNKS, CHUNK_BYTES = 40, 50_000


def describe(session: aiohttp.ClientSession) -> list[Any]:
    """Say what carries each connection that waits in the pool."""
    assert session.connector is not None
    # A response forgets its connection as soon as its last byte has come.
    pool = session.connector._conns.values()
    transports = [entry[0].transport for entries in pool for entry in entries]
    infos = [one.get_extra_info("smc") for one in transports if one is not None]
    return [None if info is None else asdict(info) for info in infos]


async def tour(session: aiohttp.ClientSession) -> dict[str, Any]:
    """Do one of each over one connection that is kept alive."""
    seen: dict[str, Any] = {}
    async with session.get("/describe") as response:
        seen["server"] = await response.json()
    (seen["client"],) = describe(session)
    digest = hashlib.sha256()

    async def chunks() -> AsyncIterator[bytes]:
        noise = random.Random(1)
        for _ in range(CHUNKS):
            chunk = noise.randbytes(CHUNK_BYTES)
            digest.update(chunk)
            yield chunk

    async with session.post("/upload", data=chunks()) as response:
        got, count, chunked = await response.json()
    total = CHUNKS * CHUNK_BYTES
    seen["upload"] = [got == digest.hexdigest(), count == total, chunked]
    digest = hashlib.sha256()
    async with session.get("/download") as response:
        async for data in response.content.iter_any():
            digest.update(data)
    seen["download"] = digest.hexdigest()
    assert session.connector is not None
    async with session.ws_connect("/talk", max_msg_size=0) as socket:
        seen["talk"] = []
        for size in (0, 1, 125, 126, 65_535, 65_536, 1 << 21):
            message = random.Random(size).randbytes(size)
            await socket.send_bytes(message)
            seen["talk"].append(await socket.receive_bytes() == message)
    return seen


async def numbers(session: aiohttp.ClientSession) -> dict[str, Any]:
    """Ask 10,000 numbers over 200 connections."""
    todo = iter(range(10_000))
    wrong = 0

    async def ask() -> None:
        nonlocal wrong
        for which in todo:
            async with session.get(f"/number/{which}") as response:
                expected = WORDS * (which % 50) + str(which).encode()
                wrong += await response.read() != expected

    await asyncio.gather(*(ask() for _ in range(200)))
    async with session.get("/count") as response:
        connections, count = await response.json()
    modes = Counter(info["mode"] for info in describe(session))
    return {"connections": connections, "count": count, "wrong": wrong, "modes": modes}


async def main() -> None:
    """Visit the service."""
    what = {"tour": tour, "numbers": numbers}[sys.argv[1]]
    connector = aiohttp.TCPConnector(limit=1 if what is tour else 200)
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{sys.argv[2]}", connector=connector
    ) as session:
        print(json.dumps(await what(session)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
