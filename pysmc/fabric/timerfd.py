"""A timer that is a descriptor, on every Python that we run on.

Decides nothing. Python has its own from 3.13 on; before that the C library is called.

Source: timerfd_create(2).
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

__all__ = ["Timer"]

_MONOTONIC: Final = 1
_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC
_LEAST_SECONDS: Final = 1e-9
"""Zero would stop the timer."""


class Timer:
    """A timer on the monotonic clock; its descriptor is readable once it is over.

    Raises:
        OSError: There is no descriptor left.
    """

    def __init__(self) -> None:
        self._number: int = _library().timerfd_create(_MONOTONIC, _FLAGS)
        if self._number < 0:
            raise _error()

    def fileno(self) -> int:
        """The descriptor; -1 once it is closed."""
        return self._number

    def set(self, seconds: float) -> None:
        """Ring after so many seconds, once; what was set before counts no more."""
        self._set(max(seconds, _LEAST_SECONDS))

    def stop(self) -> None:
        """Ring no more; the descriptor is not readable."""
        self._set(0.0)

    def _set(self, seconds: float) -> None:
        whole = int(seconds)
        due = _Setting(_Time(0, 0), _Time(whole, int((seconds - whole) * 1e9)))
        if _library().timerfd_settime(self._number, 0, ctypes.byref(due), None):
            raise _error()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._number >= 0:
            os.close(self._number)
            self._number = -1


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Time), ("value", _Time))


_loaded: list[Any] = []


def _library() -> Any:
    if not _loaded:
        _loaded.append(ctypes.CDLL(None, use_errno=True))
    return _loaded[0]


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
