"""Services and clients that know nothing of pysmc, on its loop, in two processes."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def big_file(tmp_path: Path):
    path = tmp_path / "big"
    path.write_bytes(random.Random(0).randbytes(30_000_000))
    return path


def assert_smcr_pair(client, server):
    """Both ends say the same of one connection, each from its side."""
    assert client["mode"] == server["mode"] == "smcr"
    assert client["version"] == server["version"] == "2.1"
    assert client["fabric"] == server["fabric"] == "shm"
    assert (client["role"], server["role"]) == ("client", "server")
    assert client["eid"] == server["eid"]
    assert client["reason"] is server["reason"] is None
    assert client["rmbe_bytes"] == server["peer_rmbe_bytes"]
    assert client["peer_rmbe_bytes"] == server["rmbe_bytes"]


@pytest.mark.slow
def test_aiohttp(programs, big_file):
    service = programs.under_pysmc("aiohttp_service", env={"BIG_FILE": str(big_file)})
    visitor = programs.under_pysmc("aiohttp_visitor", "tour", service.line())
    seen = visitor.json()
    assert_smcr_pair(seen["client"], seen["server"])
    assert seen["upload"] == [True, True, True]
    assert seen["download"] == hashlib.sha256(big_file.read_bytes()).hexdigest()
    assert seen["talk"] == [True] * 7
    assert (visitor.finish(), service.finish()) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["service", "visitor"])
def test_aiohttp_with_a_stock_peer(programs, big_file, side):
    """The same on TCP, when either end is on the stock loop."""
    start = {True: programs.script, False: programs.under_pysmc}
    file = {"BIG_FILE": str(big_file)}
    service = start[side == "service"]("aiohttp_service", env=file)
    visitor = start[side == "visitor"]("aiohttp_visitor", "tour", service.line())
    seen = visitor.json()
    theirs, ours = ("client", "server") if side == "visitor" else ("server", "client")
    assert seen[theirs] is None
    assert seen[ours]["mode"] == "tcp"
    assert seen[ours]["reason"]["name"] == "PEER_NO_SMC"
    assert seen[ours]["reason"]["side"] == "peer"
    assert seen["upload"] == [True, True, True]
    assert seen["download"] == hashlib.sha256(big_file.read_bytes()).hexdigest()
    assert seen["talk"] == [True] * 7
    assert (visitor.finish(), service.finish()) == (0, 0)


@pytest.mark.load
@pytest.mark.slow
def test_ten_thousand_requests_over_200_connections(programs, big_file):
    env = {"PYSMC_FALLBACK": "require", "BIG_FILE": str(big_file)}
    options = {"env": env, "is_measured": False}
    service = programs.under_pysmc("aiohttp_service", **options)
    port = service.line()
    visitor = programs.under_pysmc("aiohttp_visitor", "numbers", port, **options)
    seen = visitor.json(deadline=60)
    assert seen == {
        "connections": 200, "count": 10_000, "wrong": 0, "modes": {"smcr": 200}
    }  # fmt: skip
    assert (visitor.finish(), service.finish()) == (0, 0)


def test_server_speaks_first(programs):
    server, client = programs.agent(), programs.agent()
    port = server.ask("serve", kind="greet")["port"]
    (info,) = client.ask("connect", port=port)["infos"]
    answers = client.ask("lines", lines=["EHLO me", "NOOP", "QUIT"])["answers"]
    assert answers == [
        "220 ready\r\n", "250 EHLO me\r\n", "250 NOOP\r\n", "221 bye\r\n"
    ]  # fmt: skip
    (accepted,) = server.ask("accepted", count=1, ended=True)["connections"]
    assert_smcr_pair(info, accepted["info"])
