"""The timer that is a descriptor: it rings once, and not before it is told."""

from __future__ import annotations

import ctypes
import errno
import select

import pytest

from pysmc.fabric import timerfd
from pysmc.fabric.timerfd import Timer


def rings(timer: Timer, seconds: float) -> bool:
    return bool(select.select([timer], [], [], seconds)[0])


def test_it_rings_when_its_time_has_come() -> None:
    timer = Timer()
    assert not rings(timer, 0)
    timer.set(0.0)
    assert rings(timer, 5)
    timer.stop()
    assert not rings(timer, 0)
    timer.set(0.001)
    assert rings(timer, 5)
    timer.set(3600.5)
    assert not rings(timer, 0)
    timer.close()
    timer.close()
    assert timer.fileno() == -1


def test_what_the_kernel_refuses_is_an_error(monkeypatch) -> None:
    class Short:
        def timerfd_create(self, clock: int, flags: int) -> int:
            ctypes.set_errno(errno.EMFILE)
            return -1

    timer = Timer()
    timer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        timer.set(1.0)
    monkeypatch.setattr(timerfd, "_loaded", [Short()])
    with pytest.raises(OSError, match="Too many open files"):
        Timer()
