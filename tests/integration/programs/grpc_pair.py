"""grpc.aio at both ends: ``serve``, or ``call PORT``, on pysmc's loop.

The one that serves prints its port and ends when its standard input does; the other
prints what it saw as JSON.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import json
import random
import sys
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]

import pysmc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SIZES = (0, 1, 65_536, 2_000_000)


async def echo(request: bytes, _context: Any) -> bytes:
    """Give it back."""
    return request


async def echo_all(requests: AsyncIterator[bytes], _context: Any) -> Any:
    """Give them back one by one."""
    async for request in requests:
        yield request


def transports() -> list[str]:
    """List what the loop made for connections: nothing, when gRPC made its own."""
    import gc

    return [
        type(one).__name__
        for one in gc.get_objects()
        if isinstance(one, asyncio.BaseTransport)
    ]


async def serve() -> None:
    """Serve until standard input ends."""
    server = grpc.aio.server()
    handlers = {
        "One": grpc.unary_unary_rpc_method_handler(echo),
        "Many": grpc.stream_stream_rpc_method_handler(echo_all),
    }
    handler = grpc.method_handlers_generic_handler("Echo", handlers)
    server.add_generic_rpc_handlers((handler,))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


async def call() -> None:
    """Call once for each size, and once with all of them as a stream."""
    bodies = [random.Random(size).randbytes(size) for size in SIZES]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{sys.argv[2]}") as channel:
        one = channel.unary_unary("/Echo/One")
        many = channel.stream_stream("/Echo/Many")
        seen = {
            "one": [await one(body, timeout=20) == body for body in bodies],
            "many": [body async for body in many(iter(bodies), timeout=20)] == bodies,
            "loop": type(asyncio.get_running_loop()).__module__,
            "transports": transports(),
        }
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    pysmc.run({"serve": serve, "call": call}[sys.argv[1]]())
