"""fork(): what belongs to the parent stays the parent's; prefork servers work."""

from __future__ import annotations

import pytest

WORKERS = 4


@pytest.mark.slow
def test_the_child_is_refused_and_the_parent_unharmed(programs):
    server = programs.agent()
    port = server.ask("serve")["port"]
    forker = programs.script("forker", port)
    result = forker.json()
    refused = result["child"]["refused"]
    assert set(refused) == {"write", "write_eof", "close", "connect", "serve"}
    for use, text in refused.items():
        assert text.startswith("ForkedError: "), (use, text)
        assert "parent process; make a new loop after fork()" in text
    assert result["child"]["own_loop"] == ["smcr", True]
    assert result["child_status"] == 0
    assert result["parent_equal"] is True
    assert result["parent_goes_on"] is True
    assert result["parent_connects"] == ["smcr", True]
    assert forker.finish() == 0
    accepted = server.ask("accepted", count=3, ended=True)["connections"]
    assert {one["info"]["mode"] for one in accepted} == {"smcr"}
    assert {one["error"] for one in accepted} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--reuse-port",)], ids=["inherited", "own"])
def test_every_worker_serves_what_it_accepted(programs, options):
    """Four workers share a port, by an inherited listener or by SO_REUSEPORT."""
    server = programs.script("prefork", *options)
    started = server.json()
    client = programs.agent()
    served = dict.fromkeys(started["workers"], 0)
    for _ in range(20):
        infos = client.ask("connect", port=started["port"], count=50)["infos"]
        assert {info["mode"] for info in infos} == {"smcr"}
        for line, port in client.ask("greetings")["greetings"]:
            pid, mode, peer_port = line.split()
            # The TCP connection and the memory lead to the same process.
            assert (mode, int(peer_port)) == ("smcr", port)
            served[int(pid)] += 1
        assert client.ask("talk", size=20_000) == {"equal": 50}
        client.ask("close")
        if all(served.values()):
            break
    assert len(served) == WORKERS
    assert all(served.values()), served
    assert client.finish() == 0
    assert server.finish() == 0
    assert server.json() == {"codes": [0] * WORKERS}
