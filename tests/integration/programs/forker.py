# ruff: noqa: T201  # a program answers on standard output
"""Forks while a connection is in use: the child is refused, the parent goes on.

The argument is the port of an echo server. Prints one JSON object: what the child met,
and how the parent's connections went on.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
from typing import Any

import pysmc

HOST = "127.0.0.1"


async def echo(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seed: int
) -> bool:
    """Send a megabyte and compare what comes back."""
    data = random.Random(seed).randbytes(1 << 20)
    writer.write(data)
    return await reader.readexactly(len(data)) == data


async def a_new_loop(port: int) -> list[Any]:
    """Connect from a loop of the child's own."""
    reader, writer = await asyncio.open_connection(HOST, port)
    equal = await echo(reader, writer, 1)
    mode = writer.get_extra_info("smc").mode
    writer.close()
    await writer.wait_closed()
    return [mode, equal]


async def main(port: int) -> dict[str, Any]:
    """Fork in the middle of a transfer."""
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(HOST, port)
    before = random.Random(0).randbytes(1 << 22)
    writer.write(before)
    received = await reader.readexactly(1 << 20)
    answers, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(answer, json.dumps(child(loop, writer, port)).encode())
        os._exit(0)
    os.close(answer)
    received += await reader.readexactly(len(before) - len(received))
    found = json.loads(await loop.run_in_executor(None, os.read, answers, 1 << 16))
    _, status = await loop.run_in_executor(None, os.waitpid, pid, 0)
    os.close(answers)
    again = await a_new_loop(port)
    result = {
        "child": found,
        "child_status": status,
        "parent_equal": received == before,
        "parent_goes_on": await echo(reader, writer, 2),
        "parent_connects": again,
    }
    writer.close()
    await writer.wait_closed()
    return result


def child(
    loop: asyncio.AbstractEventLoop, writer: asyncio.StreamWriter, port: int
) -> dict[str, Any]:
    """Be the child: everything of the parent is refused, a loop of its own works."""
    listener = socket.create_server((HOST, 0))
    uses = {
        "write": lambda: writer.write(b"x"),
        "write_eof": writer.write_eof,
        "close": writer.close,
        "connect": lambda: loop.create_connection(asyncio.Protocol, HOST, port).send(
            None
        ),
        "serve": lambda: loop.create_server(asyncio.Protocol, sock=listener).send(None),
    }
    refused = {}
    for name, use in uses.items():
        try:
            refused[name] = f"was allowed: {use()!r}"
        except pysmc.ForkedError as error:
            refused[name] = f"ForkedError: {error}"
        except Exception as error:  # noqa: BLE001  # told to the parent
            refused[name] = repr(error)
    listener.close()
    return {"refused": refused, "own_loop": pysmc.run(a_new_loop(port))}


if __name__ == "__main__":
    print(json.dumps(pysmc.run(main(int(sys.argv[1])))), flush=True)
