"""The TCP option by which one end shows the other that it speaks SMC-R.

Decides its six bytes and finds them among the options of a segment. Does not set or
read options: ``pysmc.discovery`` does.

Source: RFC 7609 A.1 (the experimental option 254 of RFC 6994 with the eye catcher
for its identifier).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from smcproto.constants import EYECATCHER_SMCR
from smcproto.errors import DecodeError
from smcproto.layout import Buffer, Layout, constant

KIND: Final = 254
"""Experimental option. RFC 7609 A.1."""
OPTION_BYTES: Final = 6
OPTIONS_MAX_BYTES: Final = 40
"""All options of a TCP segment. RFC 9293 3.1."""
_END_OF_LIST: Final = 0
_NO_OPERATION: Final = 1

_OPTION: Final = Layout(
    "SMC-R TCP option",
    constant("kind", bytes((KIND,))),
    constant("length", bytes((OPTION_BYTES,))),
    constant("eyecatcher", EYECATCHER_SMCR),
)


@dataclass(frozen=True, slots=True)
class SmcOption:
    """The option; its presence is all that it says."""

    NOP_PADDED: ClassVar[bytes] = bytes((_NO_OPERATION, _NO_OPERATION))
    """What Linux puts in front, so that the options end at a multiple of four."""

    @classmethod
    def parse(cls, data: Buffer) -> SmcOption:
        """Find the option among the options of a segment.

        Args:
            data: All options, at most 40 bytes; also the option alone.

        Raises:
            DecodeError: It is not there, or the options are malformed before it.
        """
        options = bytes(data[: OPTIONS_MAX_BYTES + 1])
        if len(options) > OPTIONS_MAX_BYTES:
            msg = f"{len(data)} bytes: TCP options have at most {OPTIONS_MAX_BYTES}"
            raise DecodeError(
                msg,
                field="length",
                offset=OPTIONS_MAX_BYTES,
            )
        position = 0
        while position < len(options) and options[position] != _END_OF_LIST:
            if options[position] == _NO_OPERATION:
                position += 1
                continue
            size = _option_size(options, position)
            if _is_smc(options[position : position + size]):
                _OPTION.parse(options, position)
                return cls()
            position += size
        msg = "no SMC-R option among the TCP options"
        raise DecodeError(msg, field="kind", offset=position)

    def build(self) -> bytes:
        """Give the six bytes, without padding."""
        return _OPTION.build({})

    def __str__(self) -> str:
        return "TCP option 254: SMC-R"


def _option_size(options: bytes, position: int) -> int:
    """Give the size of the option at a position, which must lie inside."""
    size = options[position + 1] if position + 1 < len(options) else 0
    if size < 2 or position + size > len(options):
        msg = f"TCP option {options[position]} of {size} bytes does not fit"
        raise DecodeError(
            msg,
            field="length",
            offset=position + 1,
        )
    return size


def _is_smc(option: bytes) -> bool:
    """Tell whether an option is ours; other experiments share its kind."""
    return (
        option[0] == KIND
        and len(option) == OPTION_BYTES
        and option[2:] == EYECATCHER_SMCR
    )
