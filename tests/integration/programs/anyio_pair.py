"""anyio's TCP streams, by their public names: ``listen``, or ``connect PORT``.

The one that listens echoes, prints its port and how its first client is carried, and
ends when its standard input does; the other prints what it saw as JSON.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import json
import random
import sys
from typing import Any

import anyio
import anyio.to_thread
from anyio.abc import SocketAttribute, SocketStream

SIZES = (1, 65_536, 2_000_000)


def mode(stream: SocketStream) -> list[Any]:
    """Say what carries a stream; anyio gives out the socket, but not the transport."""
    info = stream._transport.get_extra_info("smc")  # type: ignore[attr-defined]
    return [info.mode, info.reason and info.reason.name]


async def echo(stream: SocketStream) -> None:
    """Give back what comes, until the other end says that it was all."""
    print(json.dumps(mode(stream)), flush=True)
    async with stream:
        async for data in stream:
            await stream.send(data)


async def listen() -> None:
    """Serve until standard input ends."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    print(listener.extra(SocketAttribute.local_port), flush=True)
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, echo)
        await anyio.to_thread.run_sync(sys.stdin.read)
        group.cancel_scope.cancel()


async def connect() -> None:
    """Send and receive at once, then end this direction and read to the other's."""
    body = b"".join(random.Random(size).randbytes(size) for size in SIZES)
    got = bytearray()
    stream = await anyio.connect_tcp("127.0.0.1", int(sys.argv[2]))
    seen: dict[str, Any] = {"mode": mode(stream)}
    seen["peer"] = stream.extra(SocketAttribute.remote_port) == int(sys.argv[2])

    async def send() -> None:
        begin = 0
        for size in SIZES:
            await stream.send(body[begin : begin + size])
            begin += size
        await stream.send_eof()

    with anyio.fail_after(30):
        async with stream, anyio.create_task_group() as group:
            group.start_soon(send)
            while True:
                try:
                    got += await stream.receive(1 << 17)
                except anyio.EndOfStream:
                    break
    print(json.dumps(seen | {"equal": got == body}), flush=True)


if __name__ == "__main__":
    import pysmc

    pysmc.run({"listen": listen, "connect": connect}[sys.argv[1]]())
