"""The lab itself: two hosts with a device each, and packets that really cross."""

# ruff: noqa: T201  # what was found is in the output of a scenario

from __future__ import annotations

import os
import platform
import re
import select
import socket
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.lab(seconds=40)

INFINIBAND = Path("/sys/class/infiniband")
ADDRESSES = {"rxe0": ("va", "10.0.0.1"), "rxe1": ("vb", "10.0.0.2")}


def sent_packets(device: str) -> int:
    path = Path("/sys/class/net", device, "statistics/tx_packets")
    return int(path.read_text())


def wait_for_listener(port: int) -> None:
    """Wait until a process listens, without connecting to it."""
    end = time.monotonic() + 20
    pattern = re.compile(rf":{port:04X} \S+ 0A ")
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    while not any(pattern.search(table.read_text()) for table in tables):
        assert time.monotonic() < end, f"nobody listens on port {port}"
        select.select([], [], [], 0.05)


@pytest.mark.parametrize("device", ADDRESSES)
def test_each_host_has_a_roce_device(device: str) -> None:
    """Active, and with an IPv4-mapped RoCEv2 GID on the right network device."""
    netdev, address = ADDRESSES[device]
    port = INFINIBAND / device / "ports" / "1"
    assert (port / "state").read_text().strip() == "4: ACTIVE"
    mapped = "0000:0000:0000:0000:0000:ffff:0a00:000" + address[-1]
    assert (port / "gids" / "1").read_text().strip() == mapped
    assert (port / "gid_attrs" / "types" / "1").read_text().strip() == "RoCE v2"
    assert (port / "gid_attrs" / "ndevs" / "1").read_text().strip() == netdev
    shown = subprocess.run(["ibv_devices"], capture_output=True, text=True, check=True)
    assert device in shown.stdout


def test_tcp_crosses_the_pair() -> None:
    before = {name: sent_packets(name) for name in ("va", "vb")}
    with socket.create_server(("10.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(
            ("10.0.0.1", port), 10, source_address=("10.0.0.2", 0)
        ) as client:
            server, peer = listener.accept()
            assert peer[0] == "10.0.0.2"
            client.sendall(b"over the pair")
            server.settimeout(10)
            assert server.recv(100) == b"over the pair"
            server.close()
    for name, count in before.items():
        # SYN, ACK, data at one end; SYN-ACK, ACK, FIN at the other.
        assert sent_packets(name) >= count + 3


def test_rdma_crosses_the_pair() -> None:
    before = {name: sent_packets(name) for name in ("va", "vb")}
    command = ["ibv_rc_pingpong", "-g", "1", "-n", "200", "-d"]
    with subprocess.Popen(
        ["stdbuf", "-oL", *command, "rxe0"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert "local address" in server.stdout.readline()
        wait_for_listener(18515)
        client = subprocess.run(
            [*command, "rxe1", "10.0.0.1"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        rest = server.stdout.read()
    assert client.returncode == 0, client.stderr
    assert "200 iters" in client.stdout + rest
    print(client.stdout)
    for name, count in before.items():
        assert sent_packets(name) >= count + 200


def test_what_the_guest_is(record_property) -> None:
    """The versions are part of the result of every run."""
    facts = {"kernel": platform.release(), "python": platform.python_version()}
    for line in subprocess.run(
        ["dpkg-query", "-W", "rdma-core", "libibverbs1", "python3-pyverbs"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines():
        name, _, version = line.partition("\t")
        facts[name] = version
    print(facts)
    for name, value in facts.items():
        record_property(name, value)
    major, minor = map(int, facts["kernel"].split(".")[:2])
    assert (major, minor) >= (6, 12), "older ones hang with data over soft-RoCE"
    assert Path("/sys/module/rdma_rxe").exists()
    assert os.geteuid() == 0
