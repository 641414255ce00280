"""Random programs at both ends of a connection; where all is calm TCP is the oracle.

``PYSMC_PROGRAMS=20000`` plays more of each kind, and ``PYSMC_FIRST_PROGRAM`` begins
with another seed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.aio.random_player import Play, Stage
from tests.aio.random_programs import BLOCKING_BYTES, Program, make_program, shrink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pysmc.testing.authority import Authority

COUNT = int(os.environ.get("PYSMC_PROGRAMS", "150"))
FIRST = int(os.environ.get("PYSMC_FIRST_PROGRAM", "0"))
SEEDS = range(FIRST, FIRST + COUNT)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(max(60, COUNT))]

EVERYTHING = Program(
    calm=False,
    kinds=("protocol", "streams"),
    keep_open=(False, False),
    rooms=(700, 700),
    steps=(("write", 0, 70_000, "bytes"), ("sendfile", 1, 70_000), ("tls", 0)),
    finish="eof",
)


def make_stage(carrier: str, rmbe_bytes: int, authority: Authority) -> Stage:
    stage = Stage(carrier, rmbe_bytes, authority)
    stage.play(EVERYTHING)  # what is made late is made now
    assert not stage.play(EVERYTHING).found
    return stage


@pytest.fixture(scope="module")
def tcp(authority: Authority) -> Iterator[Stage]:
    stage = make_stage("tcp", 0, authority)
    yield stage
    stage.close()


@pytest.fixture(scope="module", params=[16 << 10, 1 << 20], ids=["16 KiB", "1 MiB"])
def smcr(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Stage]:
    stage = make_stage("smcr", request.param, authority)
    yield stage
    stage.close()


def differences(over_smcr: Play, over_tcp: Play) -> list[str]:
    """Compare what both ends were told.

    Not where TCP hides a loss, nor how TLS was ended: both ends say so at once.
    """
    if over_smcr.is_tls or any(end.lossy for end in over_smcr.ends + over_tcp.ends):
        return []
    return [
        f"end {ours.index} over SMC-R: {ours.story()}, over TCP: {theirs.story()}"
        for ours, theirs in zip(over_smcr.ends, over_tcp.ends, strict=True)
        if ours.story() != theirs.story()
    ]


def assert_nothing(found: list[str], program: Program, seed: int) -> None:
    lines = [f"program {seed}: {program}", *found]
    assert not found, "\n".join(lines)


def test_wild_programs_keep_the_contract(smcr: Stage) -> None:
    for seed in SEEDS:
        program = make_program(seed, calm=False)
        if smcr.play(program).found:
            program = shrink(program, lambda one: bool(smcr.play(one).found))
            assert_nothing(smcr.play(program).found, program, seed)


def test_what_is_demanded_of_wild_programs_holds_over_tcp(tcp: Stage) -> None:
    for seed in SEEDS[:50]:
        program = make_program(seed, calm=False)
        assert_nothing(tcp.play(program).found, program, seed)


def test_calm_programs_are_told_what_tcp_tells(smcr: Stage, tcp: Stage) -> None:
    def found(program: Program) -> list[str]:
        ours, theirs = smcr.play(program), tcp.play(program)
        return ours.found + theirs.found + differences(ours, theirs)

    for seed in SEEDS:
        program = make_program(seed, calm=True)
        if found(program):
            program = shrink(program, lambda one: bool(found(one)))
            assert_nothing(found(program), program, seed)


def test_a_loss_in_the_middle_is_found(smcr: Stage) -> None:
    steps = (("write", 0, 1000, "bytes"), ("turns", 0, 2), ("write", 0, 100, "bytes"))
    program = Program(
        calm=False,
        kinds=("protocol", "protocol"),
        keep_open=(False, False),
        rooms=(700, 700),
        steps=steps,
        finish="eof",
    )
    play = smcr.play(program)
    assert not play.found
    one, other = play.ends
    other.take(other.into[other.count + 1 :][:5])
    assert play.problems()[0] == "end 1: wrong bytes at 1100"
    one.note("connection_lost", "(None)")
    assert "end 0 was told ['connection_lost(None)', 'connection_lost(None)']" in (
        play.problems()
    )


def test_programs_are_made_smaller() -> None:
    program = make_program(9, calm=True)

    def fails(one: Program) -> bool:
        return any(BLOCKING_BYTES in step for step in one.steps)

    assert fails(program)
    assert len(shrink(program, fails).steps) == 1
