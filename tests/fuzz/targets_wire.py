"""Fuzz targets for the decoders: each against the tables of `wire_checker`.

Whatever the bytes, a decoder gives a message or ``DecodeError``; and it does so when,
and only when, the second reader does, with the same values. What was accepted and is
written again gives the same bytes with everything reserved cleared, and reads the same.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from smcproto import cdc, clc, decode, llc, tcp_option
from smcproto.errors import DecodeError
from tests.fuzz import wire_checker
from tests.fuzz.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TARGETS"]


def flatten(part: Any, prefix: str, into: dict[str, Any]) -> None:
    """Map the paths of a message's values to them; what is not there has no path."""
    names = _names(type(part))
    for name in names:
        value = getattr(part, name)
        if value is None:
            continue
        path = prefix + name
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            for number, entry in enumerate(value):
                if hasattr(entry, "_fields"):
                    flatten(entry, f"{path}[{number}].", into)
                else:
                    into[f"{path}[{number}]"] = entry
        elif is_dataclass(value):
            flatten(value, path + ".", into)
        else:
            into[path] = value


_known: dict[type, tuple[str, ...]] = {}


def _names(kind: type) -> tuple[str, ...]:
    names = _known.get(kind)
    if names is None:
        if is_dataclass(kind):
            names = tuple(field.name for field in fields(kind))
        else:
            names = kind._fields  # type: ignore[attr-defined]
        _known[kind] = names
    return names


NOT_IN_TABLES = {
    # Follow from the frame, or stand for what the tables call a count.
    "version", "iparea_offset", "remaining", "other_count", "count",
}  # fmt: skip


def compare(message: Any, second: wire_checker.Reader) -> None:
    """Hold a message against what the second reader found."""
    read: dict[str, Any] = {}
    flatten(message, "", read)
    for path, value in second.values.items():
        # A field that this form of the message has not got reads as its default.
        if path in NOT_IN_TABLES:
            continue
        assert path in read, f"{path} is not in {message!r}"
        assert read[path] == value, f"{path}: {read[path]!r}, the table says {value!r}"
    for path in read.keys() - second.values.keys() - NOT_IN_TABLES:
        plain = read[path]
        assert not plain or set(bytes(plain)) == {0}, f"{path} = {plain!r}: from where?"


def differential(
    parse: Callable[[bytes], Any], check: Callable[[bytes], wire_checker.Reader]
) -> Callable[[bytes], None]:
    """Make a target of a decoder and its second reader."""

    def run(data: bytes) -> None:
        try:
            message = parse(data)
        except DecodeError as error:
            try:
                check(data)
            except wire_checker.Refused:
                return
            problem = f"only the decoder refuses: {error}"
            raise AssertionError(problem) from error
        try:
            second = check(data)
        except wire_checker.Refused as error:
            problem = f"only the table refuses ({error}): {message}"
            raise AssertionError(problem) from error
        compare(message, second)
        built = message.build()
        assert built == second.again, f"written again: {built.hex()}"
        if built != data:
            assert parse(built) == message

    return run


def _cdc(data: bytes) -> None:
    _cdc_layout(data)
    try:
        fast = cdc.unpack(data)
    except DecodeError:
        fast = None
    try:
        second = wire_checker.cdc(data)
    except wire_checker.Refused:
        assert fast is None
        return
    assert fast is not None
    values = second.values
    assert fast == (
        values["sequence"],
        values["alert_token"],
        values["producer_wrap"] << 32 | values["producer_count"],
        values["consumer_wrap"] << 32 | values["consumer_count"],
        values["producer_flags"] << 8 | values["state_flags"],
    )
    assert cdc.pack(*fast) == second.again


_cdc_layout = differential(cdc.CdcMessage.parse, wire_checker.cdc)


def _clc(data: bytes) -> None:
    _clc_message(data)
    # The header alone decides how much is read from a stream: never less than itself,
    # and never more than a Proposal or Confirm can have.
    if len(data) >= 8:
        try:
            header = clc.parse_header(data[:8])
        except DecodeError:
            return
        assert 28 <= header.length <= 1024
        assert header.length == int.from_bytes(data[5:7], "big")


_clc_message = differential(clc.parse, wire_checker.clc)
_OPTION_BYTES = tcp_option.SmcOption().build()


def _tcp_option(data: bytes) -> None:
    try:
        option = tcp_option.SmcOption.parse(data)
    except DecodeError:
        option = None
    try:
        wire_checker.tcp_option(data)
    except wire_checker.Refused:
        assert option is None
        return
    assert option is not None
    assert option.build() == _OPTION_BYTES


_CHECKERS = {
    decode.Plane.CLC: wire_checker.clc,
    decode.Plane.LLC_V1: wire_checker.llc,
    decode.Plane.LLC_V2: wire_checker.llc,
    decode.Plane.CDC: wire_checker.cdc,
    decode.Plane.TCP_OPTION: wire_checker.tcp_option,
}


def _decode(data: bytes) -> None:
    """Also what people read: it must not fail on anything that was accepted."""
    try:
        plane, message = decode.decode(data)
    except DecodeError:
        return
    _CHECKERS[plane](data)
    lines = decode.explain(message)
    assert lines[0].field == "message"
    assert all(line.words for line in lines)
    assert str(message).isprintable() or plane is decode.Plane.CLC


def rows(name: str) -> list[dict[str, Any]]:
    """Give the rows of a file of golden messages."""
    text = (wire_checker.PROTO / "vectors" / f"{name}.json").read_text()
    found: list[dict[str, Any]] = json.loads(text)["vectors"]
    return found


def vectors(*planes: str) -> list[bytes]:
    """Give the golden messages of planes, and the invalid ones."""
    found = [row for plane in planes for row in rows(plane)]
    found += [row for row in rows("invalid") if row["plane"] in planes]
    return [bytes.fromhex(row["hex"]) for row in found]


TARGETS = [
    Target("clc", _clc, lambda: vectors("clc"), 700),
    Target(
        "llc", differential(llc.parse, wire_checker.llc), lambda: vectors("llc"), 400
    ),
    Target("cdc", _cdc, lambda: vectors("cdc"), 60),
    Target("tcp-option", _tcp_option, lambda: vectors("tcp_option"), 48),
    Target("decode", _decode, lambda: vectors("clc", "llc", "cdc", "tcp_option"), 700),
]
