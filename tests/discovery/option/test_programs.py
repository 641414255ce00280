"""The rules of the three programs, each as a case, in both byte orders, unprivileged.

The programs' bytes run on a small machine (`interpreter`) with a small kernel around
them (`small_kernel`); the real kernel's word is in `test_real_kernel`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from pysmc.discovery.option import programs
from pysmc.discovery.option.sockets import OptionState
from tests.discovery.option.small_kernel import (
    ACK,
    CONNECT_CB,
    LENGTH_CB,
    LISTEN,
    LISTENERS,
    SMC,
    SOCKETS,
    SYN,
    WRITE_CB,
    WRITE_FLAG,
    Kernel,
    Sock,
    accept,
    answer,
    connect,
    established,
    header,
    listen,
    options_of,
)

WANT, PEER, DONE = OptionState.WANT, OptionState.PEER, OptionState.DONE
MINE, NOSYN, SERVER = OptionState.MINE, OptionState.NOSYN, OptionState.SERVER
MAYBE = OptionState.MAYBE
PLAIN = bytes.fromhex("020405b40402080a00000001000000000103030a")
"""Options of a usual SYN: MSS, SACK, time stamps, window scale."""
PORT = 5001


@pytest.fixture(params=["little", "big"])
def byteorder(request):
    return request.param


@pytest.fixture
def instance(byteorder):
    """The bytes of all three programs."""
    maps = {programs.SOCKETS: SOCKETS, programs.LISTENERS: LISTENERS}
    return {
        "sock_ops": programs.sock_ops(byteorder).code(maps),
        "setsockopt": programs.setsockopt(byteorder, 4096).code(maps),
        "getsockopt": programs.getsockopt(byteorder, 4096).code(maps),
    }


@pytest.fixture
def kernel(byteorder, instance):
    return Kernel(byteorder, [instance])


@pytest.fixture
def one(kernel):
    return kernel.pack("I", 1)


def state(kernel, sock):
    """The state as an application reads it."""
    value = kernel.getsockopt(sock)
    assert isinstance(value, bytes), value
    return OptionState(int.from_bytes(value, kernel.byteorder))


def opted(kernel, sock=None):
    sock = sock or Sock()
    assert kernel.setsockopt(sock, kernel.pack("I", 1)) == 0
    return sock


def pair(kernel, client, server, *, syn_has=PLAIN, cookie=False, strip=False):
    """Connect; gives SYN's and SYN-ACK's option and the accepted socket."""
    if server.state != LISTEN:
        listen(kernel, server, PORT)
    syn = connect(kernel, client)
    arrived = syn_has + (b"" if strip else syn)
    syn_ack = answer(kernel, server, arrived, cookie=cookie)
    child = accept(kernel, server, arrived, kept=not cookie)
    established(kernel, client, PLAIN + syn_ack)
    return syn, syn_ack, child


# --- the matrix ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("client_asks", "server_asks"), [*itertools.product([False, True], repeat=2)]
)
def test_both_have_to_ask(kernel, client_asks, server_asks):
    client, server = Sock(), Sock()
    for sock, asks in ((client, client_asks), (server, server_asks)):
        if asks:
            opted(kernel, sock)
    syn, syn_ack, child = pair(kernel, client, server)
    assert syn == (SMC if client_asks else b"")
    assert syn_ack == (SMC if client_asks and server_asks else b"")
    peer = PEER if client_asks and server_asks else OptionState(0)
    assert state(kernel, client) == (WANT | DONE | peer if client_asks else 0)
    assert state(kernel, child) == (WANT | DONE | SERVER | peer if server_asks else 0)


def test_no_call_for_segments_after_the_handshake(kernel):
    client, server = opted(kernel), opted(kernel)
    *_, child = pair(kernel, client, server)
    before = kernel.calls
    assert header(kernel, client, ACK) == header(kernel, child, ACK) == b""
    assert kernel.calls == before
    assert server.callback_flags & WRITE_FLAG


def test_the_flag_of_somebody_else_stays_on(kernel):
    client, server = opted(kernel), opted(kernel)
    client.callback_flags = server.callback_flags = WRITE_FLAG | 1
    *_, child = pair(kernel, client, server)
    assert client.callback_flags == child.callback_flags == WRITE_FLAG | 1
    assert state(kernel, client) == WANT | PEER | DONE


def test_other_flags_stay_as_they_are(kernel):
    client = opted(kernel)
    client.callback_flags = 0x05
    connect(kernel, client)
    assert client.callback_flags == 0x05 | WRITE_FLAG
    established(kernel, client, PLAIN)
    assert client.callback_flags == 0x05


def test_a_socket_that_did_not_ask_is_not_changed(kernel):
    client, server = Sock(), Sock()
    *_, child = pair(kernel, client, server)
    for sock in (client, server, child):
        assert not sock.storage
        assert sock.callback_flags == 0
        assert not sock.saves_syn
    assert kernel.listeners == [{}]


@pytest.mark.parametrize("op", sorted(set(range(17)) - {3, 4, 5, 11, 14, 15}))
def test_other_reasons_are_not_answered(kernel, op):
    client = opted(kernel)
    before = client.storage[0].bytes()
    assert kernel.call(op, client) == b""
    assert client.storage[0].bytes() == before
    assert client.callback_flags == 0


# --- what happens to a SYN ----------------------------------------------------


@pytest.mark.parametrize("flags", [0, ACK, 0x18, 0x11, 0x04, 0x14])
def test_only_syns_carry_the_option(kernel, flags):
    client = opted(kernel)
    connect(kernel, client)
    assert header(kernel, client, flags) == b""


def test_a_syn_that_is_sent_again_carries_it_too(kernel):
    client = opted(kernel)
    assert connect(kernel, client) == SMC
    assert [header(kernel, client, SYN) for _ in range(3)] == [SMC] * 3


def test_a_syn_ack_that_is_sent_again_carries_it_too(kernel):
    server = opted(kernel)
    listen(kernel, server, PORT)
    assert server.saves_syn
    assert [answer(kernel, server, PLAIN + SMC) for _ in range(3)] == [SMC] * 3


def test_no_room_for_the_option(kernel):
    client = opted(kernel)
    kernel.call(CONNECT_CB, client)
    assert kernel.call(LENGTH_CB, client, tcp_flags=SYN, room=5) == b""


def test_a_syn_cookie_is_plain_tcp(kernel):
    client, server = opted(kernel), opted(kernel)
    syn, syn_ack, child = pair(kernel, client, server, cookie=True)
    assert (syn, syn_ack) == (SMC, b"")
    assert state(kernel, client) == WANT | DONE
    assert state(kernel, child) == WANT | DONE | SERVER | NOSYN


@pytest.mark.parametrize(
    "fast_open",
    [
        "2202",
        "220a0102030405060708",
        "2212" + "aa" * 16,
        "fe04f989",
        "fe0cf98911223344aabbccdd",
    ],
    ids=["request", "cookie", "longest", "old request", "old cookie"],
)
def test_a_fast_open_syn_is_plain_tcp(kernel, fast_open):
    client, server = opted(kernel), opted(kernel)
    has = bytes.fromhex(fast_open)
    syn, syn_ack, child = pair(kernel, client, server, syn_has=has)
    assert (syn, syn_ack) == (SMC, b"")
    assert state(kernel, client) == WANT | DONE
    assert state(kernel, child) == WANT | DONE | SERVER


def test_the_option_stripped_from_the_syn(kernel):
    client, server = opted(kernel), opted(kernel)
    syn, syn_ack, child = pair(kernel, client, server, strip=True)
    assert (syn, syn_ack) == (SMC, b"")
    assert state(kernel, client) == WANT | DONE
    assert state(kernel, child) == WANT | DONE | SERVER


@pytest.mark.parametrize(
    "other",
    ["fe06e2d4c3c4", "fd06e2d4c3d9", "fe08e2d4c3d90000", "fe04e2d4", "fe02"],
    ids=["SMC-D", "kind 253", "longer", "shorter", "empty"],
)
def test_options_that_only_look_like_it(kernel, other):
    server = opted(kernel)
    listen(kernel, server, PORT)
    assert answer(kernel, server, PLAIN + bytes.fromhex(other)) == b""
    client = opted(kernel)
    connect(kernel, client)
    established(kernel, client, PLAIN + bytes.fromhex(other))
    assert state(kernel, client) == WANT | DONE


def test_crossing_syns_are_plain_tcp(kernel):
    """Both sides connect to each other: neither has an answer with the option."""
    client = opted(kernel)
    syn = connect(kernel, client)
    client.state = 1
    kernel.call(5, client, skb=PLAIN + syn)
    assert state(kernel, client) == WANT | DONE


# --- listeners ----------------------------------------------------------------


def test_a_foreign_program_does_not_make_a_plain_listener_answer(kernel):
    """While a SYN is answered only the flag is seen, which may be somebody else's."""
    server = Sock(callback_flags=WRITE_FLAG)
    listen(kernel, server, PORT)
    assert answer(kernel, server, PLAIN + SMC) == b""


def test_a_foreign_program_does_not_make_a_plain_client_ask(kernel):
    client = Sock(callback_flags=WRITE_FLAG)
    assert connect(kernel, client) == b""
    established(kernel, client, PLAIN + SMC)
    assert not client.storage


def test_a_plain_listener_is_not_taken_for_the_last_one_of_its_port(kernel):
    listen(kernel, opted(kernel), PORT)
    plain = Sock(callback_flags=WRITE_FLAG)
    listen(kernel, plain, PORT)
    assert answer(kernel, plain, PLAIN + SMC) == b""


def test_a_client_with_the_port_of_a_listener_does_not_disturb_it(kernel):
    server = opted(kernel)
    listen(kernel, server, PORT)
    for client in (Sock(port=PORT), opted(kernel, Sock(port=PORT))):
        connect(kernel, client)
        assert answer(kernel, server, PLAIN + SMC) == SMC


def test_other_ports_and_namespaces_are_others(kernel):
    server = opted(kernel)
    listen(kernel, server, PORT)
    server.port = PORT + 1
    assert answer(kernel, server, PLAIN + SMC) == b""
    server.port = PORT
    assert answer(kernel, server, PLAIN + SMC) == SMC
    kernel.namespace += 1 << 40
    assert answer(kernel, server, PLAIN + SMC) == b""


def test_a_forgotten_listener_is_plain_tcp_and_known_again_afterwards(kernel):
    """The table of listeners is bounded; what fell out of it must not hang."""
    client, server = opted(kernel), opted(kernel)
    listen(kernel, server, PORT)
    kernel.listeners[0].clear()
    syn, syn_ack, child = pair(kernel, client, server)
    assert (syn, syn_ack) == (SMC, b"")
    assert not state(kernel, client) & PEER
    assert state(kernel, child) == WANT | DONE | SERVER | MAYBE
    assert pair(kernel, opted(kernel), server)[1] == SMC


def test_a_listener_that_is_forgotten_during_a_handshake(kernel):
    client, server = opted(kernel), opted(kernel)
    listen(kernel, server, PORT)
    syn_ack = answer(kernel, server, PLAIN + connect(kernel, client))
    kernel.listeners[0].clear()
    child = accept(kernel, server, PLAIN + SMC)
    established(kernel, client, PLAIN + syn_ack)
    assert state(kernel, client) & PEER
    assert state(kernel, child) == WANT | DONE | SERVER | MAYBE


def test_without_the_option_in_the_syn_nothing_is_in_doubt(kernel):
    server = opted(kernel)
    listen(kernel, server, PORT)
    kernel.listeners[0].clear()
    assert state(kernel, accept(kernel, server, PLAIN)) == WANT | DONE | SERVER
    assert kernel.listeners == [{}]


ADDRESSES = [
    ("127.0.0.1", "127.0.0.9"),
    ("::1", "::2"),
    ("1:2:3:4:5:6:7:8", "1:2:3:9:5:6:7:8"),
    ("::ffff:127.0.0.1", "::ffff:127.0.0.9"),
    ("127.0.0.1", "::1"),
    ("127.0.0.1", "::"),
    ("0.0.0.0", "::"),
]


@pytest.mark.parametrize(("own", "other"), ADDRESSES)
def test_a_plain_listener_of_another_address_disturbs_nobody(kernel, own, other):
    """Whoever may listen there; one that opted in is not followed by it."""
    client, server = opted(kernel), opted(kernel, Sock(address=own))
    listen(kernel, server, PORT)
    syn_ack = answer(kernel, server, PLAIN + connect(kernel, client))
    plain = Sock(address=other, callback_flags=WRITE_FLAG)
    listen(kernel, plain, PORT)
    child = accept(kernel, server, PLAIN + SMC)
    established(kernel, client, PLAIN + syn_ack)
    assert state(kernel, client) == WANT | DONE | PEER
    assert state(kernel, child) == WANT | DONE | SERVER | PEER
    assert answer(kernel, plain, PLAIN + SMC) == b""
    assert answer(kernel, server, PLAIN + SMC) == SMC


@pytest.mark.parametrize(
    ("own", "everywhere"),
    [("127.0.0.1", "0.0.0.0"), ("::1", "::"), ("::ffff:127.0.0.1", "::")],
)
@pytest.mark.parametrize("is_forgotten", [False, True])
def test_a_plain_listener_of_all_addresses_is_not_taken_for_one_of_a_single(
    kernel, own, everywhere, is_forgotten
):
    """It has the connections of one that has ended, and they carry its address."""
    first = opted(kernel, Sock(address=own))
    listen(kernel, first, PORT)
    if is_forgotten:
        kernel.listeners[0].clear()
        accept(kernel, first, PLAIN + SMC)
    for _ in range(2):
        plain = Sock(address=everywhere, callback_flags=WRITE_FLAG)
        listen(kernel, plain, PORT)
        assert answer(kernel, plain, PLAIN + SMC, to=own) == b""
        kernel.now += 1000
        again = opted(kernel, Sock(address=own))
        listen(kernel, again, PORT)
        assert answer(kernel, again, PLAIN + SMC) == SMC
        child = accept(kernel, again, PLAIN + SMC)
        assert state(kernel, child) == WANT | DONE | SERVER | PEER
        kernel.now += 1000


def test_plain_listeners_of_all_addresses_take_no_place_in_the_table(kernel):
    listen(kernel, opted(kernel), PORT)
    before = dict(kernel.listeners[0])
    listen(kernel, Sock(address="0.0.0.0"), PORT + 1)
    listen(kernel, Sock(address="::"), PORT)
    assert kernel.listeners == [before]


@pytest.mark.parametrize(
    ("everywhere", "to"),
    [("0.0.0.0", "192.0.2.7"), ("::", "2001:db8::7"), ("::", "::ffff:192.0.2.7")],
)
def test_a_listener_of_all_addresses(kernel, everywhere, to):
    server = opted(kernel, Sock(address=everywhere))
    listen(kernel, server, PORT)
    assert answer(kernel, server, PLAIN + SMC, to=to) == SMC
    child = accept(kernel, server, PLAIN + SMC, to=to)
    assert state(kernel, child) == WANT | DONE | SERVER | PEER
    # One of a single address has its connections; it did not ask.
    plain = Sock(address=to, callback_flags=WRITE_FLAG)
    listen(kernel, plain, PORT)
    assert answer(kernel, plain, PLAIN + SMC) == b""
    other = to.replace("7", "8")
    assert answer(kernel, server, PLAIN + SMC, to=other) == SMC


def test_a_plain_listener_of_the_same_address_in_the_middle_of_a_handshake(kernel):
    """Whether the first one's client was answered is in doubt, but not for ever."""
    client, server = opted(kernel), opted(kernel)
    listen(kernel, server, PORT)
    syn_ack = answer(kernel, server, PLAIN + connect(kernel, client))
    listen(kernel, Sock(), PORT)
    kernel.now += 63_000_000_000
    listen(kernel, Sock(), PORT)
    child = accept(kernel, server, PLAIN + SMC)
    established(kernel, client, PLAIN + syn_ack)
    assert state(kernel, client) & PEER
    assert state(kernel, child) == WANT | DONE | SERVER | MAYBE
    kernel.now += 2_000_000_000
    assert answer(kernel, server, PLAIN + SMC) == b""
    child = accept(kernel, server, PLAIN + SMC)
    assert state(kernel, child) == WANT | DONE | SERVER
    listen(kernel, opted(kernel), PORT)
    assert answer(kernel, server, PLAIN + SMC) == SMC


# --- connecting again ---------------------------------------------------------


def test_a_connect_that_failed_can_be_tried_again(kernel):
    """The flag is still on from the first time, and still ours to switch off."""
    client, server = opted(kernel), opted(kernel)
    assert connect(kernel, client) == SMC
    client.state = 7
    assert pair(kernel, client, server)[:2] == (SMC, SMC)
    assert state(kernel, client) == WANT | PEER | DONE
    assert client.callback_flags == 0


def test_after_a_disconnect_the_old_result_is_gone(kernel):
    client, server = opted(kernel), opted(kernel)
    pair(kernel, client, server)
    client.state = 7
    assert connect(kernel, client) == SMC
    assert state(kernel, client) == WANT | MINE
    established(kernel, client, PLAIN)
    assert state(kernel, client) == WANT | DONE


def test_opting_out_before_the_second_try(kernel):
    client = opted(kernel)
    connect(kernel, client)
    client.state = 7
    assert kernel.setsockopt(client, kernel.pack("I", 0)) == 0
    assert state(kernel, client) == MINE
    assert connect(kernel, client) == b""
    established(kernel, client, PLAIN + SMC)
    assert state(kernel, client) == MINE
    client.state = 7
    listen(kernel, client, PORT)
    assert kernel.listeners == [{}]


def test_who_opted_out_is_as_if_never_in(kernel):
    client, server = opted(kernel), opted(kernel)
    for sock in (client, server):
        assert kernel.setsockopt(sock, kernel.pack("I", 0)) == 0
    listen(kernel, server, PORT)
    assert connect(kernel, client) == b""
    assert (client.callback_flags, server.callback_flags) == (0, 0)
    assert not server.saves_syn
    assert kernel.listeners == [{}]
    established(kernel, client, PLAIN + SMC)
    assert state(kernel, client) == state(kernel, server) == 0


# --- several instances --------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_stacked_instances_behave_like_one(byteorder, instance, count):
    kernel = Kernel(byteorder, [instance] * count)
    client, server = opted(kernel), opted(kernel)
    syn, syn_ack, child = pair(kernel, client, server)
    assert (syn, syn_ack) == (SMC, SMC)
    assert state(kernel, client) == WANT | PEER | DONE
    assert state(kernel, child) == WANT | PEER | DONE | SERVER
    assert client.callback_flags == child.callback_flags == 0
    assert options_of(syn) == [SMC]


@pytest.mark.parametrize("is_asked_first", [True, False])
def test_an_older_instance_is_still_heard(byteorder, instance, is_asked_first):
    """One came while a listener was open: it must not deny what the other promised."""
    kernel = Kernel(byteorder, [instance])
    client, server = opted(kernel), opted(kernel)
    syn, syn_ack, child = pair(kernel, client, server)
    assert (syn, syn_ack) == (SMC, SMC)
    kernel.programs.append(instance)
    kernel.listeners.append({})
    if not is_asked_first:
        kernel.programs.reverse()
        for sock in (client, child):
            sock.storage = {1: sock.storage[0]}
    assert state(kernel, client) == WANT | PEER | DONE
    assert state(kernel, child) == WANT | PEER | DONE | SERVER
    assert kernel.getsockopt(Sock()) == bytes(4)
    assert kernel.getsockopt(child, 3) == "EPERM"


def test_a_listener_that_only_the_upper_instance_sees(byteorder, instance):
    """The lower one goes on to answer clients, and what it says of them stands."""
    kernel = Kernel(byteorder, [instance, instance])
    server = opted(kernel)
    listen(kernel, server, PORT)
    below = dict(kernel.listeners[0])
    listen(kernel, Sock(), PORT)
    kernel.listeners[0] = below
    for seconds in (1, 70):
        kernel.now += seconds * 1_000_000_000
        syn_ack = answer(kernel, server, PLAIN + SMC)
        child = accept(kernel, server, PLAIN + SMC)
        assert syn_ack == SMC
        assert state(kernel, child) & PEER


# --- setsockopt ---------------------------------------------------------------


def test_the_first_bit_decides(kernel):
    sock = Sock()
    for value, expected in ((1, WANT), (0, 0), (3, WANT), (0xFFFFFFFE, 0)):
        assert kernel.setsockopt(sock, kernel.pack("I", value)) == 0
        assert state(kernel, sock) == expected


@pytest.mark.parametrize("tcp_state", [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12])
def test_too_late(kernel, one, tcp_state):
    sock = Sock(state=tcp_state)
    assert kernel.setsockopt(sock, one) == "EPERM"
    assert not sock.storage


@pytest.mark.parametrize("protocol", [0, 17, 132, 256, 262])
def test_not_plain_tcp(kernel, one, protocol):
    sock = Sock(protocol=protocol)
    assert kernel.setsockopt(sock, one) == "EPERM"
    assert kernel.getsockopt(sock) == "kernel(4, -92)"
    assert kernel.getsockopt(sock, name=2) == "kernel(4, -92)"
    assert not sock.storage


def test_no_memory_for_the_state(kernel, one):
    kernel.has_memory = False
    assert kernel.setsockopt(Sock(), one) == "EPERM"


@pytest.mark.parametrize("value", [b"", b"\1", b"\1\0\0", bytes(5), bytes(8)])
def test_a_value_of_another_length(kernel, value):
    assert kernel.setsockopt(Sock(), value) == "EPERM"


@pytest.mark.parametrize(("level", "name"), [(6, 1), (1, 1), (0, 7), (0x534D4352, 3)])
def test_options_of_others_reach_the_kernel_as_they_are(kernel, level, name):
    sock = Sock()
    for length in (0, 1, 4, 100, 4096):
        assert (
            kernel.setsockopt(sock, bytes(length), level, name) == f"kernel({length})"
        )
        found = kernel.getsockopt(sock, length, level, name)
        assert found == f"kernel({length}, -92)"
    assert not sock.storage


def test_buffers_longer_than_a_page_are_the_callers_own(kernel):
    """Of these a program sees the first page only; 0 makes the kernel use the whole."""
    sock = Sock()
    assert kernel.setsockopt(sock, bytes(4097), 6, 1) == "kernel(0)"
    assert kernel.getsockopt(sock, 5000, 6, 1) == "kernel(0, -92)"


# --- getsockopt ---------------------------------------------------------------


def test_the_version(kernel):
    assert kernel.getsockopt(Sock(), name=2) == kernel.pack("I", 1)


def test_a_longer_buffer_gets_four_bytes(kernel):
    assert kernel.getsockopt(opted(kernel), room=100) == kernel.pack("I", WANT)


@pytest.mark.parametrize("room", [0, 1, 3])
def test_too_short_a_buffer(kernel, room):
    """The program's own buffer has 16 bytes; what the caller said counts."""
    assert kernel.getsockopt(opted(kernel), room=room) == "EPERM"


def test_the_state_of_a_socket_that_listens(kernel):
    server = opted(kernel)
    listen(kernel, server, PORT)
    assert state(kernel, server) == WANT | MINE | SERVER


def test_length_and_bytes_are_two_calls(kernel):
    client = opted(kernel)
    kernel.call(CONNECT_CB, client)
    assert len(kernel.call(LENGTH_CB, client, tcp_flags=SYN)) == len(SMC)
    assert kernel.call(WRITE_CB, client, tcp_flags=SYN) == SMC


def after(one, at: int) -> list[int]:
    """Say where an instruction may lead to, whatever the values are."""
    if one.opcode == 0x95:
        return []
    if one.opcode == 0x05:
        return [at + 1 + one.offset]
    if one.opcode & 7 in {5, 6} and one.opcode != 0x85:
        return [at + 1, at + 1 + one.offset]
    return [at + 2 if one.opcode == 0x18 else at + 1]


def reads_before_writes(program) -> list[str]:
    """Find calls that read the stack where it was not written, on whatever way.

    Every condition is taken to hold and not to hold: so the verifier of a kernel before
    6.16 goes, for whoever lacks CAP_PERFMON, where a processor may guess.
    """
    code, found = program.instructions, set()
    arguments = range(programs.R1, programs.R5 + 1)
    ways: list[tuple[int, frozenset[int], tuple[Any, ...]]] = [(0, frozenset(), ())]
    seen = set(ways)
    while ways:
        at, written, pointers = ways.pop()
        one, places = code[at], dict(pointers)
        match one.opcode:
            case 0x7B if one.to == programs.R10:
                written |= {one.offset}
            case 0xBF if one.source == programs.R10:
                places[one.to] = 0
            case 0x07 if one.to in places:
                places[one.to] += one.value
            case 0x85:
                unwritten = {places.get(n, 0) for n in arguments} - written - {0}
                found |= {f"{at}: {one.words} reads {place}" for place in unwritten}
                places = {}
        for step in after(one, at):
            way = (step, written, tuple(sorted(places.items())))
            if way not in seen:
                seen.add(way)
                ways.append(way)
    return sorted(found)


def test_no_way_that_a_processor_may_guess_reads_the_stack_too_soon(byteorder):
    for program in (
        programs.sock_ops(byteorder),
        programs.setsockopt(byteorder, 4096),
        programs.getsockopt(byteorder, 4096),
    ):
        assert reads_before_writes(program) == []
