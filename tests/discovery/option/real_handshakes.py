"""What the programs do to connections in a real kernel; see `cases`."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pysmc.discovery.mark import keeps_syn, read_mark, save_syn, set_mark
from pysmc.discovery.option.sockets import OptionState, opt_in, read_state
from pysmc.discovery.option.trial import try_option
from tests.discovery.option.cases import (
    BOTH_CLIENT,
    BOTH_SERVER,
    MAYBE,
    NOSYN,
    PLAIN_CLIENT,
    PLAIN_SERVER,
    asks,
    case,
    matrix,
)
from tests.discovery.option.room import (
    SMC,
    SYN,
    Sniffer,
    connected,
    in_child,
    libc,
    listener,
    tcp,
)

if TYPE_CHECKING:
    from tests.discovery.option.room import Room, Segment

TCP_FASTOPEN = 23
MSG_FASTOPEN = 0x20000000


def sysctl(name: str, value: int) -> None:
    Path("/proc/sys/net/ipv4", name).write_text(str(value))


# --- the matrix ---------------------------------------------------------------


@case
def matrix_ipv4(room: Room) -> None:
    matrix(room, "IPv4")


@case
def matrix_ipv6(room: Room) -> None:
    matrix(room, "IPv6")


@case
def matrix_mapped(room: Room) -> None:
    matrix(room, "mapped")


@case
def non_blocking_connect(room: Room) -> None:
    listening = listener(prepare=asks)
    client = tcp("127.0.0.1")
    client.setblocking(False)
    asks(client)
    assert client.connect_ex(listening.getsockname()) in {0, errno.EINPROGRESS}
    select.select([], [client], [], 5)
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert read_state(client) == BOTH_CLIENT


# --- the handshake of TCP -----------------------------------------------------


@case
def syn_cookies(room: Room) -> None:
    sysctl("tcp_syncookies", 2)
    sniffer = Sniffer()
    pair = connected(listener(prepare=asks), prepare=asks)
    assert read_state(pair.client) == PLAIN_CLIENT
    assert read_state(pair.server) == PLAIN_SERVER | NOSYN
    pair.exchange()
    segments = sniffer.both_ends()
    assert [one.is_syn for one in segments if one.has_option] == [True]
    assert "tcp_syncookies" in try_option().reason


@case
def fast_open(room: Room) -> None:
    """The SYN that asks for a cookie, and then the one with a cookie and data."""
    sysctl("tcp_fastopen", 3)

    def accepts(sock: socket.socket) -> None:
        asks(sock)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 5)

    listening = listener(prepare=accepts)
    sniffer = Sniffer()
    carried_data = []
    for _ in range(2):
        client = tcp("127.0.0.1")
        client.settimeout(None)
        asks(client)
        assert client.sendto(b"early", MSG_FASTOPEN, listening.getsockname()) == 5
        server, _ = listening.accept()
        assert server.recv(5) == b"early"
        client.shutdown(socket.SHUT_WR)
        server.sendall(b"answer")
        assert client.recv(6) == b"answer"
        states = read_state(client), read_state(server)
        server.close()
        client.close()
        segments = sniffer.both_ends()
        carried_data.append(bool(segments[0].payload))
        assert states == (PLAIN_CLIENT, PLAIN_SERVER)
        assert segments[0].has_option
        assert any(option[0] == 34 for option in segments[0].options)
        assert not any(one.has_option for one in segments[1:])
    assert carried_data == [False, True]


FAR, NEAR = "192.0.2.1", "192.0.2.9"


@case
def sent_again(room: Room) -> None:
    """SYNs and SYN-ACKs that get no answer are sent again, with the option."""
    far_network()
    sniffer = Sniffer()
    listening = listener(NEAR, asks)
    send_syn(listening.getsockname()[1], 4000, SMC)
    client = tcp(FAR)
    client.setblocking(False)
    asks(client)
    client.connect_ex((FAR, 80))

    def enough(seen: list[Segment]) -> bool:
        syns = [one for one in seen if one.is_syn and one.target == 80]
        return min(len(syns), sum(one.is_syn_ack for one in seen)) >= 2

    again = [
        one
        for one in sniffer.until(enough)
        if one.is_syn_ack or (one.is_syn and one.target == 80)
    ]
    assert all(one.has_option for one in again)


@case
def syns_of_others(room: Room) -> None:
    """Written by hand: with both forms of fast open, and what only looks like SMC."""
    far_network()
    sniffer = Sniffer()
    listening = listener(NEAR, asks)
    others = {
        "": True,
        "2202": False,
        "220a0102030405060708": False,
        "fe04f989": False,
        "fe0cf9890102030405060708": False,
        "fe06e2d4c3c4": True,
    }
    answered = {}
    for number, other in enumerate(others, start=4001):
        port = listening.getsockname()[1]
        send_syn(port, number, bytes.fromhex(other) + SMC)
        answered[other] = answer_to(number, sniffer).has_option
    assert answered == others


def answer_to(port: int, sniffer: Sniffer) -> Segment:
    """Wait for the SYN-ACK that goes to a port."""

    def answers(seen: list[Segment]) -> list[Segment]:
        return [one for one in seen if one.is_syn_ack and one.target == port]

    return answers(sniffer.until(lambda seen: bool(answers(seen))))[0]


def far_network() -> None:
    """Have addresses from which nobody answers."""
    for command in (f"addr add {NEAR}/32 dev lo", "route add 192.0.2.0/24 dev lo"):
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def send_syn(port: int, source_port: int, more: bytes) -> None:
    """Send a SYN from an address where nobody is; ``more`` are options."""
    options = bytes.fromhex("020405b4") + more
    options += b"\1" * (-len(options) % 4)
    source, target = socket.inet_aton(FAR), socket.inet_aton(NEAR)
    flags = (20 + len(options)) // 4 << 12 | SYN
    tcp_header = struct.pack("!HHIIHHHH", source_port, port, 7, 0, flags, 65535, 0, 0)
    pseudo = source + target + struct.pack("!HH", 6, len(tcp_header + options))
    checksum = _checksum(pseudo + tcp_header + options)
    tcp_header = tcp_header[:16] + struct.pack("!H", checksum) + tcp_header[18:]
    ip_header = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, 6, 0) + source + target
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(ip_header + tcp_header + options, (NEAR, 0))


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@case
def refused_and_tried_again(room: Room) -> None:
    reserved = tcp("127.0.0.1")
    reserved.bind(("127.0.0.1", 0))
    sniffer = Sniffer()
    client = tcp("127.0.0.1")
    client.settimeout(None)
    asks(client)
    with pytest.raises(ConnectionRefusedError):
        client.connect(reserved.getsockname())
    asks(reserved)
    reserved.listen()
    client.connect(reserved.getsockname())
    assert read_state(client) == BOTH_CLIENT
    assert read_state(reserved.accept()[0]) == BOTH_SERVER
    segments = sniffer.until(lambda seen: any(one.is_syn_ack for one in seen))
    assert [one.has_option for one in segments if one.is_syn] == [True, True]


@case
def disconnected_and_connected_again(room: Room) -> None:
    asked, plain = listener(prepare=asks), listener()
    client = tcp("127.0.0.1")
    asks(client)
    for listening, expected in ((asked, BOTH_CLIENT), (plain, PLAIN_CLIENT)) * 2:
        client.connect(listening.getsockname())
        assert read_state(client) == expected
        nowhere = struct.pack("H14x", socket.AF_UNSPEC)
        assert libc.connect(client.fileno(), nowhere, len(nowhere)) == 0


@case
def dup_and_fork(room: Room) -> None:
    listening = listener()
    for prepare in (asks, None):
        client = tcp("127.0.0.1")
        asks(client.dup())
        if prepare is None:
            in_child(client.connect, listening.getsockname())
        else:
            client.connect(listening.getsockname())
        assert read_state(client.dup()) == read_state(client) == PLAIN_CLIENT


@case
def two_listeners_of_one_port(room: Room) -> None:
    """With different answers to the opt-in the last one counts: plain TCP, no hang.

    For a while the first one's connections are in doubt.
    """

    def shares(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        asks(sock)

    first = listener(prepare=shares)
    port = first.getsockname()[1]
    assert read_state(connected(first, prepare=asks).server) == BOTH_SERVER
    second = tcp("127.0.0.1")
    second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    second.bind(("127.0.0.1", port))
    second.listen()
    for _ in range(8):
        client = tcp("127.0.0.1")
        asks(client)
        client.connect(("127.0.0.1", port))
        assert read_state(client) == PLAIN_CLIENT
        ready, _, _ = select.select([first, second], [], [], 5)
        server, _ = ready[0].accept()
        assert read_state(server) in {PLAIN_SERVER | MAYBE, OptionState(0)}


@case
def a_stranger_on_the_same_port(room: Room) -> None:
    """At another address, before the client has gone on: it disturbs nobody."""
    for bound, other in (("127.0.0.1", "127.0.0.9"), ("::", "")):
        first = listener(bound, asks)
        port = first.getsockname()[1]
        if other:
            stranger = tcp(other)
            stranger.bind((other, port))
            stranger.listen()
        for to in ("127.0.0.1", "::ffff:127.0.0.2", "::1"):
            if (":" in to) > (":" in bound):
                continue
            client = tcp(to)
            asks(client)
            client.connect((to, port))
            assert read_state(client) == BOTH_CLIENT
            assert read_state(first.accept()[0]) == BOTH_SERVER


# --- with the discovery "local" -----------------------------------------------


@case
def beside_the_mark(room: Room) -> None:
    """The mark is read from the saved SYN, which can be done only once."""
    for first in (read_state, read_mark):

        def both(sock: socket.socket) -> None:
            save_syn(sock)
            asks(sock)

        def marked(sock: socket.socket) -> None:
            asks(sock)
            assert set_mark(sock, ipv4=True)

        pair = connected(listener(prepare=both), prepare=marked)
        found = {first: first(pair.server)}
        for other in (read_state, read_mark):
            found.setdefault(other, other(pair.server))
        assert found == {read_state: BOTH_SERVER, read_mark: True}
        assert keeps_syn(pair.server)
        assert read_mark(pair.server) is None
        assert read_state(pair.server) == BOTH_SERVER


# --- races --------------------------------------------------------------------


def accepted_in_time(room: Room, count: int) -> None:
    """Another process accepts and asks at once; the client asks after its connect."""
    listening = listener(prepare=asks)
    listening.settimeout(10)

    def serve() -> int:
        good = 0
        for _ in range(count):
            server, _ = listening.accept()
            good += read_state(server) == BOTH_SERVER
            server.close()
        return good

    def dial() -> None:
        address = listening.getsockname()
        for _ in range(count):
            client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            opt_in(client)
            client.connect(address)
            assert read_state(client) == BOTH_CLIENT
            client.close()

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            dial()
            code = 0
        finally:
            os._exit(code)
    try:
        assert serve() == count
    finally:
        assert os.waitpid(pid, 0)[1] == 0


@case
def no_race(room: Room) -> None:
    accepted_in_time(room, 2000)
