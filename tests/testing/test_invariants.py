"""Every invariant that is watched, broken on purpose once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pysmc.aio.negotiation import Negotiation
from pysmc.aio.pump import Pump
from pysmc.aio.transport_end import EndingTransport
from pysmc.core.actions import (
    ClearMemory,
    CloseGroup,
    CloseQueuePair,
    DeregisterMemory,
)
from pysmc.core.endpoint import Endpoint
from pysmc.errors import ConnectionReset
from pysmc.fabric.base import Completion, CompletionKind, Status
from pysmc.testing.invariants import ENVIRONMENT, Watch, install_if_asked
from pysmc.testing.loops import SimLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 20.0


class Scene(NamedTuple):
    """Both ends of one connection in one loop, and what is behind the server's."""

    loop: SimLoop
    driver: Any
    client: Any
    server: Any

    @property
    def connection(self) -> Any:
        return self.server._connection

    @property
    def group(self) -> Any:
        return self.connection.group

    @property
    def link(self) -> Any:
        return self.connection.link

    def order(self, action: Any) -> None:
        self.driver._orders[type(action)](action)


async def connect(loop: SimLoop) -> Scene:
    """Connect in the running loop."""
    accepted: asyncio.Future[Any] = loop.create_future()

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.set_result(transport)

    async with asyncio.timeout(PATIENCE):
        server = await loop.create_server(Server, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
        scene = Scene(loop, loop.driver, client, await accepted)
        server.close()
    return scene


def play(do: Callable[[Scene], Any]) -> None:
    """Connect, do something wrong, and close the loop whatever that led to."""
    scenes: list[Scene] = []

    async def main() -> None:
        scenes.append(await connect(loop))
        result = do(scenes[0])
        if asyncio.iscoroutine(result):
            await result

    loop = SimLoop()
    loop.set_exception_handler(lambda *_: None)
    try:
        loop.run_until_complete(main())
    finally:
        with contextlib.suppress(Exception):
            loop.close()
        for transport in (scenes[0].client, scenes[0].server):
            if transport._sock is not None:
                transport._sock.close()
                transport._sock = None


def settle_elsewhere(scene: Scene) -> Any:
    return asyncio.to_thread(scene.driver.settle)


def miscount_places(scene: Scene) -> None:
    scene.group.places_taken += 1
    scene.driver.settle()
    scene.group.places_taken -= 1


def miscount_bytes(scene: Scene) -> None:
    scene.group.rmb_bytes += 1
    scene.driver.endpoint._keeper.rmb_bytes += 1
    scene.driver.settle()
    scene.group.rmb_bytes -= 1
    scene.driver.endpoint._keeper.rmb_bytes -= 1


def close_a_pair_that_is_found(scene: Scene) -> None:
    scene.order(CloseQueuePair(scene.link))


def release_memory_before_the_pair(scene: Scene) -> None:
    scene.order(CloseGroup(scene.group))


def deregister_what_is_used(scene: Scene) -> None:
    scene.order(DeregisterMemory(scene.connection.rmb))


def deregister_twice(scene: Scene) -> None:
    scene.order(DeregisterMemory(scene.connection.rmb))
    scene.order(DeregisterMemory(scene.connection.rmb))


def clear_what_is_used(scene: Scene) -> None:
    scene.order(ClearMemory(scene.connection.rmb, 1))


def give_back_too_early(scene: Scene) -> None:
    keeper = scene.driver.endpoint._keeper
    keeper.remove_connection(scene.connection, 0.0, clean=True)


async def find_in_an_ended_group(scene: Scene) -> None:
    scene.group.is_ended = True
    scene.client.write(b"late")
    await asyncio.sleep(0)
    scene.driver.pump_all()
    scene.group.is_ended = False


def go_down_twice(scene: Scene) -> None:
    pair = scene.link.handle
    down = Completion(CompletionKind.DOWN, pair, Status.PEER_GONE)
    for _ in range(2):
        scene.driver._take_control(scene.link, down, scene.driver.time())


def two_verdicts(scene: Scene) -> None:
    negotiation = Negotiation(scene.driver, scene.server._sock, "client")
    for _ in range(2):
        negotiation.failed(ConnectionReset("once is enough"))


async def lose_twice(scene: Scene) -> None:
    scene.server.abort()
    for _ in range(3):
        await asyncio.sleep(0)
    with contextlib.suppress(AttributeError):
        scene.server._call_connection_lost(None)


def lose_before_the_release(scene: Scene) -> None:
    scene.server._call_connection_lost(None)


BREAKING: dict[str, tuple[Callable[[Scene], Any], str, str]] = {
    "thread": (settle_elsewhere, "one owner", "settle() in another thread"),
    "places": (miscount_places, "consistent core", "places and users differ"),
    "bytes": (miscount_bytes, "counted bytes", "bytes are registered"),
    "listed": (close_a_pair_that_is_found, "unpublished first", "is listed while"),
    "found": (close_a_pair_that_is_found, "unpublished first", "connections are found"),
    "deadline": (close_a_pair_that_is_found, "unpublished first", "a deadline for"),
    "order": (
        release_memory_before_the_pair,
        "queue pairs before memory",
        "is open while its memory goes",
    ),
    "deregister": (deregister_what_is_used, "memory in use", "is deregistered"),
    "state": (deregister_what_is_used, "unpublished first", "and in use"),
    "twice": (deregister_twice, "one end", "is deregistered twice"),
    "clear": (clear_what_is_used, "memory in use", "is cleared"),
    "reuse": (give_back_too_early, "memory in use", "before both ends have ended it"),
    "lookup": (find_in_an_ended_group, "unpublished first", "an update on"),
    "down": (go_down_twice, "one end", "went down twice"),
    "verdict": (two_verdicts, "one end", "has two verdicts"),
    "lost": (lose_twice, "one end", "connection_lost comes twice"),
    "released": (lose_before_the_release, "order of an end", "our side was given back"),
    "at work": (lose_before_the_release, "order of an end", "still at work"),
}


@pytest.mark.parametrize("what", BREAKING)
def test_an_invariant_that_is_broken_is_found(invariants, what) -> None:
    do, rule, text = BREAKING[what]
    play(do)
    found = [each for each in invariants.take() if each.rule == rule]
    assert any(text in each.text for each in found), found
    assert do.__name__ in "".join(each.stack for each in found) or what in {
        "thread",  # another one's stack
        "lookup",  # the loop comes upon it
    }
    assert any("driver" in event for event in found[0].events)


def test_what_a_transport_leaves_behind_is_found(invariants, monkeypatch) -> None:
    async def end(scene: Scene) -> None:
        monkeypatch.setattr(EndingTransport, "_stop_waiting", lambda _: None)
        scene.server.abort()
        for _ in range(3):
            await asyncio.sleep(0)

    play(end)
    rules = {each.rule: each.text for each in invariants.take()}
    assert "its place in the selector" in rules["nothing behind the end"]


def test_what_outlives_a_driver_is_found(invariants, monkeypatch) -> None:
    monkeypatch.setattr(Endpoint, "shutdown", lambda *_: None)
    play(lambda _: None)
    rules = {each.rule: each.text for each in invariants.take()}
    text = rules["nothing outlives a driver"]
    assert "<LinkGroup" in text
    assert "a deadline" in text


def test_a_timer_that_outlives_its_driver_is_found(invariants) -> None:
    def wait(scene: Scene) -> None:
        scene.loop.call_later(60, scene.server._watch_close)

    play(wait)
    rules = {each.rule: each.text for each in invariants.take()}
    text = rules["nothing outlives a driver"]
    assert "a timer for EndingTransport._watch_close" in text


def test_what_is_right_is_not_found(invariants) -> None:
    async def talk(scene: Scene) -> None:
        scene.client.write(b"hello")
        scene.client.close()
        for _ in range(5):
            await asyncio.sleep(0)

    play(talk)
    assert invariants.take() == []
    invariants.check()


@pytest.fixture
def own_watch(_watch: Watch) -> Iterator[Watch]:
    """Another watch, while the one of all tests is away."""
    _watch.remove()
    watch = Watch()
    yield watch
    watch.remove()
    _watch.install()


def test_check_says_which_rule_where_and_after_what(own_watch) -> None:
    own_watch.install()
    play(go_down_twice)
    with pytest.raises(AssertionError, match="one end: queue pair .* went down twice"):
        own_watch.check()
    own_watch.check()


def test_it_goes_without_a_trace(own_watch) -> None:
    before = dict(vars(Pump)), dict(vars(EndingTransport))
    own_watch.install()
    own_watch.install()
    assert vars(Pump)["settle"] is not before[0]["settle"]
    own_watch.remove()
    own_watch.remove()
    assert (dict(vars(Pump)), dict(vars(EndingTransport))) == before


def test_only_so_many_findings_are_kept(own_watch) -> None:
    own_watch.install()

    def often(scene: Scene) -> None:
        for _ in range(50):
            clear_what_is_used(scene)

    play(often)
    assert len(own_watch.take()) == 20


def test_it_is_installed_in_a_process_that_asks(own_watch, monkeypatch, capsys) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert install_if_asked() is None
    monkeypatch.setenv(ENVIRONMENT, "1")
    watch = install_if_asked()
    assert watch is not None
    try:
        play(go_down_twice)
    finally:
        watch.remove()
    assert "Traceback (most recent call last): an invariant\none end: queue pair" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_production_knows_nothing_of_it() -> None:
    program = "import sys, pysmc.aio.loop; print('pysmc.testing' in str(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {ENVIRONMENT: "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert done.stdout == "False\n"
