"""What every fuzz target is, and how one keeps what is dear to make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Bytes", "Kept", "Living", "Target", "must"]

Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class Target:
    """Something that takes any bytes."""

    name: str
    run: Callable[[bytes], None]
    """Takes one input; raises whatever shows that it went wrong."""
    seeds: Callable[[], list[bytes]]
    """Inputs to begin with, beside those in ``corpus/<name>``."""
    most_bytes: int
    """Length of the longest input."""
    told: Callable[[bytes], bytes] = bytes
    """Gives the input that repeats what the last one has shown: where inputs go on
    from each other, all of them together."""


def must(condition: bool, words: str) -> None:
    """Assert something where a plain assert would be misread: beside an error."""
    assert condition, words


class Bytes:
    """Takes numbers off an input; zeros when nothing is left.

    Args:
        data: The input.
    """

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        """Take one byte."""
        at = self._at
        self._at = at + 1
        return self._data[at] if at < len(self._data) else 0

    def signed(self) -> int:
        """Take one byte, -128 to 127."""
        byte = self.byte()
        return byte - 256 if byte > 127 else byte

    def take(self, count: int) -> bytes:
        """Take up to so many bytes."""
        at = self._at
        self._at = at + count
        return self._data[at : at + count]

    def patch(self, data: bytes, most: int = 3) -> bytes:
        """Give a message with a few bytes changed, as the input says."""
        changed = bytearray(data)
        for _ in range(self.byte() % (most + 1)):
            if changed:
                changed[self.byte() % len(changed)] ^= self.byte()
        return bytes(changed)


@dataclass(slots=True)
class Living(Generic[Thing]):
    """A thing, and what has happened to it."""

    thing: Thing
    head: bytes
    """The beginning of an input that asks for such a thing."""
    happened: bytes = b""


class Kept(Generic[Thing]):
    """Things that inputs go on with, because each takes longer to make than to use.

    An input that goes on with what others left can be repeated: it is all of them, one
    behind the other. After some bytes, or when a thing is used up, a new one is made.

    Args:
        make: Makes a thing by number.
        most_bytes: What may happen to one thing.
    """

    def __init__(self, make: Callable[[int], Thing], most_bytes: int) -> None:
        self._make = make
        self._most_bytes = most_bytes
        self._living: dict[int, Living[Thing]] = {}
        self._last: Living[Thing] | None = None

    def take(self, number: int, body: bytes) -> Thing:
        """Give the thing that something is about to happen to.

        Args:
            number: Which one; one byte.
            body: What is about to happen.
        """
        living = self._living.get(number)
        if living is None or len(living.happened) + len(body) > self._most_bytes:
            living = Living(self._make(number), bytes((number,)))
            self._living[number] = living
        living.happened += body
        self._last = living
        return living.thing

    def drop(self, number: int) -> None:
        """Make a new one next time."""
        self._living.pop(number, None)

    def told(self, data: bytes) -> bytes:
        """Give everything that happened to the last thing, as one input."""
        last = self._last
        self._living.clear()
        return data if last is None else last.head + last.happened
