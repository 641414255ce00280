"""Where random numbers come from: an argument, so that a run can be repeated."""

from __future__ import annotations

from pysmc.core import tokens
from pysmc.testing.pair import CorePair, CountingTokens


def test_a_source_without_chance_is_a_source() -> None:
    source: tokens.TokenSource = CountingTokens(5)
    assert [source.psn(), source.alert_token(), source.user_id()] == [5, 6, 7]
    assert CountingTokens(1 << 24).psn() == 0
    promised = {name for name in vars(tokens.TokenSource) if not name.startswith("_")}
    assert promised == {"psn", "alert_token", "user_id"}


def test_the_same_numbers_give_the_same_run() -> None:
    def run() -> list[str]:
        pair = CorePair()
        client, _ = pair.establish()
        pair.write(pair.client, client, b"x" * 20_000)
        pair.drive()
        pair.advance(100)
        pair.shutdown()
        return pair.trace

    assert run() == run()
