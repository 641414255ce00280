"""The server's end of the TCP option: listeners that opt in, and who came through them.

Decides, for a listener, whether its SYN-ACKs will carry the option and, for an accepted
connection, whether its client showed it: by one system call, and by none as long as no
listener of the loop has opted in.

A listener has to opt in before it listens. One that was inherited, or is shared with
other workers, may have done so before; then its clients may show the option here too,
and expect an answer.

Where the kernel does not know, or no program is there to ask any more, the client's own
SYN tells that it may have been answered: then its first bytes are looked at. After
`DOUBT_SECONDS` nobody has an answer any more of what is gone. A connection belongs to
the listener of its port, because nobody tells which one it was.

Source: `pysmc.discovery.option.sockets`; kernel counterpart: smc_listen in af_smc.c.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from pysmc.discovery.findings import (
    INCOMPLETE,
    NO_SYN_KEPT,
    NOT_INSTALLED,
    OTHER_CGROUP,
    PEER_NO_SMC,
    TOO_LATE,
)
from pysmc.discovery.mark import save_syn
from pysmc.discovery.option import sockets
from pysmc.discovery.option.sockets import OptionState
from pysmc.discovery.saved_syn import read_syn, shows_option

if TYPE_CHECKING:
    import socket

    from pysmc.discovery.presence import Presence
    from pysmc.reasons import Reason

__all__ = ["OptionServer"]

log = logging.getLogger(__name__)

WANT, PEER, DONE = OptionState.WANT, OptionState.PEER, OptionState.DONE
MAYBE = OptionState.MAYBE
DOUBT_SECONDS = 64.0
"""As long a handshake may last: tcp_synack_retries is 5, which ends after 63 s."""


class OptionServer:
    """What one loop knows of its listeners and the option.

    Args:
        presence: Whether it is installed.
    """

    def __init__(self, presence: Presence) -> None:
        self.serves = False
        """Whether a listener opted in, so that clients may have shown the option."""
        self._why_not: Reason | None = None  # of the last listener that did not opt in
        self._asked: set[int] = set()  # ports whose listeners opted in
        self._presence = presence
        self._doubts: dict[int, float] = {}  # until when, by the port
        self._syn: bytes | None = None

    def open(self, listener: socket.socket, *, is_able: bool) -> None:
        """Let a listener opt in, before it listens; nothing is raised.

        Args:
            listener: A TCP socket.
            is_able: Whether clients are welcome. If not, it is still found out whether
                somebody else has opted in with it.
        """
        is_here = is_able and self._presence.is_here()
        why = NOT_INSTALLED
        try:
            if is_here and sockets.opt_in(listener):
                # The programs do so as well, but clients may come a little earlier.
                save_syn(listener)
                self._note(listener)
                return
        except OSError:
            why = TOO_LATE
        else:
            if is_here and self._presence.doubt():
                why = OTHER_CGROUP
        try:
            state = sockets.read_state(listener)
        except OSError:
            state = None
        if state is not None and WANT in state:
            self._note(listener)
            return
        if self._presence.is_wanted and is_able:
            self._why_not = why
            log.info("listener %r does not show the TCP option: %s", listener, why)

    def _note(self, listener: socket.socket) -> None:
        self.serves = True
        port = _port_of(listener)
        self._asked.add(port)
        self._doubts.pop(port, None)

    def inspect(self, conn: socket.socket, *, is_given: bool = False) -> Reason | None:
        """Look at an accepted connection: one system call.

        Args:
            conn: The accepted socket.
            is_given: Whether it may be of another loop's or process's listener: then it
                is asked whatever is known of ours.

        Returns:
            None when its client showed the option, and was answered or may have been:
            it speaks CLC next, unless its first bytes are something else. Otherwise why
            not.
        """
        self._syn = None
        if not self.serves and not is_given:
            return self._reason()
        try:
            state = sockets.read_state(conn)
        except OSError:
            state = None
        if state is not None and DONE in state:
            if self._doubts:
                self._doubts.pop(_port_of(conn), None)
            if state & (PEER | MAYBE):
                return None
            if OptionState.NOSYN in state:
                return NO_SYN_KEPT
            return PEER_NO_SMC if WANT in state else self._reason()
        if not self.serves:
            return self._reason()
        # Connections of a listener that did not opt in look as if none could.
        port = _port_of(conn)
        if (state or port in self._asked) and self._may_be_answered(conn, port):
            return None
        return INCOMPLETE if state is None or state else self._reason()

    def _may_be_answered(self, conn: socket.socket, port: int) -> bool:
        """Look at the SYN, for a while after programs were found to be missing."""
        now = self._presence.time()
        if now >= self._doubts.setdefault(port, now + DOUBT_SECONDS):
            return False
        with contextlib.suppress(OSError):
            self._syn = read_syn(conn)
        return self._syn is not None and shows_option(self._syn)

    def take_syn(self) -> bytes | None:
        """Give the SYN that the last `inspect` read, if it did: there is no other."""
        syn, self._syn = self._syn, None
        return syn

    def _reason(self) -> Reason:
        """Say why a connection's listener has not shown the option."""
        if self._why_not is not None:
            return self._why_not
        return TOO_LATE if self._presence.is_here() else NOT_INSTALLED


def _port_of(sock: socket.socket) -> int:
    """Give the local port; 0 when the socket is closed."""
    try:
        port: int = sock.getsockname()[1]
    except OSError:
        return 0
    return port
