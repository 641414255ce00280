"""A device in another process, behind the fabric contract.

The child owns a real shm device; the parent holds stand-ins for it and for what it
creates, each of which passes calls on. So the conformance checks run unchanged with
their second device across a process boundary. Run as a program, this file is the child:
``standin.py DESCRIPTOR PEER_ID``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysmc.fabric.base import (
    Completion,
    Device,
    MemoryRegion,
    ProtectionDomain,
    QueuePair,
)

if TYPE_CHECKING:
    from pysmc.fabric.base import RemoteQueuePair


def serve(connection: Connection, peer_id: bytes) -> None:
    """Do in the child what the stand-ins in the parent are asked to do."""
    from pysmc.fabric.shm import ShmDevice

    device = ShmDevice(peer_id)
    objects: list[Any] = [device]
    while True:
        try:
            number, name, arguments, keywords = connection.recv()
        except EOFError:
            break
        try:
            result = _do(objects, objects[number], name, arguments, keywords)
        except Exception as exc:  # noqa: BLE001 - it is raised again in the parent
            connection.send((False, exc))
        else:
            connection.send((True, result))
    device.close()


def _do(
    objects: list[Any], target: Any, name: str, arguments: Any, keywords: Any
) -> Any:
    if name == "poll":
        return [
            completion._replace(queue_pair=objects.index(completion.queue_pair))
            for completion in target.poll()
        ]
    if name == "read":
        start, stop = arguments
        return bytes(target.memory[start:stop])
    if name == "rkey_on":
        return target.rkey_on(objects[arguments[0]])
    if name == "facts":
        return {fact: getattr(target, fact) for fact in arguments}
    result = getattr(target, name)(*arguments, **keywords)
    if isinstance(result, ProtectionDomain | QueuePair | MemoryRegion):
        objects.append(result)
        return len(objects) - 1
    return result


class Line:
    """The way to the child, and what it created."""

    def __init__(self, peer_id: bytes) -> None:
        ours, theirs = socket.socketpair()
        number = theirs.fileno()
        command = [sys.executable, __file__, str(number), peer_id.hex()]
        environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
        self.process = subprocess.Popen(command, pass_fds=[number], env=environment)
        theirs.close()
        self._connection = Connection(ours.detach())
        self.things: dict[int, Any] = {}

    def call(self, number: int, name: str, *arguments: Any, **keywords: Any) -> Any:
        self._connection.send((number, name, arguments, keywords))
        good, result = self._connection.recv()
        if not good:
            raise result
        return result

    def close(self) -> None:
        self._connection.close()
        assert self.process.wait(10) == 0


class StandIn:
    """Passes calls on."""

    def __init__(self, line: Line, number: int) -> None:
        self.line = line
        self.index = number
        line.things[number] = self

    def facts(self, *names: str) -> dict[str, Any]:
        facts: dict[str, Any] = self.line.call(self.index, "facts", *names)
        return facts


class RemoteMemory:
    """The bytes of a region in the child."""

    def __init__(self, line: Line, number: int) -> None:
        self._line, self._number = line, number

    def __getitem__(self, place: slice) -> bytes:
        data: bytes = self._line.call(self._number, "read", place.start, place.stop)
        return data


class RemoteRegion(StandIn, MemoryRegion):
    def __init__(self, line: Line, number: int) -> None:
        super().__init__(line, number)
        facts = self.facts("length", "virtual_address", "offset")
        self.length = facts["length"]
        self.virtual_address = facts["virtual_address"]
        self.offset = facts["offset"]
        self.memory = RemoteMemory(line, number)

    def rkey_on(self, queue_pair: QueuePair) -> int:
        assert isinstance(queue_pair, RemoteQueue)
        rkey: int = self.line.call(self.index, "rkey_on", queue_pair.index)
        return rkey

    def clear(self, count: int | None = None) -> None:
        self.line.call(self.index, "clear", count)

    def close(self) -> None:
        self.line.call(self.index, "close")


class RemoteQueue(StandIn, QueuePair):
    def __init__(self, line: Line, number: int) -> None:
        super().__init__(line, number)
        self.number = self.facts("number")["number"]

    @property
    def is_up(self) -> bool:  # type: ignore[override]
        return bool(self.facts("is_up")["is_up"])

    def connect(self, remote: RemoteQueuePair, psn: int, *, passive: bool) -> None:
        self.line.call(self.index, "connect", remote, psn, passive=passive)

    def post_send(self, payload: bytes) -> None:
        self.line.call(self.index, "post_send", payload)

    def post_write(self, rkey: int, address: int, data: memoryview | bytes) -> None:
        self.line.call(self.index, "post_write", rkey, address, bytes(data))

    def publish(self, *arguments: int) -> bool:
        return bool(self.line.call(self.index, "publish", *arguments))

    def flush(self) -> None:
        self.line.call(self.index, "flush")

    def close(self, *, linger: bool = False) -> None:
        del linger
        self.line.call(self.index, "close")


class RemoteDomain(StandIn, ProtectionDomain):
    def create_queue_pair(self) -> QueuePair:
        return RemoteQueue(self.line, self.line.call(self.index, "create_queue_pair"))

    def register(self, length: int) -> MemoryRegion:
        return RemoteRegion(self.line, self.line.call(self.index, "register", length))

    def close(self) -> None:
        self.line.call(self.index, "close")


class RemoteDevice(StandIn, Device):
    """A shm device in a child process."""

    def __init__(self) -> None:
        self.peer_id = os.urandom(8)
        super().__init__(Line(self.peer_id), 0)
        facts = self.facts("fabric", "eid", "gid", "mac", "mtu_code")
        self.fabric, self.eid = facts["fabric"], facts["eid"]
        self.gid, self.mac = facts["gid"], facts["mac"]
        self.mtu_code = facts["mtu_code"]

    def create_domain(self) -> ProtectionDomain:
        return RemoteDomain(self.line, self.line.call(0, "create_domain"))

    def poll(self) -> list[Completion]:
        things = self.line.things
        completions: list[Completion] = self.line.call(0, "poll")
        return [
            completion._replace(queue_pair=things[completion.queue_pair])  # type: ignore[index]
            for completion in completions
        ]

    def pending(self) -> bool:
        return bool(self.line.call(0, "pending"))

    def arm(self) -> bool:
        return bool(self.line.call(0, "arm"))

    def disarm(self) -> None:
        self.line.call(0, "disarm")

    def fileno(self) -> int:
        raise NotImplementedError("a descriptor of another process")

    def close(self) -> None:
        self.line.close()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), bytes.fromhex(sys.argv[2]))
