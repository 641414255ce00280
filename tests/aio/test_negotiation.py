"""A socket's way to its verdict: what may go wrong on it, and who cleans up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import pytest

import pysmc
from pysmc.aio import loop as loop_module
from pysmc.aio import negotiation
from pysmc.aio.negotiation import Negotiation
from pysmc.config import Config
from pysmc.errors import (
    ConnectionAborted,
    ConnectionReset,
    HandshakeTimeout,
    RemoteProtocolError,
)
from pysmc.fabric.base import Update

HOST = "127.0.0.1"
STATIC = {"discovery": ("static",), "peers": ("127.0.0.1",)}
"""The client believes that everybody here speaks SMC."""


@contextlib.contextmanager
def answering(answer):
    """A server of plain sockets: ``answer(conn)`` runs in a thread, for one of them."""
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            conn, _ = listener.accept()
            with conn, contextlib.suppress(OSError):
                answer(conn)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join(10)


def failure_of(kit, answer, **fields):
    """What a client gets that meets such a server."""

    async def scenario(port: int) -> BaseException:
        with pytest.raises((OSError, pysmc.SmcError)) as caught:
            await asyncio.open_connection(HOST, port)
        return caught.value

    with answering(answer) as port:
        return kit.run(scenario, port, config=Config(**STATIC, **fields))


def test_a_silent_peer_is_a_timeout_and_never_a_fallback(kit) -> None:
    error = failure_of(kit, lambda conn: conn.recv(2000) and conn.recv(1),
                       accept_wait=0.05)  # fmt: skip
    assert isinstance(error, HandshakeTimeout)
    assert isinstance(error, TimeoutError)


def test_a_peer_that_closes(kit) -> None:
    error = failure_of(kit, lambda conn: conn.recv(2000))
    assert isinstance(error, ConnectionReset)


def test_a_peer_that_closes_in_the_middle_of_a_message(kit) -> None:
    def answer(conn) -> None:
        conn.recv(2000)
        conn.sendall(bytes.fromhex("e2d4c3d902006c20"))

    assert isinstance(failure_of(kit, answer), ConnectionReset)


def test_a_peer_that_resets(kit) -> None:
    def answer(conn) -> None:
        conn.recv(1)  # the rest stays unread
        conn.close()

    assert isinstance(failure_of(kit, answer), ConnectionReset)


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(100)])
def test_a_peer_that_does_not_speak_smc_after_all(kit, reply) -> None:
    def answer(conn) -> None:
        conn.recv(2000)
        conn.sendall(reply)
        conn.recv(1)

    error = failure_of(kit, answer)
    assert isinstance(error, ConnectionAborted)
    assert isinstance(error.__cause__, RemoteProtocolError)


def test_a_decline_leaves_everything_behind_it_alone(kit) -> None:
    decline = bytes.fromhex(
        "e2d4c3d904002c2022580200ad8a1aaf03030000200000000000000000000000000000000000"
        "0000e2d4c3d9"
    )
    assert len(decline) == 44

    def answer(conn) -> None:
        conn.recv(2000)
        for byte in decline + b"application data, in the same breath":
            conn.send(bytes([byte]))

    async def scenario(port: int) -> bytes:
        reader, writer = await asyncio.open_connection(HOST, port)
        info = writer.get_extra_info("smc")
        assert (info.mode, info.reason.name) == ("tcp", "PEER_DECLINED")
        assert info.reason.peer_code == 0x03030000
        data = await reader.read()
        writer.close()
        await writer.wait_closed()
        return data

    with answering(answer) as port:
        data = kit.run(scenario, port, config=Config(**STATIC))
    assert data == b"application data, in the same breath"


def test_a_decline_that_the_kernel_takes_slowly(kit, monkeypatch) -> None:
    """A CLC message that the socket does not take at once is sent on later."""
    sent = []

    class Slow:
        """A socket that takes a byte, then nothing, then a byte."""

        def __init__(self, sock) -> None:
            self.sock = sock

        def __getattr__(self, name):
            return getattr(self.sock, name)

        def send(self, data):
            sent.append(len(data))
            if len(sent) % 2:
                raise BlockingIOError
            return self.sock.send(data[:40])

    made = Negotiation.__init__

    def slowly(self, driver, sock, role, *rest, **options) -> None:
        made(self, driver, Slow(sock), role, *rest, **options)

    monkeypatch.setattr(Negotiation, "__init__", slowly)

    async def scenario() -> None:
        async with kit.connected() as ends:
            modes = [t.get_extra_info("smc").mode for t in ends.transports]
            assert modes == ["smcr", "smcr"]

    kit.run(scenario)
    assert len(sent) > 6


def test_sending_fails(kit, monkeypatch) -> None:
    class Broken:
        def __init__(self, sock) -> None:
            self.sock = sock

        def __getattr__(self, name):
            return getattr(self.sock, name)

        def send(self, data):
            raise BrokenPipeError

    made = Negotiation.__init__

    def broken(self, driver, sock, role, *rest, **options) -> None:
        sock = Broken(sock) if role == "client" else sock
        made(self, driver, sock, role, *rest, **options)

    monkeypatch.setattr(Negotiation, "__init__", broken)

    async def scenario() -> None:
        async with kit.serving(kit.Recorder) as port:
            with pytest.raises(ConnectionReset):
                await asyncio.open_connection(HOST, port)

    kit.run(scenario)


def test_the_socket_is_gone_before_it_begins(kit) -> None:
    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        assert driver.open() is None
        with socket.socket() as sock, pytest.raises(ConnectionReset):
            await Negotiation(driver, sock, "client").run()

    kit.run(scenario)


PROPOSAL = bytes.fromhex(
    "e2d4c3d901009c22000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000001c000000000000000000000000000000000000000000000000"
    "00000000010000100000000000000000000000000000ffff0a000001ff020001000000000000"
    "0000000000005059534d432d5445535420202020202020202020202020202020202020202020"
    "e2d4c3d9"
)
"""Of a kernel, whose EID is nobody's here."""


@pytest.mark.parametrize(("pieces", "readable"), [((156,), 0), ((8, 148), 1)])
def test_a_proposal_that_is_there_is_read_at_once(
    kit, monkeypatch, pieces, readable
) -> None:
    """What has come is not waited for: no message, nor what follows its header."""
    waited = []
    readable_before = Negotiation._on_readable

    def on_readable(self) -> None:
        waited.append(self)
        readable_before(self)

    monkeypatch.setattr(Negotiation, "_on_readable", on_readable)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server((HOST, 0)) as listener:
            sock = socket.create_connection(listener.getsockname())
            sock.sendall(PROPOSAL[: pieces[0]])
            listener.setblocking(False)
            server = await loop.create_server(asyncio.Protocol, sock=listener)
            with sock:
                sock.setblocking(False)
                if pieces[1:]:
                    while not loop.driver.negotiations:
                        await asyncio.sleep(0)
                    sock.sendall(PROPOSAL[pieces[0] :])
                decline = await loop.sock_recv(sock, 100)
            assert decline[4] == 4
            server.close()
            await server.wait_closed()

    kit.run(scenario, config=Config(**STATIC))
    assert len(waited) == readable


def test_servers_log_what_they_lose(kit, caplog) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.serving(lambda: pytest.fail("made a protocol")) as port:
            for data in (b"GET / HTTP/1.0\r\n\r\n", b""):
                sock = socket.socket()
                sock.setblocking(False)
                await socket_connect(loop, sock, port)
                if data:
                    await loop.sock_sendall(sock, data)
                    with contextlib.suppress(ConnectionResetError):
                        assert await loop.sock_recv(sock, 1) == b""
                    sock.close()
                else:
                    assert await loop.sock_recv(sock, 1) == b"", "timed out"
                    sock.close()

    async def socket_connect(loop, sock, port) -> None:
        await asyncio.SelectorEventLoop.sock_connect(loop, sock, (HOST, port))

    caplog.set_level("DEBUG", logger="pysmc")
    kit.run(scenario, config=Config(**STATIC, proposal_wait=0.05))
    texts = [record.getMessage() for record in caplog.records]
    assert sum("was closed" in text for text in texts) == 2
    assert [r.levelname for r in caplog.records if "was closed" in r.getMessage()] == [
        "DEBUG",
        "WARNING",
    ]


# --- cancellation


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["same loop", "other process"])
def test_cancelling_after_every_step(kit, peer) -> None:
    """Cancel create_connection after 1, 2, 3 … turns of the loop: nothing leaks."""
    child = None
    if peer == "other process":
        child = kit.spawn(SERVER)
        other_port = int(child.stdout.readline())

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.serving(lambda: Ender()) as own_port:
            port = other_port if child else own_port
            await use(port)  # makes the link group; the rest reuses it
            for turns in range(1, 400):
                before = count_state(kit, loop)
                task = loop.create_task(
                    loop.create_connection(kit.Recorder, HOST, port)
                )
                for _ in range(turns):
                    await asyncio.sleep(0)
                if task.done():
                    break
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    transport, protocol = await task
                    transport.abort()
                    await protocol.until_call("lost")
                await settled(kit, loop, before)
            assert turns > 5
            if task.done() and not task.cancelled():
                transport, protocol = task.result()
                transport.close()
                await protocol.until_call("lost")
            await use(port)

    async def use(port: int) -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        assert writer.get_extra_info("smc").mode == "smcr"
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()

    kit.run(scenario)


SERVER = """
import asyncio, pysmc
async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
pysmc.run(main())
"""


class Ender(asyncio.Protocol):
    """Ends with its peer."""


def count_state(kit, loop) -> tuple[int, ...]:
    driver = loop.driver
    handshakes = driver._endpoint.handshake_count if driver._endpoint else 0
    return (
        kit.count_descriptors(),
        len(driver.transports),
        len(driver.negotiations),
        handshakes,
        len(asyncio.all_tasks()),
    )


async def settled(kit, loop, before) -> None:
    async with asyncio.timeout(10):
        while count_state(kit, loop) != before:
            await asyncio.sleep(0.001)


@pytest.mark.slow
def test_cancelling_a_first_contact(kit) -> None:
    """As above, with a link group that has to be made each time."""

    async def scenario(turns: int) -> bool:
        loop = asyncio.get_running_loop()
        served = []

        def make():
            served.append(kit.Recorder())
            return served[-1]

        async with kit.serving(make) as port:
            task = loop.create_task(loop.create_connection(kit.Recorder, HOST, port))
            for _ in range(turns):
                await asyncio.sleep(0)
            finished = task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                transport, protocol = await task
                transport.abort()
                await protocol.until_call("lost")
            async with asyncio.timeout(10):
                while len(asyncio.all_tasks()) > 1 or loop.driver.transports:
                    await asyncio.sleep(0.001)
            for protocol in served:
                await protocol.until_call("lost")
            return finished

    for turns in range(1, 400):
        if kit.run(scenario, turns):
            break
    assert turns > 5


def test_a_task_that_never_began_closes_what_it_was_given(kit) -> None:
    ends = []

    async def serve() -> None:
        try:
            await negotiation.begun()
            ends.append("went on")
        finally:
            ends.append("closed")

    async def scenario() -> None:
        await asyncio.create_task(negotiation.begin(serve()))
        task = asyncio.create_task(negotiation.begin(serve()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        negotiation.begin(serve()).close()

    kit.run(scenario)
    assert ends == ["went on", "closed", "closed", "closed"]


# --- the hand-over


def test_quick_clients_lose_nothing(kit) -> None:
    """Connect, write, close, exit: the server may see all of it at once."""
    code = """
        import asyncio, sys, pysmc
        async def main(count):
            for _ in range(count):
                _, writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
                assert writer.get_extra_info("smc").mode == "smcr"
                writer.write(b"x" * 100_000)
                writer.close()
        for number in range(20):
            pysmc.run(main(1 + number % 3))
    """
    expected = sum(1 + number % 3 for number in range(20))

    async def scenario() -> None:
        served = []

        def make():
            served.append(kit.Recorder())
            return served[-1]

        async with kit.serving(make) as port:
            child = kit.spawn(code, port)
            await asyncio.to_thread(child.wait)
            assert child.returncode == 0
            for protocol in served:
                await protocol.until_call("lost")
        assert len(served) == expected
        assert {len(protocol.data) for protocol in served} == {100_000}
        assert {tuple(protocol.calls) for protocol in served} == {
            ("made", "data", "eof", "lost")
        }

    kit.run(scenario)


def test_the_end_of_tcp_at_the_hand_over_is_quiet(kit, monkeypatch) -> None:
    """The client has said all it had to say over the fabric before."""
    handing_over = []
    check, read = Negotiation.check_tcp, Negotiation._read

    def check_tcp(self) -> None:
        handing_over.append(self.role)
        check(self)
        handing_over.append("")

    def at_the_end(self):
        return b"" if handing_over[-1:] == ["server"] else read(self)

    monkeypatch.setattr(Negotiation, "check_tcp", check_tcp)
    monkeypatch.setattr(Negotiation, "_read", at_the_end)

    async def scenario() -> None:
        async with kit.connected() as ends:
            assert ends.server.info_when_made.mode == "smcr"

    kit.run(scenario)
    assert "server" in handing_over


def test_a_connection_lost_before_its_transport_is_made(kit, monkeypatch) -> None:
    """Nothing was received: the caller gets the error."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        driver = loop.driver
        real = Negotiation.established

        def established(self, connection) -> None:
            real(self, connection)
            if self.role == "client":
                loop.call_soon(lose, connection.link)

        def lose(link) -> None:
            driver.endpoint.link_down(link, "peer gone", "test", driver.time())
            driver.settle()

        monkeypatch.setattr(Negotiation, "established", established)
        async with kit.serving(kit.Recorder) as port:
            try:
                _, protocol = await loop.create_connection(kit.Recorder, HOST, port)
            except ConnectionReset:
                return
            await protocol.until_call("lost")
            assert isinstance(protocol.error, ConnectionReset)

    kit.run(scenario)


@pytest.mark.parametrize(
    ("how", "error"), [("lie", ConnectionAborted), ("withdraw", ConnectionReset)]
)
def test_a_peer_that_breaks_a_rule_and_leaves_before_its_transport_is_made(
    kit, monkeypatch, how, error
) -> None:
    """What arrived before is delivered; the memory in which it lay has gone."""
    served = []

    def serve():
        served.append(kit.Recorder())
        return served[-1]

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        real = Negotiation.established

        def established(self, connection) -> None:
            real(self, connection)
            if self.role == "server":
                monkeypatch.undo()
                break_a_rule_and_leave(loop.driver, connection, how)

        monkeypatch.setattr(Negotiation, "established", established)
        async with kit.serving(serve) as port:
            with contextlib.suppress(ConnectionError):
                _, client = await loop.create_connection(kit.Recorder, HOST, port)
                await client.until_call("lost")
            (protocol,) = served
            await protocol.until_call("lost")
        assert protocol.data == bytes(1000)
        assert isinstance(protocol.error, error)

    kit.run(scenario)


def break_a_rule_and_leave(driver, connection, how) -> None:
    """Have a peer write, do what it must not, and lose the link.

    It announces more than there is room for, or withdraws the memory that it gave.
    """
    endpoint, link, now = driver.endpoint, connection.link, driver.time()
    positions = [connection._rx_produced + 1000]
    if how == "lie":
        positions.append(connection._ring.capacity + 2000)
    for sequence, position in enumerate(positions, 1):
        producer, consumer = connection._ring.pack(position), connection._peer_consumer
        update = Update(sequence, connection.alert_token, producer, consumer, 0)
        endpoint.receive_update(link, update, now)
    if how == "withdraw":
        endpoint.rkeys_withdrawn(connection.group, [connection.remote_rkey])
    assert connection.error is not None
    endpoint.link_down(link, "peer gone", "test", now)
    driver.settle()


def test_orders_that_come_late_are_harmless(kit) -> None:
    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        assert driver.open() is None
        left, right = socket.socketpair()
        with left, right:
            left.setblocking(False)
            one = Negotiation(driver, left, "client")
            one.drop()
            one.salvage()
            assert not one.is_on(None)
            assert not one.salvaged

    kit.run(scenario)


def test_errors_become_connection_errors() -> None:
    reset = ConnectionReset("x")
    assert negotiation.as_connection_error(reset) is reset
    broken = RemoteProtocolError("y", section="RFC 7609 section 4.7")
    made = negotiation.as_connection_error(broken)
    assert isinstance(made, ConnectionAbortedError)
    assert made.__cause__ is broken


def test_room_that_is_taken_during_the_connect(kit, monkeypatch) -> None:
    real = loop_module.negotiate_client

    async def crowded(driver, sock, found):
        with monkeypatch.context() as patch:
            patch.setattr(driver, "has_room", lambda: False)
            return await real(driver, sock, found)

    monkeypatch.setattr(loop_module, "negotiate_client", crowded)

    async def scenario() -> None:
        async with kit.serving(kit.Recorder) as port:
            reader, writer = await asyncio.open_connection(HOST, port)
            info = writer.get_extra_info("smc")
            assert (info.mode, info.reason.name) == ("tcp", "LIMIT")
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()

    kit.run(scenario)


def test_a_connection_that_nobody_could_take_is_an_error(kit, monkeypatch) -> None:
    """It was lost in the turn in which it was established, before anything came."""

    async def scenario() -> None:
        driver = asyncio.get_running_loop().driver
        real = Negotiation.established

        def established(self, connection) -> None:
            real(self, connection)
            if self.role == "client":
                self.lose(ConnectionReset("the link is gone"))

        monkeypatch.setattr(Negotiation, "established", established)
        async with kit.serving(kit.Recorder) as port:
            with pytest.raises(ConnectionReset, match="link is gone"):
                await asyncio.open_connection(HOST, port)
            async with asyncio.timeout(5):
                while driver.transports or driver.negotiations:
                    await asyncio.sleep(0.001)

    kit.run(scenario)
