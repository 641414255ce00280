"""Attaching, rights and what is not for the programs, in a real kernel; see `cases`."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.discovery.findings import INCOMPLETE, TOO_LATE
from pysmc.discovery.option import install, sockets
from pysmc.discovery.option.assembler import Assembler, Register
from pysmc.discovery.option.bpf import AttachType, Bpf, BpfError, Command, ProgramType
from pysmc.discovery.option.kernel_numbers import (
    CALLBACK_FLAGS,
    OP,
    Callback,
    Helper,
    Op,
)
from pysmc.discovery.option.sockets import OptionState, opt_in, read_state
from pysmc.discovery.option.trial import try_option
from pysmc.discovery.option_server import OptionServer
from pysmc.discovery.presence import Presence
from tests.discovery.option.cases import (
    BOTH_CLIENT,
    BOTH_SERVER,
    FAMILIES,
    PLAIN_CLIENT,
    PLAIN_SERVER,
    WANT,
    asks,
    bare,
    case,
    matrix,
)
from tests.discovery.option.room import (
    ACK,
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
    from tests.discovery.option.room import Room, Segment

NOBODY = 65534


def is_refused(sock: socket.socket) -> bool:
    try:
        opt_in(sock)
    except OSError as error:
        return error.errno == errno.EPERM
    return False


# --- others are not touched ---------------------------------------------------


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


# --- what is not for it -------------------------------------------------------


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


# --- several programs, and their end ------------------------------------------


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


@bare
def attached_above_an_open_listener(room: Room) -> None:
    """The younger programs do not deny what the older ones have promised."""
    with new_cgroup(room.cgroup) as below:
        install.attach(below)

        def work() -> None:
            enter(below)
            there = listener(prepare=asks)
            install.attach(room.cgroup)
            pair = connected(there, prepare=asks)
            assert read_state(pair.client) == BOTH_CLIENT
            assert read_state(pair.server) == BOTH_SERVER
            with tcp("127.0.0.1") as plain:
                assert read_state(plain) == 0

        in_child(work)


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


@bare
def a_plain_listener_after_one_that_asked(room: Room) -> None:
    """Beside a foreign program: it is not taken for the one before it."""
    foreign_program(room.cgroup)
    install.attach(room.cgroup)
    for bound in ("127.0.0.1", "0.0.0.0"):
        first = listener("127.0.0.1", asks)
        port = first.getsockname()[1]
        pair = connected(first, prepare=asks)
        assert read_state(pair.server) == BOTH_SERVER
        pair.client.close()
        pair.server.recv(1)  # the client's end is the one that waits: the port is free
        pair.close()
        second = tcp(bound)
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        second.bind((bound, port))
        second.listen()
        pair = connected(second, prepare=asks)
        assert read_state(pair.client) == PLAIN_CLIENT
        assert read_state(pair.server) == 0
        pair.close()


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
def detached_or_replaced_before_accept(room: Room) -> None:
    """The client was answered, and the server finds that out all the same."""
    for is_replaced in (True, False):
        server = OptionServer(Presence(lambda: 0.0, is_wanted=True))

        def opens(sock: socket.socket, server: OptionServer = server) -> None:
            server.open(sock, is_able=True)

        listening = listener(prepare=opens)
        client, plain = tcp("127.0.0.1"), tcp("127.0.0.1")
        asks(client)
        for one in (client, plain):
            one.connect(listening.getsockname())
        assert read_state(client) == BOTH_CLIENT
        install.detach(room.cgroup)
        if is_replaced:
            install.attach(room.cgroup)
        conn, other = listening.accept()[0], listening.accept()[0]
        assert read_state(conn) == (OptionState(0) if is_replaced else None)
        assert server.inspect(conn) is None
        assert server.inspect(other) is (TOO_LATE if is_replaced else INCOMPLETE)


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


# --- privileges ---------------------------------------------------------------

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
