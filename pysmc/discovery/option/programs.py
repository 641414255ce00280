"""The three programs: one sets and reads the option, two answer the socket options.

Decides what the kernel does with a socket that asked for the SMC option, and that it
does nothing with any other. A state of `OptionState` bits is kept with each socket that
asked, in the map ``sockets``, and dies with it; a connection inherits the state of its
listener. The map ``listeners`` has an entry for each listener that asked: while a
SYN is answered there is no socket yet to ask for its state, and the flag that makes the
kernel call this program may have been set by somebody else's. An entry may go between
a SYN-ACK and the end of the handshake; then the state says that it is not known what
the client was shown.

* `sock_ops` runs when a socket connects or listens, for SYN and SYN-ACK, and when a
  connection is established.
* `setsockopt` and `getsockopt` run for every such call in the cgroup, and pass on what
  is not for them.

Every rule that looks odd was found by a hang or a refusal without it; it says so.

Source: RFC 7609 section 3.1 and A.1; include/uapi/linux/bpf.h (numbers and layouts),
Documentation/bpf/prog_cgroup_sockopt.rst; kernel counterpart: net/core/filter.c
(bpf_sock_ops_load_hdr_opt and its siblings), tcp_output.c (bpf_skops_hdr_opt_len).
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

from pysmc.discovery.option.assembler import Assembler, Field, Register
from pysmc.discovery.option.kernel_numbers import (
    ARGUMENT,
    CALLBACK_FLAGS,
    CREATE,
    FAMILY,
    FROM_SAVED_SYN,
    LENGTH,
    LOCAL_IP4,
    LOCAL_IP6,
    LOCAL_PORT,
    NAME,
    NEW,
    OP,
    PROTOCOL,
    RESULT,
    SOCKET,
    SOCKET_STATE,
    SOCKOPT_LEVEL,
    SOCKOPT_SOCKET,
    SYN_COOKIE,
    TCP_FLAGS,
    VALUE,
    VALUE_END,
    Callback,
    Flag,
    Helper,
    Op,
    Tcp,
)
from pysmc.discovery.option.sockets import ABI, ABI_VERSION, LEVEL, STATE, OptionState

if TYPE_CHECKING:
    from pysmc.discovery.option.assembler import ByteOrder, Program

__all__ = [
    "KEY_BYTES",
    "LISTENERS",
    "OPTION",
    "SOCKETS",
    "getsockopt",
    "setsockopt",
    "sock_ops",
]

R0, R1, R2, R3, R4, R5 = list(Register)[:6]
R6, R7, R8, R9, R10 = list(Register)[6:]

SOCKETS: Final = "sockets"
"""Map: the state of each socket that asked, 4 bytes, kept with the socket."""
LISTENERS: Final = "listeners"
"""Map: when each listener that asked began, or the one that followed it; 8 bytes.

A time in nanoseconds, whose lowest bit is set (`FOLLOWED`) when the last one did not
ask. For a while after that a client may still answer what the one before sent. The key
is network namespace, port, family and local address. Of all addresses the bit alone may
stand there: it says that there is something for a single address.
"""
OPTION: Final = bytes.fromhex("fe06e2d4c3d9")
"""The SMC option: experimental kind 254, 6 bytes, the eyecatcher (RFC 7609 A.1)."""
FAST_OPEN_KIND: Final = 34
"""TCP Fast Open (RFC 7413 section 4.1.1)."""
OLD_FAST_OPEN: Final = bytes.fromhex("fe04f989")
"""The same in its experimental form, with which Linux tries again."""


HANDSHAKE_NS: Final = 64_000_000_000
"""As long a handshake may last: tcp_synack_retries is 5, which ends after 63 s."""
FOLLOWED: Final = 1
"""In a value of the map of listeners: the last one did not ask."""
# what a pointer into a map or to a value leads to
NUMBER = Field("u32", 0, 4)
TIME = Field("u64", 0, 8)
# the stack: each slot is written by one store of 8 bytes (`Assembler.load_bytes`)
SCRATCH = Field("option", -8, 8)
KEY_BYTES: Final = 56
KEY = [
    Field(f"key.{name}", 8 * n - 8 - KEY_BYTES, 8)
    for n, name in enumerate(
        ("namespace", "port", "family", "ip[0]", "ip[1]", "ip[2]", "ip[3]")
    )
]
"""Of a listener at one address."""
ANY = [Field(f"any.{one.name[4:]}", one.offset - KEY_BYTES, 8) for one in KEY]
"""Of one at all addresses: they are 0."""
SINGLE = Field("single", ANY[0].offset - 8, 8)
EVERYWHERE = Field("everywhere", ANY[0].offset - 16, 8)
"""What the map has for both."""

WANT, PEER, DONE = OptionState.WANT, OptionState.PEER, OptionState.DONE
MINE, NOSYN, SERVER = OptionState.MINE, OptionState.NOSYN, OptionState.SERVER
MAYBE = OptionState.MAYBE


# --- sock_ops ----------------------------------------------------------------------


def sock_ops(byteorder: ByteOrder) -> Program:
    """Assemble the program that sets and reads the option."""
    a = Assembler(byteorder)
    a.rule("Only six of the reasons for a call matter. The reply is never written.")
    a.move(R6, R1)
    a.load(R7, R6, OP)
    a.jump_if(R7, "==", Op.HEADER_LENGTH, "header")
    a.jump_if(R7, "==", Op.WRITE_HEADER, "header")
    a.jump_if(R7, "==", Op.CONNECT, "begin")
    a.jump_if(R7, "==", Op.LISTEN, "begin")
    a.jump_if(R7, "==", Op.ACTIVE_ESTABLISHED, "established")
    a.jump_if(R7, "==", Op.PASSIVE_ESTABLISHED, "established")
    a.jump("done")
    _begin(a)
    _header(a)
    _established(a)
    a.label("done")
    a.move(R0, 1)
    a.leave()
    return a.program()


def _begin(a: Assembler) -> None:
    """A socket connects or listens."""
    a.label("begin")
    # Made before it is asked who calls: without CAP_PERFMON the verifier also follows
    # the way that a processor may guess, from here to the last lines of "listen".
    _make_key(a, "begin")
    _load_state(a, otherwise="plain")
    a.rule(
        """Begin anew, but remember that the flag is ours: after a connect that failed
        it is still on. If it is on and not ours, it is not ours to switch off."""
    )
    a.bit_and(R8, WANT | MINE)
    a.load(R2, R6, CALLBACK_FLAGS)
    a.jump_if(R2, "&", Callback.WRITE_HEADER, "flag_is_on")
    a.bit_or(R8, MINE)
    a.label("flag_is_on")
    a.store(R9, NUMBER, R8)
    a.jump_if(R7, "!=", Op.LISTEN, "begun")
    a.bit_or(R8, SERVER)
    a.store(R9, NUMBER, R8)
    a.rule(
        """Keep the SYN: without it nothing is known when the connection is established,
        nor when the SYN-ACK is sent again. Clients come already, and there may be an
        entry of whoever listened here before: so this is long before the flag. Whoever
        does it before listen() is safe from a SYN that is answered and was not kept."""
    )
    a.load_u32(R1, 1)
    a.store(R10, SCRATCH, R1)
    a.move(R1, R6)
    a.move(R2, Tcp.PROTOCOL)
    a.move(R3, Tcp.SAVE_SYN)
    _point(a, R4, SCRATCH)
    a.move(R5, 4)
    a.call(Helper.SETSOCKOPT)
    a.rule("Enter the listener.")
    _enter_asking(a)
    a.label("begun")
    a.load(R2, R6, CALLBACK_FLAGS)
    a.bit_or(R2, Callback.WRITE_HEADER)
    a.move(R1, R6)
    a.call(Helper.SOCK_OPS_CB_FLAGS_SET)
    a.jump("done")
    a.label("plain")
    a.rule(
        """A listener that did not ask must not be taken for the last one of its
        address, nor for one of all addresses. Clients of that one may still be on
        their way."""
    )
    a.jump_if(R7, "!=", Op.LISTEN, "done")
    _find_listener(a, "plain")
    a.rule(
        """One of all addresses comes after those of single ones too: of whatever there
        is for all, it is the last."""
    )
    a.load(R1, R10, EVERYWHERE)
    for word in KEY[3:]:
        a.load(R3, R10, word)
        a.jump_if(R3, "!=", 0, "plain_one")
    a.jump_if(R1, "==", 0, "done")
    a.jump("plain_last")
    a.label("plain_one")
    a.jump_if(R0, "==", 0, "done")
    a.jump_if(R0, "&", FOLLOWED, "done")
    a.label("plain_last")
    a.call(Helper.KTIME_GET_NS)
    a.bit_or(R0, FOLLOWED)
    _enter(a, R0)
    a.jump("done")


def _header(a: Assembler) -> None:
    """A segment is built: how long are its options, and what are they."""
    a.label("header")
    a.rule(
        """Only SYN and SYN-ACK. The flags are 0 when the kernel asks ahead of a segment
        how much room it will have."""
    )
    a.load(R2, R6, TCP_FLAGS)
    a.jump_if(R2, "&", Flag.SYN, "syn")
    a.jump("done")
    a.label("syn")
    a.jump_if(R2, "&", Flag.ACK, "answer")
    _load_state(a, otherwise="done")
    a.jump("put")
    a.label("answer")
    a.rule("A SYN cookie: nothing of this SYN will be known later.")
    a.load(R2, R6, ARGUMENT)
    a.jump_if(R2, "==", SYN_COOKIE, "done")
    a.rule(
        """A listener that did not ask: its state cannot be seen here, and the flag that
        brought us here may be another program's."""
    )
    _make_key(a, "answer")
    _find_listener(a, "answer")
    a.jump_if(R0, "==", 0, "done")
    a.jump_if(R0, "&", FOLLOWED, "done")
    _ask_syn(a, otherwise="done")
    a.label("put")
    a.rule("Room first; the bytes in the second call.")
    a.jump_if(R7, "==", Op.WRITE_HEADER, "write")
    a.move(R1, R6)
    a.move(R2, len(OPTION))
    a.move(R3, 0)
    a.call(Helper.RESERVE_HDR_OPT)
    a.jump("done")
    a.label("write")
    a.load_bytes(R1, OPTION)
    a.store(R10, SCRATCH, R1)
    a.move(R1, R6)
    _point(a, R2, SCRATCH)
    a.move(R3, len(OPTION))
    a.move(R4, 0)
    a.call(Helper.STORE_HDR_OPT)
    a.jump("done")


def _established(a: Assembler) -> None:
    """The handshake of TCP is over."""
    a.label("established")
    _load_state(a, otherwise="done")
    a.bit_or(R8, DONE)
    a.jump_if(R7, "==", Op.PASSIVE_ESTABLISHED, "accepted")
    a.rule("A client: look into the SYN-ACK that is just being processed.")
    _search(a, OPTION, where=0)
    a.jump_if(R0, "s<", 0, "settle")
    a.bit_or(R8, PEER)
    a.jump("settle")
    a.label("accepted")
    a.rule("Both ends connected: neither has answered the other.")
    a.move(R2, R8)
    a.bit_and(R2, SERVER)
    a.jump_if(R2, "==", 0, "settle")
    a.rule("A server: the peer takes part if our SYN-ACK had the option.")
    # As in "begin": before the conditions.
    _make_key(a, "accepted")
    _ask_syn(a, otherwise="no_peer")
    a.rule("So it had, if the listener is still known.")
    _find_listener(a, "accepted")
    a.jump_if(R0, "==", 0, "forgotten")
    a.jump_if(R0, "&", FOLLOWED, "followed")
    a.bit_or(R8, PEER)
    a.jump("settle")
    a.label("followed")
    a.rule("A listener that did not ask came, perhaps in the middle of the handshake.")
    a.load_u64(R1, HANDSHAKE_NS)
    a.add(R1, R0)
    a.store(R10, SCRATCH, R1)
    a.call(Helper.KTIME_GET_NS)
    a.load(R2, R10, SCRATCH)
    a.jump_if(R0, ">", R2, "settle")
    a.bit_or(R8, MAYBE)
    a.jump("settle")
    a.label("forgotten")
    a.rule("The table was full: nobody knows when it went. The next client finds it.")
    a.bit_or(R8, MAYBE)
    _enter_asking(a)
    a.jump("settle")
    a.label("no_peer")
    a.jump_if(R0, "!=", -errno.ENOENT, "settle")
    a.bit_or(R8, NOSYN)
    a.label("settle")
    a.rule("No call for each segment from now on, unless the flag is somebody else's.")
    a.move(R2, R8)
    a.bit_and(R8, WANT | PEER | DONE | NOSYN | SERVER | MAYBE)
    a.store(R9, NUMBER, R8)
    a.jump_if(R2, "&", MINE, "flag_off")
    a.jump("done")
    a.label("flag_off")
    a.load(R2, R6, CALLBACK_FLAGS)
    a.bit_and(R2, ~int(Callback.WRITE_HEADER))
    a.move(R1, R6)
    a.call(Helper.SOCK_OPS_CB_FLAGS_SET)


def _load_state(a: Assembler, *, otherwise: str) -> None:
    """Load the state to r8 and its place to r9, of a socket that asked."""
    a.rule("A socket that did not ask is left alone.")
    a.load(R2, R6, SOCKET)
    a.jump_if(R2, "==", 0, otherwise)
    a.load_map(R1, SOCKETS)
    a.move(R3, 0)
    a.move(R4, 0)
    a.call(Helper.SK_STORAGE_GET)
    a.jump_if(R0, "==", 0, otherwise)
    a.move(R9, R0)
    a.load(R8, R9, NUMBER)
    a.move(R2, R8)
    a.bit_and(R2, WANT)
    a.jump_if(R2, "==", 0, otherwise)


def _ask_syn(a: Assembler, *, otherwise: str) -> None:
    """Go on at ``otherwise`` if the SYN is not to be answered with the option."""
    a.rule(
        """A fast-open SYN: its connection is established, and our flag off, before the
        SYN-ACK is built; so one side would have the option and the other not."""
    )
    for option in (bytes([FAST_OPEN_KIND, 0]), OLD_FAST_OPEN):
        _search(a, option, where=FROM_SAVED_SYN)
        a.jump_if(R0, "!=", -errno.ENOMSG, otherwise)
    a.rule("The SYN has the option. Where no SYN was kept, r0 is -ENOENT.")
    _search(a, OPTION, where=FROM_SAVED_SYN)
    a.jump_if(R0, "s<", 0, otherwise)


def _search(a: Assembler, option: bytes, *, where: int) -> None:
    """Look for an option; r0 is its length, or the negative number of an error."""
    a.load_bytes(R1, option)
    a.store(R10, SCRATCH, R1)
    a.move(R1, R6)
    _point(a, R2, SCRATCH)
    a.move(R3, len(option))
    a.move(R4, where)
    a.call(Helper.LOAD_HDR_OPT)


def _make_key(a: Assembler, place: str) -> None:
    """Put the keys of this listener onto the stack: of its address, and of all.

    A request and a connection have the family of their listener, so IPv4 of a listener
    of both versions has an address of IPv6.
    """
    namespace, port, family, *words = range(len(KEY))
    a.rule("Who listens: at this address, and at all of them.")
    a.move(R1, R6)
    a.call(Helper.GET_NETNS_COOKIE)
    _put(a, namespace, R0)
    a.load(R1, R6, LOCAL_PORT)
    _put(a, port, R1)
    a.load(R2, R6, FAMILY)
    _put(a, family, R2)
    a.move(R1, 0)
    for word in words:
        _put(a, word, R1)
    a.rule("The address, of the version that the listener has.")
    a.jump_if(R2, "==", socket.AF_INET, f"{place}_ipv4")
    for word, member in zip(words, LOCAL_IP6, strict=True):
        a.load(R1, R6, member)
        a.store(R10, KEY[word], R1)
    a.jump(f"{place}_key")
    a.label(f"{place}_ipv4")
    a.load(R1, R6, LOCAL_IP4)
    a.store(R10, KEY[words[0]], R1)
    a.label(f"{place}_key")


def _put(a: Assembler, number: int, value: Register) -> None:
    a.store(R10, KEY[number], value)
    a.store(R10, ANY[number], value)


def _find_listener(a: Assembler, place: str) -> None:
    """Look for the entries of this address and of all; r0 is a value, or 0.

    A listener of all addresses that did not ask may have come after one of a single
    address that did, and has ended: the later one counts.
    """
    a.rule("The entry of its address, or of all addresses if that did not ask later.")
    for key, slot in ((KEY, SINGLE), (ANY, EVERYWHERE)):
        a.move(R1, 0)
        a.store(R10, slot, R1)
        a.load_map(R1, LISTENERS)
        _point(a, R2, key[0])
        a.call(Helper.MAP_LOOKUP_ELEM)
        a.jump_if(R0, "==", 0, f"{place}_{slot.name}_is_read")
        a.load(R1, R0, TIME)
        a.store(R10, slot, R1)
        a.label(f"{place}_{slot.name}_is_read")
    a.load(R0, R10, EVERYWHERE)
    a.load(R1, R10, SINGLE)
    a.jump_if(R1, "==", 0, f"{place}_chosen")
    a.jump_if(R0, "&", FOLLOWED, f"{place}_compare")
    a.jump(f"{place}_single")
    a.label(f"{place}_compare")
    a.jump_if(R0, ">", R1, f"{place}_chosen")
    a.label(f"{place}_single")
    a.move(R0, R1)
    a.label(f"{place}_chosen")
    a.jump_if(R0, "!=", FOLLOWED, f"{place}_found")
    a.move(R0, 0)
    a.label(f"{place}_found")


def _enter_asking(a: Assembler) -> None:
    """Enter this listener, which asked, and that there is something for its port."""
    a.call(Helper.KTIME_GET_NS)
    a.bit_and(R0, ~FOLLOWED)
    _enter(a, R0)
    a.load_u64(R1, FOLLOWED)
    a.store(R10, SCRATCH, R1)
    _update(a, ANY, NEW)


def _enter(a: Assembler, value: Register) -> None:
    """Enter this listener, with a value."""
    a.store(R10, SCRATCH, value)
    _update(a, KEY, 0)


def _update(a: Assembler, key: list[Field], flags: int) -> None:
    a.load_map(R1, LISTENERS)
    _point(a, R2, key[0])
    _point(a, R3, SCRATCH)
    a.move(R4, flags)
    a.call(Helper.MAP_UPDATE_ELEM)


def _point(a: Assembler, to: Register, slot: Field) -> None:
    """Point a register to a slot of the stack."""
    a.move(to, R10)
    a.add(to, slot.offset)


# --- setsockopt and getsockopt -------------------------------------------------------


def setsockopt(byteorder: ByteOrder, page_bytes: int) -> Program:
    """Assemble the program that takes the opt-in.

    Args:
        byteorder: The machine's.
        page_bytes: The size of its pages.
    """
    a = Assembler(byteorder)
    _take_ours(a)
    a.jump_if(R2, "!=", STATE, "others")
    a.rule("Plain TCP, neither listening nor connected; otherwise EPERM.")
    a.load(R7, R6, SOCKOPT_SOCKET)
    a.jump_if(R7, "==", 0, "refuse")
    a.load(R2, R7, PROTOCOL)
    a.jump_if(R2, "!=", Tcp.PROTOCOL, "refuse")
    a.load(R2, R7, SOCKET_STATE)
    a.jump_if(R2, "!=", Tcp.CLOSE, "refuse")
    a.rule(
        """4 bytes. -1 is what we leave for the next program of the chain, which may be
        ours again: attached to a parent cgroup as well, or twice."""
    )
    a.load(R2, R6, LENGTH)
    a.jump_if(R2, "==", 4, "value")
    a.jump_if(R2, "!=", -1, "refuse", bits=32)
    a.label("value")
    a.load(R8, R6, VALUE)
    a.load(R3, R6, VALUE_END)
    a.move(R2, R8)
    a.add(R2, 4)
    a.jump_if(R2, ">", R3, "refuse")
    a.load(R8, R8, NUMBER)
    a.load_map(R1, SOCKETS)
    a.move(R2, R7)
    a.move(R3, 0)
    a.move(R4, CREATE)
    a.call(Helper.SK_STORAGE_GET)
    a.jump_if(R0, "==", 0, "refuse")
    a.rule("Want or not; whose the flag is stays known.")
    a.load(R2, R0, NUMBER)
    a.bit_and(R2, MINE)
    a.bit_and(R8, WANT)
    a.bit_or(R2, R8)
    a.store(R0, NUMBER, R2)
    a.rule("Taken: the kernel need not look at it.")
    a.move(R2, -1)
    a.store(R6, LENGTH, R2)
    a.move(R0, 1)
    a.leave()
    a.label("refuse")
    a.move(R0, 0)
    a.leave()
    _pass_on_others(a, page_bytes)
    return a.program()


def getsockopt(byteorder: ByteOrder, page_bytes: int) -> Program:
    """Assemble the program that gives the state, and the version of all this.

    Args:
        byteorder: The machine's.
        page_bytes: The size of its pages.
    """
    a = Assembler(byteorder)
    _take_ours(a)
    a.rule("Plain TCP; the kernel's own answer stands for everything else.")
    a.load(R7, R6, SOCKOPT_SOCKET)
    a.jump_if(R7, "==", 0, "others")
    a.load(R3, R7, PROTOCOL)
    a.jump_if(R3, "!=", Tcp.PROTOCOL, "others")
    a.move(R8, ABI_VERSION)
    a.jump_if(R2, "==", ABI, "answer")
    a.jump_if(R2, "!=", STATE, "others")
    a.rule(
        """A socket that never asked has no state: 0. What it asked a set-up that is
        older than this one, here or below, has been answered already: that stands."""
    )
    a.move(R8, 0)
    a.load_map(R1, SOCKETS)
    a.move(R2, R7)
    a.move(R3, 0)
    a.move(R4, 0)
    a.call(Helper.SK_STORAGE_GET)
    a.jump_if(R0, "!=", 0, "known")
    a.load(R2, R6, RESULT)
    a.jump_if(R2, "==", 0, "pass")
    a.jump("answer")
    a.label("known")
    a.load(R8, R0, NUMBER)
    a.load(R5, R6, RESULT)
    a.jump_if(R5, "!=", 0, "answer")
    a.rule(
        """What a set-up below has said of the peer stands: a listener that follows is
        perhaps seen by this one alone, and the other has answered clients since."""
    )
    a.load(R3, R6, VALUE)
    a.load(R4, R6, VALUE_END)
    a.move(R2, R3)
    a.add(R2, 4)
    a.jump_if(R2, ">", R4, "refuse")
    a.load(R2, R3, NUMBER)
    a.bit_and(R2, PEER | MAYBE)
    a.bit_or(R8, R2)
    a.label("answer")
    a.rule("The buffer has 16 bytes at least, so the length that was said counts too.")
    a.load(R2, R6, LENGTH)
    a.jump_if(R2, "s<", 4, "refuse", bits=32)
    a.load(R3, R6, VALUE)
    a.load(R4, R6, VALUE_END)
    a.move(R2, R3)
    a.add(R2, 4)
    a.jump_if(R2, ">", R4, "refuse")
    a.store(R3, NUMBER, R8)
    a.move(R2, 4)
    a.store(R6, LENGTH, R2)
    a.move(R2, 0)
    a.store(R6, RESULT, R2)
    a.move(R0, 1)
    a.leave()
    a.label("refuse")
    a.move(R0, 0)
    a.leave()
    _pass_on_others(a, page_bytes)
    return a.program()


def _take_ours(a: Assembler) -> None:
    """Go on only with options of our level; r2 is the option's number then."""
    a.rule("Options of other levels are not for us.")
    a.move(R6, R1)
    a.load(R2, R6, SOCKOPT_LEVEL)
    a.jump_if(R2, "!=", LEVEL, "others")
    a.load(R2, R6, NAME)


def _pass_on_others(a: Assembler, page_bytes: int) -> None:
    """Leave what is not for us to the kernel."""
    a.label("others")
    a.rule(
        """Of a buffer longer than a page we were shown a part, and older kernels refuse
        to take that for the whole. A length of 0 means: the caller's own buffer."""
    )
    a.load(R2, R6, LENGTH)
    a.jump_if(R2, "s<", page_bytes + 1, "pass", bits=32)
    a.move(R2, 0)
    a.store(R6, LENGTH, R2)
    a.label("pass")
    a.move(R0, 1)
    a.leave()
