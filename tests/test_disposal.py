"""Slow closes happen elsewhere, and tell when enough of them wait."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from pysmc import disposal
from pysmc.disposal import close_elsewhere, unmap_elsewhere, wait_unmapped
from tests.fabric.rawpeer import Child

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Closes take until this is set."""
    gate = threading.Event()
    real = os.close

    def close(descriptor: int) -> None:
        if threading.current_thread().name == "pysmc-close":
            assert gate.wait(10)
        real(descriptor)

    monkeypatch.setattr(disposal, "_closer", disposal._Closer())
    monkeypatch.setattr(disposal, "_unmapper", disposal._Closer())
    monkeypatch.setattr(disposal, "_REST", 0.01)
    monkeypatch.setattr(os, "close", close)
    yield gate
    gate.set()
    ended()


def ended() -> None:
    """Wait for the thread's end."""
    for thread in threading.enumerate():
        if thread.name == "pysmc-close":
            thread.join(10)
            assert not thread.is_alive()


def test_what_is_put_in_is_closed(gate: threading.Event) -> None:
    near, far = socket.socketpair()
    assert close_elsewhere(near.detach())
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    gate.set()
    far.settimeout(10)
    assert far.recv(1) == b""
    far.close()


def test_so_many_may_wait_before_nobody_is_let_in(gate: threading.Event) -> None:
    """What is here is taken all the same: nobody else could close it in time."""
    for count in range(disposal.WAITING_MAX + 253):
        assert disposal.has_room() == (count < disposal.WAITING_MAX)
        assert close_elsewhere(socket.socket().detach())
    assert not disposal.has_room()
    gate.set()
    ended()
    assert disposal.has_room()


class Mapping(mmap.mmap):
    """Tells when it was given up."""

    def close(self) -> None:
        super().close()
        unmapped.set()


unmapped = threading.Event()


def test_memory_does_not_wait_for_descriptors(gate: threading.Event) -> None:
    """A slow close keeps nothing mapped; a view that is left harms nobody."""
    unmapped.clear()
    near, far = socket.socketpair()
    assert close_elsewhere(near.detach())
    viewed, memory = Mapping(-1, mmap.PAGESIZE), Mapping(-1, mmap.PAGESIZE)
    with memoryview(viewed):
        assert unmap_elsewhere(viewed)
        assert unmap_elsewhere(memory)
        assert unmapped.wait(10)
        assert memory.closed
        assert not viewed.closed
        assert wait_unmapped(10)
    far.close()


def test_the_thread_ends_and_another_one_begins(gate: threading.Event) -> None:
    gate.set()
    for _ in range(2):
        near, far = socket.socketpair()
        assert close_elsewhere(near.detach())
        far.settimeout(10)
        assert far.recv(1) == b""
        far.close()
        ended()


def test_one_that_is_closed_already_harms_nobody(gate: threading.Event) -> None:
    gate.set()
    assert close_elsewhere(1 << 20)
    ended()
    assert disposal.has_room()


def test_without_threads_it_stays_the_callers(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert not close_elsewhere(0)
    assert disposal.has_room()


def test_a_forked_child_begins_anew(gate: threading.Event) -> None:
    disposal._closer._waiting.extend([-1] * disposal.WAITING_MAX)
    assert not disposal.has_room()
    assert Child(disposal.has_room).result()
