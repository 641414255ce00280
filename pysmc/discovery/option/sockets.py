"""The TCP option as a socket sees it: opt in before connecting, read the result after.

Decides nothing. Two private socket options, which the programs of `programs` answer in
the kernel, are all that an unprivileged process needs: no bpf(2), no file, no right.

* ``setsockopt(LEVEL, STATE, 1)`` before ``connect()`` or ``listen()``: this socket, and
  the connections that a listener accepts, carry the SMC option on SYN and SYN-ACK.
* ``getsockopt(LEVEL, STATE)`` at any time: an `OptionState`. From a connection it is
  final once ``connect()`` or ``accept()`` gave it.
* ``getsockopt(LEVEL, ABI)`` on any TCP socket: the version of the programs.

What counts is the cgroup of the process at the time when it made the socket.

Source: RFC 7609 section 3.1 and A.1 (the option); kernel counterpart: net/core/sock.c
and kernel/bpf/cgroup.c (which call the hooks), smc_tcp_syn_options in tcp_output.c.
"""

from __future__ import annotations

import errno
import socket
from enum import IntFlag
from typing import Final

__all__ = [
    "ABI",
    "ABI_VERSION",
    "LEVEL",
    "STATE",
    "OptionState",
    "installed_abi",
    "is_installed",
    "opt_in",
    "opt_out",
    "read_state",
]

LEVEL: Final = 0x534D4352
"""The level of both socket options: "SMCR"; no protocol's number is that high."""
STATE: Final = 1
"""Option name: set to opt in (1) or out (0), read an `OptionState`; 4 bytes."""
ABI: Final = 2
"""Option name, read only: the version of what is in this table and in `OptionState`."""
ABI_VERSION: Final = 1
"""Raised when a program of today could not work with a set-up of tomorrow, or vice
versa: other bits, another length, another meaning."""

NOT_THERE: Final = frozenset({errno.ENOPROTOOPT, errno.EOPNOTSUPP})
"""What a kernel answers when no program took the option."""


class OptionState(IntFlag):
    """What the programs know of a socket; 32 bits."""

    WANT = 1
    """The application opted in."""
    PEER = 2
    """The peer's SYN or SYN-ACK carried the option, and so did our answer."""
    DONE = 4
    """The connection was established with the programs in place: `PEER` is final."""
    MINE = 8
    """For the programs: they switched the callback for headers on, and will off."""
    NOSYN = 16
    """Server: the kernel kept no SYN (SYN cookie), so that nothing is known."""
    SERVER = 32
    """It listens, or a listener accepted it."""
    MAYBE = 64
    """Server: the client asked, but whether it was answered is not known any more."""


def opt_in(sock: socket.socket) -> bool:
    """Have a socket's SYN, or the SYN-ACKs of a listener, carry the SMC option.

    To be called before ``connect()`` or ``listen()``; once is enough, a connect that
    failed and is tried again included. One system call.

    Args:
        sock: A TCP socket of version 4 or 6.

    Returns:
        False when no programs are installed for the cgroup in which it was made.

    Raises:
        OSError: EPERM: it is connected or listens already, or is not plain TCP (UDP,
            Unix, MPTCP). EBADF: it is closed.
    """
    try:
        sock.setsockopt(LEVEL, STATE, 1)
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        raise
    return True


def opt_out(sock: socket.socket) -> None:
    """Take an `opt_in` back: for a socket whose connect failed. One system call.

    Raises:
        OSError: As `opt_in`; also when no programs are installed.
    """
    sock.setsockopt(LEVEL, STATE, 0)


def read_state(sock: socket.socket) -> OptionState | None:
    """Read what is known of a socket: one system call.

    Returns:
        None when no programs are installed for the cgroup in which it was made; no
        bits when it did not opt in.

    Raises:
        OSError: EBADF: it is closed.
    """
    try:
        return OptionState(sock.getsockopt(LEVEL, STATE))
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise


def installed_abi() -> int | None:
    """Ask a fresh socket of this process for the version of the installed programs.

    Returns:
        None when there are none.

    Raises:
        OSError: There is no descriptor left.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            return probe.getsockopt(LEVEL, ABI)
        except OSError as error:
            if error.errno in NOT_THERE:
                return None
            raise


def is_installed() -> bool:
    """Tell whether a socket that this process makes now could opt in.

    Raises:
        OSError: There is no descriptor left.
    """
    return installed_abi() == ABI_VERSION
