"""Which devices a loop has, and what it says when there are none."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from contextlib import closing
from dataclasses import replace

from pysmc.aio import devices as devices_module
from pysmc.aio.devices import (
    ALL,
    CODEC,
    FRESH_MAX,
    FRESH_SECONDS,
    RECHECK_SECONDS,
    Devices,
    raise_descriptor_limit,
)
from pysmc.aio.driver import Driver
from pysmc.config import Config
from pysmc.core.handshake import NOTHING_ABSENT
from pysmc.errors import FabricError, FabricUnavailable
from pysmc.fabric.sim import SimNetwork
from pysmc.fabric.verbs_ports import RdmaPort

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


# A fabric with a device for each port


PORT = RdmaPort(
    device="rxe0",
    port=1,
    gid_index=1,
    gid=bytes(16),
    gid_type="RoCE v2",
    netdev="va",
    mac=bytes(6),
    state="ACTIVE",
    mtu_code=3,
)


class FakeFinder:
    """Finds the port that it is told to; a text is the reason for none."""

    def __init__(self) -> None:
        self.missing = ""
        self.port: RdmaPort | str = PORT
        self.asked: list[tuple[bytes, bytes, int]] = []
        self.checks = 0
        self.status = "UNAVAILABLE"
        self.closed = False

    def __call__(self, name, config):
        return self if name == "verbs" else None

    def check(self) -> None:
        self.checks += 1
        if self.missing:
            raise FabricUnavailable("open verbs", "UNAVAILABLE", self.missing)

    def find(self, local, peer, interface=0):
        self.asked.append((local, peer, interface))
        if isinstance(self.port, str):
            raise FabricUnavailable("open verbs", self.status, self.port)
        return self.port

    def close(self) -> None:
        self.closed = True


class Rig:
    """Devices of the fabrics "shm" and "verbs", whose ports are simulated."""

    def __init__(self, *fabrics: str, ueids: tuple[str, ...] = ("LAN",)) -> None:
        self.network = SimNetwork()
        self.finder = FakeFinder()
        self.opened: list[RdmaPort | None] = []
        self.dismissed: list[object] = []
        self.attended: list[object] = []
        self.error: Exception | None = None
        self.in_use: set[str] = set()
        self.now = 0.0
        self.devices = Devices(
            Config(fabrics=fabrics, ueids=ueids),
            self.open_one,
            self.attended.append,
            self.dismissed.append,
            self.finder,
        )

    def open_one(self, name, *, peer_id, config, codec, port=None):
        assert (name == "verbs") == (port is not None)
        if self.error is not None:
            raise self.error
        self.opened.append(port)
        device = self.network.device(bytes((len(self.opened),)) + PEER_ID[1:])
        device.fabric = name
        if name == "shm":
            device.eid = "HERE"
        return device

    def fit(self, later: float = FRESH_SECONDS, host: str = "127.0.0.1"):
        self.now += later
        with closing(socket.create_server((host, 0))) as listener:
            there = listener.getsockname()
            with closing(socket.create_connection(there)) as sock:
                return self.devices.fitting(sock, lambda: self.in_use, self.now)

    def names(self) -> list[str]:
        return [offer.device for offer in self.fit().offers]

    def close(self) -> None:
        for device in list(self.devices.by_name.values()):
            device.close()
        self.devices.close()


def test_a_port_is_opened_by_the_first_connection_that_needs_it() -> None:
    rig = Rig("verbs")
    assert rig.devices.open(PEER_ID) == []
    assert rig.devices.why_none() is None
    assert rig.opened == []
    assert rig.devices.by_name == {}
    for _ in range(3):
        (offer,) = rig.fit().offers
        assert (offer.device, offer.eids) == ("verbs:rxe0:1:1", ("LAN",))
    assert rig.opened == [PORT]
    assert rig.attended == [rig.devices.by_name["verbs:rxe0:1:1"]]
    local, peer, interface = rig.finder.asked[0]
    assert (local, peer, interface) == (b"\x7f\0\0\1", b"\x7f\0\0\1", 0)
    rig.finder.port = replace(PORT, device="rxe1", netdev="vb", state="ACTIVE")
    assert rig.names() == ["verbs:rxe1:1:1"]
    assert len(rig.devices.by_name) == 2
    rig.close()
    assert rig.finder.closed


def test_offers_are_in_the_order_of_the_configuration() -> None:
    for fabrics, expected in (
        (("shm", "verbs"), ["shm", "verbs:rxe0:1:1"]),
        (("verbs", "shm"), ["verbs:rxe0:1:1", "shm"]),
    ):
        rig = Rig(*fabrics)
        (fixed,) = rig.devices.open(PEER_ID)
        assert fixed.device == "shm"
        assert rig.names() == expected
        assert rig.fit().absent == NOTHING_ABSENT
        rig.close()


def test_without_ports_all_devices_fit_and_nothing_is_asked() -> None:
    rig = Rig("shm")
    rig.devices.open(PEER_ID)
    assert rig.fit() is ALL
    assert ALL.refusal is None
    assert not rig.devices.recheck(0.0)
    rig.close()


def test_a_route_without_a_port_is_the_reason_for_its_eids() -> None:
    rig = Rig("shm", "verbs", ueids=("LAN", "WAN"))
    rig.devices.open(PEER_ID)
    rig.finder.port = "network device lo carries the connection, but no RDMA device"
    fitting = rig.fit()
    assert [offer.device for offer in fitting.offers] == ["shm"]
    assert fitting.refusal is None
    assert set(fitting.absent) == {"LAN", "WAN"}
    why = fitting.absent["LAN"]
    assert (why.name, why.side, why.code) == ("NO_DEVICE", "local", 0x03030000)
    assert "verbs: network device lo carries the connection" in why.text
    rig.close()
    rig = Rig("verbs")
    rig.devices.open(PEER_ID)
    rig.finder.port, rig.finder.status = "va.7 is a VLAN without a GID", "VLAN"
    refusal = rig.fit().refusal
    assert refusal is not None
    assert (refusal.name, refusal.code) == ("VLAN", 0x03080000)


def test_what_ran_out_has_its_own_reason() -> None:
    for error, name in (
        (FabricError("open", "NO_MEMORY", "EMFILE: no descriptors"), "LIMIT"),
        (FabricError("open", "NO_MEMORY", "RLIMIT_MEMLOCK allows 65536"), "MEMLOCK"),
        (FabricError("open", "NO_MEMORY", "ENOMEM"), "NO_MEMORY"),
        (FabricError("open", "EIO", "the device does not answer"), "NO_DEVICE"),
        (OSError(errno.EIO, "no such thing"), "NO_DEVICE"),
    ):
        rig = Rig("verbs")
        rig.devices.open(PEER_ID)
        rig.error = error
        refusal = rig.fit().refusal
        assert refusal is not None
        assert (refusal.name, refusal.side) == (name, "local")
        rig.error = None
        assert rig.names() == ["verbs:rxe0:1:1"], "the next one may succeed"
        rig.close()


def test_the_next_connection_of_a_moment_is_not_looked_up_anew() -> None:
    rig = Rig("verbs")
    rig.devices.open(PEER_ID)
    first = rig.fit()
    for _ in range(3):
        assert rig.fit(later=FRESH_SECONDS / 8) == first
    assert len(rig.finder.asked) == 1
    rig.fit(later=FRESH_SECONDS)
    assert len(rig.finder.asked) == 2
    (device,) = rig.devices.by_name.values()
    device.is_gone = True
    rig.fit(later=0)
    assert len(rig.finder.asked) == 3, "what is gone is not offered"
    assert len(rig.opened) == 2
    rig.close()


def test_a_device_that_has_the_name_of_one_that_is_gone_is_another() -> None:
    """The place in the port's table got another address meanwhile."""
    rig = Rig("verbs")
    rig.devices.open(PEER_ID)
    rig.fit()
    rig.finder.port = replace(PORT, gid=bytes(15) + b"\2", netdev="vb")
    rig.fit(later=0, host="127.0.0.2")
    assert list(rig.devices.by_name) == ["verbs:rxe0:1:1"]
    assert rig.opened == [PORT, rig.finder.port]
    rig.finder.port = "no RDMA device has this address any more"
    assert rig.fit(later=0).offers == [], "not over the other address's port"
    rig.close()


def test_not_every_pair_of_addresses_is_kept_in_mind() -> None:
    rig = Rig("verbs")
    rig.devices.open(PEER_ID)
    rig.devices._fresh.update(
        (("verbs", b"", b"", n), (9.0, "")) for n in range(FRESH_MAX)
    )
    rig.fit()
    assert len(rig.devices._fresh) == 1
    rig.close()


def test_a_connection_that_is_gone_has_no_port() -> None:
    rig = Rig("verbs")
    rig.devices.open(PEER_ID)
    with closing(socket.socket()) as never_connected:
        refusal = rig.devices.fitting(never_connected, set, 0.0).refusal
    assert refusal is not None
    assert refusal.name == "NO_DEVICE"


def test_a_fabric_that_is_not_there_is_looked_for_again(caplog) -> None:
    rig = Rig("shm", "verbs", ueids=())
    rig.finder.missing = "this machine has no RDMA device"
    rig.devices.open(PEER_ID)
    assert rig.devices.why_none() is None, "there is shm"
    assert set(rig.fit().absent) == {""}
    assert caplog.text.count("this machine has no RDMA device") == 1
    assert not rig.devices.recheck(10.0)
    assert rig.finder.checks == 2
    assert not rig.devices.recheck(10.9), "not so soon"
    assert rig.finder.checks == 2
    rig.finder.missing = ""
    assert rig.devices.recheck(11.0)
    assert not rig.devices.recheck(20.0)
    assert rig.names() == ["shm", "verbs:rxe0:1:1"]
    assert caplog.text.count("this machine has no RDMA device") == 1
    rig.close()
    alone = Rig("verbs")
    alone.finder.missing = "this machine has no RDMA device"
    assert alone.devices.open(PEER_ID) == []
    why = alone.devices.why_none()
    assert why is not None
    assert "verbs: this machine has no RDMA device." in why.text


def test_a_fabric_that_appears_beside_another_is_found(kit) -> None:
    async def scenario() -> None:
        rig, now = Rig("shm", "verbs"), [10.0]
        rig.finder.missing = "this machine has no RDMA device"
        config = Config(fabrics=("shm", "verbs"), ueids=("LAN",))
        loop = asyncio.get_running_loop()
        driver = Driver(
            loop,
            config,
            opener=rig.open_one,
            clock=lambda: now[0],
            finder=rig.finder,
        )
        assert driver.open() is None
        listener = socket.create_server(("127.0.0.1", 0))
        sock = socket.create_connection(listener.getsockname())
        with listener, sock:
            offers = [each.device for each in driver.fitting(sock).offers]
            assert offers == ["shm"]
            rig.finder.missing = ""
            now[0] += RECHECK_SECONDS
            offers = [each.device for each in driver.fitting(sock).offers]
            assert offers == ["shm", "verbs:rxe0:1:1"]
        driver.close()

    kit.run(scenario)


def test_a_port_with_another_address_is_another_device() -> None:
    rig = Rig("verbs")
    rig.devices.open(PEER_ID)
    assert rig.names() == ["verbs:rxe0:1:1"]
    first = rig.devices.by_name["verbs:rxe0:1:1"]
    rig.in_use.add("verbs:rxe0:1:1")
    rig.finder.port = replace(PORT, gid=b"\1" * 16)
    assert rig.names() == ["verbs:rxe0:1:1#2"]
    assert rig.names() == ["verbs:rxe0:1:1#2"]
    assert rig.dismissed == [], "links of the first one live on"
    rig.in_use.clear()
    rig.finder.port = replace(PORT, gid=b"\2" * 16)
    assert rig.names() == ["verbs:rxe0:1:1"]
    assert len(rig.dismissed) == 2
    assert first in rig.dismissed
    rig.close()


def test_a_device_that_cannot_be_watched_is_closed_again() -> None:
    def no_room(device: object) -> None:
        closed.append(device)
        raise OSError(errno.ENOSPC, "no watches")

    for fabric in ("shm", "verbs"):
        closed: list[object] = []
        rig = Rig(fabric)
        rig.devices._attend = no_room
        rig.devices.open(PEER_ID)
        if fabric == "verbs":
            refusal = rig.fit().refusal
            assert refusal is not None
            assert "no watches" in refusal.text
        else:
            assert rig.devices.why_none().name == "LIMIT"
        assert rig.devices.by_name == {}
        assert closed[0] not in rig.network._devices.values()
        rig.devices._attend = None
        rig.devices.open(PEER_ID)
        if fabric == "verbs":
            assert rig.names() == ["verbs:rxe0:1:1"]
        assert len(rig.devices.by_name) == 1
        rig.close()


def test_a_device_that_is_gone_is_offered_to_nobody() -> None:
    rig = Rig("verbs")
    rig.devices.open(PEER_ID)
    rig.names()
    gone = rig.devices.by_name["verbs:rxe0:1:1"]
    gone.is_gone = True
    rig.in_use.add("verbs:rxe0:1:1")
    assert rig.names() == ["verbs:rxe0:1:1"]
    assert rig.dismissed == [gone]
    assert rig.devices.by_name["verbs:rxe0:1:1"] is not gone
    rig.close()


def test_a_removed_device_is_closed_when_that_holds_nobody_up() -> None:
    rig = Rig("verbs")
    rig.devices.open(PEER_ID)
    rig.names()
    device = rig.devices.by_name["verbs:rxe0:1:1"]
    device.is_finishing = True
    assert not rig.devices.remove(device)
    assert not rig.devices.remove(device)
    assert (rig.devices.by_name, rig.devices.leaving) == ({}, [device])
    assert rig.dismissed == []
    assert rig.names() == ["verbs:rxe0:1:1"], "and there is another one at once"
    device.is_finishing = False
    assert rig.devices.remove(device)
    assert rig.devices.remove(device)
    assert (rig.dismissed, rig.devices.leaving) == ([device], [])
    rig.close()


def test_a_removed_device_is_closed_once_and_opened_anew() -> None:
    rig = Rig("verbs")
    rig.devices.open(PEER_ID)
    rig.names()
    device = rig.devices.by_name["verbs:rxe0:1:1"]
    rig.devices.remove(device)
    rig.devices.remove(device)
    assert rig.dismissed == [device]
    assert rig.devices.by_name == {}
    assert rig.names() == ["verbs:rxe0:1:1"]
    assert rig.devices.by_name["verbs:rxe0:1:1"] is not device
    rig.close()
