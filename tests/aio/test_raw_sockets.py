"""What the program does with a socket itself is TCP, whatever was shown before."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from typing import Any

import pytest

from pysmc.aio.raw_sockets import USED_RAW
from pysmc.config import Config

HOST = "127.0.0.1"
GREETING = b"220 ready\r\n"


class Greeter(asyncio.Protocol):
    """Speaks first, and keeps what comes."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.info: Any = None
        self.over = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.info = transport.get_extra_info("smc")
        self.transport = transport
        transport.write(GREETING)

    def data_received(self, data: bytes) -> None:
        self.seen += data

    def eof_received(self) -> None:
        self.over.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()


@contextlib.asynccontextmanager
async def dialled(kit: Any, option: Any) -> Any:
    """A socket of sock_connect, its loop and the servers' protocols."""
    loop = asyncio.get_running_loop()
    served: list[Greeter] = []

    def make() -> Greeter:
        served.append(Greeter())
        return served[-1]

    async with kit.serving(make) as port:
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, (HOST, port))
            assert loop._recall(sock).way == "tcp_option"
            yield loop, sock, served
        if served:
            await served[0].over.wait()
    assert "read" in option.calls


async def use(loop: Any, sock: socket.socket, how: str) -> Any:
    """Use a socket by a call of the loop; gives what was read or written."""
    match how:
        case "recv":
            return await loop.sock_recv(sock, 99)
        case "recv_into":
            into = bytearray(99)
            return bytes(into[: await loop.sock_recv_into(sock, into)])
        case "recvfrom":
            return (await loop.sock_recvfrom(sock, 99))[0]
        case "recvfrom_into":
            into = bytearray(99)
            return bytes(into[: (await loop.sock_recvfrom_into(sock, into))[0]])
        case "sendall":
            await loop.sock_sendall(sock, b"word")
        case "sendto":
            await loop.sock_sendto(sock, b"word", sock.getpeername())
        case _:
            with tempfile.TemporaryFile() as file:
                file.write(b"word")
                file.flush()
                await loop.sock_sendfile(sock, file)
    return b"word"


READING = ("recv", "recv_into", "recvfrom", "recvfrom_into")
WRITING = ("sendall", "sendto", "sendfile")


@pytest.mark.parametrize("how", READING + WRITING)
def test_it_is_exactly_tcp(kit: Any, option: Any, how: str) -> None:
    """The server is told before the program's first byte, and greets at once."""

    async def scenario() -> None:
        async with dialled(kit, option) as (loop, sock, served):
            got = await use(loop, sock, how)
            if how in WRITING:
                assert await loop.sock_recv(sock, 99) == GREETING
            else:
                assert got == GREETING
            assert loop._recall(sock) is USED_RAW
        assert served[0].seen == (b"word" if how in WRITING else b"")
        assert served[0].info.reason.name == "PEER_DECLINED"
        assert served[0].info.discovery == "tcp_option"

    kit.run(scenario)


def test_the_sockets_own_reading_is_waited_for_no_longer_than_a_moment(
    kit: Any, option: Any
) -> None:
    """Nobody tells the loop; after a while the server is told that it is TCP."""

    async def scenario() -> None:
        async with dialled(kit, option) as (loop, sock, served):
            readable = asyncio.Event()
            loop.add_reader(sock, readable.set)
            await readable.wait()
            loop.remove_reader(sock)
            assert sock.recv(99) == GREETING
        assert served[0].info.reason.name == "PEER_DECLINED"

    kit.run(scenario)


def test_the_sockets_own_writing_is_found_by_the_server(kit: Any, option: Any) -> None:
    async def scenario() -> None:
        async with dialled(kit, option) as (loop, sock, served):
            sock.send(b"by itself")
            assert await loop.sock_recv(sock, 99) == GREETING
        assert served[0].seen == b"by itself"
        assert served[0].info.reason.name == "MARK_LOST"

    kit.run(scenario)


def test_whoever_takes_the_socket_over_in_time_has_smc(kit: Any, option: Any) -> None:
    async def scenario() -> None:
        async with dialled(kit, option) as (loop, sock, served):
            transport, protocol = await loop.create_connection(kit.Recorder, sock=sock)
            info = transport.get_extra_info("smc")
            assert (info.mode, info.discovery) == ("smcr", "tcp_option")
            await protocol.until_bytes(len(GREETING))
            transport.close()
            await protocol.until_call("lost")
            await served[0].over.wait()
            assert served[0].info.discovery == "tcp_option"

    kit.run(scenario)


def test_a_socket_of_another_loop_is_left_alone(kit: Any) -> None:
    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        left, right = socket.socketpair()
        with left, right:
            left.setblocking(False)
            await loop.sock_sendall(left, b"x")
            assert right.recv(9) == b"x"
            assert loop._recall(left) is None

    kit.run(scenario, config=Config(discovery=()))
