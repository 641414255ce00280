# ruff: noqa: T201  # a program answers on standard output
"""A prefork server: the parent has the listening socket, four children have the loops.

Each connection gets one line: the worker's process, how it is carried, and the TCP port
of the client; then its own bytes back. With ``--reuse-port`` each worker has a
listening socket of its own on the same port. Prints the port and the workers'
processes; ends with standard input, or when told by SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys

import pysmc

HOST = "127.0.0.1"
WORKERS = 4


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say who answers, then echo."""
    mode = writer.get_extra_info("smc").mode
    port = writer.get_extra_info("peername")[1]
    writer.write(f"{os.getpid()} {mode} {port}\n".encode())
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def work(listener: socket.socket, ready: int) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with await asyncio.start_server(handle, sock=listener, backlog=1024):
        os.write(ready, b".")
        await stop.wait()


def main(*, reuse_port: bool) -> None:
    """Be the parent."""
    listener = socket.create_server((HOST, 0), reuse_port=reuse_port, backlog=1024)
    port = listener.getsockname()[1]
    read, ready = os.pipe()
    workers = []
    for _ in range(WORKERS):
        pid = os.fork()
        if pid == 0:
            if reuse_port:
                own = socket.create_server((HOST, port), reuse_port=True, backlog=1024)
                listener.close()
                listener = own
            pysmc.run(work(listener, ready))  # the loop starts here, in the child
            os._exit(0)
        workers.append(pid)
    # With SO_REUSEPORT the parent's own listener would get connections as well.
    listener.close()
    for _ in workers:
        os.read(read, 1)
    print(json.dumps({"port": port, "workers": workers}), flush=True)
    sys.stdin.read()
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    print(json.dumps({"codes": codes}), flush=True)


if __name__ == "__main__":
    main(reuse_port="--reuse-port" in sys.argv)
