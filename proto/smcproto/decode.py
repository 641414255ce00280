"""Tell what some bytes are, and say a message in words.

Decides which plane bytes belong to, and puts messages into lines that a person can
read. Knows nothing of captures or terminals: ``pysmc decode`` prints.

Source: RFC 7609 appendix A: each plane has its own first bytes. CLC begins with an
eye catcher, CDC with 0xFE and 44, LLC with its type, the TCP option with 254 and 6.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import IntEnum, IntFlag, StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from smcproto import words
from smcproto.cdc import CdcMessage
from smcproto.clc import ClcMessage
from smcproto.clc import parse as parse_clc
from smcproto.constants import (
    CDC_BYTES,
    CDC_TYPE,
    EYECATCHER_SMCD,
    EYECATCHER_SMCR,
    LLC_V1_BYTES,
)
from smcproto.errors import DecodeError
from smcproto.llc import LlcMessage
from smcproto.llc import parse as parse_llc
from smcproto.tcp_option import OPTIONS_MAX_BYTES, SmcOption

if TYPE_CHECKING:
    from smcproto.layout import Buffer

Message: TypeAlias = ClcMessage | LlcMessage | CdcMessage | SmcOption
"""Any message of SMC-R."""


class Plane(StrEnum):
    """Where a message travels."""

    CLC = "CLC"
    LLC_V1 = "LLC v1"
    LLC_V2 = "LLC v2"
    CDC = "CDC"
    TCP_OPTION = "TCP option"


class Line(NamedTuple):
    """One field of a message, for people."""

    field: str
    """Path in the message, such as ``v2.eids``."""
    value: str
    """The value as text."""
    words: str
    """What the field says, and what this value means."""


def decode(data: Buffer) -> tuple[Plane, Message]:
    """Find out what some bytes are and read them.

    Args:
        data: One whole message, or all TCP options of a segment.

    Returns:
        The plane and the message.

    Raises:
        DecodeError: They are no message of any plane; if they begin like one, the
            error is that of its plane.
    """
    head = bytes(data[:4])
    if head in (EYECATCHER_SMCR, EYECATCHER_SMCD):
        return Plane.CLC, parse_clc(data)
    if len(data) >= LLC_V1_BYTES:
        if head[0] == CDC_TYPE:
            return Plane.CDC, CdcMessage.parse(data)
        message = parse_llc(data)
        return Plane.LLC_V1 if message.version == 1 else Plane.LLC_V2, message
    if head[:2] == bytes((CDC_TYPE, CDC_BYTES)):
        return Plane.CDC, CdcMessage.parse(data)
    if 0 < len(data) <= OPTIONS_MAX_BYTES:
        return Plane.TCP_OPTION, SmcOption.parse(data)
    msg = f"{len(data)} bytes: no CLC, LLC or CDC message and no TCP option"
    raise DecodeError(msg, field="length", offset=0)


def explain(message: Message) -> list[Line]:
    """Say every field of a message in words.

    Args:
        message: What ``decode`` or any parser gave.

    Returns:
        Lines in the order of the fields; the first names the message.
    """
    name = type(message).__name__
    return [Line("message", name, words.MESSAGES[name]), *_lines(message, "")]


def _lines(part: object, prefix: str) -> list[Line]:
    """Say the fields of a message or of a part of it."""
    lines = []
    for name, value in _items(part):
        path = f"{prefix}{name}"
        if value is None:
            continue  # A part that is not there, or what is usual.
        if _is_part(value):
            lines += _lines(value, f"{path}.")
        elif isinstance(value, tuple) and value and _is_part(value[0]):
            for number, entry in enumerate(value):
                lines += _lines(entry, f"{path}[{number}].")
        else:
            lines.append(Line(path, _show(name, value), _say(name, value)))
    return lines


def _items(part: Any) -> list[tuple[str, Any]]:
    """List the fields of a dataclass or of a named tuple."""
    if is_dataclass(part):
        return [(field.name, getattr(part, field.name)) for field in fields(part)]
    return list(part._asdict().items())


def _is_part(value: object) -> bool:
    """Tell whether a value has fields of its own."""
    return is_dataclass(value) or hasattr(value, "_asdict")


def _say(name: str, value: Any) -> str:
    """Say what a field means, and this value if it is a code."""
    meaning = words.MEANINGS.get(name)
    return words.FIELDS[name] + (f": {meaning(value)}" if meaning else "")


def _show(name: str, value: Any) -> str:
    """Write a value as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(_show(name, entry) for entry in value) or "none"
    if isinstance(value, str):
        return ascii(value)
    if isinstance(value, bytes):
        return _show_bytes(name, value)
    if isinstance(value, IntFlag):
        return " ".join(flag.name or "" for flag in value) or "none"
    number = f"{value:08x}" if name == "diagnosis" else str(int(value))
    if isinstance(value, IntEnum):
        return f"{value.name} ({number})"
    return f"{value:#x}" if name in words.HEXADECIMAL else number


_V4_MAPPED: Final = bytes(10) + b"\xff\xff"


def _show_bytes(name: str, value: bytes) -> str:
    """Write bytes as what they are: an address where it is one."""
    if name == "mac":
        return value.hex(":")
    if name == "subnet" or value.startswith(_V4_MAPPED):
        dotted = ".".join(str(byte) for byte in value[-4:])
        return dotted if name == "subnet" else f"::ffff:{dotted}"
    if name in ("gid", "gids", "client_target_gid", "prefix"):
        return value.hex(":", 2)
    return value.hex()
