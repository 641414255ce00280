"""One end of a random program: its protocol, and whether what it was told may be."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pysmc
from tests.aio.close_matrix_player import name_of
from tests.aio.random_programs import BLOCKING_BYTES, MOST_BYTES, PATTERNS, Step

if TYPE_CHECKING:
    from tests.aio.random_player import Play


class OfProgramError(Exception):
    """Raised by a program's callback."""


# The protocols


class _Notes:
    """Tells an end what its transport calls; a mixin."""

    end: End

    def connection_made(self, transport: Any) -> None:
        self.end.transport = transport
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().connection_made(transport)
        self.end.note("connection_made")

    def eof_received(self) -> bool | None:
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().eof_received()
        self.end.note("eof_received")
        return self.end.keep_open

    def connection_lost(self, exc: BaseException | None) -> None:
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().connection_lost(exc)
        self.end.lost.set()
        self.end.note("connection_lost", f"({name_of(exc)})")

    def pause_writing(self) -> None:
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().pause_writing()
        self.end.note("pause_writing")

    def resume_writing(self) -> None:
        if isinstance(self, asyncio.StreamReaderProtocol):
            super().resume_writing()
        self.end.note("resume_writing")


class _Plain(_Notes, asyncio.Protocol):
    def __init__(self, end: End) -> None:
        self.end = end

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.end.take(data)


class _Buffered(_Notes, asyncio.BufferedProtocol):
    def __init__(self, end: End) -> None:
        self.end = end
        self.room = bytearray(end.room)

    def get_buffer(self, sizehint: int) -> memoryview:
        self.end.run_hook("get_buffer")
        return memoryview(self.room)

    def buffer_updated(self, nbytes: int) -> None:
        self.end.take(bytes(self.room[:nbytes]), "buffer_updated")


class _Stream(_Notes, asyncio.StreamReaderProtocol):
    def __init__(self, end: End, own: bool) -> None:
        self.end = end
        kind = pysmc.StreamReader if own else asyncio.StreamReader
        end.reader = kind(loop=end.loop)
        super().__init__(end.reader, loop=end.loop)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.end.take(data)


class End:
    """One end, and what it was told."""

    def __init__(self, play: Play, index: int) -> None:
        program = play.program
        self.play, self.index, self.loop = play, index, play.loop
        self.kind = program.kinds[index]
        self.keep_open = program.keep_open[index]
        self.room = program.rooms[index]
        self.out, self.into = PATTERNS[index], PATTERNS[1 - index]
        self.written = 0
        self.count = 0  # delivered to the protocol
        self.count_read = 0  # out of the stream's reader
        self.log: list[str] = []
        self.errors: list[str] = []
        self.hooks: dict[str, Step] = {}
        self.lost = asyncio.Event()
        self.transport: Any = None
        self.reader: Any = None
        self.writer: Any = None
        self.reading: asyncio.Task[Any] | None = None
        self.sending: asyncio.Task[Any] | None = None
        self.no_more = False  # a part of what it wrote may be missing
        self.lossy = False  # the peer may be told of a loss that TCP would hide

    def make_protocol(self, kind: str = "") -> Any:
        match kind or self.kind:
            case "protocol":
                return _Plain(self)
            case "buffered":
                return _Buffered(self)
        return _Stream(self, self.kind == "streams")

    # What the transport tells

    def note(self, call: str, detail: str = "") -> None:
        entry = call + detail
        self.expect_order(call)
        if entry != "data" or self.log[-1:] != ["data"]:
            self.log.append(entry)
        self.run_hook(call)

    def expect_order(self, call: str) -> None:
        made = "connection_made" in self.log
        over = any(entry.startswith("connection_lost") for entry in self.log)
        if call == "connection_made":
            ok = not self.log
        elif call == "data":
            last = [e for e in self.log if e in {"eof_received", "resume"}][-1:]
            ok = made and not over and last != ["eof_received"]
        elif call == "connection_lost":
            ok = made and not over
        elif call == "pause_writing":
            ok = made and not over and not self.is_paused()
        elif call == "resume_writing":
            ok = made and not over and self.is_paused()
        else:
            ok = made and not over
        if not ok:
            self.errors.append(f"{call} after {self.log[-4:]}")

    def is_paused(self) -> bool:
        last = [e for e in self.log if e in {"pause_writing", "resume_writing"}][-1:]
        return last == ["pause_writing"]

    def take(self, data: bytes, call: str = "data_received") -> None:
        if not data:
            self.errors.append(f"{call} without bytes")
        if data != self.into[self.count : self.count + len(data)]:
            self.errors.append(f"wrong bytes at {self.count}")
        self.count += len(data)
        self.expect_order("data")
        if self.log[-1:] != ["data"]:
            self.log.append("data")
        self.run_hook(call)

    def run_hook(self, call: str) -> None:
        step = self.hooks.pop(call, None)
        if step is None:
            return
        if step == ("raise",):
            if self.waiting():
                self.lossy = True
            self.no_more = True
            message = "of a program"
            raise OfProgramError(message)
        self.play.do_simple(step)

    # What the program does

    def write(self, size: int, kind: str) -> None:
        data = self.next_bytes(size)
        if data is None:
            return
        given = {"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview}
        buffer = given[kind](data)
        self.call("write", buffer)
        if kind == "bytearray" and self.play.stage.carrier == "smcr":
            buffer[:] = bytes(len(buffer))  # not kept by reference, as from 3.12 by TCP

    def next_bytes(self, size: int) -> bytes | None:
        if self.sending is not None or self.play.upgrading:
            return None
        if self.written + size > MOST_BYTES:
            return None
        data = self.out[self.written : self.written + size]
        self.written += size
        return data

    def writelines(self, sizes: tuple[int, ...]) -> None:
        pieces = [p for p in map(self.next_bytes, sizes) if p is not None]
        if len(pieces) == len(sizes):
            self.call("writelines", pieces)

    def call(self, method: str, *args: Any) -> None:
        try:
            getattr(self.writer or self.transport, method)(*args)
        except (AttributeError, TypeError):
            if not self.lost.is_set():  # what is told after the end is no contract
                raise
        except (OSError, RuntimeError, NotImplementedError) as error:
            if method in {"write", "writelines"}:
                self.no_more = True
            self.log.append(f"{method}: {name_of(error)}")

    def resume(self) -> None:
        if not self.transport.is_reading():
            self.log.append("resume")
        self.transport.resume_reading()

    @property
    def unread(self) -> int:
        return self.count - self.count_read if self.reader is not None else 0

    def waiting(self) -> int:
        """Tell how many bytes wait; asyncio's TLS cannot tell after its end."""
        try:
            return int(self.transport.get_write_buffer_size())
        except (AttributeError, TypeError):
            return -1

    def story(self) -> list[str]:
        """Give what it was told, as far as that does not depend on sizes of buffers."""
        story: list[str] = []
        big = any(BLOCKING_BYTES in step for step in self.play.program.steps)
        skipped = {"resume"} | ({"pause_writing", "resume_writing"} if big else set())
        for entry in self.log:
            again = entry == "data" and story[-1:] == ["data"]
            if entry not in skipped and not again:
                story.append(entry)
        return story

    def state(self) -> tuple[Any, ...]:
        size = self.waiting()
        return (len(self.log), self.count, self.count_read, size)
