"""Loops that find each other by the option as this machine's kernel has it.

Each case runs in a child process, in a cgroup and a network of its own; what a
middlebox does is done by nftables.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pysmc
from pysmc.aio.raw_sockets import USED_RAW
from pysmc.config import Config
from tests.aio.option_ends import ANSWER, HOST, QUESTION, SMC, ask, both, service
from tests.discovery.option.room import enter, in_child, missing, run_case

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tests.discovery.option.room import Room

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

ONLY = Config(discovery=("tcp_option",), discovery_wait=0.05)
STRIP = """
table inet middlebox {{
    chain input {{
        type filter hook input priority 0;
        tcp flags & (syn|ack) == {flags} reset tcp option 254
    }}
}}
"""
HOOK = "type filter hook input priority 0;"
STRANGER = 65533
CASES: dict[str, Callable[[Room], None]] = {}
NEEDS: dict[str, tuple[str, str]] = {}
"""The program that a case needs, and Debian's package."""


@pytest.fixture(autouse=True, scope="module")
def _able() -> None:
    if missing():
        pytest.skip(missing())


def case(function: Callable[[Room], None]) -> Callable[[Room], None]:
    CASES[function.__name__] = function
    return function


def needs(
    program: str, package: str
) -> Callable[[Callable[[Room], None]], Callable[[Room], None]]:
    """Say which program a case cannot do without."""

    def note(function: Callable[[Room], None]) -> Callable[[Room], None]:
        NEEDS[function.__name__] = (program, package)
        return function

    return note


@pytest.mark.parametrize("name", CASES)
def test_on_the_kernel(name: str) -> None:
    program, package = NEEDS.get(name, ("", ""))
    if program and shutil.which(program) is None:
        pytest.skip(f"needs the program {program}: apt-get install -y {package}")
    run_case(CASES[name])


def play(scenario: Callable[[], Coroutine[Any, Any, Any]], config: Config) -> Any:
    with asyncio.Runner(loop_factory=lambda: pysmc.new_event_loop(config)) as runner:
        return runner.run(asyncio.wait_for(scenario(), 30))


def rules(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text.encode(), check=True)


def strip(flags: str) -> None:
    rules(STRIP.format(flags=flags))


@case
def every_kind_of_address(_: Room) -> None:
    ways = [(HOST, HOST), ("::1", "::1"), ("::", "::1"), (HOST, f"::ffff:{HOST}")]

    async def scenario() -> None:
        for bound, to in ways:
            async with service(bound) as served:
                infos = [await ask((to, served.address[1])) for _ in range(2)]
                assert both([*infos, *served.infos]) == [SMC] * 4, (bound, to)

    play(scenario, Config())


@case
def who_has_it_and_who_has_not(room: Room) -> None:
    """A client of another cgroup is plain, and found by the mark if that is on."""

    def outside(address: Any, config: Config) -> tuple[Any, ...]:
        enter(room.outside)
        info = play(lambda: ask(address), config)
        return info.mode, info.discovery, info.reason and info.reason.name

    async def scenario(config: Config) -> Any:
        async with service() as served:
            told = await asyncio.to_thread(in_child, outside, served.address, config)
            return told, served.infos[0]

    local = Config()
    told, info = play(lambda: scenario(local), local)
    assert (told[:2], both([info])) == (("smcr", "local"), [("smcr", "local")])
    told, info = play(lambda: scenario(ONLY), ONLY)
    assert told == ("tcp", None, "SETUP_MISSING")
    assert info.reason.name == "PEER_NO_SMC"


@case
def another_user_of_this_host(_: Room) -> None:
    """The option knows nothing of users; shared memory does, and says so at once."""

    def stranger(address: Any) -> Any:
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        return play(lambda: ask(address), Config()).reason.name

    async def scenario() -> None:
        async with service() as served:
            told = await asyncio.to_thread(in_child, stranger, served.address)
        (info,) = served.infos
        assert (told, info.reason.name) == ("FOREIGN_USER", "FOREIGN_USER")
        assert served.failed == []

    play(scenario, Config(confirm_link_server_wait=20, confirm_link_client_wait=30))


@case
@needs("nft", "nftables")
def stripped_on_the_way_there(_: Room) -> None:
    strip("syn")

    async def scenario() -> None:
        async with service() as served:
            info = await ask(served.address)
        assert info.reason.name == served.infos[0].reason.name == "PEER_NO_SMC"

    play(scenario, ONLY)


@case
@needs("nft", "nftables")
def stripped_on_the_way_back(_: Room) -> None:
    """The server has promised CLC to a client that knows nothing of it."""
    strip("syn|ack")

    async def scenario() -> None:
        async with service() as served:
            info = await ask(served.address)
        assert info.reason.name == "PEER_NO_SMC"
        assert served.infos[0].reason.name == "MARK_LOST"
        assert served.failed == []

    play(scenario, ONLY)
    play(scenario_with_the_mark, Config(discovery_wait=0.05))


async def scenario_with_the_mark() -> None:
    async with service() as served:
        info = await ask(served.address)
    assert [info.reason.name, served.infos[0].reason.name] == ["MARK_LOST"] * 2


@case
@needs("nft", "nftables")
def stripped_and_the_server_speaks_first(_: Room) -> None:
    """It is closed as by a kernel: what came later could be CLC."""
    strip("syn|ack")

    async def scenario() -> None:
        greeted: list[Any] = []

        async def greet(reader: Any, writer: Any) -> None:
            greeted.append(writer)

        server = await pysmc.start_server(greet, HOST, 0)
        reader, writer = await pysmc.open_connection(
            *server.sockets[0].getsockname(), limit=100
        )
        assert await reader.read() == b""
        assert greeted == []
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    play(scenario, Config(discovery=("tcp_option",), proposal_wait=0.2))


@case
def syn_cookies(_: Room) -> None:
    Path("/proc/sys/net/ipv4/tcp_syncookies").write_text("2")

    async def scenario() -> None:
        async with service() as served:
            info = await ask(served.address)
        assert info.reason.name == "PEER_NO_SMC"
        assert served.infos[0].reason.name == "MARK_LOST"

    play(scenario, ONLY)


@case
def a_socket_that_the_program_uses_itself(_: Room) -> None:
    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        async with service() as served:
            with socket.socket() as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, served.address)
                assert loop._recall(sock).verdict.smc
                await loop.sock_sendall(sock, QUESTION)
                assert loop._recall(sock) is USED_RAW
                got = b""
                while len(got) < len(ANSWER):
                    got += await loop.sock_recv(sock, 1 << 16)
                assert got == ANSWER
            while not served.infos:
                await asyncio.sleep(0)
        assert served.infos[0].reason.name == "PEER_DECLINED"

    play(scenario, ONLY)


@case
@needs("nft", "nftables")
def a_connect_that_goes_on_after_its_end(_: Room) -> None:
    """A server that speaks first speaks: it is told that no CLC will come."""
    lose = "tcp flags & (syn|ack) == syn drop"

    async def greet(reader: Any, writer: Any) -> None:
        writer.write(ANSWER)
        writer.close()

    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        server = await pysmc.start_server(greet, HOST, 0)
        address = server.sockets[0].getsockname()
        for is_handed_over in (False, True):
            rules(f"table inet lost {{\nchain input {{\n{HOOK}\n{lose}\n}}\n}}\n")
            sock = socket.socket()
            sock.setblocking(False)
            connecting = loop.create_task(loop.sock_connect(sock, address))
            while sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\2":
                await asyncio.sleep(0)
            connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await connecting
            rules("delete table inet lost\n")
            connected = asyncio.Event()
            loop.add_writer(sock, connected.set)
            await connected.wait()
            loop.remove_writer(sock)
            if is_handed_over:
                reader, writer = await pysmc.open_connection(sock=sock)
                assert await reader.read() == ANSWER
                writer.close()
                await writer.wait_closed()
            else:
                assert ANSWER.startswith(await loop.sock_recv(sock, 1 << 16))
                sock.close()
        server.close()
        await server.wait_closed()

    play(scenario, ONLY)


@case
def workers_that_inherit_a_listener(_: Room) -> None:
    """It has opted in before it listened, and so the workers need not, nor could."""
    listener = socket.socket()
    listener.bind((HOST, 0))

    async def begin() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, sock=listener.dup())
        server.close()
        await server.wait_closed()

    def worker() -> Any:
        async def scenario() -> Any:
            async with service(None, None, sock=listener) as served:
                infos = [await ask(listener.getsockname()) for _ in range(2)]
                return both([*infos, *served.infos])

        return play(scenario, ONLY)

    play(begin, ONLY)
    assert in_child(worker) == in_child(worker) == [SMC] * 4


@case
def workers_that_share_a_port(_: Room) -> None:
    async def scenario() -> None:
        async with service(reuse_port=True) as one:
            host, port = one.address
            async with service(host, port, reuse_port=True) as other:
                for _ in range(8):
                    await ask((host, port))
                assert both(one.infos + other.infos) == [SMC] * 8

    play(scenario, ONLY)


@case
def a_listener_of_the_programs_own(_: Room) -> None:
    """It does not show the option unless a server of the loop was given it."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        for is_given in (False, True):
            listener = socket.socket()
            listener.bind((HOST, 0))
            listener.setblocking(False)
            if is_given:
                server = await loop.create_server(
                    asyncio.Protocol, sock=listener.dup(), start_serving=False
                )
                server.close()
            listener.listen()
            asking = loop.create_task(ask(listener.getsockname()))
            conn, _ = await loop.sock_accept(listener)
            reader, writer = await handed_over(loop, conn)
            infos = [writer.get_extra_info("smc")]
            assert await reader.readexactly(len(QUESTION)) == QUESTION
            writer.write(ANSWER)
            infos.append(await asking)
            modes = [SMC] * 2 if is_given else [("tcp", None)] * 2
            assert both(infos) == modes
            writer.close()
            await writer.wait_closed()
            listener.close()

    play(scenario, ONLY)


async def handed_over(loop: Any, conn: socket.socket) -> Any:
    """Have the loop make streams of a connection that the program accepted."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, conn)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


@case
def a_listener_that_listens_already(_: Room) -> None:
    listener = socket.create_server((HOST, 0))

    async def scenario() -> None:
        async with service(None, None, sock=listener) as served:
            info = await ask(listener.getsockname())
        assert info.reason.name == "PEER_NO_SMC"
        assert served.infos[0].reason.name == "NOT_MARKED"
        assert "before listen()" in served.infos[0].reason.text

    play(scenario, ONLY)


CLIENT = """
import asyncio, os, sys, pysmc
from pysmc.config import Config
async def main(port):
    for number in range(11):
        if number == 1:
            os.write(1, b"before")
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await writer.wait_closed()
    os.write(1, b"after")
with asyncio.Runner(loop_factory=pysmc.new_event_loop) as runner:
    runner.run(main(int(sys.argv[1])))
"""


@case
@needs("strace", "strace")
def two_system_calls_for_each_connection(_: Room) -> None:
    """To a plain server: one to opt in and one to read the result."""
    with (
        tempfile.NamedTemporaryFile() as trace,
        socket.create_server((HOST, 0)) as listener,
    ):
        port = str(listener.getsockname()[1])
        command = ["strace", "-f", "-o", trace.name, sys.executable, "-c", CLIENT, port]
        subprocess.run(command, check=True, capture_output=True, timeout=30)
        text = Path(trace.name).read_text(errors="replace")
    calls = text.split('"before"')[1].split('"after"')[0]
    assert calls.count("0x534d4352") == 2 * 10
    assert calls.count("setsockopt") - calls.count("TCP_NODELAY") == 10
