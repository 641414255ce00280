"""The CLC Proposal: what the client offers.

Decides the bytes of the Proposal, and refuses one whose counts and offsets do not
lead exactly through the bytes that were received: the parts follow one another in
the order of the wire, none overlaps another, none is left out. Does not know what a
server makes of an offer.

Source: RFC 7609 A.2.2; the growth area and version 2: Linux net/smc/smc_clc.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, Self

from smcproto.clc_header import HEADER_FIELDS, ClcBase, check_version
from smcproto.clc_v2 import ProposalExtension
from smcproto.constants import (
    CLC_TRAILER_BYTES,
    EYECATCHER_SMCR,
    GID_BYTES,
    IPV6_PREFIXES_MAX,
    MAC_BYTES,
    PEER_ID_BYTES,
    ClcType,
    PathType,
)
from smcproto.errors import DecodeError, EncodeError
from smcproto.layout import Bit, Layout, Rows, bits, constant, raw, reserved, uint

_PROPOSAL: Final = Layout(
    "SMC Proposal",
    constant("eyecatcher", EYECATCHER_SMCR),
    *HEADER_FIELDS,
    bits(
        Bit("version", 0xF0),
        Bit("typev2", 0x0C, PathType),
        Bit("typev1", 0x03, PathType),
    ),
    raw("peer_id", PEER_ID_BYTES),
    raw("gid", GID_BYTES),
    raw("mac", MAC_BYTES),
    uint("iparea_offset", 2),
)
_GROWTH: Final = Layout(
    "SMC Proposal growth area",
    uint("ism_gid", 8),
    uint("ism_chid", 2),
    uint("v2_ext_offset", 2),
    raw("vendor_oui", 3),
    raw("vendor_options", 5),
    reserved(20),
    start=40,
)
_V2_EXT_OFFSET_BASE: Final = 52  # The offset counts from its field's end.
_IP_AREA: Final = Layout(
    "SMC Proposal IP area",
    raw("subnet", 4),
    uint("prefix_length", 1),
    reserved(2),
    uint("ipv6_prefix_count", 1),
)
_IPV6_PREFIXES: Final = Rows("ip_area.ipv6_prefixes", "16sB")


class Ipv6Prefix(NamedTuple):
    """One IPv6 prefix of the client's network. RFC 7609 figure 27."""

    prefix: bytes
    """16 bytes."""
    length: int
    """Significant bits; 8 bits, not checked."""


@dataclass(frozen=True, slots=True)
class IpArea:
    """Where the client is, for the subnet check of version 1. RFC 7609 A.2.2."""

    subnet: bytes = bytes(4)
    """IPv4 subnet number, 4 bytes (the RFC says mask, Linux wants the number)."""
    prefix_length: int = 0
    """Significant bits of the subnet; 8 bits."""
    ipv6_prefixes: tuple[Ipv6Prefix, ...] = ()
    """For an IPv6 connection, up to 8; the IPv4 fields are then zero."""

    @classmethod
    def read(cls, data: bytes, start: int) -> tuple[IpArea, int]:
        """Read the area at an offset; give it and where it ends.

        Raises:
            DecodeError: It does not lie inside the message.
        """
        end = len(data) - CLC_TRAILER_BYTES
        if start + _IP_AREA.size > end:
            msg = f"IP area at {start} does not fit before {end}"
            raise DecodeError(
                msg,
                field="iparea_offset",
                offset=38,
            )
        values = _IP_AREA.parse(data, start)
        count = values.pop("ipv6_prefix_count")
        prefixes_start = start + _IP_AREA.size
        prefixes_end = prefixes_start + count * _IPV6_PREFIXES.size
        if count > IPV6_PREFIXES_MAX or prefixes_end > end:
            msg = (
                f"{count} IPv6 prefixes: at most {IPV6_PREFIXES_MAX}, and they must "
                "fit in"
            )
            raise DecodeError(
                msg,
                field="ip_area.ipv6_prefix_count",
                offset=start + 7,
            )
        rows = _IPV6_PREFIXES.parse(data, prefixes_start, count)
        prefixes = tuple(map(Ipv6Prefix._make, rows))
        return cls(ipv6_prefixes=prefixes, **values), prefixes_end

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: There are more than 8 prefixes, or a value does not fit.
        """
        if len(self.ipv6_prefixes) > IPV6_PREFIXES_MAX:
            msg = f"{len(self.ipv6_prefixes)} prefixes, at most {IPV6_PREFIXES_MAX}"
            raise EncodeError(
                msg,
                field="ip_area.ipv6_prefixes",
            )
        head = _IP_AREA.build_from(self, ipv6_prefix_count=len(self.ipv6_prefixes))
        return head + _IPV6_PREFIXES.build(self.ipv6_prefixes)

    def __str__(self) -> str:
        parts = []
        if any(self.subnet) or not self.ipv6_prefixes:
            subnet = ".".join(str(byte) for byte in self.subnet)
            parts.append(f"{subnet}/{self.prefix_length}")
        parts += [f"{p.prefix.hex(':', 2)}/{p.length}" for p in self.ipv6_prefixes]
        return ",".join(parts)


@dataclass(frozen=True, slots=True)
class Proposal(ClcBase):
    """The client's offer, the first CLC message. RFC 7609 A.2.2.

    A Linux client without a version 1 path leaves peer ID, GID and MAC zero.
    """

    version: int
    """Version nibble: 1, or 2 as every Linux sends. Higher ones are read as 2."""
    peer_id: bytes
    """8 bytes: instance number and a MAC; names the host, not the port."""
    gid: bytes
    """GID for version 1, 16 bytes."""
    mac: bytes
    """MAC of the port to be used, 6 bytes."""
    typev1: PathType
    """What is offered for version 1."""
    typev2: PathType
    """What is offered for version 2; NONE in a version 1 Proposal."""
    ip_area: IpArea | None
    """For the subnet check; None if and only if ``typev1`` is NONE."""
    ism_gid: int = 0
    """GID of the SMC-D device, 64 bits."""
    ism_chid: int = 0
    """Channel ID of that device, 16 bits."""
    v2: ProposalExtension | None = None
    """The version 2 extension."""
    iparea_offset: int | None = None
    """Bytes between the fixed part and the IP area; None is what Linux sends."""
    vendor_oui: bytes = bytes(3)
    """3 bytes; Linux sends zeros."""
    vendor_options: bytes = bytes(5)
    """5 bytes; Linux sends zeros."""

    TYPE: ClassVar[ClcType] = ClcType.PROPOSAL

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Read a Proposal whose frame has been checked.

        Raises:
            DecodeError: The parts do not lead exactly through the message.
        """
        values = _PROPOSAL.parse(data)
        del values["type"], values["length"]
        version, typev1 = values["version"], values["typev1"]
        if version == 1:
            values["typev2"] = PathType.NONE  # Reserved bits in RFC 7609 A.2.2.
        typev2 = values["typev2"]
        offset = values.pop("iparea_offset")
        end = len(data) - CLC_TRAILER_BYTES
        problem = _offset_problem(offset, version, typev1, typev2)
        has_growth = typev1 is PathType.NONE or offset == _GROWTH.size
        position = _PROPOSAL.size + (_GROWTH.size if has_growth else offset)
        if position > end and not problem:
            problem = f"growth area ends at {position}, the message at {end}"
        if problem:
            raise DecodeError(problem, field="iparea_offset", offset=38)
        growth = _GROWTH.parse(data, _PROPOSAL.size) if has_growth else {}
        ext_offset = growth.pop("v2_ext_offset", 0)
        ip_area = None
        if typev1 is not PathType.NONE:
            ip_area, position = IpArea.read(data, position)
        v2 = None
        if typev2 is not PathType.NONE and ext_offset:
            start = _V2_EXT_OFFSET_BASE + ext_offset
            if start != position:
                msg = (
                    f"version 2 extension at {start} instead of {position}, behind "
                    "the other parts"
                )
                raise DecodeError(
                    msg,
                    field="v2_ext_offset",
                    offset=50,
                )
            v2 = ProposalExtension.read(data, start, smcd_offered=typev2.offers_smcd)
        elif position != end:
            msg = f"parts end at {position}, the message at {end}"
            raise DecodeError(
                msg,
                field="length",
                offset=5,
            )
        if offset == _usual_offset(version, typev1):
            offset = None
        return cls(**values, **growth, ip_area=ip_area, v2=v2, iparea_offset=offset)

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: Parts contradict each other, or a value does not fit.
        """
        check_version(self.version, 15)
        offset = self.iparea_offset
        if offset is None:
            offset = _usual_offset(self.version, self.typev1)
        problem = _offset_problem(offset, self.version, self.typev1, self.typev2)
        if problem:
            raise EncodeError(problem, field="iparea_offset", offset=38)
        self._check_parts(offset)
        ip_area = b"" if self.ip_area is None else self.ip_area.build()
        v2 = b"" if self.v2 is None else self.v2.build()
        growth = self._build_growth(offset, len(ip_area))
        length = _PROPOSAL.size + len(growth) + len(ip_area) + len(v2)
        fixed = _PROPOSAL.build_from(
            self,
            type=self.TYPE,
            length=length + CLC_TRAILER_BYTES,
            # Reserved bits in version 1.
            typev2=self.typev2 if self.version > 1 else 0,
            iparea_offset=offset,
        )
        return fixed + growth + ip_area + v2 + EYECATCHER_SMCR

    def _build_growth(self, offset: int, ip_area_bytes: int) -> bytes:
        """Give the bytes between the fixed part and the IP area."""
        if self.typev1 is not PathType.NONE and offset < _GROWTH.size:
            return bytes(offset)
        v2_start = _PROPOSAL.size + _GROWTH.size + ip_area_bytes
        v2_ext_offset = 0 if self.v2 is None else v2_start - _V2_EXT_OFFSET_BASE
        return _GROWTH.build_from(self, v2_ext_offset=v2_ext_offset)

    def _check_parts(self, offset: int) -> None:
        """Refuse parts that contradict the header."""
        if (self.ip_area is None) != (self.typev1 is PathType.NONE):
            msg = (
                f"typev1 {self.typev1.name} with "
                f"{'no' if self.ip_area is None else 'an'} IP area"
            )
            raise EncodeError(
                msg,
                field="ip_area",
            )
        if self.v2 is not None:
            if self.typev2 is PathType.NONE:
                msg = "typev2 NONE with an extension"
                raise EncodeError(msg, field="v2")
            if self.v2.smcd is not None and not self.typev2.offers_smcd:
                msg = f"typev2 {self.typev2.name} with an SMC-Dv2 part"
                raise EncodeError(msg, field="v2.smcd")
        growth = self.ism_gid or self.ism_chid or any(self.vendor_oui)
        if (
            (growth or any(self.vendor_options))
            and self.typev1 is not PathType.NONE
            and offset < _GROWTH.size
        ):
            msg = f"iparea_offset {offset} leaves no room for ISM and vendor fields"
            raise EncodeError(
                msg,
                field="iparea_offset",
            )

    def __str__(self) -> str:
        area = "" if self.ip_area is None else f" ip={self.ip_area}"
        v2 = "" if self.v2 is None else f" {self.v2}"
        return (
            f"Proposal version={self.version} v1={self.typev1.name} "
            f"v2={self.typev2.name} peer_id={self.peer_id.hex()} "
            f"gid={self.gid.hex()} mac={self.mac.hex(':')}{area}{v2}"
        )


def _usual_offset(version: int, typev1: PathType) -> int:
    """Give the iparea_offset that Linux, or for version 1 the RFC, would send."""
    if typev1 is PathType.NONE or (version == 1 and not typev1.offers_smcd):
        return 0
    return _GROWTH.size


def _offset_problem(
    offset: int, version: int, typev1: PathType, typev2: PathType
) -> str:
    """Say what is wrong with an iparea_offset; empty if nothing is.

    The fixed part ends at 40; the area between it and the IP area is unknown to the
    RFC and has 40 bytes in version 2. Without an IP area the offset means nothing,
    and Linux sends 0.
    """
    if version == 1 and (typev1 is PathType.NONE or typev2 is not PathType.NONE):
        return "a version 1 Proposal has a version 1 path and no other"
    if typev1 is PathType.NONE:
        if offset in (0, _GROWTH.size):
            return ""
        return f"iparea_offset {offset} without an IP area: 0 or {_GROWTH.size}"
    if typev2 is not PathType.NONE and offset != _GROWTH.size:
        return f"iparea_offset {offset} with version 2: {_GROWTH.size}"
    if not 0 <= offset <= _GROWTH.size:
        return f"iparea_offset {offset} is outside 0 to {_GROWTH.size}"
    return ""
