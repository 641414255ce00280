"""Cutting CLC messages out of a TCP stream, and never one byte more.

After a Decline the next byte belongs to the application, so the reader of the socket
has to be told how many bytes it may take: first a header's, then the rest of just this
message. `ClcStream` decides that; it does not know what a message means.

Reference: RFC 7609 section 3.5.1 and A.2.1; kernel counterpart: smc_clc_wait_msg().
"""

from __future__ import annotations

from typing import Final

from pysmc.errors import RemoteProtocolError
from smcproto import clc
from smcproto.diagnosis import PeerDiagnosis
from smcproto.errors import DecodeError

__all__ = ["ClcStream"]

HEADER_BYTES: Final = 8


class ClcStream:
    """Collects the bytes of one CLC message after another."""

    __slots__ = ("_buffer", "_length")

    def __init__(self) -> None:
        self._buffer = b""
        self._length = HEADER_BYTES

    @property
    def wanted(self) -> int:
        """Most bytes that may be taken from the socket now, at least 1."""
        return self._length - len(self._buffer)

    @property
    def is_empty(self) -> bool:
        """Whether no byte of a message has come yet."""
        return not self._buffer

    def feed(self, data: bytes) -> clc.ClcMessage | None:
        """Take bytes; give the message when it is complete.

        Args:
            data: 1 to `wanted` bytes.

        Raises:
            RemoteProtocolError: What came is not a CLC message. Its header is judged
                before the rest is awaited, so that nobody can make us wait for 64 KiB.
        """
        assert 0 < len(data) <= self.wanted, "bytes of the application were taken"
        self._buffer += data
        try:
            if len(self._buffer) == HEADER_BYTES == self._length:
                self._length = clc.parse_header(self._buffer).length
            if len(self._buffer) < self._length:
                return None
            message = clc.parse(self._buffer)
        except DecodeError as error:
            text = f"peer sent something that is no CLC message: {error}"
            raise RemoteProtocolError(
                text,
                section="RFC 7609 A.2",
                diagnosis=PeerDiagnosis.INTERNAL,
            ) from error
        self._buffer = b""
        self._length = HEADER_BYTES
        return message
