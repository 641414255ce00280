"""With a plain peer, what is on the wire is what plain TCP would have put there.

A proxy between the two records every byte. It is the plain peer of the one and of the
other, so that neither of them can see that the other is on pysmc.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

SIZE = 100_000
CONNECTIONS = 5
DSCP_AND_ECN_NONE = 0


@pytest.fixture
def recorded(programs, wait_until):
    """Start a server, a proxy before it, and a client; gives what the proxy saw."""

    def run(server_arguments, client_arguments, **client_env):
        server = programs.agent(*server_arguments)
        port = server.ask("serve")["port"]
        recorder = programs.script("recorder", port)
        proxy_port = int(recorder.line())
        client = programs.agent(*client_arguments, env=client_env)
        opened = client.attempt("connect", port=proxy_port, count=CONNECTIONS)
        equal = 0
        if "error" not in opened:
            equal = client.ask("talk", size=SIZE)["equal"]
            client.ask("close")
        accepted = server.ask("accepted", count=CONNECTIONS, ended=True)["connections"]
        found = []

        def count():
            recorder.tell(do="take")
            found.extend(recorder.json())
            return len(found)

        wait_until(count, CONNECTIONS)
        return opened, equal, accepted, found

    return run


def messages():
    """What each of the connections sends, in the order of the agent's numbers."""
    return {
        random.Random(number).randbytes(SIZE).hex() for number in range(CONNECTIONS)
    }


PAIRS = {
    "both stock": (("--stock",), ("--stock",)),
    "pysmc client, stock server": (("--stock",), ()),
    "stock client, pysmc server": ((), ("--stock",)),
    "pysmc at both ends, a plain proxy between": ((), ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_exactly_the_bytes_of_plain_tcp(recorded, name):
    opened, equal, accepted, found = recorded(*PAIRS[name])
    assert equal == CONNECTIONS
    for info in (*opened["infos"], *(one["info"] for one in accepted)):
        assert info is None or info["reason"]["name"] == "PEER_NO_SMC"
    assert {one["up"] for one in found} == messages()
    assert all(one["up"] == one["down"] for one in found)
    assert {one["tos"] for one in found} == {DSCP_AND_ECN_NONE}


@pytest.mark.slow
def test_not_one_byte_where_smc_is_required(recorded):
    opened, equal, accepted, found = recorded((), (), PYSMC_FALLBACK="require")
    assert opened["error"] == "Declined"
    assert opened["reason"]["name"] == "PEER_NO_SMC"
    assert [one["up"] + one["down"] for one in found] == [""] * CONNECTIONS
    assert {one["received"] for one in accepted} == {equal} == {0}


@pytest.mark.slow
def test_plain_and_smc_clients_of_one_server(programs):
    server = programs.agent()
    port = server.ask("serve")["port"]
    clients = [programs.agent(), programs.agent("--stock"), programs.agent()]
    for client in clients:
        client.tell(do="connect", port=port, count=30)
    infos = [client.json()["infos"] for client in clients]
    for client in clients:
        client.tell(do="talk", size=50_000, rounds=3)
    assert [client.json()["equal"] for client in clients] == [30, 30, 30]
    modes = [{info and info["mode"] for info in some} for some in infos]
    assert modes == [{"smcr"}, {None}, {"smcr"}]
    accepted = server.ask("accepted", count=90)["connections"]
    theirs = Counter(one["info"]["mode"] for one in accepted)
    assert theirs == {"smcr": 60, "tcp": 30}
