"""The loop on the simulated fabric: real connections, and a world that can be held."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pysmc.config import Config
from pysmc.fabric.sim import SimNetwork
from pysmc.testing.loops import SimLoop, new_sim_loop, new_sim_network

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

HOST = "127.0.0.1"
PATIENCE = 20.0
LENGTH = 3_000_000


class Ends(NamedTuple):
    """Both ends of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    far_reader: asyncio.StreamReader
    far_writer: asyncio.StreamWriter

    @property
    def infos(self) -> tuple[Any, Any]:
        writers = (self.writer, self.far_writer)
        near, far = (writer.get_extra_info("smc") for writer in writers)
        return near, far


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Ends]:
    """Connect both ends in the running loop."""
    accepted: asyncio.Queue[Any] = asyncio.Queue()

    async def serve(*streams: Any) -> None:
        accepted.put_nowait(streams)

    async with asyncio.timeout(PATIENCE):
        server = await asyncio.start_server(serve, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        near = await asyncio.open_connection(HOST, port)
        far = await accepted.get()
        yield Ends(*near, *far)
        for writer in (near[1], far[1]):
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        server.close()
        await server.wait_closed()


def run(scenario: Callable[[], Any], factory: Callable[[], Any] = new_sim_loop) -> Any:
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(scenario())


@pytest.mark.parametrize("newest_only", [False, True])
def test_both_ends_in_one_loop(newest_only: bool) -> None:
    network = new_sim_network(newest_only=newest_only)

    async def scenario() -> None:
        async with connected() as ends:
            for info, role in zip(ends.infos, ("client", "server"), strict=True):
                assert (info.mode, info.fabric, info.role) == ("smcr", "sim", role)
                assert (info.version, info.reason) == ("2.1", None)
                assert info.eid.startswith("SIM-")
            data = os.urandom(LENGTH)
            ends.writer.write(data)
            ends.writer.write_eof()
            assert await ends.far_reader.read() == data
            ends.far_writer.write(data[::-1])
            ends.far_writer.write_eof()
            assert await ends.reader.read() == data[::-1]

    run(scenario, lambda: SimLoop(Config(), network))
    assert network.trace, "nothing went over the network"
    assert not network._devices, "a device was left open"


def test_a_network_is_in_the_testers_hand() -> None:
    """What is held does not arrive, and a cut link ends its connections."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        async with connected() as ends:
            pairs = list(loop.network._queue_pairs.values())
            assert len(pairs) == 2
            for pair in pairs:
                loop.network.hold(pair)
            ends.writer.write(b"held")
            reading = asyncio.ensure_future(ends.far_reader.read(4))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not reading.done()
            for pair in pairs:
                loop.network.hold(pair, held=False)
            assert await reading == b"held"
            loop.network.cut(pairs[0])
            with pytest.raises(ConnectionError):
                await ends.reader.read()
            with pytest.raises(ConnectionError):
                await ends.far_reader.read()

    run(scenario)


def test_loops_that_share_a_network_may_follow_each_other() -> None:
    network = new_sim_network()

    async def scenario() -> str:
        async with connected() as ends:
            return str(ends.infos[0].eid)

    factory = lambda: SimLoop(Config(), network)  # noqa: E731
    assert run(scenario, factory) == run(scenario, factory)
    assert run(scenario) != run(scenario, factory)


def test_a_network_knows_no_threads() -> None:
    network = new_sim_network()
    names: list[Any] = []

    async def scenario() -> None:
        async with connected() as ends:
            names.extend(info.reason and info.reason.name for info in ends.infos)

    def elsewhere() -> None:
        run(scenario, lambda: SimLoop(Config(), network))

    run(scenario, lambda: SimLoop(Config(), network))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(PATIENCE)
    # Without a device nothing is announced, so its client finds a plain listener.
    assert names == [None, None, "PEER_NO_SMC", "NO_DEVICE"]


def test_the_configuration_is_respected() -> None:
    async def scenario() -> tuple[Any, Any]:
        async with connected() as ends:
            return ends.infos

    near, _ = run(scenario, lambda: SimLoop(Config(fabrics=())))
    assert (near.mode, near.reason.name) == ("tcp", "DISABLED")
    config = Config(fabrics=("shm", "verbs"), rmbe_bytes=16 * 1024)
    near, far = run(scenario, lambda: SimLoop(config))
    assert (near.fabric, far.rmbe_bytes) == ("sim", 16 * 1024)


def test_the_configuration_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYSMC_DISCOVERY", "")
    with contextlib.closing(new_sim_loop()) as loop:
        assert loop.config.discovery == ()


@pytest.mark.parametrize("network", [SimNetwork(), SimNetwork(auto=True)])
def test_a_network_that_somebody_has_to_drive_is_refused(network: SimNetwork) -> None:
    with pytest.raises(ValueError, match="auto=True and a codec"):
        SimLoop(Config(), network)
