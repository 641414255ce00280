"""The shm fabric against asyncio TCP on loopback: ratios of one run, side by side.

Two processes, no event loop on the fabric's side: this is what the fabric can do, not
what a program gets (the loop's own comparison is ``pysmc bench``). Rounds alternate
between the two, because the machine's mood changes by the minute; the ratio of each
pair of rounds counts, and their median is printed::

    python benchmarks/bench_shm.py [--rounds N] [--mib N] [--json]

The TCP sockets use reno: on loopback bbr alone makes them several times slower, and the
ratio with it would say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import select
import socket
import statistics
import time
from typing import TYPE_CHECKING

from pysmc.fabric.base import CompletionKind, RemoteQueuePair
from pysmc.fabric.shm import ShmDevice

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.fabric.base import Update

KIB = 1024
SLICE = 64 * KIB
RING = 256 * KIB
UPDATE_EVERY = RING // 8
LOOKS = 500  # at a word, before sleeping: some 50 microseconds
CREDIT_MAX = 16


class Link:
    """One end of a link between two processes, and its ring."""

    def __init__(self, channel: socket.socket, *, passive: bool) -> None:
        self.device = ShmDevice(os.urandom(8))
        # Looking pays only while the peer runs beside us: so it is learnt, as the
        # loop's selector does.
        self.credit = CREDIT_MAX
        self.waits = 0
        domain = self.device.create_domain()
        self.region = domain.register(RING)
        self.queue_pair = queue_pair = domain.create_queue_pair()
        mine = {
            "peer_id": self.device.peer_id.hex(),
            "number": queue_pair.number,
            "rkey": self.region.rkey_on(queue_pair),
            "address": self.region.virtual_address,
        }
        channel.send(json.dumps(mine).encode())
        facts = json.loads(channel.recv(1000))
        self.rkey, self.address = facts["rkey"], facts["address"]
        device = self.device
        peer = RemoteQueuePair(
            bytes.fromhex(facts["peer_id"]),
            device.gid,
            device.mac,
            facts["number"],
            1,
            5,
        )
        queue_pair.connect(peer, 1, passive=passive)
        self.waiter = select.epoll()
        self.waiter.register(device.fileno(), select.EPOLLIN)
        while not queue_pair.is_up:
            self.wait()
        # Neither begins before the other is ready to count what comes.
        channel.send(b"up")
        channel.recv(2)

    def wait(self) -> Update | None:
        """Wait for news: look, then sleep. Tell the newest update."""
        device = self.device
        pending = device.pending
        self.waits += 1
        looks = LOOKS if self.credit or self.waits % 16 == 0 else 1
        for look in range(looks):
            if pending():
                if look:
                    self.credit = min(CREDIT_MAX, self.credit + 1)
                break
        else:
            self.credit = max(0, self.credit - 2)
            while device.arm():
                self.waiter.poll()
                if device.pending() or not self.queue_pair.is_up:
                    break
            device.disarm()
        newest = None
        for completion in device.poll():
            if completion.kind is CompletionKind.UPDATE:
                newest = completion.payload
            elif completion.kind is CompletionKind.DOWN:
                raise SystemExit(completion.payload)
        return newest


def shm_send(link: Link, total: int) -> None:
    """Stream: write slices, follow the consumer cursor.

    Out of room it looks into the mailbox before it waits, as the transport does.
    """
    publish, write = link.queue_pair.publish, link.queue_pair.post_write
    look, region = link.queue_pair.newest_consumer, link.region
    data = memoryview(bytes(SLICE))
    produced = consumed = sequence = 0
    rkey, address = link.rkey, link.address
    while consumed < total:
        while produced < total and produced - consumed <= RING - SLICE:
            write(rkey, address + produced % RING, data)
            produced += SLICE
            sequence = sequence + 1 & 0xFFFF
            publish(rkey, 0, sequence, 1, produced, 0, 0)
            if produced - consumed > RING - SLICE:
                consumed = max(consumed, look(region, 1))
        update = link.wait()
        if update is not None:
            consumed = max(consumed, update.consumer)


def shm_receive(link: Link, total: int) -> None:
    """Copy out what came as bytes, and publish how far every eighth of the ring."""
    publish = link.queue_pair.publish
    memory, start = link.region.memory, link.region.offset
    consumed = published = sequence = 0
    rkey = link.rkey
    while consumed < total:
        update = link.wait()
        if update is None:
            continue
        while consumed < update.producer:
            at = start + consumed % RING
            chunk = memory[at : at + SLICE]
            consumed += len(chunk)
            if consumed - published >= UPDATE_EVERY:
                sequence = sequence + 1 & 0xFFFF
                published = consumed
                publish(rkey, 0, sequence, 1, 0, consumed, 0)


def shm_ping(link: Link, count: int) -> None:
    """Round trips of 64 bytes, the asking end."""
    publish, write = link.queue_pair.publish, link.queue_pair.post_write
    data = bytes(64)
    for number in range(1, count + 1):
        write(link.rkey, link.address, data)
        publish(link.rkey, 0, number & 0xFFFF, 1, number, 0, 0)
        while (update := link.wait()) is None or update.producer < number:
            pass


def shm_pong(link: Link, count: int) -> None:
    """Round trips of 64 bytes, the answering end."""
    publish, write = link.queue_pair.publish, link.queue_pair.post_write
    memory, start = link.region.memory, link.region.offset
    number = 0
    while number < count:
        update = link.wait()
        if update is not None and update.producer > number:
            number = update.producer
            write(link.rkey, link.address, memory[start : start + 64])
            publish(link.rkey, 0, number & 0xFFFF, 1, number, 0, 0)


class Sink(asyncio.Protocol):
    """Counts what comes; answers when all of it is there."""

    def __init__(self, done: asyncio.Future[None], total: int, echo: int) -> None:
        self.done, self.left, self.echo = done, total, echo

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Count."""
        self.left -= len(data)
        if self.echo:
            self.transport.write(data)
        if self.left <= 0 and not self.done.done():
            if not self.echo:
                self.transport.write(b"!")
            self.done.set_result(None)


class Source(asyncio.Protocol):
    """Writes slices as fast as the transport takes them; or asks and waits."""

    def __init__(self, done: asyncio.Future[None], total: int, size: int) -> None:
        self.done, self.left, self.data = done, total, bytes(size)
        self.is_asking = size == 64
        self.is_writing = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.resume_writing()

    def pause_writing(self) -> None:
        """Stop until there is room."""
        self.is_writing = False

    def resume_writing(self) -> None:
        """Go on."""
        self.is_writing = True
        while self.left > 0 and self.is_writing:
            self.left -= len(self.data)
            self.transport.write(self.data)
            if self.is_asking:
                return

    def data_received(self, data: bytes) -> None:
        """Ask again, or end."""
        del data
        if self.is_asking and self.left > 0:
            self.resume_writing()
        elif not self.done.done():
            self.done.set_result(None)


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Make two ends of a TCP connection on loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    if hasattr(socket, "TCP_CONGESTION"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    near = socket.socket()
    if hasattr(socket, "TCP_CONGESTION"):
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    near.connect(listener.getsockname())
    far, _ = listener.accept()
    listener.close()
    return near, far


async def tcp_end(
    sock: socket.socket, make: Callable[[asyncio.Future[None]], asyncio.Protocol]
) -> None:
    """Run one end over TCP until it is done."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    transport, _ = await loop.create_connection(lambda: make(done), sock=sock)
    await done
    if isinstance(transport, asyncio.Transport):
        transport.close()


def timed(near: Callable[[], None], far: Callable[[], None]) -> float:
    """Run two functions in two processes; tell the seconds of the first."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            far()
            status = 0
        finally:
            os._exit(status)
    began = time.perf_counter()
    near()
    seconds = time.perf_counter() - began
    if os.waitpid(child, 0)[1]:
        text = "the other process failed"
        raise SystemExit(text)
    return seconds


def shm_round(
    near: Callable[[Link, int], None], far: Callable[[Link, int], None], amount: int
) -> float:
    """Time one round over shm, without the connecting."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    seconds = 0.0

    def run_near() -> None:
        nonlocal seconds
        link = Link(ours, passive=True)
        began = time.perf_counter()
        near(link, amount)
        seconds = time.perf_counter() - began
        link.device.close()

    def run_far() -> None:
        link = Link(theirs, passive=False)
        far(link, amount)
        while link.queue_pair.is_up:
            link.device.poll()

    timed(run_near, run_far)
    ours.close()
    theirs.close()
    return seconds


def tcp_round(total: int, size: int) -> float:
    """Time one round over asyncio TCP."""
    near, far = connected_pair()
    echo = 64 if size == 64 else 0
    return timed(
        lambda: asyncio.run(tcp_end(near, lambda done: Source(done, total, size))),
        lambda: asyncio.run(tcp_end(far, lambda done: Sink(done, total, echo))),
    )


def one_process_hop(count: int = 50_000) -> float:
    """Time post_write, publish and poll of 64 bytes in one process; microseconds."""
    near, far = ShmDevice(os.urandom(8)), ShmDevice(os.urandom(8))
    ends = [(device, device.create_domain()) for device in (near, far)]
    pairs = [domain.create_queue_pair() for _, domain in ends]
    region = ends[1][1].register(RING)
    for index, (device, _) in enumerate(ends):
        other, pair = ends[1 - index][0], pairs[1 - index]
        remote = RemoteQueuePair(other.peer_id, other.gid, other.mac, pair.number, 1, 5)
        pairs[index].connect(remote, 1, passive=device is far)
    while not all(pair.is_up for pair in pairs):
        near.poll()
        far.poll()
    rkey, address, data = region.rkey_on(pairs[1]), region.virtual_address, bytes(64)
    write, publish, poll = pairs[0].post_write, pairs[0].publish, far.poll
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for number in range(count // 5):
            write(rkey, address, data)
            publish(rkey, 0, number & 0xFFFF, 1, number, 0, 0)
            poll()
        best = min(best, (time.perf_counter() - began) / (count // 5))
    near.close()
    far.close()
    return best * 1e6


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="streamed in each round")
    parser.add_argument("--pings", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    total = options.mib * KIB * KIB // RING * RING
    rows: dict[str, list[tuple[float, float]]] = {"stream 64 KiB": [], "ping 64 B": []}
    for _ in range(options.rounds):
        ours = shm_round(shm_send, shm_receive, total)
        rows["stream 64 KiB"].append((ours, tcp_round(total, SLICE)))
        ours = shm_round(shm_ping, shm_pong, options.pings)
        rows["ping 64 B"].append((ours, tcp_round(options.pings * 64, 64)))
    report: dict[str, object] = {
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "hop_us": round(one_process_hop(), 2),
    }
    for name, pairs in rows.items():
        ratios = [tcp / ours for ours, tcp in pairs]
        shm_s, tcp_s = (
            statistics.median(column) for column in zip(*pairs, strict=True)
        )
        report[name] = {
            "times_asyncio_tcp": round(statistics.median(ratios), 2),
            "ratios": [round(ratio, 2) for ratio in ratios],
            "shm_seconds": round(shm_s, 3),
            "tcp_seconds": round(tcp_s, 3),
        }
    if options.json:
        print(json.dumps(report))
        return
    print(f"one process, write + publish + poll of 64 B: {report['hop_us']} us")
    for name in rows:
        row = report[name]
        assert isinstance(row, dict)
        print(f"{name}: {row['times_asyncio_tcp']} times asyncio TCP {row['ratios']}")


if __name__ == "__main__":
    main()
