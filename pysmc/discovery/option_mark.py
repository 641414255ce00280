"""The client's end of the TCP option: one socket, from before its connect.

Decides what the result of the option means beside what else is known of the peer, and
takes back what was promised: once both options were seen the server awaits a CLC
message, so a program that uses the socket itself has to be preceded by a CLC Decline.
It is sent at once when the loop is told of such a use, and after `UNCLAIMED_WAIT` when
nobody has asked for a transport and nothing was written, because a kernel closes the
connection after 6 s. What the program writes by the socket's own methods before that is
left alone: no byte of ours may come behind one of the program's.

Source: RFC 7609 sections 3.1 and 3.5.1.6; kernel counterparts: smc_connect in af_smc.c,
smc_clc_send_decline in smc_clc.c; tcp(7) (TCP_INFO).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import weakref
from typing import TYPE_CHECKING

from pysmc.discovery.findings import INCOMPLETE, PEER_NO_SMC
from pysmc.discovery.option import sockets
from pysmc.discovery.option.sockets import OptionState
from pysmc.discovery.order import Way, choose
from pysmc.discovery.rendezvous import SMC, Refusal, Verdict, tcp
from pysmc.reasons import Reason
from smcproto import clc
from smcproto.diagnosis import PeerDiagnosis

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from pysmc.discovery.local import Mark

__all__ = ["OptionMark", "decline"]

UNCLAIMED_WAIT = 0.1
"""Seconds that a socket whose peer awaits CLC is kept for whoever connected it."""

TCP_INFO_BYTES = 208
NOTSENT_AT, SENT_AT = 144, 200
"""Where struct tcp_info has tcpi_notsent_bytes (32 bits) and tcpi_bytes_sent (64)."""

PEER = OptionState.PEER | OptionState.DONE
PEER_ID_UNKNOWN = bytes(8)


def decline(sock: socket.socket, code: int) -> None:
    """Send a CLC Decline as the first message of a connection.

    Nothing is raised: when it cannot be sent the connection is over in any case.

    Args:
        sock: Connected, and nothing was written to it: so its buffer has room.
        code: Diagnosis for people, 32 bits.
    """
    message = clc.Decline(
        version=1, out_of_sync=False, peer_id=PEER_ID_UNKNOWN, diagnosis=code
    ).build()
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    with contextlib.suppress(OSError):
        if sock.send(message, flags) != len(message):
            sock.shutdown(socket.SHUT_RDWR)


def has_written(sock: socket.socket) -> bool:
    """Tell whether anybody has written to a connection; True when it is not known."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        (waiting,) = struct.unpack_from("=I", info, NOTSENT_AT)
        (sent,) = struct.unpack_from("=Q", info, SENT_AT)
    except (OSError, struct.error):  # closed, or a kernel before 4.19
        return True
    return bool(waiting or sent)


class OptionMark:
    """A socket that opted in; it has the methods of `pysmc.discovery.local.Mark`.

    Args:
        loop: The running loop.
        sock: The TCP socket; only a weak reference is kept.
        other: What is known of the peer without the option: another way's mark, which
            goes on when the option is not answered, or why there is none.
        forget: Called when nothing is open any more.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        other: Mark | Reason,
        forget: Callable[[OptionMark], None],
    ) -> None:
        self._loop = loop
        self._sock = weakref.ref(sock)
        self._other = other
        self._forget = forget
        self._verdict: Verdict | None = None
        self._follows = False
        self._is_claimed = False
        self.is_late = False
        """Whether the connect goes on although nobody waits for it any more."""
        self._unclaimed: asyncio.TimerHandle | None = None

    @property
    def verdict(self) -> Verdict | None:
        """What was decided, None as long as nothing is."""
        if self._follows and not isinstance(self._other, Reason):
            return self._other.verdict
        return self._verdict

    @property
    def way(self) -> Way:
        """Which way of discovery the peer showed itself by, or may."""
        if self._follows and not isinstance(self._other, Reason):
            return self._other.way
        return Way.OPTION

    @property
    def goes_on(self) -> Mark | OptionMark | None:
        """What holds something from now on, and has to be closed; None: nothing.

        That is this mark until it is claimed, or the other way's.
        """
        if self._follows and not isinstance(self._other, Reason):
            return self._other.goes_on
        return None if self._unclaimed is None else self

    # --- what the driver calls ---------------------------------------------------

    def connected(self) -> None:
        """Read the result: the option decides, or the other way goes on."""
        if self._verdict is not None or self._follows:
            return
        sock = self._sock()
        state = None
        if sock is not None:
            with contextlib.suppress(OSError):
                state = sockets.read_state(sock)
        other = self._other
        seen = {Way.OPTION} if state is not None and PEER in state else set()
        if not isinstance(other, Reason):
            seen.add(other.way)
        if choose(seen) is Way.OPTION:
            if not isinstance(other, Reason):
                other.settle_tcp()
            self._verdict = SMC
            self._unclaimed = self._loop.call_later(UNCLAIMED_WAIT, self._on_unclaimed)
        elif not isinstance(other, Reason):
            self._follows = True
            other.connected()
        else:
            is_final = state is not None and OptionState.DONE in state
            why = PEER_NO_SMC if is_final else INCOMPLETE
            self._verdict = Verdict(smc=False, reason=why)

    async def wait(self) -> Verdict:
        """Claim the socket and wait for the verdict, if it is not there yet."""
        self._is_claimed = True
        self._cancel_unclaimed()
        self._forget(self)
        self.settle_late()
        if self._follows and not isinstance(self._other, Reason):
            return await self._other.wait()
        if self._verdict is None:
            detail = "The socket was never connected."
            self._verdict = tcp("MARK_LOST", "local", detail)
        elif self._verdict.smc:
            sock = self._sock()
            if sock is None or has_written(sock):
                self._verdict = _used_raw()
        return self._verdict

    def settle_tcp(
        self, why: Refusal = Refusal.RAW, because: Reason | None = None
    ) -> None:
        """Decide for TCP: before the connect quietly, after it by a Decline.

        Args:
            why: What a server of this host is told.
            because: What a Decline tells, if it has a code.
        """
        self._cancel_unclaimed()
        self._forget(self)
        sock, other = self._sock(), self._other
        if self._follows:
            if not isinstance(other, Reason):
                other.settle_tcp(why)
            return
        if self._verdict is None:
            if not isinstance(other, Reason):
                other.settle_tcp(why)
            if sock is not None:  # it may be connected again, by somebody else
                self.is_late = not _take_back(sock, because)
        elif self._is_claimed or not self._verdict.smc:
            return
        elif sock is not None:
            _decline_unused(sock, because)
        self._verdict = _used_raw()

    def settle_late(self, because: Reason | None = None) -> None:
        """Take back what a connect that went on after its end has promised since.

        Args:
            because: As for `settle_tcp`.
        """
        sock = self._sock()
        if self.is_late and sock is not None:
            self.is_late = not _take_back(sock, because)

    def close(self) -> None:
        """Decide for TCP if nobody asked for the socket; idempotent."""
        self._on_unclaimed()

    def abandon(self) -> None:
        """In a forked child: the parent's socket and loop are left alone."""
        self._unclaimed = None

    # --- what the loop calls -----------------------------------------------------

    def _on_unclaimed(self) -> None:
        if self._unclaimed is not None:
            self.settle_tcp()

    def _cancel_unclaimed(self) -> None:
        if self._unclaimed is not None:
            self._unclaimed.cancel()
            self._unclaimed = None


def _take_back(sock: socket.socket, because: Reason | None) -> bool:
    """Take the opt-in back; a connect that succeeded unnoticed has promised already.

    Returns:
        False when it goes on, so that it may still do so.
    """
    with contextlib.suppress(OSError):
        sockets.opt_out(sock)
        return True
    try:
        state = sockets.read_state(sock)
    except OSError:
        return True
    if state is not None and PEER in state:
        _decline_unused(sock, because)
    return state is None or OptionState.DONE in state


def _decline_unused(sock: socket.socket, because: Reason | None) -> None:
    """Send a Decline, unless the program has written already."""
    if not has_written(sock):
        code = because.code if because is not None else None
        decline(sock, code or PeerDiagnosis.SOCKET_OPTION)


def _used_raw() -> Verdict:
    return tcp("NOT_MARKED", "local", "The program uses the TCP socket itself.")
