"""Recognition in a world: who is recognised, who not, and that both ends agree."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.testing.simulation.kit import PLAIN, SMALL, begin, echo_run

SEEDS = 20
STATIC = replace(SMALL, discovery=("static",))


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
    for seed in range(SEEDS):
        kit = begin(seed)
        task = kit.client.start(kit.talk(b"x"))
        kit.step(4 + seed)
        leaks = kit.world.close()
        assert task.done()
        kinds = {leak.split(": ")[1].split()[0] for leak in leaks}
        assert kinds <= {"task", "socket"}, leaks
        assert isinstance(kit.serving, asyncio.Server)
