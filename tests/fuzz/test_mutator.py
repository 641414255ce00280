"""Two good peers, and somebody between them: SMC-R, TCP or an error, never wrong data.

Every bit of every CLC message, and of every LLC message of first contact, is flipped
once. Then many samples of everything else that can happen to bytes on their way.

Three fields of an Accept or Confirm can be changed so that neither end notices before
data flows; TCP's checksum is all that guards them, in every implementation of SMC-R:

* the alert token: updates go to nobody, so nothing arrives;
* the virtual address of the RMB and the size of the element on first contact: writes
  that stay within the peer's own memory go to the wrong place in it, and the peer
  reads zeros where nothing was written. It never reads bytes of somebody else.

On a reused link the address has been announced over the link itself, and is compared.
The shared-memory fabric knows what its peer registered, and ends such a connection.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.fuzz import in_path, wire_checker
from tests.fuzz.in_path import KINDS, NAMES, SCENES, Change, Place, play

GOOD = {"smc", "tcp", "error"}
SHARDS = 4
SAMPLES, SAMPLES_FULL = 2_000, 100_000

ACCEPT, CONFIRM = Place("server", "tcp"), Place("client", "tcp", 1)


def field_of(message: bytes, bit: int) -> str:
    """Name the field of an Accept or Confirm that a bit belongs to."""
    table = wire_checker.TABLES["accept"]
    if message[4:5] in (b"\2", b"\3") and bit < 8 * table.size:
        at = 8 * table.size - 1 - bit
        for row in table.rows.values():
            if row.shift <= at < row.shift + row.ones.bit_length():
                return row.name
    return "another"


def flips(
    scene: str, planes: tuple[str, ...] = ("tcp", "link")
) -> list[tuple[Place, int]]:
    """List every bit of what is said in a scene."""
    return [
        (place, bit)
        for place, data in in_path.messages(scene).items()
        if place.plane in planes
        for bit in range(8 * len(data))
    ]


class Tally:
    """What came of many changes."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()
        self.fields: dict[str, set[str]] = {}
        self.faults: list[str] = []
        self.bystanders: Counter[str] = Counter()

    def add(self, scene: str, place: Place, bit: int) -> None:
        """Flip one bit."""
        outcome = play(scene, [Change(place, "flip", bit)])
        self.endings[outcome.ending] += 1
        field = field_of(in_path.messages(scene)[place], bit)
        where = f"{scene}: bit {bit} of {place}, {field}: {outcome}"
        if outcome.ending not in GOOD:
            self.fields.setdefault(outcome.ending, set()).add(field)
        if outcome.stray or outcome.foreign or "never" in outcome.modes.values():
            self.faults.append(where)
        if outcome.bystander:
            self.bystanders[field] += 1
            if not outcome.bystander.startswith("ended: "):
                self.faults.append(where)


UNNOTICED = {
    "first contact": {
        "smc, and silence": {"alert_token"},
        "wrong data": {"virtual_address"},
    },
    # Its elements are larger than the least, so that a bit can make them smaller.
    "first contact, large element": {
        "smc, and silence": {"alert_token"},
        "wrong data": {"virtual_address", "rmbe_size_code"},
    },
    "reuse": {"smc, and silence": {"alert_token"}},
}


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("scene", ["first contact", "reuse"])
def test_every_flipped_bit_ends_well(scene, shard):
    tally = Tally()
    for place, bit in flips(scene)[shard::SHARDS]:
        tally.add(scene, place, bit)
    assert not tally.faults, "\n".join(tally.faults)
    assert tally.endings.total() > 1000
    assert tally.endings.keys() > GOOD
    unnoticed = UNNOTICED[scene]
    assert tally.fields.keys() <= unnoticed.keys()
    for ending, fields in tally.fields.items():
        assert fields <= unnoticed[ending], ending
    # Writes past the end of the memory that the index or the size speak of break the
    # link, and with it whatever else runs over it: as a failed RDMA write does.
    assert tally.bystanders.keys() <= {"rmbe_index", "rmbe_size_code"}


def test_the_fields_that_nobody_can_check_are_these():
    """The list is exact: what is on it can go unnoticed, and nothing else."""
    for scene, unnoticed in UNNOTICED.items():
        tally = Tally()
        fields = set().union(*unnoticed.values()) | {"rkey", "qp_number"}
        for place in (ACCEPT, CONFIRM):
            message = in_path.messages(scene)[place]
            for bit in range(8 * len(message)):
                if field_of(message, bit) in fields:
                    tally.add(scene, place, bit)
        assert tally.fields == unnoticed, scene
        assert not tally.faults


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.parametrize("scene", ["the server declines", "the client declines"])
def test_every_flipped_bit_of_a_refusal_ends_well(scene):
    tally = Tally()
    for place, bit in flips(scene):
        tally.add(scene, place, bit)
    assert not tally.faults
    assert tally.endings.keys() == {"tcp", "error"}


@pytest.mark.slow
def test_every_flipped_bit_of_version_20s_link_messages_ends_well():
    tally = Tally()
    scene = "first contact, version 2.0"
    for place, bit in flips(scene, ("link",)):
        tally.add(scene, place, bit)
    assert not tally.faults
    assert tally.endings.keys() <= GOOD
    assert tally.endings["smc"] > 100


def sample(seed: int) -> tuple[str, list[Change]]:
    """Choose a scene and what happens in it."""
    dice = random.Random(seed)
    scene = dice.choice(list(SCENES))
    places = list(in_path.messages(scene))
    changes = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        place = dice.choice(places)
        # A queue pair loses nothing and repeats nothing, but a peer may say anything.
        kinds = [kind for kind in KINDS if place.plane == "tcp" or kind != "drip"]
        change = Change(
            place, dice.choice(kinds), dice.getrandbits(16), dice.getrandbits(16)
        )
        changes.append(change)
    return scene, changes


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_whatever_happens_in_between_ends_well(shard, long_run):
    shards = (shard, SHARDS)
    with long_run("in-path", small=SAMPLES, full=SAMPLES_FULL, shard=shards) as run:
        for seed in run.seeds():
            scene, changes = sample(seed)
            outcome = play(scene, changes)
            ending = outcome.ending
            problem = outcome.foreign or "never" in outcome.modes.values()
            problem |= ending == "wrong data" and not outcome.misled
            problem |= outcome.bystander.startswith("wrong")
            problem |= outcome.crossed
            if problem:
                run.fail(f"seed {seed}: {scene}, {changes}: {outcome}")
            run.add(handshakes=1, **{ending.replace(", and ", "_"): 1})
            run.add(
                stray_bytes_on_tcp=bool(outcome.stray),
                misled=outcome.misled,
                crossed=outcome.crossed,
            )
        for ending in GOOD:
            assert run.counts[ending] > run.count / 50


def test_bytes_that_were_added_behind_the_last_message_are_what_tcp_delivers():
    """The repeated Decline: TCP would deliver such bytes, and so do we."""
    whole = len(in_path.messages("the server declines")[ACCEPT])
    change = Change(ACCEPT, "repeat", 0, whole)
    outcome = play("the server declines", [change])
    assert outcome.ending == "tcp"
    assert outcome.stray == {"client": in_path.messages("the server declines")[ACCEPT]}


def test_declines_do_not_cross_behind_a_confirm_that_was_held_up():
    """Two seconds on TCP, and no CONFIRM LINK: still only one end declines."""
    held_up = Change(CONFIRM, "drip", 100, 20)
    damaged = Change(Place("server", "link"), "put", 0, 0)
    outcome = play("first contact", [held_up, damaged])
    assert outcome.ending in GOOD
    assert not outcome.stray
    assert not outcome.crossed


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_change_does_something(kind):
    data = bytes(range(40))
    pieces = KINDS[kind](data, 3, 9)
    assert pieces != [(0, data)]


@pytest.mark.parametrize("name", NAMES)
def test_wrong_data_would_be_noticed(name, monkeypatch):
    """A test of the test: an application that reads one wrong byte."""
    honest = in_path.Journey._read

    def read(journey, whose):
        data = bytearray(honest(journey, whose))
        if whose == name and len(data) > 1000:
            data[700] ^= 1
        return bytes(data)

    monkeypatch.setattr(in_path.Journey, "_read", read)
    outcome = play("first contact", [])
    assert outcome.ending == "wrong data"
    assert outcome.foreign
    assert "wrong from 764" in outcome.wrong[0]


def test_a_connection_that_never_ends_would_be_noticed():
    """A test of the test: nothing is delivered at all."""
    journey = in_path.Journey("first contact", ())
    assert set(journey.exchange().modes.values()) == {"never"}
