"""An ASGI application: an echo that says which process answered, and over what."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer one request with its body, or with what is known of the worker."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if scope["path"] == "/worker":
        loop = type(asyncio.get_running_loop())
        worker = {"pid": os.getpid(), "loop": f"{loop.__module__}.{loop.__name__}"}
        body = json.dumps(worker).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
