"""What the two ends of a rendezvous say to each other, and who may say it.

Decides the messages, the users that are allowed, and the words of each verdict. Knows
nothing of event loops or of when something is said (`local`).

Source: unix(7) (SO_PEERCRED), user_namespaces(7) (the overflow user).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pysmc.disposal import close_elsewhere
from pysmc.reasons import Reason, reason

if TYPE_CHECKING:
    from pysmc.reasons import Side

__all__ = [
    "GO",
    "NO",
    "OFFER",
    "REFUSE",
    "SMC",
    "VERSION",
    "Refusal",
    "Users",
    "Verdict",
    "answer_of",
    "close_stranger",
    "failed",
    "foreign",
    "process_of",
    "receive",
    "refuse_descriptors",
    "refused",
    "rendezvous_name",
    "send",
    "stream_socket",
    "tcp",
]

RENDEZVOUS_PREFIX = b"\0pysmc/r/1/"
VERSION = 1
OFFER, REFUSE, GO, NO = b"O", b"R", b"G", b"N"
MESSAGE_BYTES = 128
"""More than any message; each is sent, and therefore received, in one piece."""

UCRED = struct.Struct("iII")
"""Process, user and group number, as SO_PEERCRED gives them."""
DEFAULT_OVERFLOW_UID = 65534


class Refusal(IntEnum):
    """Why a party does not go on; one byte on the wire of the rendezvous."""

    RAW = 1
    """The program uses the TCP socket itself."""
    FOREIGN = 2
    """The other party's user is not allowed."""
    UNFIT = 3
    """The offer is for another connection, or this one is gone."""
    LIMIT = 4
    """The party has as many handshakes in progress as it allows itself."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What both ends of a connection have agreed on."""

    smc: bool
    """Whether CLC messages may be sent: the peer expects them."""
    reason: Reason | None = None
    """Why not; None when `smc` is true."""
    process: int | None = field(default=None, compare=False)
    """Number of the client's process on this host, as the kernel says it."""


SMC = Verdict(smc=True)


def rendezvous_name(identity: bytes) -> bytes:
    """Name the rendezvous of a connection: an abstract Unix name, 0 first."""
    return RENDEZVOUS_PREFIX + identity.hex().encode("ascii")


SO_PASSRIGHTS = 83
"""Linux 6.16: whether others may pass descriptors to a Unix socket."""


def refuse_descriptors(sock: socket.socket) -> None:
    """Let nobody pass descriptors to a socket that wants none.

    Any user of the host may connect to an abstract name. The last close of a passed
    descriptor, here, can take as long as whoever made it wants (SO_LINGER). Older
    kernels do not know the option.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


def stream_socket() -> socket.socket:
    """Make a Unix socket for either end, which takes no descriptors.

    Raises:
        OSError: There is no descriptor left, or Unix sockets are forbidden.
    """
    # Python sets close-on-exec on every socket.
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    refuse_descriptors(made)
    return made


def close_stranger(sock: socket.socket) -> None:
    """Close a connection of a user who is not allowed, without waiting for it.

    For the kernels that do not know `refuse_descriptors`. Where no thread is to be had
    for it, it is done here.
    """
    if close_elsewhere(sock.fileno()):
        sock.detach()
    else:
        sock.close()


def tcp(name: str, side: Side, detail: str) -> Verdict:
    """Say no, with a reason of the table."""
    return Verdict(smc=False, reason=reason(name, side, detail))


def failed(what: str, error: OSError) -> Verdict:
    """Say no because of an error here; running out of descriptors is a limit."""
    name = "LIMIT" if error.errno in {errno.EMFILE, errno.ENFILE} else "MARK_LOST"
    return tcp(name, "local", f"{what}: {error.strerror}.")


def refused(code: int) -> Verdict:
    """Say in our words why the other party refused."""
    match code:
        case Refusal.RAW:
            detail = "Its program uses the TCP socket itself."
            return tcp("PEER_NO_SMC", "peer", detail)
        case Refusal.FOREIGN:
            detail = f"It does not allow our user {os.geteuid()}."
            return tcp("FOREIGN_USER", "peer", detail)
        case Refusal.LIMIT:
            detail = "It has max_handshakes in progress."
            return tcp("LIMIT", "peer", detail)
        case _:
            detail = f"It refused to go on (reason {code})."
            return tcp("MARK_LOST", "peer", detail)


@cache
def overflow_uid() -> int:
    """Return the user number that stands for every user of another namespace."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_bytes())
    except (OSError, ValueError):
        return DEFAULT_OVERFLOW_UID


def process_of(sock: socket.socket) -> int:
    """Tell the number of the process at the other end of a Unix connection.

    It is that of whoever listened, or connected; 0 when it cannot be seen from here.
    """
    ucred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
    pid: int = UCRED.unpack(ucred)[0]
    return pid


class Users:
    """Decides which users of this host may be the peer."""

    def __init__(self, allowed_uids: tuple[int, ...] = ()) -> None:
        """Allow our own user, and these."""
        self._allowed = frozenset(allowed_uids)

    def foreign(self, sock: socket.socket) -> int | None:
        """Return the peer's user number if it is not allowed, otherwise None.

        The overflow number is never allowed: it stands for every user that has no
        number in this user namespace.
        """
        ucred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        uid: int = UCRED.unpack(ucred)[1]
        mine = uid == os.geteuid() or uid in self._allowed
        return None if mine and uid != overflow_uid() else uid


def foreign(uid: int) -> Verdict:
    """Say no because we do not allow the peer's user."""
    detail = f"The peer's user is {uid}, ours {os.geteuid()}."
    if uid == overflow_uid():
        detail += " That number stands for all users of other user namespaces."
    return tcp("FOREIGN_USER", "local", detail)


def answer_of(message: bytes) -> Verdict:
    """Read the client's answer; nothing means that it has gone or was too late."""
    if message[:1] == GO:
        return SMC
    if message[:1] == NO and len(message) > 1:
        return refused(message[1])
    return tcp("MARK_LOST", "peer", "It did not answer the offer.")


def send(unix: socket.socket, message: bytes) -> bool:
    """Send one message; False when the other party cannot receive it any more."""
    try:
        return unix.send(message, socket.MSG_NOSIGNAL) == len(message)
    except OSError:
        return False


def receive(unix: socket.socket) -> bytes | None:
    """Receive one message: empty when the other has gone, None when none is there."""
    try:
        return unix.recv(MESSAGE_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return b""
