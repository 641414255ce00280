"""Clients of three libraries on pysmc's loop; prints what they saw of an ASGI service.

Arguments: the port, and the tours to make: ``httpx``, ``http2``, ``aiohttp``,
``websockets``, ``pause`` (which sends half of a body, prints a line, and sends the
rest when it gets one) or ``ask`` (for each line that it gets, asks over a new
connection who answers, and prints that). The environment's AUTHORITY is the file of
whoever signed the service's certificate; without it there is no TLS.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import random
import ssl
import sys
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

import pysmc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

PORT = int(sys.argv[1])
AUTHORITY = os.environ.get("AUTHORITY")
TLS = ssl.create_default_context(cafile=AUTHORITY) if AUTHORITY else None
SERVICE = f"http{'s' if TLS else ''}://127.0.0.1:{PORT}"
BODY = random.Random(0).randbytes(1_000_000)
DOWNLOAD_BYTES = 2_000_001
DOWNLOAD_DIGEST = hashlib.sha256(
    random.Random(DOWNLOAD_BYTES).randbytes(DOWNLOAD_BYTES)
).hexdigest()
CHUNKS, CHUNK_BYTES = 20, 50_000
MESSAGES = (0, 1, 125, 126, 65_535, 65_536, 400_000)


class Upload:
    """A body that comes in chunks, and its hash."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Give the chunks."""
        noise = random.Random(1)
        for _ in range(CHUNKS):
            chunk = noise.randbytes(CHUNK_BYTES)
            self.digest.update(chunk)
            yield chunk

    @property
    def expected(self) -> list[Any]:
        """What the service has to answer when all were sent over HTTP/1.1."""
        return [self.digest.hexdigest(), CHUNKS * CHUNK_BYTES, True]


async def tour_httpx(*, is_http2: bool = False) -> dict[str, Any]:
    """Do one of each over one connection that is kept alive."""
    seen: dict[str, Any] = {}
    async with httpx.AsyncClient(
        base_url=SERVICE,
        trust_env=False,
        verify=TLS or False,
        http1=not is_http2,
        http2=is_http2,
        timeout=30,
    ) as client:
        first = (await client.get("/worker")).json()
        echo = await client.post("/echo", content=BODY)
        seen["echo"] = echo.content == BODY
        upload = Upload()
        answer = await client.post("/upload", content=upload.chunks())
        seen["upload"] = (
            answer.json()[: 2 if is_http2 else 3]
            == (upload.expected[: 2 if is_http2 else 3])
        )
        digest = hashlib.sha256()
        async with client.stream("GET", f"/download/{DOWNLOAD_BYTES}") as response:
            async for data in response.aiter_raw():
                digest.update(data)
        seen["download"] = digest.hexdigest() == DOWNLOAD_DIGEST
        last = await client.get("/worker")
        seen["kept alive"] = last.json()["client"] == first["client"]
        # httpcore gives out sockets only; the transport is some wrappers below.
        stream = last.extensions["network_stream"]._stream
        stream = getattr(stream, "transport_stream", stream)
        seen["mode"] = stream._transport.get_extra_info("smc").mode
    return seen | {"worker": first}


async def tour_http2() -> dict[str, Any]:
    """Do the same in HTTP/2, and many requests at once over one connection."""
    seen = await tour_httpx(is_http2=True)
    async with httpx.AsyncClient(
        base_url=SERVICE, trust_env=False, verify=TLS or False, http1=False, http2=True
    ) as client:
        bodies = [random.Random(number).randbytes(20_000) for number in range(30)]
        answers = await asyncio.gather(
            *(client.post("/echo", content=body) for body in bodies)
        )
        seen["streams"] = [answer.content for answer in answers] == bodies
    return seen


async def tour_aiohttp() -> dict[str, Any]:
    """Do one of each over one connection, which ends as a websocket."""
    seen: dict[str, Any] = {}
    async with aiohttp.ClientSession(
        SERVICE, connector=aiohttp.TCPConnector(limit=1, ssl=TLS or True)
    ) as session:
        async with session.get("/worker") as response:
            first = await response.json(content_type=None)
        async with session.post("/echo", data=io.BytesIO(BODY)) as response:
            seen["echo"] = await response.read() == BODY
        upload = Upload()
        async with session.post("/upload", data=upload.chunks()) as response:
            got = await response.json(content_type=None)
            seen["upload"] = got == upload.expected
        digest = hashlib.sha256()
        async with session.get(f"/download/{DOWNLOAD_BYTES}") as response:
            async for data in response.content.iter_any():
                digest.update(data)
        seen["download"] = digest.hexdigest() == DOWNLOAD_DIGEST
        async with session.get("/worker") as response:
            last = await response.json(content_type=None)
        seen["kept alive"] = last["client"] == first["client"]
        async with session.ws_connect("/talk") as socket:
            seen["mode"] = socket.get_extra_info("smc").mode
            seen["talk"] = True
            for size in MESSAGES:
                message = random.Random(size).randbytes(size)
                await socket.send_bytes(message)
                seen["talk"] &= await socket.receive_bytes() == message
            await socket.send_str("close 4001")
            await socket.receive()
            seen["code"] = socket.close_code
    return seen | {"worker": first}


async def tour_websockets() -> dict[str, Any]:
    """Talk over a websocket: messages whole and in fragments, ping, a close code."""
    seen: dict[str, Any] = {"talk": True}
    async with connect(
        f"{SERVICE.replace('http', 'ws')}/talk", ssl=TLS, proxy=None
    ) as socket:
        seen["mode"] = socket.transport.get_extra_info("smc").mode
        for size in MESSAGES:
            message = random.Random(size).randbytes(size)
            await socket.send(message)
            seen["talk"] &= await socket.recv() == message
        await socket.send([message[:10], message[10:70_000], message[70_000:]])
        seen["fragments"] = await socket.recv() == message
        seen["ping"] = await (await socket.ping()) >= 0
        await socket.send("close 4002")
        try:
            await socket.recv()
        except ConnectionClosed:
            seen["code"] = socket.close_code
    return seen


async def tour_pause() -> dict[str, Any]:
    """Send half of a body, and the rest when told."""
    loop = asyncio.get_running_loop()

    async def halves() -> AsyncIterator[bytes]:
        yield BODY[:300_000]
        print("half", flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)
        yield BODY[300_000:]

    async with httpx.AsyncClient(
        base_url=SERVICE, trust_env=False, verify=TLS or False
    ) as client:
        answer = await client.post("/echo", content=halves())
        return {"echo": answer.content == BODY, "headers": dict(answer.headers)}


async def tour_ask() -> int:
    """Ask over a new connection whenever told; gives how often that was."""
    loop = asyncio.get_running_loop()
    count = 0
    while await loop.run_in_executor(None, sys.stdin.readline):
        async with httpx.AsyncClient(
            base_url=SERVICE, trust_env=False, verify=TLS or False, timeout=30
        ) as client:
            print((await client.get("/worker")).text, flush=True)
        count += 1
    return count


TOURS: dict[str, Callable[[], Awaitable[Any]]] = {
    "httpx": tour_httpx,
    "http2": tour_http2,
    "aiohttp": tour_aiohttp,
    "websockets": tour_websockets,
    "pause": tour_pause,
    "ask": tour_ask,
}


async def main() -> dict[str, Any]:
    """Make the tours."""
    return {name: await TOURS[name]() for name in sys.argv[2:]}


if __name__ == "__main__":
    print(json.dumps(pysmc.run(main())), flush=True)
