"""Which port the route of a connection leads to, or what is missing."""

from __future__ import annotations

import errno
import ipaddress
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.config import Config
from pysmc.errors import FabricError, FabricUnavailable
from pysmc.fabric import open_finder, verbs_route
from pysmc.fabric.netlink import Netlink, Route
from pysmc.fabric.verbs_loading import Pyverbs
from pysmc.fabric.verbs_route import KNOWN_MAX, PortFinder
from tests.fabric.netns import ip, network_namespace
from tests.fabric.sysfs import Sysfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NET = """link set lo up
link add va type veth peer name vb
addr add 10.0.0.1/24 dev va
addr add 10.0.0.5/24 dev va
link add va.7 type veth peer name vb.7
addr add 10.7.0.1/24 dev va.7
link set vb up
link set vb.7 up
link set va up
link set va.7 up"""

CONFIG = Config(fabrics=("verbs",), ueids=("LAN",))


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


@pytest.fixture
def finder(sysfs: Sysfs) -> Iterator[PortFinder]:
    with network_namespace():
        for words in NET.splitlines():
            ip(words)
        made = PortFinder(CONFIG, sysfs.root)
        yield made
        made.close()
        made.close()


def find(finder: PortFinder, local: str, peer: str, interface: int = 0) -> str:
    """Give the name of the port that is found, or the reason."""
    try:
        return finder.find(packed(local), packed(peer), interface).name
    except FabricUnavailable as error:
        return error.detail


@pytest.mark.netns
def test_the_route_of_the_connection_decides(sysfs: Sysfs, finder: PortFinder) -> None:
    port = sysfs.usual()
    assert find(finder, "10.0.0.1", "10.0.0.2") == "rxe0:1:1"
    assert find(finder, "10.0.0.5", "10.0.0.2") == "rxe0:1:1", "the same subnet"
    lo = "network device lo carries the connection, but no RDMA device"
    assert find(finder, "127.0.0.1", "127.0.0.1") == lo
    assert find(finder, "10.0.0.1", "10.0.0.1") == lo
    sysfs.netdev("va.7", kind="vlan", below="va")
    assert find(finder, "10.7.0.1", "10.7.0.2") == (
        "network device va.7 is a VLAN without a GID"
    )
    sysfs.gid(port, 2, "10.7.0.1", "va.7")
    assert find(finder, "10.7.0.1", "10.7.0.2") == "rxe0:1:2"
    assert find(finder, "10.9.0.1", "10.9.0.2") == (
        "the route from 10.9.0.1 to 10.9.0.2 cannot be found: Network is unreachable"
    )


@pytest.mark.netns
def test_what_is_remembered_is_looked_at_again(
    sysfs: Sysfs, finder: PortFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = sysfs.usual()
    assert find(finder, "10.0.0.1", "10.0.0.2") == "rxe0:1:1"
    with monkeypatch.context() as patched:
        patched.setattr(verbs_route, "list_ports", lambda root: pytest.fail("again"))
        assert find(finder, "10.0.0.1", "10.0.0.3") == "rxe0:1:1"
    (port / "state").write_text("1: DOWN\n")
    assert find(finder, "10.0.0.1", "10.0.0.2").endswith("a port that is DOWN")
    (port / "state").write_text("4: ACTIVE\n")
    sysfs.gid(port, 1, "10.0.0.99", "va")
    sysfs.gid(port, 3, "10.0.0.1", "va")
    assert find(finder, "10.0.0.1", "10.0.0.2") == "rxe0:1:3"


class FakeNetlink:
    """Every route leads over device 1, which has no addresses."""

    closed = False

    def route(self, *_: Any) -> Route:
        return Route(1, None, is_local=False)

    def addresses(self, interface: int) -> list[Any]:
        raise OSError(errno.EPERM, "forbidden")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def anywhere(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> PortFinder:
    monkeypatch.setattr(verbs_route, "Netlink", FakeNetlink)
    monkeypatch.setattr("socket.if_indextoname", lambda number: "va")
    return PortFinder(CONFIG, sysfs.root)


@pytest.mark.parametrize("at", ["name", "netdev", "rdma"])
def test_an_interface_that_vanishes_while_it_is_looked_up(
    sysfs: Sysfs, anywhere: PortFinder, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Each look may be the first one that does not find it."""
    monkeypatch.setattr(FakeNetlink, "addresses", lambda *_: [])
    sysfs.usual()
    assert find(anywhere, "10.0.0.1", "10.0.0.2") == "rxe0:1:1"

    def vanished(_: int) -> str:
        raise OSError(errno.ENODEV, "No such device")

    match at:
        case "name":
            monkeypatch.setattr("socket.if_indextoname", vanished)
            words = "cannot be found: No such device"
        case "netdev":
            shutil.rmtree(sysfs.net / "va")
            (sysfs.root / "rxe0/ports/1/gid_attrs/ndevs/1").unlink()
            words = "va"
        case _:
            shutil.rmtree(sysfs.root / "rxe0")
            words = "this machine has no RDMA device"
    assert words in find(anywhere, "10.0.0.1", "10.0.0.2")
    anywhere._known.clear()
    assert words in find(anywhere, "10.0.0.1", "10.0.0.2")


def test_addresses_that_cannot_be_read(anywhere: PortFinder) -> None:
    assert find(anywhere, "10.0.0.1", "10.0.0.2") == (
        "the addresses of va cannot be read: forbidden"
    )


def test_not_everything_is_remembered(
    sysfs: Sysfs, anywhere: PortFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeNetlink, "addresses", lambda *_: [])
    port = sysfs.usual()
    for number in range(KNOWN_MAX + 1):
        sysfs.gid(port, 1, f"10.0.0.{number + 1}", "va")
        assert find(anywhere, f"10.0.0.{number + 1}", "10.0.0.200") == "rxe0:1:1"
    assert len(anywhere._known) == 1


def test_a_bridge_is_carried_by_what_is_below(
    sysfs: Sysfs, anywhere: PortFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeNetlink, "addresses", lambda *_: [])
    sysfs.netdev("va", kind="bridge", below="bond0")
    sysfs.netdev("bond0", kind="bond", below="eth1 eth0")
    sysfs.netdev("eth0", below="va")  # a circle, which no kernel has
    port = sysfs.port("mlx5_0")
    sysfs.gid(port, 0, "10.0.0.1", "eth0")
    assert find(anywhere, "10.0.0.1", "10.0.0.2") == "mlx5_0:1:0"
    (sysfs.net / "va" / "uevent").write_text("DEVTYPE=vlan\n")
    anywhere._known.clear()
    with pytest.raises(FabricUnavailable, match="VLAN without a GID") as caught:
        anywhere.find(packed("10.0.0.1"), packed("10.0.0.2"))
    assert caught.value.status == "VLAN"


def test_a_configured_device_needs_no_route(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs_route, "Netlink", lambda: pytest.fail("asked"))
    sysfs.usual()
    config = Config(fabrics=("verbs",), ueids=("LAN",), rdma_device="rxe0:1:1")
    finder = PortFinder(config, sysfs.root)
    assert find(finder, "127.0.0.1", "127.0.0.1") == "rxe0:1:1"
    finder.close()


def test_netlink_that_is_forbidden(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden() -> Netlink:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(verbs_route, "Netlink", forbidden)
    assert find(PortFinder(CONFIG, sysfs.root), "10.0.0.1", "10.0.0.2") == (
        "the route from 10.0.0.1 to 10.0.0.2 cannot be found: Operation not permitted"
    )


@pytest.mark.parametrize("problem", ["", "python3-pyverbs is not installed"])
def test_what_is_missing_for_every_connection(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    def check(config: Config) -> str:
        try:
            PortFinder(config, sysfs.root).check()
        except FabricUnavailable as error:
            return error.detail
        return ""

    found = Pyverbs("", "", "cpython-311", problem)
    monkeypatch.setattr(verbs_route, "find_pyverbs", lambda: found)
    assert "set ueids (PYSMC_UEIDS)" in check(Config(fabrics=("verbs",)))
    assert check(CONFIG) == "this machine has no RDMA device"
    sysfs.usual()
    assert check(CONFIG) == problem


def test_only_a_fabric_with_many_devices_has_a_finder() -> None:
    assert open_finder("shm", CONFIG) is None
    finder = open_finder("verbs", CONFIG)
    assert finder is not None
    assert finder.eids == ("LAN",)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EPERM])
def test_what_cannot_be_looked_for_is_not_absent(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """At the limit of descriptors the next connection may find all of it."""

    def failing(*_: object) -> Any:
        raise OSError(number, "not now")

    expected = FabricUnavailable if number == errno.EPERM else FabricError
    sysfs.usual()
    finder = PortFinder(CONFIG, sysfs.root)
    monkeypatch.setattr(verbs_route, "find_pyverbs", failing)
    monkeypatch.setattr(verbs_route, "Netlink", failing)
    for look in (finder.check, lambda: finder.find(bytes(4), bytes(4))):
        with pytest.raises(FabricError, match="not now") as caught:
            look()
        assert type(caught.value) is expected
