"""One end of a connection, in a process of its own, that does one step when told to.

The test tells two of them in turn what to do. Between two steps a player's loop stands
still, so that what one end does is over before the other looks: the order is the
test's, not the scheduler's. Run as a program it is the mother of all players: they are
forked from it, because a fresh interpreter for each would take a minute in all.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import os
import random
import socket
import sys
import warnings
import weakref
from typing import Any

import pysmc

HOST = "127.0.0.1"
PATIENCE = 20.0
"""Seconds after which something that should have happened will not."""
FEW_BYTES = 1000
MANY_BYTES = 2 << 20
"""More than the kernel's buffers, as they are set here, and the peer's memory take."""
BYTES = random.Random(1).randbytes(MANY_BYTES)
TURNS = 6
"""Turns of the loop in one step."""

SIMPLE = ("close", "abort", "write_eof", "write_eof + close")
"""Ends that a protocol makes with its transport alone."""


def name_of(error: BaseException | None) -> str:
    """Name an exception as code written for TCP sees it."""
    if error is None:
        return "None"
    kind = next(k for k in type(error).__mro__ if k.__module__ in _STANDARD)
    number = getattr(error, "errno", None)
    suffix = f" {errno.errorcode.get(number, number)}" if number else ""
    return kind.__name__ + suffix


_STANDARD = {"builtins", "asyncio.exceptions"}


class Log:
    """What was called, in order; a chain of data is one entry."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.data = bytearray()

    def note(self, entry: str) -> None:
        if entry != "data" or self.entries[-1:] != ["data"]:
            self.entries.append(entry)


class Recording:
    """Notes each call of the transport; a mixin for protocols."""

    player: Player
    log: Log

    def connection_made(self, transport: Any) -> None:
        self.log.note("connection_made")
        self.player.on_made(transport)
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self.log.data += data
        self.log.note("data")
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().data_received(data)

    def eof_received(self) -> bool:
        self.log.note("eof_received")
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().eof_received()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.log.note(f"connection_lost({name_of(exc)})")
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().connection_lost(exc)

    def pause_writing(self) -> None:
        self.log.note("pause_writing")
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().pause_writing()

    def resume_writing(self) -> None:
        self.log.note("resume_writing")
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().resume_writing()


class Recorder(Recording, asyncio.Protocol):
    """A protocol that keeps its transport, as most do."""

    def __init__(self, player: Player) -> None:
        self.player, self.log = player, player.log
        self.transport: Any = None


class StreamRecorder(Recording, asyncio.StreamReaderProtocol):
    """What a stream's reader and writer stand on."""

    def __init__(self, player: Player) -> None:
        self.player, self.log = player, player.log
        self.reader = asyncio.StreamReader(loop=player.loop)
        super().__init__(self.reader, loop=player.loop)


class Player:
    """One end.

    Args:
        loop: Its own.
        plan: "role" ("one" acts first and connects), "action" and "situation".
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, plan: dict[str, str]) -> None:
        self.loop = loop
        self.role, self.action = plan["role"], plan["action"]
        self.situation = plan["situation"]
        self.log = Log()
        self.transport: Any = None
        self.protocol: Any = None
        self.holder: asyncio.Task[None] | None = None
        self.connecting: asyncio.Task[Any] | None = None
        self.server: Any = None
        self.gate: asyncio.Future[None] | None = None
        self.living: Any = lambda: None
        self.made = False
        self.mode = ""
        self.fileno = -1
        loop.set_exception_handler(lambda _, told: self.log.note(told["message"]))

    @property
    def early(self) -> bool:
        """Whether it acts before the connection is finished."""
        return self.situation.startswith("mid-handshake")

    def make_protocol(self) -> Any:
        streams = self.action == "cancel" and not self.early
        self.protocol = (StreamRecorder if streams else Recorder)(self)
        return self.protocol

    def on_made(self, transport: Any) -> None:
        self.made = True
        info = transport.get_extra_info("smc")
        self.mode = "tcp" if info is None else info.mode
        self.fileno = transport.get_extra_info("socket").fileno()
        self.living = weakref.ref(transport)
        if self.early and self.action == "drop the last reference":
            return
        self.transport = transport
        if type(self.protocol) is Recorder:
            self.protocol.transport = transport
        if self.early and self.action in SIMPLE:
            self.end_simply()
            return
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        reads_not = "one" if self.situation == "unread data" else "other"
        if self.situation != "idle" and not self.early and self.role == reads_not:
            transport.pause_reading()

    def on_warning(self, text: Any, kind: Any, *_: Any) -> None:
        if str(text).startswith("unclosed transport"):
            self.log.note(kind.__name__)

    # Steps

    def listen(self) -> int:
        """Serve; gives the port."""
        making = self.loop.create_server(self.make_protocol, HOST, 0)
        self.server = self.loop.run_until_complete(making)
        if self.early:
            self.holder = self.loop.create_task(self.serve())
        return int(self.server.sockets[0].getsockname()[1])

    async def serve(self) -> None:
        async with self.server:
            await self.server.serve_forever()

    def connect(self, port: int) -> None:
        """Begin to connect."""
        self.connecting = self.loop.create_task(self.do_connect(port))

    async def do_connect(self, port: int) -> None:
        try:
            await self.loop.create_connection(self.make_protocol, HOST, port)
        except BaseException as error:
            self.log.note(f"create_connection: {name_of(error)}")
            raise

    def hold(self) -> None:
        """On stock TCP: stop a connect when TCP is there and the transport is not."""
        stock: Any = self.loop
        make = stock._create_connection_transport
        self.gate = self.loop.create_future()

        async def make_later(*args: Any, **kwargs: Any) -> Any:
            assert self.gate is not None
            try:
                await self.gate
            except BaseException:
                args[0].close()
                raise
            return await make(*args, **kwargs)

        stock._create_connection_transport = make_later

    def release(self) -> None:
        """Let a connect that was held go on."""
        if self.gate is not None and not self.gate.done():
            self.gate.set_result(None)

    def until_made(self) -> None:
        """Run until the connection is made."""

        async def wait() -> None:
            async with asyncio.timeout(PATIENCE):
                while not self.made:
                    await asyncio.sleep(0.0005)

        self.loop.run_until_complete(wait())

    def prepare(self) -> None:
        """Bring about the situation."""
        writer = self.transport
        if self.situation == "unread data" and self.role == "other":
            writer.write(BYTES[:FEW_BYTES])
        elif self.situation in {"unsent data", "blocked writer"} and self.role == "one":
            if self.situation == "unsent data":
                writer.set_write_buffer_limits(high=2 * MANY_BYTES)
            writer.write(BYTES)
            assert writer.get_write_buffer_size() > 0
        if self.action == "cancel":
            self.holder = self.loop.create_task(self.use_streams())

    async def use_streams(self) -> None:
        """What a program does that is cancelled in the middle of it."""
        protocol, loop = self.protocol, self.loop
        reader = protocol.reader
        writer = asyncio.StreamWriter(self.transport, protocol, reader, loop)
        try:
            await writer.drain()
            while await reader.read(1 << 16):
                pass
        except BaseException as error:
            self.log.note(f"task: {name_of(error)}")
            if not isinstance(error, OSError):
                raise
        finally:
            writer.close()

    def act(self) -> None:
        """End the connection in its own way."""
        if self.action in SIMPLE:
            if not self.early:
                self.end_simply()
        elif self.action == "cancel":
            self.cancel()
        elif self.action == "drop the last reference":
            self.forget()
            self.collect()
        elif self.action == "process exit":
            raise SystemExit(0)

    def forget(self) -> None:
        """Keep nothing of the connection."""
        self.transport = self.protocol = self.connecting = None

    def collect(self) -> None:
        """Collect what nobody refers to: only now, so that it is the same each time."""
        gc.collect()

    def end_simply(self) -> None:
        for method in self.action.split(" + "):
            try:
                getattr(self.transport, method)()
            except OSError as error:
                self.log.note(f"{method}: {name_of(error)}")

    def cancel(self) -> None:
        task = self.holder or self.connecting
        assert task is not None
        task.cancel()

    def resume(self) -> None:
        """Read on, if there is something to read on."""
        transport = self.living()
        if self.transport is not None and transport is not None:
            transport.resume_reading()

    def finish(self) -> None:
        """Close what is still open, as every program does in the end."""
        if self.transport is not None:
            self.transport.close()

    def turn(self, count: int = TURNS) -> list[Any]:
        """Run a few turns; gives what tells whether something is still moving."""

        async def turns() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())
        transport = self.living()
        size = -1 if transport is None else transport.get_write_buffer_size()
        return [len(self.log.entries), len(self.log.data), size]

    def report(self) -> list[str]:
        """Give what was noted, and whether all bytes came."""
        written = FEW_BYTES if self.situation == "unread data" else MANY_BYTES
        count = len(self.log.data)
        assert self.log.data == BYTES[:count], "not what the peer wrote"
        whole = "all" if count == written else "some"
        return [
            f"{entry}: {whole}" if entry == "data" else entry
            for entry in self.log.entries
        ]

    def is_made(self) -> bool:
        return self.made

    def is_in_clc(self) -> bool:
        """Tell whether CLC is spoken, and not only the other end looked for."""
        loop: Any = self.loop
        return any(one.role == "server" for one in loop.driver.negotiations)

    def carrier(self) -> str:
        """Tell what carried the connection: "smcr", "tcp", or nothing."""
        return self.mode


def make_loop(carrier: str) -> asyncio.AbstractEventLoop:
    """Make the stock loop for TCP, ours for SMC-R."""
    if carrier == "tcp":
        return asyncio.SelectorEventLoop()
    return pysmc.new_event_loop(pysmc.Config(close_wait=60))


def serve_player(control: socket.socket) -> None:
    """Carry out what comes over a socket until it ends."""
    with control, control.makefile("rw") as lines:

        def say(*what: Any) -> None:
            lines.write(json.dumps(what) + "\n")
            lines.flush()

        plan = json.loads(lines.readline())
        player = Player(make_loop(plan["carrier"]), plan)
        warnings.simplefilter("always")
        warnings.showwarning = player.on_warning  # type: ignore[assignment]
        for line in lines:
            name, *args = json.loads(line)
            try:
                answer = getattr(player, name)(*args)
            except SystemExit:
                warnings.simplefilter("ignore")  # what is left open is left to the end
                say("bye", [player.report(), player.mode])
                raise
            except BaseException as error:
                say("failed", repr(error))
                raise
            say("done", answer)
        os._exit(0)  # nothing is to be seen any more, and this is quick


def fork_players(control: socket.socket) -> None:
    """Fork a player for each socket that comes; tell when a process has ended."""
    gc.freeze()
    gc.disable()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        if fds:
            pid = os.fork()
            if not pid:
                control.close()
                serve_player(socket.socket(fileno=fds[0]))
                raise SystemExit(0)
            os.close(fds[0])
            control.send(str(pid).encode())
        else:
            _, status = os.waitpid(int(message), 0)
            control.send(str(status).encode())


def warm_up() -> None:
    """Import what is imported late, once for all players."""
    for carrier in ("tcp", "smcr"):
        loop = make_loop(carrier)
        player = Player(loop, {"role": "other", "action": "", "situation": ""})
        player.listen()
        player.server.close()
        player.turn()
        loop.close()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warm_up()
    fork_players(socket.socket(fileno=int(sys.argv[1])))
