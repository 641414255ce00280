"""The library websockets at both ends: ``serve``, or ``visit PORT``.

The one that serves prints its port, then what it saw of its first visitor as JSON, and
ends when its standard input does; the other prints what it saw.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

if TYPE_CHECKING:
    from websockets.asyncio.connection import Connection

SIZES = (0, 1, 125, 126, 65_535, 65_536, 2_000_000)
TEXT = "every connection says what it is, \N{SNOWMAN} too; " * 5000


def describe(connection: Connection) -> dict[str, Any]:
    """Say what is known of a connection that has ended."""
    return {
        "mode": connection.transport.get_extra_info("smc").mode,
        "extensions": [one.name for one in connection.protocol.extensions],
        "close": [connection.close_code, connection.close_reason],
    }


async def echo(connection: ServerConnection) -> None:
    """Give back each message, long ones in fragments; "go" ends the connection."""
    pings = 0
    async for message in connection:
        if message == "go":
            await connection.close(4003, "asked to go")
            break
        if len(message) < 100_000:
            await connection.send(message)
        else:
            # Before the echo: a visitor that has it may send more than is taken in here
            # before the pong can be seen.
            await (await connection.ping(b"are you there?"))
            pings += 1
            third = len(message) // 3
            await connection.send([message[:third], message[third:]])
    print(json.dumps(describe(connection) | {"pings": pings}), flush=True)


async def main_serve() -> None:
    """Serve until standard input ends."""
    async with serve(echo, "127.0.0.1", 0, max_size=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def main_visit() -> None:
    """Send messages of all sizes, whole and in fragments, and be sent away."""
    uri = f"ws://127.0.0.1:{sys.argv[2]}/"
    seen: dict[str, Any] = {}
    async with connect(uri, proxy=None, max_size=None) as connection:
        messages: list[str | bytes] = [random.Random(n).randbytes(n) for n in SIZES]
        messages.append(TEXT)
        equal = []
        for message in messages:
            await connection.send(message)
            equal.append(await connection.recv() == message)
        parts = [TEXT[begin : begin + 999] for begin in range(0, len(TEXT), 999)]
        await connection.send(parts)
        equal.append(await connection.recv() == TEXT)
        seen["equal"] = all(equal) and len(equal)
        await (await connection.ping())
        await connection.send("go")
        with contextlib.suppress(ConnectionClosed):
            await connection.recv()
    print(json.dumps(seen | describe(connection)), flush=True)


if __name__ == "__main__":
    asyncio.run({"serve": main_serve, "visit": main_visit}[sys.argv[1]]())
