"""Recognition in a world: who is recognised, who not, and that both ends agree."""

from __future__ import annotations

import asyncio
import inspect
import socket
from dataclasses import replace
from typing import Any

import pytest

from pysmc.discovery import Discovery
from pysmc.testing.simulation.recognition import SimDiscovery
from tests.testing.simulation.kit import PLAIN, SMALL, begin, echo_run, mode_of

SEEDS = 20
STATIC = replace(SMALL, discovery=("static",))


def test_it_has_every_method_of_the_real_discovery() -> None:
    """With the same parameters: the driver cannot tell them apart."""
    for name, method in vars(Discovery).items():
        if not name.startswith("_") and not isinstance(method, property):
            own = getattr(SimDiscovery, name)
            parameters = inspect.signature(method).parameters
            assert list(inspect.signature(own).parameters) == list(parameters), name
            assert inspect.iscoroutinefunction(own) == inspect.iscoroutinefunction(
                method
            ), name


@pytest.mark.parametrize(
    ("server", "client", "expected"),
    [
        (SMALL, SMALL, ["client smcr", "server smcr"]),
        (PLAIN, SMALL, ["client tcp", "server tcp"]),
        (SMALL, PLAIN, ["client tcp", "server tcp"]),
        (
            replace(STATIC, peers=("10.0.0.2",)),
            replace(STATIC, peers=("10.0.0.1:7",)),
            ["client smcr", "server smcr"],
        ),
        (STATIC, STATIC, ["client tcp", "server tcp"]),
        (SMALL, STATIC, ["client tcp", "server tcp"]),
        (STATIC, SMALL, ["client tcp", "server tcp"]),
    ],
)
def test_who_is_recognised(server, client, expected) -> None:
    for seed in range(SEEDS):
        kit = echo_run(seed, server=server, client=client)
        assert sorted(kit.modes) == expected


def test_a_mark_that_is_lost_on_the_path_costs_a_wait() -> None:
    kit = begin(1)
    kit.world.tcp.strips_marks = True
    begun = kit.world.now
    assert kit.run(kit.talk(b"x")) == b"x"
    assert kit.world.now - begun == pytest.approx(SMALL.discovery_wait)
    assert sorted(kit.modes) == ["client tcp", "server tcp"]
    assert kit.close() == []


def test_a_client_that_never_asks_is_tcp() -> None:
    """It uses the socket itself; the server is told as soon as it offers."""
    for seed in range(SEEDS):
        kit = begin(seed)

        async def raw(kit=kit) -> bytes:
            sock = await kit.client.dial(kit.listener)
            try:
                await kit.client.loop.sock_sendall(sock, b"raw")
                sock.shutdown(1)
                return bytes(await kit.client.loop.sock_recv(sock, 10))
            finally:
                sock.close()

        assert kit.run(raw()) == b"raw"
        assert kit.modes == ["server tcp"]
        assert kit.close() == []


@pytest.mark.slow
def test_both_ends_agree_whenever_the_client_is_cancelled() -> None:
    """At each step of its connect: no side believes what the other does not."""
    ends = set()
    for nth in range(1, 12):
        for seed in range(5):
            kit = begin(seed)
            task = kit.client.start(kit.talk(b"x" * 50))
            kit.client.cancel_at(task, nth)
            kit.world.run(until=kit.world.now + 30)
            assert task.done()
            ends.add("cancelled" if task.cancelled() else "done")
            clients = [mode for mode in kit.modes if mode.startswith("client")]
            servers = [mode for mode in kit.modes if mode.startswith("server")]
            if clients and servers:
                assert clients[0].split()[1] == servers[0].split()[1]
            assert kit.close() == []
            assert kit.world.errors == []
    assert ends == {"cancelled", "done"}


def test_a_server_that_is_busy_for_long_is_given_up() -> None:
    for seed in range(SEEDS):
        kit = begin(seed)
        task = kit.client.start(kit.talk(b"late"))
        kit.server.stop()
        kit.world.run(until=kit.world.now + 2 * SMALL.discovery_wait)
        kit.server.resume()
        kit.world.run(until=task)
        assert task.result() == b"late"
        assert sorted(kit.modes) == ["client tcp", "server tcp"]
        assert kit.close() == []


def test_a_server_without_room_says_so_at_once() -> None:
    """Nobody waits for the end of `discovery_wait`."""
    for seed in range(SEEDS):
        kit = begin(seed, server=replace(SMALL, max_handshakes=1))
        tasks = [kit.client.start(kit.talk(b"x")) for _ in range(2)]
        kit.world.run(until=lambda t=tasks: all(task.done() for task in t))  # type: ignore[misc]
        assert [task.result() for task in tasks] == [b"x", b"x"]
        assert kit.world.now < SMALL.discovery_wait
        assert kit.close() == []
        assert kit.world.errors == []


def test_a_client_without_room_says_so() -> None:
    modes = set()
    for seed in range(SEEDS):
        kit = begin(seed, client=replace(SMALL, max_handshakes=1))
        tasks = [kit.client.start(kit.talk(b"x")) for _ in range(3)]
        kit.world.run(until=lambda t=tasks: all(task.done() for task in t))  # type: ignore[misc]
        assert [task.result() for task in tasks] == [b"x"] * 3
        modes.update(kit.modes)
        assert kit.close() == []
        assert kit.world.errors == []
    assert len(modes) == 4


def test_an_address_of_this_host_is_known_without_asking_the_host() -> None:
    kit = begin(1)
    assert kit.run(kit.talk(b"x")) == b"x"
    is_here = kit.server.driver.admission.is_here
    assert is_here("10.0.0.1")
    assert not is_here("10.0.0.2")
    assert kit.close() == []


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("reset", "The connection has gone"),
        ("close", "The socket was closed"),
        ("raw", "uses the TCP socket itself"),
        ("late", "uses the TCP socket itself"),
        ("stop", "discovery was closed"),
    ],
)
def test_what_becomes_of_an_offer_that_is_held(ending, expected) -> None:
    """The client holds it back until somebody asks."""
    for seed in range(SEEDS):
        kit = begin(seed)

        async def hold(kit=kit) -> str:
            discovery: Any = kit.client.driver.discovery
            sock: Any = kit.world.tcp.socket(kit.client.descriptors, kit.client.host)
            mark = discovery.prepare(sock, kit.listener.name)
            await asyncio.SelectorEventLoop.sock_connect(
                kit.client.loop, sock, kit.listener.name
            )
            discovery.connected(mark)
            await pause(1.0 if ending == "late" else 0.01)
            if ending == "reset":
                kit.world.tcp.connections[0].reset()
            elif ending == "close":
                sock.close()
            elif ending == "raw":
                discovery.settle_tcp(mark)
                discovery.settle_tcp(mark)  # idempotent
            elif ending == "stop":
                discovery.close()
            verdict = await discovery.wait_confirmed(mark)
            sock.close()
            return str(verdict.reason)

        assert expected in kit.run(hold())
        assert kit.close() == []
        assert kit.world.errors == []
        assert "server smcr" not in kit.modes


async def pause(seconds: float) -> None:
    """Wait on the world's clock."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    loop.call_later(seconds, waiter.set_result, None)
    await waiter


@pytest.mark.parametrize("seed", range(0, SEEDS, 2))
def test_a_server_finds_a_connection_that_has_ended_and_is_forgotten(seed) -> None:
    """It was reset in the queue of a stopped server, and others came meanwhile."""
    kit = begin(seed)
    kit.server.stop()
    first = kit.client.start(kit.talk(b"x"))
    kit.world.run(until=lambda: bool(kit.listener.queue))
    (connection,) = kit.world.tcp.connections
    connection.reset()
    second = kit.client.start(kit.talk(b"y"))
    kit.world.run(until=lambda: connection not in kit.world.tcp.connections)
    kit.server.resume()
    kit.world.run(until=lambda: first.done() and second.done())
    assert isinstance(first.exception(), OSError)
    assert second.result() == b"y"
    assert kit.close() == []
    assert kit.world.errors == []


def test_a_client_is_connected_over_what_has_ended_and_is_forgotten() -> None:
    """It was reset between its connect and the turn in which that is heard of."""
    kit = begin(1)

    async def hold() -> str:
        discovery: Any = kit.client.driver.discovery
        sock: Any = kit.world.tcp.socket(kit.client.descriptors, kit.client.host)
        mark = discovery.prepare(sock, kit.listener.name)
        await asyncio.SelectorEventLoop.sock_connect(
            kit.client.loop, sock, kit.listener.name
        )
        kit.world.tcp.connections[0].reset()
        kit.world.tcp.tidy()
        assert kit.world.tcp.connections == []
        discovery.connected(mark)
        verdict = await discovery.wait_confirmed(mark)
        sock.close()
        return str(verdict.reason)

    assert "The rendezvous could not be opened" in kit.run(hold())
    assert kit.close() == []
    assert kit.world.errors == []


def test_a_listener_is_announced_once_more_after_another() -> None:
    kit = begin(1)
    discovery: Any = kit.server.driver.discovery
    announcement = discovery.announce(kit.listener)
    assert announcement.is_holder
    assert not announcement.is_closed
    announcement.close()
    assert announcement.is_closed
    plain: Any = begin(1, server=PLAIN)
    assert plain.server.driver.discovery.announce(plain.listener) is None
    assert kit.close() == plain.close() == []


def test_the_limits_of_a_marked_socket_are_those_of_the_real_one() -> None:
    """A program's own TOS, and a socket that is already closed."""
    kit = begin(1)

    async def talk(tos: int) -> str:
        sock: Any = kit.world.tcp.socket(kit.client.descriptors, kit.client.host)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        await kit.client.loop.sock_connect(sock, kit.listener.name)
        reader, writer = await asyncio.open_connection(sock=sock)
        mode = mode_of(writer)
        writer.write_eof()
        await reader.read()
        writer.close()
        return mode

    assert kit.run(talk(8)) == "tcp"
    assert kit.run(talk(0)) == "smcr"
    assert kit.close() == []


def test_a_closed_listener_is_announced_no_more() -> None:
    kit = begin(1)
    assert kit.world.tcp.is_announced(7)
    kit.serving.close()
    kit.world.run(until=kit.world.now + 1)
    assert not kit.world.tcp.is_announced(7)
    with pytest.raises(ConnectionRefusedError):
        kit.run(kit.talk(b"x"))
    assert kit.close() == []


def test_a_loop_that_closes_leaves_no_meeting_behind() -> None:
    for seed in range(0, SEEDS, 2):
        kit = begin(seed)
        task = kit.client.start(kit.talk(b"x"))
        kit.step(4 + seed)
        leaks = kit.world.close()
        assert task.done()
        kinds = {leak.split(": ")[1].split()[0] for leak in leaks}
        assert kinds <= {"task", "socket"}, leaks
        assert isinstance(kit.serving, asyncio.Server)
