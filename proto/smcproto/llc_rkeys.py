"""LLC messages about remote keys: confirm and delete.

Decides their bytes in versions 1 and 2. Does not know which keys exist.

Source: RFC 7609 A.3.5 to A.3.7; version 2: Linux net/smc/smc_llc.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, Self

from smcproto.constants import (
    CONFIRM_RKEY_CONTINUATION_LINKS_MAX,
    CONFIRM_RKEY_LINKS_MAX,
    DELETE_RKEY_V1_MAX,
    DELETE_RKEY_V2_MAX,
    LLC_V1_BYTES,
    LlcType,
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

_CONFIRM_RKEY: Final = Layout(
    "CONFIRM RKEY",
    bits(RESPONSE, Bit("refused", 0x20, bool), Bit("retry", 0x10, bool)),
    uint("other_count", 1),
    uint("rkey", 4),
    uint("virtual_address", 8),
    raw("other_links", 26),
    reserved(1),
    start=FLAGS_AT,
)
_CONFIRM_RKEY_CONTINUATION: Final = Layout(
    "CONFIRM RKEY CONTINUATION",
    bits(RESPONSE, Bit("refused", 0x20, bool)),
    uint("remaining", 1),
    raw("other_links", 39),
    start=FLAGS_AT,
)
_DELETE_RKEYS: Final = {
    version: Layout(
        "DELETE RKEY",
        bits(RESPONSE, Bit("refused", 0x20, bool)),
        uint("count", 1),
        uint("error_mask" if version == 1 else "invalid_count", 1),
        reserved(2),
        start=FLAGS_AT,
    )
    for version in (1, 2)
}
_OTHER_LINKS: Final = Rows("other_links", "BIQ")
_RKEYS: Final = Rows("rkeys", "I")


class OtherLink(NamedTuple):
    """A region's key on a link other than the carrying one. RFC 7609 figure 37."""

    link_number: int
    """8 bits."""
    rkey: int
    """Key on that link, 32 bits."""
    virtual_address: int
    """Address on that link, 64 bits."""


@dataclass(frozen=True, slots=True)
class ConfirmRkey(LlcBase):
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
    def read(cls, data: bytes, version: int) -> Self:
        """Read it; raises DecodeError."""
        require_size(data, LLC_V1_BYTES, "length")
        values = _CONFIRM_RKEY.parse(data, FLAGS_AT)
        total = values.pop("other_count")
        count = min(total, CONFIRM_RKEY_LINKS_MAX)
        rows = _OTHER_LINKS.parse(values.pop("other_links"), 0, count)
        return cls(
            version=version,
            other_links=tuple(map(OtherLink._make, rows)),
            other_count=None if total == count else total,
            **values,
        )

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value or a count does not fit."""
        most = CONFIRM_RKEY_LINKS_MAX
        listed = count_entries("other_links", self.other_links, most)
        rows = _OTHER_LINKS.build(self.other_links)
        body = _CONFIRM_RKEY.build(
            {
                "response": self.response,
                "refused": self.refused,
                "retry": self.retry,
                "other_count": announced_count(
                    "other_count", listed, self.other_count, most
                ),
                "rkey": self.rkey,
                "virtual_address": self.virtual_address,
                "other_links": rows.ljust(26, b"\0"),
            }
        )
        return build_message(self.TYPE, self.version, body)

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
            f"{self.title()}{verdict} rkey={self.rkey:#x} "
            f"va={self.virtual_address:#x}{others}"
        )


@dataclass(frozen=True, slots=True)
class ConfirmRkeyContinuation(LlcBase):
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
    def read(cls, data: bytes, version: int) -> Self:
        """Read it; raises DecodeError."""
        values = _CONFIRM_RKEY_CONTINUATION.parse(data, FLAGS_AT)
        remaining = values.pop("remaining")
        count = min(remaining, CONFIRM_RKEY_CONTINUATION_LINKS_MAX)
        rows = _OTHER_LINKS.parse(values.pop("other_links"), 0, count)
        return cls(
            version=version,
            other_links=tuple(map(OtherLink._make, rows)),
            remaining=None if remaining == count else remaining,
            **values,
        )

    def build(self) -> bytes:
        """Give the bytes. Raises: EncodeError: a value or a count does not fit."""
        most = CONFIRM_RKEY_CONTINUATION_LINKS_MAX
        listed = count_entries("other_links", self.other_links, most)
        body = _CONFIRM_RKEY_CONTINUATION.build(
            {
                "response": self.response,
                "refused": self.refused,
                "remaining": announced_count("remaining", listed, self.remaining, most),
                "other_links": _OTHER_LINKS.build(self.other_links).ljust(39, b"\0"),
            }
        )
        return build_message(self.TYPE, self.version, body)

    def __str__(self) -> str:
        remaining = len(self.other_links) if self.remaining is None else self.remaining
        verdict = " refused" if self.refused else ""
        return f"{self.title()}{verdict} remaining={remaining}"


@dataclass(frozen=True, slots=True)
class DeleteRkey(LlcBase):
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
    def read(cls, data: bytes, version: int) -> Self:
        """Read it; raises DecodeError."""
        values = _DELETE_RKEYS[version].parse(data, FLAGS_AT)
        count = values.pop("count")
        listed = count
        if version == 1:
            if count > DELETE_RKEY_V1_MAX:
                msg = f"{count} keys, at most {DELETE_RKEY_V1_MAX}"
                raise DecodeError(
                    msg,
                    field="rkeys",
                    offset=4,
                )
        elif values["response"] and len(data) == LLC_V1_BYTES:
            listed = min(count, (LLC_V1_BYTES - _RKEYS_AT) // _RKEYS.size)
        else:
            require_size(
                data, max(LLC_V1_BYTES, _RKEYS_AT + _RKEYS.size * count), "rkeys"
            )
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
        listed = count_entries("rkeys", self.rkeys, most)
        if self.count is not None and not (self.version == 2 and self.response):
            msg = "only a version 2 answer has a count"
            raise EncodeError(msg, field="count")
        room = (LLC_V1_BYTES - _RKEYS_AT) // _RKEYS.size
        field, wrong = (
            ("invalid_count", self.invalid_count)
            if self.version == 1
            else ("error_mask", self.error_mask)
        )
        if wrong:
            msg = f"version {self.version} has no {field}"
            raise EncodeError(msg, field=field)
        count = announced_count("count", listed, self.count, room)
        # An unknown version has no layout; build_message refuses it.
        layout = _DELETE_RKEYS.get(self.version, _DELETE_RKEYS[2])
        body = layout.build_from(self, count=count)
        keys = _RKEYS.build((rkey,) for rkey in self.rkeys)
        return build_message(self.TYPE, self.version, body + keys)

    def __str__(self) -> str:
        verdict = " refused" if self.refused else ""
        keys = ",".join(f"{rkey:#x}" for rkey in self.rkeys)
        return f"{self.title()}{verdict} rkeys={keys}"


_RKEYS_AT: Final = 8
