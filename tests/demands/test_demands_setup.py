"""Demands on opening that no other test asks: what fails half way never began."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import mmap
import os
import select
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.discovery.address import endpoint, is_local
from pysmc.disposal import wait_closed
from pysmc.errors import FabricError, FabricUnavailable
from pysmc.fabric.shm import ShmDevice

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("quick_collections")

CALLS: list[tuple[Any, str]] = [
    (os, "eventfd"),
    (os, "memfd_create"),
    (os, "ftruncate"),
    (os, "posix_fallocate"),
    (select, "epoll"),
    (fcntl, "fcntl"),
    (mmap, "mmap"),
    (socket, "socket"),
]
STEPS_MAX = 60


class FailsOnce:
    """Lets the n-th call of any of the functions fail, and counts them.

    Args:
        monkeypatch: Puts the functions back.
        at: Which call fails; from 0.
        number: With which error number.
    """

    def __init__(self, monkeypatch: Any, at: int, number: int) -> None:
        self.calls = 0
        self._at = at
        self._number = number
        for module, name in CALLS:
            monkeypatch.setattr(module, name, self._around(getattr(module, name)))

    def _around(self, original: Callable[..., Any]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self._at + 1:
                raise OSError(self._number, os.strerror(self._number))
            return original(*args, **options)

        return call


def held() -> Counter[str]:
    """Count descriptors by what they are, and mappings of memory files.

    Compare by subtraction: an earlier test's may go while this one looks.
    """
    gc.collect()
    wait_closed(5)
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]] += 1
    with open("/proc/self/maps", encoding="utf-8") as maps:
        found["mapped"] = sum("/memfd:pysmc" in line for line in maps)
    return found


def use() -> None:
    """Open a device and everything that one link group needs; close it."""
    device = ShmDevice(b"a peer i")
    try:
        device.fileno()
        domain = device.create_domain()
        queue_pair = domain.create_queue_pair()
        region = domain.register(16 * 1024)
        region.memory[region.offset : region.offset + 5] = b"hello"
        assert queue_pair.number in device.queue_pairs
    finally:
        device.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_each_allocation_of_a_device_may_fail(monkeypatch, number) -> None:
    """Whatever could not be had: nothing of it is kept, and the next one works."""
    use()
    before = held()
    for at in range(STEPS_MAX):
        with monkeypatch.context() as patches:
            failing = FailsOnce(patches, at, number)
            try:
                use()
            except (FabricError, FabricUnavailable):
                failed = True
            else:
                failed = False
        left = held() - before
        assert not left, f"call {at} of {failing.calls} left something behind: {left}"
        use()
        if failing.calls <= at:
            assert not failed
            break
    assert at > 8


def test_ten_thousand_looks_at_routes_leave_nothing() -> None:
    addresses = [("127.0.0.1", 80), ("::1", 80, 0, 0), ("192.0.2.1", 80)]
    targets = [endpoint(address) for address in addresses]
    before = held()
    for number in range(10_000):
        target = targets[number % len(targets)]
        assert target is not None
        is_local(target)
    assert not held() - before
