"""A relay that knows nothing of pysmc: the bytes of its clients go to another port.

Takes that port, prints its own, and ends when its standard input does.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry the bytes of one direction, and their end."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Relay one connection."""
    there = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    try:
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))
    except OSError:
        pass  # one end is gone; both are closed
    finally:
        there[1].close()
        writer.close()


async def main() -> None:
    """Serve until standard input ends."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
