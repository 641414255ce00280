"""The library, the kernel and the devices: each verdict on machines that are faked."""

from __future__ import annotations

import pytest

from pysmc.cli.checks import verbs_host
from pysmc.cli.checks.verbs_host import soft_roce_commands
from pysmc.fabric.verbs_loading import Pyverbs

RELEASE = "6.12.41+deb12-amd64"
MODULES = f"/lib/modules/{RELEASE}"
MODULE = "kernel/drivers/infiniband/sw/rxe/rdma_rxe.ko"
DENIED = "Permission denied"


@pytest.mark.parametrize(
    ("found", "status", "seen"),
    [
        (
            Pyverbs("/lib/pyverbs", "44.0", "cpython-311", ""),
            "ok",
            "pyverbs of rdma-core 44.0, for cpython-311, in /lib/pyverbs.",
        ),
        (
            Pyverbs("/lib/pyverbs", "", "cpython-311", ""),
            "ok",
            "pyverbs of unknown version, for cpython-311, in /lib/pyverbs.",
        ),
        (
            Pyverbs("", "", "cpython-312", "python3-pyverbs is not installed"),
            "fail",
            "python3-pyverbs is not installed.",
        ),
    ],
)
def test_pyverbs(found, status, seen, machine):
    finding = verbs_host.pyverbs.look(machine(find_pyverbs=lambda: found))
    assert (finding.status, finding.seen) == (status, seen)


class TestProviders:
    def test_there(self, machine, rxe):
        finding = verbs_host.providers.look(machine(rxe()))
        assert (finding.status, finding.seen) == ("ok", "2 providers, with rxe.")

    def test_none(self, machine):
        finding = verbs_host.providers.look(machine({"/etc/libibverbs.d/README": ""}))
        assert finding.status == "fail"
        assert "no provider in /etc/libibverbs.d" in finding.seen

    def test_none_for_soft_roce(self, machine, rxe, tmp_path):
        here = machine(rxe())
        (tmp_path / "etc/libibverbs.d/rxe.driver").unlink()
        finding = verbs_host.providers.look(here)
        assert finding.status == "fail"
        assert "no provider for soft-RoCE (rxe0)" in finding.seen

    def test_without_rxe_where_nobody_wants_it(self, machine):
        here = machine({"/etc/libibverbs.d/mlx5.driver": ""})
        finding = verbs_host.providers.look(here)
        assert (finding.status, finding.seen) == ("ok", "1 providers, without rxe.")


class TestSoftRoce:
    def look(self, machine, files, **fields):
        return verbs_host.soft_roce.look(machine(files, **fields))

    def test_loaded(self, machine):
        finding = self.look(machine, {"/sys/module/rdma_rxe/refcnt": "0"})
        assert finding.status == "ok"
        assert "is loaded" in finding.seen

    @pytest.mark.parametrize(
        ("file", "text"),
        [("modules.dep", f"{MODULE}.xz: other.ko.xz\n"), ("modules.builtin", MODULE)],
    )
    def test_can_be_loaded(self, file, text, machine):
        files = {f"{MODULES}/{file}": "x\n" * 100_000 + text}
        finding = self.look(machine, files)
        assert finding.status == "ok"
        assert "as root: modprobe rdma_rxe && rdma link add rxe0 " in finding.seen

    def test_a_kernel_without_it(self, machine):
        finding = self.look(machine, {f"{MODULES}/modules.dep": "kernel/fs/9p/9p.ko:"})
        assert finding.status == "skip"
        assert RELEASE in finding.seen
        assert "not linux-image-cloud-amd64" in finding.remedy

    def test_a_container_does_not_tell(self, machine):
        finding = self.look(machine, {"/.dockerenv": ""})
        assert finding.status == "skip"
        assert finding.seen.endswith("(in a container: ask the host).")

    @pytest.mark.parametrize(
        ("files", "netdev"),
        [
            (
                {
                    verbs_host.ROUTES: "Iface Destination Gateway\n"
                    "ens3 0000000A 00000000\nens4 00000000 0100000A\n",
                    "/sys/class/net/abc/mtu": "",
                },
                "ens4",
            ),
            ({"/sys/class/net/lo/mtu": "", "/sys/class/net/wlan0/mtu": ""}, "wlan0"),
            ({}, "eth0"),
        ],
    )
    def test_the_commands_name_a_network_device(self, files, netdev, machine):
        _, second = soft_roce_commands(machine(files))
        assert second == f"rdma link add rxe0 type rxe netdev {netdev}"


class TestDevices:
    def test_none(self, machine):
        finding = verbs_host.devices.look(machine())
        assert finding.status == "fail"
        assert finding.seen == "The kernel has no RDMA device."
        assert "rdma link add rxe0 type rxe netdev eth0" in finding.remedy

    def test_soft_and_hard(self, machine, rxe, tmp_path):
        here = machine({**rxe(), **rxe("mlx5_0", "eth1", node=1)})
        (tmp_path / "sys/class/infiniband/mlx5_0/parent").unlink()
        finding = verbs_host.devices.look(here)
        assert (finding.status, finding.seen) == ("ok", "mlx5_0, rxe0 (soft-RoCE).")


class TestPermissions:
    def look(self, machine, files, refused=()):
        def open_error(path):
            return DENIED if path.name in refused else ""

        return verbs_host.permissions.look(machine(files, open_error=open_error))

    def test_all(self, machine, rxe):
        finding = self.look(machine, {**rxe(), **rxe("rxe1", "vb", node=1)})
        assert finding.status == "ok"
        assert "uverbs0 (rxe0), /dev/infiniband/uverbs1 (rxe1)" in finding.seen

    def test_none(self, machine, rxe):
        finding = self.look(machine, rxe(), refused=["uverbs0"])
        assert finding.status == "fail"
        assert finding.seen.startswith(
            "User 1000 cannot open /dev/infiniband/uverbs0 (rxe0): Permission denied,"
            " mode 0644, owner "
        )

    def test_some(self, machine, rxe):
        files = {**rxe(), **rxe("rxe1", "vb", node=1)}
        finding = self.look(machine, files, refused=["uverbs1"])
        assert finding.status == "warn"
        assert "uverbs1 (rxe1)" in finding.seen
        assert "uverbs0" not in finding.seen

    def test_no_device_file(self, machine, rxe, tmp_path):
        here = machine(rxe(), open_error=lambda path: "No such file or directory")
        (tmp_path / "dev/infiniband/uverbs0").unlink()
        finding = verbs_host.permissions.look(here)
        assert finding.status == "fail"
        assert finding.seen.endswith("uverbs0 (rxe0): No such file or directory.")

    def test_without_the_kernels_module(self, machine):
        finding = self.look(machine, {"/sys/class/infiniband/rxe0/parent": "va"})
        assert finding.status == "fail"
        assert "modprobe ib_uverbs" in finding.remedy
