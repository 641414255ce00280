"""The server on foreign loops: its life, and what happens when something runs out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket

import pytest
import uvloop

import pysmc
from pysmc.aio import server as server_module
from pysmc.config import Config

HOST = "127.0.0.1"


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop])
def foreign(request):
    return request.param


async def quiet(reader, writer) -> None:
    await reader.read()
    writer.close()


def port_of(server) -> int:
    return int(server.sockets[0].getsockname()[1])


def test_the_life_of_a_server(kit, foreign) -> None:
    async def scenario() -> None:
        server = await pysmc.start_server(quiet, HOST, 0, start_serving=False)
        assert not server.is_serving()
        assert "SmcServer" in repr(server)
        assert server.get_loop() is asyncio.get_running_loop()
        with pytest.raises(ConnectionRefusedError):
            await pysmc.open_connection(HOST, port_of(server))
        await server.start_serving()
        await server.start_serving()
        assert server.is_serving()
        reader, writer = await pysmc.open_connection(HOST, port_of(server))
        server.close()
        server.close()
        assert server.sockets == ()
        waiting = asyncio.ensure_future(server.wait_closed())
        await asyncio.sleep(0.01)
        assert not waiting.done(), "a connection is open"
        writer.write_eof()
        assert await reader.read() == b""
        await waiting
        await server.wait_closed()
        with pytest.raises(RuntimeError, match="closed"):
            await server.start_serving()
        writer.close()
        await writer.wait_closed()

    kit.run(scenario, factory=foreign)


def test_serve_forever(kit, foreign) -> None:
    async def scenario() -> None:
        server = await pysmc.start_server(quiet, HOST, 0)
        task = asyncio.ensure_future(server.serve_forever())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already"):
            await server.serve_forever()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not server.is_serving()
        server = await pysmc.start_server(quiet, HOST, 0)
        task = asyncio.ensure_future(server.serve_forever())
        await asyncio.sleep(0)
        server.close()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    kit.run(scenario, factory=foreign)


@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
def test_ending_the_clients(kit, foreign, how) -> None:
    async def scenario() -> None:
        server = await pysmc.start_server(quiet, HOST, 0)
        reader, writer = await pysmc.open_connection(HOST, port_of(server))
        while not server.clients:
            await asyncio.sleep(0.001)
        getattr(server, how)()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        server.close()
        await server.wait_closed()
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()

    kit.run(scenario, factory=foreign)


def test_where_it_listens(kit, foreign) -> None:
    async def scenario() -> None:
        async with await pysmc.start_server(quiet, [HOST, "::1"], 0) as server:
            assert len(server.sockets) == 2
        async with await pysmc.start_server(
            quiet, "", 0, reuse_address=True, reuse_port=True, backlog=5
        ) as server:
            families = {sock.family for sock in server.sockets}
            assert families == {socket.AF_INET, socket.AF_INET6}
        listener = socket.create_server((HOST, 0))
        async with await pysmc.start_server(quiet, sock=listener) as server:
            _, writer = await pysmc.open_connection(HOST, port_of(server))
            assert writer.get_extra_info("smc").mode == "smcr"
            writer.close()
            await writer.wait_closed()
            with pytest.raises(OSError, match="bind on address.*in use") as caught:
                await pysmc.start_server(quiet, HOST, port_of(server))
            assert caught.value.errno == errno.EADDRINUSE
        await server.wait_closed()
        with pytest.raises(ValueError, match="same time"):
            await pysmc.start_server(quiet, HOST, 0, sock=listener)
        with pytest.raises(TypeError, match="must be an SSLContext"):
            await pysmc.start_server(quiet, HOST, 0, ssl=True)

    kit.run(scenario, factory=foreign)


def test_nothing_is_left_when_somebody_else_listens_first(
    kit, foreign, monkeypatch
) -> None:
    """Both could bind, as nobody listened yet; only one of them can listen."""

    async def scenario() -> None:
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((HOST, 0))
            bound = server_module._listeners
            opened = []

            async def be_late(*args, **options):
                opened.extend(await bound(*args, **options))
                other.listen()
                return opened

            monkeypatch.setattr(server_module, "_listeners", be_late)
            with pytest.raises(OSError, match="in use"):
                await pysmc.start_server(quiet, HOST, other.getsockname()[1])
            assert [listener.fileno() for listener in opened] == [-1]

    kit.run(scenario, factory=foreign)


def test_a_callback_that_is_no_coroutine(kit, foreign) -> None:
    async def scenario() -> None:
        writers = []
        async with await pysmc.start_server(
            lambda reader, writer: writers.append(writer), HOST, 0
        ) as server:
            reader, writer = await pysmc.open_connection(HOST, port_of(server))
            while not writers:
                await asyncio.sleep(0.001)
            assert writers[0].get_extra_info("smc").mode == "smcr"
            assert writers[0].get_extra_info("none", 3) == 3
            writers[0].write(b"hi")
            writers[0].close()
            assert await reader.read() == b"hi"
            writer.close()
            await writer.wait_closed()
        await server.wait_closed()

    kit.run(scenario, factory=foreign)


def test_descriptors_run_out_while_accepting(kit, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "ACCEPT_PAUSE", 0.01)

    class Exhausted:
        """A listener that once has no descriptor for the next connection."""

        def __init__(self, sock) -> None:
            self.sock = sock
            self.failed = False

        def __getattr__(self, name):
            return getattr(self.sock, name)

        def accept(self):
            if not self.failed:
                self.failed = True
                raise OSError(errno.EMFILE, "Too many open files")
            return self.sock.accept()

    async def scenario() -> None:
        server = await pysmc.start_server(quiet, HOST, 0, start_serving=False)
        server._sockets[0] = Exhausted(server._sockets[0])
        monkeypatch.setattr(server._driver, "announce", lambda sock: None)
        await server.start_serving()
        reader, writer = await pysmc.open_connection(HOST, port_of(server))
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        assert "out of system resource" in kit.problems[0]["message"]

    kit.run(scenario, factory=asyncio.new_event_loop, problems=1)


def test_what_cannot_be_served_is_logged(kit, caplog) -> None:
    caplog.set_level("DEBUG", logger="pysmc")

    async def scenario() -> None:
        async with await pysmc.start_server(
            quiet, HOST, 0, config=Config(fallback="require")
        ) as server:
            with socket.create_connection((HOST, port_of(server))) as sock:
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                assert await loop.sock_recv(sock, 1) == b""
        await server.wait_closed()

    kit.run(scenario, factory=asyncio.new_event_loop)
    assert "SMC-R is required" in caplog.text


def test_closing_while_it_negotiates(kit, foreign, monkeypatch) -> None:
    real = server_module.negotiate_server

    async def scenario() -> None:
        server = await pysmc.start_server(quiet, HOST, 0)

        async def slow(driver, conn, way):
            outcome = await real(driver, conn, way)
            server.close()
            return outcome

        monkeypatch.setattr(server_module, "negotiate_server", slow)
        reader, writer = await pysmc.open_connection(HOST, port_of(server))
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()
        await server.wait_closed()

    kit.run(scenario, factory=foreign)


def test_an_error_of_ours_is_reported(kit, monkeypatch) -> None:
    async def broken(driver, conn):
        conn.close()
        raise ZeroDivisionError

    monkeypatch.setattr(server_module, "negotiate_server", broken)

    async def scenario() -> None:
        async with await pysmc.start_server(quiet, HOST, 0) as server:
            with pytest.raises(ConnectionError):
                await pysmc.open_connection(
                    HOST, port_of(server), config=Config(fallback="require")
                )
        await server.wait_closed()

    kit.run(scenario, factory=asyncio.new_event_loop, problems=1)
