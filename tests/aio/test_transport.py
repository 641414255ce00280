"""The transport's contract, held to what asyncio's own transport does.

Tests with the fixture `mode` run over SMC-R and over TCP with the same expectations.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import random
import warnings

import pytest

from pysmc.config import Config

MIB = 1 << 20


class Echo(asyncio.Protocol):
    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


def test_echo_of_random_sizes(kit, config, mode) -> None:
    sizes = random.Random(1)
    messages = [os.urandom(sizes.choice([1, 64, 1000, 65536, 65537, 300_000]))
                for _ in range(60)]  # fmt: skip

    async def scenario() -> None:
        async with kit.serving(Echo) as port:
            reader, writer = await asyncio.open_connection(kit.host, port)
            assert writer.get_extra_info("smc").mode == mode
            for message in messages:
                writer.write(message)
                await writer.drain()
                assert await reader.readexactly(len(message)) == message
            writer.close()
            await writer.wait_closed()

    kit.run(scenario, config=config)


@pytest.mark.slow
def test_much_data_both_ways_at_once(kit, config) -> None:
    amount = 64 * MIB
    block = os.urandom(MIB)
    expected = hashlib.sha256(block * (amount // MIB)).digest()

    async def send(writer) -> None:
        for _ in range(amount // MIB):
            writer.write(block)
            await writer.drain()

    async def receive(reader) -> bytes:
        digest, left = hashlib.sha256(), amount
        while left:
            data = await reader.read(MIB)
            digest.update(data)
            left -= len(data)
        return digest.digest()

    async def scenario() -> None:
        served = asyncio.get_running_loop().create_future()

        async def serve(reader, writer) -> None:
            _, got = await asyncio.gather(send(writer), receive(reader))
            served.set_result(got)
            writer.close()

        server = await asyncio.start_server(serve, kit.host, 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection(kit.host, port)
        _, got = await asyncio.gather(send(writer), receive(reader))
        assert got == expected
        assert await served == expected
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    kit.run(scenario, config=config)


def test_half_close_of_the_client(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected(server=lambda: kit.Recorder(keep_open=True)) as ends:
            client, server = ends.transports
            assert client.can_write_eof()
            client.write(b"question")
            client.write_eof()
            client.write_eof()
            await ends.server.until_call("eof")
            assert ends.server.data == b"question"
            with pytest.raises(RuntimeError, match="write_eof"):
                client.write(b"more")
            server.write(b"answer")
            await ends.client.until_bytes(6)
            server.close()
            await ends.client.until_call("lost")
            await ends.server.until_call("lost")
            assert ends.client.calls == ["made", "data", "eof", "lost"]
            assert ends.client.error is None
            assert ends.server.error is None

    kit.run(scenario, config=config)


def test_half_close_of_the_server_after_much_data(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected(client=lambda: kit.Recorder(keep_open=True)) as ends:
            client, server = ends.transports
            server.write(bytes(2 * MIB))
            server.write_eof()  # waits for what waits
            await ends.client.until_call("eof")
            assert len(ends.client.data) == 2 * MIB
            client.write(b"thanks")
            await ends.server.until_bytes(6)

    kit.run(scenario, config=config)


def test_eof_without_keep_open_closes(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            ends.client.transport.write_eof()
            await ends.server.until_call("lost")
            await ends.client.until_call("lost")
            assert ends.server.calls == ["made", "eof", "lost"]
            assert ends.client.calls == ["made", "eof", "lost"]
            assert ends.client.error is ends.server.error is None

    kit.run(scenario, config=config)


def test_close_sends_what_waits(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            client, server = ends.transports
            data = os.urandom(8 * MIB)
            client.write(data)
            assert client.get_write_buffer_size() > 0
            client.close()
            client.close()
            assert client.is_closing()
            assert not client.is_reading()
            client.write(b"stock transports take this too")
            server.resume_reading()
            await ends.server.until_call("lost")
            await ends.client.until_call("lost")
            assert ends.server.data[: len(data)] == data
            assert ends.server.error is ends.client.error is None
            assert ends.client.calls.count("lost") == 1

    kit.run(scenario, config=config)


def test_close_with_unread_data_resets_the_peer(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            client, server = ends.transports
            client.write(b"x" * 1000)
            await asyncio.sleep(0.01)
            server.close()
            await ends.server.until_call("lost")
            assert ends.server.error is None
            await ends.client.until_call("lost")
            assert isinstance(ends.client.error, ConnectionResetError)

    kit.run(scenario, config=config)


def test_abort_with_nothing_lost_is_an_end_of_file(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            ends.client.transport.abort()
            ends.client.transport.abort()
            ends.client.transport.close()
            await ends.client.until_call("lost")
            await ends.server.until_call("lost")
            assert ends.client.calls == ["made", "lost"]
            assert ends.server.calls == ["made", "eof", "lost"]
            assert ends.client.error is ends.server.error is None

    kit.run(scenario, config=config)


def test_abort_that_loses_bytes_is_a_reset(kit) -> None:
    """Over TCP it is an end of file: here nobody takes a part for the whole."""

    async def scenario() -> None:
        async with kit.connected() as ends:
            ends.client.transport.write(bytes(8 * MIB))
            ends.client.transport.abort()
            await ends.server.until_call("lost")
            assert isinstance(ends.server.error, ConnectionResetError)
            assert "eof" not in ends.server.calls

    kit.run(scenario)


def test_slow_reader_stops_the_writer(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            client, server = ends.transports
            assert not server.is_reading()
            written = 0
            while "pause_writing" not in ends.client.calls:
                client.write(bytes(256 * 1024))
                written += 256 * 1024
                await asyncio.sleep(0)
            assert client.get_write_buffer_size() > 64 * 1024
            assert not ends.server.data
            server.resume_reading()
            server.resume_reading()
            assert server.is_reading()
            await ends.server.until_bytes(written)
            await ends.client.until_call("resume_writing")
            assert client.get_write_buffer_size() == 0

    kit.run(scenario, config=config)


def test_pausing_while_data_comes(kit, config) -> None:
    class OneAtATime(kit.Recorder):
        def data_received(self, data) -> None:
            super().data_received(data)
            self.transport.pause_reading()

    async def scenario() -> None:
        async with kit.connected(server=OneAtATime) as ends:
            client, server = ends.transports
            data = os.urandom(3 * MIB)
            client.write(data)
            client.write_eof()
            got = 0
            while got < len(data):
                await ends.server.until(lambda: len(ends.server.data) > got)  # noqa: B023
                got = len(ends.server.data)
                for _ in range(3):
                    await asyncio.sleep(0)
                assert len(ends.server.data) == got, "delivered while paused"
                assert "eof" not in ends.server.calls
                server.resume_reading()
            await ends.server.until_call("eof")
            assert ends.server.data == data

    kit.run(scenario, config=config)


class IntoBuffer(asyncio.BufferedProtocol):
    """Takes at most 1,000 bytes at a time."""

    def __init__(self, recorder) -> None:
        self.recorder = recorder
        self.buffer = bytearray(1000)

    def connection_made(self, transport) -> None:
        self.recorder.connection_made(transport)

    def get_buffer(self, sizehint):
        assert sizehint == -1
        return self.buffer

    def buffer_updated(self, nbytes) -> None:
        self.recorder.data_received(bytes(self.buffer[:nbytes]))

    def eof_received(self):
        return self.recorder.eof_received()

    def connection_lost(self, exc) -> None:
        self.recorder.connection_lost(exc)


def test_buffered_protocol(kit, config) -> None:
    async def scenario() -> None:
        recorder = kit.Recorder()
        async with kit.connected(server=lambda: IntoBuffer(recorder)) as ends:
            data = os.urandom(100_000)
            ends.client.transport.write(data)
            await recorder.until_bytes(len(data))
            ends.client.transport.close()
            await recorder.until_call("lost")
            await ends.client.until_call("lost")
            assert recorder.data == data
            assert recorder.calls == ["made", "data", "eof", "lost"]

    kit.run(scenario, config=config)


def test_set_protocol_to_and_fro(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            client, server = ends.transports
            first, second = ends.server, kit.Recorder()
            client.write(b"first")
            await first.until_bytes(5)
            server.set_protocol(IntoBuffer(second))
            assert isinstance(server.get_protocol(), IntoBuffer)
            client.write(b"second")
            await second.until_bytes(6)
            server.set_protocol(first)
            client.write(b"third")
            await first.until_bytes(10)
            assert (first.data, second.data) == (b"firstthird", b"second")

    kit.run(scenario, config=config)


def test_every_kind_of_buffer(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            client = ends.client.transport
            client.write(b"a")
            client.write(bytearray(b"b"))
            client.write(memoryview(b"c"))
            client.write(b"")
            client.write(memoryview(b""))
            client.writelines([b"d", bytearray(b"e"), memoryview(b"f")])
            client.writelines([])
            client.writelines(part for part in (b"g" * 70_000, b"h"))
            await ends.server.until_bytes(6 + 70_001)
            assert ends.server.data == b"abcdef" + b"g" * 70_000 + b"h"
            for wrong in ("text", 1, None, [b"list"]):
                with pytest.raises(TypeError):
                    client.write(wrong)

    kit.run(scenario, config=config)


def test_views_of_other_shapes(kit) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            client = ends.client.transport
            client.write(memoryview(b"12345678").cast("I"))
            client.write(memoryview(b"1x2x3x")[::2])
            client.write(memoryview(b"abcd").cast("B", (2, 2)))
            await ends.server.until_bytes(15)
            assert ends.server.data == b"12345678" + b"123" + b"abcd"

    kit.run(scenario)


@pytest.mark.parametrize("size", [100, 100_000, 2 * MIB])
def test_a_buffer_may_be_reused_after_write(kit, size) -> None:
    async def scenario() -> None:
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            client, server = ends.transports
            buffer = bytearray(b"1" * size)
            client.write(buffer)
            buffer[:] = b"2" * size
            client.write(memoryview(buffer))
            buffer[:] = b"3" * size
            buffer.extend(b"no view of it is kept")
            server.resume_reading()
            await ends.server.until_bytes(2 * size)
            assert ends.server.data == b"1" * size + b"2" * size

    kit.run(scenario)


def test_many_small_writes_that_wait(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            client, server = ends.transports
            numbers = b"".join(b"%07d\n" % n for n in range(200_000))
            for start in range(0, len(numbers), 8):
                client.write(numbers[start : start + 8])
            server.resume_reading()
            await ends.server.until_bytes(len(numbers))
            assert ends.server.data == numbers

    kit.run(scenario, config=config)


def test_write_limits(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            client, server = ends.transports
            assert client.get_write_buffer_limits() == (16 * 1024, 64 * 1024)
            client.set_write_buffer_limits(high=10 * MIB, low=MIB)
            assert client.get_write_buffer_limits() == (MIB, 10 * MIB)
            client.write(bytes(8 * MIB))
            assert "pause_writing" not in ends.client.calls
            client.set_write_buffer_limits(high=1000)
            assert "pause_writing" in ends.client.calls
            server.resume_reading()
            await ends.client.until_call("resume_writing")
            await ends.server.until_bytes(8 * MIB)
            with pytest.raises(ValueError, match="must be"):
                client.set_write_buffer_limits(high=1, low=2)

    kit.run(scenario, config=config)


@pytest.mark.parametrize("method", ["data_received", "eof_received"])
def test_an_exception_of_the_protocol_is_reported_and_aborts(
    kit, config, method
) -> None:
    class Broken(kit.Recorder):
        def fail(self, *args):
            raise ZeroDivisionError

    setattr(Broken, method, Broken.fail)

    async def scenario() -> None:
        async with kit.connected(server=Broken) as ends:
            ends.client.transport.write(b"x")
            ends.client.transport.write_eof()
            await ends.server.until_call("lost")
            assert isinstance(ends.server.error, ZeroDivisionError)
            assert f"{method}() call failed" in kit.problems[0]["message"]

    kit.run(scenario, config=config, problems=1)


@pytest.mark.parametrize("fault", ["get_buffer", "buffer_updated", "empty"])
def test_an_exception_of_a_buffered_protocol(kit, config, fault) -> None:
    class Broken(IntoBuffer):
        def get_buffer(self, sizehint):
            if fault == "get_buffer":
                raise ZeroDivisionError
            return bytearray(0 if fault == "empty" else 100)

        def buffer_updated(self, nbytes):
            raise ZeroDivisionError

    async def scenario() -> None:
        recorder = kit.Recorder()
        async with kit.connected(server=lambda: Broken(recorder)) as ends:
            ends.client.transport.write(b"x")
            await recorder.until_call("lost")
            kind = RuntimeError if fault == "empty" else ZeroDivisionError
            assert isinstance(recorder.error, kind)

    kit.run(scenario, config=config, problems=1)


def test_an_oserror_of_the_protocol_is_not_reported(kit, config) -> None:
    class Broken(kit.Recorder):
        def data_received(self, data):
            raise OSError("mine")

    async def scenario() -> None:
        asyncio.get_running_loop().set_debug(True)
        async with kit.connected(server=Broken) as ends:
            ends.client.transport.write(b"x")
            await ends.server.until_call("lost")
            assert isinstance(ends.server.error, OSError)

    kit.run(scenario, config=config)


def test_writes_after_the_peer_has_closed_end_it(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected(client=lambda: kit.Recorder(keep_open=True)) as ends:
            ends.server.transport.close()
            await ends.client.until_call("eof")
            client = ends.client.transport
            while "lost" not in ends.client.calls:
                client.write(b"into the void")
                await asyncio.sleep(0.001)
            assert isinstance(ends.client.error, ConnectionError)
            for _ in range(10):
                client.write(b"only a warning in the log")
            assert ends.client.calls.count("lost") == 1

    kit.run(scenario, config=config)


def test_the_peer_closes_while_bytes_are_on_their_way(kit, config) -> None:
    async def scenario() -> None:
        async with kit.connected(server=lambda: kit.Recorder(pause=True)) as ends:
            ends.client.transport.write(bytes(8 * MIB))
            await ends.client.until_call("pause_writing")
            ends.server.transport.abort()
            await ends.client.until_call("lost")
            assert isinstance(ends.client.error, ConnectionError)

    kit.run(scenario, config=config)


def test_extra_info(kit, config, mode) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            client, server = ends.transports
            for mine, other in ((client, server), (server, client)):
                ask = mine.get_extra_info
                assert ask("peername") == other.get_extra_info("sockname")
                assert ask("socket").getpeername() == ask("peername")
                assert ask("socket").getsockname() == ask("sockname")
                assert ask("no such thing", 7) == 7
                assert ask("smc").mode == mode
            assert ends.client.info_when_made is client.get_extra_info("smc")
            assert ends.server.info_when_made is server.get_extra_info("smc")
            assert client.get_extra_info("smc").role == "client"
            assert server.get_extra_info("smc").role == "server"
        for end in ends:
            for name in ("peername", "sockname", "smc", "socket", "cipher"):
                end.transport.get_extra_info(name)

    kit.run(scenario, config=config)


def test_info_of_smcr_says_everything(kit) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            client, server = (t.get_extra_info("smc") for t in ends.transports)
            for info in (client, server):
                assert info.reason is None
                assert (info.version, info.fabric) == ("2.1", "shm")
                assert info.links == (1,)
                assert info.eid.startswith("PYSMC-SHM-")
                assert info.local_gid.startswith("::ffff:")
                assert info.peer_gid.startswith("::ffff:")
                assert info.rmbe_bytes == info.peer_rmbe_bytes == Config().rmbe_bytes

    kit.run(scenario)


def test_repr(kit) -> None:
    async def scenario() -> None:
        async with kit.connected() as ends:
            client = ends.client.transport
            assert repr(client).startswith("<SmcTransport fd=")
            assert "read=polling write=<idle, bufsize=0>" in repr(client)
            client.abort()
            assert "closing" in repr(client)
            await ends.client.until_call("lost")
            assert "closed" in repr(client)

    kit.run(scenario)


def test_an_unclosed_transport_warns(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(kit.Recorder, kit.host, 0)
        port = server.sockets[0].getsockname()[1]
        await loop.create_connection(kit.Recorder, kit.host, port)
        server.close()  # wait_closed() would wait for the connection

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with asyncio.Runner(loop_factory=__import__("pysmc").new_event_loop) as runner:
            runner.run(scenario())
        gc.collect()
    texts = [str(one.message) for one in caught]
    assert [t for t in texts if t.startswith("unclosed transport <SmcTransport")]


def test_loop_sendfile(kit, config, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB))

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.connected() as ends:
            with path.open("rb") as file:
                sent = await loop.sendfile(ends.client.transport, file, 1000)
            await ends.server.until_bytes(sent)
            assert ends.server.data == path.read_bytes()[1000:]

    kit.run(scenario, config=config)
