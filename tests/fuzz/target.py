"""What every fuzz target is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Target"]


class Target(NamedTuple):
    """Something that takes any bytes."""

    name: str
    run: Callable[[bytes], None]
    """Takes one input; raises whatever shows that it went wrong."""
    seeds: Callable[[], list[bytes]]
    """Inputs to begin with, beside those in ``corpus/<name>``."""
    most_bytes: int
    """Length of the longest input."""
