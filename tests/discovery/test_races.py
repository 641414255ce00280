"""Both ends give up at random moments, and many connections leave nothing behind."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.discovery.order import Way

if TYPE_CHECKING:
    from collections.abc import Callable


# --- races and long runs --------------------------------------------------------------


async def _race_server(
    say: Callable[[Any], None], make_kit: Callable[[], Any], seed: int, rounds: int
) -> None:
    """Accept, wait a random moment, confirm; report all verdicts at the end."""
    kit = make_kit()
    chance = random.Random(seed)
    server = kit.discovery(discovery_wait=0.006)
    listener = kit.listener()
    server.announce(listener)
    say(listener.getsockname()[1])
    verdicts = []
    for _ in range(rounds):
        conn = await kit.accept(listener)
        assert server.inspect(conn) is Way.LOCAL
        if chance.random() < 0.5:
            await kit.after(chance.uniform(0, 0.006))
        verdicts.append(kit.short(await server.confirm(conn)) == "SMC")
        conn.close()
    say(verdicts)
    kit.close()


def _race(make_kit: Any, fork: Any, seed: int, rounds: int) -> None:
    """Both ends give up at random moments around the other's decision."""
    child = fork(_race_server, make_kit, seed, rounds)
    port = child.hear()

    async def connect() -> list[bool]:
        kit = make_kit()
        chance = random.Random(seed + 1)
        verdicts = []
        clients = [
            kit.discovery(discovery_wait=wait) for wait in (0.003, 0.004, 0.006, 1.0)
        ]
        for _ in range(rounds):
            client = chance.choice(clients)
            sock, mark = await kit.dial(client, "127.0.0.1", port)
            # About when the server's share of its wait is over.
            moment = chance.choice((0, 0.003, 0.006))
            if moment:
                await kit.after(max(0, chance.gauss(moment, 0.0005)))
            if chance.random() < 0.1:
                client.settle_tcp(mark)
            verdict = await client.wait_confirmed(mark)
            verdicts.append(verdict.smc)
            sock.close()
        kit.close()
        return verdicts

    verdicts = asyncio.run(connect())
    assert verdicts == child.hear(), f"the ends disagree (seed {seed})"
    assert {True, False} == set(verdicts), "each outcome must have been seen"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_both_ends_always_agree(make_kit: Any, fork: Any, seed: int) -> None:
    _race(make_kit, fork, seed, rounds=500)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_both_ends_always_agree_for_long(make_kit: Any, fork: Any) -> None:
    _race(make_kit, fork, seed=99, rounds=50_000)


async def _cycles(kit: Any, count: int) -> None:
    client, server = kit.discovery(), kit.discovery()
    listener = kit.listener()
    server.announce(listener)
    before = 0
    for number in range(count):
        assert await kit.meet(client, server, listener) == ("SMC", "SMC")
        while len(kit.sockets) > 1:
            kit.sockets.pop().close()
        if number == 10:
            before = kit.count_descriptors()
    assert kit.count_descriptors() == before
    assert client._open_marks == set()
    assert len(client._by_socket) == 0
    assert server._offers == set()


async def test_cycles_leave_nothing_behind(kit: Any) -> None:
    await _cycles(kit, 200)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_ten_thousand_cycles_leave_nothing_behind(kit: Any) -> None:
    await _cycles(kit, 10_000)
