"""CLC messages: the offers and answers that two ends exchange on the TCP connection.

Decides the bytes of Proposal, Accept, Confirm and Decline, and refuses whatever is
not exactly such a message: every count and offset is checked against the bytes that
were received before it is followed. Does not know what a message means for a
connection, and reads no stream: a reader takes 8 bytes, calls ``parse_header``, and
then takes exactly the rest, because the byte behind a Decline is application data.

Source: RFC 7609 A.2; for version 2 Linux net/smc/smc_clc.h (``clc_v2`` has the
parts that it adds). A Proposal with version nibble 3 or more is read like version 2,
as Linux does: the answer says which version is meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

from smcproto.clc_v2 import (
    AcceptExtension,
    ConfirmExtension,
    ProposalExtension,
    SmcdAcceptExtension,
)
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
    IPV6_PREFIXES_MAX,
    MAC_BYTES,
    PEER_ID_BYTES,
    PROPOSAL_MAX_BYTES,
    PROPOSAL_MIN_BYTES,
    SMCD_ACCEPT_V1_BYTES,
    SMCD_ACCEPT_V2_BYTES,
    SMCD_ACCEPT_V2_RELEASE_0_BYTES,
    SMCD_ACCEPT_V2_RELEASE_1_BYTES,
    ClcType,
    Mtu,
    OsType,
    PathType,
)
from smcproto.diagnosis import PeerDiagnosis, describe
from smcproto.errors import DecodeError, EncodeError
from smcproto.layout import (
    Bit,
    Buffer,
    Layout,
    Rows,
    bits,
    code,
    constant,
    member_or_int,
    raw,
    reserved,
    uint,
    words,
)

_HEADER_FIELDS: Final = (uint("type", 1), uint("length", 2))

_PROPOSAL: Final = Layout(
    "SMC Proposal",
    constant("eyecatcher", EYECATCHER_SMCR),
    *_HEADER_FIELDS,
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

_ACCEPT: Final = Layout(
    "SMC Accept or Confirm",
    constant("eyecatcher", EYECATCHER_SMCR),
    *_HEADER_FIELDS,
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
_SMCD_ACCEPT: Final = Layout(
    "SMC-D Accept or Confirm",
    constant("eyecatcher", EYECATCHER_SMCD),
    *_HEADER_FIELDS,
    bits(Bit("version", 0xF0), Bit("first_contact", 0x08, bool), Bit("typev1", 0x03)),
    uint("gid", 8),
    uint("token", 8),
    uint("dmbe_index", 1),
    bits(Bit("dmbe_size_code", 0xF0)),
    reserved(2),
    uint("link_id", 4),
)

_DECLINE_FIELDS: Final = (
    constant("eyecatcher", EYECATCHER_SMCR),
    *_HEADER_FIELDS,
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

_M = TypeVar("_M")


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

    After this call, read exactly ``length - 8`` more bytes and call ``parse`` with
    all of them.

    Args:
        data: At least 8 bytes; more are not looked at.

    Raises:
        DecodeError: No message can begin so; the connection cannot go on.

    Reference: RFC 7609 A.2; lengths of version 2: Linux smc_clc.h.
    """
    head = bytes(data[:CLC_HEADER_BYTES])
    if len(head) < CLC_HEADER_BYTES:
        raise DecodeError(
            f"{len(head)} bytes where a header has {CLC_HEADER_BYTES}",
            field="length",
            offset=len(head),
        )
    smcd = head[:4] == EYECATCHER_SMCD
    if not smcd and head[:4] != EYECATCHER_SMCR:
        raise DecodeError(
            f"bytes {head[:4].hex()} are no eye catcher", field="eyecatcher", offset=0
        )
    if not ClcType.PROPOSAL <= head[4] <= ClcType.DECLINE:
        raise DecodeError(f"CLC type {head[4]} is unknown", field="type", offset=4)
    kind = ClcType(head[4])
    length = int.from_bytes(head[5:7], "big")
    version = head[7] >> 4
    contact = kind in (ClcType.ACCEPT, ClcType.CONFIRM)
    if version == 0 or (contact and version > 2):
        raise DecodeError(
            f"{kind.name} of version {version}", field="version", offset=7
        )
    if smcd and not contact:
        raise DecodeError(
            f"{kind.name} with the eye catcher of SMC-D", field="eyecatcher", offset=0
        )
    if not _is_possible_length(kind, length, version, smcd=smcd):
        raise DecodeError(
            f"{kind.name} of version {version} cannot have {length} bytes",
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


@dataclass(frozen=True, slots=True)
class Ipv6Prefix:
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
            raise DecodeError(
                f"IP area at {start} does not fit before {end}",
                field="iparea_offset",
                offset=38,
            )
        values = _IP_AREA.parse(data, start)
        count = values.pop("ipv6_prefix_count")
        prefixes_start = start + _IP_AREA.size
        prefixes_end = prefixes_start + count * _IPV6_PREFIXES.size
        if count > IPV6_PREFIXES_MAX or prefixes_end > end:
            raise DecodeError(
                f"{count} IPv6 prefixes: at most {IPV6_PREFIXES_MAX}, and they must "
                "fit in",
                field="ip_area.ipv6_prefix_count",
                offset=start + 7,
            )
        prefixes = tuple(
            Ipv6Prefix(*row)
            for row in _IPV6_PREFIXES.parse(data, prefixes_start, count)
        )
        return cls(ipv6_prefixes=prefixes, **values), prefixes_end

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: There are more than 8 prefixes, or a value does not fit.
        """
        if len(self.ipv6_prefixes) > IPV6_PREFIXES_MAX:
            raise EncodeError(
                f"{len(self.ipv6_prefixes)} prefixes, at most {IPV6_PREFIXES_MAX}",
                field="ip_area.ipv6_prefixes",
            )
        head = _IP_AREA.build(
            {
                "subnet": self.subnet,
                "prefix_length": self.prefix_length,
                "ipv6_prefix_count": len(self.ipv6_prefixes),
            }
        )
        rows = ((prefix.prefix, prefix.length) for prefix in self.ipv6_prefixes)
        return head + _IPV6_PREFIXES.build(rows)

    def __str__(self) -> str:
        parts = []
        if any(self.subnet) or not self.ipv6_prefixes:
            subnet = ".".join(str(byte) for byte in self.subnet)
            parts.append(f"{subnet}/{self.prefix_length}")
        parts += [f"{p.prefix.hex(':', 2)}/{p.length}" for p in self.ipv6_prefixes]
        return ",".join(parts)


@dataclass(frozen=True, slots=True)
class Proposal:
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
    def parse(cls, data: Buffer) -> Proposal:
        """Read a Proposal; ``data`` is the whole message and no more.

        Raises:
            DecodeError: It is not one.
        """
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes) -> Proposal:
        values = _PROPOSAL.parse(data)
        _drop_header(values)
        offset = values.pop("iparea_offset")
        if values["version"] == 1:
            values["typev2"] = PathType.NONE  # Reserved bits in RFC 7609 A.2.2.
        problem = _offset_problem(offset, **_paths(values))
        if problem:
            raise DecodeError(problem, field="iparea_offset", offset=38)
        has_growth = values["typev1"] is PathType.NONE or offset == _GROWTH.size
        end = len(data) - CLC_TRAILER_BYTES
        position = _PROPOSAL.size + (_GROWTH.size if has_growth else offset)
        if position > end:
            raise DecodeError(
                f"growth area ends at {position}, the message at {end}",
                field="iparea_offset",
                offset=38,
            )
        growth = _GROWTH.parse(data, _PROPOSAL.size) if has_growth else {}
        ext_offset = growth.pop("v2_ext_offset", 0)
        ip_area = None
        if values["typev1"] is not PathType.NONE:
            ip_area, position = IpArea.read(data, position)
        v2 = None
        if values["typev2"] is not PathType.NONE and ext_offset:
            start = _V2_EXT_OFFSET_BASE + ext_offset
            if start != position:
                raise DecodeError(
                    f"version 2 extension at {start} instead of {position}, behind "
                    "the other parts",
                    field="v2_ext_offset",
                    offset=50,
                )
            v2 = ProposalExtension.read(
                data, start, smcd_offered=values["typev2"].offers_smcd
            )
        elif position != end:
            raise DecodeError(
                f"parts end at {position}, the message at {end}",
                field="length",
                offset=5,
            )
        if offset == _usual_offset(**_paths(values)):
            offset = None
        return cls(**values, **growth, ip_area=ip_area, v2=v2, iparea_offset=offset)

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: Parts contradict each other, or a value does not fit.
        """
        paths = {
            "version": self.version,
            "typev1": self.typev1,
            "typev2": self.typev2,
        }
        offset = self.iparea_offset
        if offset is None:
            offset = _usual_offset(**paths)
        problem = _offset_problem(offset, **paths)
        if problem:
            raise EncodeError(problem, field="iparea_offset", offset=38)
        self._check_parts(offset)
        ip_area = b"" if self.ip_area is None else self.ip_area.build()
        v2 = b"" if self.v2 is None else self.v2.build()
        growth = self._build_growth(offset, len(ip_area))
        length = _PROPOSAL.size + len(growth) + len(ip_area) + len(v2)
        fixed = _PROPOSAL.build(
            {
                "type": self.TYPE,
                "length": length + CLC_TRAILER_BYTES,
                "version": self.version,
                # Reserved bits in version 1.
                "typev2": self.typev2 if self.version > 1 else 0,
                "typev1": self.typev1,
                "peer_id": self.peer_id,
                "gid": self.gid,
                "mac": self.mac,
                "iparea_offset": offset,
            }
        )
        return fixed + growth + ip_area + v2 + EYECATCHER_SMCR

    def _build_growth(self, offset: int, ip_area_bytes: int) -> bytes:
        """Give the bytes between the fixed part and the IP area."""
        if self.typev1 is not PathType.NONE and offset < _GROWTH.size:
            return bytes(offset)
        v2_start = _PROPOSAL.size + _GROWTH.size + ip_area_bytes
        return _GROWTH.build(
            {
                "ism_gid": self.ism_gid,
                "ism_chid": self.ism_chid,
                "v2_ext_offset": (
                    0 if self.v2 is None else v2_start - _V2_EXT_OFFSET_BASE
                ),
                "vendor_oui": self.vendor_oui,
                "vendor_options": self.vendor_options,
            }
        )

    def _check_parts(self, offset: int) -> None:
        """Refuse parts that contradict the header."""
        if (self.ip_area is None) != (self.typev1 is PathType.NONE):
            raise EncodeError(
                f"typev1 {self.typev1.name} with "
                f"{'no' if self.ip_area is None else 'an'} IP area",
                field="ip_area",
            )
        if self.v2 is not None:
            if self.typev2 is PathType.NONE:
                raise EncodeError("typev2 NONE with an extension", field="v2")
            if self.v2.smcd is not None and not self.typev2.offers_smcd:
                raise EncodeError(
                    f"typev2 {self.typev2.name} with an SMC-Dv2 part", field="v2.smcd"
                )
        growth = self.ism_gid or self.ism_chid or any(self.vendor_oui)
        if (
            (growth or any(self.vendor_options))
            and self.typev1 is not PathType.NONE
            and offset < _GROWTH.size
        ):
            raise EncodeError(
                f"iparea_offset {offset} leaves no room for ISM and vendor fields",
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


def _paths(values: dict[str, Any]) -> dict[str, Any]:
    """Take what the rules about offsets depend on."""
    return {name: values[name] for name in ("version", "typev1", "typev2")}


def _usual_offset(version: int, typev1: PathType, typev2: PathType) -> int:
    """Give the iparea_offset that Linux, or for version 1 the RFC, would send."""
    if typev1 is PathType.NONE or (version == 1 and not typev1.offers_smcd):
        return 0
    return _GROWTH.size


def _offset_problem(
    offset: int, *, version: int, typev1: PathType, typev2: PathType
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


@dataclass(frozen=True, slots=True)
class _Contact:
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

    TYPE: ClassVar[ClcType]

    def _build(self, v2: bytes) -> bytes:
        """Give the bytes, with those of the version 2 part."""
        if not self.rmbe_index:
            raise EncodeError(_INDEX_PROBLEM, field="rmbe_index", offset=45)
        if (self.version == 2) != bool(v2):
            raise EncodeError(
                f"version {self.version} {'with' if v2 else 'without'} the version 2 "
                "part",
                field="v2",
            )
        values = {
            name: getattr(self, name)
            for name in _ACCEPT.names - {"type", "length", "typev1"}
        }
        length = _ACCEPT.size + len(v2) + CLC_TRAILER_BYTES
        fixed = _ACCEPT.build(
            {"type": self.TYPE, "length": length, "typev1": PathType.SMCR, **values}
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


def _read_contact(data: bytes, layout: Layout, path: PathType) -> dict[str, Any]:
    """Read the fixed part of an Accept or Confirm."""
    values = layout.parse(data)
    _drop_header(values)
    found = values.pop("typev1")
    if found != path:
        raise DecodeError(
            f"path {PathType(found).name} under the eye catcher of {path.name}",
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
    def parse(cls, data: Buffer) -> Accept:
        """Read an Accept; ``data`` is the whole message and no more.

        Raises:
            DecodeError: It is not one.
        """
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes) -> Accept:
        values = _read_contact(data, _ACCEPT, PathType.SMCR)
        _check_index(values["rmbe_index"])
        if values["version"] == 1:
            return cls(**values)
        has_part = len(data) != ACCEPT_V2_BYTES
        if has_part != values["first_contact"]:
            raise DecodeError(
                f"first contact flag {values['first_contact']:d} in an Accept of "
                f"{len(data)} bytes",
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
            raise EncodeError(
                "first contact flag and extension go together", field="first_contact"
            )
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
    def parse(cls, data: Buffer) -> Confirm:
        """Read a Confirm; ``data`` is the whole message and no more.

        Raises:
            DecodeError: It is not one.
        """
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes) -> Confirm:
        values = _read_contact(data, _ACCEPT, PathType.SMCR)
        _check_index(values["rmbe_index"])
        if values["version"] == 1:
            return cls(**values)
        has_part = len(data) != ACCEPT_V2_BYTES
        if values["first_contact"] and not has_part:
            raise DecodeError(
                f"first contact flag in a Confirm of {len(data)} bytes",
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
                raise EncodeError(
                    "first contact flag without the extension", field="first_contact"
                )
            if len(self.v2.gids) > _CONFIRM_GIDS_MAX:
                raise EncodeError(
                    f"{len(self.v2.gids)} GIDs, at most {_CONFIRM_GIDS_MAX}",
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


@dataclass(frozen=True, slots=True)
class _SmcdContact:
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

    TYPE: ClassVar[ClcType]

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: Parts contradict each other, or a value does not fit.
        """
        if (self.version == 2) != (self.v2 is not None):
            raise EncodeError(
                f"version {self.version} and the version 2 part do not agree",
                field="v2",
            )
        # Version 1 has 12 reserved bytes where version 2 goes on.
        tail = bytes(12) if self.v2 is None else self.v2.build()
        values = {
            name: getattr(self, name)
            for name in _SMCD_ACCEPT.names - {"type", "length", "typev1"}
        }
        length = _SMCD_ACCEPT.size + len(tail) + CLC_TRAILER_BYTES
        fixed = _SMCD_ACCEPT.build(
            {"type": self.TYPE, "length": length, "typev1": PathType.SMCD, **values}
        )
        return fixed + tail + EYECATCHER_SMCD

    def __str__(self) -> str:
        contact = " first-contact" if self.first_contact else ""
        return (
            f"SMC-D {self.TYPE.name.capitalize()} version={self.version}{contact} "
            f"gid={self.gid:#x} token={self.token:#x} index={self.dmbe_index} "
            f"size_code={self.dmbe_size_code} link_id={self.link_id:#x}"
        )


def _read_smcd_contact(data: bytes) -> dict[str, Any]:
    """Read an SMC-D Accept or Confirm."""
    values = _read_contact(data, _SMCD_ACCEPT, PathType.SMCD)
    if values["version"] == 2:
        values["v2"] = SmcdAcceptExtension.read(data, _SMCD_ACCEPT.size)
    return values


@dataclass(frozen=True, slots=True)
class SmcdAccept(_SmcdContact):
    """An Accept for SMC-D: readable, so that it can be named and refused."""

    TYPE: ClassVar[ClcType] = ClcType.ACCEPT

    @classmethod
    def parse(cls, data: Buffer) -> SmcdAccept:
        """Read an SMC-D Accept; ``data`` is the whole message and no more.

        Raises:
            DecodeError: It is not one.
        """
        return _only(cls, parse(data))


@dataclass(frozen=True, slots=True)
class SmcdConfirm(_SmcdContact):
    """A Confirm for SMC-D: readable, so that it can be named and refused."""

    TYPE: ClassVar[ClcType] = ClcType.CONFIRM

    @classmethod
    def parse(cls, data: Buffer) -> SmcdConfirm:
        """Read an SMC-D Confirm; ``data`` is the whole message and no more.

        Raises:
            DecodeError: It is not one.
        """
        return _only(cls, parse(data))


@dataclass(frozen=True, slots=True)
class Decline:
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
    def parse(cls, data: Buffer) -> Decline:
        """Read a Decline; ``data`` is the whole message and no more.

        Raises:
            DecodeError: It is not one.
        """
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes) -> Decline:
        layout = _DECLINE_V1 if len(data) == DECLINE_V1_BYTES else _DECLINE_V2
        values = layout.parse(data)
        _drop_header(values)
        return cls(**values)

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: Version 1 has no place for a value, or it does not fit.
        """
        values: dict[str, Any] = {
            "type": self.TYPE,
            "version": self.version,
            "out_of_sync": self.out_of_sync,
            "peer_id": self.peer_id,
            "diagnosis": self.diagnosis,
        }
        if self.version > 1:
            values["length"] = DECLINE_V2_BYTES
            values["os_type"] = self.os_type
            values["extra"] = self.extra
            return _DECLINE_V2.build(values) + EYECATCHER_SMCR
        if self.version < 1:
            raise EncodeError(f"version {self.version}", field="version", offset=7)
        if self.os_type or any(self.extra):
            raise EncodeError(
                "a version 1 Decline has no OS type and no extra codes", field="extra"
            )
        values["length"] = DECLINE_V1_BYTES
        return _DECLINE_V1.build(values) + EYECATCHER_SMCR

    def __str__(self) -> str:
        sync = " out-of-sync" if self.out_of_sync else ""
        return (
            f"Decline version={self.version}{sync} peer_id={self.peer_id.hex()} "
            f"diagnosis={self.diagnosis:08x} {describe(self.diagnosis).name}"
        )


ClcMessage: TypeAlias = Proposal | Accept | Confirm | SmcdAccept | SmcdConfirm | Decline
"""Any CLC message."""


def parse(data: Buffer) -> ClcMessage:
    """Read any CLC message.

    Args:
        data: The whole message, exactly as long as its header says.

    Raises:
        DecodeError: It is none; field and offset say why.

    Reference: RFC 7609 A.2.
    """
    header = parse_header(data)
    if len(data) != header.length:
        raise DecodeError(
            f"{len(data)} bytes received, the header says {header.length}",
            field="length",
            offset=5,
        )
    message = bytes(data)
    trailer = message[-CLC_TRAILER_BYTES:]
    if trailer != message[:CLC_TRAILER_BYTES]:
        raise DecodeError(
            f"bytes {trailer.hex()} instead of the eye catcher at the end",
            field="trailer",
            offset=header.length - CLC_TRAILER_BYTES,
        )
    match header.type:
        case ClcType.PROPOSAL:
            return Proposal._read(message)
        case ClcType.DECLINE:
            return Decline._read(message)
        case ClcType.ACCEPT:
            if header.smcd:
                return SmcdAccept(**_read_smcd_contact(message))
            return Accept._read(message)
        case ClcType.CONFIRM:
            if header.smcd:
                return SmcdConfirm(**_read_smcd_contact(message))
            return Confirm._read(message)


def _drop_header(values: dict[str, Any]) -> None:
    """Take out what ``parse_header`` has already checked."""
    del values["type"], values["length"]


def _only(kind: type[_M], message: ClcMessage) -> _M:
    """Refuse another message than the one asked for."""
    if not isinstance(message, kind):
        raise DecodeError(
            f"{type(message).__name__} where {kind.__name__} was expected",
            field="type",
            offset=4,
        )
    return message
