"""When the selector looks at memory, and when it sleeps."""

from __future__ import annotations

import os
import selectors
from typing import TYPE_CHECKING

import pytest

from pysmc.aio import selector as selector_module
from pysmc.aio.selector import (
    CREDIT_MAX,
    PROBE_EVERY,
    ROUNDS_WITHOUT_KERNEL,
    FabricSelector,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeDevice:
    """A device whose completions the test decides on."""

    def __init__(self) -> None:
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.script: list[bool] = []
        self.waiting = False
        self.may_arm = True
        self.calls: list[str] = []

    def fileno(self) -> int:
        return self.bell

    def pending(self) -> bool:
        self.calls.append("pending")
        if self.script:
            self.waiting = self.script.pop(0)
        return self.waiting

    def arm(self) -> bool:
        self.calls.append("arm")
        return self.may_arm

    def disarm(self) -> None:
        self.calls.append("disarm")

    def count(self, call: str) -> int:
        return self.calls.count(call)


class Activity:
    """What a driver tells the selector."""

    def __init__(self, links: int) -> None:
        self.up = ["link"] * links
        self.on_poll: Callable[[], None] | None = None

    def poll(self) -> None:
        if self.on_poll is not None:
            on_poll, self.on_poll = self.on_poll, None
            on_poll()


@pytest.fixture
def device():
    made = FakeDevice()
    yield made
    os.close(made.bell)


@pytest.fixture
def make(device):
    """Make a selector that watches the device; the epoll below never waits long."""
    made = []

    def factory(busy_poll_us=0, links=1, devices=(device,)):
        one = FabricSelector(busy_poll_us)
        one.activity = Activity(links)
        for each in devices:
            one.register(each.fileno(), selectors.EVENT_READ, "data")
            one.add_device(each, one.activity)
        made.append(one)
        return one

    yield factory
    for one in made:
        one.close()


def test_without_devices_it_is_the_default_selector() -> None:
    read, write = os.pipe()
    with FabricSelector(100) as selector:
        selector.register(read, selectors.EVENT_READ, "pipe")
        assert selector.select(0) == []
        os.write(write, b"x")
        ((key, mask),) = selector.select(None)
        assert (key.fd, key.data, mask) == (read, "pipe", selectors.EVENT_READ)
    os.close(read)
    os.close(write)


def test_completions_that_wait_are_reported_at_once(make, device) -> None:
    selector = make()
    device.waiting = True
    for timeout in (None, 0, 10):
        ((key, mask),) = selector.select(timeout)
        assert (key.fd, key.data, mask) == (device.bell, "data", selectors.EVENT_READ)
    assert device.count("arm") == 0


def test_a_device_is_reported_once(make, device) -> None:
    selector = make()
    device.waiting = True
    os.eventfd_write(device.bell, 1)
    assert len(selector.select(None)) == 1


def test_other_descriptors_are_reported_beside_it(make, device) -> None:
    read, write = os.pipe()
    selector = make()
    selector.register(read, selectors.EVENT_READ, "pipe")
    os.write(write, b"x")
    device.waiting = True
    for _ in range(3):
        turns = [
            {key.fd for key, _ in selector.select(None)}
            for _ in range(ROUNDS_WITHOUT_KERNEL + 1)
        ]
        assert turns[:-1] == [{device.bell}] * ROUNDS_WITHOUT_KERNEL
        assert turns[-1] == {device.bell, read}
    device.waiting = False
    assert {key.fd for key, _ in selector.select(1)} == {read}
    os.close(read)
    os.close(write)


def test_it_arms_before_it_sleeps_and_disarms_after(make, device) -> None:
    selector = make()
    assert selector.select(0.001) == []
    assert device.calls == ["pending", "arm", "disarm", "pending"]


def test_it_does_not_sleep_when_arming_fails(make, device) -> None:
    """What arm() says counts, also where nothing can be seen in memory."""
    selector = make()
    device.may_arm = False
    assert [key.fd for key, _ in selector.select(None)] == [device.bell]
    device.script = [False, True]  # what came between
    assert len(selector.select(None)) == 1


def test_no_time_means_no_sleep(make, device) -> None:
    selector = make(busy_poll_us=1000)
    assert selector.select(0) == []
    assert selector.select(-1) == []
    assert device.calls == ["pending", "pending"]


def test_a_rung_bell_is_reported(make, device) -> None:
    selector = make()
    os.eventfd_write(device.bell, 1)
    assert [key.fd for key, _ in selector.select(None)] == [device.bell]


def test_a_changed_registration_is_followed(make, device) -> None:
    selector = make()
    selector.modify(device.bell, selectors.EVENT_READ, "other data")
    device.waiting = True
    assert [key.data for key, _ in selector.select(None)] == ["other data"]
    selector.remove_device(device)
    assert selector.select(0) == []


def test_a_modified_stranger_changes_nothing(make, device) -> None:
    read, write = os.pipe()
    selector = make()
    selector.register(read, selectors.EVENT_READ, 1)
    assert selector.modify(read, selectors.EVENT_READ, 2).data == 2
    device.waiting = True
    assert [key.data for key, _ in selector.select(None)] == ["data"]
    os.close(read)
    os.close(write)


# --- looking


def test_looking_finds_what_comes_soon(make, device) -> None:
    selector = make(busy_poll_us=10_000_000)
    device.script = [False] * 20 + [True]
    assert len(selector.select(None)) == 1
    assert device.count("arm") == 0


def test_looking_is_bounded_by_the_timeout(make, device) -> None:
    selector = make(busy_poll_us=10_000_000)
    assert selector.select(0.002) == []
    assert device.count("arm") == 1


def test_nobody_looks_where_nothing_can_come(make, device) -> None:
    selector = make(busy_poll_us=10_000_000, links=0)
    assert selector.select(0.001) == []
    assert selector.select(0.001) == []
    assert selector.select(0) == []
    assert device.calls == ["arm"], "and it stays armed"
    selector.activity.poll()
    assert selector.select(0) == []
    assert selector.select(0.001) == []
    assert device.calls == ["arm", "pending", "arm"]
    selector.activity.poll()
    device.may_arm = False
    device.waiting = True
    assert len(selector.select(None)) == 1
    assert len(selector.select(0)) == 1


def test_the_first_link_ends_the_quiet(make, device) -> None:
    selector = make(links=0)
    assert selector.select(0.001) == []
    selector.activity.poll()
    selector.activity.up.append("link")
    device.waiting = True
    assert len(selector.select(None)) == 1
    device.waiting = False
    selector.activity.up.clear()
    device.calls.clear()
    assert selector.select(0.001) == []
    assert device.calls == ["arm"]


def test_looking_stops_to_pay_and_is_tried_now_and_then(make, device) -> None:
    selector = make(busy_poll_us=1)

    def looked() -> bool:
        device.calls.clear()
        selector.select(0.0001)
        return bool(device.count("pending") > 2)

    while looked():
        pass
    tries = [looked() for _ in range(4 * PROBE_EVERY)]
    assert tries.count(True) == 4
    # One success, and it looks again for a while.
    selector._budget = 10.0
    while selector._skipped < PROBE_EVERY - 1:
        selector._skipped += 1
    device.script = [False, False, True]
    selector.select(None)
    device.waiting = False
    selector._budget = 1e-6
    assert looked()


def test_credit_is_bounded(make, device) -> None:
    selector = make(busy_poll_us=1_000_000)
    for _ in range(3 * CREDIT_MAX):
        device.script = [False, False, True, True]
        assert len(selector.select(None)) == 1
    assert selector._credit == CREDIT_MAX


def test_several_devices(make, device) -> None:
    other = FakeDevice()
    selector = make(busy_poll_us=1_000_000, devices=(device, other))
    other.script = [False, False, False, True]
    assert [key.fd for key, _ in selector.select(None)] == [other.bell]
    other.waiting = False
    assert selector.select(0.001) == []
    os.close(other.bell)


def test_the_default_is_off() -> None:
    assert selector_module.FabricSelector()._budget == 0
