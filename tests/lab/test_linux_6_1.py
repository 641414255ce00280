"""Linux 6.1 as peer: whatever it can do, data arrives, by TCP, and nobody hangs.

It is the kernel of Debian 12. Its SMC knows version 2.0, and no IPPROTO_SMC; over
soft-RoCE it loses itself when a connection ends, so that no two ends of it may meet.
"""

# ruff: noqa: T201  # what was found is in the output of a scenario

from __future__ import annotations

import contextlib
import platform
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pysmc.discovery.option import (  # noqa: F401  - loaded before the fork
    faults,
    install,
    pins,
    trial,
)
from tests.discovery.option.real_cases import BARE, CASES
from tests.discovery.option.room import run_case
from tests.lab.kernel_smc import IPPROTO_SMC
from tests.lab.matrix import CELLS, SEEN_BY_KERNEL, Cell, Seen
from tests.lab.players import PysmcPlayer, be_a_kernel_end
from tests.lab.playing import play

if TYPE_CHECKING:
    from tests.lab.matrix import Kind

QUICK = {"decline by the client", "decline by the server", "no option at the server"}
LAB = pytest.mark.lab(kernel="6.1", seconds=40)
LONG = pytest.mark.lab_long(kernel="6.1", seconds=60)
SERVER, CLIENT = "10.0.0.1", "10.0.0.2"
OUR_WAIT = 25.0
"""Seconds in which our end has to have given up; loaded machines are slow."""
SOON = 10.0
OTHERWISE = {("option but no device at the server", "server"): Seen(0x03030002)}
"""Where this kernel has another code than later ones: here, no device for SMC-R."""
PAIRS: dict[str, tuple[Kind, Kind]] = {
    "kernel-client": ("kernel", "pysmc"),
    "kernel-server": ("pysmc", "kernel"),
}


def fallbacks() -> list[object]:
    """Give every cell of the table that ends on TCP, in both roles."""
    return [
        pytest.param(
            cell,
            kinds,
            id=f"{role}-{cell.slug}",
            marks=LAB if cell.name in QUICK else LONG,
        )
        for role, kinds in PAIRS.items()
        for cell in CELLS
        if not cell.is_smcr
    ]


@LAB
def test_what_this_kernel_is(kernel) -> None:
    """So that a failure here is told from one of its peers."""
    assert platform.release().startswith("6.1.")
    with pytest.raises(OSError, match="Protocol not supported"):
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SMC)
    # Only read: in some kernels of this series setting it can crash the machine.
    ways = Path("/proc/sys/net/ipv4/tcp_available_ulp").read_text(encoding="ascii")
    print(platform.release(), platform.version(), ways)


@LAB
def test_the_option() -> None:
    """Loaded with just the two capabilities: its verifier is stricter then."""
    for name in ("attach_with_two_capabilities", "attach_with_less"):
        run_case(BARE[name], attached=False)
    for name in ("matrix_ipv4", "matrix_ipv6", "without_any_privilege"):
        run_case(CASES[name])


@LONG
@pytest.mark.parametrize("name", CASES)
def test_every_case_of_the_option(name: str) -> None:
    run_case(CASES[name])


@pytest.mark.usefixtures("option")
@pytest.mark.parametrize(("cell", "kinds"), fallbacks())
def test_it_is_tcp(
    cell: Cell, kinds, ends, kernel, record_property, monkeypatch
) -> None:
    for place, seen in OTHERWISE.items():
        monkeypatch.setitem(SEEN_BY_KERNEL, place, seen)
    play(cell, kinds, ends, record_property, kernel)


@pytest.mark.usefixtures("option")
@LONG
@pytest.mark.parametrize("role", ["kernel-server", "kernel-client"])
def test_a_device_in_common(role: str, ends, kernel) -> None:
    """Here the kernel's SMC hangs, in smc_wr_drain_cq; our end does not hang with it.

    Nothing tells this kernel from one that can, before the first link is tried. No
    scenario can follow: a connect() that hangs cannot even be killed.
    """
    meet(role, ends)


def meet(role: str, ends) -> None:
    """Bring both ends together, each with all that SMC-R needs."""
    ends.kind = PysmcPlayer
    start = {
        "kernel": lambda name: ends.start_as(name, be_a_kernel_end),
        "pysmc": lambda name: ends.start(name, discovery=("tcp_option",), peers=()),
    }
    server, client = start[PAIRS[role][1]]("server"), start[PAIRS[role][0]]("client")
    port = server.ask("serve")["port"]
    client.tell("open", port=port)
    if role == "kernel-server":
        server.tell("take")
        (info,) = client.answer(OUR_WAIT)["infos"]
        print(info)
        assert (info["mode"], info["reason"]["name"]) == ("tcp", "LINK_FAILED")
        print(client.ask("groups", deadline=SOON))
        return
    client.may_be_lost = True
    with contextlib.suppress(AssertionError):  # it may never come back
        print(client.answer(OUR_WAIT))
    print(client.where())
    # Whoever comes next is served.
    with socket.create_connection((SERVER, port), SOON, (CLIENT, 0)) as plain:
        taken = {"ports": [0]}
        while taken["ports"] != [plain.getsockname()[1]]:
            taken = server.ask("take", deadline=SOON)
            print(taken)
        assert server.ask("send", count=5000, deadline=SOON) == {}
        plain.settimeout(SOON)
        assert plain.recv(1)
