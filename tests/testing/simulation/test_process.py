"""Processes of a world: crash, stop, cancel, and what they may not do."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from pysmc.testing.simulation import Stuck, World
from tests.testing.simulation.kit import PLAIN, SMALL, begin

SEEDS = 20


@pytest.mark.parametrize("client", [SMALL, PLAIN])
@pytest.mark.parametrize("newest_only", [False, True])
def test_a_crash_ends_the_peers_connection(client, newest_only) -> None:
    """What the kernel says and what the fabric says; nothing of its Python runs."""
    for seed in range(SEEDS):
        kit = begin(seed, client=client, newest_only=newest_only)
        after: list[str] = []

        async def talk(kit=kit, after=after) -> None:
            reader, writer = await kit.client.open_connection(kit.listener)
            try:
                writer.write(b"x" * 100)
                await reader.read()
            finally:
                if not kit.world.is_closed:
                    after.append("ran")
                writer.close()

        task = kit.client.start(talk())
        kit.step(2 + 3 * seed)
        kit.client.crash()
        kit.client.crash()  # idempotent
        kit.world.run(until=kit.world.now + 30)
        assert not kit.client.is_alive
        assert after == [] or task.done()
        assert len(kit.ends) == len(kit.modes), "who was connected has ended"
        assert kit.close() == []
        assert kit.world.errors == []


def test_a_server_that_crashes_refuses_from_then_on() -> None:
    kit = begin(1)
    kit.server.crash()
    with pytest.raises(ConnectionRefusedError):
        kit.run(kit.talk(b"x"))
    assert kit.close() == []


def test_a_stopped_process_is_only_late() -> None:
    for seed in range(SEEDS):
        kit = begin(seed)
        task = kit.client.start(kit.talk(b"hello"))
        kit.step(7 + seed)
        kit.server.stop()
        turns = kit.server.turns
        kit.world.run(until=kit.world.now + 0.3)
        assert kit.server.turns == turns
        kit.server.resume()
        kit.world.run(until=task)
        assert task.result() == b"hello"
        assert kit.close() == []


def test_a_task_is_cancelled_at_the_step_that_was_named() -> None:
    for nth in range(1, 7):
        world = World(nth)
        process = world.process("p")
        steps: list[int] = []

        async def count(steps=steps) -> None:
            waiter = asyncio.get_running_loop().create_future
            for number in range(4):
                steps.append(number)
                made = waiter()
                asyncio.get_running_loop().call_soon(made.set_result, None)
                await made

        task = process.start(count())
        process.cancel_at(task, nth)
        world.run()
        assert task.cancelled() is (nth <= 5)
        # Its first step writes one number, its fifth only returns.
        assert len(steps) == min(nth - 1, 4)
        assert world.close() == []


def test_a_world_stands_still_with_its_only_process() -> None:
    kit = begin(1)
    kit.client.start(kit.talk(b"x"))
    kit.server.stop()
    with pytest.raises(Stuck):
        kit.world.run()
    kit.server.resume()
    kit.world.run(until=kit.world.now + 1)
    assert kit.close() == []


def test_descriptors_can_run_out() -> None:
    kit = begin(1)
    kit.client.descriptors.limit = 0
    with pytest.raises(OSError, match="Too many open files") as caught:
        kit.run(kit.talk(b"x"))
    assert caught.value.errno == errno.EMFILE
    with pytest.raises(OSError, match="in use"):
        kit.server.listen(7)
    assert kit.close() == []


def test_coroutines_of_a_crashed_process_are_not_heard_of_again() -> None:
    """Not even those that wait where they should end."""
    world = World(1)
    process = world.process("p")
    reached: list[Any] = []
    awaited = []  # or the collector ends who waits for what nobody knows

    async def stubborn() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(5):
            awaited.append(loop.create_future())
            try:
                await awaited[-1]
            except GeneratorExit:
                reached.append(world.is_closed)

    process.start(stubborn())
    world.run(until=lambda: process.turns == 1)
    process.crash()
    with pytest.raises(Stuck):
        world.run(until=lambda: False)
    assert reached == []
    assert world.close() == []
    assert all(reached)
    assert len(reached) > 1
