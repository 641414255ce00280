"""Bytes on their way into the peer's memory: what goes now, and what has to wait.

Decides how writes are cut into slices and how small ones are put together. Where bytes
may go is the core's business, when to pause the protocol is the transport's.

Each slice is announced by itself: the peer reads one while the next is written. One
announcement for all of them would halve the throughput.

Reference: RFC 7609 section 4.7.3; kernel counterpart: smc_tx.c.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pysmc.core.connection import Connection
    from pysmc.fabric.base import QueuePair

__all__ = ["SLICE_BYTES", "Buffer", "WriteQueue"]

SLICE_BYTES = 64 * 1024
"""Most bytes of one write to memory and one announcement."""
SMALL_BYTES = 4 * 1024
"""Waiting writes below this are put together."""

Buffer = bytes | bytearray | memoryview
Spans = tuple[tuple[int, int], ...]


class WriteQueue:
    """The outgoing bytes of one connection.

    All methods that post raise `FabricError` when the memory that the peer named does
    not exist.

    Args:
        connection: Says where bytes may go.
        pair: Takes them there.
    """

    __slots__ = ("_connection", "_pair", "_waiting", "size")

    def __init__(self, connection: Connection, pair: QueuePair) -> None:
        self._connection = connection
        self._pair = pair
        self._waiting: deque[Buffer] = deque()
        self.size = 0
        """Bytes that wait for room."""

    def write(self, data: Buffer) -> bool:
        """Send bytes now, or keep what finds no room.

        Args:
            data: At least one byte; not kept by reference unless it is bytes.

        Returns:
            True when some of it waits.
        """
        size = len(data)
        if self.size:
            self._keep(data)
            return True
        connection = self._connection
        spans = connection.claim(size, SLICE_BYTES)
        if not spans and self._look_for_room():
            spans = connection.claim(size, SLICE_BYTES)
        if len(spans) == 1 and spans[0][1] == size:
            pair = self._pair
            pair.post_write(connection.remote_rkey, spans[0][0], memoryview(data))
            connection.published(pair.publish(*connection.take_post()))
            pair.flush()
            return False
        self._waiting.append(data)
        self.size = size
        self._announce(spans)
        if self.send() and not isinstance(data, bytes):
            self._waiting[0] = bytes(self._waiting[0])
        return self.size > 0

    def send(self) -> bool:
        """Move what waits into the peer's memory while there is room.

        Returns:
            True when some of it still waits.
        """
        connection, pair, waiting = self._connection, self._pair, self._waiting
        while self.size:
            spans = connection.claim(self.size, SLICE_BYTES)
            if len(spans) != 1 or spans[0][1] != len(waiting[0]):
                self._announce(spans)
                if not spans and not self._look_for_room():
                    break
                continue
            # The usual case without detours: one whole piece goes to one place.
            ((address, length),) = spans
            piece = memoryview(waiting.popleft())
            pair.post_write(connection.remote_rkey, address, piece)
            self.size -= length
            connection.published(pair.publish(*connection.take_post()))
        self._pair.flush()
        return self.size > 0

    def _look_for_room(self) -> bool:
        """Look whether the peer has read on since the last turn of the loop."""
        connection = self._connection
        consumer = self._pair.newest_consumer(
            connection.rmb.handle, connection.alert_token
        )
        return consumer >= 0 and connection.follow_consumer(consumer)

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        self.size = 0

    def _keep(self, data: Buffer) -> None:
        """Queue bytes; small ones grow together into one piece."""
        waiting = self._waiting
        self.size += len(data)
        if len(data) >= SMALL_BYTES:
            waiting.append(bytes(data))
            return
        last = waiting[-1]
        if isinstance(last, bytearray) and len(last) < SLICE_BYTES:
            last += data
        else:
            waiting.append(bytearray(data))

    def _announce(self, spans: Spans) -> None:
        """Write one slice where it was claimed, and publish it."""
        connection, pair = self._connection, self._pair
        for address, length in spans:
            self._post(connection.remote_rkey, address, length)
        if connection.update_due:
            connection.published(pair.publish(*connection.take_post()))

    def _post(self, rkey: int, address: int, length: int) -> None:
        """Write the first bytes that wait to one place."""
        waiting, pair = self._waiting, self._pair
        self.size -= length
        while length:
            view = memoryview(waiting[0])
            size = len(view)
            if size > length:
                pair.post_write(rkey, address, view[:length])
                waiting[0] = view[length:]
                return
            pair.post_write(rkey, address, view)
            waiting.popleft()
            address += size
            length -= size
