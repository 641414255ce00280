"""What a loop and its process hold, to be compared before and after."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
from typing import TYPE_CHECKING, Any

from pysmc.aio import foreign
from pysmc.aio.loop import Loop
from pysmc.discovery import OptionMark
from pysmc.disposal import wait_closed

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 15.0
"""Seconds after which something that should have happened will not."""
QUICK_TURNS = 60
"""Turns of the loop that are taken without a pause while something is awaited."""


def open_descriptors() -> dict[str, int]:
    """Count this process's descriptors by kind."""
    kinds: collections.Counter[str] = collections.Counter()
    wait_closed(5)  # what another test left is not in this one's count
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            kinds[os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]] += 1
    del kinds["/dev/null"]  # libuv keeps one for bad times, from the first stream on
    return dict(kinds)


def own_names() -> list[str]:
    """List the kinds of the abstract names that this process holds."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:["):
                inodes.add(link[8:-1])
    names = []
    with open("/proc/self/net/unix", encoding="utf-8", errors="replace") as table:
        for line in table:
            words = line.split()
            if len(words) > 7 and words[6] in inodes:
                names.append("/".join(words[7].split("/")[:3])[:20])
    return sorted(names)


def driver_state(driver: Any) -> dict[str, Any]:
    """Count what a driver and its core hold for connections and handshakes."""
    discovery, endpoint = driver.discovery, driver._endpoint
    state = {
        "transports": len(driver.transports),
        "negotiations": len(driver.negotiations),
        "counted negotiations": len(driver.admission),
        "marks": len(discovery._open_marks),
        "offers": len(discovery._offers),
    }
    if endpoint is not None:
        endpoint.check()
        state["handshakes"] = endpoint.handshake_count
        state["groups"] = len(endpoint.groups)
        state["connections"] = sum(len(g.connections) for g in endpoint.groups)
        state["domains"] = sum(len(d.domains) for d in driver.devices)
    return state


def drivers_of(loop: asyncio.AbstractEventLoop) -> list[Any]:
    """Give every driver that serves a loop."""
    if isinstance(loop, Loop):
        return [loop.driver]
    return [entry[0] for entry in foreign._drivers.get(loop, {}).values()]


def state_of(loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """Say what the running loop holds, for a comparison later."""
    drivers = drivers_of(loop)
    state: dict[str, Any] = {"descriptors": open_descriptors()}
    state["tasks"] = len(asyncio.all_tasks())
    for number, driver in enumerate(drivers):
        for key, value in driver_state(driver).items():
            state[f"{key} of {number}"] = value
    if isinstance(loop, asyncio.SelectorEventLoop):
        rings = {driver._timer for driver in drivers}
        timers = [t for t in loop._scheduled if not t._cancelled and t not in rings]
        state["timers"] = len(timers)
        state["watched"] = len(loop._selector.get_map())
    if isinstance(loop, Loop):
        state["outcomes"] = len(loop._outcomes)
        state["announcements"] = len(loop._announcements)
    return state


def memory_of(loop: asyncio.AbstractEventLoop) -> int:
    """Count the bytes of receive buffers, also of those that are kept for reuse."""
    endpoints = [driver._endpoint for driver in drivers_of(loop)]
    return sum(end._keeper.rmb_bytes for end in endpoints if end is not None)


async def until(done: Callable[[], Any], what: Callable[[], str]) -> None:
    """Wait until something is so, with a deadline."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    turns = 0
    while not done():
        assert loop.time() < deadline, what()
        turns += 1
        await asyncio.sleep(0 if turns < QUICK_TURNS else 0.001)


def expire_marks(loop: asyncio.AbstractEventLoop) -> None:
    """Let the time be over in which a client answers offers that nobody wants any more.

    It is bounded by ``Config.discovery_wait``; a mark without a deadline stays.
    """
    for driver in drivers_of(loop):
        for mark in list(driver.discovery._open_marks):
            if isinstance(mark, OptionMark):
                mark.close()
            elif mark._deadline is not None:
                mark._deadline.cancel()
                mark._on_deadline()


async def settled(loop: asyncio.AbstractEventLoop, before: dict[str, Any]) -> None:
    """Wait until the loop holds what it held before, and no more.

    Raises:
        AssertionError: It still holds more when the time is over; says what.
    """

    def difference() -> str:
        now = state_of(loop)
        rows = [f"{k}: {before[k]} -> {now[k]}" for k in before if before[k] != now[k]]
        tasks = [task.get_coro() for task in asyncio.all_tasks()]
        return f"left behind: {rows}; names {own_names()}; tasks {tasks}"

    expire_marks(loop)
    await until(lambda: state_of(loop) == before, difference)
