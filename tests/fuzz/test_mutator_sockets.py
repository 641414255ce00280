"""The same over real sockets and shared memory: a proxy changes what CLC says.

Two loops in two threads, each with a device of its own; the proxy sees TCP alone. A
change of what nobody checks (see `test_mutator`) ends with an error here: the fabric
knows what its peer registered.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import pysmc
from pysmc.config import KIB, Config
from tests.fuzz.in_path import Change, Place, payload
from tests.fuzz.proxy import HOST, PATIENCE, Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCEPT, CONFIRM = Place("server", "tcp"), Place("client", "tcp", 1)
PROPOSAL = Place("client", "tcp")
WHERE = "peers"
QUIET = 2.0
"""Seconds after which nothing more will arrive on this machine."""
CONFIG = Config(
    discovery=("static",),
    peers=(HOST,),
    rmbe_bytes=32 * KIB,
    sndbuf_bytes=32 * KIB,
    proposal_wait=0.5,
    accept_wait=0.5,
    confirm_wait=0.5,
    handshake_wait=1.5,
    confirm_link_server_wait=0.5,
    confirm_link_client_wait=1.0,
    decline_wait=0.25,
    llc_wait=0.25,
)


class End(NamedTuple):
    """What an application saw."""

    mode: str
    """"smcr", "tcp" or "error"."""
    data: bytes
    error: str = ""


async def use(reader: Any, writer: Any, name: str) -> End:
    """Greet, say the rest, and read what comes until it is quiet."""
    data, mode = bytearray(), writer.get_extra_info("smc").mode
    try:
        mine = payload(name)
        writer.write(mine[:64])
        async with asyncio.timeout(QUIET):
            data += await reader.readexactly(64)
        writer.write(mine[64:])
        while len(data) < len(mine):
            async with asyncio.timeout(QUIET):
                piece = await reader.read(1 << 16)
            if not piece:
                return End(mode, bytes(data), "EOF")
            data += piece
        async with asyncio.timeout(QUIET):
            await writer.drain()
    except asyncio.IncompleteReadError as error:
        return End(mode, bytes(data + error.partial), "EOF")
    except TimeoutError:
        return End(mode, bytes(data), "")
    except OSError as error:
        return End(mode, bytes(data), str(error))
    return End(mode, bytes(data))


async def finish(writer: Any) -> None:
    """Close, whatever became of it."""
    writer.transport.abort()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(PATIENCE):
            await writer.wait_closed()


class Service(threading.Thread):
    """A server with a loop of its own, in a thread of its own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: queue.Queue[Any] = queue.Queue()
        self.ready: queue.Queue[int] = queue.Queue()
        self._loop: Any = None
        self._over: Any = None

    def run(self) -> None:
        """Serve until `stop`."""
        with asyncio.Runner(
            loop_factory=lambda: pysmc.new_event_loop(CONFIG)
        ) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        # A handshake that fails is nobody's business here, and it is logged.
        self._loop.set_exception_handler(lambda *_: None)
        server = await asyncio.start_server(self._handle, HOST, 0)
        self.ready.put(server.sockets[0].getsockname()[1])
        async with server:
            await self._over.wait()

    async def _handle(self, reader: Any, writer: Any) -> None:
        seen = asyncio.Event()
        try:
            end = await use(reader, writer, "server")
            self.seen.put((end, lambda: self._loop.call_soon_threadsafe(seen.set)))
            # Whoever ends first would take from the other what it has not read.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(4 * QUIET):
                    await seen.wait()
        finally:
            await finish(writer)

    def stop(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._over.set)
        self.join(PATIENCE)


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    service = Service()
    service.start()
    made = Proxy(service.ready.get(timeout=PATIENCE))
    made.service = service  # type: ignore[attr-defined]
    yield made
    made.close()
    service.stop()
    assert not service.is_alive()


def play(proxy: Proxy, *changes: Change) -> tuple[End, End | None]:
    """Let a client connect through the proxy; gives what both applications saw."""
    proxy.changes = changes
    seen: queue.Queue[Any] = proxy.service.seen  # type: ignore[attr-defined]
    while not seen.empty():
        seen.get()

    def ask(patience: float) -> Any:
        try:
            return seen.get(timeout=patience)
        except queue.Empty:
            return None, lambda: None

    async def visit() -> tuple[End, End | None]:
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection(HOST, proxy.port)
        except OSError as error:
            return End("error", b"", str(error)), None
        try:
            client = await use(reader, writer, "client")
            # Whose client was told of an error may never have been accepted.
            patience = 0.05 if client.error else 4 * QUIET
            server, release = await asyncio.to_thread(ask, patience)
        finally:
            await finish(writer)
        release()
        return client, server

    with asyncio.Runner(loop_factory=lambda: pysmc.new_event_loop(CONFIG)) as runner:
        return runner.run(visit())


def judge(client: End, server: End | None, changes: Any) -> str:
    """Say how it ended.

    Raises:
        AssertionError: An application read what nobody wrote.
    """
    assert payload("server").startswith(client.data), (changes, client.data[:32].hex())
    if server is None:
        return "error"
    assert payload("client").startswith(server.data), (changes, server.data[:32].hex())
    if client.error or server.error or "error" in (client.mode, server.mode):
        return "error"
    if len(client.data) == len(server.data) == len(payload("client")):
        assert client.mode == server.mode
        return client.mode
    return "silence"


def test_nothing_is_changed(proxy):
    client, server = play(proxy)
    assert judge(client, server, ()) == "smcr"
    lengths = [len(proxy.said[place]) for place in (PROPOSAL, ACCEPT, CONFIRM)]
    assert lengths == [156, 160, 180]


# Bytes of Accept and Confirm that say where the sender's element is, and how large.
MISLEADING = [
    *range(41 * 8, 45 * 8, 5),
    *range(50 * 8, 50 * 8 + 4),
    *range(52 * 8, 58 * 8, 5),
    *range(58 * 8, 60 * 8),
]


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.parametrize("place", [ACCEPT, CONFIRM], ids=["Accept", "Confirm"])
def test_what_misleads_ends_with_an_error(proxy, place):
    for bit in MISLEADING:
        change = Change(place, "flip", bit)
        client, server = play(proxy, change)
        assert judge(client, server, change) == "error", (bit, client, server)
        assert not client.data
        assert server is None or not server.data


def test_a_wrong_token_brings_nothing(proxy):
    change = Change(CONFIRM, "flip", 46 * 8 + 3)
    client, server = play(proxy, change)
    assert judge(client, server, change) in {"silence", "error"}
    assert not client.data


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_flips_end_well_over_shared_memory(proxy, long_run):
    with long_run("in-path-shm", small=60, full=3_000) as run:
        endings: Counter[str] = Counter()
        for seed in run.seeds():
            place = (PROPOSAL, ACCEPT, CONFIRM)[seed % 3]
            change = Change(place, "flip", seed * 7919 % (8 * 156))
            client, server = play(proxy, change)
            try:
                ending = judge(client, server, change)
            except AssertionError as fault:
                run.fail(f"seed {seed}: {fault}")
                continue
            endings[ending] += 1
            run.add(handshakes=1, **{ending: 1})
        assert endings.keys() <= {"smcr", "tcp", "error", "silence"}
        assert endings["smcr"] > run.count / 10


@pytest.mark.parametrize(
    ("change", "endings"),
    [
        (Change(PROPOSAL, "cut", 100, 1), {"error"}),
        (Change(ACCEPT, "cut", 100, 1), {"error"}),
        (Change(CONFIRM, "cut", 100, 1), {"error"}),
        (Change(ACCEPT, "drip", 30, 1), {"smcr"}),
        (Change(CONFIRM, "delay", 2), {"smcr"}),
        (Change(ACCEPT, "repeat", 0, 160), {"error"}),
        (Change(PROPOSAL, "insert", 40, 5), {"error"}),
        (Change(CONFIRM, "lose", 90, 3), {"error"}),
    ],
)
def test_cut_late_and_repeated_messages_end_well(proxy, change, endings):
    client, server = play(proxy, change)
    assert judge(client, server, change) in endings, (client, server)
