"""A world with a server that echoes and a client: what most tests here begin with."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pysmc.config import Config
from pysmc.testing.simulation import World

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from pysmc.testing.simulation import Process
    from pysmc.testing.simulation.sockets import SimSocket

SMALL = Config(rmbe_bytes=16384, sndbuf_bytes=16384)
PLAIN = Config(fabrics=())
PORT = 7


@dataclass
class Echo:
    """Two processes of a world, and what their ends came to."""

    world: World
    server: Process
    client: Process
    listener: SimSocket
    serving: asyncio.Server
    modes: list[str] = field(default_factory=list)
    """How the ends ran, the server's and the client's."""
    ends: list[str] = field(default_factory=list)
    """How the server's connections ended."""

    async def echo(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer with what was received, once it has ended."""
        self.modes.append(f"server {mode_of(writer)}")
        try:
            writer.write(await reader.read())
            writer.close()
            await writer.wait_closed()
            self.ends.append("closed")
        except OSError as error:
            writer.close()
            self.ends.append(type(error).__name__)

    async def talk(self, data: bytes) -> bytes:
        """Send, and receive the echo."""
        reader, writer = await self.client.open_connection(self.listener)
        self.modes.append(f"client {mode_of(writer)}")
        try:
            writer.write(data)
            writer.write_eof()
            return await reader.read()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def run(self, talk: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine of the client to its end."""
        return self.play(self.client, talk)

    def play(self, process: Process, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine of a process to its end."""
        task = process.start(coroutine)
        self.world.run(until=task)
        return task.result()

    def step(self, count: int) -> None:
        """Make so many steps, or as many as there are before the clock moves."""
        for _ in range(count):
            if not self.world.step():
                return

    def close(self) -> list[str]:
        """Close the server, let things end, and tell what is left."""
        if self.server.is_alive:
            self.serving.close()
        self.world.run(until=self.world.now + 30)
        return self.world.close()


def mode_of(writer: asyncio.StreamWriter) -> str:
    info = writer.get_extra_info("smc")
    return "none" if info is None else str(info.mode)


def begin(
    seed: int = 1,
    server: Config = SMALL,
    client: Config = SMALL,
    serve: Callable[..., Any] | None = None,
    **options: Any,
) -> Echo:
    """Make the world and its server."""
    world = World(seed, **options)
    processes = world.process("server", server), world.process("client", client)
    listener: Any = processes[0].listen(PORT)
    kit = Echo(world, *processes, listener, None)  # type: ignore[arg-type]

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve or kit.echo, sock=listener)

    kit.serving = kit.play(kit.server, start())
    return kit


def echo_run(seed: int, size: int = 1000, **options: Any) -> Echo:
    """Connect, echo and close, and check that all is well."""
    kit = begin(seed, **options)
    data = kit.world.rng.randbytes(size)
    assert kit.run(kit.talk(data)) == data
    assert kit.close() == []
    assert kit.world.errors == []
    assert kit.ends == ["closed"]
    return kit


def digests(count: int) -> list[str]:
    """Run so many seeds, and give what their traces come to."""
    return [
        hashlib.sha256(
            "\n".join(echo_run(seed, check_every=0).world.trace).encode()
        ).hexdigest()
        for seed in range(count)
    ]
