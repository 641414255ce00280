"""gunicorn with the workers of `pysmc.integrations.gunicorn`, as real processes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from pathlib import Path

import pytest

STRICT = ("-X", "dev", "-W", "error")
# A worker may have started and not listen yet, while the others are stopped.
REQUIRE = {"PYSMC_FALLBACK": "require", "PYSMC_DISCOVERY_WAIT": "20"}
PROGRAMS = Path(__file__).parent / "programs"
LISTENING = r"Listening at: http://127\.0\.0\.1:(\d+)"
BOOTED = r"Booting worker with pid: (\d+)"
STARTED = "Application startup complete"


@pytest.fixture
def gunicorn(programs):
    def start(application, worker, *arguments, **environment):
        server = programs.start(
            *STRICT, "-m", "gunicorn", application, "--bind", "127.0.0.1:0",
            "--worker-class", f"pysmc.integrations.gunicorn.{worker}",
            "--chdir", PROGRAMS, "--no-control-socket", *arguments,
            env=REQUIRE | environment, is_measured=False,
        )  # fmt: skip
        (port,) = server.wait_complaint(LISTENING)
        return server, port

    return start


def exists(pid):
    return Path(f"/proc/{pid}").exists()


def ours(kept, *pids):
    """Names in the system that processes hold, and nobody else may hold after them."""
    return {name for pid in pids for name in kept(pid)["names"]}


def names_in_use():
    rows = Path("/proc/net/unix").read_text().splitlines()[1:]
    return {row.split()[7] for row in rows if len(row.split()) > 7}


@pytest.mark.slow
def test_uvicorn_workers_come_and_go(
    programs, gunicorn, kept, wait_until, wait_announced
):
    server, port = gunicorn(
        "asgi_application:app", "UvicornWorker", "--workers", 2
    )  # fmt: skip
    wait_announced(port)
    visitor = programs.script(
        "http_visitor", port, "ask", env=REQUIRE, is_measured=False
    )

    # Both serve: whoever is stopped leaves the next connection to the other.
    first = visitor.ask("who")
    os.kill(first["pid"], signal.SIGSTOP)
    second = visitor.ask("who")
    assert second["pid"] != first["pid"]
    for worker in (first, second):
        assert worker["pid"] == worker["born"] != server.pid
        assert worker["loop"] == "pysmc.aio.loop.Loop"

    # One is killed: another one takes its place.
    os.kill(first["pid"], signal.SIGKILL)
    server.wait_complaint(STARTED, 3)
    os.kill(second["pid"], signal.SIGSTOP)
    third = visitor.ask("who")
    assert third["pid"] not in {first["pid"], second["pid"]}
    os.kill(second["pid"], signal.SIGCONT)

    # All are replaced, and the port stays.
    server.popen.send_signal(signal.SIGHUP)
    server.wait_complaint(STARTED, 5)
    wait_until(lambda: exists(second["pid"]) or exists(third["pid"]), False)
    wait_announced(port)
    fourth = visitor.ask("who")
    booted = [int(pid) for pid in server.wait_complaint(BOOTED, 5)]
    assert fourth["pid"] in booted[3:]
    assert visitor.finish() == 0

    names = ours(kept, *booted[3:])
    assert names
    assert names <= names_in_use()
    assert server.interrupt(signal.SIGTERM) == 0
    assert [pid for pid in booted if exists(pid)] == []
    assert names & names_in_use() == set()


@pytest.mark.slow
def test_uvicorn_worker_has_everything_that_http_has(
    programs, gunicorn, wait_announced
):
    server, port = gunicorn("asgi_application:app", "UvicornWorker")
    wait_announced(port)
    visitor = programs.script(
        "http_visitor", port, "httpx", "websockets", env=REQUIRE, is_measured=False
    )  # fmt: skip
    seen = visitor.json()
    assert seen["httpx"].pop("worker")["loop"] == "pysmc.aio.loop.Loop"
    assert set(seen["httpx"].values()) == {True, "smcr"}
    assert set(seen["websockets"].values()) == {True, "smcr", 4002}
    assert (visitor.finish(), server.interrupt(signal.SIGTERM)) == (0, 0)


@pytest.mark.slow
def test_aiohttp_worker(programs, gunicorn, tmp_path, wait_announced):
    big_file = tmp_path / "big"
    big_file.write_bytes(random.Random(0).randbytes(3_000_000))
    server, port = gunicorn(
        "aiohttp_service:app", "AiohttpWorker", BIG_FILE=str(big_file)
    )
    wait_announced(port)
    visitor = programs.under_pysmc(
        "aiohttp_visitor", "tour", port, env=REQUIRE, is_measured=False
    )
    seen = visitor.json()
    assert seen["client"]["mode"] == seen["server"]["mode"] == "smcr"
    assert seen["upload"] == [True, True, True]
    assert seen["download"] == hashlib.sha256(big_file.read_bytes()).hexdigest()
    assert seen["talk"] == [True] * 7
    assert (visitor.finish(), server.interrupt(signal.SIGTERM)) == (0, 0)
