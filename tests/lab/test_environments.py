"""Machines on which RoCE cannot be had, or only just: TCP, with one reason, said once.

Each case is played with one end as it should be and the other as the case has it, both
ways round where that makes a difference, and once with ``fallback="require"``.
"""

# ruff: noqa: T201  # the figures of a scenario are in its output

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.lab.ends import NOBODY, Limits
from tests.lab.network_faults import DEVICES, no_rdma_device, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


TOTAL = 64 * 1024
SMALL_MEMLOCK = 64 * 1024


class Case(NamedTuple):
    """What is wrong with one end, and what is said about it."""

    name: str
    """Of the reason, as that end knows it."""
    words: str
    """What its text contains."""
    limits: Limits = Limits()
    world: str = ""
    """What is done to the machine, a name of `WORLDS`."""
    changes: dict[str, Any] = {}  # noqa: RUF012  # never changed


@contextlib.contextmanager
def elsewhere(device: str, *, is_up: bool = True) -> Iterator[None]:
    """Put the RDMA device on a network device that has no address but link-local.

    One that is down has an address.
    """
    name = DEVICES[device]
    run(f"rdma link del {name}")
    run("ip link add vc type veth peer name vd")
    run("ip link set vc up")
    run("ip link set vd up")
    if not is_up:
        run("ip addr add 10.9.0.1/24 dev vc")
    run(f"rdma link add {name} type rxe netdev vc")
    if not is_up:
        run("ip link set vc down")
    try:
        yield
    finally:
        run(f"rdma link del {name}")
        run("ip link del vc")
        run(f"rdma link add {name} type rxe netdev {device}")


@contextlib.contextmanager
def closed_uverbs(_: str) -> Iterator[None]:
    """Let only root open the devices."""
    places = list(Path("/dev/infiniband").glob("uverbs*"))
    assert places
    modes = [stat.S_IMODE(place.stat().st_mode) for place in places]
    for place in places:
        place.chmod(0o600)
    try:
        yield
    finally:
        for place, mode in zip(places, modes, strict=True):
            place.chmod(mode)


WORLDS: dict[str, Callable[[str], contextlib.AbstractContextManager[None]]] = {
    "": lambda _: contextlib.nullcontext(),
    "no device": lambda _: no_rdma_device(*DEVICES),
    "elsewhere": elsewhere,
    "down": lambda device: elsewhere(device, is_up=False),
    "closed": closed_uverbs,
}
"""By name, what is done to the network device of an end."""
OF_ROLE = {"server": "va", "client": "vb"}

WITHOUT = "without a device"
CASES = {
    "without pyverbs": Case(
        "NO_DEVICE", "pyverbs", limits=Limits(without_pyverbs=True)
    ),
    WITHOUT: Case("NO_DEVICE", "device", world="no device"),
    "on another network device": Case("NO_DEVICE", "", world="elsewhere"),
    "with a link-local GID only": Case(
        "NO_DEVICE",
        "GID",
        world="elsewhere",
        changes={"rdma_device": "that of the role"},
    ),
    "with a port that is down": Case(
        "NO_DEVICE", "DOWN", world="down", changes={"rdma_device": "that of the role"}
    ),
    "with 64 KiB of memlock": Case(
        "MEMLOCK",
        "RLIMIT_MEMLOCK",
        limits=Limits(memlock_bytes=SMALL_MEMLOCK, uid=NOBODY),
    ),
    "without permission": Case(
        "NO_DEVICE",
        "permission",
        limits=Limits(uid=NOBODY),
        world="closed",
    ),
    "without a UEID": Case("NO_DEVICE", "ueids", changes={"ueids": ()}),
}


def assert_tcp(end, side: str, name: str = "") -> str:
    """Its connection was TCP, whole, and says why; gives the words."""
    (record,) = end.ask("records")["records"]
    assert (record["error"], record["wrong"]) == (None, None), record
    assert (record["received"], record["eof"]) == (TOTAL, True)
    info, reason = record["info"], record["info"]["reason"]
    assert (info["mode"], info["fabric"]) == ("tcp", None)
    assert reason["side"] == side, reason
    assert reason["name"] == name or not name, reason
    text: str = reason["text"]
    return text


def assert_warned_once(end) -> None:
    """The log has one line about it, however many connections there were."""
    lines = end.complaint().splitlines()
    assert len(lines) <= 1, lines
    end.may_complain = True


def start_poor(ends, role: str, case: Case, **changes: Any):
    """Start the end that the case is about."""
    device = OF_ROLE[role]
    if "rdma_device" in case.changes:
        changes["rdma_device"] = DEVICES[device]
    return ends.start(role, case.limits, **case.changes | changes)


@pytest.mark.lab(seconds=60)
@pytest.mark.parametrize("what", CASES)
def test_a_client_falls_back_with_one_reason(ends, what):
    fall_back(ends, CASES[what], "client")


@pytest.mark.lab_long(seconds=60)
# A client without a device declines before its server does.
@pytest.mark.parametrize("what", [name for name in CASES if name != WITHOUT])
def test_a_server_falls_back_with_one_reason(ends, what):
    fall_back(ends, CASES[what], "server")


def fall_back(ends, case: Case, role: str) -> None:
    """Connect twice, with one end as the case has it."""
    with WORLDS[case.world](OF_ROLE[role]):
        poor = start_poor(ends, role, case)
        rich = ends.start("client" if role == "server" else "server")
        server, client = (poor, rich) if role == "server" else (rich, poor)
        port = server.ask("serve", total=TOTAL)["port"]
        for _ in range(2):
            client.ask("connect", port=port, total=TOTAL)
            text = assert_tcp(poor, "local", case.name)
            assert case.words in text
            told = assert_tcp(rich, "peer")
        print(f"{role}: {text}\nits peer: {told}")
        for end in (server, client):
            assert end.finish() == 0
            assert_warned_once(end)


@pytest.mark.lab_long(seconds=60)
@pytest.mark.parametrize("what", CASES)
def test_is_refused_where_smcr_is_required(ends, what):
    case = CASES[what]
    with WORLDS[case.world](OF_ROLE["client"]):
        server = ends.start("server")
        port = server.ask("serve", total=TOTAL)["port"]
        client = start_poor(ends, "client", case, fallback="require")
        answer = client.attempt("connect", port=port, total=TOTAL)
        assert answer.get("error") == "Declined", answer
        assert answer["reason"]["name"] == case.name
        # The server's application saw a connection, if any, and not one byte.
        for record in server.ask("records", count=0)["records"]:
            assert record["received"] == 0, record
        client.may_complain = server.may_complain = True


@pytest.mark.lab(seconds=60)
def test_an_unprivileged_user_is_on_smcr(ends):
    both = {"server": Limits(uid=NOBODY), "client": Limits(uid=NOBODY)}
    server, client = (ends.start(name, limits) for name, limits in both.items())
    ends.connect(server, client, total=TOTAL)
    for end in (server, client):
        (record,) = end.ask("records")["records"]
        assert (record["error"], record["received"]) == (None, TOTAL)
        assert end.finish() == 0


@pytest.mark.lab(seconds=60)
def test_root_has_no_limit_of_pinned_memory(ends):
    limits = Limits(memlock_bytes=SMALL_MEMLOCK)
    assert os.getuid() == 0
    server, client = (ends.start(name, limits) for name in ("server", "client"))
    ends.connect(server, client, total=TOTAL)
    for end in (server, client):
        (record,) = end.ask("records")["records"]
        assert (record["error"], record["received"]) == (None, TOTAL)
