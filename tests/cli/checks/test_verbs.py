"""Ports, GIDs, pinned memory, settings and the exchange, on machines that are faked."""

from __future__ import annotations

import resource

import pytest

from pysmc.cli.checks import verbs
from pysmc.cli.checks.catalogue import CHECKS, FABRICS
from pysmc.cli.checks.check import examine, verdict
from pysmc.cli.checks.verbs import pinned_bytes
from pysmc.discovery.option.trial import Trial
from pysmc.fabric.verbs_loading import Pyverbs

MEMLOCK = resource.RLIMIT_MEMLOCK
INFINITY = resource.RLIM_INFINITY
PYVERBS = Pyverbs("/lib/pyverbs", "44.0", "cpython-311", "")
NO_PYVERBS = Pyverbs("", "", "cpython-311", "python3-pyverbs is not installed")
DENIED = "Permission denied"
IDENTITY = "0 0 4294967295"
SETTINGS = {
    "PYSMC_FABRICS": "shm,verbs",
    "PYSMC_UEIDS": "PYSMC.LAB",
    "PYSMC_DISCOVERY": "local,static",
    "PYSMC_PEERS": "10.0.0.2",
}


class TestPorts:
    def test_active(self, machine, rxe):
        finding = verbs.ports.look(machine(rxe()))
        assert (finding.status, finding.seen) == ("ok", "rxe0:1 ACTIVE.")

    def test_down(self, machine, rxe):
        finding = verbs.ports.look(machine(rxe(state="1: DOWN")))
        assert (finding.status, finding.seen) == ("fail", "rxe0:1 DOWN.")

    def test_one_of_two(self, machine, rxe):
        files = {**rxe(), **rxe("rxe1", "vb", state="1: DOWN", node=1)}
        finding = verbs.ports.look(machine(files))
        assert finding.status == "warn"
        assert finding.seen == "rxe0:1 ACTIVE, rxe1:1 DOWN."

    def test_none(self, machine):
        here = machine({"/sys/class/infiniband/x/node_type": ""})
        assert verbs.ports.look(here).status == "fail"


class TestGids:
    def test_usable(self, machine, rxe):
        files = {
            **rxe(),
            **rxe("rxe1", "vb", gids=(("fd00::2", "RoCE v2"),), node=1),
        }
        finding = verbs.gids.look(machine(files))
        assert finding.status == "ok"
        assert finding.seen == (
            "rxe0:1:1 10.0.0.1 on va; rxe1:1:0 fd00::2 on vb (all RoCE v2)."
        )

    @pytest.mark.parametrize(
        ("gids", "words"),
        [
            ((), "there is none"),
            ((("fe80::1", "RoCE v2"),), "rxe0:1:0 fe80::1 is link-local"),
            (
                (("::ffff:10.0.0.1", "IB/RoCE v1"),),
                "rxe0:1:0 10.0.0.1 is of type IB/RoCE v1",
            ),
        ],
    )
    def test_none_usable(self, gids, words, machine, rxe):
        finding = verbs.gids.look(machine(rxe(gids=gids)))
        assert finding.status == "fail"
        assert finding.seen.startswith("No GID is usable: ")
        assert words in finding.seen


class TestMemlock:
    def look(self, machine, limit, environ=None, **files):
        status = {"/proc/self/status": "CapEff: 0", "/proc/self/uid_map": IDENTITY}
        named = {f"/proc/self/{name}": text for name, text in files.items()}
        here = machine(
            {**status, **named},
            limits={MEMLOCK: (limit, limit)},
            environ=environ or {},
        )
        return verbs.memlock.look(here)

    def test_unlimited(self, machine):
        assert self.look(machine, INFINITY).status == "ok"

    @pytest.mark.parametrize(
        ("connections", "status"), [(0, "fail"), (1, "warn"), (15, "warn"), (16, "ok")]
    )
    def test_how_many_connections_fit(self, connections, status, machine):
        group, each = pinned_bytes(machine())
        finding = self.look(machine, group + connections * each)
        assert finding.status == status
        assert f": {connections} connections fit." in finding.seen

    def test_what_is_counted_is_what_the_fabric_pins(self, machine, roce):
        near, _ = roce.bench.link()
        group, each = pinned_bytes(machine())
        count = near.side.device.count
        assert count.bytes == group
        near.domain.register(each)
        assert count.bytes == group + each

    def test_64_kib(self, machine):
        finding = self.look(machine, 64 * 1024)
        assert finding.status == "fail"
        assert finding.seen.startswith("64 KiB may be pinned;")

    def test_smaller_buffers(self, machine):
        small = self.look(machine, 8 << 20, {"PYSMC_RMBE_BYTES": "65536"})
        assert (small.status, self.look(machine, 8 << 20).status) == ("ok", "warn")

    def test_whoever_may_lock_has_no_limit(self, machine):
        finding = self.look(machine, 65536, status="CapEff:\t00000000a80425fb\n")
        assert finding.status == "fail"
        finding = self.look(machine, 65536, status="CapEff:\t000001ffffffffff\n")
        assert finding.status == "ok"
        assert "CAP_IPC_LOCK" in finding.seen

    def test_but_not_in_a_user_namespace(self, machine):
        finding = self.look(
            machine, 65536, status="CapEff:\t000001ffffffffff", uid_map="0 1000 1"
        )
        assert finding.status == "fail"


class TestSettings:
    @pytest.mark.parametrize(
        ("change", "status", "words"),
        [
            ({}, "ok", "UEIDs PYSMC.LAB;"),
            ({"PYSMC_FABRICS": "shm", "PYSMC_UEIDS": ""}, "skip", "does not have"),
            ({"PYSMC_UEIDS": ""}, "fail", "PYSMC_UEIDS is empty"),
            (
                {"PYSMC_DISCOVERY": "local", "PYSMC_PEERS": ""},
                "warn",
                "PYSMC_DISCOVERY is local.",
            ),
        ],
    )
    def test_what_is_missing(self, change, status, words, machine):
        environ = {k: v for k, v in (SETTINGS | change).items() if v}
        finding = verbs.settings.look(machine(environ=environ))
        assert finding.status == status
        assert words in finding.seen

    @pytest.mark.parametrize(
        ("works", "discovery", "status", "words"),
        [
            (True, "tcp_option", "ok", "by the TCP option."),
            (True, "tcp_option,static", "ok", "by the TCP option and the list of"),
            (True, "local", "warn", "PYSMC_DISCOVERY is local."),
            (False, "tcp_option", "warn", "PYSMC_DISCOVERY is tcp_option."),
            (False, "tcp_option,static", "ok", "by the list of peers."),
        ],
    )
    def test_the_option(self, works, discovery, status, words, machine):
        environ = {**SETTINGS, "PYSMC_DISCOVERY": discovery}
        if "static" not in discovery:
            del environ["PYSMC_PEERS"]
        trial = Trial(1 if works else None, works=works, reason="" if works else "No.")
        here = machine(environ=environ, try_option=lambda: trial)
        finding = verbs.settings.look(here)
        assert finding.status == status
        assert words in finding.seen

    @pytest.mark.parametrize(
        ("wanted", "words"),
        [
            ("rxe0", ""),
            ("rxe0:1:1", ""),
            ("rxe1", "rxe1:1:0 fe80::1 is link-local"),
            ("rxe0:1:0", "rxe0:1:0 fe80::1 is link-local"),
            ("rxe2", "rxe2, which is not there; there are rxe0:1:0, rxe0:1:1, rxe1:"),
            ("rxe0:2", "rxe0:2, which is not there"),
        ],
    )
    def test_the_configured_device(self, wanted, words, machine, rxe):
        files = {**rxe(), **rxe("rxe1", "vb", gids=(("fe80::1", "RoCE v2"),), node=1)}
        here = machine(files, environ={**SETTINGS, "PYSMC_RDMA_DEVICE": wanted})
        finding = verbs.settings.look(here)
        assert finding.status == ("fail" if words else "ok")
        assert words in finding.seen

    def test_without_any_device_that_is_what_is_said(self, machine):
        here = machine(environ={**SETTINGS, "PYSMC_RDMA_DEVICE": "rxe0"})
        assert verbs.settings.look(here).status == "ok"

    def test_who_has_a_device_is_told_how_to_use_it(self, machine, rxe):
        assert verbs.settings.look(machine()).remedy == ""
        assert "PYSMC_UEIDS=" in verbs.settings.look(machine(rxe())).remedy


class TestExchange:
    def look(self, machine, files, **why):
        tried = []

        def exchange(ports, seconds):
            assert seconds > 0
            tried.extend(ports)
            return [why.get(port.partition(":")[0], "") for port in ports]

        return verbs.verbs_exchange.look(machine(files, exchange=exchange)), tried

    def test_each_usable_port_is_tried(self, machine, rxe):
        files = {**rxe(), **rxe("rxe1", "vb", node=1)}
        finding, tried = self.look(machine, files)
        assert finding.status == "ok"
        assert finding.seen == "A write arrived over rxe0:1:1, rxe1:1:1."
        assert tried == ["rxe0:1:1", "rxe1:1:1"]

    def test_some_or_all_fail(self, machine, rxe):
        files = {**rxe(), **rxe("rxe1", "vb", node=1)}
        finding, _ = self.look(machine, files, rxe1="no update arrived within 5 s")
        assert finding.status == "warn"
        assert finding.seen == "rxe1:1:1: no update arrived within 5 s."
        finding, _ = self.look(machine, files, rxe0="a", rxe1="b")
        assert (finding.status, finding.seen) == ("fail", "rxe0:1:1: a; rxe1:1:1: b.")

    def test_without_a_process_for_it(self, machine, rxe):
        def exchange(ports, seconds):
            raise PermissionError(13, "Permission denied", "/x/python")

        finding = verbs.verbs_exchange.look(machine(rxe(), exchange=exchange))
        assert finding.status == "skip"
        assert finding.seen.endswith("Permission denied: '/x/python'.")

    def test_not_dozens(self, machine, rxe):
        gids = tuple((f"::ffff:10.0.0.{n}", "RoCE v2") for n in range(1, 30))
        _, tried = self.look(machine, rxe(gids=gids))
        assert len(tried) == verbs.EXCHANGES_MOST


class TestTogether:
    """Whatever is wrong, exactly one check fails, and it is the cause."""

    VERBS = [item for item in CHECKS if item.name.startswith("verbs.")]  # noqa: RUF012

    def examine(self, machine, files, **fields):
        fields.setdefault("find_pyverbs", lambda: PYVERBS)
        fields.setdefault("open_error", lambda path: "")
        fields.setdefault("exchange", lambda ports, seconds: [""] * len(ports))
        here = machine(files, **fields)
        reports = examine(here, self.VERBS)
        return verdict("verbs", reports), {item.name: item for item in reports}

    def failed(self, reports):
        return [item.name for item in reports.values() if item.status == "fail"]

    def test_all_is_well(self, machine, rxe):
        status, reports = self.examine(machine, rxe(), environ=SETTINGS)
        assert status == "ok"
        assert reports["verbs.exchange"].status == "ok"
        assert set(FABRICS) == {"shm", "verbs"}

    @pytest.mark.parametrize(
        ("options", "fields", "cause", "words", "remedy"),
        [
            (
                {},
                {"find_pyverbs": lambda: NO_PYVERBS},
                "verbs.pyverbs",
                "not installed",
                "apt install python3-pyverbs",
            ),
            (None, {}, "verbs.devices", "no RDMA device", "rdma link add rxe0"),
            ({"state": "1: DOWN"}, {}, "verbs.ports", "DOWN", "ip link set"),
            ({"gids": ()}, {}, "verbs.gids", "No GID is usable", "ip addr add"),
            (
                {"gids": (("fe80::1", "RoCE v2"),)},
                {},
                "verbs.gids",
                "link-local",
                "ip addr add",
            ),
            (
                {},
                {"limits": {MEMLOCK: (65536, 65536)}},
                "verbs.memlock",
                "64 KiB may be pinned",
                "LimitMEMLOCK=infinity",
            ),
            (
                {},
                {"open_error": lambda path: DENIED},
                "verbs.permissions",
                "User 1000 cannot open /dev/infiniband/uverbs0",
                "udev rule",
            ),
            (
                {},
                {"environ": {"PYSMC_FABRICS": "verbs"}},
                "verbs.settings",
                "PYSMC_UEIDS is empty",
                "PYSMC_UEIDS=PROD.EAST",
            ),
        ],
    )
    def test_one_cause(self, options, fields, cause, words, remedy, machine, rxe):
        files = {} if options is None else rxe(**options)
        status, reports = self.examine(machine, files, **fields)
        assert status == "fail"
        assert self.failed(reports) == [cause]
        assert words in reports[cause].seen
        assert remedy in reports[cause].remedy
