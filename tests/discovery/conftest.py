"""Both ends of a connection in one test, in one loop or in two processes."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.config import Config
from pysmc.discovery import Discovery, Mark, Verdict
from pysmc.discovery import local as local_module
from pysmc.discovery.address import connection_id
from pysmc.discovery.order import Way
from pysmc.discovery.rendezvous import rendezvous_name
from pysmc.disposal import wait_closed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

READY_WAIT = 20.0


def count_descriptors() -> int:
    """Count our descriptors; the one that lists them is always among them."""
    gc.collect()
    wait_closed(5)  # what another test left is not in this one's count
    return len(os.listdir("/proc/self/fd"))


def short(verdict: Verdict | object) -> str:
    """``SMC``, or the reason's name and side: what tests compare."""
    if isinstance(verdict, Verdict):
        if verdict.smc:
            assert verdict.reason is None
            return "SMC"
        verdict = verdict.reason
    assert verdict is not None
    return f"{verdict.name}/{verdict.side}"  # type: ignore[attr-defined]


class Kit:
    """Makes sockets and discoveries, closes them, and checks that none is left."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.sockets: list[socket.socket] = []
        self.discoveries: list[Discovery] = []

    short = staticmethod(short)
    count_descriptors = staticmethod(count_descriptors)

    def keep(self, sock: socket.socket) -> socket.socket:
        self.sockets.append(sock)
        return sock

    def discovery(self, **fields: Any) -> Discovery:
        made = Discovery(self.loop, Config(**fields))
        self.discoveries.append(made)
        return made

    def listener(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        reuse_port: bool = False,
        v6only: bool = False,
    ) -> socket.socket:
        sock = self.bound(host, port, reuse_port=reuse_port, v6only=v6only)
        sock.listen(128)
        return sock

    def bound(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        reuse_port: bool = False,
        v6only: bool = False,
    ) -> socket.socket:
        """Make a socket that does not listen yet."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = self.keep(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind((host, port))
        return sock

    def client(self, host: str = "127.0.0.1") -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = self.keep(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)
        return sock

    async def accept(self, listener: socket.socket) -> socket.socket:
        conn, _ = await self.loop.sock_accept(listener)
        return self.keep(conn)

    async def dial(
        self, discovery: Discovery, host: str, port: int
    ) -> tuple[socket.socket, Mark]:
        """Connect a socket that is expected to be marked."""
        sock = self.client(host)
        mark = discovery.prepare(sock, (host, port))
        assert isinstance(mark, Mark), mark
        await self.loop.sock_connect(sock, (host, port))
        discovery.connected(mark)
        return sock, mark

    async def marked_pair(
        self, client: Discovery, server: Discovery
    ) -> tuple[socket.socket, Mark, socket.socket]:
        """Connect to a listener of `server`, up to where both ends may decide."""
        listener = self.listener()
        assert server.announce(listener) is not None
        sock, mark = await self.dial(client, *listener.getsockname()[:2])
        conn = await self.accept(listener)
        assert server.inspect(conn) is Way.LOCAL
        return sock, mark, conn

    async def meet(
        self,
        client: Discovery,
        server: Discovery,
        listener: socket.socket,
        host: str | None = None,
    ) -> tuple[str, str]:
        """Connect, and let both ends decide: the client's verdict and the server's."""
        port = listener.getsockname()[1]
        host = host or listener.getsockname()[0]

        async def serve() -> str:
            conn = await self.accept(listener)
            found = server.inspect(conn)
            return short(
                await server.confirm(conn) if isinstance(found, Way) else found
            )

        async def connect() -> str:
            sock = self.client(host)
            mark = client.prepare(sock, (host, port))
            await self.loop.sock_connect(sock, (host, port))
            if not isinstance(mark, Mark):
                return short(mark)
            client.connected(mark)
            return short(await client.wait_confirmed(mark))

        verdicts = await asyncio.gather(connect(), serve())
        return verdicts[0], verdicts[1]

    async def after(self, seconds: float) -> None:
        """Let the loop go on for some time."""
        done = asyncio.Event()
        self.loop.call_later(seconds, done.set)
        await done.wait()

    async def until(self, condition: Callable[[], object]) -> None:
        """Let the loop go on until something is so."""
        deadline = self.loop.time() + READY_WAIT
        while not condition():
            assert self.loop.time() < deadline, "it never became so"
            await self.after(0.001)

    @staticmethod
    def reset(sock: socket.socket) -> None:
        """Close a TCP socket so that its peer sees a reset."""
        linger = b"\1\0\0\0\0\0\0\0"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        sock.close()

    @staticmethod
    def rendezvous_of(sock: socket.socket) -> bytes:
        """Name the rendezvous of a client's socket."""
        identity = connection_id(sock, client=True)
        return rendezvous_name(identity)

    async def unmarked_pair(self) -> tuple[socket.socket, socket.socket]:
        """Connect two sockets that no discovery knows."""
        listener = self.listener()
        sock = self.client()
        await self.loop.sock_connect(sock, listener.getsockname())
        return sock, await self.accept(listener)

    def close(self) -> None:
        for made in self.discoveries:
            made.close()
        for sock in self.sockets:
            sock.close()


@pytest.fixture
async def kit() -> AsyncIterator[Kit]:
    before = count_descriptors()
    made = Kit()
    yield made
    made.close()
    # Some are closed by callbacks of tasks that have just ended.
    await asyncio.wait_for(made.until(lambda: count_descriptors() <= before), 2)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold offers longer than any test takes, also on a busy machine."""
    monkeypatch.setattr(local_module, "UNCLAIMED_WAIT", 30.0)


@pytest.fixture
async def ends(kit: Kit) -> tuple[Discovery, Discovery]:
    """A discovery for each end, with waits that no good test reaches."""
    return kit.discovery(discovery_wait=30.0), kit.discovery(discovery_wait=30.0)


class Child:
    """A forked process that runs one coroutine and reports in lines of JSON."""

    def __init__(self, main: Callable[..., Awaitable[None]], *args: Any) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            self._play(main, write, args)
        os.close(write)
        self._pipe = os.fdopen(read, "rb", buffering=0)
        self._ended = False

    @staticmethod
    def _play(main: Any, write: int, args: tuple[Any, ...]) -> None:
        code = 1

        def say(something: Any) -> None:
            os.write(write, json.dumps(something).encode() + b"\n")

        try:
            asyncio.run(main(say, *args))
            code = 0
        except Exception as error:  # noqa: BLE001  # it goes to the parent as text
            say({"error": repr(error)})
        finally:
            os._exit(code)

    def hear(self) -> Any:
        """Read the next line; fail when none comes."""
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._pipe], [], [], READY_WAIT)
            assert ready, "the child said nothing"
            piece = self._pipe.read(1)
            assert piece, "the child has ended"
            line += piece
        said = json.loads(line)
        assert not (isinstance(said, dict) and "error" in said), said
        return said

    async def heard(self) -> Any:
        """Read the next line while the loop goes on."""
        await self._readable()
        return self.hear()

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._pipe, ready.set)
        try:
            await asyncio.wait_for(ready.wait(), READY_WAIT)
        finally:
            loop.remove_reader(self._pipe)

    async def finish(self) -> None:
        """Wait until it has ended by itself, without an error."""
        await self._readable()
        assert self._pipe.read(1) == b"", "the child has more to say"
        self._ended = True
        self._pipe.close()
        self._collect()

    def _collect(self) -> None:
        """Take the exit status; its pipe is closed, so this does not wait."""
        assert os.waitpid(self.pid, 0) == (self.pid, 0)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, SIGKILL unless told."""
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it if it still lives, and collect it."""
        if not self._ended:
            self._ended = True
            with suppress(ProcessLookupError):
                self.kill()
            os.waitpid(self.pid, 0)
            self._pipe.close()


@pytest.fixture
def fork() -> Iterator[Callable[..., Child]]:
    """Run a coroutine function in a forked process; its first argument reports."""
    children: list[Child] = []

    def start(main: Callable[..., Awaitable[None]], *args: Any) -> Child:
        children.append(Child(main, *args))
        return children[-1]

    yield start
    for child in children:
        child.end()


@pytest.fixture
def make_kit() -> Callable[[], Kit]:
    """Make a kit inside a coroutine that a test runs itself, or in a child."""
    return Kit


@pytest.fixture
def tests_folder() -> Path:
    return Path(__file__).parent
