"""Random programs for the two ends of a connection, and what plays them.

A program is data: it can be played on any loop, printed, and made smaller. Every byte
that an end writes is known from its position, so whatever arrives can be checked.

* A calm program lets everything come to rest after each step. What both ends are told
  is then the same each time, and TCP is the oracle.
* A wild one gives the loop a few turns between two steps, or none. What must hold then
  is the contract alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_BYTES = 8 << 20
"""Of one direction."""
BLOCKING_BYTES = 4 << 20
"""More than the kernel's buffers, as they are set here, and the peer's memory take."""
PATTERNS = tuple(random.Random(seed).randbytes(MOST_BYTES) for seed in (1, 2))

KINDS = ("protocol", "buffered", "streams", "asyncio's streams")
SIZES = (1, 1, 7, 100, 1000, 4096, 16384, 65536, 70000, 300_000, 2 << 20)
CALM_SIZES = (1, 10, 500, 1500)
CALLBACKS = (
    "data_received",
    "eof_received",
    "connection_lost",
    "pause_writing",
    "resume_writing",
    "buffer_updated",
)

Step = tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """What two ends do.

    `steps` begin with the name of the step and the end (0 connects, 1 serves).
    """

    calm: bool
    kinds: tuple[str, str]
    keep_open: tuple[bool, bool]
    rooms: tuple[int, int]
    steps: tuple[Step, ...]
    finish: str


def make_program(seed: int, *, calm: bool) -> Program:
    """Make the program of a seed."""
    dice = random.Random(seed)
    steps = tuple(_step(dice, calm=calm) for _ in range(dice.randint(1, 18)))
    if calm:  # when a file has been sent is not the same everywhere
        steps = tuple(step for step in steps if step[0] != "sendfile")
    # Small rooms make the kernel's window stand still for a while now and then.
    room = 70_000 if calm else dice.choice((700, 70_000))
    return Program(
        calm=calm,
        kinds=(dice.choice(KINDS), dice.choice(KINDS)),
        keep_open=(dice.random() < 0.5, dice.random() < 0.5),
        rooms=(room, 20_000),
        steps=steps,
        finish=dice.choice(("eof", "eof", "close", "abort", "half")),
    )


def _step(dice: random.Random, *, calm: bool) -> Step:
    end = dice.randrange(2)
    weights = dict(_WEIGHTS)
    if calm:
        weights["turns"] = 0
    name = dice.choices(list(weights), list(weights.values()))[0]
    if name == "hook":
        callbacks = CALLBACKS if calm else (*CALLBACKS, "get_buffer")
        callback = dice.choice(callbacks)
        inner: Step = ("raise",)
        if dice.random() < 0.75:
            names = [*_ON_TRANSPORT, "write", "close", "abort"]
            if callback == "get_buffer":  # asyncio too tells the new one of the buffer
                names.remove("protocol")
            whose = end if calm else dice.randrange(2)
            inner = _arguments(dice, dice.choice(names), whose, calm=calm)
        return ("hook", end, callback, inner)
    return _arguments(dice, name, end, calm=calm)


_ON_TRANSPORT = ("write", "writelines", "pause", "resume", "limits", "eof", "close",
                 "abort", "protocol")  # fmt: skip
_WEIGHTS = {
    "write": 9, "writelines": 2, "pause": 3, "resume": 4, "limits": 1, "eof": 1,
    "close": 1, "abort": 0.6, "protocol": 1.5, "sendfile": 1.5, "read": 7, "cancel": 2,
    "drain": 2, "wait_closed": 0.5, "hook": 4, "gc": 0.1, "turns": 5, "tls": 0.5,
}  # fmt: skip


def _arguments(dice: random.Random, name: str, end: int, *, calm: bool) -> Step:
    sizes = CALM_SIZES if calm else SIZES
    size = dice.choice(sizes)
    match name:
        case "write":
            if calm and dice.random() < 0.12:
                size = BLOCKING_BYTES
            return (name, end, size, dice.choice(("bytes", "bytearray", "memoryview")))
        case "writelines":
            pieces = [dice.choice(sizes[:-1]) for _ in range(dice.randint(0, 4))]
            return (name, end, tuple(pieces))
        case "limits":
            return (name, end, dice.choice((0, 1, 5000, 1 << 18)))
        case "protocol":
            return (name, end, dice.choice(("protocol", "buffered")))
        case "sendfile":
            return (name, end, size)
        case "read":
            how = dice.choice(("read", "readexactly", "readuntil", "readline", "all"))
            return (name, end, how, size)
        case "turns":
            return (name, end, dice.randint(1, 6))
    return (name, end)


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Leave out whatever a failure does not need."""
    changed = True
    while changed:
        changed = False
        for index in range(len(program.steps) - 1, -1, -1):
            steps = program.steps[:index] + program.steps[index + 1 :]
            smaller = replace(program, steps=steps)
            if fails(smaller):
                program, changed = smaller, True
    return program
