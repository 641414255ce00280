"""A server that echoes, and tells what it holds.

``--plain`` serves with stock asyncio: what others cost the machine, and not us.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import tracemalloc
from typing import Any

from orders import obey  # type: ignore[import-not-found]

import pysmc

HOST = "127.0.0.1"


def memory() -> dict[str, int]:
    """Tell what is resident, in bytes: our own, and shared with others."""
    found = {}
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in {"VmRSS", "RssAnon", "RssShmem"}:
                found[name] = int(rest.split()[0]) * 1024
    return found


class Victim:
    """The server and its books."""

    def __init__(self) -> None:
        self.server: asyncio.Server | None = None
        self.served = 0

    async def serve(self) -> dict[str, int]:
        """Listen; gives the port."""
        self.server = await asyncio.start_server(self.echo, HOST, 0)
        return {"port": self.server.sockets[0].getsockname()[1]}

    async def echo(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Give back what comes."""
        self.served += 1
        try:
            while data := await reader.read(1 << 18):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            writer.transport.abort()
        finally:
            writer.close()

    def facts(self) -> dict[str, Any]:
        """Tell what this process holds, after a collection of garbage."""
        gc.collect()
        loop: Any = asyncio.get_running_loop()
        timers = sum(not timer.cancelled() for timer in loop._scheduled)
        facts: dict[str, Any] = {
            "memory": memory(),
            "traced": tracemalloc.get_traced_memory()[0],
            "served": self.served,
            "held": {
                "tasks": len(asyncio.all_tasks()),
                "descriptors": len(os.listdir("/proc/self/fd")),
            },
        }
        driver = getattr(loop, "driver", None)
        if driver is not None:
            groups = driver.endpoint.groups
            facts["held"] |= {
                "handshakes": len(driver.admission),
                "transports": len(driver.transports),
                "groups": len(groups),
                "regions": sum(group.rmb_bytes > 0 for group in groups),
            }
            facts |= {
                "pinned": sum(group.rmb_bytes for group in groups),
                "timers": timers,
                "excess": driver.excess,
            }
        return facts


async def main() -> None:
    """Serve, and answer questions."""
    victim = Victim()
    await obey({"serve": victim.serve, "facts": victim.facts})
    if victim.server is not None:
        victim.server.close()


if __name__ == "__main__":
    if "--plain" in sys.argv:
        asyncio.run(main())
    else:
        pysmc.run(main())
