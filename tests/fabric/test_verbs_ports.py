"""What sysfs says of RoCE ports, and which GID a connection gets, or why none."""

from __future__ import annotations

import errno
import ipaddress
from typing import TYPE_CHECKING

import pytest

from pysmc.errors import FabricError, FabricUnavailable
from pysmc.fabric.verbs_ports import (
    EMPTY_GIDS_IN_A_ROW,
    RdmaPort,
    choose,
    device_names,
    list_ports,
    mtu_code_of,
    read_port,
    usable,
)
from tests.fabric.sysfs import Sysfs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


def test_every_gid_is_listed_with_all_that_is_known(sysfs: Sysfs) -> None:
    sysfs.usual()
    link_local, mapped = list_ports(sysfs.root)
    assert mapped == RdmaPort(
        device="rxe0",
        port=1,
        gid_index=1,
        gid=bytes(10) + b"\xff\xff\n\0\0\1",
        gid_type="RoCE v2",
        netdev="va",
        mac=b"\2\0\0\0\0\1",
        state="ACTIVE",
        mtu_code=3,
    )
    assert (mapped.name, str(mapped.address)) == ("rxe0:1:1", "10.0.0.1")
    assert str(link_local.address) == "fe80::1"
    assert usable([link_local, mapped]) == [mapped]
    assert read_port("rxe0", 1, 1, sysfs.root) == mapped
    assert read_port("rxe0", 1, 2, sysfs.root) is None
    assert read_port("rxe0", 2, 1, sysfs.root) is None
    assert read_port("rxe7", 1, 1, sysfs.root) is None


def test_without_rdma_there_is_nothing(sysfs: Sysfs) -> None:
    assert device_names(sysfs.root) == []
    assert list_ports(sysfs.root) == []
    sysfs.root.mkdir()
    assert list_ports(sysfs.root) == []
    (sysfs.root / "rxe0").mkdir()
    assert device_names(sysfs.root) == ["rxe0"]
    assert list_ports(sysfs.root) == [], "it goes away while it is read"


def test_ports_and_holes_of_the_table(sysfs: Sysfs) -> None:
    sysfs.netdev("eth0")
    for number in (1, 2, 10):
        port = sysfs.port("mlx5_0", number)
        sysfs.gid(port, 3, f"10.0.0.{number}", "eth0")
        sysfs.gid(port, 60, f"10.0.1.{number}", "eth0")
    found = [port.name for port in list_ports(sysfs.root)]
    assert found == [
        f"mlx5_0:{number}:{index}" for number in (1, 2, 10) for index in (3, 60)
    ]


def test_a_table_is_not_read_to_its_end(sysfs: Sysfs) -> None:
    sysfs.netdev("eth0")
    port = sysfs.port("mlx5_0")
    sysfs.gid(port, EMPTY_GIDS_IN_A_ROW, "10.0.0.1", "eth0")
    assert list_ports(sysfs.root) == []


@pytest.mark.parametrize(
    ("mtu", "code"),
    [(0, 1), (351, 1), (352, 1), (607, 1), (608, 2), (1500, 3), (4192, 5), (9000, 5)],
)
def test_the_largest_mtu_that_fits(mtu: int, code: int) -> None:
    assert mtu_code_of(mtu) == code


def test_a_network_device_that_says_nothing(sysfs: Sysfs) -> None:
    port = sysfs.port("mlx5_0", state="")
    sysfs.gid(port, 0, "10.0.0.1", "eth0")
    sysfs.gid(port, 1, "fd00::1", "", kind="IB/RoCE v1")
    named, unnamed = list_ports(sysfs.root)
    assert (named.mac, named.mtu_code, named.state) == (bytes(6), 1, "")
    assert unnamed.netdev == ""
    path = sysfs.netdev("eth0")
    (path / "address").write_text("02:00\n")
    assert list_ports(sysfs.root)[0].mac == bytes(6)
    assert list_ports(sysfs.root)[0].mtu_code == 3


def test_a_software_device_has_no_parent_and_serves_all_the_same(sysfs: Sysfs) -> None:
    """Others have a link to a device of a bus; what is not asked for is not missed."""
    sysfs.usual()
    assert [path.name for path in (sysfs.root / "rxe0").iterdir()] == ["ports"]
    assert [path.name for path in sysfs.net.iterdir()] == ["va"]
    assert pick(sysfs, "10.0.0.1", "va") == "rxe0:1:1"


def pick(
    sysfs: Sysfs,
    local: str,
    *netdevs: str,
    subnets: Sequence[str] = (),
    configured: str = "",
) -> str:
    """Choose, and give the name of what was chosen or the reason."""
    try:
        found = choose(
            list_ports(sysfs.root),
            local=ipaddress.ip_address(local),
            netdevs=netdevs,
            subnets=[ipaddress.ip_interface(each) for each in subnets],
            configured=configured,
        )
    except FabricUnavailable as error:
        return error.detail
    return found.name


@pytest.fixture
def many(sysfs: Sysfs) -> Sysfs:
    """Two ports on two network devices, and a VLAN."""
    sysfs.netdev("eth0")
    sysfs.netdev("eth1")
    sysfs.netdev("eth0.7", kind="vlan", below="eth0")
    first, second = sysfs.port("mlx5_0"), sysfs.port("mlx5_1")
    for index, kind in enumerate(("IB/RoCE v1", "RoCE v2")):
        sysfs.gid(first, index, "fe80::1", "eth0", kind)
        sysfs.gid(first, 2 + index, "10.0.0.1", "eth0", kind)
        sysfs.gid(first, 4 + index, "10.7.0.1", "eth0.7", kind)
        sysfs.gid(second, index, "10.1.0.1", "eth1", kind)
    sysfs.gid(first, 6, "10.0.0.33", "eth0")
    sysfs.gid(first, 7, "fd00::1", "eth0")
    return sysfs


def test_the_network_device_decides_and_then_the_address(many: Sysfs) -> None:
    assert pick(many, "10.0.0.1", "eth0") == "mlx5_0:1:3"
    assert pick(many, "10.0.0.33", "eth0") == "mlx5_0:1:6"
    assert pick(many, "fd00::1", "eth0") == "mlx5_0:1:7"
    assert pick(many, "10.7.0.1", "eth0.7") == "mlx5_0:1:5"
    assert pick(many, "10.1.0.1", "eth1") == "mlx5_1:1:1"


def test_without_the_very_address_the_subnet_counts(many: Sysfs) -> None:
    subnets = ("10.9.0.1/24", "10.0.0.5/24", "fd00::5/64")
    assert pick(many, "10.0.0.5", "eth0", subnets=subnets) == "mlx5_0:1:3"
    assert pick(many, "fd00::5", "eth0", subnets=subnets) == "mlx5_0:1:7"
    why = pick(many, "10.9.0.1", "eth0", subnets=subnets)
    assert why == (
        "network device eth0: no GID is in the subnet of 10.9.0.1; there are 10.0.0.1,"
        " 10.0.0.33, fd00::1"
    )


def test_a_device_below_stands_in(many: Sysfs) -> None:
    subnets = ("10.0.0.5/24",)
    assert pick(many, "10.0.0.5", "br0", "eth0", subnets=subnets) == "mlx5_0:1:3"
    assert pick(many, "10.1.0.1", "bond0", "eth9", "eth1") == "mlx5_1:1:1"


def test_the_configuration_decides_alone(many: Sysfs) -> None:
    assert pick(many, "127.0.0.1", configured="mlx5_1") == "mlx5_1:1:1"
    assert pick(many, "10.0.0.33", configured="mlx5_0") == "mlx5_0:1:6"
    assert pick(many, "::1", configured="mlx5_0:1") == "mlx5_0:1:7"
    assert pick(many, "::1", configured="mlx5_1") == "mlx5_1:1:1"
    assert pick(many, "10.0.0.1", configured="mlx5_0:1:5") == "mlx5_0:1:5"


@pytest.mark.parametrize(
    ("configured", "why"),
    [
        (
            "mlx5_2",
            "rdma_device mlx5_2 is not there; there are mlx5_0:1:0,",
        ),
        ("mlx5_1:2", "rdma_device mlx5_1:2 is not there; there are"),
        ("mlx5_1:1:0", "the GIDs of mlx5_1:1:0: GID 10.1.0.1 is of type IB/RoCE v1"),
        ("mlx5_0:1:1", "the GIDs of mlx5_0:1:1: GID fe80::1 is link-local"),
    ],
)
def test_a_configuration_that_fits_nothing(
    many: Sysfs, configured: str, why: str
) -> None:
    assert pick(many, "10.0.0.1", configured=configured).startswith(why)


def test_each_way_to_fail_has_its_own_words(sysfs: Sysfs) -> None:
    assert pick(sysfs, "10.0.0.1", "eth0") == "this machine has no RDMA device"
    sysfs.netdev("eth0")
    port = sysfs.port("mlx5_0", state="1: DOWN")
    sysfs.gid(port, 0, "10.0.0.1", "eth0", "IB/RoCE v1")
    assert pick(sysfs, "127.0.0.1", "lo") == (
        "network device lo carries the connection, but no RDMA device"
    )
    only_v1 = "GID 10.0.0.1 is of type IB/RoCE v1, not RoCE v2"
    assert pick(sysfs, "10.0.0.1", "eth0") == f"network device eth0: {only_v1}"
    sysfs.gid(port, 0, "fe80::1", "eth0")
    link_local = "GID fe80::1 is link-local, which cannot be routed"
    assert pick(sysfs, "10.0.0.1", "eth0") == f"network device eth0: {link_local}"
    sysfs.gid(port, 0, "10.0.0.1", "eth0")
    down = "GID 10.0.0.1 belongs to a port that is DOWN"
    assert pick(sysfs, "10.0.0.1", "eth0") == f"network device eth0: {down}"
    (port / "state").write_text("4: ACTIVE\n")
    assert pick(sysfs, "10.0.0.1", "eth0") == "mlx5_0:1:0"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_a_lack_of_descriptors_is_not_a_lack_of_devices(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    sysfs.usual()

    def short(*_: object) -> int:
        raise OSError(number, "there are no more")

    with monkeypatch.context() as patched:
        patched.setattr("pysmc.fabric.verbs_ports.os.open", short)
        for look in (
            lambda: list_ports(sysfs.root),
            lambda: read_port("rxe0", 1, 1, sysfs.root),
        ):
            with pytest.raises(FabricError, match=errno.errorcode[number]) as caught:
                look()
            assert caught.value.status == "NO_MEMORY"
    monkeypatch.setattr("pathlib.Path.iterdir", short)
    with pytest.raises(FabricError, match="NO_MEMORY"):
        device_names(sysfs.root)


def test_ports_that_cannot_be_counted(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysfs.usual()
    (sysfs.root / "rxe0" / "ports" / "x").mkdir()
    assert list_ports(sysfs.root) == [], "no kernel names a port so"
