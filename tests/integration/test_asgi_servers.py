"""ASGI servers on pysmc's loop, toured by clients of three libraries.

Server and clients are processes that both refuse anything but SMC-R.
"""

from __future__ import annotations

import datetime
import os
import signal
from pathlib import Path

import pytest

from pysmc.testing.authority import Authority

STRICT = ("-X", "dev", "-W", "error")
REQUIRE = {"PYSMC_FALLBACK": "require"}
PROGRAMS = Path(__file__).parent / "programs"
LOOP = ("--loop", "pysmc:new_event_loop")
UVICORN = r"Uvicorn running on https?://127\.0\.0\.1:(\d+)"
HYPERCORN = r"Running on http://127\.0\.0\.1:(\d+)"
KEPT_ALIVE = {
    "echo": True, "upload": True, "download": True, "kept alive": True, "mode": "smcr",
}  # fmt: skip


def start_uvicorn(programs, *arguments, flags=STRICT):
    server = programs.start(
        *flags, "-m", "uvicorn", "asgi_application:app", "--app-dir", PROGRAMS,
        "--port", "0", *LOOP, *arguments, env=REQUIRE, is_measured=False,
    )  # fmt: skip
    (port,) = server.wait_complaint(UVICORN)
    return server, port


def start_hypercorn(programs):
    server = programs.script(
        "hypercorn_service", flags=STRICT, env=REQUIRE, is_measured=False
    )
    (port,) = server.wait_complaint(HYPERCORN)
    return server, port


def visit(programs, port, *tours, **environment):
    env = REQUIRE | environment
    return programs.script(
        "http_visitor", port, *tours, flags=STRICT, env=env, is_measured=False
    )


def is_listening(port):
    """Tell whether a TCP socket listens on a port of 127.0.0.1, without a visit."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()]
    return any(row[1:4:2] == [f"0100007F:{port:04X}", "0A"] for row in rows)


SERVERS = {
    "uvicorn": start_uvicorn,
    "uvicorn with wsproto": lambda p: start_uvicorn(p, "--ws", "wsproto"),
    "hypercorn": start_hypercorn,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
def test_everything_that_http_has(programs, name):
    server, port = SERVERS[name](programs)
    is_http2 = name == "hypercorn"
    tours = ["httpx", "aiohttp", "websockets", *["http2"] * is_http2]
    visitor = visit(programs, port, *tours)
    seen = visitor.json()
    assert seen.keys() == set(tours)
    versions = {
        name: found.pop("worker")["http"]
        for name, found in seen.items()
        if "worker" in found
    }
    assert seen["httpx"] == KEPT_ALIVE
    assert seen["aiohttp"] == KEPT_ALIVE | {"talk": True, "code": 4001}
    assert seen["websockets"] == {
        "talk": True, "mode": "smcr", "fragments": True, "ping": True, "code": 4002
    }  # fmt: skip
    assert versions.pop("http2", "2") == "2"
    assert set(versions.values()) == {"1.1"}
    if is_http2:
        assert seen["http2"] == KEPT_ALIVE | {"streams": True}
    assert visitor.finish() == 0
    # uvicorn ends by the signal that told it to, once all is in order.
    expected = -signal.SIGTERM if "uvicorn" in name else 0
    assert server.interrupt(signal.SIGTERM) == expected
    assert "lifespan of" in server.complaint()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uvicorn", "hypercorn"])
def test_a_request_that_is_under_way_is_answered_before_the_end(
    programs, name, wait_until
):
    server, port = SERVERS[name](programs)
    visitor = visit(programs, port, "pause")
    assert visitor.line() == "half"
    assert is_listening(int(port))
    server.popen.send_signal(signal.SIGTERM)
    # A server that no longer listens has begun to end.
    wait_until(lambda: is_listening(int(port)), False)
    visitor.tell(go="on")
    assert visitor.json()["pause"]["echo"] is True
    assert server.finish() == (-signal.SIGTERM if name == "uvicorn" else 0)


@pytest.mark.slow
def test_uvicorn_with_tls(programs, tmp_path):
    authority = Authority(tmp_path, datetime.datetime.now(datetime.UTC))
    certificate = authority.issue("server").path
    server, port = start_uvicorn(
        programs, "--ssl-certfile", certificate, "--ssl-keyfile", certificate
    )
    tours = ("httpx", "aiohttp", "websockets")
    visitor = visit(programs, port, *tours, AUTHORITY=str(authority.root))
    seen = visitor.json()
    assert [seen[name].pop("worker")["http"] for name in tours[:2]] == ["1.1", "1.1"]
    assert seen["httpx"] == KEPT_ALIVE
    assert seen["aiohttp"] == KEPT_ALIVE | {"talk": True, "code": 4001}
    assert seen["websockets"]["code"] == 4002
    assert visitor.finish() == 0
    assert server.interrupt(signal.SIGTERM) == -signal.SIGTERM


@pytest.mark.slow
def test_uvicorn_with_two_workers(programs, wait_announced):
    # Not strict: uvicorn leaves its listening socket to the end of the parent.
    server, port = start_uvicorn(programs, "--workers", 2, flags=())
    wait_announced(port)
    visitor = visit(programs, port, "ask")
    # Both serve: whoever is stopped leaves the next connection to the other.
    first = visitor.ask("who")
    os.kill(first["pid"], signal.SIGSTOP)
    second = visitor.ask("who")
    os.kill(first["pid"], signal.SIGCONT)
    assert len({server.pid, first["pid"], second["pid"]}) == 3
    for worker in (first, second):
        assert worker["pid"] == worker["born"]
        assert worker["loop"] == "pysmc.aio.loop.Loop"
    assert visitor.finish() == 0
    assert server.interrupt() in {0, -signal.SIGINT}
