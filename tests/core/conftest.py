"""What the tests of the core share: verdicts that fit, and two bare connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from pysmc.core.connection import Connection
from pysmc.core.events import Established, Failed, FellBack
from pysmc.core.rmb import Rmb, RToken
from pysmc.core.roles import Role

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup
    from pysmc.testing.pair import CorePair

RIGHT_TOKEN, LEFT_TOKEN = 0x11, 0x22


class Duo:
    """Two connections attached to each other, without handshake, link or memory.

    Args:
        left_bytes: Size of the left one's element; any size, so that edges are near.
        right_bytes: Size of the right one's.
        sndbuf_bytes: Of both.
    """

    def __init__(
        self, left_bytes: int = 16, right_bytes: int = 16, sndbuf_bytes: int = 1 << 20
    ) -> None:
        self.sndbuf_bytes = sndbuf_bytes
        self.left = self.bare(left_bytes, LEFT_TOKEN)
        self.right = self.bare(right_bytes, RIGHT_TOKEN)
        self.left.attach_peer(
            token=RToken(7, 1000), alert_token=RIGHT_TOKEN, rmbe_bytes=right_bytes
        )
        self.right.attach_peer(
            token=RToken(8, 2000), alert_token=LEFT_TOKEN, rmbe_bytes=left_bytes
        )
        for connection in (self.left, self.right):
            connection.is_established = True

    def bare(self, size: int, token: int) -> Connection:
        """Make a connection that knows no peer."""
        group = cast("LinkGroup", None)
        return Connection(
            role=Role.CLIENT,
            group=group,
            link=cast("Link", None),
            rmb=Rmb(group, size),
            alert_token=token,
            sndbuf_bytes=self.sndbuf_bytes,
        )

    def tell(self, connection: Connection, **changes: int) -> int:
        """Publish the other one's state to a connection, with lies where asked for."""
        other = self.right if connection is self.left else self.left
        names = ("sequence", "token", "producer", "consumer", "flags")
        said = dict(zip(names, other.take_update(), strict=True))
        other.published(completed=True)
        sequence, token, producer, consumer, flags = (said | changes).values()
        news = connection.receive_update((sequence, token, producer, consumer, flags))
        connection.check()
        return news

    def move(self, count: int) -> None:
        """Write bytes left to right, read all of them, and report it."""
        while count:
            spans = self.left.claim(count)
            count -= sum(length for _, length in spans)
            self.tell(self.right)
            self.right.consume(self.right.readable)
            self.tell(self.left)


@pytest.fixture
def duo() -> Duo:
    return Duo()


@pytest.fixture
def make_duo() -> type[Duo]:
    return Duo


@pytest.fixture
def verdicts_fit() -> Callable[[CorePair, Handshake, Handshake], tuple[str, str]]:
    return check_verdicts


def check_verdicts(
    pair: CorePair, client: Handshake, server: Handshake
) -> tuple[str, str]:
    """Check that two ends can live with how their handshakes ended; name the ends."""
    trace = "\n".join(pair.trace)
    assert client.is_over, trace
    assert server.is_over, trace
    ends = pair.verdict(client), pair.verdict(server)
    lost = {event.connection for end in pair.ends for event in end.lost}
    for mine, theirs, handshake in zip(ends, ends[::-1], (client, server), strict=True):
        assert handshake.group is None or isinstance(mine, Established)
        if isinstance(mine, FellBack):
            tcp = pair.tcp(handshake)
            read_by_application = tcp.arrived + tcp.transit
            if isinstance(theirs, FellBack):
                assert not read_by_application, trace
            if isinstance(theirs, Established):
                assert theirs.connection in lost, trace
            # None: it was abandoned, and its TCP connection with it.
            assert isinstance(theirs, FellBack | Established | Failed | None), trace
        if isinstance(mine, Established) and not isinstance(theirs, Established):
            known_dead = mine.connection in lost or pair.tcp(handshake).is_cut
            assert known_dead, trace
    assert pair.faults == [], trace
    names = [type(end).__name__ if end else "abandoned" for end in ends]
    return names[0], names[1]
