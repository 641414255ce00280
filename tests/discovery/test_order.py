"""Both ends decide alike, whatever is enabled and installed at either."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from pysmc.config import Config
from pysmc.discovery import Discovery
from pysmc.discovery.option_mark import OptionMark
from pysmc.discovery.order import ORDER, Way, choose
from pysmc.discovery.presence import Presence
from pysmc.reasons import Reason

ENABLED = {
    "option": ("tcp_option",),
    "local": ("local",),
    "both": ("tcp_option", "local"),
    "none": (),
}


def test_one_of_those_that_were_seen_decides() -> None:
    for seen in itertools.chain.from_iterable(
        itertools.combinations(Way, count) for count in range(4)
    ):
        first = min(seen, key=ORDER.index, default=None)
        assert choose(set(seen)) is first
    assert [way.is_binding for way in ORDER] == [True, True, False]


class End:
    """One end's discovery, with the option installed for it or not."""

    def __init__(self, kit: Any, enabled: str, *, installed: bool) -> None:
        config = Config(discovery=ENABLED[enabled])
        wanted = "tcp_option" in config.discovery
        # Each end has a cgroup of its own, so the shared fake has to be told apart.
        presence = Presence(kit.loop.time, is_wanted=wanted and installed)
        self.discovery = Discovery(kit.loop, config, presence)
        kit.discoveries.append(self.discovery)
        self.shows_option = wanted and installed
        self.is_local = "local" in config.discovery


async def decided(kit: Any, client: End, server: End) -> tuple[str, str]:
    """Connect, and let both ends decide; gives the way of each, or the reason."""
    listener = kit.bound()
    server.discovery.opt_in(listener)
    listener.listen()
    server.discovery.announce(listener)
    address = listener.getsockname()
    sock = kit.client()
    found = client.discovery.prepare(sock, address)
    await kit.loop.sock_connect(sock, address)
    if not isinstance(found, Reason):
        client.discovery.connected(found)
    conn = await kit.accept(listener)
    seen = server.discovery.inspect(conn)
    if isinstance(found, Reason) or isinstance(seen, Reason):
        if not isinstance(found, Reason):
            assert found.verdict is not None, "it waits and nobody will answer"
            return kit.short(found.verdict), kit.short(seen)
        return kit.short(found), kit.short(seen)
    if seen is Way.LOCAL:
        waiting = kit.loop.create_task(client.discovery.wait_confirmed(found))
        assert kit.short(await server.discovery.confirm(conn)) == "SMC"
        assert kit.short(await waiting) == "SMC"
    else:
        assert kit.short(await client.discovery.wait_confirmed(found)) == "SMC"
        # Nothing of the other way is left: neither the mark nor the rendezvous.
        assert sock.getsockopt(0, 1) == 0
        assert not client.discovery._open_marks
    return found.way.value, seen.value


def expected(client: End, server: End, ways: tuple[str, str]) -> bool:
    if client.shows_option and server.shows_option:
        return ways == ("tcp_option", "tcp_option")
    if client.is_local and server.is_local:
        return ways == ("local", "local")
    return not set(ways) & set(Way)


@pytest.mark.usefixtures("option")
async def test_both_ends_decide_alike(kit: Any) -> None:
    """All 64 rows in one: what is enabled at either end, and for whom it is there."""
    wrong = []
    cases = itertools.product(ENABLED, ENABLED, (True, False), (True, False))
    for case in cases:
        client = End(kit, case[0], installed=case[2])
        server = End(kit, case[1], installed=case[3])
        ways = await decided(kit, client, server)
        if not expected(client, server, ways):
            wrong.append((case, ways))
        kit.close()
    assert wrong == []


@pytest.mark.parametrize(
    ("stripped", "ways"),
    [("SYN", ("local", "local")), ("SYN-ACK", ("local", "tcp_option"))],
)
async def test_an_option_that_is_lost(
    kit: Any, option: Any, stripped: str, ways: tuple[str, str]
) -> None:
    """Lost on the way back, the server awaits CLC: it sees from what comes instead."""
    option.stripped = stripped
    client, server = (End(kit, "both", installed=True) for _ in range(2))
    listener = kit.bound()
    server.discovery.opt_in(listener)
    listener.listen()
    server.discovery.announce(listener)
    sock = kit.client()
    found = client.discovery.prepare(sock, listener.getsockname())
    assert isinstance(found, OptionMark)
    await kit.loop.sock_connect(sock, listener.getsockname())
    client.discovery.connected(found)
    seen = server.discovery.inspect(await kit.accept(listener))
    assert (found.way, seen) == ways
    assert found.verdict is None, "the rendezvous is open, and has its own deadline"


async def test_a_listed_server_that_shows_the_option(kit: Any, option: Any) -> None:
    """The option goes before the list, so that both ends name the same."""
    fields = {"discovery": ("static", "tcp_option"), "peers": ("127.0.0.1",)}
    listed, plain = kit.discovery(**fields), kit.discovery()
    for server, ways in ((plain, ("tcp_option", "tcp_option")), (None, ("static", ""))):
        listener = kit.bound()
        if server is not None:
            server.opt_in(listener)
        listener.listen()
        sock = kit.client()
        found = listed.prepare(sock, listener.getsockname())
        await kit.loop.sock_connect(sock, listener.getsockname())
        listed.connected(found)
        assert kit.short(await listed.wait_confirmed(found)) == "SMC"
        conn = await kit.accept(listener)
        assert found.way == ways[0]
        if server is not None:
            assert server.inspect(conn) == ways[1]
