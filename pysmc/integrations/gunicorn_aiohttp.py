"""aiohttp's gunicorn worker on pysmc's loop.

Source: the documentation of aiohttp ("Deploying with gunicorn").
"""

from __future__ import annotations

import asyncio

from aiohttp.worker import GunicornWebWorker

import pysmc

__all__ = ["AiohttpWorker"]


class AiohttpWorker(GunicornWebWorker):
    """A worker for aiohttp.web applications, whose loop is pysmc's."""

    def init_process(self) -> None:
        """Make the loop, in the process that uses it, and work until told to end."""
        self.loop = pysmc.new_event_loop()
        asyncio.set_event_loop(self.loop)
        # Past aiohttp's own method, which would put asyncio's loop in its place.
        super(GunicornWebWorker, self).init_process()
