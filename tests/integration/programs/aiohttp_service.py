"""An aiohttp service that knows nothing of pysmc, except that it can be asked.

On its own it prints its port, and ends when its standard input does; gunicorn finds
``app``. The environment's BIG_FILE is what ``/download`` gives.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

WORDS = b"every connection says what it is; "


async def describe(request: web.Request) -> web.Response:
    """Say what carries this connection."""
    assert request.transport is not None
    info = request.transport.get_extra_info("smc")
    return web.json_response(None if info is None else asdict(info))


async def upload(request: web.Request) -> web.Response:
    """Hash a body that comes in chunks."""
    digest, count = hashlib.sha256(), 0
    async for chunk in request.content.iter_any():
        digest.update(chunk)
        count += len(chunk)
    chunked = request.headers.get("Transfer-Encoding") == "chunked"
    return web.json_response([digest.hexdigest(), count, chunked])


async def download(_request: web.Request) -> web.FileResponse:
    """Give the big file, by sendfile where the transport has it."""
    return web.FileResponse(Path(os.environ["BIG_FILE"]))


async def number(request: web.Request) -> web.Response:
    """Give a body that depends on the request."""
    which = int(request.match_info["number"])
    seen: Counter[int] = request.app[PEERS]
    assert request.transport is not None
    seen[id(request.transport)] += 1
    return web.Response(body=WORDS * (which % 50) + str(which).encode())


async def count(request: web.Request) -> web.Response:
    """Say how many connections brought numbers, and how many numbers there were."""
    seen: Counter[int] = request.app[PEERS]
    return web.json_response([len(seen), seen.total()])


async def talk(request: web.Request) -> web.WebSocketResponse:
    """Echo the messages of a websocket."""
    socket = web.WebSocketResponse(max_msg_size=0)
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data)
        else:
            await socket.send_str(message.data)
    return socket


PEERS: web.AppKey[Any] = web.AppKey("peers", Counter)


async def app() -> web.Application:
    """Make the application."""
    made = web.Application()
    made[PEERS] = Counter()
    made.router.add_get("/describe", describe)
    made.router.add_post("/upload", upload)
    made.router.add_get("/download", download)
    made.router.add_get("/number/{number}", number)
    made.router.add_get("/count", count)
    made.router.add_get("/talk", talk)
    return made


async def main() -> None:
    """Serve until standard input ends."""
    runner = web.AppRunner(await app(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
