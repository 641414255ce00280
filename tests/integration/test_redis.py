"""redis-py's asyncio client, unmodified: over SMC-R, and with a real Redis over TCP."""

from __future__ import annotations

import os
import shutil

import pytest

STRICT = ("-X", "dev", "-W", "error")
REQUIRE = {"PYSMC_FALLBACK": "require"}


def check(seen, mode):
    assert seen["values"] == [True] * 4
    assert seen["counted"] is seen["together"] is True
    assert seen["news"] == {"listeners": [1], "heard": True, "mode": mode}
    assert seen["info"]["mode"] == mode


@pytest.mark.slow
def test_over_smcr(programs):
    """Its peer is a server of the tests' own: Redis itself knows no SMC."""
    server = programs.under_pysmc("resp_server", flags=STRICT, env=REQUIRE)
    visitor = programs.under_pysmc(
        "redis_visitor", server.line(), flags=STRICT, env=REQUIRE
    )
    seen = visitor.json()
    check(seen, "smcr")
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
def test_real_server_is_no_smc_peer(programs, redis_port):
    visitor = programs.under_pysmc("redis_visitor", redis_port, flags=STRICT)
    seen = visitor.json()
    check(seen, "tcp")
    assert seen["info"]["reason"]["name"] == "PEER_NO_SMC"
    assert visitor.finish() == 0
