"""CLC Accept and Confirm of SMC-D, so that they can be named and refused.

Decides their bytes. Nothing here speaks SMC-D: a peer that answers so gets a Decline.

Source: Linux net/smc/smc_clc.h; RFC 7609 A.2 for the frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Self

from smcproto.clc_contact import read_fixed_part
from smcproto.clc_header import HEADER_FIELDS, ClcBase, check_version
from smcproto.clc_v2 import SmcdAcceptExtension
from smcproto.constants import CLC_TRAILER_BYTES, EYECATCHER_SMCD, ClcType, PathType
from smcproto.errors import EncodeError
from smcproto.layout import Bit, Layout, bits, constant, reserved, uint

_SMCD_ACCEPT: Final = Layout(
    "SMC-D Accept or Confirm",
    constant("eyecatcher", EYECATCHER_SMCD),
    *HEADER_FIELDS,
    bits(Bit("version", 0xF0), Bit("first_contact", 0x08, bool), Bit("typev1", 0x03)),
    uint("gid", 8),
    uint("token", 8),
    uint("dmbe_index", 1),
    bits(Bit("dmbe_size_code", 0xF0)),
    reserved(2),
    uint("link_id", 4),
)


@dataclass(frozen=True, slots=True)
class _SmcdContact(ClcBase):
    """What SMC-D Accept and Confirm have in common. Kernel: smc_clc.h."""

    version: int
    """1 or 2."""
    first_contact: bool
    """A new link group begins."""
    gid: int
    """GID of the sender's ISM device, 64 bits."""
    token: int
    """Token of the direct memory buffer, 64 bits."""
    dmbe_index: int
    """Element of that buffer, 8 bits."""
    dmbe_size_code: int
    """Size of the element, 16 KiB << code; 4 bits."""
    link_id: int
    """Sender's link identifier, 32 bits."""
    v2: SmcdAcceptExtension | None = None
    """The version 2 part; None if and only if the version is 1."""

    SMCD: ClassVar[bool] = True

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Read a message whose frame has been checked.

        Raises:
            DecodeError: A part is not what it must be.
        """
        values = read_fixed_part(data, _SMCD_ACCEPT, PathType.SMCD)
        if values["version"] == 2:
            values["v2"] = SmcdAcceptExtension.read(data, _SMCD_ACCEPT.size)
        return cls(**values)

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: Parts contradict each other, or a value does not fit.
        """
        check_version(self.version, 2)
        if (self.version == 2) != (self.v2 is not None):
            msg = f"version {self.version} and the version 2 part do not agree"
            raise EncodeError(
                msg,
                field="v2",
            )
        # Version 1 has 12 reserved bytes where version 2 goes on.
        tail = bytes(12) if self.v2 is None else self.v2.build()
        length = _SMCD_ACCEPT.size + len(tail) + CLC_TRAILER_BYTES
        fixed = _SMCD_ACCEPT.build_from(
            self, type=self.TYPE, length=length, typev1=PathType.SMCD
        )
        return fixed + tail + EYECATCHER_SMCD

    def __str__(self) -> str:
        contact = " first-contact" if self.first_contact else ""
        return (
            f"SMC-D {self.TYPE.name.capitalize()} version={self.version}{contact} "
            f"gid={self.gid:#x} token={self.token:#x} index={self.dmbe_index} "
            f"size_code={self.dmbe_size_code} link_id={self.link_id:#x}"
        )


@dataclass(frozen=True, slots=True)
class SmcdAccept(_SmcdContact):
    """An Accept for SMC-D: readable, so that it can be named and refused."""

    TYPE: ClassVar[ClcType] = ClcType.ACCEPT


@dataclass(frozen=True, slots=True)
class SmcdConfirm(_SmcdContact):
    """A Confirm for SMC-D: readable, so that it can be named and refused."""

    TYPE: ClassVar[ClcType] = ClcType.CONFIRM
