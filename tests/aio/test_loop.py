"""The loop's seams: which connections move, why others do not, and how loops end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import weakref
from typing import Any

import pytest

import pysmc
from pysmc.aio import loop as loop_module
from pysmc.aio.raw_sockets import USED_RAW
from pysmc.config import Config
from pysmc.errors import ForkedError

HOST = "127.0.0.1"


def reasons(ends) -> tuple[str, ...]:
    """What both ends say: "smcr", or the reason's name and side."""
    said = []
    for transport in ends.transports:
        info = transport.get_extra_info("smc")
        said.append(info.mode if info.reason is None else
                    f"{info.reason.name}/{info.reason.side}")  # fmt: skip
    return tuple(said)


# --- which connections move


def test_a_connection_of_two_loops_in_two_processes(kit) -> None:
    child = kit.spawn(
        """
        import asyncio, pysmc
        async def serve(reader, writer):
            info = writer.get_extra_info("smc")
            writer.write(f"{info.mode} {info.role} {info.link_group}\\n".encode())
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()
        async def main():
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            print(server.sockets[0].getsockname()[1], flush=True)
            await server.serve_forever()
        pysmc.run(main())
        """
    )
    port = int(child.stdout.readline())

    async def scenario() -> None:
        for number in range(3):
            reader, writer = await asyncio.open_connection(HOST, port)
            assert await reader.readline() == b"smcr server 1\n"
            info = writer.get_extra_info("smc")
            assert (info.mode, info.role, info.link_group) == ("smcr", "client", 1)
            data = os.urandom(500_000)
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            writer.close()
            await writer.wait_closed()
            assert number < 3

    kit.run(scenario)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_families_and_names(kit, host) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.serving(kit.Recorder, host=host) as port:
            transport, protocol = await loop.create_connection(kit.Recorder, host, port)
            assert transport.get_extra_info("smc").mode == "smcr"
            transport.close()
            await protocol.until_call("lost")

    kit.run(scenario)


def test_create_connection_with_a_socket_that_was_connected_here(kit) -> None:
    """As aiohttp does it."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.serving(kit.Recorder) as port:
            for address in ((HOST, port), ("localhost", port)):
                sock = socket.socket()
                sock.setblocking(False)
                await loop.sock_connect(sock, address)
                transport, protocol = await loop.create_connection(
                    kit.Recorder, sock=sock
                )
                assert transport.get_extra_info("smc").mode == "smcr"
                transport.close()
                await protocol.until_call("lost")

    kit.run(scenario)


def test_a_socket_that_was_connected_elsewhere(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.serving(kit.Recorder) as port:
            sock = socket.create_connection((HOST, port))
            transport, protocol = await loop.create_connection(kit.Recorder, sock=sock)
            info = transport.get_extra_info("smc")
            assert (info.mode, info.reason.name) == ("tcp", "NOT_MARKED")
            transport.close()
            await protocol.until_call("lost")

    kit.run(scenario)


def test_a_socket_that_the_program_used_itself(kit) -> None:
    """Nobody waits for the discovery, and later it stays TCP."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.serving(lambda: Greeter()) as port:
            for use in ("recv", "recv_into", "recvfrom", "recvfrom_into"):
                sock = socket.socket()
                sock.setblocking(False)
                began = loop.time()
                await loop.sock_connect(sock, (HOST, port))
                match use:
                    case "recv":
                        assert await loop.sock_recv(sock, 5) == b"hello"
                    case "recv_into":
                        assert await loop.sock_recv_into(sock, bytearray(5)) == 5
                    case "recvfrom":
                        assert (await loop.sock_recvfrom(sock, 5))[0] == b"hello"
                    case "recvfrom_into":
                        got = await loop.sock_recvfrom_into(sock, bytearray(5))
                        assert got[0] == 5
                assert loop.time() - began < 0.4
                transport, protocol = await loop.create_connection(
                    kit.Recorder, sock=sock
                )
                info = transport.get_extra_info("smc")
                assert (info.mode, info.reason.name) == ("tcp", "NOT_MARKED")
                assert info.reason is USED_RAW
                transport.close()
                await protocol.until_call("lost")

    kit.run(scenario)


class Greeter(asyncio.Protocol):
    """Speaks first, and ends with its peer."""

    def connection_made(self, transport) -> None:
        transport.write(b"hello")


def test_raw_sending(kit, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"from a file")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        protocols = []

        def make():
            protocols.append(kit.Recorder())
            return protocols[-1]

        async with kit.serving(make) as port:
            for use in ("sendall", "sendto", "sendfile"):
                with socket.socket() as sock, path.open("rb") as file:
                    sock.setblocking(False)
                    await loop.sock_connect(sock, (HOST, port))
                    match use:
                        case "sendall":
                            await loop.sock_sendall(sock, b"sent")
                        case "sendto":
                            with contextlib.suppress(OSError):
                                await loop.sock_sendto(sock, b"sent", (HOST, port))
                        case "sendfile":
                            await loop.sock_sendfile(sock, file)
            async with asyncio.timeout(5):
                while len(protocols) < 3:
                    await asyncio.sleep(0.001)
            for protocol in protocols:
                await protocol.until_call("lost")
            assert protocols[0].data == b"sent"
            assert protocols[2].data == b"from a file"
            assert {p.info_when_made.mode for p in protocols} == {"tcp"}

    kit.run(scenario)


def test_a_server_that_speaks_first(kit) -> None:
    async def scenario() -> None:
        async with kit.serving(Greeter) as port:
            reader, writer = await asyncio.open_connection(HOST, port)
            assert await reader.readexactly(5) == b"hello"
            assert writer.get_extra_info("smc").mode == "smcr"
            writer.close()
            await writer.wait_closed()

    kit.run(scenario)


def test_sockets_accepted_by_the_program_itself(kit) -> None:
    """connect_accepted_socket negotiates when the listener is announced."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        listener = socket.create_server((HOST, 0))
        listener.setblocking(False)
        port = listener.getsockname()[1]
        server = await loop.create_server(kit.Recorder, sock=listener)
        loop.remove_reader(listener.fileno())  # announced, but we accept

        async def accept() -> tuple[Any, Any]:
            conn, _ = await loop.sock_accept(listener)
            return await loop.connect_accepted_socket(kit.Recorder, conn)

        (_, one), (_, other) = await asyncio.gather(
            loop.create_connection(kit.Recorder, HOST, port), accept()
        )
        assert one.info_when_made.mode == other.info_when_made.mode == "smcr"
        one.transport.close()
        await one.until_call("lost")
        await other.until_call("lost")
        server.close()
        await server.wait_closed()

    kit.run(scenario)


def test_a_listener_that_the_program_made(kit) -> None:
    """It has no protocol number, and neither have the sockets that it accepts."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        listener = socket.create_server((HOST, 0))
        assert listener.proto == 0
        port = listener.getsockname()[1]
        served = []

        def make():
            served.append(kit.Recorder())
            return served[-1]

        server = await loop.create_server(make, sock=listener)
        _, protocol = await loop.create_connection(kit.Recorder, HOST, port)
        assert await asyncio.to_thread(plain_exchange, port, b"") == b""
        await served[0].until_call("made")
        await served[1].until_call("lost")
        modes = [one.info_when_made.mode for one in (protocol, *served)]
        assert modes == ["smcr", "smcr", "tcp"]
        protocol.transport.close()
        await served[0].until_call("lost")
        await protocol.until_call("lost")
        server.close()
        await server.wait_closed()

    kit.run(scenario)


def test_sockets_accepted_elsewhere_are_tcp(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server((HOST, 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            conn, _ = listener.accept()
            transport, protocol = await loop.connect_accepted_socket(kit.Recorder, conn)
            info = transport.get_extra_info("smc")
            assert (info.role, info.reason.name) == ("server", "NOT_MARKED")
            client.close()
            await protocol.until_call("lost")

    kit.run(scenario)


def test_unix_sockets_and_pipes_are_left_alone(kit, tmp_path) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        path = str(tmp_path / "socket")
        server = await loop.create_unix_server(kit.Recorder, path)
        transport, protocol = await loop.create_unix_connection(kit.Recorder, path)
        assert transport.get_extra_info("smc") is None
        transport.close()
        await protocol.until_call("lost")
        server.close()
        await server.wait_closed()
        left, right = socket.socketpair()
        transport, protocol = await loop.create_connection(kit.Recorder, sock=left)
        right.close()
        await protocol.until_call("lost")
        datagram, _ = await loop.create_datagram_endpoint(
            asyncio.DatagramProtocol, local_addr=(HOST, 0)
        )
        datagram.close()
        process = await asyncio.create_subprocess_exec(
            "echo", "pipe", stdout=subprocess.PIPE
        )
        assert (await process.communicate())[0] == b"pipe\n"
        assert loop._driver is None

    kit.run(scenario)


def test_a_loop_without_connections_makes_nothing(kit) -> None:
    async def scenario() -> None:
        assert asyncio.get_running_loop()._driver is None

    kit.run(scenario)


def test_connection_refused_is_as_usual(kit) -> None:
    async def scenario() -> None:
        with socket.create_server((HOST, 0)) as listener:
            port = listener.getsockname()[1]
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(HOST, port)
        with pytest.raises(OSError, match="no such host|not known|failure"):
            await asyncio.open_connection("no-such-host.invalid", port)

    kit.run(scenario)


def test_a_beacon_whose_listener_refuses(kit) -> None:
    """The listener vanished between the look-up and the connect."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        listener = socket.socket()
        listener.bind((HOST, 0))  # announced, but never listens
        announcement = loop.driver.announce(listener)
        sock = socket.socket()
        sock.setblocking(False)
        with pytest.raises(ConnectionRefusedError):
            await loop.sock_connect(sock, listener.getsockname())
        assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0
        sock.close()
        announcement.close()
        listener.close()

    kit.run(scenario)


# --- servers


def test_a_closed_server_takes_no_connection_that_still_negotiates(
    kit, monkeypatch
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(kit.Recorder, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        real = loop_module.negotiate_server

        async def slow(driver, conn, way):
            outcome = await real(driver, conn, way)
            server.close()
            return outcome

        monkeypatch.setattr(loop_module, "negotiate_server", slow)
        _, protocol = await loop.create_connection(kit.Recorder, HOST, port)
        await protocol.until_call("lost")
        await server.wait_closed()

    kit.run(scenario)


def test_a_factory_that_raises(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_debug(True)

        def broken():
            raise ZeroDivisionError

        async with kit.serving(broken) as port:
            _, protocol = await loop.create_connection(kit.Recorder, HOST, port)
            await protocol.until_call("lost")
        async with kit.serving(kit.Recorder) as port:
            with pytest.raises(ZeroDivisionError):
                await loop.create_connection(broken, HOST, port)
            await asyncio.sleep(0.01)
        assert not loop.driver.transports

    kit.run(scenario, problems=1)


# --- loops


def test_run_is_like_asyncio_run() -> None:
    async def main():
        assert isinstance(asyncio.get_running_loop(), pysmc.Loop)
        with pytest.raises(RuntimeError, match="running event loop"):
            pysmc.run(coroutine)
        return asyncio.get_running_loop().get_debug()

    async def other() -> None: ...

    coroutine = other()
    assert pysmc.run(main(), debug=True) is True
    coroutine.close()
    with pytest.raises((TypeError, ValueError)):
        pysmc.run("no coroutine")


def test_the_factory_takes_no_arguments(monkeypatch) -> None:
    monkeypatch.setenv("PYSMC_RMBE_BYTES", "16384")
    with asyncio.Runner(loop_factory=pysmc.new_event_loop) as runner:
        assert runner.get_loop().config.rmbe_bytes == 16384


def test_bad_peers_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        pysmc.new_event_loop(Config(discovery=("static",), peers=("nonsense",)))


def test_a_closed_loop_has_no_driver() -> None:
    loop = pysmc.new_event_loop(Config())
    loop.close()
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        _ = loop.driver


def test_closing_a_running_loop_is_refused(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.connected() as ends:
            with pytest.raises(RuntimeError):
                loop.close()
            ends.client.transport.write(b"still works")
            await ends.server.until_bytes(11)

    kit.run(scenario)


def test_a_loop_that_ends_with_open_connections_closes_them(kit) -> None:
    """A program that forgets to close: the peer gets all of it, and an end."""
    code = """
        import asyncio, sys, pysmc
        async def main():
            port = int(sys.argv[1])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert writer.get_extra_info("smc").mode == "smcr"
            writer.write(b"x" * 100_000)
            globals()["kept"] = writer
        pysmc.run(main())
    """

    async def scenario() -> None:
        made = asyncio.get_running_loop().create_future()

        class Served(kit.Recorder):
            def connection_made(self, transport) -> None:
                super().connection_made(transport)
                made.set_result(self)

        async with kit.serving(Served) as port:
            kit.spawn(code, port)
            protocol = await made
            await protocol.until_call("lost")
            assert len(protocol.data) == 100_000
            assert protocol.calls == ["made", "data", "eof", "lost"]
            assert protocol.error is None

    kit.run(scenario)


def test_a_dropped_loop_leaves_nothing(kit) -> None:
    async def scenario() -> None:
        async with kit.connected():
            pass

    loop = pysmc.new_event_loop(Config())
    with asyncio.Runner(loop_factory=lambda made=loop: made) as runner:
        runner.run(scenario())
    seen = weakref.ref(loop)
    del loop, runner
    kit.count_descriptors()
    assert seen() is None


# --- fork


def in_child(action) -> str:
    """Run something in a forked child; gives what it returned or raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(action())
        except BaseException as error:  # noqa: BLE001 - a fork must not go on
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.filterwarnings("ignore:This process")
def test_fork_in_the_middle(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.connected() as ends:
            client, server = ends.transports
            client.write(b"before")
            await ends.server.until_bytes(6)
            for use in (
                lambda: client.write(b"child"),
                client.write_eof,
                client.close,
                client.abort,
                lambda: loop.driver.open(),
                lambda: loop.driver.check_owner(),
            ):
                text = in_child(use)
                assert text.startswith("ForkedError"), text
                assert "make a new loop after fork()" in text
            client.write(b" and after")
            await ends.server.until_bytes(16)
            server.write(b"both ways")
            await ends.client.until_bytes(9)
            assert ends.server.data == b"before and after"
            assert in_child(loop.close).startswith("RuntimeError")

    kit.run(scenario)


@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_may_make_its_own_loop(kit) -> None:
    async def exchange():
        async with kit.connected() as ends:
            ends.client.transport.write(b"mine")
            await ends.server.until_bytes(4)
            return reasons(ends)

    def child():
        asyncio._set_running_loop(None)
        return pysmc.run(exchange(), config=Config())

    async def scenario() -> None:
        async with kit.connected() as ends:
            assert in_child(child) == "('smcr', 'smcr')"
            ends.client.transport.write(b"parent")
            await ends.server.until_bytes(6)

    kit.run(scenario)


@pytest.mark.filterwarnings("ignore:This process")
def test_loops_made_before_fork_and_used_after_it(kit) -> None:
    """As gunicorn's workers do it."""

    async def exchange():
        async with kit.connected() as ends:
            return reasons(ends)

    loop = pysmc.new_event_loop(Config())

    def child():
        return loop.run_until_complete(exchange())

    assert in_child(child) == "('smcr', 'smcr')"
    loop.close()


@pytest.mark.slow
def test_kill_during_a_transfer(kit) -> None:
    code = """
        import asyncio, pysmc
        async def serve(reader, writer):
            block = b"".join(b"%07d\\n" % n for n in range(10000))
            while True:
                writer.write(block)
                await writer.drain()
        async def main():
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            print(server.sockets[0].getsockname()[1], flush=True)
            await server.serve_forever()
        pysmc.run(main())
    """
    block = b"".join(b"%07d\n" % n for n in range(10000))

    async def scenario(wanted: int) -> None:
        loop = asyncio.get_running_loop()
        child = kit.spawn(code)
        port = int(child.stdout.readline())
        _, protocol = await loop.create_connection(kit.Recorder, HOST, port)
        assert protocol.info_when_made.mode == "smcr"
        await protocol.until_bytes(wanted)
        child.send_signal(signal.SIGKILL)
        began = loop.time()
        await protocol.until_call("lost")
        assert loop.time() - began < 2
        assert isinstance(protocol.error, ConnectionResetError)
        whole = block * (len(protocol.data) // len(block) + 1)
        assert whole.startswith(protocol.data)

    for wanted in (1, 100_000, 3_000_000):
        kit.run(scenario, wanted)


def test_forked_error_is_what_other_code_expects() -> None:
    assert issubclass(ForkedError, RuntimeError)
    assert resource.RLIMIT_NOFILE  # the limit that driver.open() raises


def test_tls_to_a_plain_server(kit) -> None:
    """The handshake fails as on a stock loop, and the information is there."""
    import ssl

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server((HOST, 0)) as listener:
            task = loop.run_in_executor(None, answer_badly, listener)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(
                    *listener.getsockname(), ssl=ssl.create_default_context()
                )
            await task

    kit.run(scenario)


def answer_badly(listener: socket.socket) -> None:
    conn, _ = listener.accept()
    with conn:
        conn.recv(1000)
        conn.sendall(b"this is not TLS\r\n\r\n")
        conn.recv(1000)


def test_addresses_of_other_shapes(kit) -> None:
    """What the stock loop refuses is refused by it, with its own error."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        for address in ("/no/such/path", ("no-such-host.invalid", 1), (HOST, "http")):
            with socket.socket() as sock:
                sock.setblocking(False)
                with pytest.raises((OSError, TypeError, ValueError)):
                    await loop.sock_connect(sock, address)

    kit.run(scenario)


def plain_exchange(port: int, data: bytes) -> bytes:
    """Send to a server with a plain socket; what it answers until it ends."""
    with socket.create_connection((HOST, port)) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while part := sock.recv(1000):
            answer += part
        return answer
