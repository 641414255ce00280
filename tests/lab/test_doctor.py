"""The doctor on a machine with soft-RoCE, and where something of it is taken away."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.cli import SUBCOMMANDS, main
from tests.lab.ends import NOBODY, Limits
from tests.lab.network_faults import DEVICES, link_down, no_rdma_device

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.lab(seconds=60), pytest.mark.timeout(120)]

SETTINGS = {
    "PYSMC_FABRICS": "shm,verbs",
    "PYSMC_UEIDS": "PYSMC.LAB",
    "PYSMC_DISCOVERY": "local,static",
    "PYSMC_PEERS": "10.0.0.0/24",
}
SOMEBODY = 1000
"""An ordinary user."""
MEMLOCK = 64 * 1024
UNLIMITED = Limits()
# What the doctor loads late, for users who may not read where it lies.
LATE = (
    "difflib",
    "encodings.idna",
    "queue",
    "statistics",
    "sysconfig",
    *(f"pysmc.cli.{name}" for name in SUBCOMMANDS),
    "pysmc.cli.checks.catalogue",
    "pysmc.cli.checks.kernel_smc_tables",
    "pysmc.discovery.mark",
    "pysmc.discovery.option.install",
    "pysmc.discovery.option.trial",
    "pysmc.discovery.static",
    "pysmc.fabric.verbs_memory",
    "pysmc.fabric.verbs_reach",
    "pysmc.fabric.verbs_route",
)
for _name in LATE:
    import_module(_name)


def examined(limits: Limits = UNLIMITED, peer: str = "") -> tuple[int, Any]:
    """Let the doctor look, in a process that these limits hold for."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            limits.apply()
            os.environ.update(SETTINGS)
            with redirect_stdout(io.StringIO()) as out:
                code = main(["doctor", "--json", f"--peer={peer}"])
            os.write(writing, out.getvalue().encode())
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    print(text)  # noqa: T201  # for whoever looks at a failure
    report = json.loads(text)
    checks = {row["name"]: row for row in report["checks"]}
    return os.waitstatus_to_exitcode(status), (report["fabrics"], checks)


def failed(checks: Any) -> list[str]:
    return [name for name, row in checks.items() if row["status"] == "fail"]


@contextmanager
def closed(mode: int = 0o600) -> Iterator[None]:
    """Let only root open the devices."""
    nodes = list(Path("/dev/infiniband").glob("uverbs*"))
    for node in nodes:
        node.chmod(mode)
    try:
        yield
    finally:
        for node in nodes:
            node.chmod(0o666)


@pytest.mark.lab_long(seconds=60)
def test_all_is_well():
    code, (fabrics, checks) = examined(peer="10.0.0.2")
    assert (code, fabrics) == (0, {"shm": "ok", "verbs": "ok"})
    assert failed(checks) == []
    for name, words in {
        "verbs.devices": "rxe0 (soft-RoCE), rxe1 (soft-RoCE).",
        "verbs.ports": "rxe0:1 ACTIVE, rxe1:1 ACTIVE.",
        "verbs.gids": "rxe0:1:1 10.0.0.1 on va; rxe1:1:1 10.0.0.2 on vb",
        "verbs.exchange": "A write arrived over rxe0:1:1, rxe1:1:1.",
        "peer": "From 10.0.0.1 to 10.0.0.2: rxe0:1:1, GID 10.0.0.1 on va",
    }.items():
        assert (checks[name]["status"], checks[name]["remedy"]) == ("ok", "")
        assert words in checks[name]["detail"]


@pytest.mark.usefixtures("kernel", "option")
def test_the_kernels_own_smc_and_the_option():
    """As somebody: nothing of it needs a privilege, but to see other cgroups."""
    _, (_, checks) = examined(Limits(uid=SOMEBODY))
    for name, words in {
        "kernel_smc.socket": "The kernel has AF_SMC",
        "kernel_smc.protocol": "The kernel has IPPROTO_SMC.",
        "kernel_smc.ulp": "without smc",
        "kernel_smc.pnetids": "LABONE: va, rxe0:1; LABTWO: vb, rxe1:1.",
        "kernel_smc.ueids": "PYSMC.LAB; PYSMC_UEIDS has PYSMC.LAB.",
        "tcp_option": "It works for sockets of this process",
    }.items():
        assert checks[name]["status"] == "ok", checks[name]
        assert words in checks[name]["detail"]


def test_a_peer_that_is_not_there():
    code, (fabrics, checks) = examined(Limits(uid=SOMEBODY), peer="10.0.0.77")
    assert (code, fabrics["shm"]) == (0, "ok")
    assert failed(checks) == ["peer"]
    assert checks["peer"]["status"] == "fail"
    assert "10.0.0.77" in checks["peer"]["detail"]


def test_without_a_device():
    with no_rdma_device(*DEVICES):
        code, (fabrics, checks) = examined()
    assert (code, fabrics) == (0, {"shm": "ok", "verbs": "fail"})
    assert failed(checks) == ["verbs.devices"]
    assert "rdma link add rxe0 type rxe netdev va" in checks["verbs.devices"]["remedy"]


def test_where_everything_is_down():
    with link_down("va"):  # and with it goes the carrier of vb
        _, (fabrics, checks) = examined()
    assert fabrics["verbs"] == "fail"
    assert failed(checks) == ["verbs.ports"]
    assert "rxe0:1 DOWN" in checks["verbs.ports"]["detail"]


def test_64_kib_of_pinned_memory():
    limits = Limits(memlock_bytes=MEMLOCK, uid=SOMEBODY)
    code, (fabrics, checks) = examined(limits)
    assert (code, fabrics) == (0, {"shm": "ok", "verbs": "fail"})
    assert failed(checks) == ["verbs.memlock"]
    assert checks["verbs.memlock"]["detail"].startswith("64 KiB may be pinned")
    assert "LimitMEMLOCK=infinity" in checks["verbs.memlock"]["remedy"]


def test_devices_that_only_root_may_open():
    with closed():
        _, (fabrics, checks) = examined(Limits(uid=SOMEBODY))
    assert fabrics == {"shm": "ok", "verbs": "fail"}
    assert failed(checks) == ["verbs.permissions"]
    assert (
        "uverbs0 (rxe0): Permission denied, mode 0600, owner 0:0"
        in (checks["verbs.permissions"]["detail"])
    )


def test_nobody_shares_no_memory_and_may_use_rdma():
    code, (fabrics, checks) = examined(Limits(uid=NOBODY))
    # A warning: few connections fit an ordinary user's limit of pinned memory.
    assert (code, fabrics) == (0, {"shm": "fail", "verbs": "warn"})
    assert failed(checks) == ["shm.user"]
    assert checks["verbs.permissions"]["status"] == "ok"
