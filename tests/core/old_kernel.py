"""What the kernel did when two Declines could cross (CVE-2023-52775), put in again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysmc.core import handshake
from pysmc.core.handshake import HandshakeInput, HandshakeState
from pysmc.core.machine import Table
from pysmc.core.server import ServerNegotiator

if TYPE_CHECKING:
    import pytest

    from pysmc.core.handshake import Handshake


def put_the_old_kernel_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a server decline when its own wait for CONFIRM LINK is over.

    Whether two Declines cross then depends on how long each end waits, and on TCP.
    """

    def decline(self: ServerNegotiator, late: Handshake, now: float) -> None:
        assert late.problem is not None
        self.decline(late, late.problem, now)

    def wait(self: ServerNegotiator) -> float:
        return self._config.confirm_link_server_wait

    def due(self: ServerNegotiator) -> float:
        config = self._config
        wait = config.confirm_link_server_wait + config.decline_wait
        return wait + config.llc_wait

    row = (HandshakeState.AWAIT_DECLINE, HandshakeInput.UNABLE)
    rows = {**handshake.SERVER.rows, row: HandshakeState.FELL_BACK}
    table = Table("server handshake", rows, ignored=handshake.SERVER.ignored)
    monkeypatch.setattr(handshake, "SERVER", table)
    monkeypatch.setattr(ServerNegotiator, "decline_wait_over", decline)
    monkeypatch.setattr(ServerNegotiator, "link_wait", property(wait))
    monkeypatch.setattr(ServerNegotiator, "decline_due", property(due))
