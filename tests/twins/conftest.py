"""Lanes for the twins: where their connections run, and what must hold for each.

A twin runs on one loop, and the end that was a raw socket in the original is a pair of
streams, driven by a small program. In the lane "threads" that program has a loop and a
thread of its own, as the originals' blocking sockets have. Every lane looks at all
transports that either loop made: each has to be on SMC-R, at both ends.

Needs pytest and the standard library only, so that other Pythons can run the twins too.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import importlib.util
import os
import ssl
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.config import Config
from pysmc.disposal import wait_closed
from pysmc.testing.loops import SimLoop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator


def _load_other_fabric() -> None:
    """Load what all tests have in common under the name that it is imported by."""
    name = "tests.other_fabric"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "other_fabric.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


_load_other_fabric()
import tests.other_fabric as other_fabric  # noqa: E402

HOST = other_fabric.HOST
PATIENCE = 20.0
"""Seconds after which something that should have happened will not."""
CONFIG = other_fabric.adapted(Config(discovery_wait=PATIENCE))
"""A machine that is busy for a second must not turn a connection into TCP."""
CERTIFICATES = "PYSMC_TWINS_CERTIFICATES"
"""Names the folder of certificates for a Python that cannot make them."""
LANES = os.environ.get("PYSMC_TWINS_LANES", "shm,threads,sim").split(",")

Program = Any
"""``async def program(peer)``; what it returns is the answer of `visit`."""


class WatchedLoop(other_fabric.WatchedLoop):
    """On the fabric of this host, or the other one that was asked for."""

    def __new__(cls) -> Any:
        return super().__new__(cls, CONFIG)

    def __init__(self) -> None:
        super().__init__(CONFIG)


class WatchedSimLoop(other_fabric.Watched, SimLoop):
    """On a simulated fabric."""

    def __new__(cls) -> Any:
        return super().__new__(cls, CONFIG)

    def __init__(self) -> None:
        self.seen = []
        super().__init__(CONFIG)


class Certificates:
    """The contexts that CPython's tests use, with certificates of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "server.pem")
        return context

    def client(self, *, verify: bool = False) -> ssl.SSLContext:
        """A client's; it knows no authority, so that to verify is to fail."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
        return context


class _Tls:
    """TLS on top of a layer, by hand: what a blocking socket's wrap_socket does."""

    def __init__(self, lower: Any, context: ssl.SSLContext, **options: Any) -> None:
        self.lower = lower
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, **options)

    async def do(self, call: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                result = call(*args)
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self.lower.recv(65536)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            except ssl.SSLError:
                await self._flush()
                raise
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self.lower.send(self._outgoing.read())

    async def handshake(self) -> None:
        await self.do(self._tls.do_handshake)

    async def recv(self, count: int) -> bytes:
        try:
            data: bytes = await self.do(self._tls.read, count)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""
        return data

    async def send(self, data: bytes) -> None:
        await self.do(self._tls.write, data)

    async def unwrap(self) -> None:
        await self.do(self._tls.unwrap)

    async def say_goodbye(self) -> None:
        """Send close_notify without waiting for the other one."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        await self._flush()


class _Plain:
    """The bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: Any) -> None:
        self.recv = reader.read
        self._writer = writer
        self._shut = False

    def shutdown_write(self) -> None:
        self._shut = True
        self._writer.write_eof()

    async def send(self, data: bytes) -> None:
        if self._shut:
            return  # TLS's last words, which a socket would refuse too
        self._writer.write(data)
        await self._writer.drain()


class Peer:
    """The other end, with the calls of a blocking socket.

    Its TLS is not asyncio's: as in the originals, only one end of a connection is.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: Any) -> None:
        self.transport = writer.transport
        self.writer = writer
        self.plain = _Plain(reader, writer)
        self.top: Any = self.plain

    async def recv(self, count: int) -> bytes:
        data: bytes = await self.top.recv(count)
        return data

    async def recv_all(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = await self.recv(count - len(data))
            if not piece:
                raise ConnectionAbortedError
            data += piece
        return bytes(data)

    async def recv_until(self, end: bytes) -> bytes:
        data = b""
        while not data.endswith(end):
            data += await self.recv_all(1)
        return data

    async def send(self, data: bytes) -> None:
        await self.top.send(data)

    async def start_tls(
        self, context: ssl.SSLContext, *, server_side: bool = False
    ) -> None:
        layer = _Tls(self.top, context, server_side=server_side)
        await layer.handshake()
        self.top = layer

    async def unwrap(self) -> None:
        """End TLS: say so, and wait until the other end has said so too."""
        await self.top.unwrap()
        self.top = self.top.lower

    def shutdown_write(self) -> None:
        self.plain.shutdown_write()

    def close(self) -> None:
        self.writer.close()


def count_descriptors() -> int:
    gc.collect()
    wait_closed(5)  # what another test left is not in this one's count
    return len(os.listdir("/proc/self/fd"))


class Lane:
    """Runs one twin; `run` checks what it leaves behind.

    Args:
        name: "shm", "threads" or "sim".
        tls: Its certificates.
    """

    host = HOST
    patience = PATIENCE

    def __init__(self, name: str, tls: Certificates) -> None:
        self.name = name
        self.tls = tls
        self.problems: list[dict[str, Any]] = []
        self.failures: list[BaseException] = []
        self.loop: Any = None
        self.seen: list[Any] = []
        self._peer_loop: Any = None
        self._programs: set[asyncio.Task[Any]] = set()

    # The frame

    def run(
        self,
        scenario: Callable[..., Coroutine[Any, Any, Any]],
        *args: Any,
        connections: int | None = 1,
        problems: int = 0,
    ) -> Any:
        """Run a scenario, and see that every connection was on SMC-R at both ends.

        Args:
            scenario: A coroutine function.
            args: For the scenario.
            connections: How many there were; None when that is not settled.
            problems: How often a loop's exception handler is expected to be called.
        """
        gc.freeze()  # only what this twin makes is collected: a tenth of the time
        try:
            before = len(os.listdir("/proc/self/fd"))
            with self.opened():
                result = self.loop.run_until_complete(self._bounded(scenario, args))
            assert len(self.problems) == problems, self.problems
            self.problems.clear()
            self.check(connections)
            assert count_descriptors() == before, "descriptors were left open"
        finally:
            gc.unfreeze()
        return result

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """Make the loops, and close them afterwards."""
        kind = WatchedSimLoop if self.name == "sim" else WatchedLoop
        self.loop = kind()
        self.seen = self.loop.seen
        self.loop.set_exception_handler(lambda _, context: self._complain(context))
        try:
            with self._peer_thread() if self.name == "threads" else _nothing():
                yield self.loop
        finally:
            if not self.loop.is_closed():
                self.loop.run_until_complete(self.loop.shutdown_asyncgens())
                self.loop.close()
        if self.failures:
            raise self.failures[0]

    @contextlib.contextmanager
    def _peer_thread(self) -> Iterator[None]:
        loop = self._peer_loop = WatchedLoop()
        loop.seen = self.seen  # appending is atomic
        loop.set_exception_handler(lambda _, context: self._complain(context))
        thread = threading.Thread(target=loop.run_forever, name="peer")
        thread.start()
        try:
            yield
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the peer's loop does not end"
            loop.close()

    def _complain(self, context: dict[str, Any]) -> None:
        self.problems.append(context)

    async def _bounded(self, scenario: Any, args: Any) -> Any:
        async with asyncio.timeout(PATIENCE * 2):
            result = await scenario(*args)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if left:  # accepts and callbacks on their last steps
                _, left = await asyncio.wait(left, timeout=PATIENCE)
        assert not left, f"tasks were left running: {left}"
        return result

    def check(self, connections: int | None) -> None:
        """See that each connection was on SMC-R at both ends."""
        usual = other_fabric.FABRIC or "shm"
        fabric = "sim" if self.name == "sim" else usual
        said = [(info.mode, info.fabric) for info in self.seen]
        assert said, "no connection was made"
        why = [info.reason for info in self.seen if info.reason is not None]
        assert set(said) == {("smcr", fabric)}, why or self.seen
        clients, servers = self._count("client"), self._count("server")
        assert clients == servers
        assert connections is None or clients == connections

    def _count(self, role: str) -> int:
        return [info.role for info in self.seen].count(role)

    async def until(self, done: Callable[[], Any]) -> None:
        """Wait until something is so that has no event to wait for."""
        async with asyncio.timeout(PATIENCE):
            while not done():
                await asyncio.sleep(0.001)

    # The other end

    def there(self, work: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        """Run a coroutine where the other end lives."""
        if self.name != "threads":
            return asyncio.get_running_loop().create_task(work)
        future = asyncio.run_coroutine_threadsafe(work, self._peer_loop)
        return asyncio.wrap_future(future)

    def tell(self, call: Callable[..., Any], *args: Any) -> None:
        """Call something of the twin's from the other end's program."""
        self.loop.call_soon_threadsafe(call, *args)

    @contextlib.asynccontextmanager
    async def serve(
        self, program: Program, host: Any = HOST, port: int = 0, **options: Any
    ) -> AsyncIterator[Any]:
        """Serve connections by a program; gives the address.

        Afterwards the programs have ended, and what one of them raised is raised.
        """

        async def handle(reader: Any, writer: Any) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._programs.add(task)
            try:
                await program(Peer(reader, writer))
            except BaseException as error:  # noqa: BLE001  # raised by `opened`
                self.failures.append(error)
            finally:
                writer.close()

        async def start() -> Any:
            return await asyncio.start_server(handle, host, port, **options)

        async def end() -> None:
            server.close()
            async with asyncio.timeout(PATIENCE):
                await server.wait_closed()
                while self._programs:
                    await self._programs.pop()

        server = await self.there(start())
        try:
            yield server.sockets[0].getsockname()[:2]
            # Who leaves at once may be gone before the server has its transport.
            await self.until(lambda: self._count("client") == self._count("server"))
        finally:
            await self.there(end())

    def visit(self, program: Program, address: Any, **options: Any) -> Awaitable[Any]:
        """Connect the other end to the twin's server, and run a program on it."""

        async def whole() -> Any:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection(*address, **options)
                try:
                    return await program(Peer(reader, writer))
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()

        return self.there(whole())

    @contextlib.asynccontextmanager
    async def http_server(self, **options: Any) -> AsyncIterator[Any]:
        """The web server that CPython's tests run; gives its address."""
        async with self.serve(answer_http, **options) as address:
            yield address


async def answer_http(peer: Peer) -> None:
    """Answer one request: "Test message", or what was sent to /loop."""
    with contextlib.suppress(ConnectionError):  # visitors may leave early
        head = await peer.recv_until(b"\r\n\r\n")
        await peer.send(b"HTTP/1.0 200 OK\r\nContent-type: text/plain\r\n\r\n")
        if not head.startswith(b"POST /loop "):
            await peer.send(b"Test message")
            return
        size = int(head.partition(b"Content-Length: ")[2].split()[0])
        while size:
            piece = await peer.recv(min(size, 0x10000))
            await peer.send(piece)
            size -= len(piece)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


class Visitor(asyncio.Protocol):
    """Asks for a page as soon as it is connected, and counts the answer's bytes."""

    def __init__(self, greeting: bytes = b"GET / HTTP/1.0\r\n\r\n") -> None:
        loop = asyncio.get_running_loop()
        self.greeting = greeting
        self.transport: Any = None
        self.calls: list[str] = []
        self.data = bytearray()
        self.error: BaseException | None = None
        self.made: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert self.calls == []
        self.calls.append("made")
        self.transport = transport
        self.made.set_result(None)
        if self.greeting:
            self.transport.write(self.greeting)

    def data_received(self, data: bytes) -> None:
        assert self.calls[-1] in {"made", "data"}
        if self.calls[-1] != "data":
            self.calls.append("data")
        self.data += data

    def eof_received(self) -> bool | None:
        assert self.calls[-1] in {"made", "data"}
        self.calls.append("eof")
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        assert self.calls[-1] in {"made", "data", "eof"}
        self.calls.append("lost")
        self.error = exc
        self.done.set_result(None)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    given = os.environ.get(CERTIFICATES)
    if given:
        return Certificates(Path(given))
    from pysmc.testing.authority import Authority

    folder = tmp_path_factory.mktemp("certificates")
    Authority(folder, datetime.datetime.now(datetime.UTC)).issue("server")
    return Certificates(folder)


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest, certificates: Certificates) -> Lane:
    return Lane(request.param, certificates)


@pytest.fixture
def visitor() -> type[Visitor]:
    return Visitor
