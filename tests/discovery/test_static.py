"""Patterns of the static list against addresses."""

from __future__ import annotations

import pytest

from pysmc.discovery.address import endpoint
from pysmc.discovery.static import StaticPeers


@pytest.mark.parametrize(
    ("pattern", "host", "port", "listed"),
    [
        ("10.0.0.1", "10.0.0.1", 80, True),
        ("10.0.0.1", "10.0.0.2", 80, False),
        ("10.0.0.1:80", "10.0.0.1", 80, True),
        ("10.0.0.1:80", "10.0.0.1", 81, False),
        ("10.0.0.1:80", "::ffff:10.0.0.1", 80, True),
        ("10.0.0.0/8", "10.255.0.1", 1, True),
        ("10.0.0.9/8", "10.255.0.1", 1, True),
        ("10.0.0.0/8", "11.0.0.1", 1, False),
        ("10.0.0.0/8:80", "10.1.1.1", 80, True),
        ("10.0.0.0/8:80", "10.1.1.1", 443, False),
        ("0.0.0.0/0", "fd00::1", 80, False),
        ("fd00::1", "fd00::1", 80, True),
        ("[fd00::1]", "fd00:0::1", 80, True),
        ("[fd00::1]:80", "fd00::1", 80, True),
        ("[fd00::1]:80", "fd00::1", 81, False),
        ("fd00::/8", "fdff::1", 80, True),
        ("[fd00::/8]:443", "fdff::1", 443, True),
        ("::ffff:10.0.0.1", "10.0.0.1", 80, True),
        ("::ffff:10.0.0.0/104", "10.9.9.9", 80, True),
        ("::/0", "10.0.0.1", 80, False),
    ],
)
def test_pattern(pattern: str, host: str, port: int, listed: bool) -> None:
    peer = endpoint((host, port))
    assert peer is not None
    assert ((peer, port) in StaticPeers([pattern])) is listed


def test_any_of_several_patterns_is_enough() -> None:
    peers = StaticPeers(["10.0.0.1:80", "fd00::1"])
    for host, port in (("10.0.0.1", 80), ("fd00::1", 9)):
        peer = endpoint((host, port))
        assert peer is not None
        assert (peer, port) in peers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "example.org",
        "localhost:80",
        "10.0.0.1:",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "10.0.0.1:8a",
        "10.0.0.1:-1",
        "10.0.0.0/33",
        "[fd00::1",
        "[fd00::1]80",
        "[fd00::1]:",
        "fd00::1::2",
        "[example.org]:80",
    ],
)
def test_bad_pattern_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="numeric address or network") as caught:
        StaticPeers([text])
    assert repr(text) in str(caught.value)
