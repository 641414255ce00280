"""Tables: what moves, what is ignored, and how the rest is named."""

from __future__ import annotations

from enum import Enum

import pytest

from pysmc.core.machine import ForbiddenInput, Table


class Lamp(Enum):
    OFF = "off"
    ON = "on"
    BROKEN = "broken"


class Press(Enum):
    UP = "up"
    DOWN = "down"
    HIT = "hit"


LAMP = Table(
    "lamp",
    {(Lamp.OFF, Press.UP): Lamp.ON, (Lamp.OFF, Press.HIT): Lamp.BROKEN},
    ignored={(Lamp.OFF, Press.DOWN)},
)


def test_a_row_moves() -> None:
    assert LAMP.after(Lamp.OFF, Press.UP) is Lamp.ON


def test_an_ignored_input_changes_nothing() -> None:
    assert LAMP.after(Lamp.OFF, Press.DOWN) is Lamp.OFF


def test_a_forbidden_input_names_what_was_expected() -> None:
    other = Table("lamp", {(Lamp.OFF, Press.UP): Lamp.ON})
    with pytest.raises(ForbiddenInput, match=r"lamp: HIT in state OFF; expected UP$"):
        other.after(Lamp.OFF, Press.HIT)
    with pytest.raises(ForbiddenInput, match="expected nothing more"):
        other.after(Lamp.ON, Press.HIT)


def test_a_row_cannot_be_ignored_too() -> None:
    with pytest.raises(AssertionError, match="both move and are ignored"):
        Table("lamp", {(Lamp.OFF, Press.UP): Lamp.ON}, {(Lamp.OFF, Press.UP)})
