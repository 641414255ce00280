# ruff: noqa: T201  # a program answers on standard output
"""Forks processes that stream both ways, and kills each at a given moment.

Everything is imported before, and no loop was ever opened here, so that a victim costs
a few milliseconds. Orders and answers are JSON, one a line:

* ``{"role": "client", "port": ..., "after": seconds}`` kills a client so long after its
  fork;
* ``{"role": "server", "after": seconds}`` answers with the victim's port first, and
  kills it so long after that.

The last answer is the moment of the kill, on the system's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import sys
import time
from typing import NoReturn

from both_ways import BothWays  # type: ignore[import-not-found]

# These are loaded on first use, which would be in each victim anew.
import pysmc
import pysmc.aio.loop
import pysmc.fabric.shm

HOST = "127.0.0.1"


async def serve(answer: int) -> None:
    """Serve streams for ever; tells the port."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: BothWays(0), HOST, 0)
    port = server.sockets[0].getsockname()[1]
    os.write(answer, json.dumps({"port": port}).encode() + b"\n")
    await server.serve_forever()


async def connect(port: int) -> None:
    """Stream for ever."""
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_connection(lambda: BothWays(1), HOST, port)
    await protocol.ended


def be_a_victim(order: dict[str, str], answer: int) -> NoReturn:
    """Stream until the end comes."""
    os.close(0)
    if order["role"] == "server":
        pysmc.run(serve(answer))
    else:
        pysmc.run(connect(int(order["port"])))
    os._exit(1)


def main() -> None:
    """Obey."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answers, answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            be_a_victim(order, answer)
        os.close(answer)
        handle = os.pidfd_open(pid)
        if order["role"] == "server":
            print(os.read(answers, 1 << 16).decode().strip(), flush=True)
        early = bool(select.select([handle], [], [], order["after"])[0])
        moment = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(handle)
        os.close(answers)
        print(json.dumps({"killed_at": moment, "early": early}), flush=True)


if __name__ == "__main__":
    main()
