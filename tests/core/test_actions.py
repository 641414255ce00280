"""Orders: each is a plain record of its own kind."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import get_args

import pytest

from pysmc.core import actions
from pysmc.testing.pair import CorePair


def test_every_order_is_listed_once() -> None:
    kinds = get_args(actions.Action)
    assert {kind.__name__ for kind in kinds} | {"Action"} == set(actions.__all__)
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize(
    "kind", get_args(actions.Action), ids=lambda kind: kind.__name__
)
def test_an_order_is_a_record_that_says_how_to_answer(kind: type) -> None:
    order = kind(*[object() for _ in fields(kind)])
    with pytest.raises(FrozenInstanceError):
        setattr(order, fields(kind)[0].name, None)


def test_a_life_needs_every_order() -> None:
    pair = CorePair()
    seen: set[type] = set()
    for end in pair.ends:
        for kind, carry_out in list(end._orders.items()):

            def note(action: object, carry_out=carry_out) -> None:
                seen.add(type(action))
                carry_out(action)

            end._orders[kind] = note
    client, server = pair.establish()
    pair.close(pair.client, client)
    pair.close(pair.server, server)
    pair.drive()
    client, server = pair.establish()
    pair.send_update(client, producer=0xFFFFFFFF)
    pair.drive()
    pair.shutdown()
    assert seen == set(get_args(actions.Action))
