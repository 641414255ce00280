"""What goes wrong in one place of the pump costs nobody else anything."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from pysmc.aio.driver import Driver
from pysmc.config import Config
from pysmc.core import actions
from pysmc.core.events import ConnectionLost
from pysmc.errors import ConnectionReset
from pysmc.fabric.base import Completion, CompletionKind, Update


class Lost:
    """The handle of a connection that is lost."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.told: list[object] = []
        self.salvaged = 0

    def salvage(self) -> None:
        self.salvaged += 1

    def lose(self, error: object) -> None:
        self.told.append(error)
        if self.error is not None:
            raise self.error


def lost(handle: Lost) -> ConnectionLost:
    connection = SimpleNamespace(handle=handle)
    return ConnectionLost(connection, ConnectionReset("gone"))


def on_driver(kit, check, *, problems=0):
    """Run a check with a driver that has devices, and a pair of its own."""

    async def scenario():
        async with kit.connected() as ends:
            return await check(asyncio.get_running_loop().driver, ends)

    return kit.run(scenario, config=Config(), problems=problems)


def feed(driver, monkeypatch, ordered=(), events=()) -> None:
    """Have the core give orders and news, once."""
    orders, news = [list(ordered)], [list(events)]
    endpoint = driver.endpoint
    monkeypatch.setattr(
        endpoint, "take_actions", lambda: orders.pop() if orders else []
    )
    monkeypatch.setattr(endpoint, "take_events", lambda: news.pop() if news else [])


def test_an_order_that_fails_costs_no_other_order_and_no_news(kit, monkeypatch) -> None:
    async def check(driver, ends) -> None:
        done = []

        def carry_out(action) -> None:
            done.append(action)
            if len(done) == 1:
                raise ZeroDivisionError

        monkeypatch.setitem(driver._orders, actions.CheckTcp, carry_out)
        first, second = (actions.CheckTcp(handshake=None) for _ in range(2))
        handle = Lost()
        feed(driver, monkeypatch, [first, second], [lost(handle)])
        driver.settle()
        monkeypatch.undo()
        assert done == [first, second]
        assert len(handle.told) == handle.salvaged == 1

    on_driver(kit, check, problems=1)


def test_whoever_fails_to_take_news_is_alone_with_it(kit, monkeypatch) -> None:
    async def check(driver, ends) -> None:
        # As asyncio with its callbacks: a cancellation is no way to stop the pump.
        handles = [Lost(ZeroDivisionError()), Lost(asyncio.CancelledError()), Lost()]
        feed(driver, monkeypatch, events=map(lost, handles))
        driver.settle()
        monkeypatch.undo()
        assert [len(handle.told) for handle in handles] == [1, 1, 1]

    on_driver(kit, check, problems=2)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_what_an_interrupt_left_over_is_told_next(kit, monkeypatch, interrupt) -> None:
    async def check(driver, ends) -> None:
        handles = [Lost(interrupt()), Lost(), Lost()]
        feed(driver, monkeypatch, events=map(lost, handles))
        with pytest.raises(interrupt):
            driver.settle()
        assert [len(handle.told) for handle in handles] == [1, 0, 0]
        await asyncio.sleep(0)
        monkeypatch.undo()
        assert [len(handle.told) for handle in handles] == [1, 1, 1]

    on_driver(kit, check)


@pytest.mark.parametrize("by_pump", [False, True])
def test_completions_that_an_interrupt_left_over_come_first(
    kit, monkeypatch, by_pump
) -> None:
    async def check(driver, ends) -> None:
        pair = ends.client.transport._connection.link.handle
        seen = []

        def taking(link, update, now) -> None:
            seen.append(update.sequence)
            if len(seen) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(driver.endpoint, "receive_update", taking)
        batch = [
            Completion(CompletionKind.UPDATE, pair, payload=Update(n, 1, 0, 0, 0))
            for n in range(1, 4)
        ]
        with pytest.raises(KeyboardInterrupt):
            driver._take_completions(batch)
        assert seen == [1]
        if by_pump:
            monkeypatch.setattr(driver.devices[0], "poll", lambda: seen.append(0))
            driver.pump(driver.devices[0])
        await asyncio.sleep(0)
        monkeypatch.undo()
        assert seen[:3] == [1, 2, 3]

    on_driver(kit, check)


def test_a_handshake_that_fails_stops_no_clock(kit, monkeypatch) -> None:
    class Broken:
        def is_due(self, now: float) -> bool:
            return now > 0

        def read_tcp(self) -> None:
            raise ZeroDivisionError

    async def check(driver, ends) -> None:
        rung: list[float] = []
        monkeypatch.setattr(driver.endpoint, "handle_timer", rung.append)
        broken = Broken()
        driver.negotiations[broken] = None
        driver._timer.cancel()
        driver._ring()
        del driver.negotiations[broken]
        assert len(rung) == 1
        assert driver._timer is not None

    on_driver(kit, check, problems=1)


def test_a_transport_that_fails_to_leave_keeps_nothing_open(kit) -> None:
    """The kit counts descriptors."""

    class Stuck:
        def leave(self) -> None:
            raise ZeroDivisionError

    async def scenario() -> None:
        driver = Driver(asyncio.get_running_loop(), Config())
        assert driver.open() is None
        stuck = Stuck()
        driver.transports[stuck] = None  # type: ignore[index]
        driver.close()
        assert driver.is_closed

    kit.run(scenario, problems=1)
