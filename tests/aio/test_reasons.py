"""Why connections stay on TCP, as both ends say it, and SMC-R required."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

import pysmc
from pysmc.config import Config
from pysmc.errors import Declined, FabricError
from pysmc.fabric import shm

HOST = "127.0.0.1"
NO_SMC = "PEER_NO_SMC/peer"


def reasons(ends) -> tuple[str, ...]:
    """What both ends say: "smcr", or the reason's name and side."""
    said = []
    for transport in ends.transports:
        info = transport.get_extra_info("smc")
        said.append(info.mode if info.reason is None else
                    f"{info.reason.name}/{info.reason.side}")  # fmt: skip
    return tuple(said)


# --- why others do not


@pytest.mark.parametrize(
    ("client", "server", "said"),
    [
        ({}, {}, ("smcr", "smcr")),
        ({"discovery": ()}, {}, ("DISABLED/local", "PEER_NO_SMC/peer")),
        ({}, {"discovery": ()}, ("PEER_NO_SMC/peer", "DISABLED/local")),
        ({"fabrics": ()}, {}, ("DISABLED/local", "PEER_NO_SMC/peer")),
        ({}, {"fabrics": ()}, ("PEER_NO_SMC/peer", "DISABLED/local")),
        ({"fabrics": ("verbs",)}, {}, ("NO_DEVICE/local", "PEER_NO_SMC/peer")),
        ({}, {"fabrics": ("verbs",)}, ("PEER_NO_SMC/peer", "NO_DEVICE/local")),
        ({"discovery": ("tcp_option",)}, {}, ("SETUP_MISSING/local", NO_SMC)),
    ],
)  # fmt: skip
def test_both_ends_say_why(kit, client, server, said) -> None:
    two_loops(kit, Config(**client), Config(**server), said)


def two_loops(kit, client: Config, server: Config, said, *, threads=True) -> None:
    """Connect a client in a loop of its own to a server here."""

    async def connect(port: int):
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(kit.Recorder, HOST, port)
        protocol.transport.write(b"ping")
        await protocol.until_bytes(4)
        protocol.transport.close()
        await protocol.until_call("lost")
        return protocol

    async def scenario():
        served = []

        class Ponger(kit.Recorder):
            def connection_made(self, transport) -> None:
                super().connection_made(transport)
                served.append(self)

            def data_received(self, data) -> None:
                super().data_received(data)
                self.transport.write(b"pong")

        async with kit.serving(Ponger) as port:
            protocol = await asyncio.to_thread(pysmc.run, connect(port), config=client)
            await served[0].until_call("lost")
        return kit.Ends(protocol, served[0])

    assert reasons(kit.run(scenario, config=server)) == said


def test_no_more_memory_may_be_pinned(kit) -> None:
    """Connections get smaller buffers, then none: then they are TCP."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        served: list[Any] = []
        made: list[Any] = []

        def serve():
            served.append(kit.Recorder())
            return served[-1]

        async with kit.serving(serve) as port:
            while not made or made[-1].info_when_made.mode == "smcr":
                _, protocol = await loop.create_connection(kit.Recorder, HOST, port)
                made.append(protocol)
            await served[-1].until_call("made")
            assert 5 < len(made) < 100
            assert made[0].info_when_made.rmbe_bytes == 16 * 1024
            names = {end[-1].info_when_made.reason.name for end in (made, served)}
            assert names == {"LIMIT", "PEER_DECLINED"}
            for protocol in made:
                protocol.transport.close()
            for protocol in made + served:
                await protocol.until_call("lost")

    kit.run(scenario, config=Config(max_pinned_bytes=1 << 20))


def test_different_hosts_share_no_eid(kit, monkeypatch) -> None:
    names = iter(["PYSMC-SHM-A", "PYSMC-SHM-B"])
    monkeypatch.setattr(shm, "host_eid", lambda: next(names))
    said = ("PEER_DECLINED/peer", "NO_COMMON_EID/local")
    two_loops(kit, Config(), Config(), said)


@pytest.mark.parametrize("end", ["client", "server"])
@pytest.mark.parametrize("what", ["register", "create_queue_pair"])
def test_memory_that_cannot_be_had(kit, monkeypatch, end, what) -> None:
    real = getattr(shm.ShmDomain, what)
    peers = []

    def failing(domain, *args):
        # The server's loop opens its device first.
        if domain.device.peer_id not in peers:
            peers.append(domain.device.peer_id)
        is_client = end == "client"
        if is_client == (domain.device.peer_id != first_device[0]):
            raise FabricError(what, "NO_MEMORY", "ENOMEM")
        return real(domain, *args)

    first_device = []
    opened = shm.ShmDevice.__init__

    def remember(device, peer_id, **options):
        first_device.append(peer_id)
        opened(device, peer_id, **options)

    monkeypatch.setattr(shm.ShmDevice, "__init__", remember)
    monkeypatch.setattr(shm.ShmDomain, what, failing)
    said = ("NO_MEMORY/local", "PEER_DECLINED/peer")
    two_loops(kit, Config(), Config(), said if end == "client" else said[::-1])


@pytest.mark.parametrize("end", ["client", "server"])
def test_too_many_negotiations(kit, end, monkeypatch) -> None:
    async def scenario():
        driver = asyncio.get_running_loop().driver
        monkeypatch.setattr(driver, "has_room", lambda: False)
        async with kit.connected() as ends:
            return reasons(ends)

    said = kit.run(scenario)
    assert said[0] == "LIMIT/local"
    assert said[1] == "PEER_NO_SMC/peer"


def test_a_server_at_its_limit_goes_on_with_tcp(kit, monkeypatch) -> None:
    async def scenario():
        driver = asyncio.get_running_loop().driver
        monkeypatch.setattr(driver, "judge", lambda found: driver.limit_reason())
        async with kit.connected(server=Greeter2) as ends:
            return reasons(ends)

    class Greeter2(kit.Recorder):
        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            transport.write(b"hello")  # so that the client need not wait

    assert kit.run(scenario) == ("MARK_LOST/peer", "LIMIT/local")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_is_refused(kit) -> None:
    async def scenario():
        served = []

        def make():
            served.append(kit.Recorder())
            return served[-1]

        async with kit.serving(make) as port:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                FOREIGN.format(port=port),
                stdout=subprocess.PIPE,
            )
            out, _ = await process.communicate()
            await served[0].until_call("lost")
            return out.decode().strip(), served[0].info_when_made.reason

    client, server = kit.run(scenario)
    assert client == "FOREIGN_USER"
    assert server.name == "FOREIGN_USER"


FOREIGN = """
import asyncio, os
import encodings.ascii, encodings.idna
import pysmc, pysmc.aio.loop, pysmc.fabric.shm
os.setgid(65533), os.setuid(65533)
async def main():
    reader, writer = await asyncio.open_connection("127.0.0.1", {port})
    print(writer.get_extra_info("smc").reason.name)
    writer.close()
    await writer.wait_closed()
pysmc.run(main())
"""


def test_descriptors_run_out(kit) -> None:
    """The soft limit is raised to the hard one, and at that one TCP goes on."""
    child = kit.spawn(
        """
        import asyncio, os, resource, pysmc
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 60))
        async def main():
            server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 60
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            first = writer.get_extra_info("smc").mode
            names, kept = set(), [writer]
            held = []
            while True:
                try:
                    held.append(os.open("/", os.O_RDONLY))
                except OSError:
                    break
            for _ in range(3):  # enough for two TCP sockets, and no more
                os.close(held.pop())
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            info = writer.get_extra_info("smc")
            why = info.reason.name if info.reason else "-"
            print(first, info.mode, why, flush=True)
            os._exit(0)
        pysmc.run(main())
        """
    )
    first, mode, reason = child.stdout.readline().split()
    assert (first, mode) == ("smcr", "tcp")
    assert reason in {"MARK_LOST", "LIMIT"}


# --- SMC-R required


@pytest.mark.parametrize("fault", ["fabrics", "discovery"])
def test_required_and_not_possible_at_the_client(kit, fault) -> None:
    config = Config(**{fault: ()}, fallback="require")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        heard = loop.create_future()

        async def listen(listener) -> None:
            conn, _ = await loop.sock_accept(listener)
            with conn:
                heard.set_result(await loop.sock_recv(conn, 100))

        with socket.create_server((HOST, 0)) as listener:
            listener.setblocking(False)
            task = loop.create_task(listen(listener))
            with pytest.raises(Declined) as caught:
                await asyncio.open_connection(*listener.getsockname())
            assert caught.value.reason.name == "DISABLED"
            assert await heard == b"", "nothing was sent"
            await task

    kit.run(scenario, config=config)


def test_required_and_not_possible_at_the_server(kit, caplog) -> None:
    async def scenario() -> None:
        async with kit.serving(lambda: pytest.fail("made a protocol")) as port:
            reader, writer = (
                await asyncio.to_thread(lambda: plain_exchange(port, b"question")),
                None,
            )
            assert reader == b""
            assert writer is None

    kit.run(scenario, config=Config(fallback="require"))
    assert "SMC-R is required" in caplog.text


def plain_exchange(port: int, data: bytes) -> bytes:
    """Send to a server with a plain socket; what it answers until it ends."""
    with socket.create_connection((HOST, port)) as sock:
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            sock.sendall(data)
            while part := sock.recv(1000):
                answer += part
        return answer


def test_required_and_possible(kit) -> None:
    async def scenario():
        async with kit.connected() as ends:
            return reasons(ends)

    assert kit.run(scenario, config=Config(fallback="require")) == ("smcr", "smcr")


def test_required_with_a_protocol_that_is_accepted_elsewhere(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server((HOST, 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            conn, _ = listener.accept()
            with pytest.raises(Declined):
                await loop.connect_accepted_socket(kit.Recorder, conn)
            client.close()

    kit.run(scenario, config=Config(fallback="require"))
