"""The last moments of a loop: how long peers are answered that still close."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

import pysmc
from pysmc.aio import driver as driver_module
from pysmc.aio import parting
from pysmc.aio.devices import CODEC
from pysmc.aio.transport import SmcTransport
from pysmc.core.endpoint import Endpoint
from pysmc.discovery import Announcement
from pysmc.errors import ConnectionReset
from pysmc.fabric.shm import ShmDevice
from pysmc.fabric.shm_link import ShmQueuePair
from pysmc.fabric.verbs import VerbsDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def leaves_things_open(test: Any) -> Any:
    """Mark a test that closes a loop with connections: what they say of that is due."""
    for words in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{words}")(test)
    return test


class Talker:
    """A device whose peer says so many things, one after the other."""

    is_gone = False

    def __init__(self, things: float) -> None:
        self.left = things
        self.pumped = 0
        self._bell = os.eventfd(1 if things else 0)

    def fileno(self) -> int:
        return self._bell

    def arm(self) -> bool:
        """Every other time there is something already."""
        return not (self.left and self.pumped % 2)

    def pump(self, device: Talker) -> None:
        assert device is self
        self.pumped += 1
        self.left -= 1
        if self.left <= 0:
            os.eventfd_read(self._bell)

    def close(self) -> None:
        os.close(self._bell)


@pytest.fixture
def talkers() -> Iterator[list[Talker]]:
    made: list[Talker] = []
    yield made
    for each in made:
        each.close()


def waited(device: Talker, *, until_silent: bool = False, after: int = 0) -> float:
    """Let its peer close, some things before its last; gives the seconds it took."""
    since = time.monotonic()
    parting.let_peers_close(
        lambda: [device] if device.left > after or until_silent else [],  # type: ignore[list-item]
        device.pump,
    )
    return time.monotonic() - since


def test_whoever_awaits_nothing_does_not_wait(
    talkers: list[Talker], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PARTING_SILENCE", "PARTING_LAST", "PARTING_MAX"):
        monkeypatch.setattr(parting, name, 60.0)
    talkers.append(Talker(0))
    assert waited(talkers[0]) < 30
    assert talkers[0].pumped == 0


def test_it_ends_with_the_last_close(
    talkers: list[Talker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parting, "PARTING_SILENCE", 60.0)
    monkeypatch.setattr(parting, "PARTING_MAX", 60.0)
    talkers.append(Talker(7))
    assert waited(talkers[0]) < 30
    assert talkers[0].pumped == 7


def test_what_follows_the_last_close_is_answered(
    talkers: list[Talker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parting, "PARTING_SILENCE", 60.0)
    talkers.append(Talker(7))
    assert 0.04 < waited(talkers[0], after=3) < 1.5
    assert talkers[0].pumped == 7


def test_a_device_that_goes_with_the_last_close_is_let_alone(
    talkers: list[Talker], monkeypatch: pytest.MonkeyPatch
) -> None:
    talkers.append(Talker(7))

    def is_gone(device: Talker) -> bool:
        return device.left <= 3

    monkeypatch.setattr(Talker, "is_gone", property(is_gone))
    waited(talkers[0], after=3)
    assert talkers[0].pumped == 4


def test_silence_ends_it(
    talkers: list[Talker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parting, "PARTING_SILENCE", 0.05)
    talkers.append(Talker(3))
    assert 0.04 < waited(talkers[0], until_silent=True) < 1.5
    assert talkers[0].pumped == 3


def test_so_does_time(talkers: list[Talker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parting, "PARTING_MAX", 0.05)
    talkers.append(Talker(float("inf")))
    assert 0.04 < waited(talkers[0]) < 1.5


@leaves_things_open
@pytest.mark.parametrize("retry", [True, False])
def test_only_where_a_peer_would_try_for_ever(
    kit, monkeypatch: pytest.MonkeyPatch, retry: bool
) -> None:
    """A loop with both ends: what each says at the end, the other hears, or not."""
    monkeypatch.setattr(ShmDevice, "peers_retry", retry)
    left: list[int] = []
    real = driver_module.let_peers_close

    def let_peers_close(find, pump) -> None:
        real(find, pump)
        left.extend(len(group.connections) for group in groups)

    monkeypatch.setattr(driver_module, "let_peers_close", let_peers_close)
    groups = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(kit.Recorder, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        await loop.create_connection(kit.Recorder, "127.0.0.1", port)
        groups.extend(loop.driver.endpoint.groups)
        server.close()

    kit.run(scenario)
    gc.collect()
    assert left == ([0, 0] if retry else [1, 1])


def end_a_loop(kit, last: Callable[[Any], None]) -> list[list[str]]:
    """Close a loop that has both ends of a connection; a program does a last thing.

    Returns:
        What the client and the server were called.
    """
    loop = pysmc.new_event_loop()
    ends = kit.Ends(kit.Recorder(pause=True), kit.Recorder())

    async def meet() -> None:
        server = await loop.create_server(lambda: ends.server, kit.host, 0)
        port = server.sockets[0].getsockname()[1]
        await loop.create_connection(lambda: ends.client, kit.host, port)
        await ends.server.until_call("made")
        ends.server.transport.write(bytes(1000))
        server.close()

    def stop() -> None:
        last(ends)
        loop.stop()

    loop.run_until_complete(meet())
    loop.call_soon(stop)
    loop.run_forever()
    driver = loop.driver
    try:
        loop.close()
    finally:
        assert loop.is_closed()
        assert driver.is_closed
        assert not driver.endpoint.groups
        assert driver.lookup is None
    return [end.calls for end in ends]


@leaves_things_open
def test_nobody_is_called_any_more(kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was lost is owed its bytes when the loop is closed, and its peer closes."""
    monkeypatch.setattr(ShmDevice, "peers_retry", True)

    def lose(ends: Any) -> None:
        ends.client.transport.lose(ConnectionReset("TCP ended"))
        ends.client.transport.resume_reading()

    assert end_a_loop(kit, lose) == [["made"], ["made"]]
    gc.collect()


def interrupt(*_: object) -> None:
    """Be Ctrl-C."""
    raise KeyboardInterrupt


def close_and_interrupt(device: ShmDevice, *, real: Any = ShmDevice.close) -> None:
    """Be Ctrl-C while a device waits for its peers."""
    real(device)
    interrupt()


def shut_down_and_interrupt(
    endpoint: Endpoint, now: float, *, real: Any = Endpoint.shutdown
) -> None:
    """Be Ctrl-C while the core ends its groups."""
    real(endpoint, now)
    interrupt()


@leaves_things_open
@pytest.mark.parametrize(
    ("place", "name", "instead"),
    [
        (driver_module, "let_peers_close", interrupt),
        (ShmDevice, "close", close_and_interrupt),
        (SmcTransport, "leave", interrupt),
        (Endpoint, "shutdown", shut_down_and_interrupt),
    ],
    ids=["of the loop", "of a device", "a transport", "the core"],
)
def test_an_interrupt_leaves_nothing_open(
    kit, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, instead: Any
) -> None:
    monkeypatch.setattr(place, name, instead)
    with pytest.raises(KeyboardInterrupt):
        end_a_loop(kit, lambda _: None)
    gc.collect()


@leaves_things_open
def test_peers_of_a_loop_that_was_closed_already_are_not_answered(
    kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign loop forgot its generators: the next one finds that, and goes on."""
    monkeypatch.setattr(ShmDevice, "peers_retry", True)
    monkeypatch.setattr(driver_module, "let_peers_close", interrupt)

    async def meet() -> Any:
        server = await pysmc.start_server(lambda *_: None, kit.host, 0)
        port = server.sockets[0].getsockname()[1]
        return server, await pysmc.open_connection(kit.host, port)

    forgotten = asyncio.new_event_loop()
    ends = forgotten.run_until_complete(meet())
    forgotten.close()
    with asyncio.Runner() as runner:
        assert runner.run(meet())[0].is_serving()
        monkeypatch.undo()
    del ends
    gc.collect()


@leaves_things_open
def test_an_interrupt_among_the_listeners_spares_nothing(
    kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = pysmc.new_event_loop()
    closed, real = [], Announcement.close

    def close_and_interrupt(announcement: Announcement) -> None:
        real(announcement)
        closed.append(announcement)
        interrupt()

    async def listen() -> None:
        for _ in range(2):
            await loop.create_server(kit.Recorder, kit.host, 0)

    loop.run_until_complete(listen())
    monkeypatch.setattr(Announcement, "close", close_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.close()
    assert len(set(closed)) == 2
    assert loop.is_closed()
    assert loop.driver.is_closed
    gc.collect()


@leaves_things_open
def test_the_fabric_learns_that_a_link_is_in_use(
    kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    lingers, real = [], ShmQueuePair.close

    def close(pair: ShmQueuePair, *, linger: bool = False) -> None:
        lingers.append(linger)
        real(pair, linger=linger)

    monkeypatch.setattr(ShmQueuePair, "close", close)
    end_a_loop(kit, lambda _: None)
    gc.collect()
    assert lingers[:2] == [True, True]


def test_what_holds_a_peer_up_is_known_to_the_fabric() -> None:
    assert CODEC.is_question(bytes.fromhex("29 2c 00 00"))
    assert VerbsDevice.peers_retry
