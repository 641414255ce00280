"""The second reader: it finds what it must, and a decoder that is wrong is noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smcproto import clc, llc
from smcproto.errors import DecodeError
from tests.fuzz import targets_wire, wire_checker
from tests.fuzz.wire_checker import Refused

CHECKERS = {
    "clc": wire_checker.clc,
    "llc": wire_checker.llc,
    "cdc": wire_checker.cdc,
    "tcp_option": wire_checker.tcp_option,
}


@pytest.mark.parametrize("plane", CHECKERS)
def test_every_vector_is_read(plane):
    rows = targets_wire.rows(plane)
    assert rows
    for row in rows:
        data = bytes.fromhex(row["hex"])
        values = CHECKERS[plane](data).values
        assert values or plane == "tcp_option", row["id"]


@pytest.mark.parametrize("plane", CHECKERS)
def test_every_invalid_vector_is_refused(plane):
    rows = [row for row in targets_wire.rows("invalid") if row["plane"] == plane]
    assert rows
    for row in rows:
        with pytest.raises(Refused):
            CHECKERS[plane](bytes.fromhex(row["hex"]))


def accept() -> bytes:
    rows = {row["id"]: row["hex"] for row in targets_wire.rows("clc")}
    return bytes.fromhex(rows["C6"])


def test_values_come_from_the_table():
    reader = wire_checker.clc(accept())
    message = clc.Accept.parse(accept())
    assert reader.values["rkey"] == message.rkey
    assert reader.values["peer_id"] == message.peer_id
    assert bytes(reader.again) == accept()


def test_reserved_bytes_are_cleared_when_written_again():
    data = bytearray(accept())
    data[51] = data[60] = 0xFF
    assert bytes(wire_checker.clc(bytes(data)).again) == accept()


def refuse_all(data: bytes) -> object:
    raise DecodeError("no", field="length")


def off_by_one(data: bytes) -> object:
    message = clc.parse(data)
    assert isinstance(message, clc.Accept)
    return replace(message, rkey=message.rkey ^ 1)


class Forgetful(clc.Decline):
    """Writes reserved bytes as it found them."""

    def build(self) -> bytes:
        return clc.Decline.build(self)[:-5] + b"\1" + clc.Decline.build(self)[-4:]


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (refuse_all, "only the decoder refuses"),
        (off_by_one, "rkey: "),
        (lambda data: llc.TestLink(2, response=False), "is not in TestLink"),
    ],
)
def test_a_decoder_that_is_wrong_is_noticed(decoder, words):
    run = targets_wire.differential(decoder, wire_checker.clc)
    with pytest.raises(AssertionError, match=words):
        run(accept())


def test_a_decoder_that_takes_too_much_is_noticed():
    run = targets_wire.differential(lambda data: clc.parse(data[:68]), wire_checker.clc)
    run(accept())
    with pytest.raises(AssertionError, match="only the table refuses"):
        run(accept() + b"\0")


def test_a_builder_that_keeps_reserved_bytes_is_noticed():
    decline = Forgetful(1, False, bytes(8), 0x03010000)
    run = targets_wire.differential(lambda data: decline, wire_checker.clc)
    with pytest.raises(AssertionError, match="written again"):
        run(clc.Decline(1, False, bytes(8), 0x03010000).build())
