"""Kernel, settings, limits, control groups and containers, each verdict of them."""

from __future__ import annotations

import resource

import pytest

from pysmc.cli.checks import system
from pysmc.cli.checks.system import container_kind, memory_limit

NOFILE = resource.RLIMIT_NOFILE
INFINITY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("name", "release", "status"),
    [
        ("Linux", "6.12.41+deb12-amd64", "ok"),
        ("Linux", "4.2", "ok"),
        ("Linux", "4.1.52", "fail"),
        ("Linux", "3.18", "fail"),
        ("Linux", "of our own", "ok"),
        ("Darwin", "23.1.0", "fail"),
    ],
)
def test_kernel(name, release, status, machine):
    finding = system.kernel.look(machine(system=name, release=release))
    assert finding.status == status
    assert finding.seen.startswith(f"{name} {release}, x86_64, Python 3.")


class TestConfiguration:
    def look(self, machine, **environ):
        return system.configuration.look(machine(environ=environ))

    def test_nothing_set(self, machine):
        finding = self.look(machine, PATH="/bin", PYSMCX="1")
        assert finding.status == "ok"
        assert finding.seen.startswith("No setting is made")

    def test_what_is_set_is_listed(self, machine):
        finding = self.look(machine, PYSMC_FABRICS="shm,verbs", PYSMC_UEIDS="A.B")
        assert finding.status == "ok"
        assert finding.seen == "Set: PYSMC_FABRICS=shm,verbs, PYSMC_UEIDS=A.B."

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("PYSMC_RMBE_BYTES", "1000", "rmbe_bytes is 1000; allowed is a power of"),
            ("PYSMC_MAX_HANDSHAKES", "many", "max_handshakes (PYSMC_MAX_HANDSHAKES)"),
            ("PYSMC_FABRICS", "rdma", "fabrics is ('rdma',)"),
        ],
    )
    def test_a_bad_value_is_named(self, name, value, words, machine):
        finding = self.look(machine, **{name: value})
        assert finding.status == "fail"
        assert words in finding.seen

    def test_a_misspelt_name_gets_the_nearest_one(self, machine):
        finding = self.look(machine, PYSMC_FABRIC="verbs", PYSMC_ZZZ="1")
        assert finding.status == "warn"
        assert finding.seen == "PYSMC_FABRIC is no setting; PYSMC_FABRICS is."

    def test_a_name_of_somebody_else_is_left_alone(self, machine):
        finding = self.look(machine, PYSMC_ZZZ="1")
        assert finding.status == "ok"
        assert "ZZZ" not in finding.seen


@pytest.mark.parametrize(
    ("limits", "status", "words"),
    [
        ((1024, 524288), "ok", "At most 524288 descriptors (soft limit 1024)."),
        ((INFINITY, INFINITY), "ok", "At most unlimited"),
        ((1024, 4096), "ok", "4096"),
        ((1024, 1024), "warn", "At most 1024"),
    ],
)
def test_descriptors(limits, status, words, machine):
    finding = system.descriptors.look(machine(limits={NOFILE: limits}))
    assert finding.status == status
    assert words in finding.seen


class TestMemory:
    V2 = "/sys/fs/cgroup"
    V1 = "/sys/fs/cgroup/memory"

    def test_no_control_groups(self, machine):
        assert memory_limit(machine()) is None
        assert system.memory.look(machine()).status == "ok"

    def test_the_smallest_of_the_groups_above_counts(self, machine):
        here = machine(
            {
                "/proc/self/cgroup": "0::/a.slice/b.service\n",
                f"{self.V2}/a.slice/memory.max": f"{1 << 30}\n",
                f"{self.V2}/a.slice/b.service/memory.max": "max\n",
            }
        )
        assert memory_limit(here) == 1 << 30
        finding = system.memory.look(here)
        assert finding.status == "ok"
        assert "limit is 1 GiB" in finding.seen
        assert "512 MiB" in finding.seen

    def test_a_container_sees_only_the_top(self, machine):
        here = machine(
            {
                "/proc/self/cgroup": "0::/../../elsewhere\n",
                f"{self.V2}/memory.max": f"{256 << 20}\n",
            }
        )
        assert memory_limit(here) == 256 << 20
        assert system.memory.look(here).status == "warn"

    def test_what_is_pinned_is_compared(self, machine):
        files = {
            "/proc/self/cgroup": "0::/\n",
            f"{self.V2}/memory.max": f"{256 << 20}\n",
        }
        setting = {"PYSMC_MAX_PINNED_BYTES": str(64 << 20)}
        assert system.memory.look(machine(files, environ=setting)).status == "ok"

    def test_version_1(self, machine):
        here = machine(
            {
                "/proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/1\n",
                f"{self.V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{self.V1}/docker/1/memory.limit_in_bytes": f"{1 << 29}\n",
            }
        )
        assert memory_limit(here) == 1 << 29

    def test_version_1_without_a_limit(self, machine):
        here = machine(
            {
                "/proc/self/cgroup": "4:memory:/\n",
                f"{self.V1}/memory.limit_in_bytes": "9223372036854771712\n",
            }
        )
        assert memory_limit(here) is None


class TestContainer:
    @pytest.mark.parametrize(
        ("files", "environ", "kind"),
        [
            ({}, {}, ""),
            ({"/.dockerenv": ""}, {}, "docker"),
            ({"/run/.containerenv": "engine=podman"}, {}, "podman"),
            ({"/run/systemd/container": "lxc\n"}, {}, "lxc"),
            ({}, {"container": "oci"}, "oci"),
            ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ],
    )
    def test_signs(self, files, environ, kind, machine):
        here = machine(files, environ=environ)
        assert container_kind(here) == kind
        finding = system.container.look(here)
        assert finding.status == "ok"
        assert ("network namespace" in finding.seen) is bool(kind)
        assert (f"({kind})" in finding.seen) is bool(kind)

    @pytest.mark.parametrize(
        ("uid_map", "is_mapped"),
        [("0 0 4294967295", False), ("0 100000 65536", True), ("", False)],
    )
    def test_user_namespace(self, uid_map, is_mapped, machine):
        finding = system.container.look(machine({"/proc/self/uid_map": uid_map}))
        assert finding.status == "ok"
        assert ("user namespace" in finding.seen) is is_mapped
