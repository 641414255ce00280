"""Cutting messages out of a stream, and never one byte more."""

from __future__ import annotations

import pytest

from pysmc.core.clc_stream import ClcStream
from pysmc.errors import RemoteProtocolError
from smcproto import clc

DECLINE = clc.Decline(
    version=2, out_of_sync=False, peer_id=bytes(8), diagnosis=0x03030000, os_type=2
)
OLD_DECLINE = clc.Decline(
    version=1, out_of_sync=True, peer_id=bytes(8), diagnosis=0x04000000
)


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 1000])
def test_the_byte_behind_a_message_is_never_wanted(chunk: int) -> None:
    stream = ClcStream()
    waiting = bytearray(DECLINE.build() + OLD_DECLINE.build() + b"GET / HTTP/1.1")
    found: list[clc.ClcMessage] = []
    while len(found) < 2:
        assert stream.wanted >= 1
        count = min(chunk, stream.wanted)
        data = bytes(waiting[:count])
        del waiting[:count]
        message = stream.feed(data)
        if message is not None:
            found.append(message)
            assert stream.is_empty
    assert found == [DECLINE, OLD_DECLINE]
    assert bytes(waiting) == b"GET / HTTP/1.1"


def test_a_stranger_is_refused_by_its_header() -> None:
    stream = ClcStream()
    assert stream.wanted == 8
    with pytest.raises(RemoteProtocolError, match="no CLC message") as caught:
        stream.feed(b"HTTP/1.1")
    assert caught.value.diagnosis == 0x09990000


@pytest.mark.parametrize("length", [0, 8, 29, 0xFFFF])
def test_nobody_can_make_us_wait_for_more_than_a_message(length: int) -> None:
    header = DECLINE.build()[:5] + length.to_bytes(2, "big") + b"\x20"
    stream = ClcStream()
    with pytest.raises(RemoteProtocolError):
        stream.feed(header)


def test_a_wrong_trailer_is_refused_at_the_end() -> None:
    broken = DECLINE.build()[:-1] + b"\x00"
    stream = ClcStream()
    assert stream.feed(broken[:8]) is None
    assert stream.wanted == len(broken) - 8
    assert not stream.is_empty
    with pytest.raises(RemoteProtocolError):
        stream.feed(broken[8:])


@pytest.mark.parametrize("data", [b"", bytes(9)])
def test_a_driver_that_reads_more_than_is_wanted_is_caught(data: bytes) -> None:
    with pytest.raises(AssertionError, match="bytes of the application were taken"):
        ClcStream().feed(data)
