"""A client and a server that check every byte, for connections by the TCP option."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pysmc

HOST = "127.0.0.1"
QUESTION, ANSWER = b"what is it? " * 1000, b"this " * 2000


async def answer(reader: Any, writer: Any) -> None:
    """Serve: keep what was asked with the writer, answer, close."""
    assert await reader.readexactly(len(QUESTION)) == QUESTION
    writer.write(ANSWER)
    await writer.drain()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


class Service:
    """`answer` behind a port, with what every connection said of itself."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.infos: list[Any] = []
        self.failed: list[BaseException] = []

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.server.sockets[0].getsockname()[:2]
        return {"::": "::1"}.get(host, host), port


@contextlib.asynccontextmanager
async def service(host: str = HOST, port: int = 0, **options: Any) -> Any:
    made: Service

    async def serve(reader: Any, writer: Any) -> None:
        made.infos.append(writer.get_extra_info("smc"))
        try:
            await answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError) as error:
            made.failed.append(error)
            writer.transport.abort()

    server = await pysmc.start_server(serve, host, port, **options)
    made = Service(server)
    try:
        yield made
    finally:
        server.close()
        await server.wait_closed()


async def ask(address: Any, **options: Any) -> Any:
    """Ask, check the answer, and give what the connection says of itself."""
    host, port = address
    reader, writer = await pysmc.open_connection(host, port, **options)
    info = writer.get_extra_info("smc")
    writer.write(QUESTION)
    await writer.drain()
    assert await reader.readexactly(len(ANSWER)) == ANSWER
    writer.close()
    await writer.wait_closed()
    return info


def both(infos: Any) -> list[tuple[Any, ...]]:
    return [(info.mode, info.discovery) for info in infos]


SMC = ("smcr", "tcp_option")
