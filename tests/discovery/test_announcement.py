"""An announcement has all of its names, or none."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from pysmc.discovery.announcement import Announcement
from pysmc.discovery.beacon import BeaconRegistry
from pysmc.discovery.rendezvous import Users


@pytest.fixture
async def registry() -> Any:
    made = BeaconRegistry(asyncio.get_running_loop(), Users())
    yield made
    made.close()


async def test_every_name_is_held_until_it_closes(registry: Any) -> None:
    announcement = Announcement(registry, [b"announced", b"announced-too"])
    assert announcement.is_holder
    assert not announcement.is_closed
    assert set(registry._beacons) == {b"announced", b"announced-too"}
    for _ in range(2):
        announcement.close()
        assert not registry._beacons
    assert announcement.is_closed


async def test_one_name_that_is_not_to_be_had_gives_back_the_others(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = registry.hold

    def scarce(name: bytes) -> Any:
        if name == b"second":
            raise OSError(errno.EMFILE, "no descriptors")
        return real(name)

    monkeypatch.setattr(registry, "hold", scarce)
    with pytest.raises(OSError, match="no descriptors"):
        Announcement(registry, [b"first", b"second"])
    assert not registry._beacons
