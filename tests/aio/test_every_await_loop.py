"""The loop's other coroutines are struck at each of their points."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import pysmc
from pysmc.config import Config
from tests.aio import every_await as harness
from tests.aio.every_await import HOST, End, Scene, Stage, pattern

if TYPE_CHECKING:
    import ssl
    from collections.abc import Coroutine, Sequence
    from pathlib import Path

pytestmark = pytest.mark.slow

FILE_BYTES = 300_000
BIG = pattern(3_000_000)


class Tls(NamedTuple):
    """Contexts of both ends."""

    client: ssl.SSLContext
    server: ssl.SSLContext


class Tools(NamedTuple):
    """What scenes need and do not make themselves."""

    tls: Tls
    file: Path


@pytest.fixture(scope="module")
def tools(authority, tmp_path_factory) -> Tools:
    file = tmp_path_factory.mktemp("tools") / "file"
    file.write_bytes(pattern(FILE_BYTES))
    return Tools(Tls(authority.client_context(), authority.server_context()), file)


class OnLoop(Scene):
    """One of the loop's coroutines; the other end is an echo.

    Args:
        tools: For scenes that need them.
    """

    config = Config()

    def __init__(self, tools: Tools) -> None:
        self.tools = tools

    async def prepare(self, stage: Stage) -> None:
        self.port = await stage.serve()

    def new_socket(self, stage: Stage) -> socket.socket:
        sock = stage.own(socket.socket(proto=socket.IPPROTO_TCP))
        sock.setblocking(False)
        return sock

    async def connect(self, stage: Stage, port: int, **options: Any) -> Any:
        """Connect over SMC-R; not struck."""
        transport, end = await stage.loop.create_connection(
            stage.make_near, HOST, port, **options
        )
        assert transport.get_extra_info("smc").mode == "smcr"
        await harness.until(lambda: stage.far, lambda: "nobody came")
        return transport, end

    async def prove(self, stage: Stage) -> None:
        await harness.prove_by_streams(stage, "smcr")


class SockConnect(OnLoop):
    """sock_connect; the socket is the program's, and has no mark afterwards."""

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        self.sock = self.new_socket(stage)
        return stage.loop.sock_connect(self.sock, (HOST, self.port))

    async def check(self, stage: Stage, strike: str) -> None:
        assert self.sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0
        assert self.sock.fileno() >= 0
        self.sock.close()


class SockConnectByName(SockConnect):
    """The same with a name, which has to be resolved."""

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        self.sock = self.new_socket(stage)
        return stage.loop.sock_connect(self.sock, ("localhost", self.port))


class ConnectWithSock(OnLoop):
    """create_connection with a socket that sock_connect has marked."""

    async def prepare(self, stage: Stage) -> None:
        await super().prepare(stage)
        self.sock = self.new_socket(stage)
        await stage.loop.sock_connect(self.sock, (HOST, self.port))

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return stage.loop.create_connection(stage.make_near, sock=self.sock)

    async def check(self, stage: Stage, strike: str) -> None:
        if not _has_ended_well(stage):
            self.sock.close()  # before its first step it still is the program's


def _has_ended_well(stage: Stage) -> bool:
    assert stage.target is not None
    return not stage.target.cancelled() and stage.target.exception() is None


class ConnectTls(OnLoop):
    """create_connection with TLS."""

    async def prepare(self, stage: Stage) -> None:
        self.port = await stage.serve(ssl=self.tools.tls.server)

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return stage.loop.create_connection(
            stage.make_near,
            HOST,
            self.port,
            ssl=self.tools.tls.client,
            server_hostname="localhost",
        )


class ConnectAccepted(OnLoop):
    """connect_accepted_socket with a socket of a listener that the program made.

    Nothing announces it, so its peers have to be listed.
    """

    config = Config(discovery=("static",), peers=(HOST,))

    async def prepare(self, stage: Stage) -> None:
        listener = stage.own(socket.create_server((HOST, 0)))
        listener.setblocking(False)
        sock = self.new_socket(stage)
        port = listener.getsockname()[1]
        self.client = stage.loop.create_task(self._connect(stage, sock, port))
        self.conn, _ = await stage.loop.sock_accept(listener)
        stage.own(self.conn)

    async def _connect(self, stage: Stage, sock: Any, port: int) -> None:
        await stage.loop.sock_connect(sock, (HOST, port))
        with contextlib.suppress(OSError):
            await stage.loop.create_connection(stage.make_far, sock=sock)

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return stage.loop.connect_accepted_socket(stage.make_near, self.conn)

    async def check(self, stage: Stage, strike: str) -> None:
        if not _has_ended_well(stage):
            self.conn.close()
        await asyncio.wait({self.client}, timeout=harness.PATIENCE)
        self.client.result()


class StartTls(OnLoop):
    """start_tls at the client, while the server does the same."""

    async def prepare(self, stage: Stage) -> None:
        port = await stage.serve()
        self.near = await self.connect(stage, port)
        await harness.until(lambda: stage.far[0].transport, lambda: "not made")
        self.upgrade = stage.loop.create_task(self._serve_tls(stage))

    async def _serve_tls(self, stage: Stage) -> None:
        end = stage.far[0]
        with contextlib.suppress(OSError):
            end.transport = await stage.loop.start_tls(
                end.transport, end, self.tools.tls.server, server_side=True
            )

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        transport, end = self.near
        return stage.loop.start_tls(
            transport, end, self.tools.tls.client, server_hostname="localhost"
        )

    async def check(self, stage: Stage, strike: str) -> None:
        stage.near[0].transport.abort()
        await asyncio.wait({self.upgrade}, timeout=harness.PATIENCE)
        self.upgrade.result()


class SendFile(OnLoop):
    """sendfile over SMC-R."""

    errors = (OSError, RuntimeError)  # asyncio's, for a transport that is closing

    async def prepare(self, stage: Stage) -> None:
        port = await stage.serve(lambda: _keep(stage))
        self.transport, _ = await self.connect(stage, port)
        self.file = stage.cleaning.enter_context(self.tools.file.open("rb"))

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return stage.loop.sendfile(self.transport, self.file)

    async def check(self, stage: Stage, strike: str) -> None:
        self.transport.close()
        (end,) = stage.far
        await harness.until(lambda: end.is_over, lambda: str(end.calls))
        assert pattern(FILE_BYTES).startswith(end.data)
        assert strike or len(end.data) == FILE_BYTES


def _keep(stage: Stage) -> End:
    end = End()
    stage.far.append(end)
    return end


class Raw(OnLoop):
    """A marked socket that the program uses itself: it is settled as TCP."""

    async def prepare(self, stage: Stage) -> None:
        await super().prepare(stage)
        self.sock = self.new_socket(stage)
        await stage.loop.sock_connect(self.sock, (HOST, self.port))

    async def check(self, stage: Stage, strike: str) -> None:
        self.sock.close()


class SockSendAll(Raw):
    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return stage.loop.sock_sendall(self.sock, BIG)

    async def check(self, stage: Stage, strike: str) -> None:
        self.sock.close()
        for end in stage.far:
            await harness.until(lambda: end.is_over, lambda: str(end.calls))  # noqa: B023
            assert BIG.startswith(end.data)


class SockRecv(Raw):
    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return self._ask(stage.loop)

    async def _ask(self, loop: Any) -> None:
        await loop.sock_sendall(self.sock, b"question")
        await self.receive(loop)

    async def receive(self, loop: Any) -> None:
        assert await loop.sock_recv(self.sock, 100) in {b"question", b""}


class SockRecvInto(SockRecv):
    async def receive(self, loop: Any) -> None:
        assert await loop.sock_recv_into(self.sock, bytearray(100)) in {8, 0}


class SockRecvFrom(SockRecv):
    async def receive(self, loop: Any) -> None:
        data, _ = await loop.sock_recvfrom(self.sock, 100)
        assert data in {b"question", b""}


class SockRecvFromInto(SockRecv):
    async def receive(self, loop: Any) -> None:
        count, _ = await loop.sock_recvfrom_into(self.sock, bytearray(100))
        assert count in {8, 0}


class SockSendTo(Raw):
    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return stage.loop.sock_sendto(self.sock, b"question", (HOST, self.port))


class SockSendFile(Raw):
    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        file = stage.cleaning.enter_context(self.tools.file.open("rb"))
        return stage.loop.sock_sendfile(self.sock, file)


class CreateServer(OnLoop):
    """create_server; whoever cancelled it finds neither listener nor beacon."""

    async def prepare(self, stage: Stage) -> None:
        """Nothing is needed."""

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return self._begin(stage)

    async def _begin(self, stage: Stage) -> None:
        server = await stage.loop.create_server(stage.make_far, HOST, 0)
        stage.servers.append(server)


class ServeForever(OnLoop):
    """serve_forever while a client comes; the server is closed afterwards."""

    errors = (RuntimeError, TimeoutError)  # the first where it was closed before
    is_ended_by_others = True

    async def prepare(self, stage: Stage) -> None:
        self.port = await stage.serve(start_serving=False)

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return self._serve_until_closed(stage)

    async def _serve_until_closed(self, stage: Stage) -> None:
        # A server that is closed ends it with a cancellation.
        self.has_ended = False
        try:
            await stage.servers[0].serve_forever()
        except asyncio.CancelledError:
            if not self.has_ended:
                raise

    def around(self, stage: Stage) -> Any:
        # Without a client there would be no second point.
        stage.loop.call_soon(self._visit, stage)
        return contextlib.nullcontext()

    def _visit(self, stage: Stage) -> None:
        self.client = stage.loop.create_task(self._connect(stage))

    async def _connect(self, stage: Stage) -> None:
        with contextlib.suppress(OSError):
            await stage.loop.create_connection(stage.make_near, HOST, self.port)
        self.has_ended = True
        stage.servers[0].close()

    async def check(self, stage: Stage, strike: str) -> None:
        await asyncio.wait({self.client}, timeout=harness.PATIENCE)
        self.client.result()
        assert not stage.servers[0].sockets


class WaitClosed(OnLoop):
    """wait_closed of a server whose last connection is about to end."""

    async def prepare(self, stage: Stage) -> None:
        await self.connect(stage, await stage.serve())

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        stage.near[0].transport.close()
        stage.servers[0].close()
        return stage.servers[0].wait_closed()


STRIKES = [*harness.BY_TASK, *harness.BY_PEER, "close", "abort", "stop the loop"]
FEW = ["cancel", "peer aborts"]
"""Where only the last call differs from another scene."""


class Least(NamedTuple):
    """How many points a scene has at least, and what strikes it there."""

    scene: type[OnLoop]
    points: int
    strikes: Sequence[str] = tuple(STRIKES)


SCENES = {
    "sock_connect": Least(SockConnect, 5),
    "sock_connect by name": Least(SockConnectByName, 8),
    "create_connection with sock": Least(ConnectWithSock, 14),
    "create_connection with ssl": Least(ConnectTls, 21),
    "connect_accepted_socket": Least(ConnectAccepted, 14),
    "start_tls": Least(StartTls, 8),
    "sendfile": Least(SendFile, 4),
    "sock_sendall": Least(SockSendAll, 2),
    "sock_recv": Least(SockRecv, 8),
    "sock_recv_into": Least(SockRecvInto, 8, FEW),
    "sock_recvfrom": Least(SockRecvFrom, 8, FEW),
    "sock_recvfrom_into": Least(SockRecvFromInto, 8, FEW),
    "sock_sendto": Least(SockSendTo, 2, FEW),
    "sock_sendfile": Least(SockSendFile, 5),
    "create_server": Least(CreateServer, 4),
    "serve_forever": Least(ServeForever, 10),
    "wait_closed": Least(WaitClosed, 1),
}
CASES = [(scene, strike) for scene in SCENES for strike in SCENES[scene].strikes]


@pytest.mark.parametrize(("scene", "strike"), CASES)
def test_loop(tools, scene, strike) -> None:
    row = SCENES[scene]

    async def main() -> int:
        stage = Stage(asyncio.get_running_loop(), 0)
        await harness.prove_by_streams(stage, "smcr")
        await stage.clear()
        return await harness.strike_everywhere(row.scene(tools), strike)

    points = harness.run_on(lambda: pysmc.new_event_loop(row.scene.config), main)
    assert points >= row.points


def test_the_cases_are_many() -> None:
    assert len(CASES) >= 135
