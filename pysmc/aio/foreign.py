"""What `open_connection` and `start_server` need on loops that are not ours.

Decides which driver serves a foreign loop (one for each configuration that is asked
for) and when it ends: with the loop's asynchronous generators, which asyncio.run,
asyncio.Runner and uvloop.run finish before they close a loop. Knows no sockets.

Source: the asyncio documentation, "Streams" and "Event Loop" (shutdown_asyncgens).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from pysmc.aio.driver import Driver
from pysmc.aio.loop import Loop
from pysmc.config import Config

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ["foreign_driver", "uses_own_loop"]

_Entry = tuple[Driver, "AsyncGenerator[None, None]"]
_drivers: dict[asyncio.AbstractEventLoop, dict[Config, _Entry]] = {}


def uses_own_loop(config: Config | None) -> bool:
    """Tell whether the running loop is ours and does everything by itself.

    Raises:
        ValueError: It is ours, and `config` is another one than the loop's.
    """
    loop = asyncio.get_running_loop()
    if not isinstance(loop, Loop):
        return False
    if config is not None and config != loop.config:
        message = (
            "config differs from the running pysmc loop's own: give it to "
            "pysmc.run(config=...) or pysmc.new_event_loop(config)"
        )
        raise ValueError(message)
    return True


async def foreign_driver(config: Config | None) -> Driver:
    """Give the driver of the running foreign loop for a configuration.

    Args:
        config: From the environment by default.

    Raises:
        ForkedError: The loop belongs to the parent process.
        ValueError: A value of the configuration is not allowed.
    """
    loop = asyncio.get_running_loop()
    _forget_closed_loops()
    config = Config.from_env() if config is None else config
    of_loop = _drivers.setdefault(loop, {})
    entry = of_loop.get(config)
    if entry is not None:
        entry[0].check_owner()
        return entry[0]
    driver = Driver(loop, config)
    farewell = _until_loop_ends(loop, config, driver)
    of_loop[config] = (driver, farewell)
    await anext(farewell)
    return driver


async def _until_loop_ends(
    loop: asyncio.AbstractEventLoop, config: Config, driver: Driver
) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        driver.close()
        of_loop = _drivers.get(loop, {})
        of_loop.pop(config, None)
        if not of_loop:
            _drivers.pop(loop, None)


def _forget_closed_loops() -> None:
    """End the drivers of loops that were closed without finishing their generators."""
    for loop in [loop for loop in _drivers if loop.is_closed()]:
        for driver, _ in _drivers.pop(loop).values():
            # What is left to unregister from went away with the loop.
            with contextlib.suppress(RuntimeError):
                driver.close()
