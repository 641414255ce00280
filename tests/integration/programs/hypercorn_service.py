"""hypercorn inside ``pysmc.run``: its own command line knows only loops of its own.

Prints nothing itself; hypercorn tells its port on standard error. Ends by SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal

from asgi_application import app  # type: ignore[import-not-found]
from hypercorn.asyncio import serve
from hypercorn.config import Config

import pysmc


async def main() -> None:
    """Serve until SIGTERM."""
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.graceful_timeout = 20
    config.errorlog = "-"
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await serve(app, config, shutdown_trigger=stop.wait)


if __name__ == "__main__":
    pysmc.run(main())
