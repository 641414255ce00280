"""Programs are drawn from a seed, and do what their scripts say."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pysmc.config import KIB, Config
from pysmc.core.tuning import Tuning
from pysmc.testing.simulation import World
from pysmc.testing.simulation.talk import APIS
from pysmc.testing.simulation.workload import (
    Conversation,
    Script,
    Talking,
    Town,
    draw_conversation,
)

CONFIG = Config(rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB)


def play(
    conversation: Conversation, seed: int = 1, *, element_bytes: int = 0
) -> Talking:
    world = World(seed)
    processes = [world.process(name, CONFIG) for name in ("server", "client")]
    for process in processes:
        process.driver.open()
        process.driver.endpoint.tuning = Tuning(element_bytes=element_bytes)
    town = Town(world, processes, (replace(conversation, begin=0.1),))
    town.open()
    world.run(until=lambda: town.is_over)
    town.close_servers()
    world.run(until=lambda: town.is_quiet)
    assert world.close() == []
    assert world.errors == []
    (talking,) = town.talkings
    for end in talking.ends:
        end.expects_nothing()
        assert end.violations == []
    return talking


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    def drawn(seed: int) -> list[Conversation]:
        rng = random.Random(seed)
        return [
            draw_conversation(rng, 3, most_bytes=5000, pace=1.0) for _ in range(200)
        ]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    scripts = [script for talk in drawn(1) for script in (talk.client, talk.server)]
    assert {script.api for script in scripts} == {"stream", "protocol", "buffer"}
    assert {script.style for script in scripts} == {"duplex", "ask", "answer"}
    assert {script.end for script in scripts} == {
        "finish", "follow", "close", "abort", "stop",
    }  # fmt: skip
    assert max(sum(script.writes) for script in scripts) <= 5000
    assert {talk.is_rude for talk in drawn(1)} == {True, False}
    assert any(talk.caller == talk.listener for talk in drawn(1))
    # Nobody waits for the end of one who reads on for ever.
    for talk in drawn(1):
        ends = {talk.client.end, talk.server.end}
        assert not {"follow", "stop"} <= ends


@pytest.mark.parametrize("api", ["stream", "protocol", "buffer"])
@pytest.mark.parametrize("style", ["duplex", "ask"])
def test_polite_programs_say_all(api: str, style: str) -> None:
    answers = "answer" if style == "ask" else "duplex"
    talking = play(
        Conversation(
            1,
            0,
            Script(api=api, style=style, writes=(10, 3000, 1), pauses=(0.0, 0.5)),
            Script(api=api, style=answers, read_bytes=100, read_pause=0.01),
        )
    )
    assert talking.is_complete
    assert talking.client.mode == "smcr"
    assert talking.client.flow.position == 3011
    assert talking.server.flow.position == (3011 if style == "ask" else 0)


@pytest.mark.parametrize("end", ["close", "abort", "stop"])
def test_rude_programs_end_as_they_say(end: str) -> None:
    client = Script(api="protocol", writes=(1000,), end=end)
    # The other one has more to say when the rude one goes.
    polite = Script(writes=(2000, 2000), pauses=(5.0,))
    talking = play(Conversation(1, 0, client, polite))
    assert talking.conversation.is_rude
    assert talking.is_over
    assert talking.client.has_closed
    assert talking.client.has_aborted is (end == "abort")
    assert not talking.is_complete


@pytest.mark.parametrize("step", range(1, 12))
def test_a_program_may_be_cancelled_at_any_step(step: int) -> None:
    script = Script(api="stream", writes=(5000,), cancel_step=step, linger=0.1)
    play(Conversation(1, 0, script, Script(api="protocol", writes=(100,))))
    play(Conversation(1, 0, Script(api="protocol", writes=(100,)), script))


def test_who_is_waited_for_too_long_is_left() -> None:
    waits = Script(api="protocol", end="follow", patience=5.0)
    talking = play(Conversation(1, 0, waits, replace(waits, patience=50.0)))
    assert talking.client.is_timed_out
    assert not talking.server.is_timed_out


def test_who_pauses_for_long_has_its_patience_beside() -> None:
    """Only the waits for others count, for either end."""
    reader = Script(read_bytes=4096, read_pause=2.0, pauses=(3.0,), patience=5.0)
    writer = Script(writes=(20_000,), linger=4.0, patience=5.0)
    talk = Conversation(1, 0, reader, writer)
    assert talk.pauses_seconds == 4 * 2.0 + 6 * 2.0 + 3.0 + 4.0
    talking = play(talk)
    assert talking.is_complete
    assert not any(end.is_timed_out for end in talking.ends)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("read_bytes", [100, 700, 4096, 65536])
@pytest.mark.parametrize("element_bytes", [0, 16])
def test_nobody_pauses_for_longer_than_is_told(
    api: str, read_bytes: int, element_bytes: int
) -> None:
    """However few bytes there is room for at once."""
    slow = Script(api, writes=(1, 17, 5000, 100), read_bytes=read_bytes, patience=1e-6)
    client, server = (replace(slow, read_pause=pause) for pause in (0.001, 0.003))
    talking = play(Conversation(1, 0, client, server), element_bytes=element_bytes)
    assert talking.is_complete
    assert not any(end.is_timed_out for end in talking.ends)


def test_a_call_that_nobody_takes_is_refused() -> None:
    world = World(1)
    processes = [world.process(name, CONFIG) for name in ("server", "client")]
    town = Town(world, processes, (Conversation(1, 0, Script(), Script(), begin=1.0),))
    town.open()
    world.run(until=0.5)
    town.close_servers()
    world.run(until=lambda: town.is_over)
    (talking,) = town.talkings
    assert talking.is_refused
    assert isinstance(talking.client.error, ConnectionRefusedError)
    assert world.close() == []


def test_conversations_come_and_go() -> None:
    world = World(1)
    processes = [world.process(name, CONFIG) for name in ("server", "client")]
    town = Town(world, processes, ())
    town.listen(0)
    for turn in range(3):
        asks = Script(style="ask", writes=(50,))
        talking = town.add(Conversation(1, 0, asks, Script(style="answer"), begin=0.1))
        world.run(until=lambda: town.is_over)
        assert talking.number == turn
        assert talking.is_complete
        town.remove(talking)
    assert not town.talkings
    town.close_servers()
    world.run(until=lambda: town.is_quiet)
    assert world.close() == []
