"""CDC messages: the 44 bytes that say how far each side has written and read.

Decides the bytes, twice: as a construct layout for people and tools, and as a fast
path on ``struct`` for the data path, where a cursor is one integer,
``wrap << 32 | count``. A property test proves the two equal. Does not compare or
advance cursors, and does not know whether a message is news.

Source: RFC 7609 A.4, figure 41. A message is the same in versions 1 and 2.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from smcproto.constants import (
    CDC_BYTES,
    CDC_TYPE,
    ConnectionStateFlags,
    ProducerFlags,
)
from smcproto.errors import DecodeError, EncodeError
from smcproto.layout import Buffer, Layout, constant, flags, reserved, uint

_CDC: Final = Layout(
    "CDC",
    constant("type", bytes((CDC_TYPE,))),
    constant("length", bytes((CDC_BYTES,))),
    uint("sequence", 2),
    uint("alert_token", 4),
    reserved(2),
    uint("producer_wrap", 2),
    uint("producer_count", 4),
    reserved(2),
    uint("consumer_wrap", 2),
    uint("consumer_count", 4),
    flags("producer_flags", ProducerFlags),
    flags("state_flags", ConnectionStateFlags),
    reserved(18),
)

# Type and length as one number, sequence, token, both cursors with the reserved
# bytes before each, both bytes of flags as one number.
_FAST: Final = struct.Struct(">HHIQQH18x")
_TYPE_AND_LENGTH: Final = CDC_TYPE << 8 | CDC_BYTES
_CURSOR_MASK: Final = (1 << 48) - 1
_FLAGS_MASK: Final = 0xF8E0
_NO_PRODUCER_FLAGS: Final = ProducerFlags(0)
_NO_STATE_FLAGS: Final = ConnectionStateFlags(0)


def pack(
    sequence: int, alert_token: int, producer: int, consumer: int, flags: int
) -> bytes:
    """Give the bytes of a CDC message, fast.

    Args:
        sequence: 16 bits.
        alert_token: The receiver's, 32 bits.
        producer: ``wrap << 32 | count``, 48 bits.
        consumer: The same for the sender's reading.
        flags: ``producer_flags << 8 | state_flags``.

    Raises:
        EncodeError: A value does not fit.

    Reference: RFC 7609 A.4.
    """
    if (producer | consumer) & ~_CURSOR_MASK or flags & ~_FLAGS_MASK:
        msg = f"cursors {producer:#x}, {consumer:#x} or flags {flags:#x} do not fit"
        raise EncodeError(
            msg,
            field="producer_count" if producer & ~_CURSOR_MASK else "producer_flags",
        )
    try:
        return _FAST.pack(
            _TYPE_AND_LENGTH, sequence, alert_token, producer, consumer, flags
        )
    except struct.error as error:
        msg = f"sequence {sequence} or token {alert_token} does not fit"
        raise EncodeError(msg, field="sequence") from error


def unpack(data: Buffer) -> tuple[int, int, int, int, int]:
    """Read a CDC message, fast.

    Args:
        data: Exactly 44 bytes.

    Returns:
        Sequence, alert token, producer and consumer as ``wrap << 32 | count``, and
        ``producer_flags << 8 | state_flags``.

    Raises:
        DecodeError: The bytes are no CDC message.

    Reference: RFC 7609 A.4.
    """
    if len(data) != CDC_BYTES:
        raise _wrong_length(len(data))
    head, sequence, alert_token, producer, consumer, flags = _FAST.unpack(data)
    if head != _TYPE_AND_LENGTH:
        raise _wrong_head(head)
    return (
        sequence,
        alert_token,
        producer & _CURSOR_MASK,
        consumer & _CURSOR_MASK,
        flags & _FLAGS_MASK,
    )


def _wrong_length(size: int) -> DecodeError:
    return DecodeError(
        f"{size} bytes where a CDC message has {CDC_BYTES}", field="length", offset=1
    )


def _wrong_head(head: int) -> DecodeError:
    """Say which of the first two bytes is wrong."""
    if head >> 8 != CDC_TYPE:
        return DecodeError(f"type {head >> 8:#04x} is not CDC", field="type", offset=0)
    return DecodeError(
        f"length byte {head & 0xFF} where it must be {CDC_BYTES}",
        field="length",
        offset=1,
    )


@dataclass(frozen=True, slots=True)
class CdcMessage:
    """The state of one direction of writing and one of reading. RFC 7609 A.4."""

    sequence: int
    """Counts the sender's messages, 16 bits; for FAILOVER_VALIDATION that of the
    last one whose sending completed."""
    alert_token: int
    """The receiver's token, from its Accept or Confirm; 32 bits."""
    producer_wrap: int
    """How often the sender's writing has wrapped, 16 bits."""
    producer_count: int
    """Next byte that the sender will write in the receiver's element; 32 bits."""
    consumer_wrap: int
    """How often the sender's reading has wrapped, 16 bits."""
    consumer_count: int
    """Next byte that the sender will read in its own element; 32 bits."""
    producer_flags: ProducerFlags = _NO_PRODUCER_FLAGS
    """What the sender says about its writing."""
    state_flags: ConnectionStateFlags = _NO_STATE_FLAGS
    """How far the sender has closed."""

    @classmethod
    def parse(cls, data: Buffer) -> CdcMessage:
        """Read a message by the construct layout.

        Args:
            data: Exactly 44 bytes.

        Raises:
            DecodeError: The bytes are no CDC message.
        """
        if len(data) != CDC_BYTES:
            raise _wrong_length(len(data))
        head = data[0] << 8 | data[1]
        if head != _TYPE_AND_LENGTH:
            raise _wrong_head(head)
        return cls(**_CDC.parse(bytes(data)))

    def build(self) -> bytes:
        """Give the bytes by the construct layout.

        Raises:
            EncodeError: A value does not fit.
        """
        return _CDC.build_from(self)

    def __str__(self) -> str:
        names = [flag.name or "" for flag in self.producer_flags]
        names += [flag.name or "" for flag in self.state_flags]
        words = f" {' '.join(names)}" if names else ""
        return (
            f"CDC sequence={self.sequence} token={self.alert_token:#x} "
            f"producer={self.producer_wrap}:{self.producer_count} "
            f"consumer={self.consumer_wrap}:{self.consumer_count}{words}"
        )
