"""CLC messages: the offers and answers that two ends exchange on the TCP connection.

Decides the bytes of the Decline, and is the door to all the others: ``parse`` reads
any of them, and refuses whatever is not exactly such a message. Does not know what a
message means for a connection, and reads no stream: a reader takes 8 bytes, calls
``parse_header``, and then takes exactly the rest, because the byte behind a Decline
is application data.

Source: RFC 7609 A.2; version 2: Linux net/smc/smc_clc.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Self, TypeAlias

from smcproto.clc_contact import Accept, Confirm
from smcproto.clc_header import (
    HEADER_FIELDS,
    ClcBase,
    ClcHeader,
    check_version,
    open_frame,
    parse_header,
)
from smcproto.clc_proposal import IpArea, Ipv6Prefix, Proposal
from smcproto.clc_smcd import SmcdAccept, SmcdConfirm
from smcproto.clc_v2 import (
    AcceptExtension,
    ConfirmExtension,
    FirstContactExtension,
    IsmGid,
    ProposalExtension,
    SmcdAcceptExtension,
    SmcdExtension,
    is_valid_eid,
)
from smcproto.constants import (
    DECLINE_V1_BYTES,
    DECLINE_V2_BYTES,
    EYECATCHER_SMCR,
    PEER_ID_BYTES,
    ClcType,
    OsType,
)
from smcproto.diagnosis import PeerDiagnosis, describe
from smcproto.errors import EncodeError
from smcproto.layout import (
    Bit,
    Layout,
    bits,
    code,
    constant,
    member_or_int,
    raw,
    reserved,
    words,
)

if TYPE_CHECKING:
    from smcproto.layout import Buffer

__all__ = [
    "Accept",
    "AcceptExtension",
    "ClcHeader",
    "ClcMessage",
    "Confirm",
    "ConfirmExtension",
    "Decline",
    "FirstContactExtension",
    "IpArea",
    "Ipv6Prefix",
    "IsmGid",
    "Proposal",
    "ProposalExtension",
    "SmcdAccept",
    "SmcdAcceptExtension",
    "SmcdConfirm",
    "SmcdExtension",
    "is_valid_eid",
    "parse",
    "parse_header",
]

_DECLINE_FIELDS: Final = (
    constant("eyecatcher", EYECATCHER_SMCR),
    *HEADER_FIELDS,
    bits(Bit("version", 0xF0), Bit("out_of_sync", 0x08, bool)),
    raw("peer_id", PEER_ID_BYTES),
    code("diagnosis", 4, PeerDiagnosis),
)
_DECLINE_V1: Final = Layout("SMC Decline", *_DECLINE_FIELDS, reserved(4))
_DECLINE_V2: Final = Layout(
    "SMC Decline version 2",
    *_DECLINE_FIELDS,
    bits(Bit("os_type", 0xF0, member_or_int(OsType))),
    reserved(3),
    words("extra", 4),
)


@dataclass(frozen=True, slots=True)
class Decline(ClcBase):
    """Either side's refusal: the connection goes on as TCP. RFC 7609 A.2.5."""

    version: int
    """1 gives 28 bytes, 2 and above 44."""
    out_of_sync: bool
    """The client knows no link that matches the Accept; nothing else may set it."""
    peer_id: bytes
    """8 bytes; zero if unknown."""
    diagnosis: int
    """A ``PeerDiagnosis``, or any other 32 bits: text for people."""
    os_type: int = 0
    """An ``OsType``, or another 4-bit number; version 2."""
    extra: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Four more codes of 32 bits; version 2, Linux sends zeros."""

    TYPE: ClassVar[ClcType] = ClcType.DECLINE

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Read a message whose frame has been checked.

        Raises:
            DecodeError: A part is not what it must be.
        """
        layout = _DECLINE_V1 if len(data) == DECLINE_V1_BYTES else _DECLINE_V2
        values = layout.parse(data)
        del values["type"], values["length"]
        return cls(**values)

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: Version 1 has no place for a value, or it does not fit.
        """
        check_version(self.version, 15)
        if self.version > 1:
            fixed = _DECLINE_V2.build_from(
                self, type=self.TYPE, length=DECLINE_V2_BYTES
            )
            return fixed + EYECATCHER_SMCR
        if self.os_type or any(self.extra):
            msg = "a version 1 Decline has no OS type and no extra codes"
            raise EncodeError(msg, field="extra")
        fixed = _DECLINE_V1.build_from(self, type=self.TYPE, length=DECLINE_V1_BYTES)
        return fixed + EYECATCHER_SMCR

    def __str__(self) -> str:
        sync = " out-of-sync" if self.out_of_sync else ""
        return (
            f"Decline version={self.version}{sync} peer_id={self.peer_id.hex()} "
            f"diagnosis={self.diagnosis:08x} {describe(self.diagnosis).name}"
        )


ClcMessage: TypeAlias = Proposal | Accept | Confirm | SmcdAccept | SmcdConfirm | Decline
"""Any CLC message."""

_CLASSES: Final[dict[tuple[ClcType, bool], type[ClcMessage]]] = {
    (kind.TYPE, kind.SMCD): kind
    for kind in (Proposal, Accept, Confirm, SmcdAccept, SmcdConfirm, Decline)
}


def parse(data: Buffer) -> ClcMessage:
    """Read any CLC message.

    Args:
        data: The whole message, exactly as long as its header says.

    Raises:
        DecodeError: It is none; field and offset say why.

    Reference: RFC 7609 A.2.
    """
    header, message = open_frame(data)
    return _CLASSES[header.type, header.smcd].read(message)
