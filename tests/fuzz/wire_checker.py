"""A second reader of every message, made of the tables and of nothing else.

It takes the bits that ``proto/layouts.toml`` names (transcribed by hand from the RFC's
figures) and the rules about lengths and counts written out below, and shares no line
with ``smcproto``. Both readers must refuse the same bytes, read the same values, and
agree on what the message looks like when it is written again: everything reserved or
unused is zero then.

Source: RFC 7609 appendix A; version 2: Linux smc_clc.h and smc_llc.h.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

PROTO = Path(__file__).resolve().parents[2] / "proto"
SMCR, SMCD = bytes.fromhex("e2d4c3d9"), bytes.fromhex("e2d4c3c4")
PROPOSAL, ACCEPT, CONFIRM, DECLINE = 1, 2, 3, 4
ONLY_R, ONLY_D, NOTHING = 0, 1, 2
NOT_KEPT = frozenset({"reserved", "ignored"})
NOT_TOLD = NOT_KEPT | {"constant", "length", "type", "count"}


class Refused(Exception):
    """The bytes are no message; the text says why."""


class Row(NamedTuple):
    """One field of a table, as shifts of the whole table's number."""

    name: str
    kind: str
    shift: int
    ones: int
    size: int


class Table(NamedTuple):
    """A run of bytes."""

    size: int
    kept: int
    """The bits that are written again."""
    rows: dict[str, Row]


def _table(fields: list[dict[str, Any]]) -> Table:
    total = sum(field["width"] for field in fields)
    kept, rows = 0, {}
    for field in fields:
        width, kind = field["width"], field.get("kind", "number")
        shift = total - 8 * field["byte"] - field.get("bit", 0) - width
        ones = (1 << width) - 1
        if kind not in NOT_KEPT:
            kept |= ones << shift
        if "name" in field:
            rows[field["name"]] = Row(field["name"], kind, shift, ones, width // 8)
    return Table(total // 8, kept, rows)


TABLES = {
    name: _table(table["fields"])
    for name, table in tomllib.loads((PROTO / "layouts.toml").read_text()).items()
}


class Reader:
    """Reads tables at places; keeps the values and the bytes to be written again."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.values: dict[str, Any] = {}
        self.again = bytearray(len(data))

    def look(self, name: str, at: int) -> dict[str, int]:
        """Give all fields of a table as numbers; nothing is kept."""
        table = TABLES[name]
        need(at + table.size <= len(self.data), f"{name} at {at} does not fit")
        number = int.from_bytes(self.data[at : at + table.size], "big")
        return {row.name: number >> row.shift & row.ones for row in table.rows.values()}

    def take(
        self,
        name: str,
        at: int = 0,
        prefix: str = "",
        *,
        rename: str = "",
        unused: tuple[str, ...] = (),
    ) -> dict[str, int]:
        """Read a table and keep its values.

        Args:
            name: Of the table.
            at: Where it lies.
            prefix: Goes before the names of its values.
            rename: Name of its only value.
            unused: Fields that mean nothing in this message.
        """
        table, numbers = TABLES[name], self.look(name, at)
        kept = table.kept
        for field in unused:
            kept &= ~(table.rows[field].ones << table.rows[field].shift)
        number = int.from_bytes(self.data[at : at + table.size], "big") & kept
        self.again[at : at + table.size] = number.to_bytes(table.size, "big")
        for row in table.rows.values():
            if row.kind not in NOT_TOLD and row.name not in unused:
                value = _value(row, numbers[row.name])
                self.values[rename or prefix + row.name] = value
        return numbers


def _value(row: Row, number: int) -> Any:
    match row.kind:
        case "bytes":
            return number.to_bytes(row.size, "big")
        case "text":
            return number.to_bytes(row.size, "big").rstrip(b" ").decode("latin-1")
        case "flags":
            return number << 8 - row.ones.bit_length()
    return number


def need(condition: bool, why: str) -> None:
    """Refuse the bytes unless something is so."""
    if not condition:
        raise Refused(why)


# CLC


def clc(data: bytes) -> Reader:
    """Read a CLC message.

    Raises:
        Refused: It is none.
    """
    need(len(data) >= 8, "no header")
    magic, kind, version = data[:4], data[4], data[7] >> 4
    need(magic in (SMCR, SMCD), "eye catcher")
    need(PROPOSAL <= kind <= DECLINE, "type")
    need(version >= 1, "version 0")
    answer = kind in (ACCEPT, CONFIRM)
    need(version <= 2 or not answer, "version of an answer")
    need(magic == SMCR or answer, "SMC-D has no such message")
    length = int.from_bytes(data[5:7], "big")
    need(length == len(data), "length")
    need(length >= 28, "too short for any message")
    need(data[-4:] == magic, "trailer")
    reader = Reader(data)
    if kind == PROPOSAL:
        _proposal(reader, version)
    elif kind == DECLINE:
        need(length == (28 if version == 1 else 44), "length of a Decline")
        reader.take("decline" if version == 1 else "decline_v2")
    elif magic == SMCD:
        _smcd_answer(reader, version)
    else:
        _answer(reader, kind, version)
    reader.again[-4:] = magic
    return reader


def _proposal(reader: Reader, version: int) -> None:
    size = len(reader.data)
    need(52 <= size <= 652, "length of a Proposal")
    end = size - 4
    numbers = reader.look("proposal", 0)
    typev1, offset = numbers["typev1"], numbers["iparea_offset"]
    typev2 = numbers["typev2"] if version > 1 else NOTHING
    reader.take("proposal", unused=() if version > 1 else ("typev2",))
    need(version > 1 or typev1 != NOTHING, "nothing is offered")
    if typev1 == NOTHING:
        need(offset in (0, 40), "offset without an IP area")
    elif typev2 == NOTHING:
        need(offset <= 40, "offset of the IP area")
    else:
        need(offset == 40, "offset of the IP area in version 2")
    position, extension = 40 + offset, 0
    if typev1 == NOTHING or offset == 40:
        position = 80
        extension = reader.look("proposal_growth", 40)["v2_ext_offset"]
        is_used = typev2 != NOTHING
        need(position <= end, "growth area")
        unused = () if is_used else ("v2_ext_offset",)
        reader.take("proposal_growth", 40, unused=unused)
        extension = extension if is_used else 0
    need(position <= end, "growth area")
    if typev1 != NOTHING:
        need(position + 8 <= end, "IP area")
        count = reader.take("ip_area", position, "ip_area.")["ipv6_prefix_count"]
        position += 8
        need(count <= 8 and position + 17 * count <= end, "IPv6 prefixes")
        for number in range(count):
            prefix = f"ip_area.ipv6_prefixes[{number}]."
            reader.take("ipv6_prefix", position, prefix)
            position += 17
    if extension:
        need(52 + extension == position, "extension does not follow")
        position = _proposal_extension(
            reader, position, end, smcd=typev2 in (ONLY_D, 3)
        )
    need(position == end, "bytes are left over")


def _proposal_extension(reader: Reader, at: int, end: int, *, smcd: bool) -> int:
    need(at + 40 <= end, "version 2 extension")
    numbers = reader.look("proposal_v2_extension", at)
    has_part = smcd and numbers["smcd_offset"] > 0
    unused = () if has_part else ("ism_gid_count", "smcd_offset")
    reader.take("proposal_v2_extension", at, "v2.", unused=unused)
    position, count = at + 40, numbers["eid_count"]
    need(count <= 8 and position + 32 * count <= end, "UEIDs")
    for number in range(count):
        reader.take("ueid", position, rename=f"v2.eids[{number}]")
        position += 32
    if has_part:
        need(at + 8 + numbers["smcd_offset"] == position, "SMC-D part does not follow")
        count = numbers["ism_gid_count"]
        need(count <= 8 and position + 48 + 10 * count <= end, "SMC-D part")
        # Its table names the SEID and what is reserved behind it, 20 bytes.
        reader.take("smcd_extension", position, "v2.smcd.")
        position += 48
        for number in range(count):
            reader.take("ism_gid_entry", position, f"v2.smcd.gids[{number}].")
            position += 10
    return position


def _answer(reader: Reader, kind: int, version: int) -> None:
    size = len(reader.data)
    need(size >= 68, "too short")
    numbers = reader.take("accept" if kind == ACCEPT else "confirm")
    need(numbers["typev1"] == ONLY_R, "path of an answer")
    need(numbers["rmbe_index"] > 0, "index 0")
    if version == 1:
        need(size == 68, "length in version 1")
        return
    need(size >= 108, "length in version 2")
    reader.take("accept_v2", 64, "v2.")
    if size == 108:
        need(not numbers["first_contact"], "first contact without its extension")
        return
    # A Confirm may leave the flag out, as the RFC's does.
    need(bool(numbers["first_contact"]) or kind == CONFIRM, "an extension too many")
    need(size >= 160, "first contact extension")
    reader.take("first_contact", 104, "v2.first_contact.")
    if kind == ACCEPT:
        need(size == 160, "length of an Accept")
        return
    need(164 <= size <= 1024, "length of a Confirm")
    count = reader.take("gid_list", 156)["gid_count"]
    need(size == 164 + 16 * count, "GIDs")
    for number in range(count):
        reader.take("gid", 160 + 16 * number, rename=f"v2.gids[{number}]")


def _smcd_answer(reader: Reader, version: int) -> None:
    size = len(reader.data)
    need(size >= 48, "too short")
    head = TABLES["smcd_accept"]
    numbers = reader.take("smcd_accept")
    need(numbers["typev1"] == ONLY_D, "path of an answer")
    assert head.size == 44, "32 bytes, and what version 1 reserves"
    if version == 1:
        need(size == 48, "length in version 1")
        return
    tail = TABLES["smcd_accept_v2"].size
    need(size >= 32 + tail + 4, "length in version 2")
    reader.take("smcd_accept_v2", 32, "v2.")
    contact = 32 + tail
    rest = size - 4 - contact
    if rest == 0:
        return
    # The short form of release 0 ends behind the host name.
    need(rest in (36, 52), "first contact extension")
    if rest == 52:
        release = reader.take("first_contact", contact, "v2.first_contact.")["release"]
    else:
        padded = Reader(reader.data[contact : contact + 36] + bytes(16))
        release = padded.take("first_contact", 0, "v2.first_contact.")["release"]
        reader.values |= padded.values
        reader.again[contact : contact + 36] = padded.again[:36]
    need((release == 0) == (rest == 36), "form of another release")


# LLC

_SINGLE = {0x01: "confirm_link", 0x04: "delete_link", 0x07: "test_link"}


def llc(data: bytes) -> Reader:
    """Read an LLC message.

    Raises:
        Refused: It is none.
    """
    size = len(data)
    need(44 <= size <= 8192, "length")
    kind, version = data[0] & ~0x20, 2 if data[0] & 0x20 else 1
    need(1 <= kind <= 9, "type")
    need(version == 1 or kind not in (3, 8), "not in version 2")
    need(version == 2 or kind != 5, "not in version 1")
    need(version == 2 or (size == 44 and data[1] == 44), "length in version 1")
    reader = Reader(data)
    suffix = "" if version == 1 else "_v2"
    if kind in _SINGLE:
        need(size == 44, "length")
        reader.take(_SINGLE[kind] + suffix)
    else:
        _OTHERS[kind](reader, suffix)
    if version == 2:
        reader.again[1:3] = size.to_bytes(2, "big")
    return reader


def _add_link(reader: Reader, suffix: str) -> None:
    size = len(reader.data)
    numbers = reader.look("add_link" + suffix, 0)
    told = ("mac", "gid", "qp_number", "link_number", "mtu_code", "psn")
    need(
        bool(numbers["response"]) or any(numbers[name] for name in told),
        "an invitation of zeros",
    )
    refusal = bool(numbers["response"]) and bool(numbers["rejected"])
    unused = () if suffix or refusal else ("reject_reason",)
    reader.take("add_link" + suffix, unused=unused)
    if size == 44:
        return
    count, rest = divmod(size - 72, 16)
    need(0 <= count <= 255 and rest == 0, "keys")
    reader.take("add_link_extension", 44)
    reader.again[70:72] = count.to_bytes(2, "big")
    for number in range(count):
        reader.take("rkey_pair", 72 + 16 * number, f"rkeys[{number}].")


def _add_link_continuation(reader: Reader, suffix: str) -> None:
    del suffix
    count = reader.look("add_link_continuation", 0)["remaining"]
    _listed(reader, "add_link_continuation", "rkeys", min(count, 2), 2)


def _request_add_link(reader: Reader, suffix: str) -> None:
    del suffix
    count = reader.take("request_add_link")["gid_count"]
    need(len(reader.data) == max(44, 28 + 16 * count), "GIDs")
    for number in range(count):
        reader.take("gid", 28 + 16 * number, rename=f"gids[{number}]")


def _confirm_rkey(reader: Reader, suffix: str) -> None:
    need(len(reader.data) == 44, "length")
    table = "confirm_rkey" + suffix
    count = reader.look(table, 0)["other_count"]
    _listed(reader, table, "other_links", min(count, 2), 2)


def _confirm_rkey_continuation(reader: Reader, suffix: str) -> None:
    del suffix
    table = "confirm_rkey_continuation"
    count = reader.look(table, 0)["remaining"]
    _listed(reader, table, "other_links", min(count, 3), 3)


def _delete_rkey(reader: Reader, suffix: str) -> None:
    data, size = reader.data, len(reader.data)
    count, response = data[4], data[3] >> 7
    if not suffix:
        need(count <= 8, "keys")
        _listed(reader, "delete_rkey", "rkeys", count, 8)
        return
    # Linux answers with the count alone, in the shortest message.
    listed = min(count, 9) if response and size == 44 else count
    need(size == 44 if listed < 9 else size == 8 + 4 * listed, "keys")
    _listed(reader, "delete_rkey_v2", "rkeys", min(listed, 9), 9)
    for number in range(9, listed):
        start = 8 + 4 * number
        reader.again[start : start + 4] = data[start : start + 4]
        key = int.from_bytes(data[start : start + 4], "big")
        reader.values[f"rkeys[{number}]"] = key


def _listed(reader: Reader, table: str, name: str, count: int, most: int) -> None:
    """Take a table with room for some entries, of which only ``count`` are used."""
    ends = {f"{name}[{number}]" for number in range(count, most)}
    rows = TABLES[table].rows
    unused = tuple(row for row in rows if row.partition(".")[0] in ends)
    reader.take(table, unused=unused)


_OTHERS: dict[int, Callable[[Reader, str], None]] = {
    2: _add_link,
    3: _add_link_continuation,
    5: _request_add_link,
    6: _confirm_rkey,
    8: _confirm_rkey_continuation,
    9: _delete_rkey,
}


# CDC and the TCP option


def cdc(data: bytes) -> Reader:
    """Read a CDC message.

    Raises:
        Refused: It is none.
    """
    need(len(data) == 44 and data[0] == 0xFE and data[1] == 44, "head")
    reader = Reader(data)
    reader.take("cdc")
    return reader


def tcp_option(data: bytes) -> Reader:
    """Find the option among those of a segment.

    Raises:
        Refused: It is not there.
    """
    need(len(data) <= 40, "more than a segment has")
    rest = data
    while rest and rest[0] != 0:
        if rest[0] == 1:
            rest = rest[1:]
            continue
        need(len(rest) >= 2 and 2 <= rest[1] <= len(rest), "length of an option")
        option, rest = rest[: rest[1]], rest[rest[1] :]
        if option[0] == 254 and option[2:] == SMCR:
            reader = Reader(option)
            reader.take("tcp_option")
            return reader
    raise Refused("no such option")
