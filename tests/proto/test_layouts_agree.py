"""Double entry: layouts.toml against the construct layouts and the struct fast path.

Each table of layouts.toml is laid over a real message. Flipping a bit must change the
field that the table names for it, by the value that is read off the table alone, and
nothing else; writing the message again must give the flipped bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from smcproto import cdc
from smcproto.errors import DecodeError


@dataclass(frozen=True)
class Place:
    """Where a table lies in a vector, and under which path its fields are found."""

    table: str
    vector: str
    at: int = 0
    prefix: str = ""
    rename: str = ""
    """Path of the only value, when it is an entry of a tuple."""
    form: tuple[str, ...] = ()
    """Fields that decide the form of this very message, and so cannot change alone."""
    unused: tuple[str, ...] = ()
    """Fields that this very message does not use, and so ignores."""


# fmt: off
PLACES = [
    Place("proposal", "C4"),
    Place("proposal", "C1", unused=("typev2",)),
    Place("proposal_growth", "C4", 40),
    Place("ip_area", "C4", 80, "ip_area."),
    Place("ip_area", "C1", 40, "ip_area."),
    Place("ipv6_prefix", "C2", 48, "ip_area.ipv6_prefixes[0]."),
    Place(
        "proposal_v2_extension", "C4", 88, "v2.",
        unused=("ism_gid_count", "smcd_offset"),
    ),
    Place("proposal_v2_extension", "S5", 80, "v2."),
    Place("ueid", "C4", 128, rename="v2.eids[0]"),
    Place("smcd_extension", "S5", 152, "v2.smcd."),
    Place("ism_gid_entry", "S5", 210, "v2.smcd.gids[1]."),
    Place("trailer", "C4", 160),
    Place("trailer", "C6", 64),
    Place("trailer", "C13", 176),
    Place("trailer", "C9", 24),
    Place("trailer", "C11", 40),
    Place("accept", "C6"),
    Place("accept", "C12", form=("first_contact",)),
    Place("accept_v2", "C12", 64, "v2."),
    Place("first_contact", "C12", 104, "v2.first_contact."),
    Place("confirm", "C7"),
    Place("confirm", "C13"),
    Place("accept_v2", "C13", 64, "v2."),
    Place("first_contact", "C13", 104, "v2.first_contact."),
    Place("gid_list", "C13", 156),
    Place("gid", "C13", 160, rename="v2.gids[0]"),
    Place("smcd_accept", "S1"),
    Place("smcd_accept_v2", "S2", 32, "v2."),
    Place("decline", "C9"),
    Place("decline_v2", "C11"),
    Place("confirm_link", "L1"),
    Place("confirm_link_v2", "L20"),
    Place("add_link", "L5"),
    Place("add_link_v2", "L22"),
    Place("add_link_extension", "L22", 44),
    Place("rkey_pair", "L22", 72, "rkeys[0]."),
    Place("delete_link", "L8"),
    Place("delete_link_v2", "full_delete_link_v2"),
    Place("request_add_link", "full_request_add_link"),
    Place("gid", "full_request_add_link", 44, rename="gids[1]"),
    Place("confirm_rkey", "full_confirm_rkey"),
    Place("confirm_rkey_v2", "full_confirm_rkey_v2"),
    Place("confirm_rkey_continuation", "full_continuation"),
    Place("add_link_continuation", "full_add_link_continuation"),
    Place("delete_rkey", "full_delete_rkey"),
    Place("delete_rkey_v2", "full_delete_rkey_v2"),
    Place("test_link", "L18"),
    Place("test_link_v2", "full_test_link_v2"),
    Place("cdc", "D3"),
    Place("tcp_option", "T1"),
]
# fmt: on

# Messages in which every entry is present, for tables that list all of them.
FULL = {
    "full_delete_link_v2": "24002c2002" + "00" * 39,
    "full_confirm_rkey": "062c000002" + "11" * 38 + "00",
    "full_confirm_rkey_v2": "26002c0002" + "11" * 38 + "00",
    "full_continuation": "082c000003" + "11" * 39,
    "full_add_link_continuation": "032c00000202" + "00" * 2 + "11" * 32 + "00" * 4,
    "full_request_add_link": "25003c00" + "00" * 20 + "02" + "00" * 3 + "33" * 32,
    "full_delete_rkey": "092c00a008800000" + "11" * 32 + "00" * 4,
    "full_delete_rkey_v2": "29002ca009010000" + "11" * 36,
    "full_test_link_v2": "27002c80" + "22" * 16 + "00" * 24,
}


@pytest.fixture(params=PLACES, ids=lambda place: f"{place.table}-{place.vector}")
def place(request):
    return request.param


@pytest.fixture
def base(place, proto):
    if place.vector in FULL:
        return bytes.fromhex(FULL[place.vector])
    return proto.hex_of(place.vector)


@pytest.fixture
def parse(base, proto):
    if base[0] == 0xE2:
        return proto.parsers["clc"]
    if base[0] == 0xFE:
        return proto.parsers["cdc" if len(base) == 44 else "tcp_option"]
    return proto.parsers["llc"]


def first_bit(field: dict[str, Any]) -> int:
    return int(8 * field["byte"] + field.get("bit", 0))


def read_off(field: dict[str, Any], data: bytes, at: int) -> Any:
    """Take a field's value from the bytes, by its row alone."""
    shift = 8 * len(data) - 8 * at - first_bit(field) - field["width"]
    number = int.from_bytes(data, "big") >> shift & (1 << field["width"]) - 1
    match field.get("kind", "number"):
        case "bytes":
            return f"{number:0{field['width'] // 4}x}"
        case "text":
            padded = number.to_bytes(field["width"] // 8, "big")
            return padded.rstrip(b" ").decode("latin-1")
        case "flags":
            return number << 8 - field["width"]
    return number


def flips(field: dict[str, Any], base: bytes, at: int) -> list[bytes]:
    """Give the message with each bit of the field flipped."""
    results = []
    for bit in range(first_bit(field), first_bit(field) + field["width"]):
        flipped = bytearray(base)
        flipped[at + bit // 8] ^= 0x80 >> bit % 8
        results.append(bytes(flipped))
    return results


def test_the_tables_leave_no_bit_out(proto):
    for name, table in proto.load_toml("layouts.toml").items():
        position = 0
        for field in table["fields"]:
            assert first_bit(field) == position, (name, field)
            position += field["width"]
        assert position % 8 == 0, name
        assert table["section"].startswith(("RFC 7609 A.", "Linux smc_")), name


def test_every_table_is_used(proto):
    used = {place.table for place in PLACES}
    assert used == set(proto.load_toml("layouts.toml"))


def test_flipped_bits_change_their_field_and_nothing_else(place, base, parse, proto):
    fields = proto.load_toml("layouts.toml")[place.table]["fields"]
    original = proto.flatten(parse(base))
    for field in fields:
        if field.get("kind", "number") not in {"number", "bytes", "text", "flags"}:
            continue
        if field["name"] in place.form:
            continue
        path = place.rename or place.prefix + field["name"]
        assert original[path] == read_off(field, base, place.at)
        for flipped in flips(field, base, place.at):
            message = parse(flipped)
            changed = proto.flatten(message)
            assert changed.pop(path) == read_off(field, flipped, place.at), path
            assert changed == {k: v for k, v in original.items() if k != path}
            if field.get("kind") != "text" or not read_off(
                field, flipped, place.at
            ).endswith(" "):
                assert message.build() == flipped


def test_flipped_reserved_bits_change_nothing(place, base, parse, proto):
    for field in proto.load_toml("layouts.toml")[place.table]["fields"]:
        kind = field.get("kind")
        if kind in {"reserved", "ignored"} or field.get("name") in place.unused:
            for flipped in flips(field, base, place.at):
                assert parse(flipped) == parse(base), field
                assert parse(flipped).build() == parse(base).build(), field


def test_flipped_constants_are_refused(place, base, parse, proto):
    for field in proto.load_toml("layouts.toml")[place.table]["fields"]:
        if field.get("kind") not in {"constant", "length"}:
            continue
        for flipped in flips(field, base, place.at):
            with pytest.raises(DecodeError):
                parse(flipped)


def test_flipped_counts_are_refused_or_make_another_message(place, base, parse, proto):
    """Counts, types and versions decide the size or the form of what follows."""
    for field in proto.load_toml("layouts.toml")[place.table]["fields"]:
        decides = field.get("kind") in {"count", "structure", "type"}
        if not decides and field.get("name") not in place.form:
            continue
        if field["name"] in place.unused:
            continue
        for flipped in flips(field, base, place.at):
            try:
                message = parse(flipped)
            except DecodeError:
                continue
            assert message != parse(base), field


def test_zero_is_refused_where_it_means_nothing(place, base, parse, proto):
    for field in proto.load_toml("layouts.toml")[place.table]["fields"]:
        if field.get("kind") != "nonzero":
            continue
        start = place.at + field["byte"]
        size = field["width"] // 8
        for number in (0, 1, 7, 255):
            data = base[:start] + number.to_bytes(size, "big") + base[start + size :]
            if number:
                message = parse(data)
                assert proto.flatten(message)[field["name"]] == number
                assert message.build() == data
            else:
                with pytest.raises(DecodeError):
                    parse(data)


def test_kinds_are_known(proto):
    kinds = Counter(
        field.get("kind", "number")
        for table in proto.load_toml("layouts.toml").values()
        for field in table["fields"]
    )
    assert set(kinds) == {
        "number", "bytes", "text", "flags", "nonzero", "structure", "count",
        "constant", "length", "type", "ignored", "reserved",
    }  # fmt: skip


def test_the_struct_path_of_cdc_agrees(proto):
    base = proto.hex_of("D3")
    for field in proto.load_toml("layouts.toml")["cdc"]["fields"]:
        for flipped in flips(field, base, 0):
            if field.get("kind") in {"constant", "length"}:
                with pytest.raises(DecodeError):
                    cdc.unpack(flipped)
                continue
            assert unpacked_fields(flipped) == {
                row["name"]: read_off(row, flipped, 0)
                for row in proto.load_toml("layouts.toml")["cdc"]["fields"]
                if row.get("kind", "number") in {"number", "flags"}
            }
            if field.get("kind") == "reserved":
                assert cdc.pack(*cdc.unpack(flipped)) == base
            else:
                assert cdc.pack(*cdc.unpack(flipped)) == flipped


def unpacked_fields(data: bytes) -> dict[str, int]:
    """Give what the fast path reads, one value for each field."""
    sequence, alert_token, producer, consumer, flags = cdc.unpack(data)
    return {
        "sequence": sequence,
        "alert_token": alert_token,
        "producer_wrap": producer >> 32,
        "producer_count": producer & 0xFFFFFFFF,
        "consumer_wrap": consumer >> 32,
        "consumer_count": consumer & 0xFFFFFFFF,
        "producer_flags": flags >> 8,
        "state_flags": flags & 0xFF,
    }
