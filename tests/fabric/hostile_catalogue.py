"""The catalogue of attacks, and what most of them begin and end with."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.fabric.hostile_lines import KIB

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.fabric.hostile_peer import Attack

    Lie = Callable[[Attack], Awaitable[None]]

KINDS: dict[str, Lie] = {}
"""Every kind of attack, by its name; the order is part of what a seed means."""
HONEST: set[str] = set()


def kind(lie: Lie) -> Lie:
    """Enter an attack into the catalogue."""
    KINDS[lie.__name__] = lie
    return lie


def honest(lie: Lie) -> Lie:
    """Enter one that a correct victim does not notice."""
    HONEST.add(lie.__name__)
    return kind(lie)


async def converse(attack: Attack, most: int = 64 * KIB) -> None:
    """Connect, and tell the truth up to a point that the seed chooses."""
    rng = attack.rng
    await attack.connect(rng.randrange(1, 4))
    for puppet in attack.puppets:
        if rng.getrandbits(1):
            await puppet.read(rng.choice((1, 4 * KIB, most)))
        if rng.getrandbits(1):
            await puppet.write(rng.choice((1, 1000, most)))
    attack.distrust()


async def breathe(attack: Attack) -> None:
    """Let the library go on for a few turns, with something to do."""
    for puppet in attack.puppets:
        if not puppet.lost.done() and attack.rng.getrandbits(1):
            puppet.transport.write(puppet.stream[:100])
    for _ in range(5):
        await asyncio.sleep(0)
