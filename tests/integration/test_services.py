"""Services and clients that know nothing of pysmc, on its loop, in two processes."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from pathlib import Path

import pytest

REQUIRE = {"PYSMC_FALLBACK": "require"}
RUNNING = r"Uvicorn running on http://127\.0\.0\.1:(\d+)"
WORKERS = 4


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
    service = programs.under_pysmc("aiohttp_service", big_file)
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
    service = start[side == "service"]("aiohttp_service", big_file)
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


@pytest.mark.slow
def test_ten_thousand_requests_over_200_connections(programs, big_file):
    options = {"env": REQUIRE, "is_measured": False}
    service = programs.under_pysmc("aiohttp_service", big_file, **options)
    port = service.line()
    visitor = programs.under_pysmc("aiohttp_visitor", "numbers", port, **options)
    seen = visitor.json(deadline=60)
    assert seen == {
        "connections": 200, "count": 10_000, "wrong": 0, "modes": {"smcr": 200}
    }  # fmt: skip
    assert (visitor.finish(), service.finish()) == (0, 0)


def start_uvicorn(programs, *arguments):
    """Start uvicorn on a port of its choice; gives the process and the port."""
    here = Path(__file__).parent / "programs"
    server = programs.start(
        "-m", "uvicorn", "asgi_application:app", "--app-dir", here, "--port", "0",
        "--loop", "pysmc:new_event_loop", "--log-level", "info", *arguments,
        env=REQUIRE,
    )  # fmt: skip
    (port,) = server.wait_complaint(RUNNING)
    return server, port


@pytest.mark.slow
def test_uvicorn_with_one_worker(programs):
    server, port = start_uvicorn(programs)
    seen = programs.script("httpx_visitor", port, 5, env=REQUIRE).json()
    assert seen["modes"] == {"smcr": 5}
    assert seen["equal"] == 5
    assert seen["workers"] == {str(server.pid): 5}
    assert seen["loops"] == {"pysmc.aio.loop.Loop": 5}
    server.interrupt()


@pytest.mark.slow
def test_uvicorn_with_four_workers(programs):
    server, port = start_uvicorn(programs, "--workers", WORKERS)
    server.wait_complaint("Application startup complete", WORKERS)
    visitors = [
        programs.script("httpx_visitor", port, 20, env=REQUIRE) for _ in range(3)
    ]
    workers = set()
    for seen in [visitor.json() for visitor in visitors]:
        assert seen["modes"] == {"smcr": 20}
        assert seen["equal"] == 20
        assert seen["loops"] == {"pysmc.aio.loop.Loop": 20}
        workers |= set(seen["workers"])
    # The kernel wakes whom it likes; that all four serve is shown with less chance in
    # test_workers.py.
    assert 2 <= len(workers) <= WORKERS
    assert str(server.pid) not in workers
    server.interrupt()


@pytest.fixture
def redis_port(tmp_path: Path):
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server: apt-get install -y redis-server")
    # redis-server cannot choose a port and tell it; it can be given a Unix socket to
    # be asked over, but not a listening one. So take a free port and use it at once.
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as server:
        assert server.stdout is not None
        for line in server.stdout:
            if "eady to accept connections" in line:
                break
        yield port
        server.terminate()
        server.stdout.close()


@pytest.mark.slow
def test_redis_client_and_a_server_that_is_no_smc_peer(programs, redis_port):
    visitor = programs.under_pysmc("redis_visitor", redis_port)
    seen = visitor.json()
    assert seen["info"]["mode"] == "tcp"
    assert seen["info"]["reason"]["name"] == "PEER_NO_SMC"
    assert seen["equal"] is True
    assert seen["counted"] == 500
    assert seen["heard"] == "hello"
    assert visitor.finish() == 0


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
