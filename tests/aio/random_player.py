"""What plays a random program, on a loop of each kind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import socket
import tempfile
from typing import TYPE_CHECKING, Any

import pysmc
from pysmc.disposal import wait_closed
from tests.aio.close_matrix_player import name_of
from tests.aio.random_ends import End
from tests.aio.random_programs import (
    MOST_BYTES,
    PATTERNS,
    Program,
    Step,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from pysmc.testing.authority import Authority

HOST = "127.0.0.1"
PATIENCE = 20.0
"""Seconds after which something that should have happened will not."""
QUIET_TURNS = 6
"""Turns without a change after which nothing more will happen."""


class Play:
    """One program on one connection.

    Args:
        stage: Where.
        program: What.
    """

    def __init__(self, stage: Stage, program: Program) -> None:
        self.stage, self.program, self.loop = stage, program, stage.loop
        self.ends = (End(self, 0), End(self, 1))
        self.tasks: set[asyncio.Task[Any]] = set()
        self.upgrading = False
        self.is_tls = False
        self.ended_early = False
        self.found: list[str] = []
        """What must not be, and was."""

    async def run(self) -> None:
        """Play it; what is wrong is raised or stands in `problems`."""
        async with asyncio.timeout(PATIENCE):
            await self._connect()
            for step in self.program.steps:
                self.do(step)
                if self.program.calm:
                    await self.settle()
                elif step[0] == "turns":
                    for _ in range(step[2]):
                        await asyncio.sleep(0)
            await self.finish()

    async def _connect(self) -> None:
        one, other = self.ends
        self.stage.next_end = other
        await self.loop.create_connection(one.make_protocol, HOST, self.stage.port)
        while other.transport is None:
            await asyncio.sleep(0)
        for end in self.ends:
            self.stage.check_carrier(end.transport)
            sock = end.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
            if end.reader is not None:
                own = end.kind == "streams"
                make = pysmc.StreamWriter if own else asyncio.StreamWriter
                protocol = end.transport.get_protocol()
                end.writer = make(end.transport, protocol, end.reader, self.loop)

    async def settle(self) -> None:
        """Wait until nothing changes any more."""
        last: Any = None
        still = 0
        while still < QUIET_TURNS:
            await asyncio.sleep(0)
            now = [end.state() for end in self.ends], self.upgrading
            still = 0 if now != last or self.upgrading else still + 1
            last = now

    # Steps

    def do(self, step: Step) -> None:
        """Do one step, or begin it."""
        name, end = step[0], self.ends[step[1]]
        match name:
            case "hook":
                end.hooks[step[2]] = step[3]
            case "read" if self.may_read(end):
                self.begin_read(end, *step[2:])
            case "cancel" if end.reading is not None:
                end.reading.cancel()
            case "drain" if end.writer is not None:
                self.begin(self.wait(end, "drain"))
            case "wait_closed" if end.writer is not None:
                self.begin(self.wait(end, "wait_closed"))
            case "sendfile" if not (self.is_tls or self.upgrading):
                if end.sending is None and end.written + step[2] <= MOST_BYTES:
                    self.begin_sendfile(end, step[2])
            case "tls":
                self.begin_tls()
            case "gc":
                gc.collect()
            case _:
                self.do_simple(step)

    def may_read(self, end: End) -> bool:
        return end.reader is not None and not (end.reading or self.upgrading)

    def do_simple(self, step: Step) -> None:  # noqa: C901  # flat
        """Do what a callback may do too."""
        name, end = step[0], self.ends[step[1]]
        match name:
            case "write":
                end.write(*step[2:])
            case "writelines":
                end.writelines(step[2])
            case "limits":
                if not end.lost.is_set():
                    self.limit(end, step[2])
            case "eof":
                if end.sending is None and not self.upgrading:
                    end.call("write_eof")
                    self.ended_early = True
            case "close" | "abort":
                self.end(end, name)
            case "protocol":
                self.replace_protocol(end, step[2])
            case "pause" | "resume" if end.sending is None and not self.upgrading:
                # As streams do it by themselves, they are left alone.
                if end.reader is None:
                    if name == "resume":
                        end.resume()
                    else:
                        end.transport.pause_reading()

    def limit(self, end: End, high: int) -> None:
        end.transport.set_write_buffer_limits(high=high)

    def end(self, end: End, name: str) -> None:
        """Close or abort."""
        self.ended_early = True
        if end.lost.is_set():
            return
        if name == "abort" and (end.waiting() or end.sending is not None):
            end.lossy = True
        if self.is_tls and end.transport.is_closing() and name == "close":
            return  # asyncio's TLS forgets itself
        end.transport.close() if name == "close" else end.transport.abort()

    def replace_protocol(self, end: End, kind: str) -> None:
        busy = end.sending is not None or self.upgrading or end.lost.is_set()
        if end.reader is None and not busy:
            end.transport.set_protocol(end.make_protocol(kind))

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def begin_read(self, end: End, how: str, size: int) -> None:
        def over(task: Any) -> None:
            end.reading = None

        end.reading = self.begin(self.read(end, how, size))
        end.reading.add_done_callback(over)  # also of a task that never began

    def begin_sendfile(self, end: End, size: int) -> None:
        def over(task: Any) -> None:
            end.sending = None

        end.sending = self.begin(self.sendfile(end, size))
        end.sending.add_done_callback(over)

    async def read(self, end: End, how: str, size: int) -> None:
        try:
            data = await self.read_bytes(end, how, size)
        except asyncio.IncompleteReadError as error:
            data = error.partial
            end.log.append(f"{how}: end")
        except (asyncio.LimitOverrunError, ValueError) as error:
            end.log.append(f"{how}: {name_of(error)}")
            if how == "readline":  # it drops what it cannot give
                end.count_read = end.count - _unread_in(end.reader)
            data = b""
        except asyncio.CancelledError:
            if how == "all" and end.kind != "streams":
                end.count_read = end.count - _unread_in(end.reader)
            end.log.append(f"{how}: cancelled")
            data = b""
        except Exception as error:  # noqa: BLE001
            end.log.append(f"{how}: {name_of(error)}")
            data = b""
        if data != end.into[end.count_read : end.count_read + len(data)]:
            end.errors.append(f"{how} gave wrong bytes at {end.count_read}")
        end.count_read += len(data)

    async def read_bytes(self, end: End, how: str, size: int) -> bytes:
        match how:
            case "all":
                data = await end.reader.read(-1)
            case "readuntil":
                data = await end.reader.readuntil(b"\x01\x02")
            case "readline":
                data = await end.reader.readline()
            case _:
                data = await getattr(end.reader, how)(size)
        return bytes(data)

    async def wait(self, end: End, name: str) -> None:
        try:
            await getattr(end.writer, name)()
        except asyncio.CancelledError:
            pass
        except Exception as error:  # noqa: BLE001
            end.log.append(f"{name}: {name_of(error)}")

    async def sendfile(self, end: End, size: int) -> None:
        file = self.stage.files[end.index]
        offset = end.written
        end.written += size
        try:
            sent = await self.loop.sendfile(end.transport, file, offset, size)
            if sent != size:
                end.no_more = True
        except (OSError, RuntimeError, asyncio.CancelledError) as error:
            end.no_more = True
            end.log.append(f"sendfile: {name_of(error)}")

    # TLS

    def begin_tls(self) -> None:
        if self.stage.authority is None or self.is_tls or self.upgrading:
            return
        if any(end.transport.is_closing() or end.sending for end in self.ends):
            return
        if self.ended_early or any(end.reading for end in self.ends):
            return
        self.upgrading = True
        self.begin(self.upgrade())

    async def upgrade(self) -> None:
        """Let both ends begin TLS when every byte has arrived."""
        try:
            await self.all_delivered()
            if any(end.transport.is_closing() for end in self.ends):
                return
            self.is_tls = True
            await asyncio.gather(*(self.upgrade_end(end) for end in self.ends))
        finally:
            self.upgrading = False

    async def upgrade_end(self, end: End) -> None:
        authority = self.stage.authority
        options: dict[str, Any] = {"server_side": True}
        context = self.stage.contexts[end.index]
        if end.index == 0:
            options = {"server_hostname": "localhost"}
        assert authority is not None
        try:
            if end.writer is not None:
                options.pop("server_side", None)
                if end.index == 1:
                    protocol = end.transport.get_protocol()
                    protocol._client_connected_cb = print  # served
                await end.writer.start_tls(context, **options)
                end.transport = end.writer.transport
            else:
                protocol = end.transport.get_protocol()
                upgraded = await self.loop.start_tls(
                    end.transport, protocol, context, **options
                )
                end.transport = upgraded
        except (OSError, asyncio.CancelledError) as error:
            end.log.append(f"start_tls: {name_of(error)}")
            end.transport.abort()

    async def all_delivered(self) -> None:
        while not self.is_over():
            for end in self.ends:
                if end.reader is None:
                    end.resume()
                elif end.unread:
                    data = await end.reader.read(1 << 20)
                    end.count_read += len(data)
            one, other = self.ends
            came = (one.count, other.count) == (other.written, one.written)
            if came and not (one.unread or other.unread):
                return
            await asyncio.sleep(0)

    def is_over(self) -> bool:
        return any(end.transport.is_closing() for end in self.ends)

    # The end of a program

    async def finish(self) -> None:
        """End the connection, and wait until both have been told."""
        for end in self.ends:
            end.hooks.clear()
            if end.reading is not None:
                end.reading.cancel()
        await self.finish_tasks()
        finish = self.program.finish
        if self.is_clean() and finish in {"eof", "half"}:
            await self.finish_in_order()
        else:
            for end in self.ends[: 1 if finish == "half" else 2]:
                self.end(end, "abort" if finish == "abort" else "close")
        if self.program.calm:
            await self.settle()
        while not all(end.lost.is_set() for end in self.ends):
            await self.flow()
            if any(end.lost.is_set() for end in self.ends):
                for end in self.ends:
                    self.end(end, "close")
            await self.untangle()
            await asyncio.sleep(0)
        while self.tasks:
            await asyncio.wait(set(self.tasks))

    async def finish_tasks(self) -> None:
        """Wait until nobody reads or sends a file any more."""
        turns = 0
        while self.upgrading or any(e.reading or e.sending for e in self.ends):
            self.let_flow()
            turns += 1
            if turns % 500 == 0:
                await self.untangle(always=True)  # nobody reads who sends a file
            for end in self.ends:
                if end.sending and end.lost.is_set() and self.stage.carrier == "tcp":
                    end.sending.cancel()  # asyncio's own never ends
            await asyncio.sleep(0)
        if self.program.calm:
            await self.settle()

    async def untangle(self, *, always: bool = False) -> None:
        """Abort where two closed ends wait for each other, as over TCP for ever."""
        if always or all(end.transport.is_closing() for end in self.ends):
            before = [end.state() for end in self.ends]
            for _ in range(50):
                await asyncio.sleep(0)
            if before == [end.state() for end in self.ends]:
                for end in self.ends:
                    self.end(end, "abort")

    def is_clean(self) -> bool:
        """Tell whether every byte that was written has to arrive."""
        return not self.ended_early and not any(
            end.no_more or end.lost.is_set() or end.transport.is_closing()
            or end.errors for end in self.ends
        )  # fmt: skip

    async def finish_in_order(self) -> None:
        """Let every byte arrive, and the ends of file, and close then."""
        one, other = self.ends
        with_eof = self.program.finish == "eof" and not self.is_tls
        if with_eof:
            for end in self.ends:
                end.keep_open = True
                end.call("write_eof")
        while not self.has_all_come(with_eof=with_eof):
            self.let_flow()
            if self.is_over() and (one.lost.is_set() or other.lost.is_set()):
                break
            await asyncio.sleep(0)
        if self.program.calm:
            await self.settle()
        for end, peer in ((one, other), (other, one)):
            if end.count != peer.written:
                end.errors.append(f"{end.count} of {peer.written} bytes arrived")
        for end in self.ends:
            self.end(end, "close")

    def has_all_come(self, *, with_eof: bool) -> bool:
        one, other = self.ends
        if with_eof and not all("eof_received" in end.log for end in self.ends):
            return False
        return (one.count, other.count) == (other.written, one.written)

    async def flow(self) -> None:
        """Let both read; a calm program everything that comes."""
        before: Any = None
        self.let_flow()
        while self.program.calm:
            await self.settle()
            now = [end.state() for end in self.ends]
            if now == before:
                return
            before = now
            self.let_flow()

    def let_flow(self) -> None:
        if self.upgrading:
            return
        for end in self.ends:
            if end.lost.is_set():
                continue
            if end.reader is None:
                if end.sending is None and not self.upgrading:
                    end.resume()
            elif end.unread and end.reading is None and not end.reader.exception():
                self.begin_read(end, "read", 1 << 20)

    def problems(self) -> list[str]:
        """Give what must not be, and was."""
        found = []
        for end, peer in (self.ends, self.ends[::-1]):
            found += [f"end {end.index}: {error}" for error in end.errors]
            if end.count > peer.written:
                found.append(f"end {end.index} got more than was written")
            if end.reader is not None and end.count_read > end.count:
                found.append(f"end {end.index} read more than came")
            lost = [e for e in end.log if e.startswith("connection_lost")]
            if len(lost) != 1:
                found.append(f"end {end.index} was told {lost}")
        return found


def _unread_in(reader: Any) -> int:
    return len(reader._buffer)


class Stage:
    """A loop with a listener, on which programs are played one after the other.

    Args:
        carrier: "smcr" or "tcp".
        rmbe_bytes: Of each end, over SMC-R.
        authority: Gives certificates; None for no TLS.
    """

    def __init__(
        self, carrier: str, rmbe_bytes: int = 16384, authority: Authority | None = None,
        *, debug: bool = False,
    ) -> None:  # fmt: skip
        self.carrier = carrier
        self.authority = authority
        if authority is not None:
            self.contexts = (authority.client_context(), authority.server_context())
        self.told: list[str] = []
        self.next_end: Any = None
        self.loop: Any = asyncio.SelectorEventLoop()
        if carrier == "smcr":
            self.loop.close()
            config = pysmc.Config(rmbe_bytes=rmbe_bytes, sndbuf_bytes=rmbe_bytes)
            self.loop = pysmc.new_event_loop(config)
        self.loop.set_debug(debug)
        self.loop.slow_callback_duration = 60
        self.loop.set_exception_handler(self._hear)
        self.files: list[Any] = []
        for pattern in PATTERNS:
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # see close
            file.write(pattern)
            self.files.append(file)
        serving = self.loop.create_server(
            lambda: self.next_end.make_protocol(), HOST, 0
        )
        self.server = self.loop.run_until_complete(serving)
        self.port = self.server.sockets[0].getsockname()[1]

    def _hear(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        text = re.sub(r" at 0x.*| <.*", "", context["message"])
        self.told.append(f"{text[:60]}: {error!r}")

    def check_carrier(self, transport: Any) -> None:
        info = transport.get_extra_info("smc")
        assert ("tcp" if info is None else info.mode) == self.carrier, info

    def play(self, program: Program) -> Play:
        """Play a program to its end."""
        self.told.clear()
        before = _descriptors()
        play: Play = self.loop.run_until_complete(self._play(program))
        self.loop.run_until_complete(asyncio.sleep(0))
        after = _descriptors()
        play.found = play.problems()
        play.found += [
            told
            for told in self.told
            if "OfProgramError" not in told
            and not (self.carrier == "tcp" and "_call_connect" in told)
        ]
        if after > before:
            play.found.append(f"{after - before} descriptors more")
        return play

    async def _play(self, program: Program) -> Play:
        play = Play(self, program)
        try:
            await play.run()
        except Exception as error:  # noqa: BLE001
            for end in play.ends:
                end.errors.append(f"{error!r} after {end.log[-8:]}: {end.transport!r}")
                with contextlib.suppress(Exception):
                    end.transport.abort()
            for task in list(play.tasks):
                task.cancel()
            await asyncio.sleep(0.05)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            _, left = await asyncio.wait(left, timeout=2)
        for task in left:
            play.ends[0].errors.append(f"task left {task!r}")
            task.cancel()
        return play

    def close(self) -> None:
        self.server.close()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        for file in self.files:
            file.close()


def _descriptors() -> int:
    wait_closed(5)
    return len(os.listdir("/proc/self/fd"))
