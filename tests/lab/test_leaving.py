"""Processes that leave, fork or are interrupted while RoCE is in use."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.network_faults import resources, wait_for_resources

pytestmark = pytest.mark.lab(seconds=90)

LEAVER = Path(__file__).parent / "programs" / "leaver.py"
MOMENT_BYTES = 64 * 1024
TOTAL = 256 * 1024
CONNECTS = 24
WAYS = ("return", "exit", "loop")


def test_the_interpreter_ends_with_an_open_connection(ends, place):
    """Its own words about what a program forgets aside, it says nothing."""
    before = resources()
    server = ends.start("server")
    port = server.ask("serve")["port"]
    words = [sys.executable, "-X", "dev", "-W", "ignore::ResourceWarning", LEAVER]
    words += [place.server_host, port, place.client_host, place.fabric, *WAYS]
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, check=False, timeout=90
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == dict.fromkeys(WAYS, 0)
    for record in server.ask("records", count=len(WAYS))["records"]:
        assert (record["lost_count"], record["is_connection_error"]) == (1, True)
    assert server.finish() == 0
    wait_for_resources(before)


def test_ctrl_c_in_the_middle_of_a_transfer(ends):
    before = resources()
    server, client = ends.pair()
    client.ask("reach", received=MOMENT_BYTES)
    client.signal(signal.SIGINT)
    assert client.wait() == 128 + signal.SIGINT
    (record,) = server.ask("records")["records"]
    assert (record["wrong"], record["lost_count"]) == (None, 1)
    assert server.finish() == 0
    wait_for_resources(before)


def test_connects_that_are_cancelled_leave_nothing(ends):
    """Each is cancelled some turns of the loop later than the one before."""
    before = resources()
    server, client = ends.start("server"), ends.start("client")
    port = server.ask("serve", total=0)["port"]
    ended = client.ask("cancel_connects", port=port, count=CONNECTS, turns=4)["ended"]
    assert "cancelled" in ended
    # A good one afterwards: nothing of the others stands in its way.
    client.ask("close")
    ends.connect(server, client, total=MOMENT_BYTES)
    for end in (client, server):
        end.ask("records", count=0)
        assert end.ask("facts")["tasks"] == 1
        assert end.finish() == 0
    wait_for_resources(before)


def test_a_fork_in_the_middle_of_a_transfer(ends):
    """The child is refused and harms nothing; the parent's stream goes on."""
    server, client = ends.pair(total=TOTAL)
    found = client.ask("fork", host=ends.place.server_host)
    assert found["code"] == 0
    assert set(found["refused"]) == {"write", "close", "connect"}
    for use, text in found["refused"].items():
        assert text.startswith("ForkedError"), (use, text)
    for end in (server, client):
        (record,) = end.ask("records")["records"]
        assert (record["error"], record["wrong"]) == (None, None), record
        assert (record["received"], record["eof"]) == (TOTAL, True)
        assert end.finish() == 0
