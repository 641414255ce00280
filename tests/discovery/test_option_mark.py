"""The client's end of the option: what is promised to a server, and taken back."""

from __future__ import annotations

import gc
import os
import socket
from typing import Any

import pytest

from pysmc.discovery import Mark, OptionMark
from pysmc.discovery import option_mark as option_mark_module
from pysmc.discovery.findings import (
    INCOMPLETE,
    NOT_INSTALLED,
    OTHER_CGROUP,
    TOO_LATE,
)
from pysmc.discovery.option import sockets
from pysmc.discovery.option_mark import UNCLAIMED_WAIT, decline, has_written
from pysmc.discovery.order import Way
from pysmc.discovery.rendezvous import Refusal
from pysmc.reasons import reason
from smcproto import clc
from smcproto.diagnosis import PeerDiagnosis

ONLY = {"discovery": ("tcp_option",)}


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is settled because the machine is busy."""
    monkeypatch.setattr(option_mark_module, "UNCLAIMED_WAIT", 30.0)


def opted_in(kit: Any, **fields: Any) -> tuple[Any, Any, socket.socket]:
    """Make both discoveries, and a listener that shows the option."""
    client = kit.discovery(**(fields or ONLY))
    server = kit.discovery(**ONLY)
    listener: socket.socket = kit.bound()
    server.opt_in(listener)
    listener.listen()
    return client, server, listener


async def agreed(kit: Any, **fields: Any) -> tuple[Any, Any, Any, Any]:
    """Connect to a listener that shows the option: discovery, socket, mark, server."""
    client, server, listener = opted_in(kit, **fields)
    sock = kit.client()
    mark = client.prepare(sock, listener.getsockname())
    assert isinstance(mark, OptionMark)
    await kit.loop.sock_connect(sock, listener.getsockname())
    client.connected(mark)
    conn = await kit.accept(listener)
    assert server.inspect(conn) is Way.OPTION
    return client, sock, mark, conn


def declined(conn: socket.socket) -> clc.Decline:
    """Read the Decline that is all there is."""
    conn.settimeout(5)
    message = clc.parse(conn.recv(100))
    assert isinstance(message, clc.Decline)
    return message


async def test_the_option_is_enough(kit: Any, option: Any) -> None:
    client, sock, mark, conn = await agreed(kit)
    assert kit.short(await client.wait_confirmed(mark)) == "SMC"
    assert mark.way is Way.OPTION
    assert client._open_marks == set()
    # Whoever has claimed it decides what is said.
    client.settle_tcp(mark)
    with pytest.raises(BlockingIOError):
        conn.recv(1)
    assert option.calls.count("opt in") == 2
    assert sock.fileno() >= 0


@pytest.mark.parametrize(
    ("because", "code"),
    [
        (None, PeerDiagnosis.SOCKET_OPTION),
        (reason("LIMIT", "local"), PeerDiagnosis.NO_MEMORY),
        (reason("NO_DEVICE", "local"), PeerDiagnosis.NO_DEVICE),
        (reason("DISABLED", "local"), PeerDiagnosis.SOCKET_OPTION),
    ],
)
@pytest.mark.usefixtures("option")
async def test_a_promise_is_taken_back_by_a_decline(
    kit: Any, because: Any, code: int
) -> None:
    client, sock, mark, conn = await agreed(kit)
    for _ in range(2):
        client.settle_tcp(mark, Refusal.RAW, because)
    sock.send(b"the program's")
    message = declined_with(conn, b"the program's")
    assert (message.diagnosis, message.out_of_sync) == (code, False)
    assert kit.short(await client.wait_confirmed(mark)) == "NOT_MARKED/local"
    assert client._open_marks == set()


def declined_with(conn: socket.socket, rest: bytes) -> clc.Decline:
    """Read a Decline, exactly, and what follows."""
    conn.settimeout(5)
    header = conn.recv(8, socket.MSG_WAITALL)
    length = clc.parse_header(header).length
    message = clc.parse(header + conn.recv(length - 8, socket.MSG_WAITALL))
    assert conn.recv(100) == rest
    assert isinstance(message, clc.Decline)
    return message


@pytest.mark.usefixtures("option")
async def test_a_socket_that_nobody_asks_for_is_tcp_after_a_while(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(option_mark_module, "UNCLAIMED_WAIT", 0.001)
    client, _, mark, conn = await agreed(kit)
    await kit.until(lambda: not client._open_marks)
    declined(conn)
    assert kit.short(await client.wait_confirmed(mark)) == "NOT_MARKED/local"


@pytest.mark.usefixtures("option")
async def test_nothing_comes_behind_what_the_program_wrote(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(option_mark_module, "UNCLAIMED_WAIT", 0.05)
    client, sock, mark, conn = await agreed(kit)
    sock.send(b"by itself")
    await kit.until(lambda: not client._open_marks)
    conn.settimeout(5)
    assert conn.recv(100) == b"by itself"
    conn.settimeout(0)
    with pytest.raises(BlockingIOError):
        conn.recv(1)
    assert kit.short(mark.verdict) == "NOT_MARKED/local"


@pytest.mark.usefixtures("option")
async def test_closing_takes_back_what_nobody_asked_for(kit: Any) -> None:
    client, _, _, conn = await agreed(kit)
    client.close()
    client.close()
    declined(conn)


@pytest.mark.usefixtures("option")
async def test_a_forked_child_says_nothing(kit: Any) -> None:
    client, _, mark, conn = await agreed(kit)
    timer = mark._unclaimed
    client._abandon()
    mark.close()
    with pytest.raises(BlockingIOError):
        conn.recv(1)
    timer.cancel()


@pytest.mark.usefixtures("option")
async def test_a_socket_that_was_dropped(kit: Any) -> None:
    client, sock, mark, conn = await agreed(kit)
    kit.sockets.remove(sock)
    sock.close()
    del sock
    gc.collect()
    client.settle_tcp(mark)
    conn.settimeout(5)
    assert conn.recv(1) == b""
    mark.close()


async def test_a_connect_that_fails_leaves_no_trace(kit: Any, option: Any) -> None:
    client = kit.discovery()
    listener = kit.bound()
    sock = kit.client()
    mark = client.prepare(sock, listener.getsockname())
    with pytest.raises(ConnectionRefusedError):
        await kit.loop.sock_connect(sock, listener.getsockname())
    client.settle_tcp(mark)
    assert option.calls[-1] == "opt out"
    assert option.read_state(sock) == sockets.OptionState(0)
    assert kit.short(await client.wait_confirmed(mark)) == "NOT_MARKED/local"
    assert isinstance(client.prepare(sock, listener.getsockname()), OptionMark)


async def test_a_connect_that_goes_on_after_it_was_cancelled(
    kit: Any, option: Any
) -> None:
    """The socket has opted in, and may be answered: the second try goes by that."""
    client, _, listener = opted_in(kit)
    sock = kit.client()
    first = client.prepare(sock, listener.getsockname())
    sock.connect_ex(listener.getsockname())
    option.is_complete = False  # as a socket is seen whose SYN has no answer yet
    client.settle_tcp(first)
    option.is_complete = True
    second = client.prepare(sock, listener.getsockname())
    assert isinstance(second, OptionMark)
    client.connected(second)
    assert kit.short(await client.wait_confirmed(second)) == "SMC"
    assert "opt out" in option.calls


@pytest.mark.parametrize("is_handed_over", [False, True])
async def test_a_program_that_uses_what_a_cancelled_connect_has_led_to(
    kit: Any, option: Any, is_handed_over: bool
) -> None:
    """The server was answered after the end of the connect, and awaits CLC."""
    client, _, listener = opted_in(kit)
    sock = kit.client()
    mark = client.prepare(sock, listener.getsockname())
    sock.connect_ex(listener.getsockname())
    option.is_complete = False  # as a socket is seen whose SYN has no answer yet
    client.settle_tcp(mark)
    assert mark.is_late
    option.is_complete = True
    if is_handed_over:
        assert kit.short(await client.wait_confirmed(mark)) == "NOT_MARKED/local"
    for _ in range(2):
        client.settle_tcp(mark)
    assert not mark.is_late
    declined(await kit.accept(listener))


@pytest.mark.usefixtures("option")
async def test_a_connect_whose_socket_is_closed_has_nothing_to_take_back(
    kit: Any,
) -> None:
    client = kit.discovery(**ONLY)
    sock = kit.client()
    mark = client.prepare(sock, ("127.0.0.1", 9))
    sock.close()
    client.settle_tcp(mark)
    assert not mark.is_late


@pytest.mark.parametrize("is_used", [False, True])
async def test_a_connect_that_is_cancelled_when_it_has_just_succeeded(
    kit: Any, option: Any, is_used: bool
) -> None:
    """The server was promised CLC, and nobody has seen its answer here."""
    client, _, listener = opted_in(kit)
    sock = kit.client()
    mark = client.prepare(sock, listener.getsockname())
    await kit.loop.sock_connect(sock, listener.getsockname())
    if is_used:
        sock.send(b"by itself")
    client.settle_tcp(mark)
    client.settle_tcp(mark)
    conn = await kit.accept(listener)
    assert option.calls.count("opt out") == 1
    if is_used:
        conn.settimeout(5)
        assert conn.recv(100) == b"by itself"
    else:
        declined(conn)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "PEER_NO_SMC/peer"),
        ({"is_complete": False}, "SETUP_MISSING/local"),
        ({"is_here": False}, "SETUP_MISSING/local"),
    ],
)
async def test_a_server_that_does_not_show_it(
    kit: Any, option: Any, change: dict[str, bool], name: str
) -> None:
    client = kit.discovery(**ONLY)
    listener = kit.listener()
    sock = kit.client()
    mark = client.prepare(sock, listener.getsockname())
    await kit.loop.sock_connect(sock, listener.getsockname())
    for field, value in change.items():
        setattr(option, field, value)
    client.connected(mark)
    client.connected(mark)
    verdict = await client.wait_confirmed(mark)
    assert kit.short(verdict) == name
    assert (verdict.reason is INCOMPLETE) is bool(change)
    client.settle_tcp(mark)
    assert client._open_marks == set()


async def test_a_socket_that_cannot_opt_in(kit: Any, option: Any) -> None:
    client, target = kit.discovery(**ONLY), ("127.0.0.1", 9)
    sock = kit.client()
    option.elsewhere.add(os.fstat(sock.fileno()).st_ino)
    assert client.prepare(sock, target) is OTHER_CGROUP
    connected, _ = await kit.unmarked_pair()
    assert client.prepare(connected, target) is TOO_LATE
    both = kit.discovery()
    assert both.prepare(connected, target) is TOO_LATE
    client._presence._look_at = 0
    option.is_here = False
    assert client.prepare(kit.client(), target) is NOT_INSTALLED


async def test_without_an_answer_the_mark_goes_on(kit: Any, option: Any) -> None:
    client, server = kit.discovery(), kit.discovery()
    listener = kit.listener()
    server.announce(listener)
    sock = kit.client()
    mark = client.prepare(sock, listener.getsockname())
    await kit.loop.sock_connect(sock, listener.getsockname())
    client.connected(mark)
    (inner,) = client._open_marks
    assert isinstance(inner, Mark)
    assert mark.way is Way.LOCAL
    assert mark.goes_on is inner
    client.settle_tcp(mark)
    assert kit.short(mark.verdict) == "NOT_MARKED/local"
    assert option.calls.count("read") == 1


async def test_a_mark_that_was_never_connected(kit: Any, option: Any) -> None:
    client = kit.discovery()
    mark = client.prepare(kit.client(), ("127.0.0.1", 9))
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/local"
    assert "read" not in option.calls


async def test_why_no_handshake_may_begin_is_asked_before_the_mark(
    kit: Any, option: Any
) -> None:
    """It says nothing about the option, which is asked for all the same."""
    client, server = kit.discovery(), kit.discovery()
    listener = kit.listener()
    server.announce(listener)
    full = reason("LIMIT", "local")
    sock = kit.client()
    option.is_here = False
    assert client.prepare(sock, listener.getsockname(), lambda: full) is full
    assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0


class Short(socket.socket):
    """Takes a byte less than it is given."""

    def send(self, data: Any, flags: int = 0) -> int:
        return super().send(data[:-1], flags)


async def test_half_a_decline_ends_the_connection(kit: Any) -> None:
    left, right = socket.socketpair()
    kit.keep(right)
    short = kit.keep(Short(fileno=left.detach()))
    decline(short, 0)
    assert len(right.recv(100)) == 27
    assert right.recv(100) == b""
    right.close()
    decline(short, 0)  # nothing is left to be said, and nothing raised


async def test_who_has_written(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sock, conn = await kit.unmarked_pair()
    assert not has_written(sock)
    conn.send(b"the peer's")
    assert not has_written(sock)
    sock.send(b"x")
    assert has_written(sock)
    unix, other = socket.socketpair()
    kit.keep(other)
    assert has_written(kit.keep(unix)), "what is not known is left alone"
    monkeypatch.setattr(option_mark_module, "TCP_INFO_BYTES", 104)
    assert has_written(conn)
    assert UNCLAIMED_WAIT == 0.1


@pytest.mark.usefixtures("option")
async def test_whoever_has_written_gets_no_handshake(kit: Any) -> None:
    client, sock, mark, conn = await agreed(kit)
    sock.send(b"the program's")
    assert kit.short(await client.wait_confirmed(mark)) == "NOT_MARKED/local"
    conn.settimeout(5)
    assert conn.recv(100) == b"the program's"
