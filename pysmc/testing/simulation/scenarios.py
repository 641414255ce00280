"""Canonical scenarios, and every single fault at every step of each.

A scenario is a `Spec` without chance in its program. Its steps are numbered E1, E2 and
so on; `cases` names every pair of a step and a fault, `play_case` plays one. Because a
world repeats itself exactly up to the fault, each case is one possible life of the
scenario, and nothing is left to luck.

Source: RFC 7609 sections 3.5, 4.6 and 4.8 for what there is to interrupt.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from pysmc.config import KIB, Config
from pysmc.core.tuning import Tuning
from pysmc.testing.simulation.faults import KINDS, Fault
from pysmc.testing.simulation.swarm import Outcome, Spec, play
from pysmc.testing.simulation.workload import Conversation, Script

__all__ = ["SCENARIOS", "Case", "cases", "play_case", "steps_of"]

ENDS = 2
"""So many of the things that a fault can hit are hit, each in a case of its own."""
CONFIG = Config(
    rmbe_bytes=16 * KIB,
    sndbuf_bytes=16 * KIB,
    test_link_interval=5.0,
    idle_group_wait=20.0,
)
TINY = Tuning(element_bytes=64, first_wrap=65_530, first_sequence=65_530)
READS = Script(api="protocol")
ANSWERS = Script(api="protocol", style="answer")


def _spec(
    seed: int,
    *conversations: Conversation,
    configs: tuple[Config, ...] = (CONFIG, CONFIG),
    faults: tuple[Fault, ...] = (),
    tuning: Tuning | None = None,
) -> Spec:
    # A server has to be there first, or it is found to be a plain one.
    later = tuple(replace(each, begin=each.begin + 0.125) for each in conversations)
    return Spec(
        seed=seed,
        configs=configs,
        conversations=later,
        faults=faults,
        tuning=Tuning() if tuning is None else tuning,
        newest_only=seed % 2 == 0,
        shuffle=False,
        is_patient=False,
        rests=True,
        check_every=1,
    )


def _asks(*writes: int, pauses: tuple[float, ...] = ()) -> Script:
    return Script(style="ask", writes=writes, pauses=pauses)


SCENARIOS: dict[str, Spec] = {
    "connect, echo and close": _spec(1, Conversation(1, 0, _asks(100, 1000), ANSWERS)),
    "the newest update alone": _spec(2, Conversation(1, 0, _asks(100, 1000), ANSWERS)),
    "reuse of a group": _spec(
        3,
        *(Conversation(1, 0, _asks(50), ANSWERS, begin=n * 0.25) for n in range(3)),
    ),
    "half close": _spec(
        4,
        Conversation(
            1, 0, Script(writes=(500,)), Script(writes=(300, 300), pauses=(0.1, 0.1))
        ),
    ),
    "full windows both ways": _spec(
        5,
        Conversation(
            1, 0, Script(api="buffer", writes=(300,)), replace(READS, writes=(300,))
        ),
        tuning=TINY,
    ),
    "declined by the server": _spec(
        6,
        Conversation(1, 0, _asks(100), ANSWERS),
        faults=(Fault("fail verb: region", 1, 0),),
    ),
    "declined by the client": _spec(
        7,
        Conversation(1, 0, _asks(100), ANSWERS),
        faults=(Fault("fail verb: region", 1, 1),),
    ),
    "a peer without SMC": _spec(
        8,
        Conversation(1, 0, _asks(100), ANSWERS),
        configs=(replace(CONFIG, fabrics=()), CONFIG),
    ),
    "abort": _spec(
        9,
        Conversation(
            1, 0, Script(api="protocol", writes=(200, 200), end="abort"), READS
        ),
        tuning=TINY,
    ),
    "idle with TEST LINK": _spec(
        10, Conversation(1, 0, _asks(10, 10, pauses=(0.0, 12.0)), ANSWERS)
    ),
    "a server closes amid handshakes": _spec(
        11,
        *(Conversation(1, 0, _asks(50), ANSWERS) for _ in range(3)),
        faults=(Fault("close a server", 25, 0),),
    ),
    "two groups": _spec(
        12,
        Conversation(1, 0, _asks(50), ANSWERS),
        Conversation(0, 1, _asks(50), ANSWERS),
    ),
}
"""What is done, by its name."""


class Case(NamedTuple):
    """One fault at one step of one scenario."""

    scenario: str
    """A key of `SCENARIOS`."""
    step: int
    """The fault happens before this step, from 1."""
    kind: str
    """A key of `KINDS`."""
    other: int = 0
    """Which of the things that it can hit, beginning with another one at each step."""

    @property
    def fault(self) -> Fault:
        """What happens."""
        return Fault(self.kind, self.step, self.step + self.other)

    def __str__(self) -> str:
        return f"{self.fault} of {self.scenario!r}"


@cache
def steps_of(scenario: str) -> int:
    """Tell how many steps a scenario has until its programs have ended."""
    spec = replace(SCENARIOS[scenario], rests=False)
    return play(spec).steps


def cases() -> list[Case]:
    """Name every fault at every step of every scenario, at both ends.

    A verb that fails is one of the next three; whose, the step decides.
    """
    return [
        Case(scenario, step, kind, other)
        for scenario in SCENARIOS
        for step in range(1, steps_of(scenario) + 1)
        for kind in KINDS
        for other in range(1 if kind.startswith("fail verb") else ENDS)
    ]


def play_case(case: Case, *, trace: bool = False) -> Outcome:
    """Play one case.

    Args:
        case: Which one.
        trace: Whether to keep what happened.

    Returns:
        The outcome; it counts "nothing to hit" where the fault found nothing.
    """
    spec = SCENARIOS[case.scenario]
    plan = sorted((*spec.faults, case.fault), key=lambda each: each.step)
    return play(replace(spec, faults=tuple(plan)), trace=trace)
