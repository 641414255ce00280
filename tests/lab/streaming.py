"""What the process of an end does: stream both ways, obey orders, tell how it went.

Each connection carries a position-coded flow in each direction, named after the TCP
port of the client: whatever is lost, doubled, swapped or foreign is found, and located.
Orders and answers are JSON, one a line, over a socket. An order that fails answers with
the error's name, text and reason.
"""

# ruff: noqa: ASYNC230, ASYNC240  # nothing else waits while facts are collected

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pysmc
from pysmc.testing.simulation.stream import Flow, Flows, Receiver

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

__all__ = ["be_an_end"]

CHUNK_BYTES = 32 * 1024
CHUNKS_PER_TURN = 4


class Callback(NamedTuple):
    """One callback of a loop, and what it took."""

    wall: float = 0.0
    cpu: float = 0.0
    name: str = ""


class Longest:
    """Measures every callback of every loop of this process, and keeps the longest."""

    def __init__(self) -> None:
        self.by_wall = Callback()
        self.by_cpu = Callback()
        self._run = asyncio.Handle._run

    def install(self) -> None:
        """Put the measurement around `asyncio.Handle`."""
        run = self._run

        def measured(handle: asyncio.Handle) -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            run(handle)
            self._take(handle, time.perf_counter() - wall, time.thread_time() - cpu)

        asyncio.Handle._run = measured  # type: ignore[method-assign, assignment]

    def _take(self, handle: asyncio.Handle, wall: float, cpu: float) -> None:
        if wall > self.by_wall.wall:
            self.by_wall = Callback(wall, cpu, _name_of(handle))
        if cpu > self.by_cpu.cpu:
            self.by_cpu = Callback(wall, cpu, _name_of(handle))

    def forget(self) -> None:
        """Begin anew."""
        self.by_wall = self.by_cpu = Callback()


def _name_of(handle: asyncio.Handle) -> str:
    callback = getattr(handle, "_callback", None)
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return getattr(owner.get_coro(), "__qualname__", "a task")
    return getattr(callback, "__qualname__", repr(callback))


class Stream(asyncio.Protocol):
    """Sends one flow and follows another.

    Args:
        role: "client" or "server".
        total: Bytes to send, then comes the end of the stream; None is without end.
    """

    def __init__(self, role: str, total: int | None) -> None:
        self._role = role
        self.total = total
        self._may_write = False
        self._is_through = False
        self._eof_came = False
        self.info: Any = None
        self.wrong: str | None = None
        self.error: BaseException | None = None
        self.lost_count = 0
        self.ended_at = 0.0
        self.changed = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        """Begin to send."""
        self.transport = transport
        self.info = transport.get_extra_info("smc")
        ends = {"client": "sockname", "server": "peername"}
        port = transport.get_extra_info(ends[self._role])[1]
        there = "server" if self._role == "client" else "client"
        self.sent = Flow(f"{port}/{self._role}")
        self._expected = Flow(f"{port}/{there}")
        self._receiver = Receiver(self._expected, Flows(str(port)))
        self.resume_writing()

    @property
    def received(self) -> int:
        """Bytes that came, all of them right."""
        return self._receiver.position

    def go_on(self, total: int | None) -> None:
        """Send more than was said at first."""
        self.total = total
        self._is_through = False
        self._send()

    def pause_writing(self) -> None:
        """Send no more for now."""
        self._may_write = False

    def resume_writing(self) -> None:
        """Send again."""
        self._may_write = True
        self._send()

    def _send(self) -> None:
        if self.total == 0 or self._is_through:
            return
        for _ in range(CHUNKS_PER_TURN):
            if not self._may_write or self.transport.is_closing():
                return
            left = CHUNK_BYTES
            if self.total is not None:
                left = min(left, self.total - self.sent.position)
            if left == 0:
                self._is_through = True
                self.transport.write_eof()
                self._close_when_over()
                return
            self.transport.write(self.sent.take(left))
        asyncio.get_running_loop().call_soon(self._send)

    def data_received(self, data: bytes) -> None:
        """Follow the other flow."""
        # What the other end has taken is known over there alone.
        self._expected.position = self.received + len(data)
        wrong = self._receiver.receive(data)
        self.wrong = self.wrong or wrong
        self.changed.set()

    def eof_received(self) -> bool:
        """Keep our own direction open."""
        self._eof_came = True
        self.changed.set()
        self._close_when_over()
        return True

    def _close_when_over(self) -> None:
        if self._eof_came and (self._is_through or self.total == 0):
            self.transport.close()

    def connection_lost(self, error: BaseException | None) -> None:
        """Remember how it ended, and when."""
        self.lost_count += 1
        self.error = error
        self.ended_at = time.monotonic()
        self.changed.set()

    async def wait(self, is_so: Callable[[Stream], bool]) -> None:
        """Wait until something is so of this stream, or until it has ended."""
        while not (is_so(self) or self.lost_count):
            self.changed.clear()
            await self.changed.wait()

    def record(self) -> dict[str, Any]:
        """Tell how it went."""
        error = self.error
        return {
            "info": None if self.info is None else asdict(self.info),
            "sent": self.sent.position,
            "received": self.received,
            "eof": self._eof_came,
            "wrong": self.wrong,
            "lost_count": self.lost_count,
            "error": None if error is None else type(error).__name__,
            "text": "" if error is None else str(error),
            "is_connection_error": isinstance(error, ConnectionError),
            "ended_at": self.ended_at,
        }


class Obedience:
    """Carries out orders in the process of an end; each ``do_`` method is one."""

    def __init__(self, hosts: tuple[str, str], longest: Longest) -> None:
        self._server_host, self._client_host = hosts
        self._longest = longest
        self._servers: list[asyncio.Server] = []
        self._streams: list[Stream] = []

    def _new(self, role: str, total: int | None) -> Stream:
        stream = Stream(role, total)
        self._streams.append(stream)
        return stream

    async def do_serve(self, total: int | None = None) -> dict[str, Any]:
        """Listen; gives the port."""
        loop = asyncio.get_running_loop()
        host = self._server_host
        server = await loop.create_server(lambda: self._new("server", total), host, 0)
        self._servers.append(server)
        return {"port": server.sockets[0].getsockname()[1]}

    async def do_connect(
        self, port: int, count: int = 1, total: int | None = None
    ) -> dict[str, Any]:
        """Open connections, all at once; gives what each says."""
        loop = asyncio.get_running_loop()

        async def connect() -> Stream:
            _, stream = await loop.create_connection(
                lambda: self._new("client", total),
                self._server_host,
                port,
                local_addr=(self._client_host, 0),
            )
            return stream

        streams = await asyncio.gather(*(connect() for _ in range(count)))
        return {"infos": [asdict(stream.info) for stream in streams]}

    async def do_cancel_connects(
        self, port: int, count: int, turns: int
    ) -> dict[str, Any]:
        """Begin connections and cancel each after so many turns of the loop more."""
        ended = []
        for number in range(count):
            task = asyncio.ensure_future(self.do_connect(port))
            for _ in range(1 + number * turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            ended.append("cancelled" if task.cancelled() else "connected")
        return {"ended": ended}

    async def do_go_on(self, total: int | None = None) -> dict[str, Any]:
        """Let streams that were idle send."""
        for stream in self._streams:
            stream.go_on(total)
        return {}

    async def do_reach(self, received: int) -> dict[str, Any]:
        """Wait until every stream has received so much, or has ended."""
        for stream in self._streams:
            await stream.wait(lambda stream: stream.received >= received)
        return {"received": [stream.received for stream in self._streams]}

    async def do_records(self, count: int = 1) -> dict[str, Any]:
        """Wait for the end of so many streams; gives and forgets them all."""
        while len(self._streams) < count:
            await asyncio.sleep(0.02)
        for stream in self._streams:
            await stream.wait(lambda _: False)
        found, self._streams = self._streams, []
        return {"records": [stream.record() for stream in found]}

    async def do_fork(self, host: str) -> dict[str, Any]:
        """Fork, and let the child try to use what is the parent's."""
        loop = asyncio.get_running_loop()
        answers, answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            refused = _refusals(loop, self._streams[0].transport, host)
            os.write(answer, json.dumps(refused).encode())
            os._exit(0)
        os.close(answer)
        with open(answers, "rb") as pipe:  # a descriptor has no path
            text = await loop.run_in_executor(None, pipe.read)
        _, status = await loop.run_in_executor(None, os.waitpid, pid, 0)
        return {"refused": json.loads(text), "code": os.waitstatus_to_exitcode(status)}

    async def do_close(self) -> dict[str, Any]:
        """Close every connection."""
        for stream in self._streams:
            stream.transport.close()
        return {}

    async def do_groups_end(self) -> dict[str, Any]:
        """Wait until this process has no link group; tells when that was so."""
        loop: Any = asyncio.get_running_loop()
        while loop.driver.endpoint.groups:
            await asyncio.sleep(0.02)
        return {"at": time.monotonic()}

    async def do_facts(self) -> dict[str, Any]:
        """Tell what this process holds, and its longest callbacks so far."""
        gc.collect()
        kinds = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                kinds.append(entry.readlink().name.rstrip("0123456789[]"))
        return {
            "tasks": len(asyncio.all_tasks()),
            "descriptors": sorted(kinds),
            "by_wall": self._longest.by_wall._asdict(),
            "by_cpu": self._longest.by_cpu._asdict(),
        }

    async def do_forget_callbacks(self) -> dict[str, Any]:
        """Measure callbacks anew."""
        self._longest.forget()
        return {}

    async def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order; an error is an answer too."""
        method = getattr(self, "do_" + order.pop("do"))
        try:
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

    def close(self) -> None:
        """End what is open."""
        for server in self._servers:
            server.close()
        for stream in self._streams:
            stream.transport.close()


def _refusals(
    loop: asyncio.AbstractEventLoop, transport: Any, host: str
) -> dict[str, str]:
    """Try what a forked child may not do; gives what came of it."""
    uses = {
        "write": lambda: transport.write(b"x"),
        "close": transport.close,
        "connect": lambda: loop.create_connection(asyncio.Protocol, host, 1).send(None),
    }
    refused = {}
    for name, use in uses.items():
        try:
            refused[name] = f"was allowed: {use()!r}"
        except Exception as error:  # noqa: BLE001  # told to the parent
            refused[name] = f"{type(error).__name__}: {error}"
    return refused


async def _take_orders(channel: socket.socket, obedience: Obedience) -> None:
    reader, writer = await asyncio.open_connection(sock=channel)
    while line := await reader.readline():
        answer = await obedience.obey(json.loads(line))
        writer.write(json.dumps(answer).encode() + b"\n")
    obedience.close()
    writer.close()


def be_an_end(
    channel: socket.socket,
    hosts: tuple[str, str],
    config: pysmc.Config,
    kind: type[Obedience] = Obedience,
) -> None:
    """Obey until no more orders come.

    Args:
        channel: Where orders come from.
        hosts: Addresses of the server and of the client.
        config: Of the loop.
        kind: What it can do.
    """
    longest = Longest()
    longest.install()
    pysmc.run(_take_orders(channel, kind(hosts, longest)), config=config)
