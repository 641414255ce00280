"""A transport's end in unusual moments: lost, paused, closing, or not yet begun."""

from __future__ import annotations

import asyncio
import gc
import os
import warnings
from dataclasses import replace

import pytest

from pysmc.aio import transport_end
from pysmc.config import Config
from pysmc.errors import ConnectionReset, PeerClosed

MIB = 1 << 20


class IntoBuffer(asyncio.BufferedProtocol):
    """Takes at most 1,000 bytes at a time."""

    def __init__(self, recorder) -> None:
        self.recorder = recorder
        self.buffer = bytearray(1000)

    def connection_made(self, transport) -> None:
        self.recorder.connection_made(transport)

    def get_buffer(self, sizehint):
        assert sizehint == -1
        return self.buffer

    def buffer_updated(self, nbytes) -> None:
        self.recorder.data_received(bytes(self.buffer[:nbytes]))

    def eof_received(self):
        return self.recorder.eof_received()

    def connection_lost(self, exc) -> None:
        self.recorder.connection_lost(exc)


def lose_all_links(driver) -> None:
    """Both ends are in this loop: losing every link is what a dead peer looks like."""
    for link in list(driver._links.values()):
        driver.endpoint.link_down(link, "peer gone", "test", driver.time())
    driver.settle()


def test_a_buffered_protocol_gets_what_arrived_before_the_loss(kit) -> None:
    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        recorder = kit.Recorder(pause=True)
        async with kit.connected(server=lambda: IntoBuffer(recorder)) as ends:
            data = os.urandom(5500)
            ends.client.transport.write(data)
            await asyncio.sleep(0.01)
            lose_all_links(driver)
            recorder.transport.resume_reading()
            await recorder.until_call("lost")
            assert recorder.data == data
            assert isinstance(recorder.error, ConnectionReset)
            await ends.client.until_call("lost")

    kit.run(scenario)


@pytest.mark.parametrize("then", ["pause", "abort"])
def test_a_protocol_that_changes_its_mind_after_the_loss(kit, then) -> None:
    class Moody(kit.Recorder):
        def data_received(self, data) -> None:
            super().data_received(data)
            if then == "pause":
                self.transport.pause_reading()
            else:
                self.transport.abort()

    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        async with kit.connected(server=lambda: Moody(pause=True)) as ends:
            ends.client.transport.write(bytes(150_000))
            await asyncio.sleep(0.01)
            lose_all_links(driver)
            server = ends.server.transport
            for _ in range(4):
                server.resume_reading()
                for _ in range(3):
                    await asyncio.sleep(0)
            await ends.server.until_call("lost")
            expected = 150_000 if then == "pause" else 65_536
            assert len(ends.server.data) == expected

    kit.run(scenario)


def test_eof_waits_for_a_paused_protocol_also_after_the_loss(kit) -> None:
    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            ends.client.transport.close()
            await ends.client.until_call("lost")
            lose_all_links(driver)
            assert ends.server.calls == ["made"]
            ends.server.transport.resume_reading()
            await ends.server.until_call("lost")
            assert ends.server.calls == ["made", "eof", "lost"]
            assert ends.server.error is None

    kit.run(scenario)


def test_a_loss_while_closing_ends_the_wait_for_room(kit) -> None:
    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            ends.client.transport.write(bytes(4 * MIB))
            ends.client.transport.close()
            lose_all_links(driver)
            await ends.client.until_call("lost")
            assert isinstance(ends.client.error, ConnectionReset)

    kit.run(scenario)


def test_a_close_that_goes_on_slowly_is_not_given_up(kit) -> None:
    async def scenario() -> None:
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            client, server = ends.transports
            client.write(bytes(4 * MIB))
            client.close()
            while "lost" not in ends.server.calls:
                server.resume_reading()
                await asyncio.sleep(0)
                server.pause_reading()
                await asyncio.sleep(0.01)
            assert len(ends.server.data) == 4 * MIB
            assert ends.server.error is None
            await ends.client.until_call("lost")
            assert ends.client.error is None

    kit.run(scenario, config=Config(close_wait=0.1))


def test_an_empty_write_where_none_is_possible(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            ends.client.transport.close()
            ends.client.transport.write(b"")
            await ends.client.until_call("lost")
            assert ends.client.error is None

    kit.run(scenario, config=config)


def test_the_protocol_may_end_the_program(kit) -> None:
    class Leaver(kit.Recorder):
        def data_received(self, data):
            raise SystemExit(3)

    async def scenario() -> None:
        async with kit.connected(server=Leaver) as ends:
            ends.client.transport.write(b"go")
            await ends.server.until_call("lost")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with pytest.raises(SystemExit):
            kit.run(scenario)
        gc.collect()


def test_aborting_in_connection_made(kit, config) -> None:
    class Shy(kit.Recorder):
        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            transport.abort()

    async def scenario() -> None:
        async with kit.connected(server=Shy) as ends:
            await ends.server.until_call("lost")
            assert ends.server.calls == ["made", "lost"]
            await ends.client.until_call("lost")

    kit.run(scenario, config=config)


def test_closing_in_connection_made_with_bytes_that_wait(kit) -> None:
    """Whoever has closed gets nothing more, not even what came before it began."""

    class Brief(kit.Recorder):
        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            transport.write(bytes(16 * MIB))
            transport.close()

    class Talker(kit.Recorder):
        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            transport.write(b"never wanted")
            transport.write_eof()

    async def scenario() -> None:
        async with kit.connected(
            server=Brief, client=lambda: Talker(keep_open=True)
        ) as ends:
            await ends.client.until_bytes(16 * MIB)
            await ends.server.until_call("lost")
            assert [c for c in ends.server.calls if "writing" not in c] == [
                "made",
                "lost",
            ]

    kit.run(scenario)


def test_a_server_that_closes_while_it_makes_a_protocol(kit) -> None:
    """asyncio refuses the transport then; the client is not left waiting."""
    servers: list[asyncio.Server] = []

    def last_one() -> asyncio.Protocol:
        servers[0].close()
        return asyncio.Protocol()

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_debug(enabled=False)  # it would report the refusal, and keep it
        servers.append(await loop.create_server(last_one, kit.host, 0))
        where = servers[0].sockets[0].getsockname()
        _, client = await loop.create_connection(kit.Recorder, *where)
        assert client.info_when_made.mode == "smcr"
        await client.until_call("lost")
        assert client.calls == ["made", "eof", "lost"]
        await servers[0].wait_closed()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        kit.run(scenario)


def test_names_of_a_socket_that_is_gone() -> None:
    def gone():
        raise OSError(107, "not connected")

    assert transport_end._name(gone) is None


@pytest.mark.parametrize("then", ["close", "write"])
def test_a_loss_after_the_peer_closed_is_no_error_by_itself(kit, then) -> None:
    """A half-open protocol goes on until it closes or writes, as over TCP."""

    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        async with kit.connected(server=lambda: kit.Recorder(keep_open=True)) as ends:
            ends.client.transport.close()
            await ends.server.until_call("eof")
            lose_all_links(driver)
            for _ in range(5):
                await asyncio.sleep(0)
            assert ends.server.calls == ["made", "eof"]
            if then == "close":
                ends.server.transport.close()
            else:
                ends.server.transport.write(b"to nobody")
                assert not ends.server.transport.is_closing()
                ends.server.transport.write(b"TCP has been told by now")
            await ends.server.until_call("lost")
            expected = type(None) if then == "close" else PeerClosed
            assert type(ends.server.error) is expected

    kit.run(scenario)


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("is_paused", [False, True])
def test_whom_the_last_data_woke_may_answer_before_the_end(
    kit, is_paused, is_lost
) -> None:
    """The end has a turn of its own: a websocket's close frame, then FIN, is common."""

    class Answering(kit.Recorder):
        task: asyncio.Task[None]

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self.woken = asyncio.get_running_loop().create_future()
            self.task = asyncio.create_task(self.answer())

        def data_received(self, data) -> None:
            super().data_received(data)
            self.woken.set_result(None)

        async def answer(self) -> None:
            await self.woken
            self.calls.append(f"closing: {self.transport.is_closing()}")

    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        async with kit.connected(server=lambda: Answering(pause=is_paused)) as ends:
            ends.client.transport.write(b"the last word")
            ends.client.transport.close()
            if is_lost:
                driver.pump_all()  # all of it is there, then the peer's process ends
                lose_all_links(driver)
            if is_paused:
                ends.server.transport.resume_reading()
            await ends.server.until_call("lost")
            await ends.server.task
            expected = ["made", "data", "closing: False", "eof", "lost"]
            assert ends.server.calls == expected
            assert ends.server.data == b"the last word"

    kit.run(scenario)


def test_more_than_fits_to_a_peer_that_has_closed_is_an_error(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected(client=lambda: kit.Recorder(keep_open=True)) as ends:
            client, server = ends.transports
            server.close()
            await ends.client.until_call("eof")
            client.write(bytes(8 * MIB))
            await ends.client.until_call("lost")
            assert isinstance(ends.client.error, BrokenPipeError)

    kit.run(scenario, config=config)


def test_a_close_while_bytes_wait_is_no_end_of_file(kit, config) -> None:
    """The peer has read all that it got, so it does not know of what waits."""

    class Closing(kit.Recorder):
        def data_received(self, data: bytes) -> None:
            self.transport.close()

    async def scenario() -> None:
        make = lambda: kit.Recorder(keep_open=True)  # noqa: E731
        async with kit.connected(client=make, server=Closing) as ends:
            ends.client.transport.write(bytes(8 * MIB))
            await ends.client.until_call("lost")
            assert "eof" not in ends.client.calls
            assert isinstance(ends.client.error, ConnectionResetError)

    kit.run(scenario, config=config and replace(config, rmbe_bytes=16384))
