"""What a hundred thousand connections leave behind in two processes: nothing.

And what as many attempts leave that came to nothing: refused, declined, not answered,
never spoken to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Process

pytestmark = [pytest.mark.soak, pytest.mark.load, pytest.mark.slow]

KIB = 1024
GROWTH_MAX = 64 * KIB
"""Bytes that either process may hold more than after its warm-up, whatever the count: a
single word kept for each connection would be twelve times as much."""
BLOCKS_MAX = GROWTH_MAX // 64
"""The same as a number of Python's own blocks, most of which are as small as that."""
RSS_MAX = 2048 * KIB
"""Resident memory comes and goes by arenas of up to a megabyte, so
that one object in the wrong place is a megabyte: no measure, but a second witness."""
LIMITS = {
    "traced": {"traced": GROWTH_MAX},
    # Without tracing, whose own tables would lie in the same heap.
    "plain": {"heap": GROWTH_MAX, "blocks": BLOCKS_MAX, "rss": RSS_MAX},
}
AT_ONCE = 4
CONFIG = {"rmbe_bytes": 64 * KIB, "discovery_wait": 20.0}
"""So that a link's buffers lie in one arena, whichever of them overlap; and that a
process which a busy machine lets stand for a second is no loss."""
DEADLINE = 60.0
"""Seconds for one order, of few connections or none."""
CYCLE_SECONDS = 0.25
"""What a connection may take at most on a busy machine: what it does on an idle one is
measured elsewhere, and a hang lasts for ever."""


def within(count: int) -> float:
    """Tell the seconds that an order of so many connections may take."""
    return DEADLINE + CYCLE_SECONDS * count


class Balance:
    """What processes held at one moment, to be compared later."""

    def __init__(self, peers: Any, processes: list[Process]) -> None:
        self._peers = peers
        self._facts = [(process, peers.idle(process)) for process in processes]

    def compare(self, run: Any, names: tuple[str, ...]) -> None:
        """Wait until everything is back; note how far memory has grown."""
        for (process, before), name in zip(self._facts, names, strict=True):
            after = self._peers.settled(process, before)
            for kind, limit in LIMITS[
                "traced" if before["traced"] else "plain"
            ].items():
                growth = after[kind] - before[kind]
                run.tell(**{f"{name}_{kind}_growth": growth})
                if growth > limit:
                    run.fail(f"{name}: {kind} grew by {growth}, {limit} allowed")


def cycles(server: Process, client: Process, port: int, count: int) -> dict[str, Any]:
    """Have one loop of the client connect, echo and close; gives what it said."""
    order = {"port": port, "count": count, "at_once": AT_ONCE}
    deadline = within(count)
    done: dict[str, Any] = client.ask("cycles", deadline=deadline, **order)
    told = server.ask("modes")
    assert set(done["modes"]) == {"smcr"}
    assert told["modes"] == done["modes"]
    assert done["first"] == done["then"], "the loop holds more than after its warm-up"
    return done


@pytest.mark.parametrize("kind", LIMITS)
def test_connections_leave_nothing(long_run, peers, kind) -> None:
    """Each loop of the client is another peer to the server: links come and go too."""
    flags = ("--traced",) if kind == "traced" else ()
    name = f"soak-shm-cycles-{kind}"
    server = peers.start("server", *flags, **CONFIG)
    client = peers.start("client", *flags, **CONFIG)
    port = server.ask("serve", kind="echo")["port"]
    with long_run(name, small=600 if flags else 2_000, full=100_000) as run:
        loops = 20 if run.is_full else 4
        for _ in range(3):  # warm: a tenth
            cycles(server, client, port, max(run.count // 30, 50))
        balance = Balance(peers, [server, client])
        if flags:
            server.ask("remember", deadline=DEADLINE)
        for _ in range(loops):
            done = cycles(server, client, port, run.count // loops)
            run.add(cycles=run.count // loops, connections=done["modes"]["smcr"])
            run.add(links=1)
        balance.compare(run, ("server", "client"))
        if flags and run.failed:
            run.tell(grown=server.ask("grown", deadline=DEADLINE)["grown"])


class Failing(NamedTuple):
    """A way in which connecting comes to nothing."""

    ends: str
    """How each attempt has to end."""
    server: dict[str, Any]
    client: dict[str, Any]
    serves: str = "echo"
    server_flags: tuple[str, ...] = ()
    client_flags: tuple[str, ...] = ()
    at_once: int = 8


STATIC = {"discovery": "static", "peers": "127.0.0.1"}
FAILING = {
    "refused": Failing("ConnectionRefusedError", {}, {}),
    "declined": Failing(
        # Another host, as far as its fabric can tell: no EID in common.
        "PEER_DECLINED",
        {},
        {},
        server_flags=("--eid", "PYSMC-SHM-ANOTHER-HOST"),
    ),
    "hushed": Failing(
        # The Proposal goes where nobody answers, and the client's wait ends.
        "HandshakeTimeout",
        {},
        STATIC | {"accept_wait": 0.02},
        serves="hush",
        server_flags=("--stock",),
        at_once=32,
    ),
    "silent": Failing(
        # No Proposal comes where one is expected, and the server's wait ends.
        "end of file",
        STATIC | {"proposal_wait": 0.02},
        {},
        client_flags=("--stock",),
        at_once=32,
    ),
}


@pytest.mark.parametrize("kind", FAILING)
def test_attempts_that_fail_leave_nothing(long_run, peers, kind) -> None:
    failing = FAILING[kind]
    server = peers.start("server", "--traced", *failing.server_flags, **failing.server)
    client = peers.start("client", "--traced", *failing.client_flags, **failing.client)
    port = server.ask("serve", kind=failing.serves)["port"]
    order = {"kind": kind, "port": port, "at_once": failing.at_once}
    if kind == "refused":
        order["port"] = 1  # tcpmux, which nobody serves
    with long_run(f"soak-shm-{kind}", small=300, full=10_000) as run:
        warm = max(run.count // 10, 100)
        client.ask("attempts", deadline=within(warm), count=warm, **order)
        balance = Balance(peers, [server, client])
        deadline = within(run.count)
        done = client.ask("attempts", deadline=deadline, count=run.count, **order)
        assert done["modes"] == {failing.ends: run.count}
        run.add(attempts=run.count)
        balance.compare(run, ("server", "client"))
