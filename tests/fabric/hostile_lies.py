"""What a hostile peer does over shared memory: one function for each kind of attack.

Each takes the attack (`hostile_peer.Attack`), connects, speaks the truth up to a point
and then lies. The kinds in `HONEST` do nothing that a correct victim could notice:
their streams must arrive whole and in order. Those that concern memory itself and
descriptors are in `hostile_memory`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import TYPE_CHECKING

from pysmc.fabric.shm_endpoint import BELL, HELLO, Hello, endpoint_name, send
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
from tests.fabric.hostile_catalogue import (
    HONEST,
    KINDS,
    breathe,
    converse,
    honest,
    kind,
)
from tests.fabric.hostile_lines import ELEMENT, KIB
from tests.fabric.hostile_memory import odd_descriptor

if TYPE_CHECKING:
    import random

    from pysmc.core.connection import Connection
    from pysmc.fabric.shm_link import ShmQueuePair
    from tests.fabric.hostile_peer import Attack

__all__ = ["HONEST", "KINDS"]

WORD_BOUNDS = (
    *(0, 1, 2, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025),
    *(1 << 16, (1 << 32) - 1, 1 << 32, 1 << 48, 1 << 63, (1 << 64) - 1),
)
COUNT_BOUNDS = (
    *(0, 1, ELEMENT - 2, ELEMENT - 1, ELEMENT, ELEMENT + 1, 2 * ELEMENT),
    *(1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
)
WRAP_BOUNDS = (0, 1, 2, 0x7FFF, 0x8000, 0xFFFF)


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
    attack.vanish_no_more()


@honest
async def whole_truth(attack: Attack) -> None:
    """No lie at all: what shows that a victim would notice one."""
    await attack.connect(attack.rng.randrange(1, 4))
    for puppet in attack.puppets:
        await puppet.read(100 * KIB)
    attack.lies += 1
