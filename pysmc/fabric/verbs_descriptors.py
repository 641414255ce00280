"""Which descriptor the verbs library has opened, where it does not say.

Decides which of this process's descriptors appeared while something was made. Until
version 59 pyverbs does not tell the descriptor of a completion channel, nor that of a
device's events; by its name in /proc it is known. Another thread may open and close
descriptors meanwhile: what is not certain is made once more.

Source: proc_pid_fd(5); the kernel names these ``anon_inode:[infinibandevent]``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Any, Final, Self

from pysmc.fabric.verbs_api import VerbsError

if TYPE_CHECKING:
    from collections.abc import Callable, Container

__all__ = ["NewDescriptors", "with_descriptor"]

_TRIES: Final = 8
"""How often something is made whose descriptor is not found."""
_FOLDER: Final = "/proc/self/fd"


class NewDescriptors:
    """Finds the descriptors that something opened, in one thread at a time."""

    lock = threading.Lock()

    def __enter__(self) -> Self:
        """Begin to watch.

        Raises:
            VerbsError: No descriptor is left to look with.
        """
        self.lock.acquire()
        try:
            self._before = _names().keys()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """See what is new."""
        try:
            self._found = _names(self._before)
        finally:
            self.lock.release()

    def only(self, word: str) -> int:
        """Tell the one whose name contains a word.

        Args:
            word: Of the name, as /proc shows it.

        Raises:
            VerbsError: There is not exactly one: somebody else uses the library in
                another thread.
        """
        found = [number for number, name in self._found.items() if word in name]
        if len(found) != 1:
            raise VerbsError(errno.EAGAIN, f"find one {word} among {self._found}")
        return found[0]


def with_descriptor(make: Callable[[], Any]) -> tuple[Any, int]:
    """Make an object of pyverbs, and find the descriptor of its events.

    Another thread that closes a descriptor meanwhile leaves its number to ours, which
    then looks as if it had been there before: so it is made once more.

    Args:
        make: Makes it; what it returns has a ``close``.

    Raises:
        VerbsError: It was not found, however often it was made.
    """
    for left in reversed(range(_TRIES)):
        with NewDescriptors() as new:
            made = make()
        try:
            return made, new.only("infinibandevent")
        except VerbsError:
            made.close()
            if not left:
                raise
    raise AssertionError  # the last one returns or raises


def _names(known: Container[int] = ()) -> dict[int, str]:
    """Give the names of this process's descriptors, the known ones aside."""
    found = {}
    try:
        listed = os.listdir(_FOLDER)
    except OSError as exc:  # that takes a descriptor too
        raise VerbsError(exc.errno or errno.EIO, "list the descriptors") from exc
    for number in map(int, listed):
        if number not in known:
            with contextlib.suppress(OSError):  # the one that lists them
                found[number] = os.readlink(f"{_FOLDER}/{number}")
    return found


def _renew_lock() -> None:
    """Another thread may have been at it when its process forked."""
    NewDescriptors.lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
