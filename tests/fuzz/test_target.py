"""The targets notice faults, and tell them with an input that shows them again."""

from __future__ import annotations

import gc
import importlib.util
import random
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.aio.transport import SmcTransport
from pysmc.core.connection import Connection
from pysmc.core.llc_flows import LlcFlows
from pysmc.fabric import shm_link, shm_ring
from pysmc.testing.pair_ends import PairEnd
from tests.fuzz import kit
from tests.fuzz.target import Bytes, Kept, Target

if TYPE_CHECKING:
    from types import ModuleType

TRIES = 3_000


def program() -> ModuleType:
    """Import the program that runs a target."""
    path = kit.ROOT / "tests" / "fuzz" / "run.py"
    spec = importlib.util.spec_from_file_location("fuzz_program", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_fault_is_told_with_the_input_that_shows_it(capfd):
    def run(data: bytes) -> None:
        assert b"\xff" not in data, "what it is about"

    target = Target("clc", run, lambda: [b""], 8, lambda data: b"before" + data)
    with pytest.raises(AssertionError, match="what it is about"):
        program()._run_or_tell(kit, target, b"\xff")
    told = capfd.readouterr().out.splitlines()
    whole = (b"before\xff").hex()
    assert told == [
        f"INPUT: {whole}",
        f"REPEAT: python tests/fuzz/run.py clc --input {whole}",
    ]


def test_bytes_run_out_quietly():
    source = Bytes(b"\x01\xff\x02ab")
    assert (source.byte(), source.signed()) == (1, -1)
    assert source.take(source.byte()) == b"ab"
    assert not source
    assert (source.byte(), source.signed(), source.take(3)) == (0, 0, b"")


def test_a_patch_changes_few_bytes():
    assert Bytes(b"\x00").patch(b"abc") == b"abc"
    assert Bytes(b"\x01\x01\x20").patch(b"abc") == b"aBc"
    assert Bytes(b"\x03").patch(b"") == b""


def test_what_is_kept_is_told_with_all_that_happened_to_it():
    made: list[int] = []

    def make(number: int) -> list[int]:
        made.append(number)
        return made

    kept: Kept[Any] = Kept(make, 4)
    for number, body in ((7, b"ab"), (9, b"x"), (7, b"c")):
        kept.take(number, body)
    assert kept.told(b"c") == b"\x07abc"
    assert made == [7, 9]
    kept.take(7, b"")
    kept.take(7, b"abcd")
    kept.take(7, b"e")  # one byte too many for the same one
    assert made == [7, 9, 7, 7]
    assert kept.told(b"") == b"\x07e"
    kept.take(7, b"")
    kept.drop(7)
    kept.take(7, b"")
    assert len(made) == 6


def twice(transport: Any, error: Any) -> None:
    transport._protocol.connection_lost(error)
    honest_end(transport, error)


honest_end = SmcTransport._call_connection_lost
honest_place = PairEnd.place
honest_peek = Connection.peek
honest_unpack = shm_ring.unpack_descriptor


def place_wrong(end: Any, connection: Any, address: int, data: bytes) -> None:
    honest_place(end, connection, address, bytes(len(data)))


def peek_elsewhere(connection: Any, limit: int) -> tuple[int, int]:
    offset, length = honest_peek(connection, limit)
    return offset ^ 1, length


def unpack_short(word: int) -> tuple[int, int, int, int]:
    named, arena, offset, _ = honest_unpack(word)
    return named, arena, offset, 0


def receive_badly(flows: Any, link: Any, payload: bytes, now: float) -> None:
    raise KeyError(link)


@pytest.mark.slow
# A transport whose test has failed was not closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")
@pytest.mark.parametrize(
    ("name", "place", "attribute", "fault"),
    [
        ("transport", SmcTransport, "_call_connection_lost", twice),
        ("transport", Connection, "peek", peek_elsewhere),
        ("core-pair", PairEnd, "place", place_wrong),
        ("core-messages", LlcFlows, "receive", receive_badly),
        ("shm-ring", shm_ring, "SEND_BYTES_MAX", 1 << 13),
        ("shm-link", shm_link, "unpack_descriptor", unpack_short),
    ],
)
def test_a_fault_of_the_library_is_noticed(name, place, attribute, fault, monkeypatch):
    target = kit.load(name)
    seeds = target.seeds() + kit.corpus(name)
    for data in target.seeds():
        target.run(data)
    target.told(b"")  # what the good library has led to is gone
    monkeypatch.setattr(place, attribute, fault)
    inputs = kit.mutations(seeds, target.most_bytes, random.Random(1))
    shown = None
    for data in [*seeds, *(next(inputs) for _ in range(TRIES))]:
        try:
            target.run(data)
        except (AssertionError, KeyError):
            shown = target.told(data)
            break
    assert shown is not None, "nothing noticed it"
    with pytest.raises((AssertionError, KeyError)):
        target.run(shown)
    target.told(b"")
    gc.collect()
