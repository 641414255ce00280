"""What the programs must do in a real kernel, a function a case.

Each runs in a `Room`: on the host by `test_real_kernel`, in the lab's guest by
`tests/lab/test_option.py`. A case ends by an assertion or by returning.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.discovery.mark import keeps_syn, read_mark, save_syn, set_mark
from pysmc.discovery.option import install, sockets
from pysmc.discovery.option.assembler import Assembler, Register
from pysmc.discovery.option.bpf import AttachType, Bpf, BpfError, Command, ProgramType
from pysmc.discovery.option.programs import (
    CALLBACK_FLAGS,
    OP,
    Callback,
    Helper,
    Op,
)
from pysmc.discovery.option.sockets import OptionState, opt_in, read_state
from pysmc.discovery.option.trial import try_option
from tests.discovery.option.room import (
    ACK,
    FIN,
    SMC,
    SYN,
    Sniffer,
    connected,
    enter,
    in_child,
    libc,
    listener,
    new_cgroup,
    tcp,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.discovery.option.room import Room, Segment

WANT, PEER, DONE = OptionState.WANT, OptionState.PEER, OptionState.DONE
NOSYN, SERVER = OptionState.NOSYN, OptionState.SERVER
BOTH_CLIENT, BOTH_SERVER = WANT | PEER | DONE, WANT | PEER | DONE | SERVER
PLAIN_CLIENT, PLAIN_SERVER = WANT | DONE, WANT | DONE | SERVER
TCP_FASTOPEN = 23
MSG_FASTOPEN = 0x20000000
NOBODY = 65534
FAMILIES = {
    "IPv4": ("127.0.0.1", "127.0.0.1"),
    "IPv6": ("::1", "::1"),
    "mapped": ("::", "127.0.0.1"),
}
"""Where a listener is bound, and where a client connects to."""

CASES: dict[str, Callable[[Room], None]] = {}
BARE: dict[str, Callable[[Room], None]] = {}
"""These attach the programs by themselves."""


def case(function: Callable[[Room], None]) -> Callable[[Room], None]:
    CASES[function.__name__] = function
    return function


def bare(function: Callable[[Room], None]) -> Callable[[Room], None]:
    BARE[function.__name__] = function
    return function


def asks(sock: socket.socket) -> None:
    assert opt_in(sock)


def sysctl(name: str, value: int) -> None:
    Path("/proc/sys/net/ipv4", name).write_text(str(value))


def is_refused(sock: socket.socket) -> bool:
    try:
        opt_in(sock)
    except OSError as error:
        return error.errno == errno.EPERM
    return False


# --- the matrix -------------------------------------------------------------------


def matrix(room: Room, family: str) -> None:
    """Both ends' answers, and the option in SYN and SYN-ACK and nowhere else."""
    bound, to = FAMILIES[family]
    sniffer = Sniffer()
    for server_asks in (False, True):
        for client_asks in (False, True):
            pair = connected(
                listener(bound, asks if server_asks else None),
                to,
                asks if client_asks else None,
            )
            found = read_state(pair.client), read_state(pair.server)
            pair.exchange()
            peer = PEER if server_asks and client_asks else OptionState(0)
            assert found == (
                WANT | DONE | peer if client_asks else OptionState(0),
                WANT | DONE | SERVER | peer if server_asks else OptionState(0),
            )
            segments = sniffer.both_ends()
            assert len(segments) > 6
            for one in segments:
                assert one.has_option == (
                    (one.is_syn and client_asks)
                    or (one.is_syn_ack and client_asks and server_asks)
                ), one
                assert sum(option[0] == 254 for option in one.options) <= 1


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


# --- others are not touched ---------------------------------------------------------


def plain_headers() -> list[bytes]:
    """All headers of a connection that did not opt in, but for what always differs."""
    sniffer = Sniffer()
    connected(listener("127.0.0.1"), "127.0.0.1").exchange()
    v4 = _handshake(sniffer.both_ends())
    connected(listener("::1"), "::1").exchange()
    return v4 + _handshake(sniffer.both_ends())


def _handshake(segments: list[Segment]) -> list[bytes]:
    # Later ones depend on the scheduler: how much is acknowledged at once.
    assert [one.flags for one in segments[:3]] == [SYN, SYN | ACK, ACK]
    return [one.headers for one in segments[:3]]


@bare
def others_are_untouched(room: Room) -> None:
    before = plain_headers()
    assert not opt_in(tcp("127.0.0.1"))
    install.attach(room.cgroup)
    asked = connected(listener(prepare=asks), prepare=asks)
    assert plain_headers() == before

    def outside() -> list[bytes]:
        enter(room.outside)
        assert sockets.installed_abi() is None
        assert read_state(tcp("127.0.0.1")) is None
        return plain_headers()

    assert in_child(outside) == before
    assert read_state(asked.server) == BOTH_SERVER


@case
def client_outside_and_listener_inside(room: Room) -> None:
    listening = listener(prepare=asks)

    def outside() -> None:
        enter(room.outside)
        pair = connected(listening)
        assert read_state(pair.client) is None
        assert read_state(pair.server) == PLAIN_SERVER

    in_child(outside)


@case
def sockets_belong_where_they_were_made(room: Room) -> None:
    enter(room.outside)
    made_outside = tcp("127.0.0.1")
    enter(room.cgroup)
    assert not opt_in(made_outside)
    assert read_state(made_outside) is None
    made_inside = tcp("127.0.0.1")
    enter(room.outside)
    asks(made_inside)
    assert read_state(made_inside) == WANT


@case
def a_child_cgroup_is_inside(room: Room) -> None:
    with new_cgroup(room.cgroup) as below:

        def work() -> None:
            enter(below)
            assert read_state(connected(listener(prepare=asks), prepare=asks).server)

        in_child(work)


# --- what is not for it -------------------------------------------------------------


@case
def too_late_or_not_tcp(room: Room) -> None:
    listening = listener()
    pair = connected(listening)
    assert all(is_refused(sock) for sock in pair)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert is_refused(sock)
        assert read_state(sock) is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        assert is_refused(sock)
        assert read_state(sock) is None
    if Path("/proc/sys/net/mptcp/enabled").exists():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as sock:
            assert is_refused(sock)
            assert read_state(sock) is None


@case
def other_options_are_passed_on(room: Room) -> None:
    sock = tcp("127.0.0.1")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    for length in (0, 1, 3, 5):
        with pytest.raises(PermissionError):
            sock.setsockopt(sockets.LEVEL, sockets.STATE, bytes(length))
    with pytest.raises(OSError, match="not available") as caught:
        sock.setsockopt(sockets.LEVEL, 3, 1)
    assert caught.value.errno == errno.ENOPROTOOPT
    # Longer than a page, both ways: a filter of many instructions.
    instructions = struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF) * 1000
    buffer = ctypes.create_string_buffer(instructions)
    program = struct.pack("HxxxxxxQ", 1000, ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, 26, program)
    big = ctypes.create_string_buffer(8192)
    size = ctypes.c_uint32(8192)
    get = (6, 11, big, ctypes.byref(size))  # TCP_INFO
    assert libc.getsockopt(sock.fileno(), *get) == 0
    assert 100 < size.value < 1000
    assert any(big.raw)


# --- the handshake of TCP -----------------------------------------------------------


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
    for command in (f"addr add {NEAR}/32 dev lo", "route add 192.0.2.0/24 dev lo"):
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)
    sniffer = Sniffer()
    listening = listener(NEAR, asks)
    port = listening.getsockname()[1]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(raw_syn(port), (NEAR, 0))
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


def raw_syn(port: int) -> bytes:
    """A SYN with the option from an address where nobody is."""
    options = bytes.fromhex("020405b4") + SMC + b"\1\1"
    source, target = socket.inet_aton(FAR), socket.inet_aton(NEAR)
    flags = (20 + len(options)) // 4 << 12 | SYN
    tcp_header = struct.pack("!HHIIHHHH", 4000, port, 7, 0, flags, 65535, 0, 0)
    pseudo = source + target + struct.pack("!HH", 6, len(tcp_header + options))
    checksum = _checksum(pseudo + tcp_header + options)
    tcp_header = tcp_header[:16] + struct.pack("!H", checksum) + tcp_header[18:]
    ip_header = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, 6, 0) + source + target
    return ip_header + tcp_header + options


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
    """With different answers to the opt-in the last one counts: plain TCP, no hang."""

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
        assert read_state(server) in {PLAIN_SERVER, OptionState(0)}


# --- with the discovery "local" -----------------------------------------------------


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


# --- several programs, and their end ------------------------------------------------


@case
def attached_twice(room: Room) -> None:
    assert not install.attach(room.cgroup).is_new
    assert len(install.find(room.cgroup)) == 3


@case
def stacked(room: Room) -> None:
    """In a cgroup and in one below it: as if it were once."""
    sniffer = Sniffer()
    with new_cgroup(room.cgroup) as below:
        done = install.attach(below)
        assert (done.is_new, done.foreign) == (True, ())

        def work() -> None:
            enter(below)
            pair = connected(listener(prepare=asks), prepare=asks)
            assert read_state(pair.client) == BOTH_CLIENT
            assert read_state(pair.server) == BOTH_SERVER
            pair.exchange()

        in_child(work)
    segments = sniffer.both_ends()
    carrying = [one for one in segments if one.has_option]
    assert [one.flags for one in carrying] == [SYN, SYN | ACK]
    assert all(len(set(one.options) & {SMC}) == 1 for one in carrying)


def foreign_program(cgroup: Path) -> None:
    """Attach a program that asks for the headers of every socket."""
    a = Assembler("little")
    r1, r2, r6 = Register.R1, Register.R2, Register.R6
    a.move(r6, r1)
    a.load(r2, r6, OP)
    a.jump_if(r2, "==", Op.CONNECT, "all")
    a.jump_if(r2, "==", Op.LISTEN, "all")
    a.jump("end")
    a.label("all")
    a.load(r2, r6, CALLBACK_FLAGS)
    a.bit_or(r2, Callback.WRITE_HEADER)
    a.move(r1, r6)
    a.call(Helper.SOCK_OPS_CB_FLAGS_SET)
    a.label("end")
    a.move(Register.R0, 1)
    a.leave()
    kind, place = ProgramType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS
    program = Bpf().load_program("nosy", kind, place, a.program().code({}))
    directory = os.open(cgroup, os.O_RDONLY)
    Bpf().attach(directory, program, place)
    os.close(directory)
    os.close(program)


@bare
def beside_a_foreign_program(room: Room) -> None:
    """It makes the kernel ask for the options of sockets that did not opt in."""
    foreign_program(room.cgroup)
    done = install.attach(room.cgroup)
    assert [one.name for one in done.foreign] == ["nosy"]
    matrix(room, "IPv4")
    matrix(room, "IPv6")


@case
def detached_while_open(room: Room) -> None:
    pair = connected(listener(prepare=asks), prepare=asks)
    waiting = tcp("127.0.0.1")
    asks(waiting)
    assert install.detach(room.cgroup) == 3
    assert read_state(pair.client) is None
    pair.exchange()
    sniffer = Sniffer()
    plain = listener()
    waiting.connect(plain.getsockname())
    segments = sniffer.until(lambda seen: any(one.is_syn_ack for one in seen))
    assert not any(one.has_option for one in segments)
    assert install.find(room.cgroup) == ()
    assert install.detach(room.cgroup) == 0


@case
def an_older_set_up_is_replaced(room: Room) -> None:
    """One of three is missing, say because somebody detached it."""
    directory = os.open(room.cgroup, os.O_RDONLY)
    bpf = Bpf()
    place = AttachType.CGROUP_SOCK_OPS
    (number,) = bpf.query(directory, place)
    bpf.detach(directory, bpf.program_by_id(number), place)
    assert "incomplete" in try_option().reason
    done = install.attach(room.cgroup)
    assert (done.is_new, done.replaced) == (True, 2)
    assert len(install.find(room.cgroup)) == 3
    assert try_option().works


# --- privileges ---------------------------------------------------------------------

PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 8, 24, 22, 38
CAP_NET_ADMIN, CAP_BPF = 12, 39
BPF_CALL = 321


def become_nobody(capabilities: int = 0) -> None:
    """Drop everything but some capabilities, for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    for number in range(41):
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    assert libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0
    os.setresuid(NOBODY, NOBODY, NOBODY)
    low, high = capabilities & 0xFFFFFFFF, capabilities >> 32
    header = struct.pack("II", 0x20080522, 0)
    assert libc.capset(header, struct.pack("6I", low, low, 0, high, high, 0)) == 0
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    status = Path("/proc/self/status").read_text()
    assert f"CapEff:\t{capabilities:016x}" in status
    assert "CapBnd:\t0000000000000000" in status


def forbid_bpf() -> None:
    """As a container's seccomp filter does: bpf(2) gives EPERM."""
    rows = [
        (0x20, 0, 0, 0),  # load the number of the call
        (0x15, 0, 1, BPF_CALL),
        (0x06, 0, 0, 0x00050000 | errno.EPERM),
        (0x06, 0, 0, 0x7FFF0000),  # allow everything else
    ]
    text = b"".join(struct.pack("HBBI", *row) for row in rows)
    buffer = ctypes.create_string_buffer(text, len(text))
    program = struct.pack("HxxxxxxQ", len(rows), ctypes.addressof(buffer))
    assert libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0) == 0


@case
def without_any_privilege(room: Room) -> None:
    become_nobody()
    if os.uname().machine == "x86_64":
        forbid_bpf()
    with pytest.raises(BpfError) as caught:
        Bpf().load_btf(b"")
    assert caught.value.errno == errno.EPERM
    assert try_option().works
    for bound, to in FAMILIES.values():
        pair = connected(listener(bound, asks), to, asks)
        assert read_state(pair.client) == BOTH_CLIENT
        assert read_state(pair.server) == BOTH_SERVER
        pair.exchange()


@bare
def attach_with_two_capabilities(room: Room) -> None:
    """Exactly CAP_BPF and CAP_NET_ADMIN, not root; seen by `find` again."""

    def set_up() -> None:
        # A service's own cgroup, or one that was delegated.
        os.chown(room.cgroup, NOBODY, NOBODY)
        become_nobody(1 << CAP_NET_ADMIN | 1 << CAP_BPF)
        assert install.attach(room.cgroup).is_new
        assert not install.attach(room.cgroup).is_new
        assert [one.part.name for one in install.find(room.cgroup)] == [
            "sock_ops", "getsockopt", "setsockopt",
        ]  # fmt: skip
        with pytest.raises(BpfError) as caught:
            install.detach(room.cgroup)
        assert caught.value.command == Command.PROG_GET_FD_BY_ID

    in_child(set_up)
    assert try_option().works
    assert install.detach(room.cgroup) == 3


@bare
def attach_with_less(room: Room) -> None:
    for capabilities in (0, 1 << CAP_NET_ADMIN, 1 << CAP_BPF):

        def set_up(capabilities: int = capabilities) -> Any:
            become_nobody(capabilities)
            with pytest.raises(BpfError) as caught:
                install.attach(room.cgroup)
            assert caught.value.errno == errno.EPERM
            return caught.value.command

        failed = in_child(set_up)
        wanted = Command.PROG_LOAD if capabilities == 1 << CAP_BPF else Command.BTF_LOAD
        assert failed == wanted
    assert install.find(room.cgroup) == ()


# --- races --------------------------------------------------------------------------


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


__all__ = ["BARE", "CASES", "FIN"]
