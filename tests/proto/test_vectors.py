"""Every vector is read to the fields beside it and written to the same bytes."""

from __future__ import annotations

from collections import Counter

import pytest

from smcproto.errors import DecodeError


def test_a_vector_is_read_to_its_fields(vector, proto):
    message = proto.parsers[vector["plane"]](bytes.fromhex(vector["hex"]))

    assert type(message).__name__ == vector["message"]
    found = proto.flatten(message)
    listed = vector["fields"]
    assert {path: found.get(path) for path in listed} == listed
    for path in found.keys() - listed.keys():
        assert found[path] == proto.default_of(message, path), path


def test_a_vector_is_written_again(vector, proto):
    message = proto.parsers[vector["plane"]](bytes.fromhex(vector["hex"]))

    assert message.build().hex() == vector.get("rebuilt", vector["hex"])
    assert type(message).parse(message.build()) == message


def test_a_vector_can_be_logged(vector, proto):
    message = proto.parsers[vector["plane"]](bytes.fromhex(vector["hex"]))

    assert len(str(message)) > 3
    assert "\n" not in str(message)
    assert str(message) != repr(message)


def test_a_vector_may_lie_in_any_buffer(vector, proto):
    data = bytes.fromhex(vector["hex"])
    parse = proto.parsers[vector["plane"]]

    assert parse(bytearray(data)) == parse(memoryview(data)) == parse(data)


def test_an_invalid_vector_is_refused(invalid_vector, proto):
    parse = proto.parsers[invalid_vector["plane"]]

    with pytest.raises(DecodeError) as caught:
        parse(bytes.fromhex(invalid_vector["hex"]))

    assert caught.value.field == invalid_vector["field"]


def test_every_prefix_is_refused_or_a_message(vector, proto):
    """A prefix of a message is a message only where the format allows for it."""
    data = bytes.fromhex(vector["hex"])
    parse = proto.parsers[vector["plane"]]
    accepted = []
    for size in range(len(data)):
        try:
            parse(data[:size])
        except DecodeError:
            continue
        accepted.append(size)

    if vector["plane"] == "tcp_option":  # The option may be followed by others.
        assert all(size >= 6 for size in accepted)
    elif vector["message"] == "AddLink":  # Keys, or the whole extension, left out.
        assert all(size in (44, 72) for size in accepted)
    else:
        assert accepted == []


def test_every_flipped_bit_is_refused_or_a_message(vector, proto):
    """What is accepted can be written, and is then read to the same message."""
    with proto.untraced():
        flip_every_bit(proto.parsers[vector["plane"]], bytes.fromhex(vector["hex"]))


def flip_every_bit(parse, data: bytes) -> None:
    original = parse(data)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 0x80 >> bit % 8
        try:
            message = parse(bytes(flipped))
        except DecodeError:
            continue
        if message != original:  # else the bit is reserved, and tested elsewhere
            assert parse(message.build()) == message, bit


def test_identifiers_and_bytes_are_unique(proto):
    vectors = proto.valid()
    for key in ("id", "hex"):
        counts = Counter(vector[key] for vector in vectors)
        assert [value for value, count in counts.items() if count > 1] == []


def test_every_vector_names_where_it_is_from(vector):
    assert vector["source"].startswith(("captured", "computed"))
    assert vector["section"].startswith(("RFC 7609", "Linux smc_"))
    assert vector["what"]


def test_invalid_vectors_are_as_many_as_valid_ones(proto):
    invalid = proto.load_invalid()
    planes = Counter(vector["plane"] for vector in invalid)
    for plane, count in Counter(vector["plane"] for vector in proto.valid()).items():
        assert planes[plane] >= count, plane
