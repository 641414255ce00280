"""``pysmc probe`` asks the kernel's own SMC, and leaves its listener in order."""

from __future__ import annotations

import contextlib
import io
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.cli import main
from tests.lab.kernel_smc import IPPROTO_SMC, UEID
from tests.lab.smc_netlink import smc_diag

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.lab_long(seconds=60), pytest.mark.usefixtures("option")]

HOSTS = {"server": "10.0.0.1", "client": "10.0.0.2"}


@pytest.fixture(autouse=True)
def settings(monkeypatch) -> None:
    monkeypatch.setenv("PYSMC_FABRICS", "shm,verbs")
    monkeypatch.setenv("PYSMC_UEIDS", UEID)


def serve(tell: Callable[..., None], protocol: int, count: int) -> None:
    """Accept connections; tells of each when it was accepted and what it said."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as listener:
        listener.settimeout(20)
        listener.bind((HOSTS["server"], 0))
        listener.listen()
        tell(port=listener.getsockname()[1])
        for _ in range(count):
            sock, peer = listener.accept()
            with sock:
                sock.settimeout(20)
                said = b""
                while data := sock.recv(100):
                    said += data
                tell(peer=peer[1], said=said.decode())


def connect(tell: Callable[..., None], port: int) -> None:
    """Connect by the kernel's SMC and say something."""
    kind = socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind, IPPROTO_SMC) as client:
        client.settimeout(20)
        client.bind((HOSTS["client"], 0))
        client.connect((HOSTS["server"], port))
        mine = client.getsockname()[1]
        tell(modes=[one.mode for one in smc_diag() if one.port == mine])
        client.sendall(b"after the probes")


def probe(port: int, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the command; gives its exit code and its object."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["probe", f"{HOSTS['server']}:{port}", "--json", *arguments])
    print(out.getvalue())  # noqa: T201  # for whoever looks at a failure
    return code, json.loads(out.getvalue())


def test_a_kernel_that_accepts_serves_others_afterwards(kernel) -> None:
    server = kernel.start("server", serve, IPPROTO_SMC, 3)
    port = server.fact()["port"]
    for _ in range(2):
        code, found = probe(port)
        assert (code, found["tcp_option"], found["clc"]) == (0, True, "accept")
        assert (found["version"], found["first_contact"]) == ("2.1", True)
        assert (found["eid"], found["reason"]) == (UEID, None)
        assert found["offered"]["device"] == "rxe1:1:1"
        # The service gets a connection that ends at once, and no byte of CLC.
        assert server.fact()["said"] == ""
    kernel.wait_until_gone()
    client = kernel.start("client", connect, port)
    assert client.fact()["modes"] == ["smcr"]
    assert client.wait() == 0
    assert server.fact()["said"] == "after the probes"
    assert server.wait() == 0
    kernel.wait_until_gone()


def test_a_kernel_that_declines(kernel) -> None:
    server = kernel.start("server", serve, IPPROTO_SMC, 2)
    port = server.fact()["port"]
    with kernel.no_ueid():
        code, found = probe(port)
    assert (code, found["tcp_option"], found["clc"]) == (0, True, "decline")
    assert (found["reason"], found["eid"]) == ("NO_DEVICE", None)
    assert "UEIDs agree" in found["advice"]
    assert server.fact()["said"] == ""
    # It is we who have no UEID in common with it.
    code, found = probe(port, "--ueid", "PYSMC.OTHER", "--timeout", "20")
    assert found["clc"] == "accept"
    assert found["offered"]["eids"][1:] == ["PYSMC.OTHER", UEID]
    assert [server.fact()["said"], server.wait()] == ["", 0]


def test_a_plain_server_gets_no_byte(kernel) -> None:
    server = kernel.start("server", serve, 0, 1)
    code, found = probe(server.fact()["port"])
    assert (code, found["tcp_option"], found["clc"]) == (1, False, "none")
    assert found["reason"] == "PEER_NO_SMC"
    assert server.fact()["said"] == ""
    assert server.wait() == 0
