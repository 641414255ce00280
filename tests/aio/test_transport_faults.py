"""Protocols that raise, change their minds or give wrong buffers, over TCP and SMC-R.

TCP is the oracle, as in `test_transport_contract`.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import sys
import warnings
from typing import Any

import pytest

from pysmc.aio.transport_end import LooseHandle
from pysmc.errors import ConnectionReset
from tests.aio.test_transport_contract import CONFIGS, compare, settle, told

FAULTS: dict[str, type[BaseException]] = {
    "an error": ZeroDivisionError,
    "an OSError": ConnectionRefusedError,
    "a cancellation": asyncio.CancelledError,
    "a TimeoutError": TimeoutError,
}
METHODS = (
    "connection_made",
    "data_received",
    "eof_received",
    "connection_lost",
    "pause_writing",
    "resume_writing",
)


class IntoBuffer(asyncio.BufferedProtocol):
    """A buffered protocol that notes what it is asked, and does what it is told."""

    def __init__(self, recorder: Any, buffer: Any) -> None:
        self.recorder, self.buffer = recorder, buffer
        self.fault: tuple[str, Any] = ("", None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.recorder.connection_made(transport)

    def get_buffer(self, sizehint: int) -> Any:
        self.recorder._note(f"get_buffer({sizehint})")
        self._fail("get_buffer")
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.recorder.data += memoryview(self.buffer).cast("B")[:nbytes]
        self._fail("buffer_updated")

    def eof_received(self) -> Any:
        self._fail("eof_received")
        return self.recorder.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.recorder.connection_lost(exc)

    def _fail(self, method: str) -> None:
        if self.fault[0] == method:
            fault, self.fault = self.fault[1], ("", None)
            if isinstance(fault, str):
                getattr(self.recorder.transport, fault)()
            else:
                raise fault


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_raises(kit, method, fault) -> None:
    async def scenario(kit: Any, mode: str) -> Any:
        class Broken(kit.Recorder):
            pass

        def fail(self: Any, *args: Any) -> Any:
            getattr(kit.Recorder, method)(self, *args)
            raise FAULTS[fault]("on purpose")

        setattr(Broken, method, fail)
        async with kit.connected(Broken, lambda: kit.Recorder(pause=True)) as ends:
            assert ends.server.transport.get_extra_info("smc").mode == mode
            ends.server.transport.write(b"data")
            ends.server.transport.write_eof()
            ends.client.transport.write(bytes(8 << 20))
            await settle()
            ends.server.transport.resume_reading()
            await ends.server.until_call("lost")
            await settle()
            ends.client.transport.close()
            await ends.client.until_call("lost")
            return told(ends.client)

    compare(kit, scenario)


BUFFERS: dict[str, Any] = {
    "small": lambda: bytearray(1000),
    "large": lambda: bytearray(1 << 20),
    "a view": lambda: memoryview(bytearray(1000))[10:],
    "a view of ints": lambda: memoryview(bytearray(1000)).cast("I"),
    "empty": bytearray,
    "read-only": lambda: bytes(1000),
    "None": lambda: None,
    "a number": lambda: 7,
    "a list": lambda: [0] * 10,
    "every second byte": lambda: memoryview(bytearray(1000))[::2],
}


@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_buffer(kit, buffer) -> None:
    async def scenario(kit: Any, mode: str) -> Any:
        recorder = kit.Recorder()
        protocol = IntoBuffer(recorder, BUFFERS[buffer]())
        async with kit.connected(server=lambda: protocol) as ends:
            ends.client.transport.write(b"0123456789" * 40)
            await settle()
            ends.client.transport.close()
            await recorder.until_call("lost")
            await settle()
            calls, *rest = told(recorder)
            # An end of file is a read of its own over TCP.
            return [call for call in calls if "get" not in call], rest, recorder.data

    compare(kit, scenario)


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        *itertools.product(
            ["buffer_updated", "eof_received"],
            ["raise", "close", "abort", "pause_reading"],
        ),
        # After close() in get_buffer asyncio still reads, from a socket that closes in
        # the next turn of the loop; our memory has been given back by then.
        ("get_buffer", "raise"),
        ("get_buffer", "pause_reading"),
    ],
)
def test_a_method_of_a_buffered_protocol_that(kit, method, fault) -> None:
    async def scenario(kit: Any, mode: str) -> Any:
        recorder = kit.Recorder()
        protocol = IntoBuffer(recorder, bytearray(1000))
        async with kit.connected(server=lambda: protocol) as ends:
            await settle()
            protocol.fault = (
                method,
                ZeroDivisionError() if fault == "raise" else fault,
            )
            ends.client.transport.write(b"0123456789" * 40)
            await settle()
            ends.client.transport.close()
            await settle()
            if fault == "pause_reading":
                recorder.transport.resume_reading()
            await recorder.until_call("lost")
            await settle()
            calls, *rest = told(recorder)
            return (
                [call for call in calls if "get" not in call],
                rest,
                told(ends.client),
            )

    compare(kit, scenario)


def test_a_large_buffer_is_filled_by_several_slices(kit) -> None:
    """Over SMC-R only: the kernel would give as much at once too."""
    amounts: list[int] = []

    async def scenario() -> None:
        recorder = kit.Recorder(pause=True)
        protocol = IntoBuffer(recorder, bytearray(1 << 20))
        setattr(protocol, "buffer_updated", amounts.append)  # noqa: B010
        async with kit.connected(server=lambda: protocol) as ends:
            ends.client.transport.write(bytes(400_000))
            await settle()
            recorder.transport.resume_reading()
            await settle()
        assert amounts[0] > 2 * 65_536
        assert sum(amounts) == 400_000

    kit.run(scenario)


@pytest.mark.parametrize("first", ["data", "buffer"])
def test_another_protocol_in_the_middle(kit, first) -> None:
    async def scenario(kit: Any, mode: str) -> Any:
        recorders = [kit.Recorder(), kit.Recorder()]
        plain, buffered = recorders[0], IntoBuffer(recorders[1], bytearray(100))
        order: list[Any] = [plain, buffered]
        if first == "buffer":
            order.reverse()
        recorders[1].transport = recorders[0].transport = None

        async with kit.connected(server=lambda: order[0]) as ends:
            await settle()
            server = plain.transport or recorders[1].transport
            for turn in range(4):
                ends.client.transport.write(b"part %d" % turn)
                await settle()
                server.set_protocol(order[(turn + 1) % 2])
            ends.client.transport.close()
            await settle()
            assert server.is_closing()
            return [(told(one)[1:], bytes(one.data)) for one in recorders]

    compare(kit, scenario)


def test_warnings_after_five_lost_writes(kit, caplog) -> None:
    async def scenario(kit: Any, mode: str) -> Any:
        caplog.clear()
        async with kit.connected() as ends:
            ends.client.transport.abort()
            counts = []
            for _ in range(8):
                ends.client.transport.write(b"x")
                counts.append(len(caplog.records))
            levels = {record.levelno for record in caplog.records}
            names = {record.name for record in caplog.records}
            await ends.client.until_call("lost")
            return counts, levels, names

    answer, _ = compare(kit, scenario)
    assert answer[1:] == ({logging.WARNING}, {"asyncio"})


def test_what_debug_mode_logs(kit, caplog) -> None:
    async def scenario(kit: Any, mode: str) -> Any:
        asyncio.get_running_loop().set_debug(True)

        class Refusing(kit.Recorder):
            def data_received(self, data: bytes) -> None:
                raise ConnectionRefusedError("on purpose")

        async with kit.connected(Refusing) as ends:
            server = ends.server.transport
            caplog.clear()
            with caplog.at_level(logging.DEBUG, "asyncio"):
                server.pause_reading()
                server.pause_reading()
                server.resume_reading()
                server.resume_reading()
                server.write(b"x")
                await ends.client.until_call("lost")
                await ends.server.until_call("lost")
                await settle()
            texts = [record.getMessage() for record in caplog.records]
            return [text.rsplit(">", 1)[-1] for text in texts if "ransport " in text]

    answer, _ = compare(kit, scenario)
    assert " pauses reading" in answer


@pytest.mark.parametrize("mode", CONFIGS)
def test_a_transport_that_is_forgotten_says_where_it_was_made(kit, mode) -> None:
    async def scenario() -> None:
        async with kit.serving(kit.Recorder) as port:
            loop = asyncio.get_running_loop()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                transport, _ = await loop.create_connection(
                    asyncio.Protocol, kit.host, port
                )
                assert transport.get_extra_info("smc").mode == mode
                transport.pause_reading()
                kind = type(transport)
                del transport, _
                gc.collect()
                await settle()
            texts = [one for one in caught if "unclosed transport" in str(one.message)]
            assert [type(one.source) for one in texts] == [kind]

    kit.run(scenario, config=CONFIGS[mode])


@pytest.mark.parametrize("mode", CONFIGS)
def test_a_forgotten_transport_ends_also_where_warnings_are_errors(
    kit, mode, monkeypatch
) -> None:
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: ignored.append(one.exc_type))

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        accepted = kit.Recorder()
        async with kit.serving(lambda: accepted) as port:
            transport, _ = await loop.create_connection(
                asyncio.Protocol, kit.host, port
            )
            assert transport.get_extra_info("smc").mode == mode
            transport.pause_reading()
            with warnings.catch_warnings():
                warnings.simplefilter("error", ResourceWarning)
                del transport, _
                gc.collect()
            await accepted.until_call("lost")
            assert accepted.error is None

    kit.run(scenario, config=CONFIGS[mode])
    assert set(ignored) == {ResourceWarning}


def test_a_transport_that_reads_is_not_forgotten(kit) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            loop = asyncio.get_running_loop()
            made = []

            class Loner(asyncio.Protocol):
                def data_received(self, data: bytes) -> None:
                    made.append(data)

            async with kit.serving(kit.Recorder) as port:
                await loop.create_connection(Loner, kit.host, port)
                gc.collect()
                await settle()
                (other,) = [
                    t
                    for t in loop.driver.transports
                    if t not in ends.transports
                    and isinstance(t._protocol, kit.Recorder)
                ]
                other.write(b"still there")
                await settle()
                assert made == [b"still there"]
                other.close()
                await settle()

    kit.run(scenario)


@pytest.mark.parametrize("unread", [False, True])
def test_a_process_that_ends_closes_what_it_left_open(kit, unread) -> None:
    program = """
        import asyncio, pysmc, sys

        async def main():
            reader, writer = await asyncio.open_connection("127.0.0.1", sys.argv[1])
            if sys.argv[2] == "True":
                writer.transport.pause_reading()
            writer.write(b"here")
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
            sys.exit()

        loop = pysmc.new_event_loop()
        loop.run_until_complete(main())
    """

    async def scenario() -> None:
        recorder = kit.Recorder()
        async with kit.serving(lambda: recorder) as port:
            child = kit.spawn(program, port, unread)
            await recorder.until_bytes(4)
            assert recorder.info_when_made.mode == "smcr"
            recorder.transport.write(b"perhaps unread")
            await settle()
            child.stdin.write("go\n")
            child.stdin.flush()
            await recorder.until_call("lost")
            expected = ConnectionReset if unread else type(None)
            assert type(recorder.error) is expected
            assert ("eof" in recorder.calls) is not unread

    kit.run(scenario)


def test_news_for_a_transport_that_is_gone_reaches_nobody() -> None:
    class Transport:
        def __init__(self) -> None:
            self.told: list[object] = []

        def receive_news(self, news: int) -> None:
            self.told.append(news)

        def salvage(self) -> None:
            self.told.append("salvage")

        def lose(self, error: object) -> None:
            self.told.append(error)

        end_of_tcp = lose

    transport = Transport()
    told, handle, error = transport.told, LooseHandle(transport), ConnectionReset("")
    for expected in ([1, "salvage", error, error], []):
        handle.receive_news(1)
        handle.salvage()
        handle.lose(error)
        handle.end_of_tcp(error)
        assert told == expected
        told.clear()
        transport = Transport()  # the first one is gone
