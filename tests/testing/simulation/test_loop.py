"""The loop of a process: shuffled only where asyncio leaves the order open."""

from __future__ import annotations

import asyncio
import errno
import selectors
import socket
from typing import Any

import pytest

from pysmc.testing.simulation import World
from pysmc.testing.simulation.loop import SimSelector
from tests.testing.simulation.kit import begin

SEEDS = 60


def orders(play: Any, shuffle: bool = True) -> set[tuple[Any, ...]]:
    """Collect what a play writes down, over many seeds."""
    found = set()
    for seed in range(SEEDS):
        world = World(seed, shuffle=shuffle)
        written: list[Any] = []
        play(world.process("p"), written)
        world.run()
        assert world.close() == []
        found.add(tuple(written))
    return found


def test_callbacks_keep_their_order() -> None:
    def play(process, written) -> None:
        for number in range(5):
            process.loop.call_soon(written.append, number)

    assert orders(play) == {(0, 1, 2, 3, 4)}


def test_timers_of_one_instant_ring_in_any_order() -> None:
    def play(process, written) -> None:
        for number in range(3):
            process.loop.call_later(1.0, written.append, number)
        process.loop.call_later(1.1, written.append, "later")

    found = orders(play)
    assert len(found) == 6
    assert all(order[-1] == "later" for order in found)
    assert len(orders(play, shuffle=False)) == 1


def test_tasks_run_in_any_order_but_never_before_earlier_callbacks() -> None:
    def play(process, written) -> None:
        async def step(number: int) -> None:
            written.append(number)

        process.loop.call_soon(written.append, "first")
        process.start(step(1))
        process.start(step(2))
        process.loop.call_soon(written.append, "last")

    found = orders(play)
    assert all(order[0] == "first" for order in found)
    assert {order[1:] for order in found} == {
        (1, 2, "last"),
        (2, 1, "last"),
        (1, "last", 2),
        (2, "last", 1),
        ("last", 1, 2),
        ("last", 2, 1),
    }
    assert orders(play, shuffle=False) == {("first", 1, 2, "last")}


def test_what_a_world_has_not_is_refused() -> None:
    world = World(1)
    process = world.process("p")
    loop = process.loop

    async def use() -> None:
        with pytest.raises(ValueError, match="process.dial"):
            await asyncio.open_connection("127.0.0.1", 7)
        with pytest.raises(ValueError, match="process.listen"):
            await asyncio.start_server(print, "127.0.0.1", 7)
        with pytest.raises(RuntimeError, match="no threads"):
            loop.run_in_executor(None, print)
        with pytest.raises(socket.gaierror):
            await loop.getaddrinfo("localhost", 7)
        found = await loop.getaddrinfo("10.0.0.1", 7)
        assert found[0][4] == ("10.0.0.1", 7)

    task = process.start(use())
    world.run(until=task)
    task.result()
    assert world.close() == []


def test_a_selector_says_what_epoll_says_of_closed_descriptors() -> None:
    kit = begin(1)
    process = kit.client
    selector = SimSelector(process)
    sock = kit.world.tcp.socket(process.descriptors, process.host)
    fd = sock.fileno()
    selector.register(fd, selectors.EVENT_READ, "data")
    with pytest.raises(KeyError):
        selector.register(fd, selectors.EVENT_READ)
    assert selector.get_key(fd).data == "data"
    sock.close()
    other = kit.world.tcp.socket(process.descriptors, process.host)
    assert other.fileno() == fd, "the lowest free number"
    assert not selector.has_events()
    with pytest.raises(OSError, match="No such file") as caught:
        selector.modify(fd, selectors.EVENT_WRITE)
    assert caught.value.errno == errno.ENOENT
    selector.unregister(fd)
    other.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        selector.register(fd, selectors.EVENT_READ)
    assert kit.close() == []
