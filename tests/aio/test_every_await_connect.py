"""create_connection is struck at each of its points, on every way of a connection."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import pysmc
from pysmc import discovery
from pysmc.aio import loop as loop_module
from pysmc.aio.negotiation import Negotiation
from pysmc.config import Config
from pysmc.core import actions
from pysmc.core.roles import Role
from pysmc.reasons import reason
from tests.aio import every_await as harness
from tests.aio.every_await import HOST, Scene, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

pytestmark = pytest.mark.slow

LISTED = Config(discovery=("static",), peers=(HOST,))
REFUSED = reason("IPSEC", "local")


class Connect(Scene):
    """create_connection to a host.

    Args:
        why: Name of the reason for which it stays on TCP; empty for SMC-R.
        around: What goes wrong meanwhile.
    """

    def __init__(
        self,
        why: str = "",
        around: Callable[[Any], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.why = why
        self._around = around

    async def prepare(self, stage: Stage) -> None:
        self.port = await stage.serve()

    def around(self, stage: Stage) -> contextlib.AbstractContextManager[Any]:
        if self._around is None:
            return contextlib.nullcontext()
        return self._around(stage.loop.driver)

    def play(self, stage: Stage) -> Coroutine[Any, Any, Any]:
        return stage.loop.create_connection(stage.make_near, HOST, self.port)

    async def check(self, stage: Stage, strike: str) -> None:
        for end in stage.near:
            if end.transport is not None and strike in {"", "stop the loop"}:
                info = end.transport.get_extra_info("smc")
                assert (info.reason.name if info.reason else "") == self.why

    async def prove(self, stage: Stage) -> None:
        await harness.prove_by_streams(stage, "smcr")


def strike_reuse(scene: Scene, strike: str, config: Config) -> int:
    """Strike at each point, on a loop whose ends have a link group already."""

    async def main() -> int:
        stage = Stage(asyncio.get_running_loop(), 0)
        await scene.prove(stage)
        await stage.clear()
        return await harness.strike_everywhere(scene, strike)

    points: int = harness.run_on(lambda: pysmc.new_event_loop(config), main)
    return points


# What may go wrong on the way, by role


@contextlib.contextmanager
def failing(driver: Any, kind: type, role: Role, fail: str) -> Iterator[None]:
    """Let orders of one kind fail for the link groups of one role."""
    real = driver._orders[kind]

    def carry_out(action: Any) -> None:
        subject = action.rmb if fail == "memory_failed" else action.link
        if subject.group.role is role:
            answer = getattr(driver.endpoint, fail)
            answer(subject, "no memory", "as the test wants it", driver.time())
        else:
            real(action)

    driver._orders[kind] = carry_out
    try:
        yield
    finally:
        driver._orders[kind] = real


@contextlib.contextmanager
def refusing(role: str) -> Iterator[None]:
    """Let one end decline whatever comes."""
    real = Negotiation.run

    async def run(self: Negotiation, refusal: Any = None) -> Any:
        return await real(self, REFUSED if self.role == role else refusal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Negotiation, "run", run)
        yield


@contextlib.contextmanager
def without_room(driver: Any) -> Iterator[None]:
    """Let others take the last room while the socket connects."""
    real = loop_module.negotiate_client

    async def crowded(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "has_room", lambda: False)
            return await real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "negotiate_client", crowded)
        yield


@contextlib.contextmanager
def without_a_syn(driver: Any) -> Iterator[None]:
    """Let the kernel keep no SYN, as under SYN cookies; the client waits in vain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.discovery, "_wait", 0.02)
        patch.setattr(loop_module, "read_mark", lambda conn: None)
        patch.setattr(discovery, "read_mark", lambda conn: None)
        yield


@contextlib.contextmanager
def unannounced(driver: Any) -> Iterator[None]:
    """Let the listener have no beacon any more."""
    with pytest.MonkeyPatch.context() as patch:
        for lookup in (driver.lookup, driver.discovery._lookup):
            patch.setattr(lookup, "has_port", lambda port: False)
        yield


class Way(NamedTuple):
    """What goes wrong on a connection's way, and what the application is told."""

    around: Callable[[Any], contextlib.AbstractContextManager[Any]]
    client: str
    """Name of the client's reason."""
    points: int
    """Points that a connect has at least."""
    strikes: Sequence[str] = ("cancel", "peer aborts", "cancel the accept")


PLAIN = ("cancel", "close", "abort")
"""On a connection that is plain TCP the accept is the stock loop's own, which leaves
a socket to the garbage collector when its task or its server ends too early."""


def failing_at(role: Role, kind: type, fail: str) -> Any:
    return lambda driver: failing(driver, kind, role, fail)


PEER = "PEER_DECLINED"
NO_MEMORY = (actions.RegisterMemory, "memory_failed")
NO_PAIR = (actions.CreateQueuePair, "pair_failed")
NO_LINK = (actions.ConnectQueuePair, "pair_failed")

FIRST_CONTACTS = {
    "no memory at the client": Way(
        failing_at(Role.CLIENT, *NO_MEMORY), "NO_MEMORY", 18
    ),
    "no memory at the server": Way(failing_at(Role.SERVER, *NO_MEMORY), PEER, 20),
    "no queue pair at the client": Way(
        failing_at(Role.CLIENT, *NO_PAIR), "NO_MEMORY", 18
    ),
    "no queue pair at the server": Way(failing_at(Role.SERVER, *NO_PAIR), PEER, 20),
    "no link at the client": Way(failing_at(Role.CLIENT, *NO_LINK), "NO_MEMORY", 18),
    "no link at the server": Way(failing_at(Role.SERVER, *NO_LINK), "NO_DEVICE", 20),
}
"""What can only go wrong while a link group is made."""

REUSES = {
    "refused by the client": Way(lambda _: refusing("client"), "IPSEC", 10),
    "refused by the server": Way(lambda _: refusing("server"), PEER, 20),
    "no room": Way(without_room, "LIMIT", 8),
    "no SYN": Way(without_a_syn, "MARK_LOST", 10),
    "no beacon": Way(unannounced, "PEER_NO_SMC", 8, PLAIN),
}
"""What ends before it matters whether there is a link group."""


def each_strike(ways: dict[str, Way]) -> Any:
    rows = [(way, strike) for way in ways for strike in ways[way].strikes]
    return pytest.mark.parametrize(("way", "strike"), rows)


ALL = [*harness.BY_TASK, *harness.BY_PEER, "close", "abort", "stop the loop"]


@pytest.mark.parametrize("strike", ALL)
def test_reuse(strike) -> None:
    assert strike_reuse(Connect(), strike, Config()) >= 16


@pytest.mark.parametrize("strike", ALL)
def test_listed_peer(strike) -> None:
    """Nobody is asked: CLC begins at once."""
    assert strike_reuse(Connect(), strike, LISTED) >= 15


@pytest.mark.parametrize("strike", ["cancel", "cancel the accept"])
@pytest.mark.usefixtures("option")
def test_shown_by_the_option(strike) -> None:
    """Nobody is asked either, but the server looks before it reads."""
    config = Config(discovery=("tcp_option", "local"))
    assert strike_reuse(Connect(), strike, config) >= 15


@pytest.mark.parametrize("strike", ALL)
def test_first_contact(strike) -> None:
    """The link group is made, too."""
    points = harness.strike_first_contacts(Connect(), strike, pysmc.new_event_loop)
    assert points >= 20


@each_strike(FIRST_CONTACTS)
def test_first_contact_declined(way, strike) -> None:
    what = FIRST_CONTACTS[way]
    scene = Connect(what.client, what.around)
    points = harness.strike_first_contacts(scene, strike, pysmc.new_event_loop)
    assert points >= what.points


@each_strike(REUSES)
def test_declined(way, strike) -> None:
    what = REUSES[way]
    points = strike_reuse(Connect(what.client, what.around), strike, Config())
    assert points >= what.points


def test_the_ways_are_many() -> None:
    strikes = [len(way.strikes) for way in (FIRST_CONTACTS | REUSES).values()]
    assert sum(strikes) + 3 * len(ALL) >= 60
