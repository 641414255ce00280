"""What an end of a cell can do: once with the kernel's sockets, once on pysmc's loop.

Both kinds obey the same orders, with the same arguments and answers, so that a cell of
`matrix` does not say which end is which. Each connection carries a position-coded flow
in either direction, named after the client's TCP port; each byte is compared, and each
end hashes what it has sent and what it has received.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import select
import socket
import struct
import termios
import threading
import time
from dataclasses import asdict
from typing import Any

from pysmc.testing.simulation.stream import Flow
from tests.lab.kernel_smc import IPPROTO_SMC, smc_socket
from tests.lab.streaming import Obedience

__all__ = ["KernelPlayer", "PysmcPlayer", "be_a_kernel_end"]

CHUNK_BYTES = 64 * 1024
STALLED = 1.0
"""Seconds without any progress after which a sender is thought to stand still."""
STALL_MOST = 8 << 20
"""Bytes that no pair of ends may hold back for a reader that does not read."""
BITE_BYTES = 1500
"""What a slow reader takes at a time, at first."""
PATIENCE = 20.0
TALK_BYTES = 200


class Tally:
    """One direction of a connection: its bytes, and the hash of them.

    Args:
        name: Of the flow; the same at both ends.
    """

    def __init__(self, name: str) -> None:
        self._flow = Flow(name)
        self._hash = hashlib.blake2s()
        self.count = 0

    def take(self, count: int) -> bytes:
        """Give the next bytes to send."""
        data = self._flow.take(count)
        self._add(data)
        return data

    def put_back(self, count: int) -> None:
        """Take back the last bytes, which were not sent: only where nothing follows."""
        self._flow.position -= count

    def check(self, data: bytes) -> None:
        """Compare what was received."""
        wanted = self._flow.take(len(data))
        if data != wanted:
            at = next(
                n for n, (a, b) in enumerate(zip(data, wanted, strict=True)) if a != b
            )
            message = f"byte {self.count + at} is wrong: {data[at : at + 16].hex()}"
            raise AssertionError(message)
        self._add(data)

    def _add(self, data: bytes) -> None:
        self._hash.update(data)
        self.count += len(data)

    def told(self) -> tuple[int, str]:
        """Give the number of bytes and their hash."""
        return self.count, self._hash.hexdigest()


class Line:
    """One connection of an end.

    Args:
        role: "client" or "server".
        port: The client's TCP port.
        way: The socket, or reader and writer.
    """

    def __init__(self, role: str, port: int, way: Any) -> None:
        there = {"client": "server", "server": "client"}[role]
        self.port = port
        self.way = way
        self.sent = Tally(f"{port}/{role}")
        self.received = Tally(f"{port}/{there}")

    def told(self) -> dict[str, Any]:
        """Tell what went through."""
        sent, received = self.sent.told(), self.received.told()
        return {"port": self.port, "sent": sent, "received": received}


def _pieces(count: int, pieces: int) -> Any:
    """Divide a number of bytes: into pieces of one size, or of whatever is quick."""
    size = count // pieces if pieces > 1 else CHUNK_BYTES
    while count:
        now = min(size, count)
        yield now
        count -= now


class KernelPlayer:
    """An end with blocking sockets; one that blocks for good is killed by its scenario.

    Args:
        hosts: Addresses of the server and of the client.
        protocol: IPPROTO_SMC, or 0 for plain TCP.
    """

    def __init__(self, hosts: tuple[str, str], protocol: int) -> None:
        self._server_host, self._client_host = hosts
        self._protocol = protocol
        self._listener: socket.socket | None = None
        self._lines: list[Line] = []

    def _socket(self) -> socket.socket:
        if self._protocol == IPPROTO_SMC:
            return smc_socket(None)
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM, self._protocol)

    # Connections

    def do_serve(self) -> dict[str, Any]:
        """Listen; gives the port."""
        self._listener = self._socket()
        self._listener.bind((self._server_host, 0))
        self._listener.listen(300)
        return {"port": self._listener.getsockname()[1]}

    def do_open(self, port: int, count: int = 1) -> dict[str, Any]:
        """Connect, so many times; gives the client's ports and the seconds."""
        began = time.monotonic()
        for _ in range(count):
            sock = self._socket()
            sock.bind((self._client_host, 0))
            sock.connect((self._server_host, port))
            self._lines.append(Line("client", sock.getsockname()[1], sock))
        return self._opened(count) | {"seconds": time.monotonic() - began}

    def do_take(self, count: int = 1) -> dict[str, Any]:
        """Accept so many connections; gives the clients' ports."""
        assert self._listener is not None
        for _ in range(count):
            sock, address = self._listener.accept()
            self._lines.append(Line("server", address[1], sock))
        return self._opened(count)

    def _opened(self, count: int) -> dict[str, Any]:
        return {"ports": [line.port for line in self._lines[-count:]]}

    # What one connection does: the newest

    @property
    def _line(self) -> Line:
        return self._lines[-1]

    def do_send(self, count: int, pieces: int = 1) -> dict[str, Any]:
        """Hand over so many bytes."""
        self._send(self._line, count, pieces)
        return {}

    def _send(self, line: Line, count: int, pieces: int = 1) -> None:
        for size in _pieces(count, pieces):
            line.way.sendall(line.sent.take(size))

    def do_receive(self, count: int) -> dict[str, Any]:
        """Receive exactly so many bytes."""
        self._receive(self._line, count)
        return {}

    def _receive(self, line: Line, count: int, most: int = CHUNK_BYTES) -> None:
        while count:
            data = line.way.recv(min(count, most))
            assert data, f"the stream ended {count} bytes too soon"
            line.received.check(data)
            count -= len(data)

    def do_exchange(self, count: int) -> dict[str, Any]:
        """Send and receive so many bytes at the same time."""
        began = time.monotonic()
        thread = threading.Thread(
            target=self._send, args=(self._line, count), daemon=True
        )
        thread.start()
        self._receive(self._line, count)
        thread.join()
        return {"seconds": time.monotonic() - began}

    def do_finish(self) -> dict[str, Any]:
        """End our direction."""
        self._line.way.shutdown(socket.SHUT_WR)
        return {}

    def do_end(self) -> dict[str, Any]:
        """Receive the end of the stream, and nothing before it."""
        data = self._line.way.recv(1)
        assert data == b"", f"more came: {data!r}"
        return {}

    def do_reset(self) -> dict[str, Any]:
        """Receive until it fails; gives how, which is None for an orderly end."""
        line = self._line
        try:
            while data := line.way.recv(CHUNK_BYTES):
                line.received.check(data)
        except OSError as error:
            return {"failed": type(error).__name__, "text": str(error)}
        # A reset ends a read that waits as the end of the stream does; the error is
        # kept for the next call (smc_rx_recvmsg of Linux 6.12).
        if number := line.way.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            later = OSError(number, os.strerror(number))
            return {"failed": type(later).__name__, "text": f"later: {later}"}
        return {"failed": None, "text": "the stream ended"}

    def do_close(self) -> dict[str, Any]:
        """Close it."""
        self._line.way.close()
        return {}

    def do_abort(self) -> dict[str, Any]:
        """Close it as a program does that wants a reset."""
        linger = struct.pack("ii", 1, 0)
        self._line.way.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return self.do_close()

    def do_hold(self) -> dict[str, Any]:
        """Read nothing for now: who is not told to receive does not anyway."""
        return {}

    def do_has_unread(self) -> dict[str, Any]:
        """Wait until something is there to be read, and leave it there."""
        ready = select.select([self._line.way], [], [], PATIENCE)[0]
        assert ready, "nothing came"
        answer = fcntl.ioctl(self._line.way, termios.FIONREAD, bytes(4))
        return {"count": int.from_bytes(answer, "little")}

    def do_stall(self) -> dict[str, Any]:
        """Send until nothing goes any more; gives how much went."""
        line = self._line
        line.way.setblocking(False)
        while select.select([], [line.way], [], STALLED)[1]:
            assert line.sent.count < STALL_MOST, "it never stood still"
            data = line.sent._flow.take(CHUNK_BYTES)
            try:
                went = line.way.send(data)
            except BlockingIOError:
                went = 0
            line.sent.put_back(CHUNK_BYTES - went)
            line.sent._add(data[:went])
        line.way.setblocking(True)
        return {"count": line.sent.count}

    def do_catch_up(self, count: int) -> dict[str, Any]:
        """Receive so much, a little at a time at first."""
        small = min(count, 20 * BITE_BYTES)
        self._receive(self._line, small, BITE_BYTES)
        self._receive(self._line, count - small)
        return {}

    def do_flush(self) -> dict[str, Any]:
        """Wait until what was handed over has gone: the kernel does so by itself."""
        return {}

    def do_idle(self, seconds: float) -> dict[str, Any]:
        """Do nothing for so long: nothing may happen."""
        assert not select.select([self._line.way], [], [], seconds)[0]
        return {}

    # Many connections

    def do_talk(self) -> dict[str, Any]:
        """Send a little over each connection; then receive as much from each."""
        for line in self._lines:
            self._send(line, TALK_BYTES)
        for line in self._lines:
            self._receive(line, TALK_BYTES)
        return {}

    def do_close_all(self) -> dict[str, Any]:
        """Close every connection."""
        for line in self._lines:
            line.way.close()
        return {}

    def do_told(self) -> dict[str, Any]:
        """Tell what went through each connection; forgets them."""
        lines, self._lines = self._lines, []
        for line in lines:
            line.way.close()
        return {"lines": [line.told() for line in lines]}

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order; an error is an answer too."""
        method = getattr(self, "do_" + order.pop("do"))
        try:
            answer: dict[str, Any] = method(**order)
        except Exception as error:  # noqa: BLE001  # told to whoever gave the order
            return {"error": type(error).__name__, "text": str(error)}
        return answer


def be_a_kernel_end(
    channel: socket.socket,
    hosts: tuple[str, str],
    protocol: int = IPPROTO_SMC,
    kind: type[KernelPlayer] = KernelPlayer,
) -> None:
    """Obey until no more orders come.

    Args:
        channel: Where orders come from.
        hosts: Addresses of the server and of the client.
        protocol: IPPROTO_SMC, or 0 for plain TCP.
        kind: What it can do.
    """
    player = kind(hosts, protocol)
    with channel.makefile("rwb") as orders:
        for line in orders:
            orders.write(json.dumps(player.obey(json.loads(line))).encode() + b"\n")
            orders.flush()


class PysmcPlayer(Obedience):
    """An end with streams on pysmc's loop."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._taken: asyncio.Queue[Line] = asyncio.Queue()
        self._lines: list[Line] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # Connections

    async def do_serve(self, total: int | None = None) -> dict[str, Any]:
        """Listen; gives the port."""

        def serve(reader: Any, writer: Any) -> None:
            port = writer.get_extra_info("peername")[1]
            self._taken.put_nowait(Line("server", port, (reader, writer)))

        server = await asyncio.start_server(serve, self._server_host, 0)
        self._servers.append(server)
        return {"port": server.sockets[0].getsockname()[1]}

    async def do_open(self, port: int, count: int = 1) -> dict[str, Any]:
        """Connect, so many times; gives the client's ports and what carries each."""
        began = time.monotonic()
        for _ in range(count):
            way = await asyncio.open_connection(
                self._server_host, port, local_addr=(self._client_host, 0)
            )
            name = way[1].get_extra_info("sockname")
            self._lines.append(Line("client", name[1], way))
        return self._opened(count) | {"seconds": time.monotonic() - began}

    async def do_take(self, count: int = 1) -> dict[str, Any]:
        """Take so many accepted connections; gives the clients' ports."""
        for _ in range(count):
            self._lines.append(await self._taken.get())
        return self._opened(count)

    def _opened(self, count: int) -> dict[str, Any]:
        lines = self._lines[-count:]
        infos = [line.way[1].get_extra_info("smc") for line in lines]
        return {
            "ports": [line.port for line in lines],
            "infos": [info and asdict(info) for info in infos],
        }

    # What one connection does: the newest

    @property
    def _line(self) -> Line:
        return self._lines[-1]

    async def do_send(self, count: int, pieces: int = 1) -> dict[str, Any]:
        """Hand over so many bytes."""
        await self._send(self._line, count, pieces)
        return {}

    async def _send(self, line: Line, count: int, pieces: int = 1) -> None:
        writer = line.way[1]
        for size in _pieces(count, pieces):
            writer.write(line.sent.take(size))
            await writer.drain()

    async def do_receive(self, count: int) -> dict[str, Any]:
        """Receive exactly so many bytes."""
        await self._receive(self._line, count)
        return {}

    async def _receive(self, line: Line, count: int, most: int = CHUNK_BYTES) -> None:
        reader, writer = line.way
        writer.transport.resume_reading()
        while count:
            data = await reader.read(min(count, most))
            assert data, f"the stream ended {count} bytes too soon"
            line.received.check(data)
            count -= len(data)

    async def do_exchange(self, count: int) -> dict[str, Any]:
        """Send and receive so many bytes at the same time."""
        began = time.monotonic()
        line = self._line
        await asyncio.gather(self._send(line, count), self._receive(line, count))
        return {"seconds": time.monotonic() - began}

    async def do_finish(self) -> dict[str, Any]:
        """End our direction."""
        self._line.way[1].write_eof()
        return {}

    async def do_end(self) -> dict[str, Any]:
        """Receive the end of the stream, and nothing before it."""
        data = await self._line.way[0].read(1)
        assert data == b"", f"more came: {data!r}"
        return {}

    async def do_reset(self) -> dict[str, Any]:
        """Receive until it fails; gives how, which is None for an orderly end."""
        line = self._line
        reader, writer = line.way
        writer.transport.resume_reading()
        try:
            while data := await reader.read(CHUNK_BYTES):
                line.received.check(data)
        except OSError as error:
            return {"failed": type(error).__name__, "text": str(error)}
        return {"failed": None, "text": "the stream ended"}

    async def do_close(self) -> dict[str, Any]:
        """Close it; what becomes of it is the loop's business."""
        self._line.way[1].close()
        return {}

    async def do_abort(self) -> dict[str, Any]:
        """Give it up."""
        self._line.way[1].transport.abort()
        return {}

    async def do_hold(self) -> dict[str, Any]:
        """Read nothing until told to receive."""
        self._line.way[1].transport.pause_reading()
        return {}

    async def do_has_unread(self) -> dict[str, Any]:
        """Wait until something is there to be read, and leave it there."""
        connection = self._line.way[1].transport._connection
        async with asyncio.timeout(PATIENCE):
            while not (found := connection.peek(1 << 30)[1]):
                await asyncio.sleep(0.02)
        return {"count": found}

    async def do_stall(self) -> dict[str, Any]:
        """Send until nothing goes any more; gives how much was handed over."""
        line = self._line
        writer = line.way[1]
        while line.sent.count < STALL_MOST:
            writer.write(line.sent.take(CHUNK_BYTES))
            try:
                async with asyncio.timeout(STALLED):
                    await writer.drain()
            except TimeoutError:
                return {"count": line.sent.count}
        message = "it never stood still"
        raise AssertionError(message)

    async def do_catch_up(self, count: int) -> dict[str, Any]:
        """Receive so much, a little at a time at first."""
        small = min(count, 20 * BITE_BYTES)
        await self._receive(self._line, small, BITE_BYTES)
        await self._receive(self._line, count - small)
        return {}

    async def do_flush(self) -> dict[str, Any]:
        """Wait until what was handed over has gone."""
        await self._line.way[1].drain()
        return {}

    async def do_idle(self, seconds: float = 0.0) -> dict[str, Any]:
        """Do nothing for so long."""
        # The span itself is what is tested: nothing is waited for.
        await asyncio.sleep(seconds)
        return {}

    # Many connections

    async def do_talk(self) -> dict[str, Any]:
        """Send a little over each connection; then receive as much from each."""
        for line in self._lines:
            await self._send(line, TALK_BYTES)
        for line in self._lines:
            await self._receive(line, TALK_BYTES)
        return {}

    async def do_close_all(self) -> dict[str, Any]:
        """Close every connection."""
        for line in self._lines:
            line.way[1].close()
        return {}

    async def do_groups(self) -> dict[str, Any]:
        """Tell which link groups there are, and how many connections each has."""
        loop: Any = asyncio.get_running_loop()
        groups = loop.driver.endpoint.groups
        return {"connections": [len(group.connections) for group in groups]}

    async def do_told(self) -> dict[str, Any]:
        """Tell what went through each connection; forgets them."""
        lines, self._lines = self._lines, []
        for line in lines:
            line.way[1].close()
        return {"lines": [line.told() for line in lines]}

    def close(self) -> None:
        """End what is open."""
        super().close()
        for line in self._lines:
            line.way[1].close()
