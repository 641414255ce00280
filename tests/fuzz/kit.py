"""What the tests of this folder and its programs share: targets, corpora, mutations.

A target's corpus is a folder of files, one input each, named by their digest. It holds
what coverage-guided runs found worth keeping, and every input that ever showed a fault.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from tests.fuzz.target import Target

__all__ = ["NAMES", "ROOT", "corpus", "file_name", "load", "mutations", "reproduce"]

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).with_name("corpus")

# In which module each target stands: only that one is loaded, so that coverage-guided
# runs see what the target itself reaches.
_MODULES = {
    "targets_wire": ("clc", "llc", "cdc", "tcp-option", "decode"),
    "targets_core": ("core-messages", "core-pair"),
    "targets_shm": ("shm-ring", "shm-link"),
    "targets_transport": ("transport",),
}
NAMES = tuple(name for names in _MODULES.values() for name in names)


def load(name: str) -> Target:
    """Import a target.

    Raises:
        KeyError: There is none of that name.
    """
    for module, names in _MODULES.items():
        if name in names:
            loaded = importlib.import_module(f"tests.fuzz.{module}")
            targets: list[Target] = loaded.TARGETS
            return next(each for each in targets if each.name == name)
    raise KeyError(name)


def corpus(name: str) -> list[bytes]:
    """Give the inputs that lie in the tree for a target, in a fixed order."""
    folder = CORPUS / name
    if not folder.is_dir():
        return []
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def file_name(data: bytes) -> str:
    """Name the file of an input."""
    return hashlib.sha1(data).hexdigest()  # as libFuzzer does


def reproduce(name: str, data: bytes) -> str:
    """Give the command that runs one input."""
    return f"python tests/fuzz/run.py {name} --input {data.hex() or '-'}"


# Mutations without coverage: for the Pythons that atheris does not know.


def mutations(
    seeds: list[bytes], most_bytes: int, dice: random.Random
) -> Iterator[bytes]:
    """Give changed inputs for ever, out of some that are known.

    Args:
        seeds: Where to begin; at least one.
        most_bytes: Length of the longest input.
        dice: Decides.
    """
    while True:
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.choice((1, 1, 1, 2, 2, 4, 8))):
            dice.choice(_CHANGES)(data, seeds, dice)
        yield bytes(data[:most_bytes])


_BOUNDS = (0, 1, 2, 7, 8, 15, 16, 0x2C, 0x3F, 0x40, 0x7F, 0x80, 0xFE, 0xFF)


def _place(data: bytearray, dice: random.Random) -> int:
    return dice.randrange(len(data) + 1)


def _flip(data: bytearray, seeds: list[bytes], dice: random.Random) -> None:
    del seeds
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _bound(data: bytearray, seeds: list[bytes], dice: random.Random) -> None:
    del seeds
    if data:
        data[dice.randrange(len(data))] = dice.choice(_BOUNDS)


def _number(data: bytearray, seeds: list[bytes], dice: random.Random) -> None:
    del seeds
    size = dice.choice((2, 4, 8))
    if len(data) >= size:
        start = dice.randrange(len(data) - size + 1)
        value = int.from_bytes(data[start : start + size], "big")
        value += dice.choice((-1, 1, -16, 16, 1 << dice.randrange(8 * size)))
        data[start : start + size] = (value % (1 << 8 * size)).to_bytes(size, "big")


def _cut(data: bytearray, seeds: list[bytes], dice: random.Random) -> None:
    del seeds
    start = _place(data, dice)
    del data[start : start + dice.choice((1, 2, 4, 16, 1024))]


def _insert(data: bytearray, seeds: list[bytes], dice: random.Random) -> None:
    del seeds
    start = _place(data, dice)
    data[start:start] = dice.randbytes(dice.choice((1, 2, 4, 16)))


def _repeat(data: bytearray, seeds: list[bytes], dice: random.Random) -> None:
    del seeds
    start, end = sorted((_place(data, dice), _place(data, dice)))
    data[end:end] = data[start:end]


def _splice(data: bytearray, seeds: list[bytes], dice: random.Random) -> None:
    other = dice.choice(seeds)
    start = dice.randrange(len(other) + 1)
    data[_place(data, dice) :] = other[start:]


_CHANGES: tuple[Callable[[bytearray, list[bytes], random.Random], None], ...] = (
    _flip, _flip, _bound, _number, _cut, _insert, _repeat, _splice,
)  # fmt: skip
