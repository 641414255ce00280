"""Connections whose ends found each other by the TCP option, good and bad.

No byte of CLC reaches an application and none of an application's is lost, whatever a
middlebox takes away and whatever the other end does after both options were seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
from typing import Any

import pytest
import uvloop

import pysmc
from pysmc.aio import devices as devices_module
from pysmc.aio import negotiation as negotiation_module
from pysmc.config import Config
from pysmc.errors import Declined, FabricUnavailable
from smcproto import clc
from smcproto.constants import EYECATCHER_SMCR
from smcproto.diagnosis import PeerDiagnosis
from tests.aio.option_ends import SMC, answer, ask, both, service

HOST = "127.0.0.1"
ONLY = Config(discovery=("tcp_option",))


@pytest.fixture(params=["pysmc", "asyncio", "uvloop"])
def factory(request: pytest.FixtureRequest) -> Any:
    """Makes the loop that both ends run on; None is ours."""
    makers = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return makers.get(request.param)


# --- both ends show it ----------------------------------------------------------------


@pytest.mark.usefixtures("option")
def test_on_every_loop(kit: Any, factory: Any) -> None:
    async def scenario() -> None:
        given = {} if factory is None else {"config": ONLY}
        async with service(**given) as served:
            info = await ask(served.address, **given)
        assert both([info, *served.infos]) == [SMC, SMC]

    kit.run(scenario, config=ONLY, factory=factory)


@pytest.mark.parametrize(
    ("bound", "to"),
    [("::1", "::1"), ("::", "::1"), ("0.0.0.0", "127.0.0.1"), (HOST, "::ffff:" + HOST)],
)
@pytest.mark.usefixtures("option")
def test_over_every_kind_of_address(kit: Any, bound: str, to: str) -> None:
    async def scenario() -> None:
        async with service(bound) as served:
            info = await ask((to, served.address[1]))
        assert both([info, *served.infos]) == [SMC, SMC]

    kit.run(scenario, config=ONLY)


@pytest.mark.usefixtures("option")
def test_beneath_tls(kit: Any, authority: Any) -> None:
    async def scenario() -> None:
        contexts = authority.server_context(), authority.client_context()
        async with service(ssl=contexts[0]) as served:
            tls: dict[str, Any] = {"ssl": contexts[1], "server_hostname": "localhost"}
            info = await ask(served.address, **tls)
        assert both([info, *served.infos]) == [SMC, SMC]

    kit.run(scenario, config=ONLY)


def test_it_goes_before_local_and_leaves_nothing_of_it(kit: Any, option: Any) -> None:
    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        async with service() as served:
            info = await ask(served.address)
            assert both([info, *served.infos]) == [SMC, SMC]
            option.stripped = "SYN"
            info = await ask(served.address)
            assert both([info, *served.infos[1:]]) == [("smcr", "local")] * 2
            option.is_here = False
            info = await ask(served.address)
            assert both([info, *served.infos[2:]]) == [("smcr", "local")] * 2
        assert loop.driver.discovery._open_marks == set()

    kit.run(scenario, config=Config())


@pytest.mark.usefixtures("option")
def test_workers_that_share_a_port_or_a_listener(kit: Any) -> None:
    async def scenario() -> None:
        async with service(reuse_port=True) as first:
            host, port = first.address
            async with service(host, port, reuse_port=True) as second:
                for _ in range(6):
                    await ask((host, port))
                infos = first.infos + second.infos
        assert both(infos) == [SMC] * 6
        with socket.create_server((HOST, 0)) as listener:
            listener.listen()
            late = await pysmc.start_server(answer, sock=listener)
            info = await ask(listener.getsockname())
            assert info.reason.name == "PEER_NO_SMC"
            late.close()
            await late.wait_closed()

    kit.run(scenario, config=ONLY)


@pytest.mark.usefixtures("option")
def test_a_late_listener_does_not_say_that_the_option_is_missing(kit: Any) -> None:
    async def scenario() -> None:
        told = asyncio.get_running_loop().create_future()

        async def serve(_: Any, writer: Any) -> None:
            told.set_result(writer.get_extra_info("smc"))
            writer.close()

        listener = socket.create_server((HOST, 0))
        server = await pysmc.start_server(serve, sock=listener)
        with socket.create_connection(listener.getsockname()):
            info = await asyncio.wait_for(told, 5)
        assert info.reason.name == "PEER_NO_SMC"
        assert "not installed" not in info.reason.text
        server.close()
        await server.wait_closed()

    kit.run(scenario, config=Config())


def test_an_option_that_is_installed_later(kit: Any, option: Any) -> None:
    """Clients of a listener that was too early are not told that it is missing."""
    option.is_here = False

    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        async with service() as served:
            await on_another_loop(Config(discovery=()), served.address)
            option.is_here = True
            await on_another_loop(Config(discovery=()), served.address)
            loop.driver.presence._look_at = loop.driver.presence.absent_until = 0
            for _ in range(2):
                await on_another_loop(Config(discovery=()), served.address)
        told = ["not installed" in info.reason.text for info in served.infos]
        assert told == [True, True, False, False]
        assert {info.reason.name for info in served.infos} == {"PEER_NO_SMC"}

    kit.run(scenario, config=Config())


@pytest.mark.usefixtures("option")
def test_a_server_that_starts_later(kit: Any) -> None:
    """It opts in as soon as there is a socket: asyncio listens before it asks us."""

    async def scenario() -> None:
        async with service(start_serving=False) as served:
            await served.server.start_serving()
            info = await ask(served.address)
        assert both([info, *served.infos]) == [SMC, SMC]

    kit.run(scenario, config=ONLY)


def test_a_loop_that_never_served_is_given_a_connection(kit: Any, option: Any) -> None:
    """Another process's listener opted in; not a byte of CLC is the application's."""

    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        infos: list[Any] = []

        async def serve(reader: Any, writer: Any) -> None:
            infos.append(writer.get_extra_info("smc"))
            await answer(reader, writer)

        with socket.socket() as listener:
            listener.bind((HOST, 0))
            option.opt_in(listener)
            listener.listen()
            listener.setblocking(False)
            asking = asyncio.ensure_future(
                on_another_loop(ONLY, listener.getsockname())
            )
            conn, _ = await loop.sock_accept(listener)
            await loop.connect_accepted_socket(
                lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader(), serve),
                conn,
            )
            infos.append(await asking)
        assert both(infos) == [SMC, SMC]

    kit.run(scenario, config=ONLY)


# --- one end cannot, or will not ------------------------------------------------------


@contextlib.contextmanager
def without_devices(monkeypatch: pytest.MonkeyPatch) -> Any:
    def nothing(*_: Any, **__: Any) -> Any:
        raise FabricUnavailable("open", "UNAVAILABLE", "not today")

    with monkeypatch.context() as patch:
        patch.setattr(devices_module, "open_device", nothing)
        yield


def on_another_loop(config: Config, *address: Any) -> Any:
    """Ask from a loop of another thread, which has devices and limits of its own."""

    def work() -> Any:
        with asyncio.Runner(
            loop_factory=lambda: pysmc.new_event_loop(config)
        ) as runner:
            return runner.run(ask(*address))

    return asyncio.to_thread(work)


@pytest.mark.usefixtures("option")
def test_a_client_without_a_device_declines(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with service() as served:
            with without_devices(monkeypatch):
                info = await on_another_loop(ONLY, served.address)
        assert both([info, *served.infos]) == [("tcp", "tcp_option")] * 2
        assert info.reason.name == "NO_DEVICE"
        assert served.infos[0].reason.name == "PEER_DECLINED"
        assert served.infos[0].reason.peer_code == PeerDiagnosis.NO_DEVICE

    kit.run(scenario, config=ONLY)


def test_a_server_that_lacks_descriptors_declines(
    kit: Any, option: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listener was inherited, and its clients get an answer from the first on."""
    real, here = devices_module.open_device, threading.current_thread()
    lacks = [True]

    def scarce(*args: Any, **options: Any) -> Any:
        if lacks and threading.current_thread() is here:
            raise OSError(errno.EMFILE, "no descriptors")
        return real(*args, **options)

    monkeypatch.setattr(devices_module, "open_device", scarce)

    async def scenario() -> None:
        listener = socket.socket()
        listener.bind((HOST, 0))
        option.opt_in(listener)
        listener.listen()
        async with service(None, None, sock=listener) as served:
            first = await on_another_loop(ONLY, served.address)
            lacks.clear()
            second = await on_another_loop(ONLY, served.address)
        names = [info.reason and info.reason.name for info in (first, second)]
        assert names == ["PEER_DECLINED", None]
        assert [info.reason and info.reason.name for info in served.infos] == [
            "LIMIT",
            None,
        ]

    kit.run(scenario, config=ONLY)


@pytest.mark.usefixtures("option")
def test_both_ends_decline_and_it_is_said_once(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's takes the place of its Proposal, which the server would answer."""

    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        full = loop.driver.limit_reason()
        async with service() as served:
            monkeypatch.setattr(loop.driver, "refusal", lambda *_, **__: full)
            with without_devices(monkeypatch):
                info = await on_another_loop(ONLY, served.address)
            after = await on_another_loop(ONLY, served.address)
        assert served.failed == []
        names = [one.reason.name for one in (info, after, *served.infos)]
        assert names == ["NO_DEVICE", "PEER_DECLINED", "PEER_DECLINED", "LIMIT"]

    kit.run(scenario, config=ONLY)


@pytest.mark.usefixtures("option")
def test_a_server_without_a_device_does_not_show_it(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        with without_devices(monkeypatch):
            async with service() as served:
                info = await ask(served.address)
        assert (info.reason.name, info.discovery) == ("PEER_NO_SMC", None)
        assert served.infos[0].reason.name == "NO_DEVICE"

    kit.run(scenario, config=ONLY)


@pytest.mark.usefixtures("option")
def test_a_client_at_its_limit_declines(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        async with service() as served:
            with monkeypatch.context() as patch:
                patch.setattr(loop.driver, "has_room", lambda: False)
                info = await ask(served.address)
        assert info.reason.name == "LIMIT"
        assert served.infos[0].reason.peer_code == PeerDiagnosis.NO_MEMORY

    kit.run(scenario, config=ONLY)


def test_a_server_declines_however_many_there_are(kit: Any, option: Any) -> None:
    """Those that stall take no more places than there are, and nobody is reset."""

    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        async with service() as served:
            silent = []
            for _ in range(5):
                sock = socket.socket()
                option.opt_in(sock)
                sock.connect(served.address)
                option.read_state(sock)
                silent.append(sock)
            while len(loop.driver.negotiations) < 5:
                await asyncio.sleep(0)
            assert len(loop.driver.admission) == 1
            info = await on_another_loop(ONLY, served.address)
            for sock in silent:
                sock.close()
        assert info.reason.name == "PEER_DECLINED"
        (mine,) = (one for one in served.infos if one.reason.name == "LIMIT")
        assert mine.discovery == "tcp_option"

    kit.run(scenario, config=Config(discovery=("tcp_option",), max_handshakes=1))


def test_users_of_this_host_share_nothing(
    kit: Any, option: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have its address; a stranger must not take what one peer may have."""
    keys: list[Any] = []
    owners = [7, 8, None]

    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        async with service() as served:
            real = loop.driver.endpoint.accept

            def accept(key: Any, *rest: Any) -> Any:
                keys.append(key)
                return real(key, *rest)

            monkeypatch.setattr(loop.driver.endpoint, "accept", accept)
            monkeypatch.setattr(
                negotiation_module, "owner_of_peer", lambda _: owners[len(keys)]
            )
            for _ in owners:
                await ask(served.address)
        assert keys == [(HOST, 7), (HOST, 8), HOST]
        assert "read" in option.calls

    kit.run(scenario, config=ONLY)


@pytest.mark.usefixtures("option")
def test_whoever_requires_smc_gets_an_error_and_sends_nothing(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(discovery=("tcp_option",), fallback="require")

    async def scenario() -> None:
        async with service() as served:
            with without_devices(monkeypatch), pytest.raises(Declined, match="device"):
                await on_another_loop(config, served.address)
            while not served.failed:
                await asyncio.sleep(0)
        (error,) = served.failed
        assert isinstance(error, asyncio.IncompleteReadError)
        assert error.partial == b"", "a Decline and nothing more was sent"
        with (
            socket.create_server((HOST, 0)) as plain,
            pytest.raises(Declined, match="did not show"),
        ):
            await on_another_loop(config, plain.getsockname())

    kit.run(scenario, config=ONLY)


# --- what a server makes of the first bytes -------------------------------------------


class Recording(asyncio.Protocol):
    """Keeps what comes; answers nothing."""

    made: list[Recording]

    def __init__(self) -> None:
        self.made.append(self)
        self.data = bytearray()
        self.info: Any = None
        self.ended = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.info = transport.get_extra_info("smc")
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


@contextlib.asynccontextmanager
async def shown(kit: Any, option: Any) -> Any:
    """A raw client that showed the option, and the protocols of its server."""
    Recording.made = []
    loop = asyncio.get_running_loop()
    async with kit.serving(Recording) as port:
        with socket.socket() as sock:
            option.opt_in(sock)
            sock.setblocking(False)
            await asyncio.SelectorEventLoop.sock_connect(loop, sock, (HOST, port))
            yield sock, Recording.made


GARBAGE = {
    "one byte": [b"x"],
    "text": [b"GET / HTTP/1.0\r\n\r\n"],
    "like the beginning": [EYECATCHER_SMCR[:3] + b"x and more"],
    "like it, in pieces": [EYECATCHER_SMCR[:1], EYECATCHER_SMCR[1:3], b"no", b"more"],
    "only the beginning": [EYECATCHER_SMCR[:3]],
    "nothing": [],
}


@pytest.mark.parametrize("pieces", GARBAGE.values(), ids=GARBAGE)
def test_what_is_not_clc_is_the_applications(
    kit: Any, option: Any, pieces: list[bytes]
) -> None:
    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        async with shown(kit, option) as (sock, made):
            while not loop.driver.negotiations:
                await asyncio.sleep(0)
            for piece in pieces:
                sock.send(piece)
                for _ in range(20):
                    await asyncio.sleep(0)
            sock.shutdown(socket.SHUT_WR)
            while not made:
                await asyncio.sleep(0)
            (protocol,) = made
            await protocol.ended.wait()
        assert protocol.data == b"".join(pieces)
        assert (protocol.info.reason.name, protocol.info.mode) == ("MARK_LOST", "tcp")
        assert protocol.info.discovery == "tcp_option"

    kit.run(scenario, config=ONLY)


@pytest.mark.parametrize("rest", [b"", b"application"])
def test_a_decline_and_what_follows_in_one_segment(
    kit: Any, option: Any, rest: bytes
) -> None:
    message = clc.Decline(
        version=1, out_of_sync=False, peer_id=bytes(8), diagnosis=0x03030000
    ).build()

    async def scenario() -> None:
        async with shown(kit, option) as (sock, made):
            sock.send(message + rest)
            sock.shutdown(socket.SHUT_WR)
            while not made:
                await asyncio.sleep(0)
            await made[0].ended.wait()
        assert made[0].data == rest
        assert made[0].info.reason.peer_code == 0x03030000

    kit.run(scenario, config=ONLY)


@pytest.mark.parametrize(
    "sent",
    [b"", EYECATCHER_SMCR[:2], EYECATCHER_SMCR + b"\1", EYECATCHER_SMCR + b"\xff" * 8],
    ids=["silent", "part of the eye catcher", "part of a header", "no header"],
)
def test_what_never_becomes_clc_is_closed_in_time(
    kit: Any, option: Any, sent: bytes
) -> None:
    """As the kernel does: a late message would be the application's."""

    async def scenario() -> None:
        async with shown(kit, option) as (sock, made):
            sock.send(sent)
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(sock, ended.set)
            await ended.wait()
            loop.remove_reader(sock)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(9) == b""
        assert made == []

    config = Config(discovery=("tcp_option",), proposal_wait=0.05)
    kit.run(scenario, config=config)


def test_a_client_that_is_reset(kit: Any, option: Any) -> None:
    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        async with shown(kit, option) as (sock, made):
            while not loop.driver.negotiations:
                await asyncio.sleep(0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
            while loop.driver.negotiations:
                await asyncio.sleep(0)
        assert made == []

    kit.run(scenario, config=ONLY)


# --- what is lost on the way ----------------------------------------------------------


@pytest.mark.parametrize("stripped", ["SYN", "SYN-ACK"])
@pytest.mark.parametrize("discovery", [("tcp_option",), ("tcp_option", "local")])
def test_an_option_that_is_stripped(
    kit: Any, option: Any, stripped: str, discovery: tuple[str, ...]
) -> None:
    option.stripped = stripped
    config = Config(discovery=discovery, discovery_wait=0.05)

    async def scenario() -> None:
        async with service() as served:
            info = await ask(served.address)
        assert served.failed == []
        modes = {info.mode, served.infos[0].mode}
        is_local = "local" in discovery and stripped == "SYN"
        assert modes == ({"smcr"} if is_local else {"tcp"})

    kit.run(scenario, config=config)


def test_syn_cookies(kit: Any, option: Any) -> None:
    option.cookies = True

    async def scenario() -> None:
        async with service() as served:
            info = await ask(served.address)
        assert info.reason.name == "PEER_NO_SMC"
        assert served.infos[0].reason.name == "MARK_LOST"
        assert "SYN cookie" in served.infos[0].reason.text

    kit.run(scenario, config=ONLY)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_server_that_shows_it_and_does_not_speak_clc(
    kit: Any, option: Any, said: bytes
) -> None:
    """Silence and nonsense are errors: our Proposal may be in its application."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as listener:
            listener.bind((HOST, 0))
            option.opt_in(listener)
            listener.listen()
            listener.setblocking(False)
            asking = loop.create_task(ask(listener.getsockname()))
            conn, _ = await loop.sock_accept(listener)
            with conn:
                conn.send(said)
                with pytest.raises((ConnectionError, TimeoutError)):
                    await asking

    config = Config(discovery=("tcp_option",), accept_wait=0.05)
    kit.run(scenario, config=config)


@pytest.mark.usefixtures("option")
def test_a_connect_that_is_cancelled_is_closed(kit: Any) -> None:
    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        async with service() as served:
            for turns in range(12):
                opening = loop.create_task(pysmc.open_connection(*served.address))
                for _ in range(turns):
                    await asyncio.sleep(0)
                opening.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    _, writer = await opening
                    writer.transport.abort()
            info = await ask(served.address)
        assert info.mode == "smcr"
        assert loop.driver.discovery._open_marks == set()

    kit.run(scenario, config=ONLY)
