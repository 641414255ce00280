"""CLC Accept and Confirm: how the two ends reach each other's memory.

Decides their bytes in versions 1 and 2. Does not know whether a link exists or a
value was agreed upon.

Source: RFC 7609 A.2.3 and A.2.4; version 2: Linux net/smc/smc_clc.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from smcproto.clc_header import HEADER_FIELDS, ClcBase, check_version
from smcproto.clc_v2 import AcceptExtension, ConfirmExtension
from smcproto.constants import (
    ACCEPT_V2_BYTES,
    CLC_MAX_BYTES,
    CLC_TRAILER_BYTES,
    CONFIRM_V2_FIRST_CONTACT_BYTES,
    EYECATCHER_SMCR,
    GID_BYTES,
    MAC_BYTES,
    PEER_ID_BYTES,
    ClcType,
    Mtu,
    PathType,
)
from smcproto.errors import DecodeError, EncodeError
from smcproto.layout import (
    Bit,
    Layout,
    bits,
    constant,
    member_or_int,
    raw,
    reserved,
    uint,
)

_ACCEPT: Final = Layout(
    "SMC Accept or Confirm",
    constant("eyecatcher", EYECATCHER_SMCR),
    *HEADER_FIELDS,
    bits(Bit("version", 0xF0), Bit("first_contact", 0x08, bool), Bit("typev1", 0x03)),
    raw("peer_id", PEER_ID_BYTES),
    raw("gid", GID_BYTES),
    raw("mac", MAC_BYTES),
    uint("qp_number", 3),
    uint("rkey", 4),
    uint("rmbe_index", 1),
    uint("alert_token", 4),
    bits(Bit("rmbe_size_code", 0xF0), Bit("mtu_code", 0x0F, member_or_int(Mtu))),
    reserved(1),
    uint("virtual_address", 8),
    reserved(1),
    uint("psn", 3),
)


@dataclass(frozen=True, slots=True)
class _Contact(ClcBase):
    """What Accept and Confirm have in common. RFC 7609 A.2.3 and A.2.4."""

    version: int
    """1 or 2: the version that all that follows has."""
    first_contact: bool
    """A new link group begins. Linux sets it in the Confirm too, the RFC does not."""
    peer_id: bytes
    """8 bytes."""
    gid: bytes
    """GID of the sender's port of this link, 16 bytes."""
    mac: bytes
    """MAC of that port, 6 bytes."""
    qp_number: int
    """Sender's queue pair, 24 bits."""
    rkey: int
    """Key of the sender's RMB on this link, 32 bits."""
    rmbe_index: int
    """Element of that RMB, counted from 1; 8 bits."""
    alert_token: int
    """What the peer has to put into CDC messages to the sender, 32 bits."""
    rmbe_size_code: int
    """Size of the element, 16 KiB << code; 4 bits."""
    mtu_code: int
    """An ``Mtu``, or a reserved 4-bit number (then Decline, not an error)."""
    virtual_address: int
    """Start of the RMB (not of the element), 64 bits."""
    psn: int
    """First packet sequence number of the sender, 24 bits."""

    def _build(self, v2: bytes) -> bytes:
        """Give the bytes, with those of the version 2 part."""
        check_version(self.version, 2)
        if not self.rmbe_index:
            raise EncodeError(_INDEX_PROBLEM, field="rmbe_index", offset=45)
        if (self.version == 2) != bool(v2):
            msg = (
                f"version {self.version} {'with' if v2 else 'without'} the version 2 "
                "part"
            )
            raise EncodeError(
                msg,
                field="v2",
            )
        length = _ACCEPT.size + len(v2) + CLC_TRAILER_BYTES
        fixed = _ACCEPT.build_from(
            self, type=self.TYPE, length=length, typev1=PathType.SMCR
        )
        return fixed + v2 + EYECATCHER_SMCR

    def _describe(self, v2: object) -> str:
        contact = " first-contact" if self.first_contact else ""
        tail = "" if v2 is None else f" {v2}"
        return (
            f"{self.TYPE.name.capitalize()} version={self.version}{contact} "
            f"peer_id={self.peer_id.hex()} gid={self.gid.hex()} "
            f"mac={self.mac.hex(':')} qp={self.qp_number:#x} rkey={self.rkey:#x} "
            f"index={self.rmbe_index} token={self.alert_token:#x} "
            f"size_code={self.rmbe_size_code} mtu={int(self.mtu_code)} "
            f"va={self.virtual_address:#x} psn={self.psn:#x}{tail}"
        )


_INDEX_PROBLEM: Final = "RMBE index 0: indexes count from 1"


def read_fixed_part(data: bytes, layout: Layout, path: PathType) -> dict[str, Any]:
    """Read the fixed part of an Accept or Confirm, also of SMC-D.

    Raises:
        DecodeError: The path code contradicts the eye catcher.
    """
    values = layout.parse(data)
    del values["type"], values["length"]
    found = values.pop("typev1")
    if found != path:
        msg = f"path {PathType(found).name} under the eye catcher of {path.name}"
        raise DecodeError(
            msg,
            field="typev1",
            offset=7,
        )
    return values


@dataclass(frozen=True, slots=True)
class Accept(_Contact):
    """The server's answer: a link and a place to write to. RFC 7609 A.2.3."""

    v2: AcceptExtension | None = None
    """The version 2 part; None if and only if the version is 1."""

    TYPE: ClassVar[ClcType] = ClcType.ACCEPT

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Read a message whose frame has been checked.

        Raises:
            DecodeError: A part is not what it must be.
        """
        values = read_fixed_part(data, _ACCEPT, PathType.SMCR)
        _check_index(values["rmbe_index"])
        if values["version"] == 1:
            return cls(**values)
        has_part = len(data) != ACCEPT_V2_BYTES
        if has_part != values["first_contact"]:
            msg = (
                f"first contact flag {values['first_contact']:d} in an Accept of "
                f"{len(data)} bytes"
            )
            raise DecodeError(
                msg,
                field="first_contact",
                offset=7,
            )
        v2 = AcceptExtension.read(data, _ACCEPT.size, first_contact=has_part)
        return cls(**values, v2=v2)

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: Parts contradict each other, or a value does not fit.
        """
        if self.v2 is not None and self.first_contact == (
            self.v2.first_contact is None
        ):
            msg = "first contact flag and extension go together"
            raise EncodeError(msg, field="first_contact")
        return self._build(b"" if self.v2 is None else self.v2.build())

    def __str__(self) -> str:
        return self._describe(self.v2)


@dataclass(frozen=True, slots=True)
class Confirm(_Contact):
    """The client's answer to the Accept. RFC 7609 A.2.4.

    Whether it is first contact follows from the Accept: the flag may be missing.
    """

    v2: ConfirmExtension | None = None
    """The version 2 part; None if and only if the version is 1."""

    TYPE: ClassVar[ClcType] = ClcType.CONFIRM

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Read a message whose frame has been checked.

        Raises:
            DecodeError: A part is not what it must be.
        """
        values = read_fixed_part(data, _ACCEPT, PathType.SMCR)
        _check_index(values["rmbe_index"])
        if values["version"] == 1:
            return cls(**values)
        has_part = len(data) != ACCEPT_V2_BYTES
        if values["first_contact"] and not has_part:
            msg = f"first contact flag in a Confirm of {len(data)} bytes"
            raise DecodeError(
                msg,
                field="first_contact",
                offset=7,
            )
        v2 = ConfirmExtension.read(data, _ACCEPT.size, first_contact=has_part)
        return cls(**values, v2=v2)

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: Parts contradict each other, or a value does not fit.
        """
        if self.v2 is not None:
            if self.first_contact and self.v2.first_contact is None:
                msg = "first contact flag without the extension"
                raise EncodeError(msg, field="first_contact")
            if len(self.v2.gids) > _CONFIRM_GIDS_MAX:
                msg = f"{len(self.v2.gids)} GIDs, at most {_CONFIRM_GIDS_MAX}"
                raise EncodeError(
                    msg,
                    field="v2.gids",
                )
        return self._build(b"" if self.v2 is None else self.v2.build())

    def __str__(self) -> str:
        return self._describe(self.v2)


_CONFIRM_GIDS_MAX: Final = (CLC_MAX_BYTES - CONFIRM_V2_FIRST_CONTACT_BYTES) // GID_BYTES


def _check_index(index: int) -> None:
    """Refuse element 0, which would lie before the RMB."""
    if index == 0:
        raise DecodeError(_INDEX_PROBLEM, field="rmbe_index", offset=45)
