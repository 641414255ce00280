"""Demands on a loop that no other test asks: calls, settings, logs and clocks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import pysmc
from pysmc.aio.negotiation import Negotiation
from pysmc.config import Config
from pysmc.testing.loops import SimLoop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

HOST = "127.0.0.1"
PATIENCE = 20.0
MODE = pytest.mark.parametrize("mode", ["smcr", "tcp"])


class End(asyncio.Protocol):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.pieces: list[bytes] = []
        self.calls: list[str] = []

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.pieces.append(data)

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append("lost")


async def until(done: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not done():
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def connected(
    sock: socket.socket | None = None,
) -> AsyncIterator[tuple[End, End]]:
    """Connect two ends in the running loop; afterwards both are closed."""
    loop = asyncio.get_running_loop()
    served = End()
    server = await loop.create_server(lambda: served, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    if sock is None:
        _, client = await loop.create_connection(End, HOST, port)
    else:
        await loop.sock_connect(sock, (HOST, port))
        _, client = await loop.create_connection(End, sock=sock)
    await until(lambda: served.transport is not None)
    try:
        yield client, served
    finally:
        for end in (client, served):
            end.transport.close()
        await until(lambda: "lost" in client.calls and "lost" in served.calls)
        server.close()
        await server.wait_closed()


def run(scenario: Callable[[], Coroutine[Any, Any, None]], mode: str = "smcr") -> None:
    """Run a scenario over shared memory, or over TCP for the same reason."""
    config = Config() if mode == "smcr" else Config(discovery=())
    with asyncio.Runner(loop_factory=lambda: pysmc.new_event_loop(config)) as runner:
        runner.run(scenario())


@MODE
def test_options_of_a_socket_hold_on_both_paths(mode) -> None:
    options = [
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 9000),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, 7000),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
    ]

    async def scenario() -> None:
        sock = socket.socket()
        sock.setblocking(False)
        for level, name, value in options:
            sock.setsockopt(level, name, value)
        before = [sock.getsockopt(level, name) for level, name, _ in options]
        async with connected(sock) as (client, _):
            assert client.transport.get_extra_info("smc").mode == mode
            now = client.transport.get_extra_info("socket")
            assert [now.getsockopt(level, name) for level, name, _ in options] == before

    run(scenario, mode)


@MODE
@pytest.mark.parametrize("bytes_before", [0, 10, 3_000_000])
def test_a_write_that_raises_takes_nothing(mode, bytes_before) -> None:
    """Half of it would be a hole in the stream that nobody sees."""

    async def scenario() -> None:
        async with connected() as (client, served):
            released = memoryview(b"released")
            released.release()
            before = b"b" * bytes_before
            client.transport.write(before)
            for wrong in (released, "text", None, [1, 2]):
                size = client.transport.get_write_buffer_size()
                with pytest.raises((ValueError, TypeError)):
                    client.transport.write(wrong)
                assert client.transport.get_write_buffer_size() == size
            with pytest.raises(TypeError):
                client.transport.writelines([b"never", 7])
            client.transport.write(b"after")
            await until(lambda: len(served.data) >= bytes_before + 5)
            assert served.data == before + b"after"

    run(scenario, mode)


@MODE
def test_nothing_empty_is_delivered_and_a_pause_has_one_end(mode) -> None:
    async def scenario() -> None:
        async with connected() as (client, served):
            served.transport.pause_reading()
            total = 0
            while client.calls != ["pause"]:
                client.transport.write(b"x" * 60_000)
                client.transport.write(b"")
                total += 60_000
            for _ in range(20):  # whatever may come at any turn
                await asyncio.sleep(0)
            assert served.pieces == []
            served.transport.resume_reading()
            await until(lambda: len(served.data) == total)
            await until(lambda: client.calls != ["pause"])
            assert client.calls == ["pause", "resume"]
            assert all(served.pieces)

    run(scenario, mode)


class Stuck:
    """A socket that takes no second message until it is told to.

    Args:
        sock: What it stands in front of.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.messages = 0
        self.is_free = False
        self.is_stuck = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def send(self, data: bytes) -> int:
        self.messages += 1
        if self.messages > 1 and not self.is_free:
            self.is_stuck = True
            raise BlockingIOError
        return self.sock.send(data[:40])


@pytest.mark.parametrize("then", ["sent", "closed"])
def test_a_confirm_that_is_still_in_the_senders_hands(monkeypatch, then) -> None:
    """On a reused link the client has all it needs once the Confirm is ordered."""
    made = Negotiation.__init__
    stuck: list[Stuck] = []

    def slowly(
        self: Any, driver: Any, sock: Any, role: str, *rest: Any, **options: Any
    ) -> None:
        if role == "client":
            stuck.append(Stuck(sock))
            sock = stuck[-1]
        made(self, driver, sock, role, *rest, **options)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        async with connected() as (first, _):
            served = End()
            server = await loop.create_server(lambda: served, HOST, 0)
            port = server.sockets[0].getsockname()[1]
            monkeypatch.setattr(Negotiation, "__init__", slowly)
            connecting = loop.create_task(loop.create_connection(End, HOST, port))
            try:
                await go_on(loop, connecting, served)
            finally:
                server.close()
                await server.wait_closed()
            assert first.transport.get_extra_info("smc").mode == "smcr"

    async def go_on(loop: SimLoop, connecting: asyncio.Task[Any], served: End) -> None:
        await until(lambda: stuck and stuck[0].is_stuck)
        assert not connecting.done()
        assert [served.transport] == [None]
        if then == "sent":
            stuck[0].is_free = True
            transport, _ = await connecting
            await until(lambda: served.transport is not None)
            assert served.transport.get_extra_info("smc").mode == "smcr"
            transport.close()
            await until(lambda: "lost" in served.calls)
        else:
            connecting.cancel()
            await asyncio.wait([connecting])
        await until(lambda: loop.driver.endpoint.handshake_count == 0)
        assert served.calls == (["lost"] if then == "sent" else [])

    config = Config(confirm_wait=1.0)
    with asyncio.Runner(loop_factory=lambda: SimLoop(config)) as runner:
        runner.get_loop().set_exception_handler(lambda *_: None)
        runner.run(scenario())


class Raising(logging.Handler):
    """A handler of a program, whose disk is full."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        try:
            os.write(-1, b"no such file")
        except OSError:
            self.handleError(record)


def test_a_log_that_cannot_be_written_costs_no_byte(capsys) -> None:
    """On every way to SMC-R and to TCP, with everything logged."""
    handler = Raising()
    logs = [logging.getLogger(name) for name in ("pysmc", "asyncio")]
    levels = [log.level for log in logs]
    for log in logs:
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)

    async def scenario() -> None:
        asyncio.get_running_loop().set_debug(True)
        async with connected() as (client, served):
            client.transport.write(b"hello")
            await until(lambda: served.data == b"hello")

    try:
        for mode in ("smcr", "tcp"):
            run(scenario, mode)
        with asyncio.Runner(loop_factory=lambda: SimLoop(Config())) as runner:
            runner.run(scenario())
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.removeHandler(handler)
            log.setLevel(level)
    assert handler.texts
    assert "Bad file descriptor" in capsys.readouterr().err


def test_a_clock_that_jumps_is_not_looked_at(monkeypatch) -> None:
    jumps = (86_400.0 * day * (-1) ** day for day in itertools.count())
    monkeypatch.setattr(time, "time", lambda: next(jumps))

    async def scenario() -> None:
        async with connected() as (client, served):
            assert client.transport.get_extra_info("smc").mode == "smcr"
            client.transport.write(b"hello")
            await until(lambda: served.data == b"hello")

    run(scenario)


def test_the_packages_can_be_loaded_twice() -> None:
    """What is registered once for a process is not in the way of a second time."""
    program = (
        "import importlib, os, pysmc, pysmc.aio.driver, pysmc.fabric.shm\n"
        "for module in (pysmc.fabric.shm, pysmc.aio.driver, pysmc):\n"
        "    importlib.reload(module)\n"
        "device = pysmc.fabric.shm.ShmDevice(b'8 bytes.')\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(0 if device.forked else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "device.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
