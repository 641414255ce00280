"""The selector of our loop: looks at shared memory before it sleeps.

Decides how long to look and when to sleep; what has completed is the driver's business.
On this level a wake-up from another processor costs ten times what a message costs, so
looking a little longer is worth it, but only where something is likely to come soon.
That is learnt from looking itself: each success earns credit, each failure costs more
than it, and without credit only one wait in sixteen is tried. (The length of waits that
were slept through says little: most of it is the very wake-up that looking avoids.)

It never yields the processor while it looks: with other runnable tasks that gives the
core away for up to a tick, and for a short budget sleeping is better then.

Source: the measurements behind ``Config.busy_poll_us``; kernel counterpart of the idea:
net.core.busy_poll.
"""

from __future__ import annotations

import selectors
import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sized

    from pysmc.fabric.base import Device

__all__ = ["FabricSelector"]

EventList = list[tuple[selectors.SelectorKey, int]]

PROBE_EVERY = 16
"""Of the waits in which looking is not expected to pay, how many are tried anyway."""
CREDIT_MAX = 16
CREDIT_OF_PROBE = 6
"""Credit after one success without any: enough for both ends to find each other."""
COST_OF_FAILURE = 2
LOOKS_BETWEEN_CLOCKS = 8
ROUNDS_WITHOUT_KERNEL = 3
"""Turns of the loop for completions alone, before the kernel is asked again."""


class Activity(Protocol):
    """What the selector has to know of the driver."""

    @property
    def up(self) -> Sized:
        """Links that are up: only over these anything can come by memory."""

    on_poll: Callable[[], None] | None
    """Called once, and forgotten, before devices are polled: that ends what arm()
    promised."""


class FabricSelector(selectors.DefaultSelector):
    """The default selector, which also knows devices.

    A device is registered like any descriptor. When `Device.pending` says that
    completions wait, its key is reported as readable, so that the loop runs its pump
    once in this iteration.

    Args:
        busy_poll_us: Longest time to look before sleeping, in microseconds; 0 is off.
    """

    def __init__(self, busy_poll_us: int = 0) -> None:
        super().__init__()
        self._budget = busy_poll_us / 1e6
        self._devices: list[tuple[Device, selectors.SelectorKey]] = []
        self._activity: Activity | None = None
        self._credit = CREDIT_OF_PROBE
        self._skipped = 0
        self._rounds = 0

    def add_device(self, device: Device, activity: Activity) -> None:
        """Look at this device too; its descriptor must be registered for reading.

        Args:
            device: What to look at.
            activity: Of whoever polls it; the same for all devices.
        """
        self._devices.append((device, self.get_key(device.fileno())))
        self._activity = activity
        self._watch()

    def remove_device(self, device: Device) -> None:
        """Look at it no more; its descriptor may be unregistered afterwards."""
        self._devices = [entry for entry in self._devices if entry[0] is not device]
        if not self._devices and "select" in vars(self):
            del self.select

    def _watch(self) -> None:
        # Without a device, and while nothing can come over one, select is the base
        # class's own and costs nothing.
        self.select = self._select  # type: ignore[method-assign]

    def _select(self, timeout: float | None = None) -> EventList:
        """Wait until something is ready, or until `timeout` seconds are over."""
        activity = self._activity
        assert activity is not None
        may_wait = timeout is None or timeout > 0
        if may_wait and not activity.up and all(d.arm() for d, _ in self._devices):
            # No peer can write, so nobody is bothered by devices that stay armed: this
            # is how a server waits whose clients are all on TCP.
            activity.on_poll = self._watch
            del self.select
            return super().select(timeout)
        ready = self._pending()
        if ready:
            return self._report(ready)
        if not may_wait:
            return super().select(0)
        began = time.perf_counter()
        if activity.up and self._may_look():
            if self._look(began, timeout):
                self._earn()
                return self._report(self._pending())
            self._credit = max(0, self._credit - COST_OF_FAILURE)
        return self._sleep(began, timeout)

    def _report(self, ready: EventList) -> EventList:
        """Report devices, and now and then also what else is ready.

        Asking the kernel costs as much as half of a message, and nothing that comes
        over a descriptor is in that hurry.
        """
        if self._rounds < ROUNDS_WITHOUT_KERNEL:
            self._rounds += 1
            return ready
        self._rounds = 0
        return self._merge(ready, super().select(0))

    def _sleep(self, began: float, timeout: float | None) -> EventList:
        # What arm() says counts: where it says that something waits, the peer will not
        # ring for it.
        waiting = [
            (key, selectors.EVENT_READ)
            for device, key in self._devices
            if not device.arm()
        ]
        if waiting:
            timeout = 0
        elif timeout is not None:
            # What was spent with looking is not slept again.
            timeout = max(0.0, timeout - (time.perf_counter() - began))
        self._rounds = 0
        events = super().select(timeout)
        for device, _ in self._devices:
            device.disarm()
        return self._merge(waiting or self._pending(), events)

    def _pending(self) -> EventList:
        return [
            (key, selectors.EVENT_READ)
            for device, key in self._devices
            if device.pending()
        ]

    def _merge(self, ready: EventList, events: EventList) -> EventList:
        """Report each device once, even if its descriptor is readable as well."""
        if not ready:
            return events
        named = {key.fd for key, _ in ready}
        return ready + [event for event in events if event[0].fd not in named]

    def modify(self, fileobj: Any, events: int, data: Any = None) -> Any:
        """Change a registration; a device's key is replaced by the new one."""
        key = super().modify(fileobj, events, data)
        if self._devices:
            self._devices = [
                (device, key if key.fd == old.fd else old)
                for device, old in self._devices
            ]
        return key

    # Looking

    def _may_look(self) -> bool:
        if not self._budget:
            return False
        if not self._credit:
            self._skipped += 1
            if self._skipped < PROBE_EVERY:
                return False
            self._skipped = 0
        return True

    def _look(self, began: float, timeout: float | None) -> bool:
        budget = self._budget
        if timeout is not None and timeout < budget:
            budget = timeout
        end = began + budget
        clock = time.perf_counter
        if len(self._devices) == 1:
            pending = self._devices[0][0].pending
            while True:
                for _ in range(LOOKS_BETWEEN_CLOCKS):
                    if pending():
                        return True
                if clock() >= end:
                    return False
        while clock() < end:
            if self._pending():
                return True
        return False

    def _earn(self) -> None:
        if self._credit:
            self._credit = min(CREDIT_MAX, self._credit + 1)
        else:
            self._credit = CREDIT_OF_PROBE
