"""What the machines of one endpoint share, and other endpoints do not."""

from __future__ import annotations

from pysmc.core.context import Context, Identity
from pysmc.testing.pair import SMALL, CountingTokens, make_offer


def test_two_endpoints_share_nothing() -> None:
    identity = Identity(bytes(8), "host")
    one, two = (
        Context(identity, (make_offer(1),), SMALL, CountingTokens()) for _ in range(2)
    )
    assert one.actions is not two.actions
    assert one.events is not two.events
    assert one.timers is not two.timers
    assert one.handshakes is not two.handshakes
