"""A whole session on the wire, read by tshark, and by our own decoder.

tshark 4.0 knows CLC of both versions, LLC of version 1 and CDC. Of LLC version 2 it
knows nothing: it shows it as data, but a CONFIRM LINK, whose first bytes look like RPC
over RDMA, as a malformed packet of that. Nothing else may be malformed.
"""

# ruff: noqa: T201  # the figures of a scenario are in its output

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from smcproto.cdc import CdcMessage
from smcproto.decode import Plane, decode
from tests.lab.capture import captured, dissected, frames, tcp_streams

if TYPE_CHECKING:
    from pathlib import Path

TOTAL = 24 * 1024
CONNECTIONS = 2
CONFIRM_LINK_V2 = b"\x21"
CDC = b"\xfe"
WARNING = 6291456
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


@pytest.fixture
def session(ends, tmp_path):
    path = tmp_path / "session.pcap"
    play(ends, path)
    return path


@pytest.mark.lab(seconds=90)
def test_a_session_dissects_without_an_error(session):
    found = list(frames(session.read_bytes()))
    told = dissected(session)
    assert len(told) == len(found)
    sends = [frame for frame in found if frame.kind == "send" and frame.payload]
    planes = Counter(decode(frame.payload)[0] for frame in sends)
    print(f"{len(found)} packets: {dict(planes)}")
    for frame in found:
        words = told[frame.number]
        is_exception = frame.kind == "send" and frame.payload[:1] == CONFIRM_LINK_V2
        if not is_exception:
            assert not words.is_malformed, (frame, words)
            assert words.severity < WARNING, (frame, words)
    # It has seen what we have seen.
    cdc = [frame for frame in sends if frame.payload[:1] == CDC]
    clc = [frame for frame in found if frame.kind == "tcp" and frame.payload]
    as_smc = {number for number, words in told.items() if "smc" in words.protocols}
    assert as_smc == {frame.number for frame in cdc + clc}
    assert {told[frame.number].protocols[-1] for frame in sends} <= {
        "smc", "data", "rpcordma"
    }  # fmt: skip
    assert planes[Plane.LLC_V2] >= 4, "CONFIRM LINK and CONFIRM RKEY, and their answers"
    # Our own fabric says with an empty SEND that it is there, and that it goes.
    empty = [frame for frame in found if frame.kind == "send" and not frame.payload]
    assert 2 <= len(empty) <= 3


@pytest.mark.lab(seconds=60)
def test_a_session_is_what_it_should_be(session):
    found = list(frames(session.read_bytes()))
    streams = tcp_streams(found)
    assert len(streams) == 2 * CONNECTIONS
    for (source, *_), stream in streams.items():
        end = "client" if source == "10.0.0.2" else "server"
        assert messages_of(stream) == SESSION[end], end
    updates: dict[tuple[str, int], list[CdcMessage]] = {}
    for frame in found:
        if frame.kind == "send" and frame.payload[:1] == CDC:
            message = decode(frame.payload)[1]
            assert isinstance(message, CdcMessage)
            of_one = updates.setdefault((frame.flow[0], message.alert_token), [])
            of_one.append(message)
    assert len(updates) == 2 * CONNECTIONS
    for messages in updates.values():
        sequences = [message.sequence for message in messages]
        assert sequences == list(range(1, len(sequences) + 1))
        print(f"{len(messages)} CDC messages")
    written = sum(len(frame.payload) for frame in found if frame.kind == "write")
    assert written >= 2 * CONNECTIONS * TOTAL
    assert not any(frame.payload for frame in _after_the_handshake(found))


def _after_the_handshake(found):
    """TCP packets behind the last CLC message: they only end the connections."""
    last = max(
        n for n, frame in enumerate(found) if frame.payload[:3] == b"\xe2\xd4\xc3"
    )
    return [frame for frame in found[last + 1 :] if frame.kind == "tcp"]
