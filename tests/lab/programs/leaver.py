"""Leaves the interpreter while a connection is open, in one of several ways.

Arguments: the server's address and port, our own address, the fabric, and the ways:
"return" from the main coroutine, "exit" (sys.exit within it), or "loop" (the loop is
neither closed nor run on). Each is gone by a child of its own, forked before anything
is open, because a start of Python is slow where this runs. Prints the exit codes.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import pysmc

# Loaded before the forks, once for all.
import pysmc.aio.loop

CHUNK_BYTES = 16 * 1024
kept: list[Any] = []
"""What is still alive when the interpreter takes its modules apart."""


class Talk(asyncio.Protocol):
    """Writes as soon as it may, and tells when something came."""

    def __init__(self) -> None:
        self.came = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        """Begin to write."""
        transport.write(bytes(CHUNK_BYTES))

    def data_received(self, data: bytes) -> None:
        """Be in the middle of a transfer."""
        del data
        if not self.came.done():
            self.came.set_result(None)


async def connect(host: str, port: int, own: str, way: str) -> None:
    """Connect, and be in the middle of a transfer."""
    loop = asyncio.get_running_loop()
    loop.slow_callback_duration = 60.0  # an emulated machine is slow
    made = await loop.create_connection(Talk, host, port, local_addr=(own, 0))
    kept.extend(made)
    transport, talk = made
    info = transport.get_extra_info("smc")
    assert info.mode == "smcr", info
    await talk.came
    transport.write(bytes(CHUNK_BYTES))
    if way == "exit":
        sys.exit(0)


def leave(way: str) -> None:
    """Connect and leave."""
    host, port, own, fabric = sys.argv[1:5]
    settings: dict[str, Any] = {"fabrics": (fabric,)}
    if fabric == "verbs":
        settings |= {"discovery": ("static",), "peers": (host,)}
        settings |= {"ueids": ("PYSMC.LAB",), "rmbe_bytes": 1 << 16}
    config = pysmc.Config(**settings)
    connecting = connect(host, int(port), own, way)
    if way != "loop":
        pysmc.run(connecting, config=config)
        return
    loop = pysmc.new_event_loop(config)
    kept.append(loop)
    loop.run_until_complete(connecting)


def main() -> None:
    """Let all children leave, at the same time."""
    children = {}
    for way in sys.argv[5:]:
        pid = os.fork()
        if pid == 0:
            leave(way)
            return
        children[way] = pid
    codes = {
        way: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for way, pid in children.items()
    }
    print(json.dumps(codes))


main()
