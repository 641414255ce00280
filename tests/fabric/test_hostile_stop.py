"""A stopped peer is only idle until TEST LINK decides, and may resume before."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

import pysmc
from tests.fabric.rawpeer import Child

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KIB = 1024
CONFIG = pysmc.Config(
    rmbe_bytes=16 * KIB,
    sndbuf_bytes=16 * KIB,
    test_link_interval=0.2,
    test_link_wait=0.2,
)
PATIENT = pysmc.Config(rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB)
ANSWER = b"still here"
MUCH = 256 * KIB
DEADLINE = 20.0


async def _peer(port: int) -> Any:
    """Answer every message; tell how it ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answered = 0
    try:
        while await reader.readexactly(len(ANSWER)):
            writer.write(ANSWER)
            answered += 1
    except (OSError, asyncio.IncompleteReadError) as exc:
        writer.close()
        return answered, isinstance(exc, OSError)


def _in_child(port: int) -> Any:
    asyncio._set_running_loop(None)
    return pysmc.run(_peer(port), config=PATIENT)


@asynccontextmanager
async def peers(count: int) -> AsyncIterator[list[Any]]:
    """Fork peers; gives the child and our end of the connection of each."""
    accepted: asyncio.Queue[Any] = asyncio.Queue()
    server = await asyncio.start_server(
        lambda *ends: accepted.put_nowait(ends), "127.0.0.1", 0
    )
    port = server.sockets[0].getsockname()[1]
    found = []
    for _ in range(count):
        child = Child(lambda: _in_child(port))
        found.append((child, *await accepted.get()))
        assert found[-1][2].get_extra_info("smc").mode == "smcr"
    yield found
    for _, _, writer in found:
        writer.close()
    server.close()


async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Have one message answered."""
    writer.write(ANSWER)
    async with asyncio.timeout(DEADLINE):
        assert await reader.readexactly(len(ANSWER)) == ANSWER


@pytest.mark.slow
def test_test_link_ends_one_that_stays_stopped() -> None:
    async def main() -> None:
        async with peers(2) as ((stopped, *theirs), (awake, *others)):
            await speak(*theirs)
            await speak(*others)
            os.kill(stopped.pid, signal.SIGSTOP)
            theirs[1].write(ANSWER)
            with pytest.raises(ConnectionResetError):
                async with asyncio.timeout(DEADLINE):
                    await theirs[0].readexactly(1)
            await speak(*others)
            os.kill(stopped.pid, signal.SIGCONT)
            _, was_error = stopped.result()
            assert was_error, "it learns of it when it goes on"
            await speak(*others)
        assert awake.result()[0] == 3

    pysmc.run(main(), config=CONFIG)


@pytest.mark.slow
def test_one_that_resumes_has_lost_nothing() -> None:
    async def main() -> None:
        async with peers(2) as ((stopped, *theirs), (awake, *others)):
            await speak(*theirs)
            os.kill(stopped.pid, signal.SIGSTOP)
            reader, writer = theirs
            writer.write(ANSWER * (MUCH // len(ANSWER)))
            for _ in range(50):
                await speak(*others)
            assert writer.transport.get_write_buffer_size() > 0, "it takes no more"
            os.kill(stopped.pid, signal.SIGCONT)
            async with asyncio.timeout(DEADLINE):
                count = MUCH // len(ANSWER) * len(ANSWER)
                assert await reader.readexactly(count) == ANSWER * (MUCH // len(ANSWER))
        assert stopped.result() == (1 + MUCH // len(ANSWER), False)
        assert awake.result() == (50, False)

    pysmc.run(main(), config=PATIENT)
