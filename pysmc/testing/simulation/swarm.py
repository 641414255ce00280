"""A swarm: thousands of drawn worlds, each played and judged.

`draw` makes a `Spec` of a seed: who there is, how they are configured, what they say to
each other, what goes wrong. `play` plays one and gives its `Outcome`. A run is good
when nothing that was promised was broken:

* what `pysmc.testing.simulation.talk` notes: right bytes, honest ends, one end each;
* whoever no fault could hurt has succeeded, completely and without an error;
* everybody came to an end by the library's own waits, not by the program's patience;
* no loop reported an error, all invariants hold, and nothing is left at the end.

Source: RFC 7609 sections 3.5.1.6.4, 4.6 and 4.8.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pysmc.config import KIB, Config
from pysmc.core.tuning import AS_SPECIFIED, Tuning
from pysmc.testing.simulation.faults import (
    KINDS,
    Fault,
    apply,
    draw_fault,
    happened,
    wait_for,
)
from pysmc.testing.simulation.workload import Conversation, Town, draw_conversation
from pysmc.testing.simulation.world import Stuck, TooManySteps, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pysmc.testing.simulation.process import Process
    from pysmc.testing.simulation.workload import Talking

__all__ = ["Outcome", "Spec", "draw", "judge", "play", "run_seed", "without_faults"]

STEPS_MAX = 400_000
"""A run with more steps never rests."""
SETTLE_SECONDS = 120.0
FAULTS_WEIGHTS = ((0, 15), (1, 40), (2, 25), (3, 12), (4, 8))


@dataclass(frozen=True, slots=True)
class Spec:
    """One world to play."""

    seed: int
    configs: tuple[Config, ...]
    """Of each process."""
    conversations: tuple[Conversation, ...]
    faults: tuple[Fault, ...] = ()
    tuning: Tuning = AS_SPECIFIED
    newest_only: bool | None = None
    """How updates travel; None lets the seed decide."""
    shuffle: bool = True
    tcp_delay: float = 0.0
    """Seconds that each TCP segment takes."""
    tcp_piece_bytes: int = 0
    tcp_buffer_bytes: int = 0
    """Size of TCP's buffers, 0 for what is usual."""
    rests: bool = False
    """Whether to wait until every link group has ended by itself."""
    is_patient: bool = True
    """Whether a fault that finds nothing to hit waits; otherwise the run ends there."""
    check_every: int = 16
    """Steps between two looks at all invariants."""

    def __str__(self) -> str:
        plan = "; ".join(map(str, self.faults)) or "no fault"
        return (
            f"{len(self.configs)} processes, {len(self.conversations)} conversations,"
            f" {plan}"
        )

    def describe(self) -> str:
        """Tell everything of it, a line each."""
        lines = [f"seed {self.seed}: {self}", *map(str, self.conversations)]
        lines += [f"process {n}: {config}" for n, config in enumerate(self.configs)]
        rest = (self.tuning, self.tcp_delay, self.tcp_piece_bytes)
        return "\n".join([*lines, f"tuning, delay and pieces of TCP: {rest}"])


@dataclass(slots=True)
class Outcome:
    """How a run went."""

    seed: int
    problems: list[str] = field(default_factory=list)
    """What was broken; none in a good run."""
    counts: dict[str, int] = field(default_factory=dict)
    """How often what happened: modes, endings, faults."""
    steps: int = 0
    seconds: float = 0.0
    """Simulated."""
    digest: str = ""
    """Of the trace, where there is one, else of the figures."""
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done = ", ".join(f"{n} x {what}" for what, n in sorted(self.counts.items()))
        return (
            f"{self.steps} steps, {self.seconds:.6f} simulated seconds,"
            f" digest {self.digest}: {done}"
        )

    @property
    def is_good(self) -> bool:
        """Whether nothing was broken."""
        return not self.problems

    def count(self, name: str) -> None:
        """Count something."""
        self.counts[name] = self.counts.get(name, 0) + 1

    def count_hits(self, world: World) -> None:
        """Count the faults that lay in wait, and came to pass."""
        for kind, times in happened(world).items():
            self.counts[f"fault: {kind}"] = times


# Drawing


def draw(seed: int) -> Spec:
    """Draw a world.

    Three of four are tiny: what goes wrong between two steps needs few of them, and
    many worlds. One in five is larger, one in twenty large.

    Args:
        seed: Decides everything.
    """
    rng = random.Random(f"{seed} swarm")
    size = rng.random()
    if size < 0.75:
        return _draw_tiny(rng, seed)
    is_large = size >= 0.95
    count = rng.choice((2, 2, 2, 3))
    shared = _draw_waits(rng)
    configs = tuple(_draw_config(rng, shared) for _ in range(count))
    tuning = _draw_tuning(rng)
    piece = rng.choice((0, 0, 0, 0, 0, 7, 100))
    # What takes thousands of steps tells no more than what takes hundreds.
    most = 20 * min(tuning.element_bytes or 200, piece or 200)
    if is_large and not (piece or tuning.element_bytes):
        most = rng.choice((20_000, 100_000, 300_000))
    talks = rng.choice((3, 4, 6, 8) if is_large else (1, 1, 2, 2, 3, 4))
    pace = rng.choice((0.01, 0.3, 3.0, 30.0))
    conversations = tuple(
        draw_conversation(rng, count, most_bytes=most, pace=pace) for _ in range(talks)
    )
    numbers, weights = zip(*FAULTS_WEIGHTS, strict=True)
    faults = rng.choices(numbers, weights)[0]
    return Spec(
        seed=seed,
        configs=configs,
        conversations=conversations,
        faults=_draw_plan(rng, faults, 70 * talks),
        tuning=tuning,
        tcp_delay=rng.choice((0.0, 0.0, 0.0, 0.001, 0.02)),
        tcp_piece_bytes=piece,
        tcp_buffer_bytes=rng.choice((0, 0, 0, 4096)),
        rests=rng.random() < 0.3,
    )


def _draw_tiny(rng: random.Random, seed: int) -> Spec:
    """Draw one conversation of a few hundred bytes between two processes."""
    shared = _draw_waits(rng)
    tuning = replace(_draw_tuning(rng), element_bytes=rng.choice((0, 0, 0, 64, 200)))
    most = 4 * (tuning.element_bytes or 100)
    pace = rng.choice((0.01, 0.3, 3.0, 30.0))
    talk = draw_conversation(rng, 2, most_bytes=most, pace=pace)
    return Spec(
        seed=seed,
        configs=tuple(_draw_config(rng, shared) for _ in range(2)),
        conversations=(talk,),
        faults=_draw_plan(rng, rng.choice((0, 1, 1, 1, 2)), 100),
        tuning=tuning,
        tcp_delay=rng.choice((0.0, 0.0, 0.0, 0.001)),
        rests=rng.random() < 0.15,
    )


def _draw_plan(rng: random.Random, count: int, steps: int) -> tuple[Fault, ...]:
    plan = [draw_fault(rng, steps) for _ in range(count)]
    return tuple(sorted(plan, key=lambda fault: fault.step))


def _draw_tuning(rng: random.Random) -> Tuning:
    return Tuning(
        element_bytes=rng.choice((0, 0, 0, 0, 0, 16, 17, 64, 1000)),
        first_wrap=rng.choice((0, 0, 65_530)),
        first_sequence=rng.choice((0, 0, 65_530)),
    )


def _draw_waits(rng: random.Random) -> dict[str, Any]:
    """Draw what should be alike at all ends."""
    confirm_link = rng.choice((0.5, 2.0))
    return {
        "confirm_link_server_wait": confirm_link,
        "confirm_link_client_wait": 2 * confirm_link,
        "decline_wait": confirm_link / 2,
        "test_link_interval": rng.choice((1.0, 5.0, 30.0)),
        "fallback": "require" if rng.random() < 0.02 else "allow",
    }


def _draw_config(rng: random.Random, shared: dict[str, Any]) -> Config:
    return Config(
        **shared,
        fabrics=() if rng.random() < 0.05 else ("shm",),
        discovery=() if rng.random() < 0.03 else ("local",),
        rmbe_bytes=rng.choice((16, 16, 16, 32)) * KIB,
        sndbuf_bytes=rng.choice((16, 16, 64)) * KIB,
        max_connections=rng.choice((16, 255)),
        max_handshakes=rng.choice((1, 2, 1024, 1024, 1024)),
        max_link_groups_per_peer=rng.choice((1, 8)),
        max_idle_rmbs=rng.choice((0, 1, 16)),
        max_pinned_bytes=rng.choice((1 << 20, 1 << 29)),
        close_wait=rng.choice((10.0, 30.0)),  # longer than any reader pauses
        llc_wait=rng.choice((0.5, 2.0)),
        idle_group_wait=rng.choice((0.5, 20.0, 600.0)),
        discovery_wait=rng.choice((0.3, 1.0)),
    )


# Playing


def run_seed(seed: int, *, trace: bool = False) -> Outcome:
    """Draw a world and play it.

    Args:
        seed: Decides everything.
        trace: Whether to keep what happened, line by line.
    """
    return play(draw(seed), trace=trace)


def play(spec: Spec, *, trace: bool = False) -> Outcome:
    """Play a world and judge it.

    Args:
        spec: What to play.
        trace: Whether to keep what happened, line by line.
    """
    outcome = Outcome(spec.seed)
    world = World(
        spec.seed,
        shuffle=spec.shuffle,
        newest_only=spec.newest_only,
        trace=trace,
        check_every=spec.check_every,
    )
    world.network.tracing = trace
    town = _make_town(world, spec)
    with _quiet():
        try:
            _run(world, town, spec, outcome)
        except (Stuck, TooManySteps, AssertionError) as error:
            outcome.problems.append(f"{type(error).__name__}: {error}")
        try:
            leaks = world.close()
        except AssertionError as error:
            outcome.problems.append(f"at the end: {error}")
        else:
            outcome.problems += [f"left: {leak}" for leak in leaks]
    _judge(world, town, spec, outcome)
    outcome.count_hits(world)
    outcome.steps, outcome.seconds = world.steps, world.now
    outcome.trace = world.trace
    told = "\n".join(world.trace) if trace else repr((world.steps, world.now))
    told += repr(sorted(outcome.counts.items())) + repr(outcome.problems)
    outcome.digest = hashlib.blake2s(told.encode()).hexdigest()[:16]
    return outcome


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let faults that are wanted not be logged."""
    loggers = [logging.getLogger(name) for name in ("pysmc", "asyncio")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, was_disabled in zip(loggers, before, strict=True):
            logger.disabled = was_disabled


def _make_town(world: World, spec: Spec) -> Town:
    names = ("server", "client", "third", "fourth")
    processes: list[Process] = []
    for number, config in enumerate(spec.configs):
        process = world.process(names[number], config)
        processes.append(process)
        if spec.tuning is not AS_SPECIFIED and config.fabrics:
            process.driver.open()
            process.driver.endpoint.tuning = spec.tuning
    world.tcp.delay = spec.tcp_delay
    if spec.tcp_piece_bytes:
        world.tcp.on_connection = lambda each: each.cut(spec.tcp_piece_bytes)
    if spec.tcp_buffer_bytes:
        world.tcp.sndbuf_bytes = world.tcp.rcvbuf_bytes = spec.tcp_buffer_bytes
    return Town(world, processes, spec.conversations)


def _run(world: World, town: Town, spec: Spec, outcome: Outcome) -> None:
    town.open()
    plan = deque(spec.faults)
    while plan:
        fault = plan.popleft()
        world.run(until=_reaches(world, town, fault.step), limit=STEPS_MAX)
        if town.is_over:
            break
        if apply(world, town, fault):
            if not KINDS[fault.kind].armed:
                outcome.count(f"fault: {fault.kind}")
        elif spec.is_patient:
            plan.append(wait_for(fault))
        else:
            outcome.count("nothing to hit")
            town.end()
    world.run(until=lambda: town.is_over, limit=STEPS_MAX)
    town.close_servers()
    _settle(world, town)
    if spec.rests:
        _rest(world, spec, outcome)


def _reaches(world: World, town: Town, step: int) -> Callable[[], bool]:
    return lambda: world.steps + 1 >= step or town.is_over


def _settle(world: World, town: Town) -> None:
    """Let the library end what it has begun, which may need its own waits.

    A caller may have ended before its server is given it. The server's program begins
    only then, and comes to its own end as every other.

    Raises:
        Stuck: A program is left that nothing can end.
        TooManySteps: A program does not come to its end.
    """
    was_over = False
    while not was_over:
        end = world.now + SETTLE_SECONDS
        world.run(
            until=lambda end=end: town.is_quiet or world.now > end,  # type: ignore[misc]
            limit=STEPS_MAX,
        )
        was_over = town.is_over
        world.run(until=lambda: town.is_over, limit=STEPS_MAX)


def _rest(world: World, spec: Spec, outcome: Outcome) -> None:
    """Wait until idle link groups have ended."""
    longest = max(config.idle_group_wait for config in spec.configs)
    world.run(until=world.now + longest + 60.0, limit=STEPS_MAX)
    for process in world.processes:
        driver: Any = process.made_driver
        if driver is None or not process.is_alive or not driver.devices:
            continue
        if driver.endpoint.groups:
            outcome.problems.append(f"{process.name}: {driver.endpoint.groups} idle")
        outcome.count("rested")


# Judging


def _judge(world: World, town: Town, spec: Spec, outcome: Outcome) -> None:
    outcome.problems += [f"reported: {error}" for error in world.errors]
    requires = any(config.fallback == "require" for config in spec.configs)
    for talking in town.talkings:
        if requires:
            talking.excuses.append("SMC-R is required")
        if _reads_too_slowly(talking.conversation, spec.configs):
            talking.excuses.append("nobody made room in time")
        judge(talking, outcome)


def _reads_too_slowly(conversation: Conversation, configs: tuple[Config, ...]) -> bool:
    """Tell whether who closes may wait in vain for room at its peer.

    A reader that pauses after each piece of what was handed over to it takes nothing
    more meanwhile, and ``close_wait`` ends the connection of who has closed.
    """
    client = conversation.client, configs[conversation.caller]
    server = conversation.server, configs[conversation.listener]
    for (reader, its), (_, other) in ((client, server), (server, client)):
        pieces = -(-its.rmbe_bytes // reader.read_bytes)
        if reader.read_pause * pieces >= other.close_wait:
            return True
    return False


def judge(talking: Talking, outcome: Outcome) -> None:
    """Judge one conversation that is over.

    Args:
        talking: Which one; its excuses say what may have hurt it.
        outcome: Gets the verdict.
    """
    problems = outcome.problems
    for end in talking.ends:
        end.expects_nothing()
        problems += end.violations
        if end.is_timed_out and not _may_wait_for_ever(talking):
            problems.append(f"{end.name}: its patience was over")
    is_excused = bool(talking.excuses) or talking.conversation.is_rude
    if talking.is_refused:
        outcome.count("ended: refused")
        if not is_excused:
            problems.append(f"client {talking.number}: {talking.client.error!r}")
        return
    outcome.count(f"mode: {talking.client.mode or 'none'}")
    outcome.count(f"ended: {_ending(talking)}")
    if is_excused:
        return
    for end in talking.ends:
        if end.error is not None:
            problems.append(f"{end.name}: {end.error!r}, and nothing could hurt it")
        elif not end.is_complete:
            problems.append(f"{end.name}: incomplete, and nothing could hurt it")


def _may_wait_for_ever(talking: Talking) -> bool:
    """Tell whether plain TCP has left a program without a word.

    It does so when the path is dead and nobody writes; and stock asyncio leaves a
    connection to the garbage collector when its server closes while it is accepted.
    """
    excuses = talking.excuses
    is_left = "close a server" in excuses and not talking.server.made
    return "kill TCP silently" in excuses or is_left


def _ending(talking: Talking) -> str:
    if talking.client.is_dead or talking.server.is_dead:
        return "a process died"
    if talking.is_complete:
        return "complete"
    errors = [end.error for end in talking.ends if end.error is not None]
    return type(errors[0]).__name__ if errors else "cut short"


def without_faults(spec: Spec) -> Spec:
    """Give the same world with nothing going wrong."""
    return replace(spec, faults=())
