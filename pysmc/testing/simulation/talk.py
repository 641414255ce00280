"""How the programs of a swarm hold a connection: as a protocol, a buffer or a stream.

Every end of a connection is an `End`: it writes the bytes of its own flow, compares
what arrives with the flow of the other end, and notes each thing that an application is
told. What it is told wrongly it notes as a violation:

* P-A: what arrives is a prefix of what the other end wrote, in order, each byte once.
* P-B: an end of file comes only behind the last byte of an end that has finished.
* One connection_made, then one connection_lost, and nothing before or after them; an
  error of the connection is an OSError, and no error means that this end has closed.

Decides nothing about what is written when; that is `pysmc.testing.simulation.workload`.

Source: the asyncio documentation, "Transports and Protocols".
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from pysmc.testing.simulation.stream import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.testing.simulation.stream import Flow, Flows

__all__ = ["APIS", "BufferTalk", "End", "ProtocolTalk", "StreamTalk", "Talk", "pause"]

BACKLOG_BYTES = 4096
"""Unread bytes from which on a protocol pauses its transport."""


class End:
    """One end of a connection: what it wrote and said, and what it was told.

    Args:
        name: For people.
        flow: What it writes.
        flows: Where wrong bytes are looked for.
        note: Takes a line of the trace.
    """

    def __init__(
        self, name: str, flow: Flow, flows: Flows, note: Callable[[str], None]
    ) -> None:
        self.name = name
        self._note = note
        self.flow = flow
        self.receiver: Receiver | None = None
        self.peer: End | None = None
        self._flows = flows
        self.violations: list[str] = []
        self.made = 0
        self.lost = 0
        self.error: BaseException | None = None
        """What ended it, where it was an error."""
        self.mode = ""
        """"smcr" or "tcp" once there is a transport."""
        self.has_finished = False
        """Whether it said that it writes no more, in any way."""
        self.has_aborted = False
        """Whether it ended without waiting for what it wrote."""
        self.has_closed = False
        """Whether it closed or aborted."""
        self.got_eof = False
        self.is_dead = False
        """Whether its process is gone: it is told nothing, and has told nothing."""
        self.is_timed_out = False
        """Whether the program's own patience was over."""
        self.is_done = False
        """Whether its program has ended."""
        self.talk: Talk | None = None
        """What its program holds, once there is a connection."""

    def join(self, peer: End) -> None:
        """Learn what is to arrive."""
        self.peer = peer
        self.receiver = Receiver(peer.flow, self._flows)

    @property
    def is_complete(self) -> bool:
        """Whether everything that the other end wrote has arrived, and its end."""
        assert self.peer is not None
        assert self.receiver is not None
        return self.got_eof and self.receiver.position == self.peer.flow.position

    @property
    def is_over(self) -> bool:
        """Whether its program has ended, and was told that its connection has."""
        return self.is_dead or (self.is_done and self.lost >= self.made)

    def note(self, text: str) -> None:
        """Write down what it does or is told."""
        self._note(f"{self.name}: {text}")

    def blame(self, text: str) -> None:
        """Note a violation."""
        self.violations.append(f"{self.name}: {text}")
        self.note(f"violation: {text}")

    def note_made(self, transport: Any) -> None:
        """There is a transport."""
        self.made += 1
        info = transport.get_extra_info("smc")
        self.mode = "tcp" if info is None else info.mode
        self.note(f"is connected over {self.mode}")
        if self.made > 1 or self.lost:
            self.blame(f"connection_made came {self.made} times")

    def note_data(self, data: bytes) -> None:
        """Bytes arrived."""
        self.note(f"got {len(data)} bytes")
        assert self.receiver is not None
        if not data:
            self.blame("no bytes were delivered as data")
        if self.lost or self.got_eof or not self.made:
            self.blame(f"{len(data)} bytes came outside of the connection's life")
        wrong = self.receiver.receive(data)
        if wrong is not None:
            self.blame(wrong)

    def note_eof(self) -> None:
        """The end of file arrived."""
        self.note("got the end of file")
        assert self.peer is not None
        assert self.receiver is not None
        if self.lost or self.got_eof or not self.made:
            self.blame("an end of file came outside of the connection's life")
        self.got_eof = True
        peer, came = self.peer, self.receiver.position
        # Plain TCP tells an abort, a killed process, and a server that did not take its
        # caller after all, as an end like any other.
        is_blunt = self.mode == "tcp" and (
            peer.has_aborted or peer.is_dead or not peer.made
        )
        if not (peer.has_finished or is_blunt):
            self.blame(f"an end of file came at {came}, and nobody had finished")
        elif came < peer.flow.position and not is_blunt:
            self.blame(f"an end of file came at {came} of {peer.flow.position} bytes")

    def note_lost(self, error: BaseException | None) -> None:
        """The connection is over."""
        self.note(f"lost its connection: {error!r}")
        self.lost += 1
        if self.lost > 1 or not self.made:
            self.blame(f"connection_lost came {self.lost} times")
        if error is None:
            if not self.has_closed:
                self.blame("the connection was lost without an error or a close")
            return
        if not isinstance(error, OSError):
            self.blame(f"it ended with {error!r}, which is no OSError")
        self.note_error(error)

    def note_error(self, error: BaseException) -> None:
        """Something was refused because the connection is over."""
        if self.error is None:
            self.error = error

    def leave(self, task: asyncio.Task[None]) -> None:
        """The program's task has ended; perhaps before its first step."""
        if task.cancelled() and self.talk is not None and not self.has_closed:
            self.talk.abort()
        self.is_done = True

    def expects_nothing(self) -> None:
        """Check at the end that nothing is owed.

        An application that had a transport has to be told of its end.
        """
        if self.made and not self.lost and not self.is_dead:
            self.blame("connection_lost never came")


class Talk:
    """What a program does with a connection; the same for every kind of protocol."""

    end: End
    transport: Any = None

    async def read(self, limit: int) -> int:
        """Wait for bytes; 0 is the end of file.

        Raises:
            OSError: The connection is lost.
        """
        raise NotImplementedError

    async def drain(self) -> None:
        """Wait until more should be written.

        Raises:
            OSError: The connection is lost.
        """
        raise NotImplementedError

    async def wait_lost(self) -> None:
        """Wait until connection_lost was called."""
        raise NotImplementedError

    def write(self, count: int) -> None:
        """Write the next bytes of the flow."""
        self.end.note(f"writes {count} bytes")
        self.transport.write(self.end.flow.take(count))

    def write_eof(self) -> None:
        """Finish writing.

        Raises:
            OSError: The connection is lost.
        """
        self.end.has_finished = True
        self.end.note("finishes")
        self.transport.write_eof()

    def close(self) -> None:
        """Close."""
        self.end.has_finished = self.end.has_closed = True
        self.end.note("closes")
        self.transport.close()

    def abort(self) -> None:
        """Abort."""
        end = self.end
        end.has_finished = end.has_closed = end.has_aborted = True
        end.note("aborts")
        self.transport.abort()


class _Waiting(Talk):
    """A protocol whose program waits for what it is told."""

    def __init__(self, end: End, loop: asyncio.AbstractEventLoop) -> None:
        self.end = end
        end.talk = self
        self._loop = loop
        self._arrived = 0
        self._is_held = False
        self._is_paused = False
        self._waiters: list[asyncio.Future[None]] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.end.note_made(transport)
        self._wake()

    def eof_received(self) -> bool:
        self.end.note_eof()
        self._wake()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.end.note_lost(exc)
        self._wake()

    def pause_writing(self) -> None:
        if self._is_paused:
            self.end.blame("pause_writing came twice")
        self._is_paused = True

    def resume_writing(self) -> None:
        if not self._is_paused:
            self.end.blame("resume_writing came without a pause")
        self._is_paused = False
        self._wake()

    def _arrive(self, count: int) -> None:
        self._arrived += count
        if self._arrived > BACKLOG_BYTES and not self._is_held:
            self._is_held = True
            self.transport.pause_reading()
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait(self) -> None:
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    async def read(self, limit: int) -> int:
        while not self._arrived:
            if self.end.lost:
                self._raise()
                return 0
            if self.end.got_eof:
                return 0
            await self._wait()
        count = min(limit, self._arrived)
        self._arrived -= count
        if self._is_held and not self._arrived:
            self._is_held = False
            self.transport.resume_reading()
        return count

    async def drain(self) -> None:
        while self._is_paused and not self.end.lost:
            await self._wait()
        if self.end.lost:
            self._raise()

    def _raise(self) -> None:
        if self.end.error is not None:
            raise self.end.error

    async def wait_lost(self) -> None:
        while not self.end.lost:
            await self._wait()


class ProtocolTalk(_Waiting, asyncio.Protocol):
    """A program that is given bytes."""

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        self.end.note_data(data)
        self._arrive(len(data))


class BufferTalk(_Waiting, asyncio.BufferedProtocol):
    """A program that gives the buffers."""

    def __init__(self, end: End, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(end, loop)
        self._buffer = bytearray(100)

    def get_buffer(self, sizehint: int) -> bytearray:
        """Give the buffer."""
        del sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what is in the buffer."""
        self.end.note_data(bytes(self._buffer[:nbytes]))
        self._arrive(nbytes)


class _NotingProtocol(asyncio.StreamReaderProtocol):
    """A stream's protocol that notes what it is told."""

    def __init__(
        self, end: End, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(reader, loop=loop)
        self._end = end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._end.note_made(transport)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._end.note_data(data)
        super().data_received(data)

    def eof_received(self) -> bool | None:
        self._end.note_eof()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.note_lost(exc)
        super().connection_lost(exc)


class _Writer(asyncio.StreamWriter):
    """A writer whose end the world notices, and not the garbage collector."""

    def __del__(self) -> None:
        """Close nothing: its process may be dead, and its loop with it."""


class StreamTalk(Talk):
    """A program on asyncio's streams."""

    def __init__(self, end: End, loop: asyncio.AbstractEventLoop) -> None:
        self.end = end
        end.talk = self
        self._loop = loop
        self._reader = asyncio.StreamReader(limit=BACKLOG_BYTES, loop=loop)
        self.protocol = _NotingProtocol(end, self._reader, loop)
        self._writer: Any = None

    def attach(self, transport: Any) -> None:
        """Hold the transport, once it was told to the protocol."""
        self.transport = transport
        self._writer = _Writer(transport, self.protocol, self._reader, self._loop)

    async def read(self, limit: int) -> int:
        """Wait for bytes; see `Talk.read`."""
        return len(await self._reader.read(limit))

    async def drain(self) -> None:
        """Wait for room; see `Talk.drain`."""
        await self._writer.drain()

    async def wait_lost(self) -> None:
        """Wait for the end; see `Talk.wait_lost`."""
        try:
            await self._writer.wait_closed()
        except OSError as error:
            self.end.note_error(error)


APIS: dict[str, Any] = {
    "protocol": ProtocolTalk,
    "buffer": BufferTalk,
    "stream": StreamTalk,
}
"""The kinds of programs."""


async def pause(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Do nothing for a time."""
    waiter = loop.create_future()
    timer = loop.call_later(seconds, _set, waiter)
    try:
        await waiter
    finally:
        timer.cancel()


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
