"""Closing what strangers had a hand in, without waiting for it.

Decides nothing: descriptors go in, and a thread closes them. The last close of a
descriptor that was passed here, or that lies unread in a socket which is closed, takes
as long as whoever made it wants (SO_LINGER, a file system in user space). The last
unmapping of memory frees its pages, as many as a peer filled: a second for some GiB. A
loop must not be the one that waits.

What is here already is taken however much waits: it holds a place in the descriptor
table either way. So that no more come than the table holds, whoever lets strangers in
asks `has_room` before.

Source: unix(7) on SCM_RIGHTS, socket(7) on SO_LINGER; kernel counterpart of the
unmapping: shmem_evict_inode() in shmem.c.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque

__all__ = [
    "WAITING_MAX",
    "close_elsewhere",
    "has_room",
    "unmap_elsewhere",
    "wait_closed",
    "wait_unmapped",
]

WAITING_MAX = 256
"""Descriptors that wait to be closed when nobody else should be let in."""
_REST = 1.0
"""Seconds without work after which the thread ends; the next descriptor starts one."""


class _Closer:
    """The queue, and the thread that works on it as long as there is something."""

    def __init__(self) -> None:
        self._waiting: deque[int | mmap.mmap] = deque()
        self._changed = threading.Condition()
        self._is_running = False

    def has_room(self) -> bool:
        return len(self._waiting) < WAITING_MAX

    def put(self, descriptor: int | mmap.mmap) -> bool:
        with self._changed:
            if not self._is_running:
                thread = threading.Thread(
                    target=self._work, name="pysmc-close", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    return False  # no thread is to be had
                self._is_running = True
            self._waiting.append(descriptor)
            self._changed.notify()
            return True

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not self._changed.wait(_REST):
                    self._is_running = False
                    return
                if not self._waiting:
                    continue
                descriptor = self._waiting[0]
            try:
                if isinstance(descriptor, mmap.mmap):
                    descriptor.close()
                else:
                    os.close(descriptor)
            except (OSError, BufferError):
                pass  # it is closed all the same, or as soon as its last view dies
            finally:
                with self._changed:
                    self._waiting.popleft()
                    self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)


_closer = _Closer()
_unmapper = _Closer()
"""Apart from the other, so that no stranger's slow close keeps memory here."""


def has_room() -> bool:
    """Tell whether strangers who may bring more may be let in."""
    return _closer.has_room()


def close_elsewhere(descriptor: int) -> bool:
    """Have a descriptor closed by another thread, however long that takes.

    Args:
        descriptor: No longer the caller's when this returns True.

    Returns:
        False when there is no thread for it; it stays the caller's then.
    """
    return _closer.put(descriptor)


def unmap_elsewhere(memory: mmap.mmap) -> bool:
    """Have a mapping given up by another thread.

    Args:
        memory: Without a view; no longer the caller's when this returns True.

    Returns:
        False when there is no thread for it; it stays the caller's then.
    """
    return _unmapper.put(memory)


def wait_closed(seconds: float) -> bool:
    """Wait until all descriptors that were given away here are closed; for tests.

    A mapping has one too, until it is unmapped.

    Args:
        seconds: At most so long, for each of the two threads.

    Returns:
        False when that was too short.
    """
    return _unmapper.wait(seconds) and _closer.wait(seconds)


def wait_unmapped(seconds: float) -> bool:
    """Wait until `unmap_elsewhere` has done all that it was given; for tests.

    Args:
        seconds: At most so long.

    Returns:
        False when that was too short.
    """
    return _unmapper.wait(seconds)


def _forget_in_child() -> None:
    # The thread is the parent's, and so is what it was about to close: as the last
    # holder the child would wait in its place.
    global _closer, _unmapper  # one of each for each process
    _closer, _unmapper = _Closer(), _Closer()


os.register_at_fork(after_in_child=_forget_in_child)
