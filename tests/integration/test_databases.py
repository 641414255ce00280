"""redis-py and asyncpg, unmodified: with the real servers over TCP, and over SMC-R.

Redis and PostgreSQL know no SMC. So over SMC-R redis-py speaks with a small server of
the tests' own, and asyncpg with a relay before the real server.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pwd
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from pysmc.testing.authority import Authority
from tests.free_ports import free_port

STRICT = ("-X", "dev", "-W", "error")
REQUIRE = {"PYSMC_FALLBACK": "require"}
DEADLINE = 30.0
READY = "database system is ready to accept connections"
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "dynamic_shared_memory_type": "mmap",
    "shared_buffers": "16MB",
    "fsync": "off",
    "ssl": "on",
    "ssl_cert_file": "server.pem",
    "ssl_key_file": "server.pem",
}


def programs_of_postgresql() -> Path:
    """Find the folder of PostgreSQL's programs; Debian keeps it off the path."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places[-1:])])
    found = shutil.which("initdb", path=path)
    if found is None:
        assert not os.environ.get("CI"), "CI brings postgresql"
        pytest.skip("needs PostgreSQL: apt-get install -y postgresql")
    return Path(found).parent


def owner():
    """Give what starts a process as somebody else; PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return {}
    users = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = users.get("postgres") or users["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def running(command, log, **options):
    """Run PostgreSQL from its readiness to its end."""
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=file, stderr=file, **options) as server,
    ):
        end = time.monotonic() + DEADLINE
        while READY not in log.read_text(errors="replace"):
            if server.poll() is not None or time.monotonic() > end:
                server.kill()
                pytest.fail(log.read_text(errors="replace"))
            select.select([], [], [], 0.02)
        try:
            yield
        finally:
            # A fast shutdown: it ends the connections that are left.
            server.send_signal(signal.SIGINT)
            try:
                server.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture(scope="module")
def database():
    """Start a PostgreSQL of its own; gives its port and its authority's file."""
    programs, user = programs_of_postgresql(), owner()
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder = Path(name)
        data = folder / "data"
        data.mkdir()
        if user:
            folder.chmod(0o711)
            os.chown(data, user["user"], user["group"])
        initdb = [str(programs / "initdb"), "-D", str(data), "-U", "tester"]
        subprocess.run(
            [*initdb, "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"],
            check=True, capture_output=True, timeout=DEADLINE, cwd=data, **user,
        )  # fmt: skip
        authority = Authority(folder, datetime.datetime.now(datetime.UTC))
        certificate = authority.issue("server").path.rename(data / "server.pem")
        certificate.chmod(0o600)
        if user:
            os.chown(certificate, user["user"], user["group"])
        port = free_port()
        settings = SETTINGS | {"port": port}
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [str(programs / "postgres"), "-D", str(data), *options]
        with running(command, folder / "log", cwd=data, **user):
            yield port, authority.root


def check_asyncpg(seen, mode):
    assert seen["info"]["mode"] == seen["tls"]["mode"] == mode
    assert seen["tls"]["is_used"] == [False, True]
    for one in (seen, seen["tls"]):
        assert one["queries"] == [True, True, True]
        assert one["copy"] == {"in": True, "out": True}
        assert one["cancel"] == [42, 0]
    assert seen["notify"] is True


@pytest.mark.slow
def test_postgresql_itself_is_no_smc_peer(programs, database):
    visitor = programs.under_pysmc(
        "asyncpg_visitor", *database, flags=STRICT, is_measured=False
    )
    seen = visitor.json()
    check_asyncpg(seen, "tcp")
    assert seen["info"]["reason"]["name"] == "PEER_NO_SMC"
    assert visitor.finish() == 0


@pytest.mark.slow
def test_asyncpg_over_smcr_to_a_relay(programs, database):
    """What asyncpg does is the same when its end of the connection is SMC-R."""
    port, authority = database
    relay = programs.under_pysmc("relay", port, flags=STRICT, is_measured=False)
    visitor = programs.under_pysmc(
        "asyncpg_visitor",
        relay.line(),
        authority,
        flags=STRICT,
        is_measured=False,
        env=REQUIRE,
    )
    seen = visitor.json()
    check_asyncpg(seen, "smcr")
    assert seen["info"]["reason"] is None
    assert (visitor.finish(), relay.finish()) == (0, 0)


def check_redis(seen, mode):
    assert seen["values"] == [True] * 4
    assert seen["counted"] is seen["together"] is True
    assert seen["news"] == {"listeners": [1], "heard": True, "mode": mode}
    assert seen["info"]["mode"] == mode


@pytest.mark.slow
def test_redis_over_smcr(programs):
    """Its peer is a server of the tests' own: Redis itself knows no SMC."""
    server = programs.under_pysmc(
        "resp_server", flags=STRICT, is_measured=False, env=REQUIRE
    )
    visitor = programs.under_pysmc(
        "redis_visitor", server.line(), flags=STRICT, is_measured=False, env=REQUIRE
    )
    seen = visitor.json()
    check_redis(seen, "smcr")
    assert seen["info"]["reason"] is None
    assert (visitor.finish(), server.finish()) == (0, 0)


@pytest.fixture
def redis_port(programs, free_port, tmp_path):
    program = shutil.which("redis-server")
    if program is None:
        assert not os.environ.get("CI"), "CI brings redis-server"
        pytest.skip("needs redis-server: apt-get install -y redis-server")
    server = programs.program(
        program, "--port", free_port, "--bind", "127.0.0.1", "--save", ""
    )
    while "eady to accept connections" not in server.line():
        pass
    return free_port


@pytest.mark.slow
def test_redis_itself_is_no_smc_peer(programs, redis_port):
    visitor = programs.under_pysmc(
        "redis_visitor", redis_port, flags=STRICT, is_measured=False
    )
    seen = visitor.json()
    check_redis(seen, "tcp")
    assert seen["info"]["reason"]["name"] == "PEER_NO_SMC"
    assert visitor.finish() == 0


@pytest.mark.slow
def test_recipes(follow, redis_port, database):
    port, _ = database
    _, start = follow("databases", {6379: redis_port, 5432: port})
    assert start("python cache.py").rest() == "b'hello'\n"
    assert start("python rows.py").rest() == "5050\n"
