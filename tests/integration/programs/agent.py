"""A program that takes orders: serve, connect, talk, report.

Orders and answers are JSON, one a line, over standard input and output. An order that
fails answers with the error's name, text and reason. Everything on the loop is plain
asyncio; which loop it is, and what the process may do, are options.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import argparse
import asyncio
import codecs
import ctypes
import gc
import hashlib
import json
import os
import random
import resource
import socket
import struct
import sys
import tracemalloc
from dataclasses import asdict
from typing import Any

import psutil
from both_ways import BothWays  # type: ignore[import-not-found]
from position_code import (  # type: ignore[import-not-found]
    BLOCK_BYTES,
    Checker,
    PositionCode,
)

# A process of another user may not be able to load these later.
import pysmc
import pysmc.aio.loop
import pysmc.fabric.shm
from pysmc.testing.invariants import install_if_asked

PATIENCE = 25.0
"""Seconds that one order may take."""
HOST = "127.0.0.1"

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22
SECCOMP_MODE_FILTER = 2
SYS_MEMFD_CREATE = {"x86_64": 319, "aarch64": 279}
BPF_LOAD, BPF_EQUAL, BPF_RETURN = 0x20, 0x15, 0x06
SECCOMP_ALLOW, SECCOMP_ERRNO = 0x7FFF0000, 0x00050000
EPERM = 1


class Agent:
    """Carries out orders; each ``do_`` method is one."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._accepted: list[dict[str, Any]] = []
        self._both_ways: list[BothWays] = []
        self._changed = asyncio.Condition()
        self._opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._handling: set[asyncio.Task[Any]] = set()

    # Server

    async def do_serve(
        self,
        kind: str = "echo",
        host: str = HOST,
        port: int = 0,
        reuse_port: bool = False,
        descriptor: int = -1,
    ) -> dict[str, Any]:
        """Listen; gives the port."""
        options: dict[str, Any] = {"host": host, "port": port, "backlog": 2048}
        if reuse_port:
            options["reuse_port"] = True
        if descriptor >= 0:
            options = {"sock": socket.socket(fileno=descriptor)}
        if kind == "both_ways":
            loop = asyncio.get_running_loop()
            server = await loop.create_server(self._make_both_ways, **options)
        else:
            server = await asyncio.start_server(getattr(self, kind), **options)
        self._servers.append(server)
        return {"port": server.sockets[0].getsockname()[1]}

    def _make_both_ways(self) -> BothWays:
        protocol = BothWays(0)
        self._both_ways.append(protocol)
        return protocol

    async def echo(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Give back what comes."""
        record = await self._begin(writer)
        try:
            while data := await reader.read(1 << 16):
                record["received"] += len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError as error:
            record["error"] = type(error).__name__
        finally:
            await self._end(record, writer)

    async def greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Speak first, like SMTP; then echo lines until QUIT."""
        record = await self._begin(writer)
        writer.write(b"220 ready\r\n")
        while (line := await reader.readline()) not in {b"QUIT\r\n", b""}:
            record["received"] += len(line)
            writer.write(b"250 " + line)
            await writer.drain()
        writer.write(b"221 bye\r\n")
        await self._end(record, writer)

    async def hash(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Check a position-coded stream to its end, and answer with its hash."""
        record = await self._begin(writer)
        digest, checker = hashlib.sha256(), Checker()
        while data := await reader.read(1 << 20):
            digest.update(data)
            checker.take(data)
        record |= {"received": checker.received, "wrong_at": checker.wrong_at}
        writer.write(digest.hexdigest().encode())
        await self._end(record, writer)

    async def _begin(self, writer: asyncio.StreamWriter) -> dict[str, Any]:
        info = writer.get_extra_info("smc")
        record: dict[str, Any] = {
            "info": None if info is None else asdict(info),
            "received": 0,
            "error": None,
            "ended": False,
        }
        async with self._changed:
            self._accepted.append(record)
            self._changed.notify_all()
        return record

    async def _end(self, record: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError as error:
            record["error"] = type(error).__name__
        async with self._changed:
            record["ended"] = True
            self._changed.notify_all()

    async def do_accepted(self, count: int = 0, ended: bool = False) -> dict[str, Any]:
        """Wait for so many connections (or their ends); gives and forgets them all."""

        def is_enough() -> bool:
            some = [one for one in self._accepted if one["ended"] or not ended]
            return len(some) >= count

        async with self._changed:
            await self._changed.wait_for(is_enough)
        found, self._accepted = self._accepted, []
        return {"connections": found}

    async def do_stop(self) -> dict[str, Any]:
        """Close every listener."""
        for server in self._servers:
            server.close()
            await server.wait_closed()
        self._servers.clear()
        return {}

    # Client

    async def do_connect(
        self, port: int, host: str = HOST, count: int = 1, local: str = ""
    ) -> dict[str, Any]:
        """Open connections, all at once, and keep them; gives what each says."""
        options: dict[str, Any] = {"local_addr": (local, 0)} if local else {}
        opening = [asyncio.open_connection(host, port, **options) for _ in range(count)]
        opened = await asyncio.gather(*opening)
        self._opened += opened
        infos = [writer.get_extra_info("smc") for _, writer in opened]
        return {"infos": [None if info is None else asdict(info) for info in infos]}

    async def do_talk(self, size: int = 1000, rounds: int = 1) -> dict[str, Any]:
        """Send bytes over every open connection, all at once, and compare the echo."""

        async def talk(
            number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> bool:
            noise = random.Random(number)
            equal = True
            for _ in range(rounds):
                data = noise.randbytes(size)
                writer.write(data)
                equal &= await reader.readexactly(size) == data
            return equal

        talking = [talk(number, *one) for number, one in enumerate(self._opened)]
        return {"equal": sum(await asyncio.gather(*talking))}

    async def do_close(self) -> dict[str, Any]:
        """Close every open connection."""
        for _, writer in self._opened:
            writer.close()
        for _, writer in self._opened:
            await writer.wait_closed()
        count = len(self._opened)
        self._opened.clear()
        return {"closed": count}

    async def do_lines(self, lines: list[str]) -> dict[str, Any]:
        """Read a line from the open connection, then one after each line sent."""
        reader, writer = self._opened[0]
        answers = [await reader.readline()]
        for line in lines:
            writer.write(line.encode() + b"\r\n")
            answers.append(await reader.readline())
        return {"answers": [answer.decode() for answer in answers]}

    async def do_greetings(self) -> dict[str, Any]:
        """Read a line from every open connection; gives it with the own TCP port."""
        greetings = []
        for reader, writer in self._opened:
            line = (await reader.readline()).decode()
            greetings.append([line, writer.get_extra_info("sockname")[1]])
        return {"greetings": greetings}

    async def do_upload(self, total: int) -> dict[str, Any]:
        """Send a position-coded stream over the open connection; gives both hashes."""
        ((reader, writer),) = self._opened
        digest, code = hashlib.sha256(), PositionCode()
        for number in range(0, total // BLOCK_BYTES, 16):
            data = b"".join(map(code.block, range(number, number + 16)))
            writer.write(data)
            digest.update(data)
            await writer.drain()
        writer.write_eof()
        return {"sent": digest.hexdigest(), "got": (await reader.read()).decode()}

    async def do_cycles(self, port: int, count: int, at_once: int) -> dict[str, Any]:
        """Connect, echo and close, many times over; gives how the connections went."""
        left = iter(range(count))
        modes: dict[str, int] = {}
        wrong = 0

        async def cycle() -> None:
            nonlocal wrong
            for number in left:
                data = number.to_bytes(8, "big") * 25
                reader, writer = await asyncio.open_connection(HOST, port)
                info = writer.get_extra_info("smc")
                name = info.mode if info.reason is None else info.reason.name
                modes[name] = modes.get(name, 0) + 1
                writer.write(data)
                wrong += await reader.readexactly(len(data)) != data
                writer.close()
                await writer.wait_closed()

        await asyncio.gather(*(cycle() for _ in range(at_once)))
        return {"modes": modes, "wrong": wrong}

    async def do_both_ways(self, port: int) -> dict[str, Any]:
        """Connect a stream each way, and wait for the connection's end."""
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(lambda: BothWays(1), HOST, port)
        await protocol.ended
        record: dict[str, Any] = protocol.record()
        return record

    async def do_streams(self) -> dict[str, Any]:
        """Wait for the end of all accepted streams; gives and forgets them."""
        for protocol in self._both_ways:
            await protocol.ended
        records = [protocol.record() for protocol in self._both_ways]
        self._both_ways.clear()
        return {"records": records}

    # Report

    async def do_facts(self) -> dict[str, Any]:
        """Tell what this process holds, after a collection of garbage."""
        gc.collect()
        return {
            "tasks": len(asyncio.all_tasks()),
            "rss": psutil.Process().memory_info().rss,
            "traced": tracemalloc.get_traced_memory()[0],
        }

    # Orders

    async def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order; an error is an answer too."""
        method = getattr(self, "do_" + order.pop("do"))
        try:
            async with asyncio.timeout(PATIENCE):
                answer: dict[str, Any] = await method(**order)
        except Exception as error:  # noqa: BLE001  # told to whoever gave the order
            reason = getattr(error, "reason", None)
            return {
                "error": type(error).__name__,
                "text": str(error),
                "is_connection_error": isinstance(error, ConnectionError),
                "reason": reason and asdict(reason),
            }
        return answer


async def main() -> None:
    """Take orders until standard input ends."""
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(orders)
    pipe, _ = await loop.connect_read_pipe(lambda: protocol, sys.stdin)
    agent = Agent()
    print(json.dumps({"ready": True}), flush=True)
    while line := await orders.readline():
        print(json.dumps(await agent.obey(json.loads(line))), flush=True)
    pipe.close()
    await agent.do_close()
    await agent.do_stop()


def forbid_memfd() -> None:
    """Let memfd_create fail with EPERM from now on, by a seccomp filter."""
    number = SYS_MEMFD_CREATE[os.uname().machine]
    rules = [
        struct.pack("HBBI", BPF_LOAD, 0, 0, 0),
        struct.pack("HBBI", BPF_EQUAL, 0, 1, number),
        struct.pack("HBBI", BPF_RETURN, 0, 0, SECCOMP_ERRNO | EPERM),
        struct.pack("HBBI", BPF_RETURN, 0, 0, SECCOMP_ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(rules))
    address = ctypes.addressof(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules), address))
    libc = ctypes.CDLL(None, use_errno=True)
    for order in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0),
    ):
        words = [ctypes.c_ulong(word) for word in order]
        if libc.prctl(*words):
            sys.exit(f"seccomp: {os.strerror(ctypes.get_errno())}")


def restrict(options: argparse.Namespace) -> None:
    """Take away from this process what the options name."""
    if options.eid:
        # Another network namespace, as far as the fabric can tell.
        pysmc.fabric.shm.host_eid = lambda: options.eid
    if options.no_memfd:
        forbid_memfd()
    if options.fsize is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.fsize, options.fsize))
    if options.nofile is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.nofile, options.nofile))
    if options.soft_nofile is not None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.soft_nofile, hard))
    if options.uid is not None:
        for codec in ("ascii", "idna"):
            codecs.lookup(codec)
        os.setgid(options.uid)
        os.setuid(options.uid)
    if options.tracemalloc:
        tracemalloc.start()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--eid", default="")
    parser.add_argument("--uid", type=int)
    parser.add_argument("--nofile", type=int)
    parser.add_argument("--soft-nofile", type=int)
    parser.add_argument("--fsize", type=int)
    parser.add_argument("--no-memfd", action="store_true")
    parser.add_argument("--tracemalloc", action="store_true")
    options = parser.parse_args()
    install_if_asked()
    restrict(options)
    if options.stock:
        asyncio.run(main())
    else:
        pysmc.run(main())
