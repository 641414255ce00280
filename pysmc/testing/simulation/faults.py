"""Fault plans: what goes wrong in a world, before which step, and whom it may hurt.

A `Fault` is a word, a step and a few numbers, so that a plan can be printed, drawn from
a seed and enumerated. `apply` lets it happen. `Kind.scope` says who may fail because of
it: all who talk over what it hits, one conversation, or nobody, because the library has
to survive it.

Source: the fault models of RFC 7609 sections 4.6 and 4.8, tcp(7), signal(7).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pysmc.fabric.base import Status, Update
from pysmc.fabric.sim_faults import VERBS

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from pysmc.fabric.sim_device import SimDevice, SimQueuePair
    from pysmc.fabric.sim_faults import Faults
    from pysmc.testing.simulation.process import Process
    from pysmc.testing.simulation.tcp import TcpConnection
    from pysmc.testing.simulation.workload import Town
    from pysmc.testing.simulation.world import World

__all__ = ["KINDS", "Fault", "Kind", "apply", "draw_fault", "happened", "wait_for"]

SHORT_SECONDS = 0.05
"""A fault that lasts so long hurts nobody: every wait is longer."""
LONG_SECONDS = 45.0
"""A fault that lasts so long ends what it hits."""

WAIT_STEPS = 9

_CONNECT_STATUSES = (Status.UNREACHABLE, Status.TIMED_OUT, Status.NO_MEMORY)


Hit: TypeAlias = "bool | frozenset[Process]"
"""The processes that a fault has hit, both ends of a link; True for any of them, False
for none."""


class Kind(NamedTuple):
    """What a word of a plan means."""

    act: Callable[[Scene, Fault], Hit]
    """Lets it happen; False when there was nothing that it could hit."""
    scope: str
    """"all", "one" or "none": who may fail because of it, among those whom it hits."""
    armed: str = ""
    """Of one that lies in wait: its name in `Faults.hits`, which says whether it came
    to pass."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    """A key of `KINDS`."""
    step: int
    """It happens before this step of the world."""
    which: int = 0
    """Chooses among what it could hit."""

    def __str__(self) -> str:
        return f"{self.kind} before step {self.step} (which={self.which})"


class Scene(NamedTuple):
    """Where a fault happens."""

    world: World
    town: Town


def apply(world: World, town: Town, fault: Fault) -> bool:
    """Let a fault happen.

    Returns:
        False when there was nothing that it could hit.
    """
    kind = KINDS[fault.kind]
    scene = Scene(world, town)
    place = len(world.trace)
    hit = kind.act(scene, fault)
    if not hit:
        return False
    if world.is_tracing:
        line = f"{world.now:.6f} fault: {fault.kind} {fault.which}"
        world.trace.insert(place, line)
    if kind.scope == "all":
        for talking in town.talkings:
            if hit is True or hit <= town.parties(talking):
                talking.excuses.append(fault.kind)
    return True


def happened(world: World) -> Counter[str]:
    """Count the faults that lay in wait and came to pass, by their kinds."""
    hits = world.network.faults.hits
    return Counter({k: hits[it.armed] for k, it in KINDS.items() if hits[it.armed]})


def wait_for(fault: Fault) -> Fault:
    """Give the same fault a few steps later, for when there was nothing to hit."""
    return replace(fault, step=fault.step + WAIT_STEPS)


def draw_fault(rng: random.Random, steps: int) -> Fault:
    """Draw a fault.

    Args:
        rng: Decides.
        steps: About how many steps the run will have.
    """
    # Early steps are where the handshakes are.
    step = int(steps ** (0.4 + 0.6 * rng.random()))
    return Fault(rng.choice(tuple(KINDS)), max(1, step), rng.randrange(64))


# What can be hit


def _pick(fault: Fault, things: list[Any]) -> Any:
    return things[fault.which % len(things)] if things else None


def _processes(scene: Scene) -> list[Process]:
    return [process for process in scene.world.processes if process.is_alive]


def _devices(scene: Scene) -> list[SimDevice]:
    found: list[SimDevice] = []
    for process in _processes(scene):
        driver: Any = process.made_driver
        if driver is not None:
            found += [device for device in driver.devices if not device.is_gone]
    return found


def _pairs(scene: Scene) -> list[SimQueuePair]:
    return [
        pair
        for device in _devices(scene)
        for domain in device.domains
        for pair in domain.queue_pairs
        if pair.is_connected and not pair.is_dead
    ]


def _busy_pairs(scene: Scene) -> list[SimQueuePair]:
    return [pair for pair in _pairs(scene) if pair.outgoing.items] or _pairs(scene)


def _connections(scene: Scene) -> list[TcpConnection]:
    return [each for each in scene.world.tcp.connections if not each.is_over]


def _excuse(scene: Scene, connection: TcpConnection, fault: Fault) -> None:
    """Note whose TCP connection was hit."""
    talking = scene.town.caller(connection.client.name)
    if talking is not None:
        talking.excuses.append(fault.kind)


# Links


def _owners(scene: Scene, *devices: SimDevice) -> frozenset[Process]:
    """Tell whose devices these are, among the processes that live."""
    owners: set[Process] = set()
    for process in _processes(scene):
        driver: Any = process.made_driver
        if driver is not None and any(each in driver.devices for each in devices):
            owners.add(process)
    return frozenset(owners)


def _on_pair(
    act: Callable[[Faults, SimQueuePair, int], object], *, busy: bool = False
) -> Callable[[Scene, Fault], Hit]:
    def happen(scene: Scene, fault: Fault) -> Hit:
        pair = _pick(fault, _busy_pairs(scene) if busy else _pairs(scene))
        if pair is None:
            return False
        ends = [end.device for end in (pair, pair.peer) if end is not None]
        act(scene.world.network.faults, pair, fault.which)
        return _owners(scene, *ends)

    return happen


def _cut_one_end(faults: Faults, pair: SimQueuePair, which: int) -> None:
    later = (0.001, 0.5, 3.0)[which % 3]
    faults.cut(pair, Status.PEER_GONE, peer_later=later)


def _vanish(faults: Faults, pair: SimQueuePair, which: int) -> None:
    faults.vanish(pair, (0.0001, 0.3, 2.0)[which % 3])


def _fail_verb(verb: str) -> Callable[[Scene, Fault], bool]:
    def happen(scene: Scene, fault: Fault) -> bool:
        status = Status.NO_MEMORY
        if verb == "connect":
            status = _CONNECT_STATUSES[fault.which % len(_CONNECT_STATUSES)]
        scene.world.network.faults.fail_verb(verb, 1 + fault.which % 3, status)
        return True

    return happen


# Completions


def _on_device(
    act: Callable[[Faults, SimDevice, int], object],
) -> Callable[[Scene, Fault], Hit]:
    def happen(scene: Scene, fault: Fault) -> Hit:
        device = _pick(fault, _devices(scene))
        if device is None:
            return False
        act(scene.world.network.faults, device, fault.which)
        return _owners(scene, device)

    return happen


def _stray_completion(faults: Faults, pair: SimQueuePair, which: int) -> None:
    wr_id = (0, 1, 0xFFFFFFFF, 1 << 47, which << 32)[which % 5]
    faults.stray_completion(pair, wr_id)


def _stray_update(faults: Faults, pair: SimQueuePair, which: int) -> None:
    token = (1, 0, 0xFFFFFFFF)[which % 3]
    faults.stray_update(pair, Update(which, token, 1 << 33, 1 << 34, 0x8060))


# Processes and devices


def _stop(seconds: float) -> Callable[[Scene, Fault], Hit]:
    def happen(scene: Scene, fault: Fault) -> Hit:
        process = _pick(fault, [p for p in _processes(scene) if not p.is_stopped])
        if process is None:
            return False
        process.stop()

        def resume() -> None:
            if process.is_alive:
                process.resume()

        scene.world.network.later(seconds, f"{process.name} may run", resume)
        return frozenset({process})

    return happen


def _crash(scene: Scene, fault: Fault) -> Hit:
    living = _processes(scene)
    if len(living) < 2:
        return False
    process: Process = _pick(fault, living)
    for talking in scene.town.talkings:
        conversation = talking.conversation
        here = scene.town.processes.index(process)
        if conversation.caller == here:
            talking.client.is_dead = True
        if conversation.listener == here:
            talking.server.is_dead = True
    process.crash()
    return frozenset({process})


def _cancel(scene: Scene, fault: Fault) -> bool:
    tasks = [
        (talking, task)
        for talking in scene.town.talkings
        for task in (talking.task, talking.server_task)
        if task is not None and not task.done()
    ]
    found = _pick(fault, tasks)
    if found is None:
        return False
    talking, task = found
    talking.excuses.append(fault.kind)
    task.cancel()
    return True


def _close_server(scene: Scene, fault: Fault) -> bool:
    number = _pick(fault, list(scene.town.servers))
    if number is None:
        return False
    scene.town.close_server(number)
    for talking in scene.town.talkings:
        if talking.conversation.listener == number and not talking.server.made:
            talking.excuses.append(fault.kind)
    return True


# TCP


def _on_tcp(
    act: Callable[[TcpConnection, int], object], *, hurts: bool = False
) -> Callable[[Scene, Fault], bool]:
    def happen(scene: Scene, fault: Fault) -> bool:
        connection = _pick(fault, _connections(scene))
        if connection is None:
            return False
        if hurts:
            _excuse(scene, connection, fault)
        act(connection, fault.which)
        return True

    return happen


def _kill_tcp(scene: Scene, fault: Fault) -> bool:
    connection = _pick(fault, _connections(scene))
    if connection is None:
        return False
    talking = scene.town.caller(connection.client.name)
    if talking is None or not all(end.mode == "smcr" for end in talking.ends):
        # Beneath a link that lives nothing is missing.
        _excuse(scene, connection, fault)
    connection.kill()
    return True


def _cut_tcp(connection: TcpConnection, which: int) -> None:
    # A few bytes at a time make many steps, so that is the rarer case.
    tiny = which % 4 == 0
    piece, send = (1 + which % 7, 1 + which % 5) if tiny else (200 + which, 90 + which)
    connection.cut(piece, send)


def _hold_tcp(scene: Scene, fault: Fault) -> bool:
    connection = _pick(fault, _connections(scene))
    if connection is None:
        return False
    connection.hold()
    scene.world.network.later(
        SHORT_SECONDS, "tcp goes on", lambda: connection.hold(held=False)
    )
    return True


KINDS: dict[str, Kind] = {
    "cut a link": Kind(_on_pair(lambda f, p, _: f.cut(p), busy=True), "all"),
    "cut one end": Kind(_on_pair(_cut_one_end, busy=True), "all"),
    "lose what is on its way": Kind(
        _on_pair(lambda f, p, _: f.lose(p), busy=True), "all"
    ),
    "acknowledge what never lands": Kind(_on_pair(_vanish, busy=True), "all"),
    "pause a link": Kind(_on_pair(lambda f, p, _: f.pause(p, SHORT_SECONDS)), "none"),
    "pause a link for long": Kind(
        _on_pair(lambda f, p, _: f.pause(p, LONG_SECONDS)), "all"
    ),
    "slow down a link": Kind(
        _on_pair(lambda f, p, _: f.slow_down(p, SHORT_SECONDS / 10, SHORT_SECONDS)),
        "none",
    ),
    "lose completions": Kind(
        _on_device(lambda f, d, n: f.lose_completion(d, 1 + n % 4)),
        "all",
        "lose completion",
    ),
    "double completions": Kind(
        _on_device(lambda f, d, n: f.double_completion(d, 1 + n % 4)),
        "none",
        "double completion",
    ),
    "stray completion": Kind(_on_pair(_stray_completion), "none"),
    "double an update": Kind(
        _on_device(lambda f, d, _: f.double_update(d)), "none", "double update"
    ),
    "repeat an update later": Kind(
        _on_device(lambda f, d, n: f.double_update(d, later=1 + n % 5)),
        "none",
        "repeat update",
    ),
    "update to an unknown token": Kind(_on_pair(_stray_update), "none"),
    "remove a device": Kind(_on_device(lambda f, d, _: f.remove(d)), "all"),
    "stop a process": Kind(_stop(SHORT_SECONDS), "none"),
    "stop a process for long": Kind(_stop(LONG_SECONDS), "all"),
    "crash a process": Kind(_crash, "all"),
    "cancel a task": Kind(_cancel, "one"),
    "close a server": Kind(_close_server, "one"),
    "reset TCP": Kind(_on_tcp(lambda c, _: c.reset(), hurts=True), "one"),
    "kill TCP silently": Kind(_kill_tcp, "one"),
    "delay TCP": Kind(_on_tcp(lambda c, _: c.delay(SHORT_SECONDS)), "none"),
    "cut TCP into pieces": Kind(_on_tcp(_cut_tcp), "none"),
    "hold TCP": Kind(_hold_tcp, "none"),
}
for _verb in VERBS:
    _scope = "all" if _verb in {"send", "write", "publish"} else "none"
    KINDS[f"fail verb: {_verb}"] = Kind(_fail_verb(_verb), _scope, _verb)
