"""Libraries that open connections on whatever loop runs: what of them is SMC-R."""

from __future__ import annotations

import pytest

STRICT = ("-X", "dev", "-W", "error")
REQUIRE = {"PYSMC_FALLBACK": "require"}


@pytest.mark.slow
def test_anyio_client(programs):
    server = programs.agent()
    port = server.ask("serve")["port"]
    client = programs.script(
        "anyio_pair", "connect", port, flags=STRICT, is_measured=False, env=REQUIRE
    )
    assert client.json() == {"mode": ["smcr", None], "peer": True, "equal": True}
    (accepted,) = server.ask("accepted", count=1, ended=True)["connections"]
    assert accepted["info"]["mode"] == "smcr"
    assert client.finish() == 0


@pytest.mark.slow
def test_anyio_listener_stays_tcp(programs):
    """It listens before the loop knows of it, and accepts without a server."""
    server = programs.script("anyio_pair", "listen", flags=STRICT, is_measured=False)
    client = programs.script(
        "anyio_pair", "connect", server.line(), flags=STRICT, is_measured=False
    )
    assert client.json() == {
        "mode": ["tcp", "PEER_NO_SMC"], "peer": True, "equal": True
    }  # fmt: skip
    assert server.json() == ["tcp", "NOT_MARKED"]
    assert (client.finish(), server.finish()) == (0, 0)


@pytest.mark.slow
def test_websockets(programs):
    options = {"flags": STRICT, "env": REQUIRE, "is_measured": False}
    server = programs.under_pysmc("websockets_pair", "serve", **options)
    port = server.line()
    client = programs.under_pysmc("websockets_pair", "visit", port, **options)
    common = {
        "mode": "smcr",
        "extensions": ["permessage-deflate"],
        "close": [4003, "asked to go"],
    }
    assert client.json() == common | {"equal": 9}
    assert server.json() == common | {"pings": 3}
    assert (client.finish(), server.finish()) == (0, 0)


@pytest.mark.slow
def test_grpc_makes_its_own_connections(programs):
    """Its C library has sockets and threads of its own: no loop carries their bytes.

    So `PYSMC_FALLBACK=require` asks nothing of them, and nothing of them is touched.
    """
    server = programs.script("grpc_pair", "serve", env=REQUIRE, is_measured=False)
    client = programs.script(
        "grpc_pair", "call", server.line(), env=REQUIRE, is_measured=False
    )
    assert client.json() == {
        "one": [True] * 4, "many": True, "loop": "pysmc.aio.loop", "transports": []
    }  # fmt: skip
    assert (client.finish(), server.finish()) == (0, 0)
