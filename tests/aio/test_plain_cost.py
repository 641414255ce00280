"""What a connection to or from a plain peer costs: not a byte, and which system calls.

The exact bytes are recorded by a proxy; the system calls of connect + one request +
close are counted by strace in a child, on the stock loop and on ours, and each one that
is added has its name here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter

import pytest

import pysmc
from pysmc.config import Config

pytestmark = pytest.mark.load

HOST = "127.0.0.1"
REQUEST = b"GET / HTTP/1.0\r\n\r\n"
ANSWER = b"HTTP/1.0 200 OK\r\n\r\nhello"
CONNECTIONS = 20

# --- bytes


class Server(asyncio.Protocol):
    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data) -> None:
        self.transport.write(ANSWER)
        self.transport.close()


@contextlib.asynccontextmanager
async def recording_proxy(port: int):
    """Forward to a port, from a stock loop's transports; records what passes."""
    loop = asyncio.get_running_loop()
    seen: dict[str, bytearray] = {"up": bytearray(), "down": bytearray()}

    async def forward(reader, writer, record) -> None:
        while data := await reader.read(65536):
            record += data
            writer.write(data)
        if writer.can_write_eof():
            writer.write_eof()

    async def serve(reader, writer) -> None:
        up_reader, up_writer = await asyncio.open_connection(HOST, port)
        async with asyncio.TaskGroup() as group:
            group.create_task(forward(reader, up_writer, seen["up"]))
            group.create_task(forward(up_reader, writer, seen["down"]))
        for one in (writer, up_writer):
            one.close()

    server = await asyncio.start_server(serve, HOST, 0)
    assert not isinstance(loop, pysmc.Loop), "the proxy is plain"
    async with server:
        yield server.sockets[0].getsockname()[1], seen


async def ask(port: int) -> bytes:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(REQUEST)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize("client", ["pysmc", "stock"])
@pytest.mark.parametrize("server", ["pysmc", "stock"])
def test_only_the_applications_bytes_pass(client, server) -> None:
    loops = {"pysmc": pysmc.new_event_loop, "stock": asyncio.new_event_loop}

    def run(kind, coroutine):
        with asyncio.Runner(loop_factory=loops[kind]) as runner:
            return runner.run(coroutine)

    async def serve(ready, done) -> None:
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(Server, HOST, 0)
        ready.set_result(listener.sockets[0].getsockname()[1])
        await asyncio.wrap_future(done)
        listener.close()
        await listener.wait_closed()

    async def scenario() -> None:
        ready: concurrent.futures.Future[int] = concurrent.futures.Future()
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        serving = asyncio.create_task(
            asyncio.to_thread(run, server, serve(ready, done))
        )
        port = await asyncio.wrap_future(ready)
        async with recording_proxy(port) as (proxy_port, seen):
            answer = await asyncio.to_thread(run, client, ask(proxy_port))
        done.set_result(None)
        await serving
        assert answer == ANSWER
        assert seen == {"up": REQUEST, "down": ANSWER}

    with asyncio.Runner() as runner:
        runner.run(scenario())


# --- system calls

CLIENT = """
import asyncio, sys, pysmc
from pysmc.config import Config
async def main(port, count):
    loop = asyncio.get_running_loop()
    class Ask(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport
            transport.write(b"question")
        def data_received(self, data):
            self.transport.close()
        def connection_lost(self, exc):
            self.done.set_result(None)
    for number in range(count + 1):
        if number == 1:
            try: open("/no/such/marker-begin")
            except OSError: pass
        protocol = Ask()
        protocol.done = loop.create_future()
        await loop.create_connection(lambda: protocol, "127.0.0.1", port)
        await protocol.done
    try: open("/no/such/marker-end")
    except OSError: pass
factory = pysmc.new_event_loop if sys.argv[1] == "pysmc" else asyncio.new_event_loop
with asyncio.Runner(loop_factory=factory) as runner:
    runner.run(main(int(sys.argv[2]), int(sys.argv[3])))
"""

SERVER = """
import asyncio, sys, pysmc
async def main(count):
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    seen = []
    class Answer(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport
            seen.append(self)
        def data_received(self, data):
            self.transport.write(b"answer")
        def connection_lost(self, exc):
            if len(seen) == 1:
                try: open("/no/such/marker-begin")
                except OSError: pass
            if len(seen) == count + 1:
                over.set_result(None)
    server = await loop.create_server(Answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await over
    try: open("/no/such/marker-end")
    except OSError: pass
factory = pysmc.new_event_loop if sys.argv[1] == "pysmc" else asyncio.new_event_loop
with asyncio.Runner(loop_factory=factory) as runner:
    runner.run(main(int(sys.argv[2])))
"""

# Everything that a plain connection costs more than on the stock loop, for each one.
ADDED_AT_THE_CLIENT = {
    "connect": 1,  # of a Unix socket to the beacon's name: refused, nobody listens
}
ADDED_AT_THE_SERVER = {
    "getsockopt": 1,  # TCP_SAVED_SYN: was the SYN marked?
}


def _strace_missing() -> str:
    if shutil.which("strace") is None:
        return "needs strace: apt-get install -y strace"
    done = subprocess.run(
        ["strace", "-o", "/dev/null", "true"], capture_output=True, check=False
    )
    return "" if done.returncode == 0 else "needs the right to trace (strace fails)"


needs_strace = pytest.mark.skipif(bool(_strace_missing()), reason=_strace_missing())


def traced(path) -> Counter[str]:
    """Count the system calls between the two markers."""
    lines = path.read_text(errors="replace").splitlines()
    begin = next(i for i, line in enumerate(lines) if "marker-begin" in line)
    end = next(i for i, line in enumerate(lines) if "marker-end" in line)
    names = (re.match(r"(?:\d+ +)?(\w+)\(", line) for line in lines[begin + 1 : end])
    return Counter(match[1] for match in names if match)


def strace(path, code: str, *args) -> subprocess.Popen[str]:
    command = ["strace", "-f", "-o", str(path), sys.executable, "-c", code]
    return subprocess.Popen(
        [*command, *map(str, args)], stdout=subprocess.PIPE, text=True
    )


def added(stock: Counter[str], ours: Counter[str]) -> dict[str, int]:
    """How many calls more each connection makes.

    How often the loop goes round depends on the other end's timing, so what it does
    each time is left out; memory management as well.
    """
    left_out = {"epoll_wait", "mmap", "munmap", "brk", "mremap", "madvise", "futex"}
    names = (stock.keys() | ours.keys()) - left_out
    # The first and the last connection may lie half outside of the markers.
    difference = {
        name: round((ours[name] - stock[name]) / CONNECTIONS) for name in names
    }
    return {name: value for name, value in difference.items() if value}


@needs_strace
@pytest.mark.slow
def test_system_calls_added_at_the_client(tmp_path) -> None:
    counted = {}
    for kind in ("stock", "pysmc"):
        with socket.create_server((HOST, 0)) as listener:
            path = tmp_path / kind
            child = strace(path, CLIENT, kind, listener.getsockname()[1], CONNECTIONS)
            for _ in range(CONNECTIONS + 1):
                conn, _ = listener.accept()
                with conn:
                    conn.recv(100)
                    conn.sendall(b"answer")
                    conn.recv(100)
            assert child.wait(30) == 0
            child.stdout.close()
        counted[kind] = traced(path)
    assert added(counted["stock"], counted["pysmc"]) == ADDED_AT_THE_CLIENT


@needs_strace
@pytest.mark.slow
def test_system_calls_added_at_the_server(tmp_path) -> None:
    counted = {}
    for kind in ("stock", "pysmc"):
        path = tmp_path / kind
        child = strace(path, SERVER, kind, CONNECTIONS)
        port = int(child.stdout.readline())
        for _ in range(CONNECTIONS + 1):
            with socket.create_connection((HOST, port)) as conn:
                conn.sendall(b"question")
                conn.recv(100)
        assert child.wait(30) == 0
        child.stdout.close()
        counted[kind] = traced(path)
    assert added(counted["stock"], counted["pysmc"]) == ADDED_AT_THE_SERVER


def test_no_added_wait(kit, monkeypatch) -> None:
    """Neither end waits for anything that stock loops would not wait for."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        timers = []
        real = loop.call_later

        def call_later(delay, *args, **options):
            timers.append(delay)
            return real(delay, *args, **options)

        monkeypatch.setattr(loop, "call_later", call_later)
        async with kit.serving(Server) as port:
            got = await asyncio.to_thread(plain_exchange, port)
            assert got == ANSWER
        with socket.create_server((HOST, 0)) as listener:
            _, writer = await asyncio.open_connection(*listener.getsockname())
            assert writer.get_extra_info("smc").reason.name == "PEER_NO_SMC"
            writer.close()
            await writer.wait_closed()
        monkeypatch.undo()
        assert timers == []

    kit.run(scenario, config=Config())


def plain_exchange(port: int) -> bytes:
    with socket.create_connection((HOST, port)) as sock:
        sock.sendall(REQUEST)
        answer = b""
        while part := sock.recv(1000):
            answer += part
        return answer
