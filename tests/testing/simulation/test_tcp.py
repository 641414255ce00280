"""Simulated TCP: what is lost, late, in pieces, reset or silent on its way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.testing.simulation.kit import PLAIN, SMALL, begin

SEEDS = 20
LENGTH = 100_000


def with_connection(kit, change) -> None:
    """Do something with every connection before its SYN."""
    kit.world.tcp.on_connection = change


@pytest.mark.slow
@pytest.mark.parametrize("client", [SMALL, PLAIN])
def test_pieces_of_any_size_and_delays_change_nothing(client) -> None:
    for seed in range(SEEDS):
        kit = begin(seed, client=client, trace=False)
        rng = kit.world.rng

        def shape(connection: Any, rng=rng) -> None:
            connection.cut(rng.randint(1, 400), rng.choice([0, 1, 100]))
            connection.delay(rng.choice([0.0, 0.01]))

        with_connection(kit, shape)
        data = rng.randbytes(500)
        assert kit.run(kit.talk(data)) == data
        assert kit.close() == []


def test_small_buffers_hold_a_sender_back() -> None:
    kit = begin(1, client=PLAIN)
    kit.world.tcp.sndbuf_bytes = 1000
    kit.world.tcp.rcvbuf_bytes = 300
    data = kit.world.rng.randbytes(LENGTH)
    assert kit.run(kit.talk(data)) == data
    assert kit.close() == []


def test_a_reset_on_the_path_ends_both_ends() -> None:
    for config in (SMALL, PLAIN):
        for seed in range(SEEDS):
            kit = begin(seed, client=config)
            task = kit.client.start(kit.talk(b"x" * 1000))
            kit.step(4 + 2 * seed)
            for connection in kit.world.tcp.connections:
                connection.reset()
            kit.world.run(until=kit.world.now + 30)
            assert task.done()
            error = task.exception()
            assert error is None or isinstance(error, OSError)
            assert kit.close() == []


def test_a_connection_that_died_silently_times_out() -> None:
    kit = begin(1, client=PLAIN)

    async def talk() -> bytes:
        reader, writer = await kit.client.open_connection(kit.listener)
        try:
            (connection,) = kit.world.tcp.connections
            connection.kill()
            writer.write(b"x")
            return await reader.read()
        finally:
            writer.close()

    begun = kit.world.now
    with pytest.raises(TimeoutError):
        kit.run(talk())
    assert 900 < kit.world.now - begun < 1000
    # The server's end waits for ever, as it does in life without keepalive.
    leaks = kit.close()
    assert [leak.split(": ")[0] for leak in leaks] == ["server", "server"]


def test_a_syn_that_nobody_hears_times_out() -> None:
    kit = begin(1)
    with_connection(kit, lambda connection: connection.kill())
    begun = kit.world.now
    with pytest.raises(TimeoutError):
        kit.run(kit.talk(b"x"))
    assert kit.world.now - begun == pytest.approx(127)
    assert kit.close() == []


def test_a_full_backlog_makes_clients_wait() -> None:
    kit = begin(1, client=PLAIN)
    kit.serving.close()
    listener = kit.server.listen(8, backlog=1)

    async def dial() -> None:
        sock = await kit.client.dial(listener)
        sock.close()

    tasks = [kit.client.start(dial()) for _ in range(4)]
    kit.world.run(until=kit.world.now + 10)
    assert [task.done() for task in tasks].count(True) == 2

    async def accept() -> None:
        loop: Any = asyncio.get_running_loop()
        for _ in tasks:
            conn, _ = await loop.sock_accept(listener)
            conn.close()
        listener.close()

    kit.play(kit.server, accept())
    kit.world.run(until=lambda: all(task.done() for task in tasks))
    assert [task.exception() for task in tasks] == [None] * 4
    assert kit.close() == []


def test_a_connection_can_be_held() -> None:
    kit = begin(1, client=PLAIN)
    with_connection(kit, lambda connection: connection.hold())
    task = kit.client.start(kit.talk(b"x"))
    kit.world.run(until=kit.world.now + 60)
    assert not task.done()
    kit.world.tcp.connections[0].hold(held=False)
    kit.world.run(until=task)
    assert task.result() == b"x"
    assert kit.close() == []
    assert kit.world.tcp.connections[0].is_over
