"""A peer that speaks shm by hand, and so can break every rule of it."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import sys
import warnings
from typing import TYPE_CHECKING, Any

from pysmc.disposal import wait_closed
from pysmc.fabric.base import CompletionKind, RemoteQueuePair
from pysmc.fabric.shm import ShmDevice
from pysmc.fabric.shm_endpoint import Hello, Packet, endpoint_name, receive, send
from pysmc.fabric.shm_ring import CONTROL_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.fabric.base import Completion, Device, QueuePair, Status
    from pysmc.fabric.shm import ShmDomain
    from pysmc.fabric.shm_link import ShmQueuePair

ALL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
PSN = 4711


def memfd(length: int = CONTROL_BYTES, seals: int = ALL_SEALS) -> int:
    """Make a memfd of a size with some seals."""
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, length)
    if seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def drain(device: Device, rounds: int = 200) -> list[Completion]:
    """Poll often enough that everything that waits is seen."""
    return [completion for _ in range(rounds) for completion in device.poll()]


class Sleeper:
    """Sleeps until a completion of a kind comes, and keeps what comes with it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._seen: list[Completion] = []

    def until(self, kind: CompletionKind) -> Completion:
        while True:
            self._seen += self.device.poll()
            while self._seen:
                completion = self._seen.pop(0)
                if completion.kind is kind:
                    return completion
            if self.device.arm():
                readable, _, _ = select.select([self.device.fileno()], [], [], 10)
                assert readable, f"no {kind} came in 10 seconds"


def statuses(completions: list[Completion]) -> list[tuple[CompletionKind, Status]]:
    """Leave the kinds and statuses."""
    return [(completion.kind, completion.status) for completion in completions]


class RawPeer:
    """The other end of a link, by hand."""

    def __init__(self) -> None:
        self.peer_id = os.urandom(8)
        self.number = 0x123456
        self.control = memfd()
        self.memory = mmap.mmap(self.control, CONTROL_BYTES)
        self.words = memoryview(self.memory).cast("Q")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.listener: socket.socket | None = None
        self.theirs: memoryview | None = None
        self.their_memory: mmap.mmap | None = None
        self.arenas: list[mmap.mmap] = []

    def remote(self) -> RemoteQueuePair:
        """Describe this peer as its CLC message would."""
        return RemoteQueuePair(self.peer_id, bytes(16), bytes(6), self.number, PSN, 5)

    def hello(self, wanted: int, **changes: Any) -> Hello:
        """Say hello to a queue pair that waits with psn 1."""
        return Hello(self.peer_id, self.number, PSN, wanted, 1)._replace(**changes)

    def call(self, device: ShmDevice) -> None:
        """Connect to a device's endpoint."""
        self.socket.connect(endpoint_name(device.peer_id))

    def say(self, hello: Hello | bytes, descriptors: list[int] | None = None) -> None:
        """Send a hello, by default with what belongs to it."""
        if descriptors is None:
            descriptors = [self.control]
        data = hello.build() if isinstance(hello, Hello) else hello
        send(self.socket, data, descriptors)

    def listen(self) -> None:
        """Be an endpoint that is called."""
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(endpoint_name(self.peer_id))
        self.listener.listen(4)

    def accept(self) -> Packet:
        """Take a caller and hear its hello."""
        assert self.listener is not None
        self.socket.close()
        self.socket, _ = self.listener.accept()
        return receive(self.socket)

    def hear(self, device: ShmDevice | None = None) -> Packet:
        """Receive a message, while a device is polled if one is given."""
        for _ in range(200):
            if device is not None:
                device.poll()
            try:
                return receive(self.socket)
            except BlockingIOError:
                continue
        raise TimeoutError("the device said nothing")

    def understand(self, packet: Packet) -> Hello:
        """Map what a device's hello brings."""
        hello = Hello.parse(packet.data)
        self.their_memory = mmap.mmap(packet.descriptors[0], CONTROL_BYTES)
        self.theirs = memoryview(self.their_memory).cast("Q")
        for descriptor in packet.descriptors[1:]:
            self.arenas.append(mmap.mmap(descriptor, os.fstat(descriptor).st_size))
        packet.close()
        return hello

    def link(self, device: ShmDevice, domain: ShmDomain) -> ShmQueuePair:
        """Connect with a new, passive queue pair of a device."""
        queue_pair = domain.create_queue_pair()
        queue_pair.connect(self.remote(), 1, passive=True)
        self.call(device)
        self.say(self.hello(queue_pair.number))
        completions = drain(device)
        assert [c.kind for c in completions] == [CompletionKind.CONNECTED], completions
        assert queue_pair.is_up
        self.understand(receive(self.socket))
        return queue_pair

    def close(self) -> None:
        """Let go of everything."""
        self.socket.close()
        if self.listener is not None:
            self.listener.close()
        os.close(self.control)


class Child:
    """A function in a forked child; its result, or its exception, comes back."""

    def __init__(self, function: Callable[[], Any]) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        with warnings.catch_warnings():
            # Python 3.12 warns when another thread exists; this child only computes.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            # Whatever becomes of the parent, this child does not stay.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            os.close(reading)
            self._run(function, writing)
        os.close(writing)
        self._reading = reading

    def _run(self, function: Callable[[], Any], writing: int) -> None:
        status = 1
        try:
            result = function()
            os.write(writing, pickle.dumps((True, result)))
            status = 0
        except BaseException as exc:  # noqa: BLE001 - reported in the parent
            os.write(writing, pickle.dumps((False, repr(exc))))
        finally:
            os._exit(status)

    def result(self) -> Any:
        """Wait for the end and tell the result."""
        data = b""
        while chunk := os.read(self._reading, 65536):
            data += chunk
        os.close(self._reading)
        os.waitpid(self.pid, 0)
        good, result = pickle.loads(data)
        assert good, f"in the child: {result}"
        return result

    def reap(self) -> int:
        """Wait for the end of a child that was killed; tell its exit code."""
        os.close(self._reading)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def identify(device: Device, queue_pair: QueuePair, psn: int) -> bytes:
    """What another process needs to know to connect: 15 bytes."""
    assert isinstance(device, ShmDevice)
    return struct.pack("!8sII", device.peer_id, queue_pair.number, psn)


def identified(data: bytes) -> RemoteQueuePair:
    """Read what `identify` wrote."""
    peer_id, number, psn = struct.unpack("!8sII", data)
    return RemoteQueuePair(peer_id, bytes(16), bytes(6), number, psn, 5)


def descriptors() -> int:
    """Count the descriptors of this process."""
    # What another test left is not in this one's count: a mapping in a circle of
    # references keeps a descriptor until the circle is found.
    gc.collect()
    wait_closed(5)
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    """Count the arenas that are mapped here."""
    with open("/proc/self/maps", encoding="ascii") as file:
        return sum("memfd:pysmc" in line for line in file)


def link(near: ShmDevice, far: ShmDevice) -> tuple[ShmQueuePair, ShmQueuePair]:
    """Connect two devices of this process."""
    pairs = [device.create_domain().create_queue_pair() for device in (near, far)]
    pairs[1].connect(identified(identify(near, pairs[0], 1)), 2, passive=True)
    pairs[0].connect(identified(identify(far, pairs[1], 2)), 1, passive=False)
    drain(far)
    drain(near)
    assert pairs[0].is_up
    assert pairs[1].is_up
    return pairs[0], pairs[1]


def ended(device: ShmDevice) -> tuple[Status, str]:
    """Poll until a link is down; tell how."""
    down = CompletionKind.DOWN
    completions = [item for item in drain(device) if item.kind is down]
    assert len(completions) == 1, completions
    return completions[0].status, completions[0].payload
