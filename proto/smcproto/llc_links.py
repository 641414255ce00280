"""LLC messages about links: confirm, add, delete, ask for one more.

Decides their bytes in versions 1 and 2. Does not know which answer belongs to which
request, nor when one is due.

Source: RFC 7609 A.3.1 to A.3.4 and A.3.8; for version 2 and for the two bytes of
padding in ADD LINK, which figure 32 lacks, Linux net/smc/smc_llc.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple, Self

from smcproto.constants import (
    ADD_LINK_CONTINUATION_RKEYS_MAX,
    ADD_LINK_V2_RKEYS_MAX,
    GID_BYTES,
    LLC_V1_BYTES,
    MAC_BYTES,
    TEST_LINK_DATA_BYTES,
    AddLinkReject,
    DeleteLinkReason,
    LlcType,
    Mtu,
)
from smcproto.errors import (
    DecodeError,
    EncodeError,
)
from smcproto.layout import (
    Bit,
    Layout,
    Rows,
    bits,
    code,
    member_or_int,
    raw,
    reserved,
    uint,
)
from smcproto.llc_header import (
    FLAGS_AT,
    RESPONSE,
    LlcBase,
    announced_count,
    build_message,
    count_entries,
    require_size,
)

_CONFIRM_LINK: Final = Layout(
    "CONFIRM LINK",
    bits(RESPONSE, Bit("no_eyecatcher", 0x03)),
    raw("mac", MAC_BYTES),
    raw("gid", GID_BYTES),
    uint("qp_number", 3),
    uint("link_number", 1),
    uint("link_user_id", 4),
    uint("max_links", 1),
    uint("max_connections", 1),
    reserved(8),
    start=FLAGS_AT,
)
_ADD_LINK: Final = Layout(
    "ADD LINK",
    bits(RESPONSE, Bit("rejected", 0x40, bool)),
    raw("mac", MAC_BYTES),
    reserved(2),
    raw("gid", GID_BYTES),
    uint("qp_number", 3),
    uint("link_number", 1),
    bits(Bit("mtu_code", 0x0F, member_or_int(Mtu))),
    uint("psn", 3),
    reserved(8),
    start=FLAGS_AT,
)
_ADD_LINK_EXTENSION: Final = Layout(
    "ADD LINK version 2 extension",
    bits(Bit("direct", 0x80, bool)),
    reserved(1),
    raw("client_target_gid", GID_BYTES),
    reserved(8),
    uint("rkey_count", 2),
    start=LLC_V1_BYTES,
)
_ADD_LINK_CONTINUATION: Final = Layout(
    "ADD LINK CONTINUATION",
    bits(RESPONSE),
    uint("link_number", 1),
    uint("remaining", 1),
    reserved(2),
    raw("rkeys", 32),
    reserved(4),
    start=FLAGS_AT,
)
_DELETE_LINK: Final = Layout(
    "DELETE LINK",
    bits(RESPONSE, Bit("whole_group", 0x40, bool), Bit("orderly", 0x20, bool)),
    uint("link_number", 1),
    code("reason", 4, DeleteLinkReason),
    reserved(35),
    start=FLAGS_AT,
)
_REQUEST_ADD_LINK: Final = Layout(
    "REQUEST ADD LINK",
    bits(RESPONSE),
    reserved(20),
    uint("gid_count", 1),
    reserved(3),
    start=FLAGS_AT,
)
_TEST_LINK: Final = Layout(
    "TEST LINK",
    bits(RESPONSE),
    raw("user_data", TEST_LINK_DATA_BYTES),
    reserved(24),
    start=FLAGS_AT,
)
_RKEY_PAIRS: Final = Rows("rkeys", "IIQ")
_GIDS: Final = Rows("gids", f"{GID_BYTES}s")


@dataclass(frozen=True, slots=True)
class ConfirmLink(LlcBase):
    """CONFIRM LINK: the new link carries messages. RFC 7609 A.3.1."""

    version: int
    """1 or 2."""
    response: bool
    """The client's answer."""
    mac: bytes
    """Of the sender's port, 6 bytes."""
    gid: bytes
    """Of the sender's port, 16 bytes."""
    qp_number: int
    """Of the sender, 24 bits."""
    link_number: int
    """Given by the server, echoed by the client; 8 bits."""
    link_user_id: int
    """Sender's own name for the link, for people; 32 bits."""
    max_links: int
    """The most links in the group that the sender can have; 8 bits."""
    max_connections: int = 0
    """Negotiated in version 2.1, else 0; 8 bits. Not in version 1."""
    no_eyecatcher: int = 3
    """The RMB elements have no eye catcher if any of the two bits is set. Linux
    sends both and demands one of them; the RFC does not know them."""

    TYPE: ClassVar[LlcType] = LlcType.CONFIRM_LINK

    @classmethod
    def read(cls, data: bytes, version: int) -> Self:
        """Read it; raises DecodeError."""
        require_size(data, LLC_V1_BYTES, "length")
        values = _CONFIRM_LINK.parse(data, FLAGS_AT)
        if version == 1:
            values["max_connections"] = 0  # Reserved in RFC 7609 figure 31.
        return cls(version=version, **values)

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value does not fit."""
        if self.version == 1 and self.max_connections:
            msg = "version 1 has no max_connections"
            raise EncodeError(msg, field="max_connections")
        body = _CONFIRM_LINK.build_from(self)
        return build_message(self.TYPE, self.version, body)

    def __str__(self) -> str:
        return (
            f"{self.title()} link={self.link_number} mac={self.mac.hex(':')} "
            f"gid={self.gid.hex()} qp={self.qp_number:#x} "
            f"user_id={self.link_user_id:#x} max_links={self.max_links} "
            f"max_connections={self.max_connections} "
            f"no_eyecatcher={self.no_eyecatcher}"
        )


class RkeyPair(NamedTuple):
    """A region's key on a new link, found by its key on the carrying link."""

    reference_rkey: int
    """Key on the link that carries the message, 32 bits."""
    new_rkey: int
    """Key on the new link, 32 bits."""
    new_virtual_address: int
    """Address on the new link, 64 bits."""


@dataclass(frozen=True, slots=True)
class AddLink(LlcBase):
    """ADD LINK: a queue pair for one more link. RFC 7609 A.3.2.

    A version 1 client may send one as an invitation, with MAC and GID only.
    """

    version: int
    """1 or 2."""
    response: bool
    """The client's answer."""
    mac: bytes
    """Of the sender's port for the new link, 6 bytes."""
    gid: bytes
    """Of that port, 16 bytes."""
    qp_number: int
    """The sender's new queue pair, 24 bits."""
    link_number: int
    """Given by the server, echoed by the client; 8 bits."""
    mtu_code: int
    """An ``Mtu``, or a reserved 4-bit number."""
    psn: int
    """First packet sequence number of the sender, 24 bits."""
    rejected: bool = False
    """The client refuses."""
    reject_reason: int = 0
    """An ``AddLinkReject`` or another 4-bit number; version 1 refusals only."""
    client_target_gid: bytes | None = None
    """16 bytes; None when the version 2 extension is absent, as in refusals."""
    direct: bool = False
    """No IP gateway lies between the devices; version 2 extension."""
    rkeys: tuple[RkeyPair, ...] = ()
    """Up to 255 regions; version 2 extension."""

    TYPE: ClassVar[LlcType] = LlcType.ADD_LINK

    @classmethod
    def read(cls, data: bytes, version: int) -> Self:
        """Read it; raises DecodeError."""
        values = _ADD_LINK.parse(data, FLAGS_AT)
        if _is_empty_request(values):
            raise DecodeError(_EMPTY_ADD_LINK, field="mac", offset=4)
        if version == 1:
            refused = values["response"] and values["rejected"]
            reason = _reject_reason(data[2] & 0x0F) if refused else 0
            return cls(version=version, reject_reason=reason, **values)
        if len(data) == LLC_V1_BYTES:
            return cls(version=version, **values)
        rows_at = LLC_V1_BYTES + _ADD_LINK_EXTENSION.size
        # The count has the byte order of the sender's machine: the length counts.
        count, rest = divmod(len(data) - rows_at, _RKEY_PAIRS.size)
        if not 0 <= count <= ADD_LINK_V2_RKEYS_MAX or rest:
            msg = (
                f"{len(data)} bytes: {LLC_V1_BYTES}, or {rows_at} and "
                f"{_RKEY_PAIRS.size} for each of up to {ADD_LINK_V2_RKEYS_MAX} keys"
            )
            raise DecodeError(
                msg,
                field="rkeys",
                offset=rows_at,
            )
        extension = _ADD_LINK_EXTENSION.parse(data, LLC_V1_BYTES)
        del extension["rkey_count"]
        rkeys = tuple(map(RkeyPair._make, _RKEY_PAIRS.parse(data, rows_at, count)))
        return cls(version=version, **values, **extension, rkeys=rkeys)

    def build(self, *, for_linux: bool = False) -> bytes:
        """Give the bytes.

        Args:
            for_linux: Write the number of keys so that a Linux of either byte order
                reads it: into both bytes of the field. Use it when the peer's
                ``os_type`` is LINUX.

        Raises:
            EncodeError: Parts contradict each other, or a value does not fit.
        """
        if self.reject_reason and not (
            self.version == 1 and self.response and self.rejected
        ):
            msg = "only a version 1 refusal has a reason"
            raise EncodeError(msg, field="reject_reason")
        if not 0 <= self.reject_reason <= 0x0F:
            msg = f"{self.reject_reason} is outside 0 to 15"
            raise EncodeError(msg, field="reject_reason")
        body = _ADD_LINK.build_from(self)
        if _is_empty_request(_ADD_LINK.parse(body)):
            raise EncodeError(_EMPTY_ADD_LINK, field="mac", offset=4)
        if self.client_target_gid is None:
            if self.direct or self.rkeys:
                msg = "keys and the direct flag need the version 2 extension"
                raise EncodeError(
                    msg,
                    field="client_target_gid",
                )
            return build_message(self.TYPE, self.version, body, self.reject_reason)
        if self.version == 1:
            msg = "version 1 has no extension"
            raise EncodeError(msg, field="client_target_gid")
        return build_message(
            self.TYPE, self.version, body + self._extension(for_linux=for_linux)
        )

    def _extension(self, *, for_linux: bool) -> bytes:
        """Give the version 2 extension."""
        count = count_entries("rkeys", self.rkeys, ADD_LINK_V2_RKEYS_MAX)
        head = _ADD_LINK_EXTENSION.build(
            {
                "direct": self.direct,
                "client_target_gid": self.client_target_gid,
                "rkey_count": count * 0x0101 if for_linux else count,
            }
        )
        return head + _RKEY_PAIRS.build(self.rkeys)

    def __str__(self) -> str:
        rejected = f" rejected={self.reject_reason}" if self.rejected else ""
        return (
            f"{self.title()}{rejected} link={self.link_number} "
            f"mac={self.mac.hex(':')} gid={self.gid.hex()} qp={self.qp_number:#x} "
            f"mtu={int(self.mtu_code)} psn={self.psn:#x} rkeys={len(self.rkeys)}"
        )


def _is_empty_request(values: dict[str, Any]) -> bool:
    """Tell whether an ADD LINK request has nothing in it; reserved bytes aside."""
    return (
        not values["response"]
        and not any(values["mac"])
        and not any(values["gid"])
        and not any(values[name] for name in _ADD_LINK_NUMBERS)
    )


_ADD_LINK_NUMBERS: Final = ("qp_number", "link_number", "mtu_code", "psn")
_EMPTY_ADD_LINK: Final = (
    "an ADD LINK request of zeros, which Linux takes for an event of its own"
)
_reject_reason: Final = member_or_int(AddLinkReject)


@dataclass(frozen=True, slots=True)
class AddLinkContinuation(LlcBase):
    """ADD LINK CONTINUATION: keys for the new link, version 1. RFC 7609 A.3.3."""

    version: int
    """1."""
    response: bool
    """The client's turn."""
    link_number: int
    """The new link, 8 bits."""
    rkeys: tuple[RkeyPair, ...] = ()
    """Up to 2 regions."""
    remaining: int | None = None
    """Regions still to be named, these included, if that is more; 8 bits."""

    TYPE: ClassVar[LlcType] = LlcType.ADD_LINK_CONTINUATION

    @classmethod
    def read(cls, data: bytes, version: int) -> Self:
        """Read it; raises DecodeError."""
        values = _ADD_LINK_CONTINUATION.parse(data, FLAGS_AT)
        remaining = values.pop("remaining")
        count = min(remaining, ADD_LINK_CONTINUATION_RKEYS_MAX)
        rows = _RKEY_PAIRS.parse(values.pop("rkeys"), 0, count)
        return cls(
            version=version,
            rkeys=tuple(map(RkeyPair._make, rows)),
            remaining=None if remaining == count else remaining,
            **values,
        )

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value or a count does not fit."""
        most = ADD_LINK_CONTINUATION_RKEYS_MAX
        listed = count_entries("rkeys", self.rkeys, most)
        rows = _RKEY_PAIRS.build(self.rkeys)
        body = _ADD_LINK_CONTINUATION.build(
            {
                "response": self.response,
                "link_number": self.link_number,
                "remaining": announced_count("remaining", listed, self.remaining, most),
                "rkeys": rows.ljust(32, b"\0"),
            }
        )
        return build_message(self.TYPE, self.version, body)

    def __str__(self) -> str:
        remaining = len(self.rkeys) if self.remaining is None else self.remaining
        return f"{self.title()} link={self.link_number} remaining={remaining}"


@dataclass(frozen=True, slots=True)
class DeleteLink(LlcBase):
    """DELETE LINK: one link, or all of the group, goes. RFC 7609 A.3.4."""

    version: int
    """1 or 2."""
    response: bool
    """The answer."""
    link_number: int
    """0 when the whole group goes; 8 bits."""
    reason: int
    """A ``DeleteLinkReason``, or another 32 bits."""
    whole_group: bool = False
    """All links."""
    orderly: bool = True
    """Connections are moved or closed first."""

    TYPE: ClassVar[LlcType] = LlcType.DELETE_LINK

    @classmethod
    def read(cls, data: bytes, version: int) -> Self:
        """Read it; raises DecodeError."""
        require_size(data, LLC_V1_BYTES, "length")
        return cls(version=version, **_DELETE_LINK.parse(data, FLAGS_AT))

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value does not fit."""
        body = _DELETE_LINK.build_from(self)
        return build_message(self.TYPE, self.version, body)

    def __str__(self) -> str:
        what = "whole group" if self.whole_group else f"link={self.link_number}"
        how = " orderly" if self.orderly else ""
        return f"{self.title()} {what}{how} reason={self.reason:08x}"


@dataclass(frozen=True, slots=True)
class RequestAddLink(LlcBase):
    """REQUEST ADD LINK: a version 2 client asks for one more link.

    The server refuses with a response, whatever is in it, or sends ADD LINK.
    Kernel: smc_llc.h, ``smc_llc_msg_req_add_link_v2``.
    """

    response: bool
    """The server's refusal."""
    gids: tuple[bytes, ...] = ()
    """GIDs of the client's spare ports, 16 bytes each."""
    version: int = 2
    """2."""

    TYPE: ClassVar[LlcType] = LlcType.REQUEST_ADD_LINK

    @classmethod
    def read(cls, data: bytes, version: int) -> Self:
        """Read it; raises DecodeError."""
        values = _REQUEST_ADD_LINK.parse(data, FLAGS_AT)
        count = values.pop("gid_count")
        gids_at = FLAGS_AT + _REQUEST_ADD_LINK.size
        require_size(data, max(LLC_V1_BYTES, gids_at + GID_BYTES * count), "gid_count")
        gids = tuple(gid for (gid,) in _GIDS.parse(data, gids_at, count))
        return cls(version=version, gids=gids, **values)

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value does not fit."""
        head = _REQUEST_ADD_LINK.build(
            {"response": self.response, "gid_count": len(self.gids)}
        )
        body = head + _GIDS.build((gid,) for gid in self.gids)
        return build_message(self.TYPE, self.version, body)

    def __str__(self) -> str:
        return f"{self.title()} gids={','.join(gid.hex() for gid in self.gids)}"


@dataclass(frozen=True, slots=True)
class TestLink(LlcBase):
    """TEST LINK: is the link alive? The answer repeats the data. RFC 7609 A.3.8."""

    __test__: ClassVar[bool] = False  # Not a test, whatever pytest makes of the name.

    version: int
    """1 or 2."""
    response: bool
    """The answer."""
    user_data: bytes = bytes(TEST_LINK_DATA_BYTES)
    """16 bytes, returned unchanged; Linux sends zeros."""

    TYPE: ClassVar[LlcType] = LlcType.TEST_LINK

    @classmethod
    def read(cls, data: bytes, version: int) -> Self:
        """Read it; raises DecodeError."""
        require_size(data, LLC_V1_BYTES, "length")
        return cls(version=version, **_TEST_LINK.parse(data, FLAGS_AT))

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value does not fit."""
        body = _TEST_LINK.build_from(self)
        return build_message(self.TYPE, self.version, body)

    def __str__(self) -> str:
        return f"{self.title()} user_data={self.user_data.hex()}"
