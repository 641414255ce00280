"""Two hundred of each way to end leave no object, no descriptor and no timer."""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import pysmc
from pysmc.config import KIB, Config
from pysmc.disposal import wait_closed

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.load,
    pytest.mark.usefixtures("quick_collections"),
]

HOST = "127.0.0.1"
PATIENCE = 30.0
WARM, COUNT = 20, 200
BOUNDED_MAX = 2 * 64
CONFIG = Config(rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB)


class End(asyncio.Protocol):
    """Counts what is open."""

    def __init__(self, living: set[End]) -> None:
        self.living = living
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.living.add(self)

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"raise"):
            raise ZeroDivisionError

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.living.discard(self)


def close(here: End, there: End) -> None:
    here.transport.close()


def abort(here: End, there: End) -> None:
    here.transport.abort()


def finish(here: End, there: End) -> None:
    here.transport.write_eof()


def close_both(here: End, there: End) -> None:
    here.transport.close()
    there.transport.close()


def abort_both(here: End, there: End) -> None:
    here.transport.abort()
    there.transport.abort()


def close_with_unread_bytes(here: End, there: End) -> None:
    there.transport.pause_reading()
    here.transport.write(b"unread")
    here.transport.close()
    there.transport.close()


def close_with_unsent_bytes(here: End, there: End) -> None:
    here.transport.write(bytes(100_000))
    here.transport.close()


def abort_with_unsent_bytes(here: End, there: End) -> None:
    here.transport.write(bytes(100_000))
    here.transport.abort()


def raise_at_the_peer(here: End, there: End) -> None:
    here.transport.write(b"raise")


def byte_on_tcp(here: End, there: End) -> None:
    here.transport.get_extra_info("socket")._sock.send(b"!")


ENDINGS: list[Callable[[End, End], None]] = [
    close,
    abort,
    finish,
    close_both,
    abort_both,
    close_with_unread_bytes,
    close_with_unsent_bytes,
    abort_with_unsent_bytes,
    raise_at_the_peer,
    byte_on_tcp,
]


def ours() -> Counter[str]:
    """Count the living objects of this package's classes, by class."""
    gc.collect()
    kinds = (type(each) for each in gc.get_objects())
    found = Counter(kind.__qualname__ for kind in kinds if is_ours(kind))
    # Places of deadlines that were taken away: at most 64, then all are dropped.
    assert found.pop("_Entry", 0) <= BOUNDED_MAX
    return found


def is_ours(kind: type) -> bool:
    return kind.__module__.startswith(("pysmc.aio", "pysmc.core", "pysmc.fabric"))


def held(loop: Any) -> dict[str, Any]:
    wait_closed(5)
    scheduled = [each for each in loop._scheduled if not each.cancelled()]
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "watched": len(loop._selector.get_map()),
        "timers": len(scheduled),
        "tasks": len(asyncio.all_tasks()),
        "objects": ours(),
    }


async def end_so_often(
    port: int, accepted: list[End], living: set[End], end: Any, count: int
) -> None:
    loop = asyncio.get_running_loop()
    for number in range(count):
        _, client = await loop.create_connection(lambda: End(living), HOST, port)
        while not accepted or accepted[-1].transport is None:
            await asyncio.sleep(0)
        both = [client, accepted.pop()]
        end(*(both if number % 2 else reversed(both)))
        if end is byte_on_tcp or end is raise_at_the_peer:
            both[0].transport.pause_reading()
            both[0].transport.resume_reading()
        while living:
            await asyncio.sleep(0)
        del client, both


@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
def test_two_hundred_of_an_ending_leave_nothing(end) -> None:
    living: set[End] = set()
    accepted: list[End] = []

    def make() -> End:
        accepted.append(End(living))
        return accepted[-1]

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)
        server = await loop.create_server(make, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        async with asyncio.timeout(PATIENCE * 2):
            await end_so_often(port, accepted, living, end, WARM)
            before = await rested(loop)
            await end_so_often(port, accepted, living, end, COUNT)
            after = await rested(loop)
        server.close()
        await server.wait_closed()
        # Less is possible: what the first ones left to a deadline was given back.
        assert after.pop("objects") - before.pop("objects") == Counter()
        grown = {name: size for name, size in after.items() if size > before[name]}
        assert grown == {}

    factory = lambda: pysmc.new_event_loop(CONFIG)  # noqa: E731
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(scenario())


async def rested(loop: Any) -> dict[str, Any]:
    """Wait until every connection was given back by both ends; give what is held."""
    endpoint = loop.driver.endpoint
    while any(group.connections for group in endpoint.groups):
        await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)
    return held(loop)
