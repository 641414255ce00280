"""The data path in all its states: two real connections with elements of 4 bytes.

What is explored, and what holds in every state, is said in `tests/model/cdc_model.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pysmc.core import cursor
from pysmc.core.connection import Connection
from pysmc.core.events import News
from pysmc.core.tuning import Tuning
from tests.model.cdc_model import (
    CONSTANT,
    PLAIN_NAMES,
    Broken,
    Mode,
    Model,
    explore,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def narrow_wraps(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give wrap numbers fewer bits than the wire has."""

    def narrow(bits: int) -> None:
        monkeypatch.setattr(cursor, "_WRAP_MASK", (1 << bits) - 1)

    narrow(1)
    return narrow


CASES: dict[str, tuple[Mode, int]] = {
    "one writer": (Mode(closes=False, writers=(0,)), 2_360),
    "one writer, two updates on their way": (
        Mode(closes=False, writers=(0,), queue=2),
        7_256,
    ),
    "one writer, newest update": (
        Mode(closes=False, writers=(0,), newest_only=True),
        5_664,
    ),
    "one writer, completions later": (
        Mode(size=2, closes=False, writers=(0,), later=True, sndbuf=1),
        4_104,
    ),
    "both write and wait, 2 bytes": (Mode(size=2, closes=False), 36_226),
    "all ends, 1 byte": (Mode(size=1), 66_025),
    "all ends, 4 bytes at a time both ways": (
        Mode(waits=False, writes=(4,), reads=(4,)),
        46_416,
    ),
    "one writer, updates that come twice": (
        Mode(closes=False, writers=(0,), doubles=True),
        4_544,
    ),
    "all ends, 4 bytes, updates that come twice": (
        Mode(waits=False, writes=(4,), reads=(4,), doubles=True),
        49_994,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_state(name: str) -> None:
    mode, expected = CASES[name]
    states, _ = explore(Model(mode))
    assert states == expected


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_state_of_two_writers() -> None:
    """Elements of 4 bytes in both directions, all that fits, written and read."""
    states, transitions = explore(Model(Mode(waits=False, closes=False)))
    assert (states, transitions) == (297_316, 912_624)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_end_at_every_moment() -> None:
    """One direction of 4 bytes, and every way in which both ends can close or die.

    Reading two bytes is reading one twice: nothing is published between.
    """
    states, _ = explore(Model(Mode(writers=(0,), reads=(1,))))
    assert states == 515_416


def test_with_the_real_wrap_numbers_about_to_wrap(
    narrow_wraps: Callable[[int], None],
) -> None:
    """Passing 0xFFFF is like passing any other number."""
    narrow_wraps(16)
    found = set()
    for wrap in (0, 0x7FFF, 0xFFFE, 0xFFFF):
        model = Model(
            Mode(wrap_bits=16, closes=False, writes=(3, 4), reads=(1, 4)),
            Tuning(first_wrap=wrap),
        )
        found.add(explore(model, steps=9))
    assert len(found) == 1
    ((states, _),) = found
    assert states == 3_076


def test_more_bits_make_no_difference(narrow_wraps: Callable[[int], None]) -> None:
    """A wrap number of one bit passes its edge as often as one of three bits."""
    found = []
    for bits in (1, 2, 3):
        narrow_wraps(bits)
        mode = Mode(size=2, wrap_bits=bits, closes=False, writers=(0,))
        found.append(explore(Model(mode))[0])
    assert found == [found[0], 2 * found[0], 4 * found[0]]


DEEP: tuple[tuple[Mode, int], ...] = (
    (Mode(size=2, writers=(0,)), 77_920),
    (Mode(size=2, writers=(0,), newest_only=True), 282_828),
    (Mode(size=2), 1_883_430),
    (Mode(waits=False, writes=(2,), reads=(2,)), 1_185_282),
)


@pytest.mark.slow
@pytest.mark.simulate
def test_deeper(long_run: Callable[..., Any]) -> None:
    """Both directions with everything; minutes and gigabytes."""
    with long_run("cdc-model", small=1, full=len(DEEP)) as run:
        for number in run.seeds():
            mode, expected = DEEP[number]
            states, transitions = explore(Model(mode))
            run.add(states=states, transitions=transitions)
            if states != expected:
                run.fail(f"{mode}: {states} states, not {expected}")


# A test of the test: faults of the kind that it is there to find


def forget_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def consume(self: Connection, count: int) -> bool:
        self._rx_consumed += count
        return self.update_due

    monkeypatch.setattr(Connection, "consume", consume)


def forget_the_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor, "_WRAP_MASK", 0)


def believe_in_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Connection.claim

    def generous(self: Connection, *args: int) -> tuple[tuple[int, int], ...]:
        self._tx_acked += self._tx_acked < self._tx_produced
        return claim(self, *args)

    monkeypatch.setattr(Connection, "claim", generous)


def lose_news_of_space(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = Connection._follow_cursors

    def silent(self: Connection, producer: int, consumer: int) -> int:
        return follow(self, producer, consumer) & ~News.SPACE

    monkeypatch.setattr(Connection, "_follow_cursors", silent)


def end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def shutdown_write(self: Connection) -> None:
        self._flags |= 0x80
        self._want_update()

    monkeypatch.setattr(Connection, "shutdown_write", shutdown_write)


def release_early(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = property(lambda self: self._ours_ended and self._final_taken)
    monkeypatch.setattr(Connection, "is_ended", ended)


def follow_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell of the state flags with every update."""
    receive = Connection.receive_update

    def again(self: Connection, update: Any) -> int:
        if update[0] == self._peer_sequence and update[4] & 0x80:
            return receive(self, update) | News.DONE
        return receive(self, update)

    monkeypatch.setattr(Connection, "receive_update", again)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    forget_to_report: "waits for room|not reported|consumer cursor",
    forget_the_wrap: "cursor is wrong|liar",
    believe_in_more_room: "written over|liar|not what was read",
    lose_news_of_space: "waits for room",
    end_early: "liar|EOF",
    release_early: "given back",
    follow_what_is_known: "told twice",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_it_finds(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(Broken, match=FAULTS[fault]) as caught:
        explore(Model(Mode(writers=(0,), doubles=True)), most=20_000)
    assert len(str(caught.value).splitlines()) < 20, "the shortest way is told"


def test_every_attribute_of_a_connection_is_accounted_for() -> None:
    """A new one would be missing from the states."""
    names = {
        name for each in Connection.__mro__ for name in getattr(each, "__slots__", ())
    }
    moving = {"_tx_acked", "_tx_completed", "_tx_announced", "_tx_produced"}
    moving |= {"_rx_produced", "_rx_consumed", "_rx_reported"}
    rest = {"_ours", "_peer", "error", "_sequence", "_peer_sequence", "_posted"}
    assert names == moving | set(PLAIN_NAMES) | rest | CONSTANT
