"""Bytes find their plane, and every message can be said in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smcproto.cdc import CdcMessage
from smcproto.clc import Accept, Confirm, Decline, Proposal
from smcproto.decode import Line, Plane, decode, explain
from smcproto.errors import DecodeError
from smcproto.llc import AddLink, RkeyPair
from smcproto.tcp_option import SmcOption

PLANES = {
    "clc": {Plane.CLC},
    "llc": {Plane.LLC_V1, Plane.LLC_V2},
    "cdc": {Plane.CDC},
    "tcp_option": {Plane.TCP_OPTION},
}


def test_a_vector_finds_its_plane(vector, proto):
    data = bytes.fromhex(vector["hex"])
    plane, message = decode(data)
    assert plane in PLANES[vector["plane"]]
    assert message == proto.parsers[vector["plane"]](data)
    if vector["plane"] == "llc":
        assert (plane is Plane.LLC_V2) is (data[0] >= 0x20)


def test_a_vector_is_said_in_words(vector, proto):
    message = proto.parsers[vector["plane"]](bytes.fromhex(vector["hex"]))
    lines = explain(message)
    assert lines[0].field == "message"
    assert lines[0].value == vector["message"]
    for line in lines:
        assert line.words
        assert line.value
        assert "\n" not in line.value + line.words
    said = {line.field for line in lines}
    for path in vector["fields"]:
        whole = path.rpartition("[")[0] if path.endswith("]") else path
        assert path in said or whole in said, path


@given(st.binary(max_size=120))
def test_arbitrary_bytes_are_refused_or_a_message(data):
    try:
        _, message = decode(data)
    except DecodeError:
        return
    assert explain(message)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "length"),
        (b"\xe2\xd4\xc3\xd9", "length"),
        (b"\xe2\xd4\xc3\xd8" + bytes(60), "type"),
        (b"\xfe\x2c", "length"),
        (b"\xfe\x2d" + bytes(42), "length"),
        (bytes(41), "length"),
        (bytes(40), "kind"),
        (bytes(44), "type"),
        (b"GET / HTTP/1.1\r\n", "length"),
    ],
)
def test_what_is_no_message_says_why(data, field):
    with pytest.raises(DecodeError) as caught:
        decode(data)
    assert caught.value.field == field


def lines_of(message) -> dict[str, Line]:
    return {line.field: line for line in explain(message)}


def test_a_decline_is_said_with_meaning_and_advice(proto):
    line = lines_of(Decline.parse(proto.hex_of("C11")))["diagnosis"]
    assert line.value == "NO_SMCR_DEVICE (03030002)"
    assert "no SMC-R (RoCE) device" in line.words
    assert "RDMA device is up" in line.words

    unknown = Decline(2, False, bytes(8), 0x12345678)
    line = lines_of(unknown)["diagnosis"]
    assert line.value == "12345678"
    assert "documentation of the peer's system" in line.words


def test_codes_are_said_by_name_and_meaning(proto):
    lines = lines_of(Accept.parse(proto.hex_of("C12")))
    assert lines["mtu_code"].value == "BYTES_4096 (5)"
    assert lines["mtu_code"].words.endswith("4096 bytes")
    assert lines["rmbe_size_code"].words.endswith("64 KiB")
    assert lines["v2.first_contact.os_type"].value == "LINUX (2)"
    assert lines["gid"].value == "::ffff:192.0.2.2"
    assert lines["mac"].value == "02:00:5e:00:53:02"
    assert lines["first_contact"].value == "yes"
    assert lines["v2.eid"].value == "'SMCV2-TEST-EID'"
    assert lines["virtual_address"].value == "0x7f2222200000"


def test_lists_are_said_entry_by_entry(proto):
    lines = lines_of(Proposal.parse(proto.hex_of("C2")))
    assert lines["ip_area.subnet"].value == "0.0.0.0"
    assert lines["ip_area.ipv6_prefixes[0].length"].value == "64"
    assert lines["ip_area.ipv6_prefixes[0].prefix"].value.startswith("2001:0db8:")
    assert lines["typev1"].words.endswith("SMC-R")

    lines = lines_of(Confirm.parse(proto.hex_of("C13")))
    assert lines["v2.gids"].value == "::ffff:192.0.2.1"

    link = AddLink.parse(proto.hex_of("L22"))
    assert lines_of(link)["rkeys[0].new_rkey"].value == "0x22222302"
    assert isinstance(link.rkeys[0], RkeyPair)


def test_an_empty_list_is_said_to_be_empty(proto):
    lines = lines_of(AddLink.parse(proto.hex_of("L3")))
    assert lines["rkeys"].value == "none"
    assert "client_target_gid" not in lines


def test_flags_are_said_by_name(proto):
    lines = lines_of(CdcMessage.parse(proto.hex_of("D4")))
    assert lines["producer_flags"].value == "URGENT_PENDING URGENT_PRESENT"
    assert lines["state_flags"].value == "none"


def test_text_of_a_peer_cannot_reach_a_terminal_raw(proto):
    data = bytearray(proto.hex_of("C12"))
    data[108:116] = b"\x1b[2J\xff\n\t\0"
    lines = lines_of(Accept.parse(bytes(data)))
    assert lines["v2.first_contact.host_name"].value == r"'\x1b[2J\xff\n\t\x00'"


def test_the_option_says_all_by_being_there():
    assert explain(SmcOption()) == [
        Line(
            "message",
            "SmcOption",
            "TCP option on SYN and SYN-ACK: the sender speaks SMC-R",
        )
    ]
