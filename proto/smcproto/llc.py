"""LLC messages: how two ends look after links and remote keys.

Decides the bytes of every LLC message of version 1 and 2. The two versions share
the bodies, which begin at byte 4; ``version`` and ``response`` are attributes of
each message. Does not know which answer belongs to which request, nor when one is
due.

In version 2 bytes 1 and 2 hold a length, which Linux writes in the byte order of
its machine: it is ignored when read, the bytes received count, and written
big-endian. Every message has exactly the size that its content asks for.

Source: RFC 7609 A.3; for version 2 and for the two bytes of padding in ADD LINK,
which figure 32 lacks, Linux net/smc/smc_llc.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

from smcproto.constants import (
    ADD_LINK_CONTINUATION_RKEYS_MAX,
    ADD_LINK_V2_RKEYS_MAX,
    CDC_TYPE,
    CONFIRM_RKEY_CONTINUATION_LINKS_MAX,
    CONFIRM_RKEY_LINKS_MAX,
    DELETE_RKEY_V1_MAX,
    DELETE_RKEY_V2_MAX,
    GID_BYTES,
    LLC_V1_BYTES,
    LLC_V2_FLAG,
    LLC_V2_MAX_BYTES,
    MAC_BYTES,
    TEST_LINK_DATA_BYTES,
    AddLinkReject,
    DeleteLinkReason,
    LlcType,
    Mtu,
)
from smcproto.errors import DecodeError, EncodeError
from smcproto.layout import (
    Bit,
    Buffer,
    Layout,
    Rows,
    bits,
    code,
    member_or_int,
    raw,
    reserved,
    uint,
)

_M = TypeVar("_M")

_FLAGS_AT: Final = 3
"""Where the layouts begin: byte 3, the flags, is the first that both versions share."""

_RESPONSE: Final = Bit("response", 0x80, bool)

_CONFIRM_LINK: Final = Layout(
    "CONFIRM LINK",
    bits(_RESPONSE, Bit("no_eyecatcher", 0x03)),
    raw("mac", MAC_BYTES),
    raw("gid", GID_BYTES),
    uint("qp_number", 3),
    uint("link_number", 1),
    uint("link_user_id", 4),
    uint("max_links", 1),
    uint("max_connections", 1),
    reserved(8),
    start=_FLAGS_AT,
)
_ADD_LINK: Final = Layout(
    "ADD LINK",
    bits(_RESPONSE, Bit("rejected", 0x40, bool)),
    raw("mac", MAC_BYTES),
    reserved(2),
    raw("gid", GID_BYTES),
    uint("qp_number", 3),
    uint("link_number", 1),
    bits(Bit("mtu_code", 0x0F, member_or_int(Mtu))),
    uint("psn", 3),
    reserved(8),
    start=_FLAGS_AT,
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
    bits(_RESPONSE),
    uint("link_number", 1),
    uint("remaining", 1),
    reserved(2),
    raw("rkeys", 32),
    reserved(4),
    start=_FLAGS_AT,
)
_DELETE_LINK: Final = Layout(
    "DELETE LINK",
    bits(_RESPONSE, Bit("whole_group", 0x40, bool), Bit("orderly", 0x20, bool)),
    uint("link_number", 1),
    code("reason", 4, DeleteLinkReason),
    reserved(35),
    start=_FLAGS_AT,
)
_REQUEST_ADD_LINK: Final = Layout(
    "REQUEST ADD LINK",
    bits(_RESPONSE),
    reserved(20),
    uint("gid_count", 1),
    reserved(3),
    start=_FLAGS_AT,
)
_CONFIRM_RKEY: Final = Layout(
    "CONFIRM RKEY",
    bits(_RESPONSE, Bit("refused", 0x20, bool), Bit("retry", 0x10, bool)),
    uint("other_count", 1),
    uint("rkey", 4),
    uint("virtual_address", 8),
    raw("other_links", 26),
    reserved(1),
    start=_FLAGS_AT,
)
_CONFIRM_RKEY_CONTINUATION: Final = Layout(
    "CONFIRM RKEY CONTINUATION",
    bits(_RESPONSE, Bit("refused", 0x20, bool)),
    uint("remaining", 1),
    raw("other_links", 39),
    start=_FLAGS_AT,
)
_TEST_LINK: Final = Layout(
    "TEST LINK",
    bits(_RESPONSE),
    raw("user_data", TEST_LINK_DATA_BYTES),
    reserved(24),
    start=_FLAGS_AT,
)
_DELETE_RKEY: Final = Layout(
    "DELETE RKEY",
    bits(_RESPONSE, Bit("refused", 0x20, bool)),
    uint("count", 1),
    uint("errors", 1),
    reserved(2),
    start=_FLAGS_AT,
)

_RKEY_PAIRS: Final = Rows("rkeys", "IIQ")
_OTHER_LINKS: Final = Rows("other_links", "BIQ")
_RKEYS: Final = Rows("rkeys", "I")
_GIDS: Final = Rows("gids", f"{GID_BYTES}s")


def _build_v1(kind: LlcType, body: bytes, byte_2: int = 0) -> bytes:
    """Put the version 1 header before the rest, from the flags on."""
    return bytes((kind, LLC_V1_BYTES, byte_2)) + body


def _build(kind: LlcType, version: int, body: bytes) -> bytes:
    """Pad with zeros to the smallest size and put the header before it."""
    body = body.ljust(LLC_V1_BYTES - _FLAGS_AT, b"\0")
    if version == 1:
        return _build_v1(kind, body)
    if version != 2:
        raise EncodeError(f"version {version}: 1 or 2", field="version", offset=0)
    length = _FLAGS_AT + len(body)
    return bytes((LLC_V2_FLAG | kind,)) + length.to_bytes(2, "big") + body


def _values(message: object, layout: Layout) -> dict[str, Any]:
    """Take the values of a layout from the attributes of the same names."""
    return {name: getattr(message, name, None) for name in layout.names}


def _exactly(data: bytes, size: int, field: str) -> None:
    """Refuse a message that is longer or shorter than its content."""
    if len(data) != size:
        raise DecodeError(
            f"{len(data)} bytes received where the content has {size}", field=field
        )


def _count(field: str, entries: tuple[Any, ...], most: int) -> int:
    """Count entries, refusing more than there is room for."""
    if len(entries) > most:
        raise EncodeError(f"{len(entries)} entries, at most {most}", field=field)
    return len(entries)


def _announced(field: str, listed: int, announced: int | None, most: int) -> int:
    """Give the count to be written when messages may follow with the rest.

    A full message may announce more than it lists; any other lists them all.
    """
    if announced is None or announced == listed:
        return listed
    if listed != most or announced < listed:
        raise EncodeError(
            f"{announced} announced, {listed} listed, {most} fit", field=field
        )
    return announced


@dataclass(frozen=True, slots=True)
class ConfirmLink:
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
    def parse(cls, data: Buffer) -> ConfirmLink:
        """Read it. Raises: DecodeError: ``data`` is not such a message."""
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes, version: int) -> ConfirmLink:
        _exactly(data, LLC_V1_BYTES, "length")
        values = _CONFIRM_LINK.parse(data, _FLAGS_AT)
        if version == 1:
            values["max_connections"] = 0  # Reserved in RFC 7609 figure 31.
        return cls(version=version, **values)

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value does not fit."""
        if self.version == 1 and self.max_connections:
            raise EncodeError(
                "version 1 has no max_connections", field="max_connections"
            )
        body = _CONFIRM_LINK.build(_values(self, _CONFIRM_LINK))
        return _build(self.TYPE, self.version, body)

    def __str__(self) -> str:
        return (
            f"{_title(self)} link={self.link_number} mac={self.mac.hex(':')} "
            f"gid={self.gid.hex()} qp={self.qp_number:#x} "
            f"user_id={self.link_user_id:#x} max_links={self.max_links} "
            f"max_connections={self.max_connections} "
            f"no_eyecatcher={self.no_eyecatcher}"
        )


@dataclass(frozen=True, slots=True)
class RkeyPair:
    """A region's key on a new link, found by its key on the carrying link."""

    reference_rkey: int
    """Key on the link that carries the message, 32 bits."""
    new_rkey: int
    """Key on the new link, 32 bits."""
    new_virtual_address: int
    """Address on the new link, 64 bits."""


@dataclass(frozen=True, slots=True)
class AddLink:
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
    def parse(cls, data: Buffer) -> AddLink:
        """Read it. Raises: DecodeError: ``data`` is not such a message."""
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes, version: int) -> AddLink:
        values = _ADD_LINK.parse(data, _FLAGS_AT)
        if not values["response"] and not any(data[4:LLC_V1_BYTES]):
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
            raise DecodeError(
                f"{len(data)} bytes: {LLC_V1_BYTES}, or {rows_at} and "
                f"{_RKEY_PAIRS.size} for each of up to {ADD_LINK_V2_RKEYS_MAX} keys",
                field="rkeys",
                offset=rows_at,
            )
        extension = _ADD_LINK_EXTENSION.parse(data, LLC_V1_BYTES)
        del extension["rkey_count"]
        rkeys = tuple(RkeyPair(*row) for row in _RKEY_PAIRS.parse(data, rows_at, count))
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
            raise EncodeError(
                "only a version 1 refusal has a reason", field="reject_reason"
            )
        if not 0 <= self.reject_reason <= 0x0F:
            raise EncodeError(
                f"{self.reject_reason} is outside 0 to 15", field="reject_reason"
            )
        body = _ADD_LINK.build(_values(self, _ADD_LINK))
        if not self.response and not any(body[1:]):
            raise EncodeError(_EMPTY_ADD_LINK, field="mac", offset=4)
        if self.client_target_gid is None:
            if self.direct or self.rkeys:
                raise EncodeError(
                    "keys and the direct flag need the version 2 extension",
                    field="client_target_gid",
                )
            if self.version == 1:
                return _build_v1(self.TYPE, body, self.reject_reason)
            return _build(self.TYPE, self.version, body)
        if self.version == 1:
            raise EncodeError(
                "version 1 has no extension", field="client_target_gid"
            )
        return _build(self.TYPE, self.version, body + self._extension(for_linux))

    def _extension(self, for_linux: bool) -> bytes:
        """Give the version 2 extension."""
        count = _count("rkeys", self.rkeys, ADD_LINK_V2_RKEYS_MAX)
        head = _ADD_LINK_EXTENSION.build(
            {
                "direct": self.direct,
                "client_target_gid": self.client_target_gid,
                "rkey_count": count * 0x0101 if for_linux else count,
            }
        )
        return head + _RKEY_PAIRS.build(
            (pair.reference_rkey, pair.new_rkey, pair.new_virtual_address)
            for pair in self.rkeys
        )

    def __str__(self) -> str:
        rejected = f" rejected={self.reject_reason}" if self.rejected else ""
        return (
            f"{_title(self)}{rejected} link={self.link_number} "
            f"mac={self.mac.hex(':')} gid={self.gid.hex()} qp={self.qp_number:#x} "
            f"mtu={int(self.mtu_code)} psn={self.psn:#x} rkeys={len(self.rkeys)}"
        )


_EMPTY_ADD_LINK: Final = (
    "an ADD LINK request of zeros, which Linux takes for an event of its own"
)
_reject_reason: Final = member_or_int(AddLinkReject)


@dataclass(frozen=True, slots=True)
class AddLinkContinuation:
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
    def parse(cls, data: Buffer) -> AddLinkContinuation:
        """Read it. Raises: DecodeError: ``data`` is not such a message."""
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes, version: int) -> AddLinkContinuation:
        values = _ADD_LINK_CONTINUATION.parse(data, _FLAGS_AT)
        remaining = values.pop("remaining")
        count = min(remaining, ADD_LINK_CONTINUATION_RKEYS_MAX)
        rows = _RKEY_PAIRS.parse(values.pop("rkeys"), 0, count)
        return cls(
            version=version,
            rkeys=tuple(RkeyPair(*row) for row in rows),
            remaining=None if remaining == count else remaining,
            **values,
        )

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value or a count does not fit."""
        _version_1_only(self.version)
        most = ADD_LINK_CONTINUATION_RKEYS_MAX
        listed = _count("rkeys", self.rkeys, most)
        rows = _RKEY_PAIRS.build(
            (pair.reference_rkey, pair.new_rkey, pair.new_virtual_address)
            for pair in self.rkeys
        )
        body = _ADD_LINK_CONTINUATION.build(
            {
                "response": self.response,
                "link_number": self.link_number,
                "remaining": _announced("remaining", listed, self.remaining, most),
                "rkeys": rows.ljust(32, b"\0"),
            }
        )
        return _build(self.TYPE, self.version, body)

    def __str__(self) -> str:
        remaining = len(self.rkeys) if self.remaining is None else self.remaining
        return f"{_title(self)} link={self.link_number} remaining={remaining}"


@dataclass(frozen=True, slots=True)
class DeleteLink:
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
    def parse(cls, data: Buffer) -> DeleteLink:
        """Read it. Raises: DecodeError: ``data`` is not such a message."""
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes, version: int) -> DeleteLink:
        _exactly(data, LLC_V1_BYTES, "length")
        return cls(version=version, **_DELETE_LINK.parse(data, _FLAGS_AT))

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value does not fit."""
        body = _DELETE_LINK.build(_values(self, _DELETE_LINK))
        return _build(self.TYPE, self.version, body)

    def __str__(self) -> str:
        what = "whole group" if self.whole_group else f"link={self.link_number}"
        how = " orderly" if self.orderly else ""
        return f"{_title(self)} {what}{how} reason={self.reason:08x}"


@dataclass(frozen=True, slots=True)
class RequestAddLink:
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
    def parse(cls, data: Buffer) -> RequestAddLink:
        """Read it. Raises: DecodeError: ``data`` is not such a message."""
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes, version: int) -> RequestAddLink:
        values = _REQUEST_ADD_LINK.parse(data, _FLAGS_AT)
        count = values.pop("gid_count")
        gids_at = _FLAGS_AT + _REQUEST_ADD_LINK.size
        _exactly(data, max(LLC_V1_BYTES, gids_at + GID_BYTES * count), "gid_count")
        gids = tuple(gid for (gid,) in _GIDS.parse(data, gids_at, count))
        return cls(version=version, gids=gids, **values)

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value does not fit."""
        if self.version != 2:
            raise EncodeError(
                f"version {self.version}: REQUEST ADD LINK is of 2", field="version"
            )
        head = _REQUEST_ADD_LINK.build(
            {"response": self.response, "gid_count": len(self.gids)}
        )
        body = head + _GIDS.build((gid,) for gid in self.gids)
        return _build(self.TYPE, self.version, body)

    def __str__(self) -> str:
        return f"{_title(self)} gids={','.join(gid.hex() for gid in self.gids)}"


@dataclass(frozen=True, slots=True)
class OtherLink:
    """A region's key on a link other than the carrying one. RFC 7609 figure 37."""

    link_number: int
    """8 bits."""
    rkey: int
    """Key on that link, 32 bits."""
    virtual_address: int
    """Address on that link, 64 bits."""


@dataclass(frozen=True, slots=True)
class ConfirmRkey:
    """CONFIRM RKEY: a region that the peer may write to. RFC 7609 A.3.5.

    The answer repeats the request with the response flag.
    """

    version: int
    """1 or 2."""
    response: bool
    """The answer."""
    rkey: int
    """Key on the link that carries the message, 32 bits."""
    virtual_address: int
    """Address on that link, 64 bits."""
    other_links: tuple[OtherLink, ...] = ()
    """Keys on up to 2 other links."""
    refused: bool = False
    """The answer is no."""
    retry: bool = False
    """With ``refused``: try again when the configuration change is over."""
    other_count: int | None = None
    """Other links in all, if CONTINUATION messages follow with more; 8 bits."""

    TYPE: ClassVar[LlcType] = LlcType.CONFIRM_RKEY

    @classmethod
    def parse(cls, data: Buffer) -> ConfirmRkey:
        """Read it. Raises: DecodeError: ``data`` is not such a message."""
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes, version: int) -> ConfirmRkey:
        _exactly(data, LLC_V1_BYTES, "length")
        values = _CONFIRM_RKEY.parse(data, _FLAGS_AT)
        total = values.pop("other_count")
        count = min(total, CONFIRM_RKEY_LINKS_MAX)
        rows = _OTHER_LINKS.parse(values.pop("other_links"), 0, count)
        return cls(
            version=version,
            other_links=tuple(OtherLink(*row) for row in rows),
            other_count=None if total == count else total,
            **values,
        )

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value or a count does not fit."""
        most = CONFIRM_RKEY_LINKS_MAX
        listed = _count("other_links", self.other_links, most)
        rows = _build_other_links(self.other_links)
        body = _CONFIRM_RKEY.build(
            {
                "response": self.response,
                "refused": self.refused,
                "retry": self.retry,
                "other_count": _announced(
                    "other_count", listed, self.other_count, most
                ),
                "rkey": self.rkey,
                "virtual_address": self.virtual_address,
                "other_links": rows.ljust(26, b"\0"),
            }
        )
        return _build(self.TYPE, self.version, body)

    def __str__(self) -> str:
        others = "".join(
            f" link {other.link_number}: rkey={other.rkey:#x} "
            f"va={other.virtual_address:#x}"
            for other in self.other_links
        )
        verdict = (" refused" if self.refused else "") + (
            " retry" if self.retry else ""
        )
        return (
            f"{_title(self)}{verdict} rkey={self.rkey:#x} "
            f"va={self.virtual_address:#x}{others}"
        )


@dataclass(frozen=True, slots=True)
class ConfirmRkeyContinuation:
    """CONFIRM RKEY CONTINUATION: keys on further links. RFC 7609 A.3.6.

    Version 1 only; Linux neither sends nor answers it.
    """

    version: int
    """1."""
    response: bool
    """The answer."""
    other_links: tuple[OtherLink, ...] = ()
    """Keys on up to 3 links."""
    refused: bool = False
    """The answer is no."""
    remaining: int | None = None
    """Keys still to be named, these included, if that is more; 8 bits."""

    TYPE: ClassVar[LlcType] = LlcType.CONFIRM_RKEY_CONTINUATION

    @classmethod
    def parse(cls, data: Buffer) -> ConfirmRkeyContinuation:
        """Read it. Raises: DecodeError: ``data`` is not such a message."""
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes, version: int) -> ConfirmRkeyContinuation:
        values = _CONFIRM_RKEY_CONTINUATION.parse(data, _FLAGS_AT)
        remaining = values.pop("remaining")
        count = min(remaining, CONFIRM_RKEY_CONTINUATION_LINKS_MAX)
        rows = _OTHER_LINKS.parse(values.pop("other_links"), 0, count)
        return cls(
            version=version,
            other_links=tuple(OtherLink(*row) for row in rows),
            remaining=None if remaining == count else remaining,
            **values,
        )

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value or a count does not fit."""
        _version_1_only(self.version)
        most = CONFIRM_RKEY_CONTINUATION_LINKS_MAX
        listed = _count("other_links", self.other_links, most)
        body = _CONFIRM_RKEY_CONTINUATION.build(
            {
                "response": self.response,
                "refused": self.refused,
                "remaining": _announced("remaining", listed, self.remaining, most),
                "other_links": _build_other_links(self.other_links).ljust(39, b"\0"),
            }
        )
        return _build(self.TYPE, self.version, body)

    def __str__(self) -> str:
        remaining = len(self.other_links) if self.remaining is None else self.remaining
        verdict = " refused" if self.refused else ""
        return f"{_title(self)}{verdict} remaining={remaining}"


def _build_other_links(links: tuple[OtherLink, ...]) -> bytes:
    """Give the bytes of link number and key pairs."""
    return _OTHER_LINKS.build(
        (link.link_number, link.rkey, link.virtual_address) for link in links
    )


def _version_1_only(version: int) -> None:
    """Refuse a message that version 2 does not have."""
    if version != 1:
        raise EncodeError(f"version {version} has no CONTINUATION", field="version")


@dataclass(frozen=True, slots=True)
class DeleteRkey:
    """DELETE RKEY: regions that the peer must not write to any more. RFC 7609 A.3.7.

    The version 1 answer repeats the request; Linux answers in version 2 with the
    count alone and zeros for the keys.
    """

    version: int
    """1 or 2."""
    response: bool
    """The answer."""
    rkeys: tuple[int, ...]
    """Keys on the link that carries the message, 32 bits each; up to 8 in version 1,
    255 in version 2."""
    refused: bool = False
    """Some keys were unknown."""
    error_mask: int = 0
    """Version 1 answers: 0x80 stands for the first key; 8 bits."""
    invalid_count: int = 0
    """Version 2 answers: how many keys were unknown; 8 bits."""
    count: int | None = None
    """Version 2 answers: the number of keys asked about, if it is more than those
    that are repeated."""

    TYPE: ClassVar[LlcType] = LlcType.DELETE_RKEY

    @classmethod
    def parse(cls, data: Buffer) -> DeleteRkey:
        """Read it. Raises: DecodeError: ``data`` is not such a message."""
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes, version: int) -> DeleteRkey:
        values = _DELETE_RKEY.parse(data, _FLAGS_AT)
        count = values.pop("count")
        values["error_mask" if version == 1 else "invalid_count"] = values.pop("errors")
        listed = count
        if version == 1:
            if count > DELETE_RKEY_V1_MAX:
                raise DecodeError(
                    f"{count} keys, at most {DELETE_RKEY_V1_MAX}",
                    field="rkeys",
                    offset=4,
                )
        elif values["response"] and len(data) == LLC_V1_BYTES:
            listed = min(count, (LLC_V1_BYTES - _RKEYS_AT) // _RKEYS.size)
        else:
            _exactly(data, max(LLC_V1_BYTES, _RKEYS_AT + _RKEYS.size * count), "rkeys")
        rkeys = tuple(rkey for (rkey,) in _RKEYS.parse(data, _RKEYS_AT, listed))
        return cls(
            version=version,
            rkeys=rkeys,
            count=None if count == listed else count,
            **values,
        )

    def build(self) -> bytes:
        """Give the bytes.

        Raises:
            EncodeError: Parts contradict each other, or a value does not fit.
        """
        most = DELETE_RKEY_V1_MAX if self.version == 1 else DELETE_RKEY_V2_MAX
        listed = _count("rkeys", self.rkeys, most)
        if self.count is not None and not (self.version == 2 and self.response):
            raise EncodeError("only a version 2 answer has a count", field="count")
        room = (LLC_V1_BYTES - _RKEYS_AT) // _RKEYS.size
        field, wrong = (
            ("invalid_count", self.invalid_count)
            if self.version == 1
            else ("error_mask", self.error_mask)
        )
        if wrong:
            raise EncodeError(f"version {self.version} has no {field}", field=field)
        body = _DELETE_RKEY.build(
            {
                "response": self.response,
                "refused": self.refused,
                "count": _announced("count", listed, self.count, room),
                "errors": self.error_mask or self.invalid_count,
            }
        )
        keys = _RKEYS.build((rkey,) for rkey in self.rkeys)
        return _build(self.TYPE, self.version, body + keys)

    def __str__(self) -> str:
        verdict = " refused" if self.refused else ""
        keys = ",".join(f"{rkey:#x}" for rkey in self.rkeys)
        return f"{_title(self)}{verdict} rkeys={keys}"


_RKEYS_AT: Final = 8


@dataclass(frozen=True, slots=True)
class TestLink:
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
    def parse(cls, data: Buffer) -> TestLink:
        """Read it. Raises: DecodeError: ``data`` is not such a message."""
        return _only(cls, parse(data))

    @classmethod
    def _read(cls, data: bytes, version: int) -> TestLink:
        _exactly(data, LLC_V1_BYTES, "length")
        return cls(version=version, **_TEST_LINK.parse(data, _FLAGS_AT))

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value does not fit."""
        body = _TEST_LINK.build(_values(self, _TEST_LINK))
        return _build(self.TYPE, self.version, body)

    def __str__(self) -> str:
        return f"{_title(self)} user_data={self.user_data.hex()}"


LlcMessage: TypeAlias = (
    ConfirmLink
    | AddLink
    | AddLinkContinuation
    | DeleteLink
    | RequestAddLink
    | ConfirmRkey
    | ConfirmRkeyContinuation
    | TestLink
    | DeleteRkey
)
"""Any LLC message."""

_V1_CLASSES: Final = {
    kind.TYPE: kind
    for kind in (
        ConfirmLink,
        AddLink,
        AddLinkContinuation,
        DeleteLink,
        ConfirmRkey,
        TestLink,
        ConfirmRkeyContinuation,
        DeleteRkey,
    )
}
_V2_CLASSES: Final = {
    kind.TYPE: kind
    for kind in (
        ConfirmLink,
        AddLink,
        DeleteLink,
        RequestAddLink,
        ConfirmRkey,
        TestLink,
        DeleteRkey,
    )
}


def parse(data: Buffer) -> LlcMessage:
    """Read any LLC message, of either version.

    Args:
        data: Exactly the bytes that one completion delivered.

    Raises:
        DecodeError: It is none. With ``field == "type"`` the type is unknown, and
            ``is_ignorable`` says whether it may be passed over.

    Reference: RFC 7609 A.3.
    """
    size = len(data)
    if size < LLC_V1_BYTES or size > LLC_V2_MAX_BYTES:
        raise DecodeError(
            f"{size} bytes: {LLC_V1_BYTES} to {LLC_V2_MAX_BYTES}",
            field="length",
            offset=0,
        )
    number = data[0]
    if number == CDC_TYPE:
        raise DecodeError("a CDC message, not LLC", field="type", offset=0)
    if number & ~0x1F == LLC_V2_FLAG and number ^ LLC_V2_FLAG in _V2_CLASSES:
        return _V2_CLASSES[LlcType(number ^ LLC_V2_FLAG)]._read(bytes(data), 2)
    if number not in _V1_CLASSES:
        raise DecodeError(f"LLC type {number:#04x} is unknown", field="type", offset=0)
    if size != LLC_V1_BYTES or data[1] != LLC_V1_BYTES:
        raise DecodeError(
            f"version 1 message of {size} bytes that says {data[1]}: both must be "
            f"{LLC_V1_BYTES}",
            field="length",
            offset=1,
        )
    return _V1_CLASSES[LlcType(number)]._read(bytes(data), 1)


def is_ignorable(type_number: int) -> bool:
    """Tell whether a message of an unknown type may be passed over in silence.

    Args:
        type_number: Byte 0 of the message.

    Reference: RFC 7609 A.3: with the two highest bits 10 it is optional, with 00 it
    is a protocol error. Linux passes over all.
    """
    return type_number & 0xC0 == 0x80


def _title(message: LlcMessage) -> str:
    """Name message, version and direction."""
    side = "response" if message.response else "request"
    return f"{message.TYPE.name} version={message.version} {side}"


def _only(kind: type[_M], message: LlcMessage) -> _M:
    """Refuse another message than the one asked for."""
    if not isinstance(message, kind):
        raise DecodeError(
            f"{type(message).__name__} where {kind.__name__} was expected",
            field="type",
            offset=0,
        )
    return message
