"""A whole session on the wire, read by tshark, and by our own decoder.

tshark 4.0 knows all of it: CLC, LLC and CDC. (It knows LLC version 2 by the high byte
of a length in network order, as pysmc sends it. Linux has the order of its machine
there, and a CONFIRM LINK of an x86 kernel shows as malformed RPC over RDMA.) What it
takes for malformed RPC over RDMA here are the empty SENDs by which one end of our
fabric says that it is there, or goes. Nothing else may be malformed.
"""

# ruff: noqa: T201  # the figures of a scenario are in its output

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from smcproto.cdc import CdcMessage
from smcproto.decode import Plane, decode
from tests.lab.capture import (
    Dissected,
    Frame,
    captured,
    dissected,
    frames,
    tcp_streams,
)

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "proto" / "captures" / "pysmc-pysmc_v2.1_two-connections.pcap"
TOTAL = 6 * 1024
CONNECTIONS = 2
CDC = b"\xfe"
WARNING, ERROR = 6291456, 8388608
SESSION = {
    "client": ["Proposal", "Confirm"],
    "server": ["Accept"],
}


def play(ends, path: Path) -> None:
    """A first contact, a second connection on the same link group, and the end."""
    server, client = ends.start("server"), ends.start("client")
    with captured(path):
        for _ in range(CONNECTIONS):
            ends.connect(server, client, total=TOTAL)
            for end in (server, client):
                (record,) = end.ask("records")["records"]
                assert (record["error"], record["received"]) == (None, TOTAL)
        # The client leaves, and tells the server: DELETE LINK of the whole group.
        assert client.finish() == 0
        assert server.finish() == 0


def messages_of(stream: bytes) -> list[str]:
    """Name the CLC messages of one direction of a TCP connection; nothing follows."""
    found = []
    while stream:
        size = int.from_bytes(stream[5:7], "big")
        plane, message = decode(stream[:size])
        assert plane is Plane.CLC
        found.append(type(message).__name__)
        stream = stream[size:]
    return found


@pytest.mark.lab(seconds=90)
def test_a_session_on_the_wire(ends, tmp_path):
    path = tmp_path / "session.pcap"
    play(ends, path)
    if folder := os.environ.get("PYSMC_LAB_FOLDER"):
        shutil.copy(path, folder)  # for whoever looks at a failure
    found = list(frames(path.read_bytes()))
    check_messages(found)
    check_updates(found)
    check_dissection(found, dissected(path))


def test_the_session_that_is_kept():
    """Needs no guest; tshark is asked where it is installed."""
    found = list(frames(KEPT.read_bytes()))
    check_messages(found)
    check_updates(found)
    if shutil.which("tshark"):
        check_dissection(found, dissected(KEPT))


def check_dissection(found: list[Frame], told: dict[int, Dissected]) -> None:
    """The other reading knows the same messages, and has no complaint."""
    assert len(told) == len(found)
    messages = {
        frame.number
        for frame in found
        if frame.payload and frame.kind in {"tcp", "send"}
    }
    assert {n for n, words in told.items() if "smc" in words.protocols} == messages
    for frame in found:
        words = told[frame.number]
        if frame.kind == "send" and not frame.payload:
            assert words.protocols[-1] == "rpcordma"
            continue
        assert not words.is_malformed, (frame, words)
        # Of a reset, say, it warns: that is TCP's.
        most = WARNING if frame.number in messages else ERROR
        assert words.severity < most, (frame, words)


def check_messages(found: list[Frame]) -> None:
    """TCP carries CLC and nothing else; each SEND is a message, or a sign of ours."""
    streams = tcp_streams(found)
    assert len(streams) == 2 * CONNECTIONS
    for (source, *_), stream in streams.items():
        end = "client" if source == "10.0.0.2" else "server"
        assert messages_of(stream) == SESSION[end], end
    sends = [frame for frame in found if frame.kind == "send"]
    planes = Counter(decode(frame.payload)[0] for frame in sends if frame.payload)
    print(f"{len(found)} packets: {dict(planes)}")
    # CONFIRM LINK and its answer, and DELETE LINK; the second connection has the buffer
    # of the first one.
    assert planes[Plane.LLC_V2] >= 3
    # An end says with an empty SEND that it is there, and that it goes.
    assert 2 <= sum(not frame.payload for frame in sends) <= 3


def check_updates(found: list[Frame]) -> None:
    """Each direction of each connection counts its CDC messages, and writes."""
    updates: dict[tuple[str, int], list[int]] = {}
    for frame in found:
        if frame.kind == "send" and frame.payload[:1] == CDC:
            message = decode(frame.payload)[1]
            assert isinstance(message, CdcMessage)
            of_one = updates.setdefault((frame.flow[0], message.alert_token), [])
            of_one.append(message.sequence)
    assert len(updates) == 2 * CONNECTIONS
    for sequences in updates.values():
        assert sequences == list(range(1, len(sequences) + 1))
        print(f"{len(sequences)} CDC messages")
    written = sum(len(frame.payload) for frame in found if frame.kind == "write")
    assert written >= 2 * CONNECTIONS * TOTAL
