"""A client of SMC-R that floods its link with messages that bring nothing."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from orders import obey  # type: ignore[import-not-found]

import pysmc
from smcproto import llc

HOST = "127.0.0.1"
BURST = 64
"""Messages before our own loop has its turn."""


class Flooder:
    """One connection, and what is sent beside it."""

    def __init__(self) -> None:
        self._connection: Any = None
        self._writer: Any = None

    async def begin(self, port: int) -> dict[str, str]:
        """Connect; gives what carries the connection."""
        _, self._writer = await asyncio.open_connection(HOST, port)
        loop: Any = asyncio.get_running_loop()
        (group,) = loop.driver.endpoint.groups
        (self._connection,) = group.connections.values()
        return {"mode": self._writer.get_extra_info("smc").mode}

    async def flood(self, kind: str, seconds: float) -> dict[str, int]:
        """Send as many as go in so many seconds; gives how many those were."""
        pair = self._connection.link.handle
        send = self._test_link if kind == "llc" else self._update
        begun, sent, full = time.monotonic(), 0, 0
        while time.monotonic() - begun < seconds:
            for _ in range(BURST):
                if pair._outbox._held:  # what it has not taken yet would pile up
                    full += 1
                    break
                send(pair)
                pair.flush()
                sent += 1
            await asyncio.sleep(0)
        assert pair.is_up, "the link ended"
        return {"sent": sent, "full": full}

    def _test_link(self, pair: Any) -> None:
        message = llc.TestLink(version=2, response=False, user_data=bytes(16))
        pair.post_send(message.build())

    def _update(self, pair: Any) -> None:
        self._connection.published(pair.publish(*self._connection.take_post()))

    async def end(self) -> dict[str, bool]:
        """Break the connection off."""
        self._writer.transport.abort()
        return {"ended": True}


async def main() -> None:
    """Take orders."""
    flooder = Flooder()
    await obey({"begin": flooder.begin, "flood": flooder.flood, "end": flooder.end})


if __name__ == "__main__":
    pysmc.run(main())
