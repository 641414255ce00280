"""The demo's server: an ordinary aiohttp file server that knows nothing of pysmc.

Run as ``python -m pysmc.cli.demo_server ROOT HOST`` it is on the stock loop, and under
``pysmc run -m`` on pysmc's. It prints its port, serves the files below ROOT, and ends
when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from aiohttp import web


async def serve(root: Path, host: str) -> None:
    """Serve files on an address until standard input ends."""
    app = web.Application()
    app.router.add_static("/", root)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, 0).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))
