"""The frame of an LLC message: type, length and version.

Decides from the first bytes which message of which version it is, and how a body
becomes a message. Does not know the bodies: they begin with the flags at byte 3,
which is the first byte that both versions share.

In version 2 bytes 1 and 2 hold a length, which Linux writes in the byte order of
its machine: it is ignored when read, the bytes received count, and written
big-endian. Every message has exactly the size that its content asks for.

Source: RFC 7609 A.3; version 2: Linux net/smc/smc_llc.h.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from smcproto.constants import (
    CDC_TYPE,
    LLC_V1_BYTES,
    LLC_V2_FLAG,
    LLC_V2_MAX_BYTES,
    LlcType,
)
from smcproto.errors import DecodeError, EncodeError
from smcproto.layout import Bit

if TYPE_CHECKING:
    from smcproto.layout import Buffer

FLAGS_AT: Final = 3
"""Where the layouts begin."""

RESPONSE: Final = Bit("response", 0x80, bool)

_V1_ONLY: Final = {LlcType.ADD_LINK_CONTINUATION, LlcType.CONFIRM_RKEY_CONTINUATION}
_V2_ONLY: Final = {LlcType.REQUEST_ADD_LINK}
_TYPES: Final = {int(kind): (kind, 1) for kind in LlcType if kind not in _V2_ONLY} | {
    LLC_V2_FLAG | kind: (kind, 2) for kind in LlcType if kind not in _V1_ONLY
}

_HOLDING_UP: Final = {LlcType.TEST_LINK, LlcType.CONFIRM_RKEY, LlcType.DELETE_RKEY}


def open_frame(data: Buffer) -> tuple[LlcType, int, bytes]:
    """Check type and length.

    Args:
        data: Exactly the bytes that one completion delivered.

    Returns:
        Type, version and the message as ``bytes``.

    Raises:
        DecodeError: It is no LLC message.
    """
    size = len(data)
    if not LLC_V1_BYTES <= size <= LLC_V2_MAX_BYTES:
        msg = f"{size} bytes: {LLC_V1_BYTES} to {LLC_V2_MAX_BYTES}"
        raise DecodeError(
            msg,
            field="length",
            offset=0,
        )
    if data[0] == CDC_TYPE:
        msg = "a CDC message, not LLC"
        raise DecodeError(msg, field="type", offset=0)
    if data[0] not in _TYPES:
        msg = f"LLC type {data[0]:#04x} is unknown"
        raise DecodeError(msg, field="type", offset=0)
    kind, version = _TYPES[data[0]]
    if version == 1 and (size != LLC_V1_BYTES or data[1] != LLC_V1_BYTES):
        msg = (
            f"version 1 message of {size} bytes that says {data[1]}: both must be "
            f"{LLC_V1_BYTES}"
        )
        raise DecodeError(
            msg,
            field="length",
            offset=1,
        )
    return kind, version, bytes(data)


def is_ignorable(type_number: int) -> bool:
    """Tell whether a message of an unknown type may be passed over in silence.

    Args:
        type_number: Byte 0 of the message.

    Reference: RFC 7609 A.3: with the two highest bits 10 it is optional, with 00 it
    is a protocol error. Linux passes over all.
    """
    return type_number & 0xC0 == 0x80


def is_question(data: bytes) -> bool:
    """Tell, without reading it, whether a link in use is held up until it is answered.

    So TEST LINK, CONFIRM RKEY and DELETE RKEY, as requests.

    Args:
        data: Exactly the bytes that one completion delivered; of any length.

    Reference: RFC 7609 A.3; kernel counterpart: smc_llc_flow_initiate().
    """
    if len(data) <= FLAGS_AT:
        return False
    return data[0] & ~LLC_V2_FLAG in _HOLDING_UP and not data[FLAGS_AT] & RESPONSE.mask


class LlcBase:
    """What all LLC messages have in common."""

    __slots__ = ()

    TYPE: ClassVar[LlcType]

    version: int
    response: bool

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Read a message of this kind, of either version.

        Args:
            data: Exactly the bytes that one completion delivered.

        Raises:
            DecodeError: It is none, or one of another kind.
        """
        kind, version, message = open_frame(data)
        if kind is not cls.TYPE:
            msg = f"{kind.name} where {cls.TYPE.name} was expected"
            raise DecodeError(
                msg,
                field="type",
                offset=0,
            )
        return cls.read(message, version)

    @classmethod
    @abstractmethod
    def read(cls, data: bytes, version: int) -> Self:
        """Read a message whose frame has been checked.

        Raises:
            DecodeError: A part is not what it must be.
        """

    def title(self) -> str:
        """Name message, version and direction."""
        side = "response" if self.response else "request"
        return f"{self.TYPE.name} version={self.version} {side}"


def build_message(kind: LlcType, version: int, body: bytes, byte_2: int = 0) -> bytes:
    """Pad a body with zeros to the smallest size and put the header before it.

    Args:
        kind: Type of the message.
        version: 1 or 2.
        body: From the flags on.
        byte_2: Version 1 only: the byte before the flags.

    Raises:
        EncodeError: That version has no such message.
    """
    number = kind if version == 1 else LLC_V2_FLAG | kind
    if _TYPES.get(number) != (kind, version):
        msg = f"{kind.name} does not exist in version {version}"
        raise EncodeError(msg, field="version", offset=0)
    body = body.ljust(LLC_V1_BYTES - FLAGS_AT, b"\0")
    length = FLAGS_AT + len(body)
    if version == 1:
        return bytes((number, length, byte_2)) + body
    return bytes((number,)) + length.to_bytes(2, "big") + body


def require_size(data: bytes, size: int, field: str) -> None:
    """Refuse a message that is longer or shorter than its content."""
    if len(data) != size:
        msg = f"{len(data)} bytes received where the content has {size}"
        raise DecodeError(msg, field=field)


def count_entries(field: str, entries: tuple[Any, ...], most: int) -> int:
    """Count entries, refusing more than there is room for."""
    if len(entries) > most:
        msg = f"{len(entries)} entries, at most {most}"
        raise EncodeError(msg, field=field)
    return len(entries)


def announced_count(field: str, listed: int, announced: int | None, most: int) -> int:
    """Give the count to be written when messages may follow with the rest.

    A full message may announce more than it lists; any other lists them all.
    """
    if announced is None or announced == listed:
        return listed
    if listed != most or announced < listed:
        msg = f"{announced} announced, {listed} listed, {most} fit"
        raise EncodeError(msg, field=field)
    return announced
