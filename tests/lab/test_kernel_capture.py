"""Whole sessions of pysmc and the kernel on the wire, beside those that are kept.

tshark reads what pysmc sends, and finds no fault in it. It does not know version 2 of
LLC as an x86 kernel sends it, with a length in the order of its machine, so that the
kernel's own CONFIRM LINK, for one, shows as malformed; what counts there is what our
decoder reads.
"""

# ruff: noqa: T201  # the figures of a scenario are in its output

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.lab.capture import captured, dissected, frames
from tests.lab.matrix import END, Cell, one_way
from tests.lab.playing import Play
from tests.lab.wire_log import complaints, read_session

CAPTURES = Path(__file__).resolve().parents[2] / "proto" / "captures"
SESSIONS = {
    ("pysmc", "kernel"): CAPTURES / "pysmc-kernel_v2.1_two-connections.pcap",
    ("kernel", "pysmc"): CAPTURES / "kernel-pysmc_v2.1_two-connections.pcap",
}
BOTH = pytest.mark.parametrize(
    ("kinds", "kept"), SESSIONS.items(), ids=["-".join(kinds) for kinds in SESSIONS]
)
TOTAL = 1500
CONNECTIONS = 2
CELL = Cell("two connections, one after the other", one_way(TOTAL) + END)


def carry_out(kinds, ends, kernel, path: Path) -> None:
    """First contact, a second connection on the same link group, and the end."""
    play = Play(CELL, kinds, ends, kernel)
    with captured(path):
        play.start("server")
        play.start("client")
        for _ in range(CONNECTIONS):
            play.connect()
            play.stages(CELL.stages)
            play.groups([0])
        play.compare()
        play.finish()


@pytest.mark.lab_long(seconds=60)
@BOTH
@pytest.mark.usefixtures("option")
def test_a_session_taken_anew(kinds, kept, ends, kernel, tmp_path) -> None:
    path = tmp_path / kept.name
    carry_out(kinds, ends, kernel, path)
    if folder := os.environ.get("PYSMC_LAB_FOLDER"):
        shutil.copy(path, folder)  # for whoever looks at a failure
    check(kinds, path)
    assert read_session(list(frames(path.read_bytes()))) == read_session(
        list(frames(kept.read_bytes()))
    )


@BOTH
def test_the_sessions_that_are_kept(kinds, kept) -> None:
    """Needs no guest; tshark is asked where it is installed."""
    check(kinds, kept)


def check(kinds, path: Path) -> None:
    """Both ends said all that they had to, and what is ours is without fault."""
    found = list(frames(path.read_bytes()))
    session = read_session(found)
    print(session)
    assert session.closed == dict.fromkeys(session.said, CONNECTIONS)
    clc = ("Proposal", "Accept", "Confirm")
    for end, wanted in (("client", clc[::2]), ("server", clc[1:2])):
        told = [word for word in session.said[end] if word in clc]
        assert told == [*wanted] * CONNECTIONS
    assert session.said["server"].count("ConfirmLink") == 1
    assert session.said["client"].count("ConfirmLink response") == 1
    for end, kind in zip(("client", "server"), kinds, strict=True):
        other = "server" if end == "client" else "client"
        if kind == "kernel":
            # A new buffer for each connection; we keep the one that is announced.
            assert "ConfirmRkey" in session.said[end]
            assert "ConfirmRkey response" in session.said[other]
            assert session.deleted[end] == {"DeleteRkey": CONNECTIONS}
            assert session.deleted[other] == {"DeleteRkey response": CONNECTIONS}
        assert "DeleteLink" in session.said[end]
    if shutil.which("tshark"):
        for end, kind in zip(("client", "server"), kinds, strict=True):
            if kind == "pysmc":
                assert complaints(found, dissected(path), end) == []
