"""One link: it comes up once, and what is down stays down."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from pysmc.core.link import Link, LinkEnd, LinkInput, LinkState
from pysmc.core.machine import ForbiddenInput

if TYPE_CHECKING:
    from pysmc.core.link_group import LinkGroup


@pytest.fixture
def link() -> Link:
    end = LinkEnd(bytes(8), bytes(16), bytes(6), 1, 2, 3)
    return Link(cast("LinkGroup", None), 1, end, 9)


def test_a_link_comes_up(link: Link) -> None:
    assert not link.is_active
    assert link.move(LinkInput.CONNECT) is LinkState.INACTIVE
    assert link.move(LinkInput.CONFIRMED) is LinkState.ACTIVATING
    assert link.is_active


def test_what_is_down_stays_down(link: Link) -> None:
    link.move(LinkInput.CONNECT)
    link.move(LinkInput.LOST)
    for happened in LinkInput:
        link.move(happened)
        assert link.state is LinkState.DOWN


def test_a_link_is_not_confirmed_before_it_is_connected(link: Link) -> None:
    with pytest.raises(ForbiddenInput, match=r"link: CONFIRMED in state INACTIVE"):
        link.move(LinkInput.CONFIRMED)
