"""A program that attacks: the real library up to some point, and lies from there on.

``hostile_peer.py HOSTILE_PORT DOOR`` forks a process for each line ``{"seed": N}``. Its
kind, its role, the point and every number follow from the seed; the kinds are those of
`hostile_lies`. It tells what it does, and ends in one of several ways; after that the
parent tells how it ended. When it stopped itself (SIGSTOP) the parent says so, and
waits for ``{"then": "resume"}`` or ``{"then": "kill"}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import socket
import sys
import threading
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

import pysmc
from pysmc.fabric import shm_endpoint
from pysmc.fabric.shm import ShmDomain
from pysmc.fabric.shm_arena import Arena
from pysmc.fabric.shm_link import ShmQueuePair
from tests.fabric.hostile_lies import HONEST, KINDS
from tests.fabric.hostile_lines import (
    CONFIG,
    GOOD,
    KIB,
    MOST_SENT,
    make_small_arenas,
    marked,
    piece,
    tell,
)

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from pysmc.core.connection import Connection
    from pysmc.fabric.shm import ShmDevice

PATIENCE = 8.0
"""Seconds after which a victim that does not go on counts as hung."""
ENDINGS = ("exit", "kill", "close", "abort", "leave")
HONEST_BYTES = 96 * KIB


class Puppet(asyncio.Protocol):
    """Our end of a connection."""

    def __init__(self, mark: int) -> None:
        loop = asyncio.get_running_loop()
        self.mark = mark
        self.stream = marked(mark)
        self.received = 0
        self.written = 0
        self.is_honest = True
        self.made: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.came = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.mode = transport.get_extra_info("smc").mode
        self.made.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self.is_honest and data != piece(GOOD, self.received, len(data)):
            tell(complaint=f"wrong bytes after {self.received} from the victim")
        self.received += len(data)
        self.came.set()

    def pause_writing(self) -> None:
        self.room.clear()

    def resume_writing(self) -> None:
        self.room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.room.set()
        self.came.set()
        self.lost.set_result(None)

    async def write(self, count: int) -> None:
        """Write the next bytes of our stream."""
        end = self.written + count
        while self.written < end and not self.lost.done():
            size = min(8 * KIB, end - self.written)
            self.transport.write(piece(self.stream, self.written, size))
            self.written += size
            await self.room.wait()

    async def read(self, count: int) -> None:
        """Wait until that much has come in all."""
        while self.received < count and not self.lost.done():
            self.came.clear()
            await self.came.wait()

    def describe(self) -> str:
        """Tell what is known of the connection, for a complaint."""
        if not self.made.done():
            return "not made"
        core = self.core if self.mode == "smcr" else None
        return f"{self.mode} lost={self.lost.done()} written={self.written} {core!r}"

    @property
    def core(self) -> Connection:
        """What the core knows of it."""
        connection: Connection = self.transport._connection
        return connection


def _same(puppet: Puppet) -> Puppet:
    return puppet


class Attack:
    """One hostile process, from its first call to its end."""

    def __init__(self, seed: int, port: int, door: bytes) -> None:
        self.rng = random.Random(seed)
        self.kind = list(KINDS)[seed % len(KINDS)]
        self.lies = 0
        self.is_server = bool(self.rng.getrandbits(1))
        self.puppets: list[Puppet] = []
        self.stolen: list[int] = []
        """Copies of the descriptors that came with messages."""
        self.brought: Callable[[list[int]], list[int]] | None = None
        """What to send in place of the descriptors that belong to a hello."""
        self._port = port
        self._door = door
        self._countdown = -1
        self._tap()

    # Beneath the library

    def _tap(self) -> None:
        real_receive = shm_endpoint.receive
        real_descriptors = ShmQueuePair._descriptors

        def receive(*arguments: Any) -> shm_endpoint.Packet:
            packet = real_receive(*arguments)
            self.stolen += [os.dup(one) for one in packet.descriptors]
            return packet

        def descriptors(pair: ShmQueuePair) -> list[int]:
            ours = real_descriptors(pair)
            return self.brought(ours) if self.brought else ours

        places: tuple[Any, ...] = (shm_endpoint, ShmQueuePair)
        places[0].receive = receive
        places[1]._descriptors = descriptors

    def vanish_in_handshake(self, how: Callable[[], None]) -> None:
        """End in some way at one of the steps of the handshake."""
        self._countdown = self.rng.randrange(14)
        targets: list[tuple[Any, str]] = [
            (shm_endpoint, "receive"),
            (shm_endpoint, "send"),
            (shm_endpoint, "call"),
            (ShmDomain, "register"),
            (ShmDomain, "create_queue_pair"),
            (ShmQueuePair, "connect"),
            (ShmQueuePair, "post_send"),
            (ShmQueuePair, "_go_up"),
            (Arena, "__init__"),
            (socket.socket, "send"),
        ]
        for place, name in targets:
            setattr(place, name, self._counting(getattr(place, name), how))

    def vanish_no_more(self) -> None:
        """The handshake is over: what comes next is its end, and no step of it."""
        self._countdown = -1

    def _counting(self, real: Any, how: Callable[[], None]) -> Any:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            if self._countdown == 0:
                self.lies += 1
                self.report()
                how()
            self._countdown -= 1
            return real(*arguments, **keywords)

        return wrapper

    # What there is to lie about

    @property
    def device(self) -> ShmDevice | None:
        """Our device, if the library has opened it."""
        devices: list[Any] = self._loop.driver.devices
        return devices[0] if devices else None

    @property
    def pairs(self) -> list[ShmQueuePair]:
        """The links that are up."""
        device = self.device
        pairs = list(device.queue_pairs.values()) if device else []
        return [pair for pair in pairs if pair.is_up and pair._outbox is not None]

    @property
    def cores(self) -> list[Connection]:
        """The connections that are on SMC-R."""
        alive = [one for one in self.puppets if not one.lost.done()]
        return [puppet.core for puppet in alive if puppet.mode == "smcr"]

    @staticmethod
    def theirs(pair: ShmQueuePair) -> memoryview:
        """The words of the victim's control arena.

        Raises:
            ValueError: The link has ended.
        """
        if pair._outbox is None:
            message = "the link has ended"
            raise ValueError(message)
        return pair._outbox.words

    @staticmethod
    def arenas(pair: ShmQueuePair) -> list[mmap.mmap]:
        """The victim's data arenas."""
        return [arena for arena in pair._peer_arenas if arena is not None]

    def paint(self, pair: ShmQueuePair) -> list[bytes]:
        """Make what may be scribbled: each place with its connection's mark."""
        painted = [
            bytearray(piece(marked(1), 0, 1 << 15) * (len(arena) >> 15))
            for arena in self.arenas(pair)
        ]
        for puppet in self.puppets:
            if puppet.mode == "smcr" and not puppet.lost.done():
                core = puppet.core
                number, offset = divmod(core.remote_address, 1 << 32)
                size = core.peer_rmbe_bytes
                if core.link.handle is pair and number <= len(painted):
                    fill = piece(puppet.stream, self.rng.randrange(1 << 16), size)
                    painted[number - 1][offset : offset + size] = fill
        return [bytes(one) for one in painted]

    def distrust(self) -> None:
        """From now on nothing that comes back is worth a look."""
        for puppet in self.puppets:
            puppet.is_honest = False

    async def in_thread(self, function: Callable[[], None]) -> None:
        """Run a function in a second thread, while the library goes on in this one."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def run() -> None:
            try:
                # The link may end under our hands, and its views with it.
                with contextlib.suppress(ValueError, TypeError, OSError):
                    function()
            except BaseException as exc:  # noqa: BLE001 - told by this process
                tell(complaint=f"{self.kind}: {exc!r}")
            finally:
                loop.call_soon_threadsafe(done.set)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        await done.wait()

    def stop(self) -> None:
        """Stop this process; the runner lets it go on, or kills it."""
        os.kill(os.getpid(), signal.SIGSTOP)

    # From the beginning to the end

    async def connect(self, count: int) -> None:
        """Connect with the victim, or let it connect; some attempts come to nothing."""
        loop = asyncio.get_running_loop()
        self.puppets = [Puppet(2 + number) for number in range(count)]
        if self.brought:
            self.distrust()  # the victim may write to memory that we do not read
        if not self.is_server:
            for puppet in self.puppets:
                with contextlib.suppress(OSError):
                    make = partial(_same, puppet)
                    await loop.create_connection(make, "127.0.0.1", self._port)
        else:
            waiting = iter(self.puppets)
            server = await loop.create_server(lambda: next(waiting), "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as knocker:
                for puppet in self.puppets:
                    knocker.sendto(str(port).encode(), self._door)
                    await asyncio.wait([puppet.made], timeout=1.2)
            server.close()
        self.puppets = [one for one in self.puppets if one.made.done()]

    def report(self, **facts: Any) -> None:
        """Tell what was done."""
        modes = [puppet.mode for puppet in self.puppets if puppet.made.done()]
        written = {puppet.mark: puppet.written for puppet in self.puppets}
        tell(lies=self.lies, modes=modes, written=written, **facts)

    async def run(self) -> None:
        """Be the attack."""
        self._loop: Any = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda *_: None)
        tell(kind=self.kind)
        try:
            async with asyncio.timeout(PATIENCE):
                await self._lie()
        except TimeoutError as error:
            # Whose frames are those in which the timeout cancelled us.
            ours = traceback.extract_tb((error.__cause__ or error).__traceback__)
            where = " > ".join(frame.name for frame in ours)
            states = [one.describe() for one in self.puppets]
            text = f"{self.kind}: the victim did not go on: {where}; {states}"
            tell(complaint=text)
        self.report(honest=self.kind in HONEST)
        self._end(self.rng.choice(ENDINGS))

    async def _lie(self) -> None:
        if self.kind in HONEST:
            await KINDS[self.kind](self)
            await self._end_honestly()
            return
        # The victim may end the link while we are at it, and our views go with it.
        with contextlib.suppress(OSError, ValueError):
            await KINDS[self.kind](self)

    async def _end_honestly(self) -> None:
        """Finish every stream, and hear the victim's whole answer."""
        for puppet in self.puppets:
            await puppet.write(max(0, HONEST_BYTES - puppet.written))
            await puppet.read(MOST_SENT)
            puppet.transport.close()
        for puppet in self.puppets:
            await puppet.lost

    def _end(self, ending: str) -> None:
        with contextlib.suppress(Exception):
            for puppet in self.puppets:
                if ending == "close":
                    puppet.transport.close()
                elif ending == "abort":
                    puppet.transport.abort()
            if ending == "leave":
                self._loop.driver.close()
        if ending == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def attack(seed: int, port: int, door: bytes) -> None:
    """Be a hostile process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(30)
    os.close(0)
    loop = pysmc.new_event_loop(CONFIG)
    try:
        loop.run_until_complete(Attack(seed, port, door).run())
    except Exception as exc:  # noqa: BLE001 - what our own lies did to ourselves
        tell(honest=False, crashed=repr(exc))
    finally:
        os._exit(0)


class Forge:
    """Forks one process for each order, and follows it to its end."""

    def __init__(self) -> None:
        self._port, self._door = int(sys.argv[1]), bytes.fromhex(sys.argv[2])
        self._pid = 0

    def order(self, order: dict[str, Any]) -> None:
        """Do what the runner says, and wait for what the process does."""
        if "seed" in order:
            self._pid = os.fork()
            if self._pid == 0:
                attack(order["seed"], self._port, self._door)
        elif order["then"] == "resume":
            os.kill(self._pid, signal.SIGCONT)
        else:
            os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            tell(stopped=True)
        else:
            tell(end=os.waitstatus_to_exitcode(status))


async def warm_up() -> None:
    """Have everything loaded before the first fork: connect with ourselves."""
    loop = asyncio.get_running_loop()
    near, far = Puppet(2), Puppet(3)
    server = await loop.create_server(lambda: near, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await loop.create_connection(lambda: far, "127.0.0.1", port)
    await near.made
    assert near.mode == "smcr"
    far.transport.close()
    await near.lost
    server.close()


def main() -> None:
    """Fork until the input ends."""
    make_small_arenas()
    pysmc.run(warm_up(), config=CONFIG)
    gc.collect()
    gc.freeze()
    forge = Forge()
    pending = b""
    while data := os.read(0, 4096):
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            forge.order(json.loads(line))


if __name__ == "__main__":
    main()
