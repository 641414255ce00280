"""Files over SMC-R: out of the page cache into the peer's memory, without threads.

Decides how a file is cut and when to wait. asyncio's own way for transports without a
socket reads 16 KiB at a time in a thread; a stock TCP transport calls sendfile(2),
which waits for the disk in the loop's thread just as the reads here do.

Reference: the asyncio documentation, ``loop.sendfile``.
"""

from __future__ import annotations

import asyncio
import io
import os
from typing import IO, TYPE_CHECKING, Any, NoReturn

from pysmc.aio import cpython

if TYPE_CHECKING:
    from pysmc.aio.transport import SmcTransport
    from pysmc.aio.write_queue import Buffer

__all__ = ["can_send", "send_file"]

BLOCK_BYTES = 64 * 1024
"""One read: below glibc's mmap threshold, and one slice of the transport."""
BLOCKS_PER_TURN = 16
"""Blocks that are sent before other tasks get their turn."""


def can_send(file: Any) -> bool:
    """Whether a file has a descriptor that can be read at a position."""
    try:
        os.pread(file.fileno(), 0, 0)
    except (AttributeError, OSError, io.UnsupportedOperation):
        return False
    return True


async def send_file(
    transport: SmcTransport, file: IO[bytes], offset: int, count: int | None
) -> int:
    """Send a regular file; the protocol gets nothing and reads nothing meanwhile.

    Args:
        transport: Where to.
        file: Opened for reading bytes; its position is left behind what was sent.
        offset: Where to begin, in bytes.
        count: How many bytes at most; None is up to the end.

    Returns:
        The number of bytes that were sent.

    Raises:
        ConnectionError: The connection ended before all was sent.
        RuntimeError: Another file is on its way; and what writes meanwhile gets it too.
    """
    descriptor, sent = file.fileno(), 0
    loop = asyncio.get_running_loop()
    write = transport.write
    if write is _refuse_to_write:
        _refuse_to_write(b"")
    guard = cpython.guard_protocol(transport)
    # In the instance: writes at other times pay nothing for it.
    transport.write = _refuse_to_write  # type: ignore[method-assign]
    try:
        while True:
            for _ in range(BLOCKS_PER_TURN):
                size = BLOCK_BYTES if count is None else min(BLOCK_BYTES, count - sent)
                block = os.pread(descriptor, size, offset + sent) if size else b""
                if not block:
                    if not transport.is_closing():
                        # The protocol that comes back does not know of our pause.
                        await guard.drain()
                    return sent
                await guard.drain()
                write(block)
                sent += len(block)
            turn = loop.create_future()
            loop.call_soon(_end_turn, turn)
            await turn
    finally:
        del transport.write
        if sent and file.seekable():
            file.seek(offset + sent)
        await guard.restore()


def _refuse_to_write(data: Buffer) -> NoReturn:
    """As asyncio: bytes in the middle of a file would be nowhere in particular."""
    del data
    message = "unable to write; sendfile is in progress"
    raise RuntimeError(message)


def _end_turn(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
