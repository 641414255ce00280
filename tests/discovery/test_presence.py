"""Whether the option is installed: who looks, and how often."""

from __future__ import annotations

import errno
import math
import os
from typing import Any

import pytest

from pysmc.discovery.findings import NO_OPTION_HERE, PEER_NO_SMC
from pysmc.discovery.option import sockets
from pysmc.discovery.presence import LOOK_SECONDS, Presence


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nobody_looks_for_what_is_not_wanted(option: Any, clock: Clock) -> None:
    presence = Presence(clock, is_wanted=False)
    assert not presence.is_here()
    assert presence.absent_until == math.inf
    assert presence.plain is presence.absent is PEER_NO_SMC
    assert option.calls == []


def test_what_is_absent_is_looked_for_rarely(option: Any, clock: Clock) -> None:
    option.is_here = False
    presence = Presence(clock, is_wanted=True)
    assert presence.absent_until < clock.now, "nothing is known before the first look"
    for _ in range(3):
        assert not presence.is_here()
    assert option.calls == ["look"]
    assert presence.absent_until == clock.now + LOOK_SECONDS
    assert presence.plain is NO_OPTION_HERE
    clock.now += LOOK_SECONDS
    option.is_here = True
    assert presence.is_here()
    assert presence.absent_until < clock.now
    assert presence.plain is PEER_NO_SMC


def test_what_is_there_is_doubted_only_by_whoever_could_not_opt_in(
    option: Any, clock: Clock
) -> None:
    presence = Presence(clock, is_wanted=True)
    assert presence.is_here()
    clock.now += 10 * LOOK_SECONDS
    assert presence.is_here()
    assert option.calls == ["look"]
    assert presence.doubt(), "others can still opt in"
    assert presence.doubt()
    assert option.calls == ["look"] * 2
    option.is_here = False
    assert presence.doubt(), "it is too early for another look"
    clock.now += LOOK_SECONDS
    assert not presence.doubt()
    assert not presence.is_here()


def test_without_descriptors_it_is_absent_for_now(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    def lack() -> bool:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(sockets, "is_installed", lack)
    assert not Presence(clock, is_wanted=True).is_here()
