"""A protocol that sends one position-coded stream and checks another.

Used by both ends of a connection, in both roles; it ends when the connection does.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from position_code import (  # type: ignore[import-not-found]
    BLOCK_BYTES,
    Checker,
    PositionCode,
)

BLOCKS_PER_TURN = 8


class BothWays(asyncio.Protocol):
    """Sends for as long as the connection lives.

    Args:
        seed: Of the stream that is sent, and with one added or taken away, of the one
            that is received: servers send even seeds, clients odd ones.
    """

    def __init__(self, seed: int) -> None:
        self._code = PositionCode(seed)
        self._checker = Checker(seed ^ 1)
        self._number = 0
        self._may_write = True
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.error: Exception | None = None
        self.ended_at = 0.0
        self.info: Any = None

    def connection_made(self, transport: Any) -> None:
        """Begin to send."""
        self._transport = transport
        self.info = transport.get_extra_info("smc")
        self._send()

    def pause_writing(self) -> None:
        """Send no more for now."""
        self._may_write = False

    def resume_writing(self) -> None:
        """Send again."""
        self._may_write = True
        self._send()

    def _send(self) -> None:
        for _ in range(BLOCKS_PER_TURN):
            if not self._may_write or self._transport.is_closing():
                return
            self._transport.write(self._code.block(self._number))
            self._number += 1
        asyncio.get_running_loop().call_soon(self._send)

    def data_received(self, data: bytes) -> None:
        """Check what came."""
        self._checker.take(data)

    def connection_lost(self, error: Exception | None) -> None:
        """Remember how it ended, and when."""
        self.error = error
        self.ended_at = time.monotonic()
        if not self.ended.done():
            self.ended.set_result(None)

    def record(self) -> dict[str, Any]:
        """Tell how it went."""
        error = self.error
        return {
            "info": None if self.info is None else asdict(self.info),
            "received": self._checker.received,
            "wrong_at": self._checker.wrong_at,
            "sent_most": self._number * BLOCK_BYTES,
            "error": None if error is None else type(error).__name__,
            "text": str(error),
            "is_connection_error": isinstance(error, ConnectionError),
            "ended_at": self.ended_at,
        }
