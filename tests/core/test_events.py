"""News: records for what happened once, bits for what every update may bring."""

from __future__ import annotations

from typing import get_args

from pysmc.core import events
from pysmc.core.events import News


def test_every_event_is_listed() -> None:
    kinds = {kind.__name__ for kind in get_args(events.Event)}
    assert kinds | {"Event", "News"} == set(events.__all__)


def test_news_are_bits_of_their_own() -> None:
    names = [name for name in vars(News) if name.isupper()]
    values = [getattr(News, name) for name in names]
    assert News.NOTHING == 0
    assert all(type(value) is int for value in values)
    assert sum(values) == (1 << len(names) - 1) - 1
