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

SIZES = (0, 1, 3_000_000, 65_536)
COUNT = 500
NEWS = [random.Random(n).randbytes(n * n * 7) for n in range(100)]


async def use_values(client: redis.asyncio.Redis) -> dict[str, Any]:
    """Write and read, and count in a pipeline with a transaction and in one without."""
    noise = random.Random(0)
    values = {f"value {size}": noise.randbytes(size) for size in SIZES}
    for name, value in values.items():
        await client.set(name, value)
    seen: dict[str, Any] = {
        "values": [await client.get(name) == value for name, value in values.items()]
    }
    async with client.pipeline(transaction=True) as pipe:
        for _ in range(COUNT):
            pipe.incr("count")
        seen["counted"] = (await pipe.execute()) == list(range(1, COUNT + 1))
    async with client.pipeline(transaction=False) as pipe:
        for name in values:
            pipe.get(name)
        seen["together"] = await pipe.execute() == list(values.values())
    return seen


async def hear_news(client: redis.asyncio.Redis) -> dict[str, Any]:
    """Publish on one connection and hear it on another."""
    async with client.pubsub() as pubsub:
        await pubsub.subscribe("news")
        confirmed = await pubsub.get_message(timeout=5)
        assert confirmed is not None
        listeners = [await client.publish("news", one) for one in NEWS]
        heard: list[bytes] = []
        while len(heard) < len(NEWS):
            message = await pubsub.get_message(timeout=5)
            assert message is not None
            heard.append(message["data"])
        info = pubsub.connection._writer.get_extra_info("smc")
        await pubsub.unsubscribe("news")
    return {
        "listeners": sorted(set(listeners)), "heard": heard == NEWS, "mode": info.mode
    }  # fmt: skip


async def main() -> dict[str, Any]:
    """Do all over two connections."""
    client = redis.asyncio.Redis(host="127.0.0.1", port=int(sys.argv[1]))
    connection = await client.connection_pool.get_connection()
    # redis-py keeps its StreamWriter to itself.
    info = connection._writer.get_extra_info("smc")
    await client.connection_pool.release(connection)
    seen = {"info": asdict(info), **await use_values(client)}
    seen["news"] = await hear_news(client)
    await client.aclose()
    return seen


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())), flush=True)
