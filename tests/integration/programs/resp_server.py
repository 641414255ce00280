"""A small server of Redis' protocol (RESP 2 and 3) that knows nothing of pysmc.

It has the commands that a client needs for values, pipelines and pub/sub. Prints its
port, and ends when its standard input does.

Source: the Redis documentation, "RESP protocol specification".
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from typing import Any


class Push(list[Any]):
    """A list that nobody asked for."""


class Status(bytes):
    """A word like OK."""


def encode(value: Any, protocol: int) -> bytes:
    """Write one value as RESP."""
    match value:
        case None:
            return b"_\r\n" if protocol == 3 else b"$-1\r\n"
        case int():
            return b":%d\r\n" % value
        case Status():
            return b"+%s\r\n" % value
        case bytes():
            return b"$%d\r\n%s\r\n" % (len(value), value)
        case Exception():
            return b"-ERR %s\r\n" % str(value).encode()
        case list():
            mark = b">" if isinstance(value, Push) and protocol == 3 else b"*"
            coded = b"".join(encode(item, protocol) for item in value)
            return b"%s%d\r\n%s" % (mark, len(value), coded)
        case dict():
            items = [item for pair in value.items() for item in pair]
            if protocol < 3:
                return encode(items, protocol)
            return b"%%%d\r\n" % len(value) + encode(items, 3).split(b"\r\n", 1)[1]
    raise TypeError(value)


class Client:
    """One connection."""

    values: dict[bytes, bytes] = {}  # noqa: RUF012  # what all of them share
    channels: dict[bytes, set[Client]] = defaultdict(set)  # noqa: RUF012

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._protocol = 2
        self._queue: list[list[bytes]] | None = None

    def send(self, value: Any) -> None:
        """Answer, or push."""
        self._writer.write(encode(value, self._protocol))

    def forget(self) -> None:
        """Leave every channel."""
        for listeners in self.channels.values():
            listeners.discard(self)

    def obey(self, command: list[bytes]) -> None:
        """Do one command, or keep it for EXEC."""
        name = command[0].upper().decode()
        if self._queue is not None and name != "EXEC":
            self._queue.append(command)
            self.send(Status(b"QUEUED"))
            return
        if name in {"SUBSCRIBE", "UNSUBSCRIBE"}:
            self._listen(name, command[1:])
            return
        self.send(self._do(name, *command[1:]))

    def _listen(self, name: str, channels: list[bytes]) -> None:
        mine = [one for one, who in self.channels.items() if self in who]
        for channel in channels or mine:
            listeners = self.channels[channel]
            (listeners.add if name == "SUBSCRIBE" else listeners.discard)(self)
            count = sum(self in who for who in self.channels.values())
            self.send(Push([name.lower().encode(), channel, count]))

    def _do(self, name: str, *arguments: Any) -> Any:
        match name, *arguments:
            case "HELLO", version:
                self._protocol = int(version)
                return {b"proto": self._protocol}
            case "SET", key, value:
                self.values[key] = value
                return Status(b"OK")
            case "GET", key:
                return self.values.get(key)
            case "INCRBY", key, by:
                count = int(self.values.get(key, b"0")) + int(by)
                self.values[key] = b"%d" % count
                return count
            case "PUBLISH", channel, message:
                for listener in self.channels[channel]:
                    listener.send(Push([b"message", channel, message]))
                return len(self.channels[channel])
            case ("MULTI",):
                self._queue = []
                return Status(b"OK")
            case ("EXEC",):
                queue, self._queue = self._queue or [], None
                return [self._do(one[0].upper().decode(), *one[1:]) for one in queue]
        return ValueError(f"unknown command {name}")


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Obey one client until it goes."""
    client = Client(writer)
    try:
        while line := await reader.readline():
            command = []
            for _ in range(int(line[1:])):
                size = int((await reader.readline())[1:])
                command.append((await reader.readexactly(size + 2))[:-2])
            client.obey(command)
            await writer.drain()
    finally:
        client.forget()
        writer.close()


async def main() -> None:
    """Serve until standard input ends."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
