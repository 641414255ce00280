"""Days of simulated time: connections that live for long, and faults now and then.

`Soak` keeps a number of conversations alive in one world. Whoever has ended is judged
as in the swarm and replaced; every few minutes something goes wrong; processes die and
others take their place. What a day leaves behind is looked at in the end: nothing.

Source: RFC 7609 section 4.8 and A.3.8 (TEST LINK keeps idle links honest).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from pysmc.config import KIB, Config
from pysmc.testing.simulation.faults import KINDS, Fault, apply
from pysmc.testing.simulation.swarm import Outcome, judge
from pysmc.testing.simulation.workload import Town, draw_conversation
from pysmc.testing.simulation.world import World

if TYPE_CHECKING:
    from pysmc.testing.simulation.process import Process
    from pysmc.testing.simulation.workload import Conversation, Talking

__all__ = ["Soak"]

PROCESSES = 4
SLICE_SECONDS = 60.0
FAULT_EVERY_SECONDS = 300.0
TROUBLE_SECONDS = 150.0
"""How long after a fault that may hurt everybody a new conversation is excused."""
PAUSES_SECONDS = 600.0
PATIENCE_SECONDS = 400.0
"""How long a program waits for others beyond what both of them pause: longer than every
wait of ours that a fault can cause."""
END_SECONDS = 1_000.0
"""How long all that is left at the end may take to end."""
LEFT_OUT = frozenset({"close a server", "remove a device"})
"""Faults that end what the day needs for the rest of it."""
CONFIG = Config(rmbe_bytes=16 * KIB, sndbuf_bytes=16 * KIB)


class Soak:
    """A world that goes on for long.

    Args:
        seed: Decides everything.
        connections: How many conversations are alive at any time.
        check_every: Steps between two looks at all invariants.
    """

    def __init__(
        self, seed: int, connections: int = 64, *, check_every: int = 64
    ) -> None:
        self.world = World(seed, trace=False, check_every=check_every)
        self.world.network.tracing = False
        self.outcome = Outcome(seed)
        self._connections = connections
        self._rng = random.Random(f"{seed} soak")
        self._kinds = tuple(sorted(set(KINDS) - LEFT_OUT))
        self._born = 0
        self._troubled_until = 0.0
        self._left: deque[Talking] = deque()
        processes = [self._new_process() for _ in range(PROCESSES)]
        self.town = Town(self.world, processes, ())
        for number in range(PROCESSES):
            self.town.listen(number)

    def _new_process(self) -> Process:
        self._born += 1
        return self.world.process(f"process {self._born}", CONFIG)

    def run(self, hours: float) -> Outcome:
        """Let so many hours pass, then let everything end.

        Args:
            hours: Of simulated time.

        Returns:
            What happened, and what was broken.
        """
        world, outcome = self.world, self.outcome
        end = world.now + hours * 3600
        next_fault = world.now + self._until_fault()
        while world.now < end:
            self._fill()
            world.run(until=min(end, next_fault, world.now + SLICE_SECONDS))
            if world.now >= next_fault:
                # Not only at moments of rest: somewhere in what happens next.
                most = world.steps + self._rng.randrange(40)
                limit = world.now + SLICE_SECONDS
                world.run(until=lambda m=most, t=limit: self._reached(m, t))  # type: ignore[misc]
                self._break()
                next_fault = world.now + self._until_fault()
            self._reap()
        self._finish()
        outcome.steps, outcome.seconds = world.steps, world.now
        return outcome

    def _reached(self, steps: int, time: float) -> bool:
        return self.world.steps >= steps or self.world.now >= time

    def _until_fault(self) -> float:
        return self._rng.expovariate(1 / FAULT_EVERY_SECONDS)

    def _fill(self) -> None:
        """Begin as many conversations as are missing."""
        while len(self.town.talkings) < self._connections:
            talking = self.town.add(self._draw())
            if self.world.now < self._troubled_until:
                talking.excuses.append("recent trouble")

    def _draw(self) -> Conversation:
        drawn = draw_conversation(
            self._rng, PROCESSES, most_bytes=3000, pace=PAUSES_SECONDS
        )
        scripts = [
            replace(script, patience=PATIENCE_SECONDS, read_pause=0.0, linger=0.0)
            for script in (drawn.client, drawn.server)
        ]
        listener = self._rng.randrange(PROCESSES)
        caller = self._rng.randrange(PROCESSES)
        return replace(
            drawn,
            client=scripts[0],
            server=scripts[1],
            listener=listener,
            caller=caller,
            begin=self._rng.random() * SLICE_SECONDS,
        )

    # Faults

    def _break(self) -> None:
        """Let something go wrong, and replace who died of it."""
        kind = self._rng.choice(self._kinds)
        fault = Fault(kind, self.world.steps, self._rng.randrange(64))
        if not apply(self.world, self.town, fault):
            return
        if not KINDS[kind].armed:
            self.outcome.count(f"fault: {kind}")
        if KINDS[kind].scope == "all":
            self._troubled_until = self.world.now + TROUBLE_SECONDS
        for number, process in enumerate(self.town.processes):
            if process.is_crashed:
                self.town.processes[number] = self._new_process()
                self.town.listen(number)

    # Ends

    def _reap(self) -> None:
        for talking in [each for each in self.town.talkings if each.is_over]:
            self.town.remove(talking)
            # Its last words are read once everybody has had the time to hear them.
            self._left.append(talking)
        while len(self._left) > self._connections:
            judge(self._left.popleft(), self.outcome)

    def _finish(self) -> None:
        """Let everything end, and look at what is left."""
        world, town, outcome = self.world, self.town, self.outcome
        limit = world.now + END_SECONDS
        town.end()
        world.run(until=lambda: town.is_over or world.now > limit)
        town.close_servers()
        limit = world.now + SLICE_SECONDS * 2
        world.run(until=lambda: town.is_quiet or world.now > limit)
        world.run(until=world.now + 2 * CONFIG.idle_group_wait)
        for process in town.processes:
            driver = process.made_driver
            if driver is not None and driver.devices and driver.endpoint.groups:
                outcome.problems.append(f"{process.name}: groups are left")
        outcome.count_hits(world)
        outcome.problems += [f"left: {leak}" for leak in world.close()]
        outcome.problems += [f"reported: {error}" for error in world.errors]
        for talking in (*self._left, *town.talkings):
            judge(talking, outcome)
