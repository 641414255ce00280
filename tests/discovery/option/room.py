"""A room for tests with the real kernel: an own cgroup, an own network, a sniffer.

A case runs in a child process that is in a new cgroup and in a new network namespace,
so that nothing of the host is touched; both are gone at its end.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import pickle
import select
import signal
import socket
import struct
import time
import traceback
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.discovery.option.bpf import BpfError
from pysmc.discovery.option.cgroup import NoCgroupError, own_cgroup
from pysmc.discovery.option.install import attach
from pysmc.discovery.option.sockets import is_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEADLINE = 40.0
"""Seconds that a case may take."""
SMC = bytes.fromhex("fe06e2d4c3d9")
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
PACKET_OUTGOING = 4
ETH_P_ALL, ETH_P_IP = 0x0003, 0x0800
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


class Failed(Exception):
    """A case failed in its room; the text is its traceback."""


@contextlib.contextmanager
def new_cgroup(parent: Path) -> Iterator[Path]:
    """Make a cgroup; at the end whoever is left in it is killed."""
    path = parent / f"pysmc-test-{os.getpid()}-{next(_numbers)}"
    path.mkdir()
    try:
        yield path
    finally:
        end = time.monotonic() + DEADLINE
        for folder in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
            _remove(folder, end)
        _remove(path, end)


def _remove(path: Path, end: float) -> None:
    (path / "cgroup.kill").write_text("1")
    events = os.open(path / "cgroup.events", os.O_RDONLY)
    try:
        watch = select.poll()
        watch.register(events, select.POLLPRI)
        while b"populated 1" in os.pread(events, 1000, 0):
            assert time.monotonic() < end, f"{path} is still populated"
            watch.poll(100)
    finally:
        os.close(events)
    path.rmdir()


def enter(cgroup: Path) -> None:
    """Move this process into a cgroup."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def fork() -> int:
    with warnings.catch_warnings():
        # Threads of the test runner: the child only talks to the kernel and leaves.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a child process; gives what it returned.

    Raises:
        Failed: It raised, or did not come to its end in time.
    """
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(reading)
        try:
            answer = (True, function(*arguments))
        except BaseException:  # noqa: BLE001  - it is reported by the parent
            answer = (False, traceback.format_exc())
        with os.fdopen(writing, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(writing)
    data = bytearray()
    end = time.monotonic() + DEADLINE
    try:
        while True:
            left = end - time.monotonic()
            ready, _, _ = select.select([reading], [], [], max(left, 0))
            if not ready:
                raise Failed(f"not at its end after {DEADLINE} s")
            part = os.read(reading, 1 << 16)
            if not part:
                break
            data += part
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL) if len(data) == 0 else None
        os.waitpid(pid, 0)
    good, answer = pickle.loads(data)
    if not good:
        raise Failed(answer)
    return answer


def own_network() -> None:
    """Go into a new network namespace with a loopback that is up."""
    if libc.unshare(CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    with socket.socket() as sock:
        request = struct.pack("16sH14x", b"lo", IFF_UP)
        fcntl.ioctl(sock, SIOCSIFFLAGS, request)


@dataclass
class Room:
    """What a case gets."""

    cgroup: Path
    outside: Path
    """The cgroup above, in which nothing is attached."""


def run_case(case: Callable[[Room], Any], *, attached: bool = True) -> Any:
    """Run a case in a new cgroup, with the programs attached, and a new network."""
    outside = own_cgroup()
    with new_cgroup(outside) as cgroup:

        def work() -> Any:
            enter(cgroup)
            own_network()
            if attached:
                attach(cgroup)
                assert is_installed()
            return case(Room(cgroup, outside))

        return in_child(work)


@cache
def missing() -> str:
    """Say why the programs cannot be tried here; empty when they can."""
    if os.geteuid() != 0:
        return "needs root, to load eBPF programs into a cgroup of its own"
    try:
        run_case(lambda room: None)
    except (Failed, BpfError, NoCgroupError, OSError) as error:
        lines = str(error).strip().splitlines()
        return f"needs a kernel that takes eBPF programs at a cgroup2: {lines[-1]}"
    return ""


# --- what is on the wire ------------------------------------------------------


class Segment(NamedTuple):
    """A TCP segment that crossed loopback."""

    source: int
    target: int
    flags: int
    options: tuple[bytes, ...]
    payload: bytes
    headers: bytes
    """IP and TCP header without what differs each time."""

    @property
    def has_option(self) -> bool:
        return SMC in self.options

    @property
    def is_syn(self) -> bool:
        return self.flags & (SYN | ACK) == SYN

    @property
    def is_syn_ack(self) -> bool:
        return self.flags & (SYN | ACK) == SYN | ACK


def parse(packet: bytes) -> Segment | None:
    """Read an IPv4 or IPv6 packet; None when it is not TCP."""
    if packet[0] >> 4 == 4:
        size, protocol = (packet[0] & 15) * 4, packet[9]
        fixed = bytearray(packet[:size])
        fixed[4:6] = fixed[10:12] = bytes(2)  # identification, checksum
    else:
        size, protocol = 40, packet[6]
        fixed = bytearray(packet[:size])
        fixed[1:4] = bytes(3)  # flow label
    if protocol != socket.IPPROTO_TCP:
        return None
    tcp = packet[size:]
    length = (tcp[12] >> 4) * 4
    source, target = struct.unpack_from("!HH", tcp)
    options = tuple(_options(tcp[20:length]))
    # Ports, numbers and checksum differ, and so do time stamps.
    same = b"".join(one[:2] if one[0] == 8 else one for one in options)
    headers = bytes(fixed) + tcp[12:16] + tcp[18:20] + same
    return Segment(source, target, tcp[13], options, tcp[length:], headers)


def _options(text: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(text) and text[at]:
        length = 1 if text[at] == 1 else text[at + 1]
        yield text[at : at + length]
        at += length


class Sniffer:
    """All TCP segments on loopback, each once."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.bind(("lo", ETH_P_ALL))
        self.segments: list[Segment] = []

    def until(self, enough: Callable[[list[Segment]], bool]) -> list[Segment]:
        """Collect until a condition holds; gives all segments so far."""
        end = time.monotonic() + DEADLINE / 2
        while not enough(self.segments):
            left = end - time.monotonic()
            assert left > 0, f"not seen: {self.segments}"
            if select.select([self._socket], [], [], left)[0]:
                self._take()
        return self.segments

    def _take(self) -> None:
        packet, address = self._socket.recvfrom(1 << 16)
        if address[2] == PACKET_OUTGOING:
            return  # seen again when it comes in
        segment = parse(packet)
        if segment is not None:
            self.segments.append(segment)

    def both_ends(self) -> list[Segment]:
        """Collect until both sides said that they are at their end."""
        segments = self.until(
            lambda seen: sum(1 for one in seen if one.flags & FIN) >= 2
        )
        self.segments = []
        # The last acknowledgement of the connection before may come first.
        return list(itertools.dropwhile(lambda one: not one.is_syn, segments))


class Pair(NamedTuple):
    """A connection."""

    client: socket.socket
    server: socket.socket
    listener: socket.socket

    def exchange(self) -> None:
        """Send both ways and close in order."""
        for one, other in ((self.client, self.server), (self.server, self.client)):
            one.sendall(b"x" * 5000)
            got = b""
            while len(got) < 5000:
                part = other.recv(1 << 16)
                assert part
                got += part
            assert got == b"x" * 5000
        for one, other in ((self.client, self.server), (self.server, self.client)):
            one.shutdown(socket.SHUT_WR)
            assert other.recv(1) == b""
        self.close()

    def close(self) -> None:
        for sock in self:
            sock.close()


def tcp(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(DEADLINE / 3)
    return sock


def listener(host: str = "127.0.0.1", prepare: Any = None) -> socket.socket:
    """Listen; ``prepare`` gets the socket before."""
    sock = tcp(host)
    if host == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    if prepare:
        prepare(sock)
    sock.listen()
    return sock


def connected(
    listening: socket.socket, to: str = "127.0.0.1", prepare: Any = None
) -> Pair:
    """Connect to a listener; ``prepare`` gets the client's socket before."""
    client = tcp(to)
    if prepare:
        prepare(client)
    client.connect((to, listening.getsockname()[1]))
    server, _ = listening.accept()
    server.settimeout(DEADLINE / 3)
    return Pair(client, server, listening)
