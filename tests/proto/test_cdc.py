"""CDC: the construct layout and the struct path are the same."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smcproto.cdc import CdcMessage, pack, unpack
from smcproto.constants import ConnectionStateFlags, ProducerFlags
from smcproto.errors import DecodeError, EncodeError


def unsigned(width: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << width) - 1)


PRODUCER_FLAGS = unsigned(5).map(lambda bits: ProducerFlags(bits << 3))
STATE_FLAGS = unsigned(3).map(lambda bits: ConnectionStateFlags(bits << 5))
MESSAGES = st.builds(
    CdcMessage,
    sequence=unsigned(16),
    alert_token=unsigned(32),
    producer_wrap=unsigned(16),
    producer_count=unsigned(32),
    consumer_wrap=unsigned(16),
    consumer_count=unsigned(32),
    producer_flags=PRODUCER_FLAGS,
    state_flags=STATE_FLAGS,
)


def fast_form(message: CdcMessage) -> tuple[int, int, int, int, int]:
    """Give what ``pack`` takes and ``unpack`` gives."""
    return (
        message.sequence,
        message.alert_token,
        message.producer_wrap << 32 | message.producer_count,
        message.consumer_wrap << 32 | message.consumer_count,
        message.producer_flags << 8 | message.state_flags,
    )


@given(MESSAGES)
def test_both_paths_write_the_same_bytes(message):
    assert pack(*fast_form(message)) == message.build()


@given(MESSAGES)
def test_what_is_built_is_read_again(message):
    data = message.build()
    assert CdcMessage.parse(data) == message
    assert unpack(data) == fast_form(message)


@given(st.binary(min_size=42, max_size=42))
def test_both_paths_read_the_same_out_of_any_bytes(body):
    """Reserved bits at random: they are ignored, and written as zeros."""
    data = b"\xfe," + body
    message = CdcMessage.parse(data)
    assert unpack(data) == fast_form(message)
    assert unpack(pack(*unpack(data))) == unpack(data)


@given(st.binary(max_size=100) | st.binary(min_size=44, max_size=44))
@example(b"\xfe\x2c" + bytes(42))
def test_both_paths_refuse_the_same(data):
    problems = []
    for read in (CdcMessage.parse, unpack):
        try:
            read(data)
        except DecodeError as error:
            problems.append((error.field, error.offset, str(error)))
        else:
            problems.append(("", None, ""))
    assert problems[0] == problems[1]


@pytest.mark.parametrize(
    "values",
    [
        (-1, 0, 0, 0, 0),
        (1 << 16, 0, 0, 0, 0),
        (0, 1 << 32, 0, 0, 0),
        (0, 0, 1 << 48, 0, 0),
        (0, 0, 0, 1 << 48, 0),
        (0, 0, -1, 0, 0),
        (0, 0, 0, -1, 0),
        (0, 0, 0, 0, 1),
        (0, 0, 0, 0, 1 << 16),
        (0, 0, 0, 0, 0x0700),
    ],
)
def test_what_does_not_fit_is_not_packed(values):
    with pytest.raises(EncodeError):
        pack(*values)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (CdcMessage(1 << 16, 0, 0, 0, 0, 0), "sequence"),
        (CdcMessage(0, -1, 0, 0, 0, 0), "alert_token"),
        (CdcMessage(0, 0, 0, 1 << 32, 0, 0), "producer_count"),
        (CdcMessage(0, 0, 0, 0, 0, 0, ProducerFlags(1)), "producer_flags"),
        (
            CdcMessage(0, 0, 0, 0, 0, 0, state_flags=ConnectionStateFlags(0x100)),
            "state_flags",
        ),
    ],
)
def test_what_does_not_fit_is_not_built(message, field):
    with pytest.raises(EncodeError) as caught:
        message.build()
    assert caught.value.field == field


def test_flags_are_named_when_logged():
    message = CdcMessage(
        1, 2, 0, 5, 0, 0, ProducerFlags.WRITER_BLOCKED, ConnectionStateFlags.CLOSED
    )
    assert str(message) == (
        "CDC sequence=1 token=0x2 producer=0:5 consumer=0:0 WRITER_BLOCKED CLOSED"
    )
