"""The parts that SMC version 2 adds to CLC messages, and EIDs.

Decides the bytes of the Proposal's version 2 extension, of what follows the fixed
part of a version 2 Accept or Confirm, and which texts are user EIDs. Does not know
the messages that these parts belong to (``clc`` has them) nor what a negotiation
makes of them.

Source: Linux net/smc/smc_clc.h; the RFC has version 1 only. Where a peer's mistake
is one that Linux tolerates (text in an EID, unknown codes) it is read as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from smcproto.constants import (
    CLC_TRAILER_BYTES,
    EID_BYTES,
    GID_BYTES,
    HOST_NAME_BYTES,
    ISM_GIDS_MAX,
    UEIDS_MAX,
    OsType,
)
from smcproto.errors import DecodeError, EncodeError
from smcproto.layout import (
    Bit,
    Layout,
    Rows,
    bits,
    decode_text,
    encode_text,
    member_or_int,
    raw,
    reserved,
    text,
    uint,
)

_ALPHANUMERIC: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_UEID_CHARACTERS: Final = _ALPHANUMERIC | frozenset(".-")

_EIDS: Final = Rows("v2.eids", f"{EID_BYTES}s")
_GIDS: Final = Rows("v2.gids", f"{GID_BYTES}s")
_ISM_GIDS: Final = Rows("v2.smcd.gids", "QH")

_PROPOSAL_EXTENSION: Final = Layout(
    "SMC Proposal version 2 extension",
    uint("eid_count", 1),
    uint("ism_gid_count", 1),
    reserved(1),
    bits(Bit("release", 0xF0), Bit("seid_offered", 0x01, bool)),
    reserved(2),
    uint("smcd_offset", 2),
    raw("gid", GID_BYTES),
    uint("max_connections", 1),
    uint("max_links", 1),
    uint("feature_mask", 2),
    reserved(12),
)
_SMCD_OFFSET_BASE: Final = 8  # The offset counts from the field's end.
_SEID_AND_RESERVED_BYTES: Final = EID_BYTES + 16

_FIRST_CONTACT_FIELDS: Final = (
    bits(Bit("direct", 0x80, bool)),
    bits(Bit("os_type", 0xF0, member_or_int(OsType)), Bit("release", 0x0F)),
    reserved(2),
    text("host_name", HOST_NAME_BYTES),
)
_FIRST_CONTACT: Final = Layout(
    "first contact extension",
    *_FIRST_CONTACT_FIELDS,
    uint("max_connections", 1),
    uint("max_links", 1),
    uint("feature_mask", 2),
    uint("vendor_options", 4),
    reserved(8),
)
_FIRST_CONTACT_SHORT: Final = Layout(
    "first contact extension of SMC-D release 0", *_FIRST_CONTACT_FIELDS
)

_ACCEPT_TAIL: Final = Layout(
    "version 2 part of Accept or Confirm", text("eid", EID_BYTES), reserved(8)
)
_SMCD_ACCEPT_TAIL: Final = Layout(
    "version 2 part of SMC-D Accept or Confirm",
    uint("chid", 2),
    text("eid", EID_BYTES),
    reserved(8),
)
_GID_LIST_HEAD: Final = Layout("GID list", uint("gid_count", 1), reserved(3))


def is_valid_eid(eid: str) -> bool:
    """Tell whether a text can be a user-defined EID (UEID).

    It has 1 to 32 characters out of A-Z, 0-9, dot and hyphen; the first is a letter
    or digit; no two dots stand side by side.

    Args:
        eid: Without the blanks that pad it on the wire.

    Reference: Linux net/smc/smc_clc.c; IBM's documentation of
    UEIDs adds the rule about dots.
    """
    return (
        1 <= len(eid) <= EID_BYTES
        and eid[0] in _ALPHANUMERIC
        and _UEID_CHARACTERS.issuperset(eid)
        and ".." not in eid
    )


class IsmGid(NamedTuple):
    """One SMC-D device that a Proposal offers."""

    gid: int
    """64 bits."""
    chid: int
    """Channel ID, 16 bits."""


@dataclass(frozen=True, slots=True)
class SmcdExtension:
    """The SMC-Dv2 part of a Proposal; readable, nothing here uses it."""

    seid: str
    """System EID, up to 32 characters."""
    gids: tuple[IsmGid, ...] = ()
    """Up to 8 devices."""

    def build(self) -> bytes:
        """Give the bytes: SEID, 16 reserved, 10 for each device."""
        return (
            encode_text(self.seid, EID_BYTES, "v2.smcd.seid")
            + bytes(16)
            + _ISM_GIDS.build(self.gids)
        )


@dataclass(frozen=True, slots=True)
class ProposalExtension:
    """What a version 2 Proposal says beside the version 1 part."""

    eids: tuple[str, ...]
    """UEIDs in the order of preference, up to 8, without padding."""
    release: int
    """0 for SMC-R 2.0, 1 for 2.1; 4 bits."""
    gid: bytes
    """RoCEv2 GID, 16 bytes; ``::ffff:a.b.c.d``."""
    max_connections: int = 0
    """For each link group; 8 bits, from release 1."""
    max_links: int = 0
    """For each link group; 8 bits, from release 1."""
    feature_mask: int = 0
    """16 bits, from release 1; bit 0 is emulated ISM."""
    seid_offered: bool = False
    """Whether the system EID may be used (SMC-D)."""
    smcd: SmcdExtension | None = None
    """The SMC-Dv2 part, if SMC-D is offered."""

    @classmethod
    def read(cls, data: bytes, start: int, *, smcd_offered: bool) -> ProposalExtension:
        """Read the extension out of a Proposal; it has to end at the trailer.

        Args:
            data: The whole Proposal.
            start: Offset of the extension, already found to lie behind the rest.
            smcd_offered: Whether the header offers SMC-Dv2; if not, its part is not
                even looked for.

        Raises:
            DecodeError: A count or an offset leads beyond the message.
        """
        end = len(data) - CLC_TRAILER_BYTES
        if start + _PROPOSAL_EXTENSION.size > end:
            msg = (
                f"version 2 extension of {_PROPOSAL_EXTENSION.size} bytes at {start} "
                f"does not fit before {end}"
            )
            raise DecodeError(
                msg,
                field="v2_ext_offset",
                offset=50,
            )
        values = _PROPOSAL_EXTENSION.parse(data, start)
        eid_count = values.pop("eid_count")
        ism_gid_count = values.pop("ism_gid_count")
        smcd_offset = values.pop("smcd_offset")
        eids_start = start + _PROPOSAL_EXTENSION.size
        eids_end = eids_start + EID_BYTES * eid_count
        if eid_count > UEIDS_MAX or eids_end > end:
            msg = f"{eid_count} UEIDs: at most {UEIDS_MAX}, and they must fit in"
            raise DecodeError(
                msg,
                field="v2.eid_count",
                offset=start,
            )
        smcd = None
        parts_end = eids_end
        if smcd_offered and smcd_offset:
            if start + _SMCD_OFFSET_BASE + smcd_offset != eids_end:
                msg = (
                    f"SMC-Dv2 part at {start + _SMCD_OFFSET_BASE + smcd_offset} "
                    f"instead of {eids_end}, behind the UEIDs"
                )
                raise DecodeError(
                    msg,
                    field="v2.smcd_offset",
                    offset=start + 6,
                )
            smcd, parts_end = _read_smcd(data, eids_end, end, ism_gid_count)
        if parts_end != end:
            msg = f"parts end at {parts_end}, the message at {end}"
            raise DecodeError(
                msg,
                field="length",
                offset=5,
            )
        eids = tuple(
            decode_text(eid) for (eid,) in _EIDS.parse(data, eids_start, eid_count)
        )
        return cls(eids=eids, smcd=smcd, **values)

    def build(self) -> bytes:
        """Give the bytes of the extension.

        Raises:
            EncodeError: A value or the number of entries does not fit.
        """
        gids = self.smcd.gids if self.smcd is not None else ()
        _limit("v2.eids", len(self.eids), UEIDS_MAX)
        _limit("v2.smcd.gids", len(gids), ISM_GIDS_MAX)
        eids = tuple((encode_text(eid, EID_BYTES, "v2.eids"),) for eid in self.eids)
        smcd_offset = 0
        if self.smcd is not None:
            smcd_offset = _PROPOSAL_EXTENSION.size + EID_BYTES * len(eids)
            smcd_offset -= _SMCD_OFFSET_BASE
        head = _PROPOSAL_EXTENSION.build_from(
            self,
            eid_count=len(eids),
            ism_gid_count=len(gids),
            smcd_offset=smcd_offset,
        )
        smcd = self.smcd.build() if self.smcd is not None else b""
        return head + _EIDS.build(eids) + smcd

    def __str__(self) -> str:
        return (
            f"release={self.release} eids={','.join(map(repr, self.eids))} "
            f"gid={self.gid.hex()} max_connections={self.max_connections} "
            f"max_links={self.max_links}"
        )


def _read_smcd(
    data: bytes, start: int, end: int, gid_count: int
) -> tuple[SmcdExtension, int]:
    """Read the SMC-Dv2 part; give it and where it ends."""
    gids_start = start + _SEID_AND_RESERVED_BYTES
    gids_end = gids_start + _ISM_GIDS.size * gid_count
    if gid_count > ISM_GIDS_MAX or gids_end > end:
        msg = f"{gid_count} ISM GIDs: at most {ISM_GIDS_MAX}, and they must fit in"
        raise DecodeError(
            msg,
            field="v2.ism_gid_count",
        )
    rows = _ISM_GIDS.parse(data, gids_start, gid_count)
    gids = tuple(map(IsmGid._make, rows))
    return SmcdExtension(decode_text(data[start : start + EID_BYTES]), gids), gids_end


def _limit(field: str, count: int, most: int) -> None:
    """Refuse more entries than the format has room for."""
    if count > most:
        msg = f"{count} entries, at most {most}"
        raise EncodeError(msg, field=field)


@dataclass(frozen=True, slots=True)
class FirstContactExtension:
    """What both sides tell each other when a version 2 link group begins."""

    direct: bool
    """No IP gateway lies between the two devices."""
    os_type: int
    """An ``OsType``, or another 4-bit number."""
    release: int
    """The release that the server chose; the Confirm repeats it. 4 bits."""
    host_name: str
    """Up to 32 characters; for people."""
    max_connections: int = 0
    """Negotiated, for each link group; 8 bits, from release 1."""
    max_links: int = 0
    """Negotiated, for each link group; 8 bits, from release 1."""
    feature_mask: int = 0
    """16 bits, from release 1."""
    vendor_options: int = 0
    """32 bits."""

    @classmethod
    def read(cls, data: bytes, start: int) -> FirstContactExtension:
        """Read the 52 bytes at an offset; the caller has checked the length."""
        return cls(**_FIRST_CONTACT.parse(data, start))

    @classmethod
    def read_short(cls, data: bytes, start: int) -> FirstContactExtension:
        """Read the 36 bytes that SMC-D has in release 0."""
        return cls(**_FIRST_CONTACT_SHORT.parse(data, start))

    def build(self) -> bytes:
        """Give the 52 bytes."""
        return _FIRST_CONTACT.build_from(self)

    def build_short(self) -> bytes:
        """Give the 36 bytes that SMC-D has in release 0."""
        return _FIRST_CONTACT_SHORT.build_from(self)

    def __str__(self) -> str:
        route = "direct" if self.direct else "routed"
        return (
            f"release={self.release} os={int(self.os_type)} host={self.host_name!r} "
            f"{route} max_connections={self.max_connections} "
            f"max_links={self.max_links}"
        )


FIRST_CONTACT_BYTES: Final = _FIRST_CONTACT.size
FIRST_CONTACT_SHORT_BYTES: Final = _FIRST_CONTACT_SHORT.size


@dataclass(frozen=True, slots=True)
class AcceptExtension:
    """What a version 2 Accept says behind the version 1 part."""

    eid: str
    """The negotiated EID, up to 32 characters."""
    first_contact: FirstContactExtension | None = None
    """Present on first contact only."""

    @classmethod
    def read(cls, data: bytes, start: int, *, first_contact: bool) -> AcceptExtension:
        """Read the part at an offset; the caller has checked the length."""
        values = _ACCEPT_TAIL.parse(data, start)
        contact = None
        if first_contact:
            contact = FirstContactExtension.read(data, start + _ACCEPT_TAIL.size)
        return cls(first_contact=contact, **values)

    def build(self) -> bytes:
        """Give the bytes."""
        return _ACCEPT_TAIL.build_from(self) + (
            b"" if self.first_contact is None else self.first_contact.build()
        )

    def __str__(self) -> str:
        contact = "" if self.first_contact is None else f" {self.first_contact}"
        return f"eid={self.eid!r}{contact}"


@dataclass(frozen=True, slots=True)
class ConfirmExtension:
    """What a version 2 Confirm says behind the version 1 part."""

    eid: str
    """The negotiated EID, repeated from the Accept."""
    first_contact: FirstContactExtension | None = None
    """Present on first contact only."""
    gids: tuple[bytes, ...] = ()
    """GIDs of the client's ports, 16 bytes each; on first contact only."""

    @classmethod
    def read(cls, data: bytes, start: int, *, first_contact: bool) -> ConfirmExtension:
        """Read the part at an offset; it has to end at the trailer.

        Raises:
            DecodeError: The number of GIDs does not agree with the length.
        """
        head = AcceptExtension.read(data, start, first_contact=first_contact)
        if not first_contact:
            return cls(eid=head.eid)
        list_start = start + _ACCEPT_TAIL.size + FIRST_CONTACT_BYTES
        count = _GID_LIST_HEAD.parse(data, list_start)["gid_count"]
        gids_start = list_start + _GID_LIST_HEAD.size
        gids_end = gids_start + GID_BYTES * count
        if gids_end != len(data) - CLC_TRAILER_BYTES:
            msg = (
                f"{count} GIDs end at {gids_end}, the message at "
                f"{len(data) - CLC_TRAILER_BYTES}"
            )
            raise DecodeError(
                msg,
                field="v2.gid_count",
                offset=list_start,
            )
        gids = tuple(gid for (gid,) in _GIDS.parse(data, gids_start, count))
        return cls(eid=head.eid, first_contact=head.first_contact, gids=gids)

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: There are GIDs without first contact, or a value does not
                fit.
        """
        head = AcceptExtension(self.eid, self.first_contact).build()
        if self.first_contact is None:
            if self.gids:
                msg = "GIDs are sent on first contact only"
                raise EncodeError(msg, field="v2.gids")
            return head
        count = _GID_LIST_HEAD.build({"gid_count": len(self.gids)})
        return head + count + _GIDS.build((gid,) for gid in self.gids)

    def __str__(self) -> str:
        gids = "" if not self.gids else f" gids={','.join(g.hex() for g in self.gids)}"
        return f"{AcceptExtension(self.eid, self.first_contact)}{gids}"


@dataclass(frozen=True, slots=True)
class SmcdAcceptExtension:
    """What a version 2 SMC-D Accept or Confirm says behind the version 1 part."""

    chid: int
    """Channel ID of the device, 16 bits."""
    eid: str
    """The negotiated EID, up to 32 characters."""
    first_contact: FirstContactExtension | None = None
    """Present on first contact only; short in release 0."""

    @classmethod
    def read(cls, data: bytes, start: int) -> SmcdAcceptExtension:
        """Read the part at an offset; it has to end at the trailer.

        Raises:
            DecodeError: The size belongs to no form, or to another release.
        """
        values = _SMCD_ACCEPT_TAIL.parse(data, start)
        contact_start = start + _SMCD_ACCEPT_TAIL.size
        size = len(data) - CLC_TRAILER_BYTES - contact_start
        contact = None
        if size == FIRST_CONTACT_SHORT_BYTES:
            contact = FirstContactExtension.read_short(data, contact_start)
        elif size == FIRST_CONTACT_BYTES:
            contact = FirstContactExtension.read(data, contact_start)
        if contact is not None and (contact.release == 0) != (
            size == FIRST_CONTACT_SHORT_BYTES
        ):
            msg = f"release {contact.release} with a first contact part of {size} bytes"
            raise DecodeError(
                msg,
                field="v2.first_contact.release",
                offset=contact_start + 1,
            )
        return cls(first_contact=contact, **values)

    def build(self) -> bytes:
        """Give the bytes; release 0 has the short first contact part."""
        head = _SMCD_ACCEPT_TAIL.build_from(self)
        if self.first_contact is None:
            return head
        if self.first_contact.release == 0:
            return head + self.first_contact.build_short()
        return head + self.first_contact.build()
