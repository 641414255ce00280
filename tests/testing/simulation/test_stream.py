"""A position-coded stream tells what is wrong, and where."""

from __future__ import annotations

import pytest

from pysmc.testing.simulation.stream import Flow, Flows, Receiver


def test_a_byte_follows_from_its_place() -> None:
    flow = Flow("a")
    whole = flow.at(0, 20_000)
    pieces = b"".join(flow.take(size) for size in (0, 1, 63, 64, 65, 4000, 9000, 6807))
    assert pieces == whole
    assert flow.position == 20_000
    for start in (0, 1, 63, 64, 100, 4095, 4096, 5000, 19_000):
        assert flow.at(start, 700) == whole[start : start + 700] + flow.at(
            20_000, max(0, start + 700 - 20_000)
        )
    assert Flow("a").at(0, 100) == whole[:100]
    assert Flow("b").at(0, 100) != whole[:100]


def test_right_bytes_are_right_in_any_pieces() -> None:
    flows = Flows("run")
    flow = flows.new("there")
    receiver = Receiver(flow, flows)
    data = flow.take(10_000)
    for start, end in ((0, 1), (1, 1), (1, 70), (70, 5000), (5000, 10_000)):
        assert receiver.receive(data[start:end]) is None
    assert receiver.position == 10_000


def wrong(change: str) -> str | None:
    flows = Flows("run")
    flow, other = flows.new("there"), flows.new("back")
    receiver = Receiver(flow, flows)
    data = flow.take(1000)
    other.take(500)
    assert receiver.receive(data[:100]) is None
    changed = {
        "loss": data[120:200],
        "twice": data[90:190],
        "swap": data[110:120] + data[100:110],
        "other flow": data[100:150] + other.at(30, 50),
        "clc": data[100:140] + bytes.fromhex("e2d4c3d9") + b"x" * 40,
        "zeros": data[100:110] + bytes(60),
        "noise": data[100:110] + b"0123456789",
        "one bit": data[100:110] + bytes([data[110] ^ 1]) + data[111:130],
        "short": data[100:110] + bytes([data[110] ^ 1]),
        "never written": data[100:] + flow.at(1000, 1),
    }[change]
    return receiver.receive(changed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("loss", "at byte 100 came byte 120 of the same flow, too early"),
        ("twice", "at byte 100 came byte 90 of the same flow, again"),
        ("swap", "at byte 100 came byte 110 of the same flow, too early"),
        ("other flow", "at byte 150 came byte 30 of the flow run/back"),
        ("clc", "at byte 140 came a CLC message"),
        ("zeros", "at byte 110 came zeros"),
        ("noise", "at byte 110 came bytes of no flow"),
        ("one bit", "at byte 110 came bytes of no flow"),
        ("short", "at byte 110 came bytes of no flow"),
        ("never written", "1001 bytes came, and only 1000 were written"),
    ],
)
def test_what_is_wrong_is_told_apart(change: str, words: str) -> None:
    told = wrong(change)
    assert told is not None
    assert words in told
