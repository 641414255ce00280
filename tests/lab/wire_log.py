"""What two ends say to each other in a capture, and what tshark thinks of one of them.

Decides which parts of two sessions can be compared: who said which CLC and LLC message
in which order. Updates (CDC) and packets depend on time, and so does when a DELETE RKEY
comes between the others: of those the number counts.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from smcproto.cdc import CdcMessage
from smcproto.constants import ConnectionStateFlags
from smcproto.decode import Plane, decode
from smcproto.llc import DeleteRkey

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.lab.capture import Dissected, Frame

__all__ = ["HOSTS", "Said", "Session", "complaints", "read_session", "said"]

HOSTS = {"10.0.0.1": "server", "10.0.0.2": "client"}
WARNING, ERROR = 6291456, 8388608
"""Severities of tshark's remarks."""


class Said(NamedTuple):
    """One message."""

    frame: int
    """Number of its packet."""
    end: str
    """"client" or "server"."""
    plane: Plane
    words: str
    """Its name, with "response" if it is one."""


class Session(NamedTuple):
    """All that can be compared of a session."""

    said: dict[str, list[str]]
    """CLC and LLC messages of each end in order, but for DELETE RKEY. What comes twice
    in a row counts once: a kernel may say DELETE LINK again when the other is gone."""
    deleted: dict[str, dict[str, int]]
    """How many DELETE RKEY each end has sent: requests and responses."""
    closed: dict[str, int]
    """How many connections each end has closed by a CDC message."""


def said(found: Iterable[Frame]) -> Iterator[Said]:
    """Give every message of a capture once; what was sent again counts once."""
    seen = set()
    for frame in found:
        if frame.kind not in {"tcp", "send"} or not frame.payload:
            continue
        if (frame.flow, frame.sequence) in seen:
            continue
        seen.add((frame.flow, frame.sequence))
        plane, message = decode(frame.payload)
        is_response = getattr(message, "response", False)
        words = type(message).__name__ + (" response" if is_response else "")
        yield Said(frame.number, HOSTS[frame.flow[0]], plane, words)


def read_session(found: list[Frame]) -> Session:
    """Read what can be compared out of a capture."""
    ends = tuple(HOSTS.values())
    order: dict[str, list[str]] = {end: [] for end in ends}
    deleted: dict[str, Counter[str]] = {end: Counter() for end in ends}
    for one in said(found):
        if one.words.startswith(DeleteRkey.__name__):
            deleted[one.end][one.words] += 1
        elif one.plane is not Plane.CDC and order[one.end][-1:] != [one.words]:
            order[one.end].append(one.words)
    closed: dict[str, set[tuple[str, int]]] = {end: set() for end in ends}
    for frame in found:
        if frame.kind == "send" and frame.payload[:1] == b"\xfe":
            message = decode(frame.payload)[1]
            assert isinstance(message, CdcMessage)
            if message.state_flags & ConnectionStateFlags.CLOSED:
                closed[HOSTS[frame.flow[0]]].add((frame.flow[0], message.alert_token))
    return Session(
        order,
        {end: dict(counts) for end, counts in deleted.items()},
        {end: len(tokens) for end, tokens in closed.items()},
    )


def complaints(found: list[Frame], told: dict[int, Dissected], end: str) -> list[str]:
    """List the messages of one end in which tshark finds a fault, or no SMC.

    An empty SEND, by which our fabric says that it is there or goes, is no message.
    """
    bad = []
    for frame in found:
        if frame.kind not in {"tcp", "send"} or not frame.payload:
            continue
        if HOSTS.get(frame.flow[0]) != end:
            continue
        words = told[frame.number]
        is_smc = "smc" in words.protocols
        if not is_smc or words.is_malformed or words.severity >= WARNING:
            bad.append(f"{frame.number} {frame.payload[:8].hex()}: {words}")
    return bad
