"""Attacks by memory and descriptors: what the victim maps, and what it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import tempfile
from typing import TYPE_CHECKING, Any

from pysmc.fabric.shm_arena import REGION_BYTES_MIN
from pysmc.fabric.shm_endpoint import ARENA, send
from pysmc.fabric.shm_ring import CONTROL_BYTES, DESCRIPTOR, MAILBOX_WORDS, MAILBOXES
from tests.fabric.hostile_catalogue import breathe, converse, honest, kind
from tests.fabric.rawpeer import ALL_SEALS, memfd

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.fabric.hostile_peer import Attack

PUNCH = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_libc = ctypes.CDLL(None, use_errno=True)


# --- the memory itself ---------------------------------------------------------------


def refused(action: Callable[[], Any]) -> None:
    """Try what the seals forbid.

    Raises:
        AssertionError: They did not.
    """
    try:
        action()
    except PermissionError:
        return
    message = "the seals of the victim's memory do not hold"
    raise AssertionError(message)


@honest
async def truncate(attack: Attack) -> None:
    """Shrink and grow everything that can be had of the victim's memory."""
    await attack.connect(attack.rng.randrange(1, 3))
    for descriptor in attack.stolen:
        size = os.fstat(descriptor).st_size
        for length in (0, size - 1, size + 1, attack.rng.randrange(size)):
            refused(lambda: os.ftruncate(descriptor, length))  # noqa: B023
        seal = fcntl.F_SEAL_WRITE
        refused(lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seal))  # noqa: B023
        attack.lies += 5
    assert attack.stolen or not attack.pairs


def punch(descriptor: int, start: int, length: int) -> None:
    """Make a hole.

    Raises:
        OSError: The link has ended, and the descriptor with it.
    """
    arguments = (PUNCH, ctypes.c_long(start), ctypes.c_long(length))
    if _libc.fallocate(descriptor, *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@kind
async def punch_holes(attack: Attack) -> None:
    """Take pages out of the victim's memory and out of our own, again and again."""
    await converse(attack)
    pairs = attack.pairs
    ours = [pair._control.descriptor for pair in pairs if pair._control.descriptor >= 0]
    ours += [arena.descriptor for pair in pairs for arena in pair.domain.arenas]
    rng = attack.rng

    def run() -> None:
        for _ in range(rng.randrange(1, 100)):
            descriptor = rng.choice(attack.stolen + ours)
            size = os.fstat(descriptor).st_size
            start = rng.randrange(0, size, 4096)
            punch(descriptor, start, min(size - start, rng.choice((4096, 1 << 20))))
            attack.lies += 1

    if attack.stolen:
        await attack.in_thread(run)
    await breathe(attack)


# --- descriptors ---------------------------------------------------------------------


def slow_to_close() -> int:
    """Make a TCP socket whose last close lasts: bytes that nobody takes, and linger."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setblocking(False)
    try:
        while True:
            near.send(bytes(1 << 16))
    except BlockingIOError:
        pass
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.detach()
    return near.detach()


def file_on_disk() -> int:
    """Make a descriptor of an ordinary file without a name."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def of_an_epoll() -> int:
    """Make a descriptor of an epoll."""
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


def odd_descriptor(rng: random.Random, size: int) -> int:
    """Make a descriptor that must not be mapped, or that has a right size at most."""
    kinds: tuple[Callable[[], int], ...] = (
        file_on_disk,
        lambda: os.open("/dev/zero", os.O_RDWR),
        lambda: os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR),
        lambda: os.pipe()[rng.randrange(2)],
        of_an_epoll,
        lambda: os.eventfd(0),
        slow_to_close,
        lambda: os.open("/proc/self/mem", os.O_RDONLY),
        lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
        lambda: os.open("/proc/self/exe", os.O_PATH),
        lambda: memfd(size, seals=0),
        lambda: memfd(size, seals=ALL_SEALS & ~(1 << rng.randrange(3))),
        lambda: memfd(size, seals=ALL_SEALS | 0x8),
        lambda: memfd(size, seals=ALL_SEALS | 0x10),
        lambda: memfd(rng.choice((0, 1, 4095, 4096, size - 1, size + 1, 2 * size))),
    )
    return rng.choice(kinds)()


def odd_list(attack: Attack, ours: list[int]) -> list[int]:
    """Change the list of descriptors that belongs to a hello."""
    rng = attack.rng
    sizes = [os.fstat(one).st_size for one in ours]
    match rng.randrange(7):
        case 0:
            at = rng.randrange(len(ours))
            ours[at] = odd_descriptor(rng, sizes[at])
        case 1:
            ours = []
        case 2:
            ours = ours[:-1]
        case 3:
            ours += [rng.choice(ours)] * rng.choice((1, 63, 64, 253 - len(ours)))
        case 4:
            rng.shuffle(ours)
        case 5:
            ours = [ours[0]] * len(ours)
        case _:
            if attack.stolen:
                ours = [rng.choice(attack.stolen) for _ in ours]
            else:
                ours = [memfd(size, ALL_SEALS) for size in sizes]
    attack.lies += 1
    return ours


@kind
async def descriptors_of_a_hello(attack: Attack) -> None:
    """Wrong ones, too many, too few, the same twice, the victim's own."""
    sent: list[int] = []

    def bring(ours: list[int]) -> list[int]:
        sent[:] = odd_list(attack, ours)
        return sent

    attack.brought = bring
    await converse(attack)
    for descriptor in sent:
        # Had it been accepted without its seals, the next touch would be the last.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
    await breathe(attack)


@kind
async def descriptors_of_an_arena(attack: Attack) -> None:
    """The same in messages for arenas, and regions that are said to lie there."""
    await converse(attack)
    rng = attack.rng
    for pair in attack.pairs:
        connection = pair._socket
        if connection is None:
            continue
        for number in range(rng.randrange(1, 80)):
            data = bytes((ARENA, rng.choice((number, number + 1, 0, 255))))
            count = rng.choice((0, 1, 1, 1, 2, 253))
            size = rng.choice((REGION_BYTES_MIN, CONTROL_BYTES))
            one = rng.choice((odd_descriptor(rng, size), memfd(size)))
            try:
                send(connection, data, [one] * count)
            except OSError:
                break
            attack.lies += 1
            words = pair.inbox.words
            base = MAILBOXES + rng.randrange(8) * MAILBOX_WORDS + DESCRIPTOR
            words[base] ^= rng.randrange(64) << 20
            await asyncio.sleep(0)
    await breathe(attack)


@kind
async def memory_of_the_victim_as_ours(attack: Attack) -> None:
    """Send back the very descriptors that the victim sent us: all, or one of them."""
    attack.is_server = True
    at = attack.rng.randrange(3)

    def bring(ours: list[int]) -> list[int]:
        attack.lies += 1
        theirs = attack.stolen[: len(ours)]
        if at < len(theirs):
            return [*ours[:at], theirs[at], *ours[at + 1 :]]
        return [*theirs, *ours[len(theirs) :]]

    attack.brought = bring
    await attack.connect(1)
    for pair in attack.pairs:
        assert pair._socket is not None
        send(pair._socket, bytes((ARENA, 1)), attack.stolen[-1:])
    for core in attack.cores:
        # What the victim writes for us lands in its own element, if it lets it.
        core.link.handle.inbox.words[
            MAILBOXES + (core.rmb.handle.rkey & 0xFFFF) * MAILBOX_WORDS + DESCRIPTOR
        ] += 1 << 20
        for count in (1, 100, 1000):
            core._tx_produced += count
            core.link.handle.publish(core.remote_rkey, 0, *core.take_update())
            await asyncio.sleep(0)
    await breathe(attack)
