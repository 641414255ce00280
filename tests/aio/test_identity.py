"""Peer IDs, host names and random numbers."""

from __future__ import annotations

import random
import socket

import pytest

from pysmc.aio import identity


def test_peer_ids_differ_and_hold_a_local_mac() -> None:
    made = [identity.new_peer_id() for _ in range(200)]
    assert len(set(made)) == 200
    for peer_id in made:
        assert len(peer_id) == 8
        assert peer_id[2] & 0x02, "locally administered"
        assert not peer_id[2] & 0x01, "not multicast"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("host.example", "host.example"),
        ("h" * 64, "h" * 32),
        ("zürich", "z?rich"),
        ("tab\tnul\0", "tab?nul?"),
    ],
)
def test_host_names_are_short_and_printable(monkeypatch, name, expected) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    assert identity.host_name() == expected


def test_tokens_are_in_their_ranges() -> None:
    tokens = identity.RandomTokens()
    for _ in range(500):
        assert 0 <= tokens.psn() < 1 << 24
        assert 0 < tokens.alert_token() < 1 << 32
        assert 0 <= tokens.user_id() < 1 << 32


def test_no_alert_token_is_zero(monkeypatch) -> None:
    monkeypatch.setattr(identity.SYSTEM, "randrange", lambda bound: 0)
    assert identity.RandomTokens().alert_token() == 1
    monkeypatch.setattr(identity.SYSTEM, "randrange", lambda bound: bound - 1)
    assert identity.RandomTokens().alert_token() == 0xFFFFFFFF


def test_the_same_source_gives_the_same_identity_and_tokens() -> None:
    def numbers(seed: int) -> list[object]:
        entropy = random.Random(seed)
        tokens = identity.RandomTokens(entropy)
        peer_id = identity.new_peer_id(entropy)
        return [peer_id, tokens.psn(), tokens.alert_token(), tokens.user_id()]

    assert numbers(1) == numbers(1)
    assert numbers(1) != numbers(2)
