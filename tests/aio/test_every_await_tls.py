"""Streams are struck at each point of their way to TLS, on every kind of loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import uvloop

import pysmc
from tests.aio import every_await as harness
from tests.aio.every_await import HOST, Scene, Stage, Visit

if TYPE_CHECKING:
    import ssl
    from collections.abc import Coroutine

pytestmark = pytest.mark.slow

LOOPS = {
    "pysmc": pysmc.new_event_loop,
    "stock": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
NAME = "localhost"


class Tls(NamedTuple):
    """Contexts of both ends."""

    client: ssl.SSLContext
    server: ssl.SSLContext


@pytest.fixture(scope="module")
def tls(authority) -> Tls:
    return Tls(authority.client_context(), authority.server_context())


class OnTls(Scene):
    """Something on the way to TLS.

    Args:
        tls: Of both ends.
    """

    def __init__(self, tls: Tls) -> None:
        self.tls = tls

    async def prove(self, stage: Stage) -> None:
        await harness.prove_by_streams(stage, "smcr")


class Open(OnTls):
    """open_connection with ssl."""

    async def prepare(self, stage: Stage) -> None:
        self.port = await stage.serve_streams(ssl=self.tls.server)

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return self._open(stage)

    async def _open(self, stage: Stage) -> None:
        # No point lies between the two.
        streams = await pysmc.open_connection(
            HOST, self.port, ssl=self.tls.client, server_hostname=NAME
        )
        stage.near.append(Visit(*streams))


class Upgrade(OnTls):
    """start_tls at the client, while the server does the same."""

    async def prepare(self, stage: Stage) -> None:
        port = await stage.serve_streams(self.serve)
        self.visit = Visit(*await pysmc.open_connection(HOST, port))
        assert self.visit.writer.get_extra_info("smc").mode == "smcr"
        stage.near.append(self.visit)
        await harness.until(lambda: stage.far, lambda: "nobody came")

    async def serve(self, visit: Visit) -> None:
        await visit.reader.readexactly(1)
        await visit.writer.start_tls(self.tls.server)
        await harness.echo(visit)

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        self.visit.writer.write(b"?")
        return self.visit.writer.start_tls(self.tls.client, server_hostname=NAME)

    async def check(self, stage: Stage, strike: str) -> None:
        """What was not struck carries bytes, through TLS."""
        if strike in {"", "stop the loop"}:
            assert self.visit.writer.get_extra_info("cipher")
            self.visit.writer.write(b"good")
            async with asyncio.timeout(harness.PATIENCE):
                assert await self.visit.reader.readexactly(4) == b"good"


class Least(NamedTuple):
    """How many points a scene has at least, by kind of loop."""

    scene: type[OnTls]
    pysmc: int
    stock: int
    uvloop: int


SCENES = {
    "open_connection": Least(Open, 21, 24, 18),
    "start_tls": Least(Upgrade, 12, 12, 4),
}
STRIKES = [*harness.BY_TASK, *harness.BY_PEER, "close", "abort", "stop the loop"]
FEW = ["cancel", "peer aborts", "close"]
"""On the loops that use the same TLS."""
CASES = [
    (loop, scene, strike)
    for loop in LOOPS
    for scene in SCENES
    for strike in (STRIKES if loop == "pysmc" else FEW)
]


@pytest.mark.parametrize(("loop", "scene", "strike"), CASES)
def test_tls(tls, loop, scene, strike) -> None:
    row = SCENES[scene]

    async def main() -> int:
        stage = Stage(asyncio.get_running_loop(), 0)
        await harness.prove_by_streams(stage, "smcr")
        await stage.clear()
        return await harness.strike_everywhere(row.scene(tls), strike)

    points = harness.run_on(LOOPS[loop], main)
    assert points >= getattr(row, loop)


def test_the_cases_are_many() -> None:
    assert len(CASES) >= 28
