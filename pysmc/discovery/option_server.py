"""The server's end of the TCP option: listeners that opt in, and who came through them.

Decides, for a listener, whether its SYN-ACKs will carry the option and, for an accepted
connection, whether its client showed it: by one system call, and by none as long as no
listener of the loop has opted in.

A listener has to opt in before it listens. One that was inherited, or is shared with
other workers, may have done so before; then its clients may show the option here too,
and expect an answer.

Source: `pysmc.discovery.option.sockets`; kernel counterpart: smc_listen in af_smc.c.
"""

from __future__ import annotations

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
from pysmc.discovery.option import sockets
from pysmc.discovery.option.sockets import OptionState

if TYPE_CHECKING:
    import socket

    from pysmc.discovery.presence import Presence
    from pysmc.reasons import Reason

__all__ = ["OptionServer"]

log = logging.getLogger(__name__)

PEER = OptionState.PEER | OptionState.DONE


class OptionServer:
    """What one loop knows of its listeners and the option.

    Args:
        presence: Whether it is installed.
    """

    def __init__(self, presence: Presence) -> None:
        self.serves = False
        """Whether a listener opted in, so that clients may have shown the option."""
        self._why_not: Reason | None = None  # of the last listener that did not opt in
        self._presence = presence

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
                self.serves = True
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
        if state is not None and OptionState.WANT in state:
            self.serves = True
        elif self._presence.is_wanted and is_able:
            self._why_not = why
            log.info("listener %r does not show the TCP option: %s", listener, why)

    def inspect(self, conn: socket.socket) -> Reason | None:
        """Look at an accepted connection: one system call.

        Returns:
            None when its client showed the option and was answered: it speaks CLC next.
            Otherwise why not.
        """
        if not self.serves:
            return self._reason()
        try:
            state = sockets.read_state(conn)
        except OSError:
            state = None
        if state is None:
            return INCOMPLETE
        if PEER in state:
            return None
        if OptionState.NOSYN in state:
            return NO_SYN_KEPT
        if OptionState.WANT not in state:
            return self._reason()
        return PEER_NO_SMC if OptionState.DONE in state else INCOMPLETE

    def _reason(self) -> Reason:
        """Say why a connection's listener has not shown the option."""
        if self._why_not is not None:
            return self._why_not
        return TOO_LATE if self._presence.is_here() else NOT_INSTALLED
