"""Two programs of the hostile runs: the victim, and the well-behaved peer beside it.

``hostile_victim.py victim BROKEN`` serves steady peers (echo) on one port and hostile
ones on another, and calls whoever a hostile peer tells it to call. It checks every byte
that a hostile connection delivers: all must carry that connection's mark, or be zero
(memory that was never written, or a hole). BROKEN is empty, or names a check that the
victim is to be without: a test of the runs. ``hostile_victim.py steady PORT`` has its
echo checked byte for byte for as long as it lives.

Orders and answers are lines of JSON.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import random
import socket
import sys
from typing import Any

import pysmc
from pysmc.core.connection import Connection
from pysmc.fabric import shm, shm_link
from tests.fabric.hostile_lines import (
    CONFIG,
    ELEMENT,
    GOOD,
    KIB,
    MOST_SENT,
    first_difference,
    listen,
    make_small_arenas,
    marked,
    piece,
    tell,
)

PAUSE = 0.003
"""Seconds between two rounds of the steady peer."""
SETTLE_EVERY = 0.002
"""Seconds between two looks whether everything is back at rest."""
MARKED = {mark: marked(mark) for mark in range(2, 8)}
"""What may come: mark 1 is memory of no connection, and nobody's bytes."""
ALLOWED = {mark: b"\0" + bytes(range(mark << 4, (mark + 1) << 4)) for mark in MARKED}


class Echo(asyncio.Protocol):
    """Serves a steady peer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Exposed(asyncio.Protocol):
    """One connection with a hostile peer."""

    def __init__(self, victim: Victim) -> None:
        self._victim = victim
        self._mark = 0
        self._received = 0
        self._wrong_at = -1
        self._sent = 0
        self._is_paused = False
        self._mode = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._mode = transport.get_extra_info("smc").mode
        self._victim.open.add(self)
        self._victim.modes[self._mode] = self._victim.modes.get(self._mode, 0) + 1
        self._write()

    def describe(self) -> str:
        """Tell what is known of the connection, for a complaint."""
        core = getattr(self._transport, "_connection", None)
        seen = f"{self._received} received, {self._sent} written"
        return f"{self._transport!r} {core!r} paused={self._is_paused} {seen}"

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._write()

    def _write(self) -> None:
        while not self._is_paused and self._sent < MOST_SENT:
            self._transport.write(piece(GOOD, self._sent, 8 * KIB))
            self._sent += 8 * KIB

    def data_received(self, data: bytes) -> None:
        if not data:
            self._victim.complain("data_received(b'')")
        if not self._mark:
            self._mark = max(data) >> 4
        if self._mark:
            foreign = data.translate(None, ALLOWED.get(self._mark, b"\0"))
            if foreign:
                text = f"bytes of others: {foreign[:16].hex()} with mark {self._mark}"
                self._victim.complain(text)
            self._compare(data)
        self._received += len(data)

    def _compare(self, data: bytes) -> None:
        if self._wrong_at < 0 and self._mark in MARKED:
            expected = piece(MARKED[self._mark], self._received, len(data))
            at = first_difference(data, expected)
            if at >= 0:
                self._wrong_at = self._received + at

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self not in self._victim.open:
            self._victim.complain("connection_lost twice")
        self._victim.open.discard(self)
        if exc is not None and not isinstance(exc, OSError):
            self._victim.complain(f"lost with {exc!r}")
        self._victim.ended.append(
            {
                "mark": self._mark,
                "mode": self._mode,
                "received": self._received,
                "wrong_at": self._wrong_at,
                "error": type(exc).__name__ if exc else "",
            }
        )


class Complaints(logging.Handler):
    """Hears what the library and asyncio hold for errors."""

    def __init__(self, victim: Victim) -> None:
        super().__init__(logging.ERROR)
        self._victim = victim

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self._victim.complain(f"logged: {text[:4000]}")


class Victim:
    """The process that is attacked."""

    def __init__(self, loop: pysmc.Loop) -> None:
        self._loop = loop
        self.open: set[Exposed] = set()
        self.ended: list[dict[str, Any]] = []
        self.modes: dict[str, int] = {}
        self._complaints: list[str] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._rest: dict[str, Any] = {}
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._door.setblocking(False)
        self._door.bind("")
        loop.add_reader(self._door.fileno(), self._knocked)
        logging.getLogger().addHandler(Complaints(self))

    async def serve(self) -> None:
        """Begin, and say where."""
        make = (Echo, lambda: Exposed(self))
        servers = [await self._loop.create_server(one, "127.0.0.1", 0) for one in make]
        ports = [server.sockets[0].getsockname()[1] for server in servers]
        door = self._door.getsockname().hex()
        tell(steady=ports[0], hostile=ports[1], door=door, pid=os.getpid())

    def complain(self, text: str) -> None:
        """Note what must not happen."""
        self._complaints.append(text)

    def _knocked(self) -> None:
        port = int(self._door.recv(16))
        task = self._loop.create_task(self._call(port))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(self, port: int) -> None:
        try:
            make = self._loop.create_connection
            await make(lambda: Exposed(self), "127.0.0.1", port)
        except OSError:
            return  # which way the attempt ends is the hostile peer's choice

    def order(self, order: dict[str, Any]) -> None:
        """Do what the runner says."""
        if order["do"] == "remember":
            self._rest = self._state()
            tell(**self._rest)
        elif order["do"] == "look":
            tell(open=len(self.open))
        else:
            self._settle(self._loop.time() + order["within"])

    def _settle(self, latest: float) -> None:
        """Answer when all is as it was, or too late."""
        state = self._state()
        if state != self._rest and self._loop.time() < latest:
            self._loop.call_later(SETTLE_EVERY, self._settle, latest)
            return
        if state != self._rest:
            left = [each.describe() for each in self.open]
            self.complain(f"not at rest: {state}, before {self._rest}; {left}")
        tell(complaints=self._complaints, ended=self.ended, modes=self.modes)
        self._complaints, self.ended, self.modes = [], [], {}

    def _state(self) -> dict[str, Any]:
        driver = self._loop.driver
        devices: list[Any] = driver.devices
        return {
            "open": len(self.open),
            "calls": len(self._calls),
            "negotiations": len(driver.negotiations),
            "links": len(driver.up),
            "domains": [len(device.domains) for device in devices],
            "descriptors": len(os.listdir("/proc/self/fd")),
            "tasks": len(asyncio.all_tasks(self._loop)),
        }


class Steady(asyncio.Protocol):
    """The peer that behaves, and checks what comes back."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random) -> None:
        self._loop = loop
        self._rng = rng
        self._sent = self._checked = 0
        self._rounds = 0
        self._asked_at: list[int] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        tell(mode=transport.get_extra_info("smc").mode)
        self._write()

    def _write(self) -> None:
        count = self._rng.randrange(1, 24 * KIB)
        self._transport.write(piece(GOOD, self._sent, count))
        self._sent += count

    def data_received(self, data: bytes) -> None:
        at = first_difference(data, piece(GOOD, self._checked, len(data)))
        if at >= 0:
            tell(broken=f"byte {self._checked + at} of the steady stream is wrong")
        self._checked += len(data)
        if self._checked == self._sent:
            self._rounds += 1
            while self._asked_at and self._asked_at[0] < self._rounds - 1:
                self._asked_at.pop(0)
                tell(rounds=self._rounds, bytes=self._checked)
            self._loop.call_later(PAUSE, self._write)

    def order(self, order: dict[str, Any]) -> None:
        """Answer after a whole round that begins from now on."""
        del order
        self._asked_at.append(self._rounds)

    def connection_lost(self, exc: Exception | None) -> None:
        tell(broken=f"the steady connection ended: {exc!r}")


def break_seals() -> None:
    """Map whatever comes."""

    def careless(descriptor: int, *_: Any, **__: Any) -> mmap.mmap:
        return mmap.mmap(descriptor, os.fstat(descriptor).st_size)

    shm_link.map_peer_arena = careless  # type: ignore[attr-defined]


_first: list[Connection] = []


def is_steady(connection: Connection) -> bool:
    """Tell whether a connection is the first of this process, and so the steady one."""
    if not _first:
        _first.append(connection)
    return connection is _first[0]


def break_offsets() -> None:
    """Read what lies behind the element."""
    real = Connection.peek

    def peek(self: Connection, limit: int) -> tuple[int, int]:
        offset, length = real(self, limit)
        return offset if is_steady(self) else offset + ELEMENT - 1, length

    Connection.peek = peek  # type: ignore[method-assign]


def break_queue() -> None:
    """Let a rule of the ring that is broken reach the loop."""
    shm.RuleBroken = ZeroDivisionError  # type: ignore[attr-defined, assignment]


def break_positions() -> None:
    """Deliver one byte of each connection twice."""
    real = Connection.consume
    done: set[int] = set()

    def consume(self: Connection, count: int) -> bool:
        is_wrong = count > 1 and not is_steady(self) and id(self) not in done
        if is_wrong:
            done.add(id(self))
        return real(self, count - is_wrong)

    Connection.consume = consume  # type: ignore[method-assign]


def main() -> None:
    """Run one of the programs until its input ends."""
    make_small_arenas()
    loop = pysmc.new_event_loop(CONFIG)
    if sys.argv[1] == "victim":
        if sys.argv[2]:
            globals()[f"break_{sys.argv[2]}"]()
        victim = Victim(loop)
        loop.run_until_complete(victim.serve())
        listen(loop, victim.order)
    else:
        steady = Steady(loop, random.Random(1))
        port = int(sys.argv[2])
        loop.run_until_complete(
            loop.create_connection(lambda: steady, "127.0.0.1", port)
        )
        listen(loop, steady.order)
    loop.run_forever()


if __name__ == "__main__":
    main()
