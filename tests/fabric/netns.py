"""A network namespace for one test, without a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNET = 0x40000000


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def network_namespace() -> Iterator[None]:
    """Move this thread into an empty network namespace, and back at the end."""
    library = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(library.unshare(CLONE_NEWNET))
        try:
            yield
        finally:
            _check(library.setns(home, CLONE_NEWNET))
    finally:
        os.close(home)


def ip(words: str) -> None:
    """Run ``ip`` with these words; it has to succeed."""
    command = ["ip", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
