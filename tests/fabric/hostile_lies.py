"""What a hostile peer does over shared memory: one function for each kind of attack.

Each takes the attack (`hostile_peer.Attack`), connects, speaks the truth up to a point
and then lies. The kinds in `HONEST` do nothing that a correct victim could notice:
their streams must arrive whole and in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import tempfile
from typing import TYPE_CHECKING, Any

from pysmc.fabric.shm_arena import REGION_BYTES_MIN
from pysmc.fabric.shm_endpoint import (
    ARENA,
    BELL,
    HELLO,
    Hello,
    endpoint_name,
    send,
)
from pysmc.fabric.shm_ring import (
    CONTROL_BYTES,
    DESCRIPTOR,
    MAILBOX_WORDS,
    MAILBOXES,
    QUEUE,
    QUEUE_ENTRIES,
    QUEUE_HEAD,
    QUEUE_TAIL,
    SEND_BYTES_MAX,
    SEND_ENTRY,
    SEND_HEAD,
    SEND_SLOT_WORDS,
    SEND_SLOTS,
    SEND_WANTED,
    SENDS,
    SLEEPING,
    SLOTS,
    WRITTEN,
)
from tests.fabric.hostile_lines import ELEMENT, KIB
from tests.fabric.rawpeer import ALL_SEALS, memfd

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable

    from pysmc.core.connection import Connection
    from pysmc.fabric.shm_link import ShmQueuePair
    from tests.fabric.hostile_peer import Attack

    Lie = Callable[[Attack], Awaitable[None]]

KINDS: dict[str, Lie] = {}
"""Every kind of attack, by its name; the order is part of what a seed means."""
HONEST: set[str] = set()

PUNCH = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
WORD_BOUNDS = (
    *(0, 1, 2, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025),
    *(1 << 16, (1 << 32) - 1, 1 << 32, 1 << 48, 1 << 63, (1 << 64) - 1),
)
COUNT_BOUNDS = (
    *(0, 1, ELEMENT - 2, ELEMENT - 1, ELEMENT, ELEMENT + 1, 2 * ELEMENT),
    *(1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
)
WRAP_BOUNDS = (0, 1, 2, 0x7FFF, 0x8000, 0xFFFF)
_libc = ctypes.CDLL(None, use_errno=True)


def kind(lie: Lie) -> Lie:
    """Enter an attack into the catalogue."""
    KINDS[lie.__name__] = lie
    return lie


def honest(lie: Lie) -> Lie:
    """Enter one that a correct victim does not notice."""
    HONEST.add(lie.__name__)
    return kind(lie)


async def converse(attack: Attack, most: int = 64 * KIB) -> None:
    """Connect, and tell the truth up to a point that the seed chooses."""
    rng = attack.rng
    await attack.connect(rng.randrange(1, 4))
    for puppet in attack.puppets:
        if rng.getrandbits(1):
            await puppet.read(rng.choice((1, 4 * KIB, most)))
        if rng.getrandbits(1):
            await puppet.write(rng.choice((1, 1000, most)))
    attack.distrust()


async def breathe(attack: Attack) -> None:
    """Let the library go on for a few turns, with something to do."""
    for puppet in attack.puppets:
        if not puppet.lost.done() and attack.rng.getrandbits(1):
            puppet.transport.write(puppet.stream[:100])
    for _ in range(5):
        await asyncio.sleep(0)


def words_of(rng: random.Random, count: int) -> list[int]:
    """Choose words: bounds, or anything."""
    return [
        rng.choice(WORD_BOUNDS) if rng.getrandbits(1) else rng.getrandbits(64)
        for _ in range(count)
    ]


# --- words ---------------------------------------------------------------------------


@kind
async def queue_of_the_victim(attack: Attack) -> None:
    """Its queue's tail and entries, at every bound."""
    await converse(attack)
    rng = attack.rng
    for pair in attack.pairs:
        words = attack.theirs(pair)
        tail = words[QUEUE_TAIL]
        steps = (0, 1, 2, 64, QUEUE_ENTRIES - 1, QUEUE_ENTRIES, QUEUE_ENTRIES + 1)
        for at in range(QUEUE_ENTRIES):
            words[QUEUE + at] = rng.choice((0, 1, SLOTS - 1, SEND_ENTRY, SLOTS + 1))
            if not rng.randrange(QUEUE_ENTRIES):
                words[QUEUE + at] = rng.choice(WORD_BOUNDS)
        words[QUEUE_TAIL] = (tail + rng.choice(steps)) & (1 << 64) - 1
        attack.lies += 1
    await breathe(attack)


@kind
async def words_of_our_own(attack: Attack) -> None:
    """What the victim reads in our arena: heads, sleep, descriptors."""
    await converse(attack)
    rng = attack.rng
    for _ in range(rng.randrange(1, 40)):
        for pair in attack.pairs:
            words = pair.inbox.words
            at = rng.choice((QUEUE_HEAD, SEND_HEAD, SLEEPING, DESCRIPTOR, DESCRIPTOR))
            if at == DESCRIPTOR:
                at = MAILBOXES + rng.randrange(SLOTS) * MAILBOX_WORDS + DESCRIPTOR
                old = words[at]
                words[at] = rng.choice((old ^ 1 << rng.randrange(64), old + (1 << 20)))
            else:
                words[at] = rng.choice((words[at] + 1, rng.choice(WORD_BOUNDS)))
            attack.lies += 1
        await breathe(attack)


def publish(attack: Attack, core: Connection, **changes: int) -> None:
    """Publish an update with other numbers than the right ones."""
    sequence, token, producer, consumer, flags = core.take_update()
    numbers = {
        "sequence": sequence,
        "alert_token": token,
        "producer": producer,
        "consumer": consumer,
        "flags": flags,
    } | changes
    core.link.handle.publish(core.remote_rkey, 0, **numbers)
    attack.lies += 1


def cursors(rng: random.Random) -> int:
    """Choose a cursor at some bound."""
    return rng.choice(WRAP_BOUNDS) << 32 | rng.choice(COUNT_BOUNDS)


@kind
async def producer_cursors(attack: Attack) -> None:
    """Bytes announced that were never written, behind, beyond, outside."""
    await converse(attack)
    for _ in range(attack.rng.randrange(1, 30)):
        for core in attack.cores:
            publish(attack, core, producer=cursors(attack.rng))
        await breathe(attack)


@kind
async def consumer_cursors(attack: Attack) -> None:
    """Room granted that is not there, taken back, beyond what was sent."""
    await converse(attack)
    for _ in range(attack.rng.randrange(1, 30)):
        for core in attack.cores:
            publish(attack, core, consumer=cursors(attack.rng))
        await breathe(attack)


@kind
async def cursors_step_by_step(attack: Attack) -> None:
    """Each advance is permitted, the bytes are whatever lies in the element."""
    await converse(attack)
    rng = attack.rng
    for _ in range(rng.randrange(1, 60)):
        for core in attack.cores:
            _, _, producer, _, _ = core.take_update()
            wrap, count = producer >> 32, producer & 0xFFFFFFFF
            step = rng.choice((1, 100, ELEMENT // 2, ELEMENT - 1))
            core._tx_produced += step
            more, count = divmod(count + step, ELEMENT)
            publish(attack, core, producer=(wrap + more & 0xFFFF) << 32 | count)
        await breathe(attack)


@kind
async def tokens_and_flags(attack: Attack) -> None:
    """Updates for other connections, unknown ones, in impossible states."""
    await converse(attack)
    rng = attack.rng
    for _ in range(rng.randrange(1, 60)):
        cores = attack.cores
        for core in cores:
            token = rng.choice(
                (0, 1, (1 << 32) - 1, rng.getrandbits(32), rng.choice(cores).peer_token)
            )
            changes = {"alert_token": token, "flags": rng.getrandbits(16)}
            changes["sequence"] = rng.choice((0, 0x7FFF, 0x8000, 0xFFFF))
            chosen = rng.sample(sorted(changes), rng.randrange(1, 4))
            publish(attack, core, **{name: changes[name] for name in chosen})
        await breathe(attack)


@kind
async def mailboxes(attack: Attack) -> None:
    """Every mailbox holds an update, most of them for nobody."""
    await converse(attack)
    rng = attack.rng
    for pair in attack.pairs:
        words = attack.theirs(pair)
        tokens = [core.peer_token for core in attack.cores] or [1]
        for slot in range(SLOTS):
            base = MAILBOXES + slot * MAILBOX_WORDS
            words[base + 1] = cursors(rng) | WRITTEN
            words[base + 2] = cursors(rng)
            words[base] = rng.choice(tokens) << 32 | rng.getrandbits(32)
            words[QUEUE + slot] = slot
        words[QUEUE_TAIL] += SLOTS
        attack.lies += SLOTS
    await breathe(attack)


# --- scribbling ----------------------------------------------------------------------


def scribble_words(attack: Attack, pair: ShmQueuePair, count: int) -> None:
    """Write anything anywhere in both control arenas."""
    rng = attack.rng
    theirs, ours = attack.theirs(pair), pair.inbox.words
    for _ in range(count):
        words = theirs if rng.getrandbits(1) else ours
        if rng.getrandbits(1):
            at = rng.choice((QUEUE_TAIL, QUEUE_HEAD, SEND_HEAD, SEND_WANTED, SLEEPING))
        else:
            at = rng.randrange(len(words))
        words[at] = words_of(rng, 1)[0]
        attack.lies += 1


def scribble_data(attack: Attack, pair: ShmQueuePair, count: int) -> None:
    """Write marked bytes over everything else that can be mapped."""
    rng = attack.rng
    painted = attack.paint(pair)
    for _ in range(count):
        for arena, fill in zip(attack.arenas(pair), painted, strict=False):
            if len(arena) > 8 * ELEMENT:
                continue
            start = rng.randrange(len(arena))
            stop = min(len(arena), start + rng.choice((1, 4096, 1 << 20)))
            arena[start:stop] = fill[start:stop]
            attack.lies += 1


@kind
async def scribble_over_words(attack: Attack) -> None:
    """Continuously, from a second thread, while the library goes on."""
    await converse(attack)
    for pair in attack.pairs:
        count = attack.rng.randrange(50, 3000)
        await attack.in_thread(lambda: scribble_words(attack, pair, count))  # noqa: B023
    await breathe(attack)


@kind
async def scribble_over_data(attack: Attack) -> None:
    """The same with the bytes of streams: they stay in their connection."""
    await converse(attack)
    for puppet in attack.puppets:
        puppet.transport.write(puppet.stream[: 32 * KIB])
    for pair in attack.pairs:
        count = attack.rng.randrange(20, 400)
        await attack.in_thread(lambda: scribble_data(attack, pair, count))  # noqa: B023
    await breathe(attack)


@kind
async def scribble_over_everything(attack: Attack) -> None:
    """Both, and cursors that invite to read it all."""
    await converse(attack)
    for pair in attack.pairs:
        scribble_data(attack, pair, 3)
        for core in attack.cores:
            publish(attack, core, producer=cursors(attack.rng))
        count = attack.rng.randrange(20, 200)

        def both() -> None:
            for _ in range(10):
                scribble_data(attack, pair, count // 10)  # noqa: B023
                scribble_words(attack, pair, count)  # noqa: B023

        await attack.in_thread(both)
    await breathe(attack)


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
    """Make a hole."""
    arguments = (PUNCH, ctypes.c_long(start), ctypes.c_long(length))
    assert _libc.fallocate(descriptor, *arguments) == 0


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
    """Send back the very descriptors that the victim sent us."""
    attack.is_server = True
    attack.brought = lambda ours: [*attack.stolen[: len(ours)], *ours][: len(ours)]
    await attack.connect(1)
    attack.lies += 1
    await breathe(attack)


# --- floods --------------------------------------------------------------------------


@kind
async def flood_of_messages(attack: Attack) -> None:
    """On the link's socket: bells, arenas, hellos, refusals, nonsense."""
    await converse(attack)
    rng = attack.rng
    for pair in attack.pairs:
        connection = pair._socket
        assert connection is not None
        usual = rng.random()
        for _ in range(rng.randrange(1, 1500)):
            data = bytes((BELL,))
            if rng.random() > usual:
                first = rng.randrange(256)
                data = bytes((first,)) + rng.randbytes(rng.choice((0, 1, 50, 300)))
            try:
                send(connection, data, [])
            except BlockingIOError:
                await asyncio.sleep(0)
            except OSError:
                break
            attack.lies += 1
    await breathe(attack)


@kind
async def flood_of_sends(attack: Attack) -> None:
    """LLC messages of every type and length, also cut and empty ones."""
    await converse(attack)
    rng = attack.rng
    for pair in attack.pairs:
        for _ in range(rng.randrange(1, 300)):
            size = rng.choice((1, 43, 44, 45, 72, SEND_BYTES_MAX))
            first = rng.choice((rng.randrange(256), rng.randrange(1, 10), 0xFE))
            data = bytes((first, rng.choice((44, size & 0xFF)))) + rng.randbytes(size)
            pair.post_send(data[:size])
            attack.lies += 1
            if not rng.randrange(20):
                await asyncio.sleep(0)
    await breathe(attack)


@kind
async def sends_without_length(attack: Attack) -> None:
    """SEND slots whose length is anything, and heads that were never reached."""
    await converse(attack)
    rng = attack.rng
    for pair in attack.pairs:
        words = attack.theirs(pair)
        for slot in range(SEND_SLOTS):
            length = rng.choice((0, 1, SEND_BYTES_MAX, SEND_BYTES_MAX + 1, 1 << 40))
            words[SENDS + slot * SEND_SLOT_WORDS] = length
        tail = words[QUEUE_TAIL]
        count = rng.randrange(1, 2 * SEND_SLOTS)
        for at in range(count):
            words[QUEUE + (tail + at) % QUEUE_ENTRIES] = SEND_ENTRY
        words[QUEUE_TAIL] = tail + count
        words[SEND_WANTED] = rng.choice(WORD_BOUNDS)
        attack.lies += count
    await breathe(attack)


@kind
async def flood_of_updates(attack: Attack) -> None:
    """Ten thousand updates that say nothing."""
    await converse(attack)
    for _ in range(attack.rng.randrange(10, 100)):
        for core in attack.cores:
            for _ in range(50):
                publish(attack, core)
        await asyncio.sleep(0)


@kind
async def sleepless(attack: Attack) -> None:
    """A new sleep at every moment, so that the victim rings without end."""
    await converse(attack)
    rng = attack.rng

    def run() -> None:
        for sleep in range(1, rng.randrange(100, 20_000)):
            for pair in attack.pairs:
                pair.inbox.words[SLEEPING] = sleep
                attack.theirs(pair)[SEND_WANTED] = sleep & 1
            attack.lies += 1

    await attack.in_thread(run)
    await breathe(attack)


# --- half of what is expected, and nothing more --------------------------------------


@kind
async def strange_callers(attack: Attack) -> None:
    """Calls at the endpoint: silent, babbling, with wrong numbers, with descriptors."""
    await attack.connect(1)
    rng = attack.rng
    pairs = attack.pairs
    if not pairs:
        return
    remote = pairs[0]._remote
    assert remote is not None
    callers = []
    for _ in range(rng.randrange(1, 150)):
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        caller.setblocking(False)
        callers.append(caller)
        try:
            caller.connect(endpoint_name(remote.peer_id))
        except OSError:
            continue
        wanted = rng.choice((0, remote.number, rng.getrandbits(24)))
        hello = Hello(rng.randbytes(8), 1, 2, wanted, rng.getrandbits(24))
        data = hello._replace(arenas=rng.randrange(65)).build()
        cut = rng.choice((0, 1, len(data) - 1, len(data), len(data), len(data)))
        extra = [odd_descriptor(rng, CONTROL_BYTES)] * rng.choice((0, 1, 66, 253))
        try:
            send(caller, rng.choice((data[:cut], bytes((HELLO,)) * 300)), extra)
        except OSError:
            continue
        finally:
            attack.lies += 1
        if not rng.randrange(10):
            await asyncio.sleep(0)
    await breathe(attack)


@kind
async def vanish(attack: Attack) -> None:
    """End without a word at some step of the handshake."""
    attack.vanish_in_handshake(lambda: os._exit(0))
    await attack.connect(2)


@kind
async def killed(attack: Attack) -> None:
    """Be killed at some step of the handshake, or in the middle of a stream."""
    attack.vanish_in_handshake(lambda: os.kill(os.getpid(), signal.SIGKILL))
    await converse(attack)
    for puppet in attack.puppets:
        puppet.transport.write(puppet.stream[: 60 * KIB])
    attack.lies += 1
    attack.report()
    os.kill(os.getpid(), signal.SIGKILL)


@kind
async def one_end_only(attack: Attack) -> None:
    """Close the link's socket and keep TCP, or the other way round."""
    await converse(attack)
    for puppet in attack.puppets:
        puppet.transport.write(puppet.stream[: 60 * KIB])
    for pair in attack.pairs:
        assert pair._socket is not None
        pair._socket.shutdown(attack.rng.randrange(3))
        attack.lies += 1
    if attack.rng.getrandbits(1):
        for puppet in attack.puppets:
            tcp = puppet.transport.get_extra_info("socket")
            os.close(os.dup(tcp.fileno()))
            socket.socket(fileno=os.dup(tcp.fileno())).shutdown(attack.rng.randrange(3))
    await breathe(attack)


@honest
async def stopped(attack: Attack) -> None:
    """Stop in the middle of a stream, and go on as if nothing was."""
    rng = attack.rng
    await attack.connect(rng.randrange(1, 3))
    for puppet in attack.puppets:
        await puppet.read(rng.choice((0, 1, 32 * KIB)))
        await puppet.write(rng.choice((1, 1000, 64 * KIB)))
    attack.lies += 1
    attack.stop()
    for puppet in attack.puppets:
        await puppet.write(20 * KIB)


@kind
async def stopped_in_handshake(attack: Attack) -> None:
    """Stop at some step of the handshake."""
    attack.vanish_in_handshake(attack.stop)
    await attack.connect(1)


@honest
async def whole_truth(attack: Attack) -> None:
    """No lie at all: what shows that a victim would notice one."""
    await attack.connect(attack.rng.randrange(1, 4))
    for puppet in attack.puppets:
        await puppet.read(100 * KIB)
    attack.lies += 1
