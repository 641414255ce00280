"""Does it work here, for this process? And if not, why not, in words.

Decides by trying, without any privilege: a fresh socket is asked for the version, then
a connection over loopback has to carry the option both ways. Where programs are
installed but not for this process, the sentence says for which cgroup.

Source: RFC 7609 section 3.1.
"""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from pysmc.discovery.option.cgroup import NoCgroupError, own_cgroup
from pysmc.discovery.option.sockets import (
    ABI_VERSION,
    OptionState,
    installed_abi,
    opt_in,
    read_state,
)

__all__ = ["Trial", "judge", "try_option"]

NO_LOOPBACK: Final = frozenset(
    {errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ENETDOWN, errno.EAFNOSUPPORT}
)
"""What a network namespace without 127.0.0.1 answers."""

SECONDS: Final = 2.0
"""Most that the connection over loopback may take."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came out."""

    abi: int | None
    """Version of the programs that a fresh socket of this process meets."""
    works: bool
    """Whether the option can be used; believed where there is no loopback."""
    reason: str
    """Why not; empty when it works."""


def try_option() -> Trial:
    """Try the option with sockets of this process; takes 2 s at most.

    Raises:
        OSError: There is no descriptor left.
    """
    abi = installed_abi()
    if abi is None:
        words = f"No programs are installed for {_this_cgroup()}."
        return Trial(abi, works=False, reason=words)
    if abi != ABI_VERSION:
        words = f"Version {abi} is installed, this pysmc needs version {ABI_VERSION}."
        return Trial(abi, works=False, reason=words)
    try:
        states = _connect()
    except OSError as error:
        if error.errno in NO_LOOPBACK:
            return Trial(abi, works=True, reason="")
        words = f"A connection over loopback failed: {error.strerror or error}."
        return Trial(abi, works=False, reason=words)
    words = judge(*states)
    return Trial(abi, works=not words, reason=words)


def judge(client: OptionState | None, server: OptionState | None) -> str:
    """Say what is wrong with a connection both of whose ends opted in.

    Args:
        client: The client's state after its ``connect()``.
        server: The accepted socket's state.

    Returns:
        Nothing when both have found the option.
    """
    if client is None or server is None:
        return "The set-up is incomplete: a socket option is not answered."
    if not client & server & OptionState.DONE:
        return "The set-up is incomplete: the sock_ops program did not run."
    if server & OptionState.NOSYN:
        return "SYN cookies are always on here (net.ipv4.tcp_syncookies is 2)."
    if not client & server & OptionState.PEER:
        return "The option is lost on loopback; a packet filter may remove it."
    return ""


def _connect() -> tuple[OptionState | None, OptionState | None]:
    """Connect over loopback, both ends opted in; gives their states."""
    with ExitStack() as stack:
        listener, client = (
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            for _ in range(2)
        )
        for sock in (listener, client):
            sock.settimeout(SECONDS / 2)
            opt_in(sock)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client.connect(listener.getsockname())
        accepted = stack.enter_context(listener.accept()[0])
        return read_state(client), read_state(accepted)


def _this_cgroup() -> str:
    try:
        return f"the cgroup {own_cgroup()}"
    except (NoCgroupError, OSError):
        return "this process"
