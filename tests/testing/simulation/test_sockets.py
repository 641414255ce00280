"""Simulated sockets answer as the kernel's do: the same plays on both."""

from __future__ import annotations

import errno
import select
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.testing.simulation import World

if TYPE_CHECKING:
    from collections.abc import Callable

LINGER_0 = struct.pack("ii", 1, 0)


class Real:
    """Two real sockets on the loopback device."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.near = socket.socket()
        self.near.connect(self.listener.getsockname())
        self.far, _ = self.listener.accept()
        for sock in (self.near, self.far):
            sock.setblocking(False)

    def settle(self) -> None:
        """Let what is on its way arrive; the loopback device does so at once."""

    def ready(self, sock: Any) -> set[str]:
        if sock.fileno() < 0:
            return set()
        poll = select.epoll()
        poll.register(sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        events = dict(poll.poll(0)).get(sock.fileno(), 0)
        poll.close()
        # As Python's selectors read it.
        found = {"read"} if events & ~select.EPOLLOUT else set()
        return found | ({"write"} if events & ~select.EPOLLIN else set())

    def close(self) -> None:
        for sock in (self.near, self.far, self.listener):
            sock.close()


class Simulated:
    """The same in a world."""

    def __init__(self) -> None:
        self.world = World(1)
        server, client = self.world.process("server"), self.world.process("client")
        self.listener = server.listen(7)
        self.near: Any = self.world.tcp.socket(client.descriptors, client.host)
        with pytest.raises(BlockingIOError) as caught:
            self.near.connect(self.listener.name)
        assert caught.value.errno == errno.EINPROGRESS
        self.settle()
        assert self.near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        self.far: Any
        self.far, address = self.listener.accept()
        assert address == self.near.getsockname()

    def settle(self) -> None:
        while self.world.step():
            pass

    def ready(self, sock: Any) -> set[str]:
        if sock.fileno() < 0:
            return set()
        found = {"read"} if sock.is_readable() else set()
        return found | ({"write"} if sock.is_writable() else set())

    def close(self) -> None:
        for sock in (self.near, self.far, self.listener):
            sock.close()
        self.settle()
        assert self.world.close() == []


def say(call: Callable[..., Any], *args: Any) -> str:
    """Call, and put the outcome into words."""
    try:
        value = call(*args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        yield_to_network()
    return repr(value)


def nothing(near: Any, far: Any) -> None:
    """Leave the connection as it is."""


def end_of_file(near: Any, far: Any) -> None:
    far.shutdown(socket.SHUT_WR)


def data_and_end(near: Any, far: Any) -> None:
    far.send(b"some")
    far.shutdown(socket.SHUT_WR)


def close(near: Any, far: Any) -> None:
    far.close()


def close_with_unread(near: Any, far: Any) -> None:
    near.send(b"unread")
    yield_to_network()
    far.close()


def close_hard(near: Any, far: Any) -> None:
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    far.close()


def half_close_then_reset(near: Any, far: Any) -> None:
    far.shutdown(socket.SHUT_WR)
    yield_to_network()
    close_hard(near, far)


def own_end(near: Any, far: Any) -> None:
    near.shutdown(socket.SHUT_WR)


def both_end(near: Any, far: Any) -> None:
    own_end(near, far)
    yield_to_network()
    end_of_file(near, far)


def write_to_closed(near: Any, far: Any) -> None:
    far.close()
    yield_to_network()
    near.send(b"nobody reads this")


def shut_for_reading(near: Any, far: Any) -> None:
    near.shutdown(socket.SHUT_RD)


def shut_then_data(near: Any, far: Any) -> None:
    near.shutdown(socket.SHUT_RD)
    far.send(b"late")


def shut_both(near: Any, far: Any) -> None:
    near.shutdown(socket.SHUT_RDWR)


_network: list[Callable[[], None]] = []


def yield_to_network() -> None:
    _network[-1]()


PLAYS = [
    nothing,
    end_of_file,
    data_and_end,
    close,
    close_with_unread,
    close_hard,
    half_close_then_reset,
    own_end,
    both_end,
    write_to_closed,
    shut_for_reading,
    shut_then_data,
    shut_both,
]
PROBES: dict[str, Callable[[Any], list[str]]] = {
    "recv": lambda s: [say(s.recv, 100) for _ in range(3)],
    "send": lambda s: [say(s.send, b"x") for _ in range(3)],
    "recv then send": lambda s: [say(s.recv, 2), say(s.send, b"x"), say(s.recv, 9)],
    "so_error": lambda s: [
        say(s.getsockopt, socket.SOL_SOCKET, socket.SO_ERROR),
        say(s.getsockopt, socket.SOL_SOCKET, socket.SO_ERROR),
        say(s.recv, 9),
    ],
    "names": lambda s: [
        "name" if say(call).startswith("(") else say(call)
        for call in (s.getpeername, s.getsockname)
    ],
    "shutdown": lambda s: [
        say(s.shutdown, socket.SHUT_WR),
        say(s.send, b"x"),
        say(s.shutdown, socket.SHUT_RDWR),
    ],
    "sendmsg and recv_into": lambda s: [
        say(s.sendmsg, [b"x", b"y"]),
        say(s.sendmsg, [memoryview(b"z")]),
        say(s.recv_into, bytearray(3)),
        say(s.recv_into, bytearray(3), 1),
    ],
    "misuse": lambda s: [
        say(s.accept),
        say(s.connect, ("127.0.0.1", 9)),
        say(s.send, b""),
        say(s.gettimeout),
    ],
    "closed": lambda s: [
        say(s.close),
        say(s.close),
        say(s.fileno),
        *(say(call) for call in (s.getsockname, s.getpeername, s.accept)),
        say(s.recv, 1),
        say(s.send, b""),
        say(s.shutdown, socket.SHUT_RD),
    ],
    "peek": lambda s: [say(s.recv, 2, socket.MSG_PEEK), say(s.recv, 9)],
}


def outcome(kind: type[Real | Simulated], play: Any, probe: str) -> Any:
    ends = kind()
    _network.append(ends.settle)
    try:
        play(ends.near, ends.far)
        ends.settle()
        ready = sorted(ends.ready(ends.near))
        told = PROBES[probe](ends.near)
        ends.settle()
        return ready, told, sorted(ends.ready(ends.near))
    finally:
        _network.pop()
        ends.close()


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("play", PLAYS, ids=lambda play: play.__name__)
def test_simulated_sockets_say_what_the_kernel_says(play, probe) -> None:
    assert outcome(Simulated, play, probe) == outcome(Real, play, probe)


def test_what_has_no_counterpart_or_takes_no_time_there() -> None:
    world = World(1)
    server, client = world.process("server"), world.process("client")
    near: Any = world.tcp.socket(client.descriptors, client.host)
    assert repr(near) == "<SimSocket 10.0.0.2:40001 new>"
    with pytest.raises(ValueError, match="never blocks"):
        near.setblocking(True)
    near.setblocking(False)
    assert say_now(near.recv, 1) == say_now(near.shutdown, 0) == "ENOTCONN"
    assert say_now(near.send, b"x") == "EPIPE"
    listener = server.listen(7)
    assert say_now(near.connect, listener.name) == "EINPROGRESS"
    assert say_now(near.connect, listener.name) == "EALREADY"
    assert say_now(near.send, b"x") == say_now(near.recv, 1) == "EAGAIN"
    listener.listen(5)
    assert say_now(listener.accept) == "EAGAIN"
    while world.step():
        pass
    assert say_now(near.connect, listener.name) == "EISCONN"
    server.descriptors.limit = 1
    assert say_now(listener.accept) == "EMFILE"
    server.descriptors.limit = None
    far, _ = listener.accept()
    fd = far.fileno()
    assert far.detach() == fd
    assert far.fileno() == -1
    near.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 0
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == b""
    near.close()
    listener.close()
    assert world.close() == []


def test_a_listener_that_closes_resets_whom_nobody_accepted() -> None:
    for steps in range(1, 5):
        world = World(steps)
        server, client = world.process("server"), world.process("client")
        listener = server.listen(7)
        near: Any = world.tcp.socket(client.descriptors, client.host)
        assert say_now(near.connect, listener.name) == "EINPROGRESS"
        for _ in range(steps):
            world.step()
        listener.close()
        while world.step():
            pass
        number = near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert errno.errorcode[number] in {"ECONNREFUSED", "ECONNRESET"}
        near.close()
        assert world.close() == []


def test_a_client_that_closes_while_it_connects_leaves_nothing() -> None:
    for steps in range(4):
        world = World(steps)
        server, client = world.process("server"), world.process("client")
        listener = server.listen(7)
        near: Any = world.tcp.socket(client.descriptors, client.host)
        assert say_now(near.connect, listener.name) == "EINPROGRESS"
        for _ in range(steps):
            world.step()
        near.close()
        while world.step():
            pass
        if listener.kernel.queue:
            far, _ = listener.accept()
            assert far.recv(1) == b""
            far.close()
        assert listener.kernel.half_open == 0
        listener.close()
        while world.step():
            pass
        world.tcp.tidy()
        assert world.tcp.connections == []
        assert world.close() == []


def say_now(call: Callable[..., Any], *args: Any) -> str:
    """Call, and give the error's name."""
    with pytest.raises(OSError) as caught:  # noqa: PT011  # which one is the answer
        call(*args)
    return errno.errorcode[caught.value.errno or 0]
