"""The RFC's own flows, held against plain arithmetic on byte counts.

The model here is a pair of queues and knows nothing of smcproto but the message: the
connection tests replay the same files through two cores.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smcproto.cdc import CdcMessage, unpack
from smcproto.constants import ConnectionStateFlags, ProducerFlags

if TYPE_CHECKING:
    from pathlib import Path

FIGURE_22_AND_23 = {
    "ACTIVE",
    "PEER_CLOSE_WAIT_1",
    "PEER_CLOSE_WAIT_2",
    "APP_CLOSE_WAIT_1",
    "APP_CLOSE_WAIT_2",
    "APP_FIN_CLOSE_WAIT",
    "PEER_FIN_CLOSE_WAIT",
    "PEER_ABORT_WAIT",
    "PROCESS_ABORT",
    "CLOSED",
}


def load(path: Path) -> Any:
    return tomllib.loads(path.read_text("utf-8"))


@dataclass
class Stream:
    """One direction: positions count bytes from the start of the flow."""

    size: int
    base: int
    origin: int
    """Offset and wraps of the first position, in bytes of data area."""
    queued: int = 0
    written: int = 0
    told: int = 0
    """How much the reader knows to be written."""
    read: int = 0
    reported: int = 0
    """How much the writer knows to be read."""

    @property
    def capacity(self) -> int:
        return self.size - self.base

    @property
    def window(self) -> int:
        return self.capacity - (self.written - self.reported)

    def cursor(self, position: int) -> dict[str, int]:
        wrap, offset = divmod(self.origin + position, self.capacity)
        return {"wrap": wrap, "count": self.base + offset}


def stream(
    flow: dict[str, Any], producer: dict[str, Any], consumer: dict[str, Any]
) -> Stream:
    """Make a direction as it is at the start; unread bytes may be there already."""
    base: int = flow["data_offset"]
    capacity: int = flow["rmbe_bytes"] - base

    def absolute(cursor: dict[str, int]) -> int:
        return cursor["wrap"] * capacity + cursor["count"] - base

    unread = absolute(producer) - absolute(consumer)
    made = Stream(flow["rmbe_bytes"], flow["data_offset"], absolute(consumer))
    made.written = made.told = unread
    return made


def test_a_flow_says_where_it_is_from(flow_file):
    flow = load(flow_file)
    assert re.fullmatch(
        r"RFC 7609 section 4\.[78]\.\d( and 4\.8\.\d)?, figures? 1?2?\d( and 23)?",
        flow["section"],
    )
    assert flow_file.stem.startswith(flow["id"])
    assert flow["title"]
    assert flow["step"]


def test_the_six_data_flows_and_both_kinds_of_end_are_there(proto):
    stems = {path.stem[:5] for path in (proto.folder / "flows").glob("*.toml")}
    assert stems == {f"4.7.{n}" for n in range(1, 7)} | {"4.8.1", "4.8.2"}


def test_byte_counts_cursors_and_flags_agree(data_flow_file):
    flow = load(data_flow_file)
    start = flow["start"]
    streams = {
        "A": stream(flow, start["A"]["producer"], start["B"]["consumer"]),
        "B": stream(flow, start["B"]["producer"], start["A"]["consumer"]),
    }
    for step in flow["step"]:
        own = streams[step["actor"]]
        other = streams["B" if step["actor"] == "A" else "A"]
        match step["action"]:
            case "send":
                own.queued += step["bytes"]
            case "write":
                assert step["first"] == own.cursor(own.written)["count"]
                assert step["last"] - step["first"] + 1 == step["bytes"]
                assert step["last"] < flow["rmbe_bytes"]
                assert step["bytes"] <= min(own.queued, own.window)
                own.written += step["bytes"]
                own.queued -= step["bytes"]
            case "cdc":
                check_cdc(step, own, other)
                own.told = own.written
                other.reported = other.read
            case "receive":
                assert step["bytes"] <= other.told - other.read
                other.read += step["bytes"]
            case action:
                raise AssertionError(action)
    for made in streams.values():
        assert (made.queued, made.told, made.read) == (0, made.written, made.written)


def check_cdc(step: dict[str, Any], own: Stream, other: Stream) -> None:
    assert step["producer"] == own.cursor(own.written)
    assert step["consumer"] == other.cursor(other.read)
    producer_flags = ProducerFlags(0)
    for name in step["flags"]:
        producer_flags |= ProducerFlags[name]
    blocked = bool(own.queued) and own.window == 0
    assert (ProducerFlags.WRITER_BLOCKED in producer_flags) is blocked
    message = CdcMessage(
        sequence=1,
        alert_token=1,
        producer_wrap=step["producer"]["wrap"],
        producer_count=step["producer"]["count"],
        consumer_wrap=step["consumer"]["wrap"],
        consumer_count=step["consumer"]["count"],
        producer_flags=producer_flags,
    )
    assert unpack(message.build())[2:] == (
        step["producer"]["wrap"] << 32 | step["producer"]["count"],
        step["consumer"]["wrap"] << 32 | step["consumer"]["count"],
        producer_flags << 8,
    )


def test_states_and_flags_of_a_close_are_known(close_flow_file):
    flow = load(close_flow_file)
    seen: dict[str, set[str]] = {"A": set(), "B": set()}
    for step in flow["step"]:
        assert set(step["states"].values()) <= FIGURE_22_AND_23
        flags = {name for name in step.get("flags", []) if ConnectionStateFlags[name]}
        if flags:  # Once set they stay set, until an abort.
            assert seen[step["actor"]] <= flags | {"ABNORMAL_CLOSE"}
            seen[step["actor"]] |= flags
    assert set(flow["step"][-1]["states"].values()) == {"CLOSED"}
