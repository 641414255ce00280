"""Which devices a loop has, and what it says when there are none."""

from __future__ import annotations

import asyncio
import errno
import os
import resource

from pysmc.aio import devices as devices_module
from pysmc.aio.devices import CODEC, Devices, raise_descriptor_limit
from pysmc.aio.driver import Driver
from pysmc.config import Config
from pysmc.errors import FabricUnavailable
from pysmc.fabric.sim import SimNetwork

PEER_ID = b"device-A"


def test_a_fabric_that_is_not_there_is_remembered(kit, monkeypatch, caplog) -> None:
    tried = []

    def missing(name, **options):
        tried.append(name)
        raise FabricUnavailable("open shm", "UNAVAILABLE", "no memfd here")

    monkeypatch.setattr(devices_module, "open_device", missing)

    async def scenario() -> None:
        driver = Driver(asyncio.get_running_loop(), Config())
        why = driver.open()
        assert why.name == "NO_DEVICE"
        assert "shm: no memfd here." in why.text
        assert driver.open() is why
        assert tried == ["shm"]
        driver.close()

    kit.run(scenario)
    assert "no memfd here" in caplog.text


def test_the_limit_of_descriptors_is_raised(monkeypatch) -> None:
    limits = {"now": (100, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits["now"])

    def setrlimit(which, new) -> None:
        limits["now"] = new

    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    raise_descriptor_limit()
    assert limits["now"] == (4096, 4096)
    raise_descriptor_limit()
    assert limits["now"] == (4096, 4096)

    def forbidden(which, new):
        raise ValueError("not allowed")

    limits["now"] = (100, 4096)
    monkeypatch.setattr(resource, "setrlimit", forbidden)
    raise_descriptor_limit()
    assert limits["now"] == (100, 4096)


def test_without_a_fabric_it_is_switched_off() -> None:
    devices = Devices(Config(fabrics=()))
    assert devices.open(PEER_ID) == []
    assert devices.why_none().name == "DISABLED"


def test_devices_of_another_world_go_by_their_own_name() -> None:
    network = SimNetwork()
    asked = []

    def opener(name, *, peer_id, config, codec):
        asked.append((name, config, codec))
        return network.device(peer_id)

    config = Config(ueids=("ONE", "TWO"))
    devices = Devices(config, opener)
    (offer,) = devices.open(PEER_ID)
    assert asked == [("shm", config, CODEC)]
    assert (offer.fabric, offer.eids) == ("sim", ("ONE", "TWO"))
    assert list(devices.by_name) == ["sim"]
    assert devices.why_none() is None
    devices.by_name["sim"].close()


def test_what_is_short_may_be_there_the_next_time() -> None:
    network = SimNetwork()

    def opener(name, *, peer_id, config, codec):
        if not devices.unavailable:
            raise OSError(errno.EMFILE, "no descriptors")
        return network.device(peer_id)

    devices = Devices(Config(), opener)
    assert devices.open(PEER_ID) == []
    assert devices.why_none().name == "LIMIT"
    assert len(devices.open(PEER_ID)) == 1
    assert devices.why_none() is None
    devices.by_name["sim"].close()


def test_a_device_that_cannot_ring_is_closed_again(monkeypatch) -> None:
    network = SimNetwork()

    def no_more(*_):
        raise OSError(errno.EMFILE, "no descriptors")

    def opener(name, *, peer_id, config, codec):
        return network.device(peer_id)

    devices = Devices(Config(), opener)
    monkeypatch.setattr(os, "eventfd", no_more)
    assert devices.open(PEER_ID) == []
    assert devices.why_none().name == "LIMIT"
    monkeypatch.undo()
    assert len(devices.open(PEER_ID)) == 1, "its peer ID is free again"
    devices.by_name["sim"].close()
