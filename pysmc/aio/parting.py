"""The last moments of a loop: peers that still close what it has closed.

Decides how long a loop that is being closed answers them. Over TCP the kernel does that
for a process that has gone. Over RoCE nobody does, and a Linux peer gives back a
connection's memory by LLC: it waits two seconds for each answer, and where it tries for
ever to send its last update, for ever.

Reference: RFC 7609 section 4.8.1; kernel counterpart: smc_conn_free().
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pysmc.core.link_group import LinkGroup
    from pysmc.fabric.base import Device

__all__ = ["PARTING_MAX", "PARTING_SILENCE", "is_awaited", "let_peers_close"]

PARTING_SILENCE: Final = 0.25
"""Seconds without a word of any peer after which none is about to close."""
PARTING_LAST: Final = 0.05
"""The same behind the last close: what a Linux peer asks then follows at once."""
PARTING_MAX: Final = 2.0
"""Seconds after which they have had their time."""


def is_awaited(group: LinkGroup) -> bool:
    """Tell whether its peer has yet to close what we have closed."""
    return any(
        connection.we_ended and connection.is_established
        for connection in group.connections.values()
    )


def let_peers_close(
    find_awaited: Callable[[], Sequence[Device]], pump: Callable[[Device], object]
) -> None:
    """Answer peers for a moment, while nothing else goes on.

    Args:
        find_awaited: Gives the devices with a peer that has yet to close.
        pump: Processes what has completed on a device.
    """
    until = time.monotonic() + PARTING_MAX
    devices: Sequence[Device] = ()
    while True:
        awaited = find_awaited()
        devices = awaited or [device for device in devices if not device.is_gone]
        silence = PARTING_SILENCE if awaited else PARTING_LAST
        left = min(silence, until - time.monotonic())
        if not devices or left <= 0 or _is_silent(devices, left):
            return
        for device in devices:
            pump(device)


def _is_silent(devices: Sequence[Device], seconds: float) -> bool:
    waiting = select.poll()
    for device in devices:
        if not device.arm():
            return False
        waiting.register(device.fileno(), select.POLLIN)
    return not waiting.poll(seconds * 1000)
