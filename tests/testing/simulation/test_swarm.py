"""The judge of the swarm notices what is wrong: known faults, put into the library."""

from __future__ import annotations

import gc
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.aio.negotiation import Negotiation
from pysmc.aio.transport import SmcTransport
from pysmc.aio.transport_reading import ReadingTransport
from pysmc.aio.write_queue import WriteQueue
from pysmc.config import KIB, Config
from pysmc.core.connection import Connection
from pysmc.core.cursor import Ring
from pysmc.core.events import News
from pysmc.core.keeper import Keeper
from pysmc.core.tuning import Tuning
from pysmc.testing.simulation.faults import Fault
from pysmc.testing.simulation.swarm import Outcome, Spec, draw, play, without_faults
from pysmc.testing.simulation.workload import Conversation, Script, Town

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pysmc.testing.invariants import Watch
    from pysmc.testing.simulation.talk import End
    from pysmc.testing.simulation.workload import Talking

CONFIG = Config(rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB, test_link_interval=5.0)
TALK = Conversation(
    1,
    0,
    Script(api="protocol", writes=(100, 700)),
    Script(api="buffer", writes=(300,)),
    begin=0.1,
)
SPEC = Spec(
    seed=5,
    configs=(CONFIG, CONFIG),
    conversations=(TALK,),
    tuning=Tuning(element_bytes=64),
    newest_only=False,
    rests=True,
    check_every=1,
)

UNCLOSED = pytest.mark.filterwarnings(
    "ignore:unclosed transport:ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
"""Where the library is broken so that transports are left."""


@pytest.fixture(autouse=True)
def broken(monkeypatch: pytest.MonkeyPatch, invariants: Watch) -> Iterator[None]:
    """The library is broken here: it is logged, invariants fail, some never rest."""
    monkeypatch.setattr("pysmc.testing.simulation.swarm.STEPS_MAX", 5000)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    monkeypatch.undo()
    invariants.take()
    # What was left behind dies here, and not in somebody else's test.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    gc.collect()


def told(spec: Spec = SPEC) -> str:
    return "\n".join(play(spec).problems)


def test_a_world_without_faults_is_good() -> None:
    outcome = play(SPEC, trace=True)
    assert outcome.problems == []
    assert outcome.is_good
    assert outcome.counts == {"mode: smcr": 1, "ended: complete": 1, "rested": 2}
    assert any("got the end of file" in line for line in outcome.trace)
    assert outcome.digest in str(outcome)
    assert "2 processes, 1 conversations, no fault" in SPEC.describe()


def test_a_drawn_world_depends_on_its_seed_alone() -> None:
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert without_faults(draw(7)).faults == ()


# Callers that have ended before their server is given them

ASKS = Conversation(1, 0, Script(style="ask"), Script(style="answer"), begin=0.1)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Talking]:
    """Conversations whose callers had ended, and whose servers had not begun."""
    found: list[Talking] = []
    right = Town.close_servers

    def close_servers(self: Town) -> None:
        right(self)
        found.extend(each for each in self.talkings if not each.server.made)

    monkeypatch.setattr(Town, "close_servers", close_servers)
    return found


def made_late(late: list[Talking]) -> list[End]:
    return [talking.server for talking in late if talking.server.made]


def cancel_callers(talk: Conversation = ASKS) -> Iterator[Outcome]:
    """Play worlds in which a caller is cancelled, before every step of a handshake."""
    for step in range(4, 40):
        fault = Fault("cancel a task", step)
        yield play(Spec(5, (CONFIG, CONFIG), (talk,), (fault,)))


@pytest.mark.parametrize("cancel_step", [0, 1])
def test_a_server_is_waited_for_though_its_caller_has_ended(
    late: list[Talking], cancel_step: int
) -> None:
    """It is given the caller later, and comes to its own end."""
    talk = replace(ASKS, server=replace(ASKS.server, cancel_step=cancel_step))
    for outcome in cancel_callers(talk):
        assert outcome.problems == []
    servers = made_late(late)
    assert {server.mode for server in servers} == {"smcr", "tcp"}
    assert all(server.is_over for server in servers)


def test_a_server_has_its_patience_though_its_caller_has_ended(
    late: list[Talking],
) -> None:
    """The path is dead, and its patience longer than the waits of the library."""
    talk = replace(ASKS, client=replace(ASKS.client, end="abort"))
    fault = Fault("kill TCP silently", 4)
    for seed in range(30):
        outcome = play(Spec(seed, (CONFIG, Config(fabrics=())), (talk,), (fault,)))
        assert outcome.problems == [], seed
    servers = made_late(late)
    assert servers
    assert all(server.is_timed_out and server.is_over for server in servers)


@UNCLOSED
@pytest.mark.parametrize(
    ("method", "cancel_step", "problem"),
    [
        ("_call_connection_lost", 1, "connection_lost never came"),
        ("receive_news", 0, "its patience was over"),
    ],
)
def test_a_server_that_hangs_is_noticed_though_its_caller_has_ended(
    monkeypatch: pytest.MonkeyPatch,
    late: list[Talking],
    method: str,
    cancel_step: int,
    problem: str,
) -> None:
    """It is not told of the end; of the connection's, or of the file's."""
    right = getattr(SmcTransport, method)

    def wrong(self: SmcTransport, about: Any) -> None:
        talks = [talking.server.talk for talking in late]
        if any(talk is not None and talk.transport is self for talk in talks):
            self._stop_waiting()
        else:
            right(self, about)

    monkeypatch.setattr(SmcTransport, method, wrong)
    talk = replace(ASKS, server=replace(ASKS.server, cancel_step=cancel_step))
    told = [" ".join(outcome.problems) for outcome in cancel_callers(talk)]
    hangs = [each for each in told if each]
    assert len(hangs) == sum(server.mode == "smcr" for server in made_late(late)) > 0
    assert all(f"server 0: {problem}" in each for each in hangs)


# Known faults, put into the library


def test_a_cursor_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ring.pack

    def wrong(self: Ring, position: int) -> int:
        return right(self, position + 1 if position == 200 else position)

    monkeypatch.setattr(Ring, "pack", wrong)
    monkeypatch.setattr(Connection, "peek", _peek_one_further)
    assert "of the same flow, too early" in told()


def _peek_one_further(self: Connection, limit: int) -> tuple[int, int]:
    ring = self._ring
    start = (self._rx_consumed + 1) % ring.capacity
    unread = self._rx_produced - self._rx_consumed
    return (start, min(unread, limit, ring.capacity - start))


def test_bytes_of_the_last_turn_of_the_ring_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Announced before they were written: the bytes before them lie there still."""
    right = WriteQueue._post

    def wrong(self: WriteQueue, rkey: int, address: int, length: int) -> None:
        if self.size > 200 or self.size < 100:
            right(self, rkey, address, length)
        else:
            self.size -= length
            self._waiting[0] = memoryview(self._waiting[0])[length:]

    monkeypatch.setattr(WriteQueue, "_post", wrong)
    assert "again" in told()


def test_a_doubled_byte_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Connection.consume

    def wrong(self: Connection, count: int) -> bool:
        return right(self, max(1, count - 1))

    monkeypatch.setattr(Connection, "consume", wrong)
    assert "of the same flow, again" in told(replace(SPEC, tuning=Tuning()))


def test_an_end_of_file_before_the_last_bytes_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = SmcTransport.write_eof

    def wrong(self: SmcTransport) -> None:
        self._queue.clear()
        right(self)

    monkeypatch.setattr(SmcTransport, "write_eof", wrong)
    assert "an end of file came at" in told()


def test_an_abort_told_as_an_end_of_file_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(self: Any, error: Exception) -> None:
        if self._conn_lost or self._over is not None:
            return
        self._peer_done = True
        self._deliver_eof()
        self._force_close(None)

    monkeypatch.setattr(ReadingTransport, "lose", wrong)
    cut = replace(SPEC, faults=(Fault("cut a link", 100),))
    assert "an end of file came at 256 of 300 bytes" in told(cut)


@UNCLOSED
@pytest.mark.parametrize("read_pause", [0.0, 300.0])
def test_a_lost_wake_up_is_noticed(
    monkeypatch: pytest.MonkeyPatch, read_pause: float
) -> None:
    """Also where a program pauses for longer than it waits for others."""
    right = Connection._follow_cursors

    def wrong(self: Connection, producer: int, consumer: int) -> int:
        return right(self, producer, consumer) & ~News.SPACE

    monkeypatch.setattr(Connection, "_follow_cursors", wrong)
    talk = replace(TALK, client=replace(TALK.client, read_pause=read_pause))
    assert "its patience was over" in told(replace(SPEC, conversations=(talk,)))


@UNCLOSED
def test_a_buffer_that_is_not_given_back_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Keeper, "give_rmb", lambda *args, **options: None)
    monkeypatch.setattr(Keeper, "leave", lambda *args: None)
    assert "places and users differ" in told()


def test_a_group_that_is_not_given_up_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Keeper.leave

    def wrong(self: Keeper, group: Any, now: float) -> None:
        right(self, group, now)
        self._context.timers.cancel(("idle", group))

    monkeypatch.setattr(Keeper, "leave", wrong)
    assert "idle" in told()


def test_a_clc_message_in_the_stream_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Decline that the other end does not read as one, as in CVE-2023-52775."""
    right = Negotiation.send

    def wrong(self: Negotiation, data: bytes) -> None:
        right(self, data * 2 if self.role == "server" else data)

    monkeypatch.setattr(Negotiation, "send", wrong)
    declined = replace(SPEC, faults=(Fault("fail verb: region", 1, 0),))
    assert "client 0: 5/0back: at byte 0 came a CLC message" in told(declined)


def test_two_ends_of_one_connection_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = SmcTransport._call_connection_lost

    def wrong(self: SmcTransport, error: BaseException | None) -> None:
        self._protocol.connection_lost(error)
        right(self, error)

    monkeypatch.setattr(SmcTransport, "_call_connection_lost", wrong)
    assert "connection_lost came 2 times" in told()


@UNCLOSED
def test_no_end_of_a_connection_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SmcTransport, "_call_connection_lost", lambda *args: args[0]._stop_waiting()
    )
    assert "connection_lost never came" in told()


@UNCLOSED
def test_an_error_of_a_callback_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: SmcTransport, news: int) -> None:
        message = "on purpose"
        raise ValueError(message)

    monkeypatch.setattr(SmcTransport, "receive_news", wrong)
    assert "reported: " in told()
    assert "on purpose" in told()


@UNCLOSED
def test_who_could_not_be_hurt_and_fails_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A completion that is told twice must not matter."""
    monkeypatch.setattr(Connection, "publish_completed", _believe_everything)
    doubled = replace(SPEC, faults=(Fault("double completions", 90, 3),))
    assert told(doubled)


def _believe_everything(self: Connection, sequence: int | None = None) -> int:
    self._tx_completed += self._posted.popleft()[1]
    return News.SPACE


def test_a_lost_link_that_takes_others_with_it_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Keeper.end_group
    ending: list[Any] = []

    def wrong(self: Keeper, group: Any, now: float, **how: Any) -> None:
        right(self, group, now, **how)
        if ending:
            return
        ending.append(group)
        for each in self.groups.all():
            right(self, each, now, **how)
        ending.clear()

    # Two writes with a pause between them, in which the link of the first one is cut.
    talk = replace(TALK, client=replace(TALK.client, pauses=(0.0, 9.0)))
    two = replace(
        SPEC,
        configs=(CONFIG, CONFIG, CONFIG),
        conversations=(talk, replace(talk, caller=2)),
    )
    cuts = [
        replace(two, faults=(Fault("cut a link", step),)) for step in (250, 300, 350)
    ]
    assert [told(cut) for cut in cuts] == ["", "", ""]
    monkeypatch.setattr(Keeper, "end_group", wrong)
    assert any("and nothing could hurt it" in told(cut) for cut in cuts)


@UNCLOSED
def test_a_world_that_never_rests_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pysmc.testing.simulation.swarm.STEPS_MAX", 60)
    assert "TooManySteps" in told()


def test_an_outcome_counts() -> None:
    outcome = Outcome(3)
    outcome.count("a")
    outcome.count("a")
    assert outcome.counts == {"a": 2}
    assert str(outcome).startswith("0 steps, 0.000000 simulated seconds")
