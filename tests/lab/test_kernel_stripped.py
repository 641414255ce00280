"""The TCP option taken off on its way, between the kernel's SMC and ours.

Off the SYN neither end sees it, and both are on TCP. Off the SYN-ACK the server has
seen it and its client has not: what comes first is the application's, or nothing.
"""

# ruff: noqa: T201  # the views of a scenario are in its output

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from smcproto.diagnosis import PeerDiagnosis

if TYPE_CHECKING:
    from collections.abc import Iterator

LAB = pytest.mark.lab(seconds=40)
LONG = pytest.mark.lab_long(seconds=60)
SEGMENTS = {"SYN": "syn", "SYN-ACK": "syn|ack"}
TABLE = """
table ip stripping {{
    chain out {{
        type filter hook output priority 0;
        tcp flags & (syn|ack) == {flags} counter reset tcp option 254
    }}
}}
"""


@contextmanager
def stripped(segment: str) -> Iterator[None]:
    """Take the option off a kind of segment while the block lasts."""
    table = TABLE.format(flags=SEGMENTS[segment])
    subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)
    try:
        yield
        found = subprocess.run(
            ["nft", "list", "table", "ip", "stripping"],
            capture_output=True,
            text=True,
            check=True,
        )
        print(found.stdout)
        assert "packets 0 " not in found.stdout
    finally:
        subprocess.run(["nft", "delete", "table", "ip", "stripping"], check=True)


@pytest.mark.parametrize("client_is_ours", [True, False], ids=["ours", "theirs"])
@LONG
def test_off_the_syn(kernel, meetings, client_is_ours):
    ours, theirs = meetings.ours("ours"), meetings.theirs("theirs")
    client, server = (ours, theirs) if client_is_ours else (theirs, ours)
    with stripped("SYN"):
        port = server.ask("serve")["port"]
        server.tell("take")
        opened, taken = client.ask("open", port=port), server.answer()
    info = (opened if client_is_ours else taken)["infos"][0]
    (seen,) = kernel.sockets()
    print(info, seen)
    assert (info["mode"], info["reason"]["name"]) == ("tcp", "PEER_NO_SMC")
    assert (seen.mode, seen.reason) == ("tcp", PeerDiagnosis.PEER_NO_SMC)
    meetings.use(client, server)


@LAB
def test_off_the_syn_ack_of_our_server(kernel, meetings):
    """What comes first is no CLC: all of it is the application's."""
    server, client = meetings.ours("server"), meetings.theirs("client")
    port = server.ask("serve")["port"]
    with stripped("SYN-ACK"):
        client.ask("open", port=port)
    (seen,) = kernel.sockets()
    assert (seen.mode, seen.reason) == ("tcp", PeerDiagnosis.PEER_NO_SMC)
    client.ask("send", count=1)  # shorter than any eye catcher
    info = server.ask("take")["infos"][0]
    print(info)
    assert info["mode"] == "tcp"
    server.ask("receive", count=1)
    meetings.use(client, server)


@LONG
def test_off_the_syn_ack_of_our_server_and_the_client_waits(kernel, meetings):
    """What never becomes CLC is closed, as the kernel does; the listener goes on."""
    server, client = (
        meetings.ours("server", proposal_wait=2.0),
        meetings.theirs("client"),
    )
    port = server.ask("serve")["port"]
    with stripped("SYN-ACK"):
        client.ask("open", port=port)
    server.may_complain = True
    print(client.ask("reset"))
    assert meetings.connect(client, server, port) == "smcr"
    meetings.use(client, server)


@LONG
def test_off_the_syn_ack_of_their_server(kernel, meetings):
    """The kernel waits for CLC: it ends the connection, and no byte is delivered."""
    server, client = meetings.theirs("server"), meetings.ours("client")
    port = server.ask("serve")["port"]
    server.tell("take")
    with stripped("SYN-ACK"):
        info = client.ask("open", port=port)["infos"][0]
    assert (info["mode"], info["reason"]["name"]) == ("tcp", "PEER_NO_SMC")
    client.ask("send", count=10)
    print(client.ask("reset"))
    assert not kernel.sockets()
    # Its listener goes on.
    info = client.ask("open", port=port)["infos"][0]
    assert info["mode"] == "smcr"
    server.answer()
    meetings.use(client, server)
