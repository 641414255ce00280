"""What the TCP connection beneath SMC-R means when it moves."""

from __future__ import annotations

import asyncio
import socket

import pytest

from pysmc.aio import tcp_watch
from pysmc.aio.tcp_watch import TcpWatch
from pysmc.errors import ConnectionAborted, ConnectionReset

RESET_ON_CLOSE = b"\1\0\0\0\0\0\0\0"


@pytest.fixture
def tcp():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    left.setblocking(False)
    yield left, right
    left.close()
    right.close()


class Ends:
    """Collects what a watch reports."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.is_done = False
        self.event = asyncio.Event()

    def watch(self, sock) -> TcpWatch:
        loop = asyncio.get_running_loop()
        return TcpWatch(loop, sock, lambda: self.is_done, self.on_end)

    def on_end(self, error) -> None:
        self.errors.append(error)
        self.event.set()


async def test_a_reset(tcp) -> None:
    left, right = tcp
    ends = Ends()
    ends.watch(left)
    right.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    right.close()
    await ends.event.wait()
    assert [type(error) for error in ends.errors] == [ConnectionReset]
    assert isinstance(ends.errors[0].__cause__, ConnectionResetError)


async def test_a_byte(tcp) -> None:
    left, right = tcp
    ends = Ends()
    ends.watch(left)
    right.send(b"?")
    await ends.event.wait()
    assert [type(error) for error in ends.errors] == [ConnectionAborted]


async def test_a_fin_alone(tcp, monkeypatch) -> None:
    monkeypatch.setattr(tcp_watch, "FIN_GRACE", 0.001)
    left, right = tcp
    ends = Ends()
    ends.watch(left)
    right.close()
    await ends.event.wait()
    assert [type(error) for error in ends.errors] == [ConnectionReset]


@pytest.mark.parametrize("when", ["before", "in the grace"])
async def test_a_fin_of_a_peer_that_has_finished(tcp, monkeypatch, when) -> None:
    monkeypatch.setattr(tcp_watch, "FIN_GRACE", 0.001)
    left, right = tcp
    ends = Ends()
    watch = ends.watch(left)
    ends.is_done = when == "before"
    right.close()
    while watch._watching:
        await asyncio.sleep(0)
    ends.is_done = True
    while watch._timer is not None:
        await asyncio.sleep(0)
    assert ends.errors == []


async def test_stopping(tcp, monkeypatch) -> None:
    monkeypatch.setattr(tcp_watch, "FIN_GRACE", 0.001)
    left, right = tcp
    ends = Ends()
    watch = ends.watch(left)
    right.close()
    while watch._timer is None:
        await asyncio.sleep(0)
    watch.stop()
    watch.stop()
    await asyncio.sleep(0.005)
    assert ends.errors == []


async def test_a_false_alarm(tcp) -> None:
    left, _ = tcp
    ends = Ends()
    watch = ends.watch(left)
    watch._on_readable()
    assert watch._watching
    watch.stop()
    assert ends.errors == []


def test_stopping_after_the_loop_has_closed(tcp) -> None:
    left, _ = tcp

    async def scenario() -> TcpWatch:
        return Ends().watch(left)

    loop = asyncio.new_event_loop()
    watch = loop.run_until_complete(scenario())
    loop.close()
    watch.stop()
    assert not watch._watching
