"""An ASGI application with something of everything, which knows nothing of pysmc.

What it sends can be computed at the other end, what it receives it gives back or
hashes; it says which process answered, on which loop, and for which client's port.
"""

# ruff: noqa: T201  # it tells of its lifespan on standard error

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sys
from typing import Any

PIECES = (1, 16_384, 65_537, 7)
"""Sizes of the pieces of a body that is sent in chunks, over and over again."""


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Serve one scope."""
    await {"lifespan": live, "http": answer, "websocket": talk}[scope["type"]](
        scope, receive, send
    )


async def live(scope: Any, receive: Any, send: Any) -> None:
    """Begin and end with the server."""
    assert (await receive())["type"] == "lifespan.startup"
    scope.get("state", {})["born"] = os.getpid()
    await send({"type": "lifespan.startup.complete"})
    assert (await receive())["type"] == "lifespan.shutdown"
    print(f"lifespan of {os.getpid()} ended", file=sys.stderr, flush=True)
    await send({"type": "lifespan.shutdown.complete"})


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Answer one request."""
    path = scope["path"]
    if path.startswith("/download/"):
        await download(int(path.rpartition("/")[2]), send)
        return
    digest, parts, count = hashlib.sha256(), [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        digest.update(message["body"])
        count += len(message["body"])
        if path == "/echo":
            parts.append(message["body"])
        if not message.get("more_body"):
            break
    body = b"".join(parts)
    if path == "/upload":
        headers = dict(scope["headers"])
        chunked = headers.get(b"transfer-encoding") == b"chunked"
        body = json.dumps([digest.hexdigest(), count, chunked]).encode()
    elif path == "/worker":
        body = json.dumps(describe(scope)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def describe(scope: Any) -> dict[str, Any]:
    """Say who answers, and whom."""
    loop = type(asyncio.get_running_loop())
    return {
        "pid": os.getpid(),
        "born": scope.get("state", {}).get("born"),
        "loop": f"{loop.__module__}.{loop.__name__}",
        "client": scope["client"],
        "server": scope["server"],
        "http": scope["http_version"],
    }


async def download(size: int, send: Any) -> None:
    """Send so many bytes in chunks of uneven size."""
    body = random.Random(size).randbytes(size)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    begin, number = 0, 0
    while begin < size:
        end = begin + PIECES[number % len(PIECES)]
        piece = body[begin:end]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        begin, number = end, number + 1
    await send({"type": "http.response.body", "body": b""})


async def talk(scope: Any, receive: Any, send: Any) -> None:
    """Echo the messages of a websocket; the text "close CODE" ends it."""
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        text, data = message.get("text"), message.get("bytes")
        if text is not None and text.startswith("close "):
            code = int(text.removeprefix("close "))
            await send({"type": "websocket.close", "code": code, "reason": "asked"})
            return
        if text is None:
            await send({"type": "websocket.send", "bytes": data})
        else:
            await send({"type": "websocket.send", "text": text})
