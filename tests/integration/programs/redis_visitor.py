"""redis-py's asyncio client; prints what it saw of a server as JSON."""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import json
import random
import sys
from dataclasses import asdict
from typing import Any

import redis.asyncio


async def main() -> dict[str, Any]:
    """Write, read, count and publish."""
    client = redis.asyncio.Redis(host="127.0.0.1", port=int(sys.argv[1]))
    connection = await client.connection_pool.get_connection()
    # redis-py keeps its StreamWriter to itself.
    info = connection._writer.get_extra_info("smc")
    await client.connection_pool.release(connection)
    value = random.Random(0).randbytes(3_000_000)
    await client.set("big", value)
    async with client.pipeline() as pipe:
        for _ in range(500):
            pipe.incr("count")
        counted = await pipe.execute()
    async with client.pubsub() as pubsub:
        await pubsub.subscribe("news")
        await pubsub.get_message(timeout=5)
        await client.publish("news", "hello")
        message = await pubsub.get_message(timeout=5)
    seen = {
        "info": asdict(info),
        "equal": await client.get("big") == value,
        "counted": counted[-1],
        "heard": message and message["data"].decode(),
    }
    await client.aclose()
    return seen


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())), flush=True)
