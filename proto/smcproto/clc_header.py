"""The frame of a CLC message: header, length and the eye catchers at both ends.

Decides from the first 8 bytes whether a message can begin so and how long it is, and
whether a whole message is framed as it must be. Does not know what is inside.

Source: RFC 7609 A.2; lengths of version 2: Linux net/smc/smc_clc.h. A Proposal or
Decline with version nibble 3 or more is taken like version 2, as Linux does: the
answer says which version is meant.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Self

from smcproto.constants import (
    ACCEPT_V1_BYTES,
    ACCEPT_V2_BYTES,
    ACCEPT_V2_FIRST_CONTACT_BYTES,
    CLC_HEADER_BYTES,
    CLC_MAX_BYTES,
    CLC_TRAILER_BYTES,
    CONFIRM_V2_FIRST_CONTACT_BYTES,
    DECLINE_V1_BYTES,
    DECLINE_V2_BYTES,
    EYECATCHER_SMCD,
    EYECATCHER_SMCR,
    GID_BYTES,
    PROPOSAL_MAX_BYTES,
    PROPOSAL_MIN_BYTES,
    SMCD_ACCEPT_V1_BYTES,
    SMCD_ACCEPT_V2_BYTES,
    SMCD_ACCEPT_V2_RELEASE_0_BYTES,
    SMCD_ACCEPT_V2_RELEASE_1_BYTES,
    ClcType,
)
from smcproto.errors import DecodeError, EncodeError
from smcproto.layout import uint

if TYPE_CHECKING:
    from smcproto.layout import Buffer

HEADER_FIELDS: Final = (uint("type", 1), uint("length", 2))
"""What every layout has behind the eye catcher; ``parse_header`` has checked it."""


@dataclass(frozen=True, slots=True)
class ClcHeader:
    """The first 8 bytes of a CLC message, checked."""

    type: ClcType
    length: int
    """Bytes of the whole message, trailer included."""
    version: int
    """Version nibble, 1 or more."""
    smcd: bool = False
    """Whether it is an SMC-D Accept or Confirm."""


def parse_header(data: Buffer) -> ClcHeader:
    """Check the first 8 bytes of a CLC message.

    After this call, read exactly ``length - 8`` more bytes and call ``clc.parse``
    with all of them.

    Args:
        data: At least 8 bytes; more are not looked at.

    Raises:
        DecodeError: No message can begin so; the connection cannot go on.

    Reference: RFC 7609 A.2; lengths of version 2: Linux smc_clc.h.
    """
    head = bytes(data[:CLC_HEADER_BYTES])
    if len(head) < CLC_HEADER_BYTES:
        msg = f"{len(head)} bytes where a header has {CLC_HEADER_BYTES}"
        raise DecodeError(
            msg,
            field="length",
            offset=len(head),
        )
    smcd = head[:4] == EYECATCHER_SMCD
    if not smcd and head[:4] != EYECATCHER_SMCR:
        msg = f"bytes {head[:4].hex()} are no eye catcher"
        raise DecodeError(msg, field="eyecatcher", offset=0)
    if not ClcType.PROPOSAL <= head[4] <= ClcType.DECLINE:
        msg = f"CLC type {head[4]} is unknown"
        raise DecodeError(msg, field="type", offset=4)
    kind = ClcType(head[4])
    length = int.from_bytes(head[5:7], "big")
    version = head[7] >> 4
    contact = kind in (ClcType.ACCEPT, ClcType.CONFIRM)
    if version == 0 or (contact and version > 2):
        msg = f"{kind.name} of version {version}"
        raise DecodeError(msg, field="version", offset=7)
    if smcd and not contact:
        msg = f"{kind.name} with the eye catcher of SMC-D"
        raise DecodeError(msg, field="eyecatcher", offset=0)
    if not _is_possible_length(kind, length, version, smcd=smcd):
        msg = f"{kind.name} of version {version} cannot have {length} bytes"
        raise DecodeError(
            msg,
            field="length",
            offset=5,
        )
    return ClcHeader(kind, length, version, smcd)


def _is_possible_length(
    kind: ClcType, length: int, version: int, *, smcd: bool
) -> bool:
    """Tell whether any message of this kind and version has that many bytes."""
    if kind is ClcType.PROPOSAL:
        return PROPOSAL_MIN_BYTES <= length <= PROPOSAL_MAX_BYTES
    if kind is ClcType.DECLINE:
        return length == (DECLINE_V1_BYTES if version == 1 else DECLINE_V2_BYTES)
    if smcd:
        return length in _SMCD_LENGTHS[version]
    if version == 1:
        return length == ACCEPT_V1_BYTES
    if length == ACCEPT_V2_BYTES:
        return True
    if kind is ClcType.ACCEPT:
        return length == ACCEPT_V2_FIRST_CONTACT_BYTES
    gids, rest = divmod(length - CONFIRM_V2_FIRST_CONTACT_BYTES, GID_BYTES)
    return gids >= 0 and rest == 0 and length <= CLC_MAX_BYTES


_SMCD_LENGTHS: Final = {
    1: (SMCD_ACCEPT_V1_BYTES,),
    2: (
        SMCD_ACCEPT_V2_BYTES,
        SMCD_ACCEPT_V2_RELEASE_0_BYTES,
        SMCD_ACCEPT_V2_RELEASE_1_BYTES,
    ),
}


def open_frame(data: Buffer) -> tuple[ClcHeader, bytes]:
    """Check header, length and trailer of a whole message.

    Args:
        data: Exactly as many bytes as the header says.

    Returns:
        The header, and the message as ``bytes``.

    Raises:
        DecodeError: It is no CLC message.
    """
    header = parse_header(data)
    if len(data) != header.length:
        msg = f"{len(data)} bytes received, the header says {header.length}"
        raise DecodeError(
            msg,
            field="length",
            offset=5,
        )
    message = bytes(data)
    trailer = message[-CLC_TRAILER_BYTES:]
    if trailer != message[:CLC_TRAILER_BYTES]:
        msg = f"bytes {trailer.hex()} instead of the eye catcher at the end"
        raise DecodeError(
            msg,
            field="trailer",
            offset=header.length - CLC_TRAILER_BYTES,
        )
    return header, message


def check_version(version: int, highest: int) -> None:
    """Refuse to build a message that our own ``parse_header`` would not take.

    Args:
        version: Version nibble.
        highest: The highest that may be sent in such a message.

    Raises:
        EncodeError: The version is 0, or too high.
    """
    if not 1 <= version <= highest:
        msg = f"version {version}: 1 to {highest}"
        raise EncodeError(msg, field="version", offset=7)


class ClcBase:
    """What all CLC messages have in common."""

    __slots__ = ()

    TYPE: ClassVar[ClcType]
    SMCD: ClassVar[bool] = False

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Read a message of this kind.

        Args:
            data: The whole message and no more.

        Raises:
            DecodeError: It is none, or one of another kind.
        """
        header, message = open_frame(data)
        if header.type is not cls.TYPE or header.smcd is not cls.SMCD:
            msg = (
                f"{'SMC-D ' if header.smcd else ''}{header.type.name} where "
                f"{cls.__name__} was expected"
            )
            raise DecodeError(
                msg,
                field="type",
                offset=4,
            )
        return cls.read(message)

    @classmethod
    @abstractmethod
    def read(cls, data: bytes) -> Self:
        """Read a message whose frame has been checked.

        Raises:
            DecodeError: A part is not what it must be.
        """
