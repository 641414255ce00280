"""An end notes everything that an application is told wrongly."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pysmc.testing.simulation.stream import Flows
from pysmc.testing.simulation.talk import BufferTalk, End, ProtocolTalk, StreamTalk


class Transport:
    """As much of a transport as an end asks for."""

    def __init__(self, mode: str = "smcr") -> None:
        self.mode = mode
        self.did: list[str] = []

    def get_extra_info(self, name: str) -> Any:
        return type("Info", (), {"mode": self.mode}) if name == "smc" else None

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.did.append(name)


def ends() -> tuple[End, End]:
    flows = Flows("run")
    notes: list[str] = []
    near, far = (End(name, flows.new(name), flows, notes.append) for name in "ab")
    near.join(far)
    far.join(near)
    return near, far


def told(end: End) -> str:
    return "\n".join(end.violations)


def connected(mode: str = "smcr") -> tuple[End, End]:
    near, far = ends()
    near.note_made(Transport(mode))
    far.note_made(Transport(mode))
    return near, far


def test_right_bytes_and_an_honest_end_are_right() -> None:
    near, far = connected()
    near.note_data(far.flow.take(10))
    far.has_finished = True
    near.note_eof()
    assert near.is_complete
    near.has_closed = True
    near.note_lost(None)
    near.expects_nothing()
    assert near.violations == []


def test_wrong_bytes_are_blamed() -> None:
    near, far = connected()
    near.note_data(far.flow.take(10)[1:])
    assert "at byte 0 came byte 1 of the same flow, too early" in told(near)
    near.note_data(b"")
    assert "no bytes were delivered" in told(near)


def test_an_end_that_nobody_meant_is_blamed() -> None:
    near, far = connected()
    near.note_eof()
    assert "nobody had finished" in told(near)
    near, far = connected()
    near.note_data(far.flow.take(10))
    far.flow.take(5)
    far.has_finished = True
    near.note_eof()
    assert "an end of file came at 10 of 15 bytes" in told(near)
    near.note_eof()
    assert "outside of the connection's life" in told(near)


@pytest.mark.parametrize(("mode", "is_right"), [("tcp", True), ("smcr", False)])
def test_only_tcp_tells_an_abort_as_an_end(mode: str, is_right: bool) -> None:
    near, far = connected(mode)
    far.flow.take(5)
    far.has_finished = far.has_aborted = True
    near.note_eof()
    assert (near.violations == []) is is_right


def test_the_order_of_callbacks_is_watched() -> None:
    near, far = ends()
    near.note_data(far.flow.take(1))
    assert "outside" in told(near)
    near, far = connected()
    near.note_made(Transport())
    assert "connection_made came 2 times" in told(near)
    near, far = connected()
    near.expects_nothing()
    assert "connection_lost never came" in told(near)
    near.note_lost(None)
    assert "without an error or a close" in told(near)
    near.note_lost(OSError())
    assert "connection_lost came 2 times" in told(near)
    near, far = connected()
    near.note_lost(ValueError("x"))
    assert "which is no OSError" in told(near)
    assert isinstance(near.error, ValueError)
    del far


def test_who_pauses_twice_is_blamed() -> None:
    loop = asyncio.new_event_loop()
    talk = ProtocolTalk(ends()[0], loop)
    talk.resume_writing()
    talk.pause_writing()
    talk.pause_writing()
    assert "resume_writing came without a pause" in told(talk.end)
    assert "pause_writing came twice" in told(talk.end)
    loop.close()


async def test_a_protocol_reads_as_a_program_does() -> None:
    near, far = ends()
    talk, transport = ProtocolTalk(near, asyncio.get_running_loop()), Transport()
    talk.connection_made(transport)
    task = asyncio.ensure_future(talk.read(100))
    await asyncio.sleep(0)
    talk.data_received(far.flow.take(9000))
    assert await task == 100
    assert transport.did == ["pause_reading"]
    while near.receiver is not None and talk._arrived:
        await talk.read(3000)
    assert transport.did == ["pause_reading", "resume_reading"]
    talk.pause_writing()
    waits = asyncio.ensure_future(talk.drain())
    await asyncio.sleep(0)
    assert not waits.done()
    talk.connection_lost(ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        await waits
    with pytest.raises(ConnectionResetError):
        await talk.read(1)
    await talk.wait_lost()


async def test_every_kind_of_program_ends_alike() -> None:
    loop = asyncio.get_running_loop()
    for make in (ProtocolTalk, BufferTalk, StreamTalk):
        near, far = ends()
        talk: Any = make(near, loop)
        protocol = talk.protocol if make is StreamTalk else talk
        transport = Transport()
        protocol.connection_made(transport)
        if make is StreamTalk:
            talk.attach(transport)
        data = far.flow.take(50)
        if make is BufferTalk:
            protocol.get_buffer(-1)[:50] = data
            protocol.buffer_updated(50)
        else:
            protocol.data_received(data)
        assert await talk.read(100) == 50
        far.has_finished = True
        assert protocol.eof_received()
        assert await talk.read(100) == 0
        talk.write(10)
        await talk.drain()
        talk.write_eof()
        talk.close()
        protocol.connection_lost(None)
        await talk.wait_lost()
        assert near.violations == []
        assert near.is_complete
        assert (near.has_finished, near.has_closed) == (True, True)
        assert near.flow.position == 10


def test_a_program_that_never_began_is_aborted() -> None:
    near, _ = connected()
    loop = asyncio.new_event_loop()
    talk = ProtocolTalk(near, loop)
    talk.transport = Transport()
    task = loop.create_task(talk.wait_lost())
    task.cancel()
    loop.run_until_complete(asyncio.wait([task]))
    near.leave(task)
    assert talk.transport.did == ["abort"]
    assert near.is_done
    assert near.has_aborted
    loop.close()
