"""The pump: what it carries, in which order, and what it does when something is off."""

from __future__ import annotations

import asyncio

import pytest

from pysmc.aio.driver import Driver
from pysmc.config import Config
from pysmc.core.events import News
from pysmc.errors import ConnectionReset, FabricError
from pysmc.fabric import shm
from pysmc.fabric.base import Completion, CompletionKind, Status, Update
from pysmc.fabric.shm_link import ShmQueuePair

HOST = "127.0.0.1"


class Handle:
    """What a transport looks like to the driver."""

    def __init__(self) -> None:
        self.news: list[int] = []
        self.lost: list[Exception] = []
        self.salvaged = 0

    def receive_news(self, news: int) -> None:
        self.news.append(news)

    def salvage(self) -> None:
        self.salvaged += 1

    def lose(self, error) -> None:
        self.lost.append(error)


def on_pair(kit, check, *, problems=0, **fields):
    """Run a check with a connected pair and its driver."""

    async def scenario():
        async with kit.connected() as ends:
            driver = asyncio.get_running_loop().driver
            return await check(driver, ends)

    return kit.run(scenario, config=Config(**fields), problems=problems)


def link_of(ends):
    return ends.client.transport._connection.link


def test_everything_before_the_end_of_a_link_is_processed_first(kit) -> None:
    async def check(driver, ends) -> None:
        # Sent, but this loop has not looked yet: then the link ends.
        ends.client.transport.write(b"the last words")
        server_link = ends.server.transport._connection.link
        server_link.handle.fail(Status.PEER_GONE, "test")
        await ends.server.until_call("lost")
        assert ends.server.data == b"the last words"
        assert isinstance(ends.server.error, ConnectionReset)
        await ends.client.until_call("lost")

    on_pair(kit, check)


def test_completions_of_strangers_are_dropped(kit) -> None:
    async def check(driver, ends) -> None:
        link = link_of(ends)
        gone = link.group.handle.create_queue_pair()  # not the core's
        handle = Handle()
        ends.client.transport._connection.handle = handle
        update = Update(1, 0xDEAD, 0, 0, 0)
        driver._take_completions(
            [
                Completion(CompletionKind.UPDATE, gone, payload=update),
                Completion(CompletionKind.DOWN, gone, Status.PEER_GONE),
                Completion(CompletionKind.UPDATE, link.handle, payload=update),
                Completion(CompletionKind.PUBLISH, link.handle, wr_id=0xDEAD),
            ]
        )
        assert handle.news == []
        ends.client.transport._connection.handle = ends.client.transport
        gone.close()

    on_pair(kit, check)


def test_publishes_that_complete_later_make_room(kit) -> None:
    async def check(driver, ends) -> None:
        connection = ends.client.transport._connection
        handle = Handle()
        connection.handle = handle
        while spans := connection.claim(1 << 20):
            for address, length in spans:
                connection.link.handle.post_write(
                    connection.remote_rkey, address, bytes(length)
                )
            wr_id = connection.take_post()[1]
            connection.published(completed=False)
        done = Completion(CompletionKind.PUBLISH, connection.link.handle, wr_id=wr_id)
        stray = done._replace(wr_id=wr_id ^ 1 << 40)
        driver._take_completions([stray])
        assert connection.oldest_post is not None
        driver._take_completions([done, done])
        assert connection.oldest_post is None
        assert handle.news in ([], [News.SPACE])
        connection.handle = ends.client.transport

    on_pair(kit, check)


def test_an_error_of_ours_loses_no_completion(kit, monkeypatch) -> None:
    """One that raises goes to the loop's handler, and the rest is still processed."""

    async def check(driver, ends) -> None:
        link = link_of(ends)
        seen = []
        real = driver.endpoint.receive_update

        def failing(link, update, now):
            seen.append(update)
            if len(seen) == 1:
                raise ZeroDivisionError
            return real(link, update, now)

        monkeypatch.setattr(driver.endpoint, "receive_update", failing)
        update = Update(1, 0xDEAD, 0, 0, 0)
        one = Completion(CompletionKind.UPDATE, link.handle, payload=update)
        driver._take_completions([one, one, one])
        assert len(seen) == 3

    on_pair(kit, check, problems=1)


def test_a_peer_that_breaks_a_rule_loses_only_its_connection(kit) -> None:
    async def check(driver, ends) -> None:
        connection = ends.server.transport._connection
        broken = Update(9, connection.alert_token, 1 << 40 | 5, 0, 0)
        link = connection.link
        driver._take_completions(
            [Completion(CompletionKind.UPDATE, link.handle, payload=broken)]
        )
        await ends.server.until_call("lost")
        assert isinstance(ends.server.error, ConnectionAbortedError)
        await ends.client.until_call("lost")
        assert isinstance(ends.client.error, ConnectionResetError)
        assert link.is_active
        async with kit.connected() as others:
            others.client.transport.write(b"still good")
            await others.server.until_bytes(10)

    on_pair(kit, check)


def test_memory_that_the_peer_took_away(kit) -> None:
    async def check(driver, ends) -> None:
        client, _ = ends.transports
        client._connection.remote_rkey ^= 0x10000  # names nothing any more
        client.write(b"x")
        await ends.client.until_call("lost")
        assert isinstance(ends.client.error, ConnectionAbortedError)
        assert isinstance(ends.client.error.__cause__, FabricError)

    on_pair(kit, check)


@pytest.mark.parametrize("size", [10, 8 << 20])
def test_memory_that_is_gone_when_there_is_room_again(kit, size) -> None:
    async def check(driver, ends) -> None:
        client, server = ends.transports
        server.pause_reading()
        client.write(bytes(8 << 20))
        client._connection.remote_rkey ^= 0x10000
        server.resume_reading()
        await ends.client.until_call("lost")
        assert isinstance(ends.client.error, ConnectionAbortedError)
        server.abort()
        await ends.server.until_call("lost")

    on_pair(kit, check)


@pytest.mark.parametrize(
    ("who", "said"),
    [(0, "receive buffer is not where"), (1, "ended the connection abnormally")],
    ids=["client", "server"],
)
def test_a_buffer_that_is_not_where_clc_says(kit, monkeypatch, who, said) -> None:
    """Whoever notices ends the connection before it writes; nothing of it stays."""
    real, asked = ShmQueuePair.names_element, []

    def names_element(self, *place):
        assert real(self, *place)
        asked.append(place)
        return len(asked) - 1 != who

    monkeypatch.setattr(ShmQueuePair, "names_element", names_element)

    async def connect(loop, port) -> None:
        _, client = await loop.create_connection(kit.Recorder, HOST, port)
        await client.until_call("lost")
        raise client.error

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.serving(kit.Recorder) as port:
            with pytest.raises(ConnectionReset, match=said):
                await connect(loop, port)
            assert len(asked) == 2
            (group,) = loop.driver.endpoint.groups[:1]
            async with asyncio.timeout(5):
                while group.connections:
                    await asyncio.sleep(0)

    kit.run(scenario)


def test_timers_ring(kit) -> None:
    """A link that is silent is asked: its answer keeps it."""

    async def check(driver, ends) -> None:
        loop = asyncio.get_running_loop()
        sent = []
        pair = link_of(ends).handle
        real = type(pair).post_send

        def post_send(self, payload) -> None:
            sent.append(payload[0] & 0x1F)
            real(self, payload)

        shm.ShmQueuePair.post_send = post_send
        try:
            until = loop.time() + 5
            while sent.count(7) < 4 and loop.time() < until:
                await asyncio.sleep(0.005)
        finally:
            shm.ShmQueuePair.post_send = real
        assert sent.count(7) >= 4, "TEST LINK"
        ends.client.transport.write(b"alive")
        await ends.server.until_bytes(5)

    on_pair(kit, check, test_link_interval=0.02)


def test_an_idle_group_ends(kit) -> None:
    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        async with kit.connected():
            assert len(driver.up) == 2
        async with asyncio.timeout(5):
            while driver.up:
                await asyncio.sleep(0.005)
        assert driver.endpoint.groups == []
        async with kit.connected() as ends:
            ends.client.transport.write(b"a new group")
            await ends.server.until_bytes(11)

    kit.run(scenario, config=Config(idle_group_wait=0.02))


def test_a_device_that_has_news_when_it_is_opened(kit, monkeypatch) -> None:
    """On loops that are not ours the driver arms, and pumps when arm() says so."""
    said: list[str] = []
    real = shm.ShmDevice.arm

    def arm(device) -> bool:
        said.append("no" if len(said) < 2 else "yes")
        return real(device) if said[-1] == "yes" else False

    monkeypatch.setattr(shm.ShmDevice, "arm", arm)

    async def scenario() -> None:
        driver = Driver(asyncio.get_running_loop(), Config())
        assert driver.open() is None
        for _ in range(4):
            await asyncio.sleep(0)
        assert said[:3] == ["no", "no", "yes"]
        driver.close()

    kit.run(scenario, factory=asyncio.new_event_loop)
