"""The CLC handshake in all its orders: both roles' real negotiators, and a clock.

Two endpoints are explored breadth first: whatever can be delivered is delivered, in
every order; time passes in steps; and a fault may happen at any moment: a link that is
lost for one end or both, LLC messages that are lost, a connection that ends, a task
that gives up, an order that fails. TCP takes at most one step of time, LLC any time. An
end that has fallen back writes at once, as its application would.

In every final state the two ends can live with each other: both on SMC-R, or both on
TCP with exactly the other's bytes to read, or an error that both learn of. No byte of a
CLC message is left for an application, and no byte of an application is lost.
"""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.core.actions import ConnectQueuePair, CreateQueuePair, RegisterMemory
from pysmc.core.events import Established, Failed, FellBack
from pysmc.testing.pair import SMALL, CorePair
from tests.core.old_kernel import put_the_old_kernel_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pysmc.config import Config
    from pysmc.core.events import Event
    from pysmc.core.handshake import Handshake
    from pysmc.testing.pair import Delivery, PairEnd

PAYLOAD = (b"GET / HTTP/1.1\r\n", b"220 ready\r\n")
"""What the client's and the server's application write after a fallback."""
EYECATCHER = b"\xe2\xd4\xc3\xd9"

Key = tuple[Any, ...]


class Scenario:
    """Two ends in the middle of a handshake, and what may still go wrong.

    Args:
        config: Of both ends.
        reuse: Whether there is a link group already.
        faults: Names of the faults that may happen; see `FAULTS`.
        budget: How many of them.
        silent_close: Whether nobody is told that the other queue pair was closed.
        tick: Seconds of one step of time.
        delay: Steps of time that TCP bytes take at most.
    """

    def __init__(
        self,
        config: Config = SMALL,
        *,
        reuse: bool = False,
        faults: tuple[str, ...] = (),
        budget: int = 1,
        silent_close: bool = False,
        tick: float = 0.5,
        delay: int = 1,
    ) -> None:
        self.pair = CorePair(config, silent_close=silent_close)
        self.fellows = self.pair.establish() if reuse else ()
        self.client, self.server = self.pair.connect()
        self.faults = faults
        self.budget = budget
        self.tick = tick
        self.delay = delay
        self.silent: PairEnd | None = None
        """An end that stands still: nothing arrives there, and no timer runs."""
        self.wrote = [False, False]
        self.ages = [0, 0]
        """Steps of time that the oldest TCP bytes to each end have taken."""
        self.pair.wire.notes.clear()

    @property
    def handshakes(self) -> tuple[Handshake, Handshake]:
        return self.client, self.server

    @property
    def is_over(self) -> bool:
        return all(
            handshake.is_over or end is self.silent
            for end, handshake in zip(self.pair.ends, self.handshakes, strict=True)
        )

    # What can happen

    def pending(self) -> list[Delivery]:
        return [each for each in self.pair.pending() if each.end is not self.silent]

    def actions(self) -> Iterator[str]:
        for number, delivery in enumerate(self.pending()):
            yield f"deliver {number} {delivery}"
        if self.budget:
            for name in self.faults:
                if FAULTS[name].is_possible(self):
                    yield f"fault {name}"
        if max(self.ages) < self.delay:
            yield "time client first"
            if len(self._due(self.pair.now + self.tick)) > 1:
                yield "time server first"

    def _due(self, now: float) -> list[PairEnd]:
        times = {end: end.endpoint.next_timer() for end in self.pair.ends}
        return [
            end
            for end, when in times.items()
            if when is not None and when <= now and end is not self.silent
        ]

    def do(self, action: str) -> None:
        kind, _, rest = action.partition(" ")
        match kind:
            case "deliver":
                delivery = self.pending()[int(rest.split(" ", maxsplit=1)[0])]
                self.pair.step(delivery)
                while delivery.kind == "tcp" and delivery.place.is_due:
                    # A driver reads until nothing is there.
                    self.pair.step(delivery)
            case "fault":
                self.budget -= 1
                FAULTS[rest].happen(self)
            case _:
                self._pass_time(server_first=rest.startswith("server"))
        self.after()

    def _pass_time(self, *, server_first: bool) -> None:
        pair = self.pair
        pair.wire.now += self.tick
        for index, (end, handshake) in enumerate(
            zip(pair.ends, self.handshakes, strict=True)
        ):
            if pair.tcp(handshake).is_due and end is not self.silent:
                self.ages[index] += 1
        for end in self._due(pair.now)[:: -1 if server_first else 1]:
            end.endpoint.handle_timer(pair.now)
            pair.settle(end)

    def after(self) -> None:
        """Let applications write that have fallen back; see which bytes are young."""
        for index, handshake in enumerate(self.handshakes):
            fell_back = isinstance(self.pair.verdict(handshake), FellBack)
            if fell_back and not self.wrote[index]:
                self.wrote[index] = True
                self.pair.send_tcp(handshake, PAYLOAD[index])
        for index, handshake in enumerate(self.handshakes):
            if not self.pair.tcp(handshake).is_due:
                self.ages[index] = 0

    # States

    def key(self) -> Key:
        """Give everything that decides what can follow."""
        pair = self.pair
        return (
            self.budget,
            self.silent and self.silent.name,
            tuple(self.ages),
            tuple(self.wrote),
            *(
                self._of_end(*both)
                for both in zip(pair.ends, self.handshakes, strict=True)
            ),
            *((each.state, each.update_due) for each in self.fellows),
        )

    def _of_end(self, end: PairEnd, handshake: Handshake) -> Key:
        now, tcp = self.pair.now, self.pair.tcp(handshake)
        endpoint = end.endpoint
        timers = endpoint._context.timers._living.items()
        link, connection, rmb = handshake.link, handshake.connection, handshake.rmb
        problem = handshake.problem
        flows = endpoint._keeper.flows.values()
        return (
            handshake.state.name,
            None if problem is None else problem.name,
            handshake.confirmed_at and handshake.confirmed_at - now,
            handshake.stream.wanted,
            link and (link.state.name, link.number, link.remote is not None),
            connection and (connection.state, connection.update_due),
            rmb and rmb.state.name,
            tcp.verdict and type(tcp.verdict).__name__,
            bytes(tcp.transit),
            bytes(tcp.arrived),
            tcp.is_cut,
            tcp.is_deaf,
            tuple(sorted((kind, entry.when - now) for (kind, _), entry in timers)),
            tuple(
                (
                    stub.connected,
                    stub.down,
                    stub.peer is not None,
                    tuple(stub.sends),
                    tuple(stub.updates),
                )
                for stub in end.queue_pairs.values()
            ),
            tuple(
                (repr(flow._current and flow._current.request), len(flow._waiting))
                for flow in flows
            ),
            tuple((group.places_taken, len(group.pool)) for group in endpoint.groups),
            tuple(order.__name__ for order, *_ in end.failures),
        )

    # Ends

    def finish(self) -> None:
        """Deliver the rest."""
        for _ in range(2):
            for _ in range(1000):
                choices = self.pending()
                if not choices:
                    break
                self.pair.step(choices[0])
            assert not self.pending(), "there is no end to it"
            self.after()
        on_smc = [
            isinstance(self.pair.verdict(each), Established) for each in self.handshakes
        ]
        if self.silent is None and any(on_smc) and not all(on_smc):
            # Whoever is alone on SMC-R learns of it by TEST LINK at the latest.
            self.pair.advance(40)

    def judge(self) -> tuple[str, str]:
        """Check that two ends can live with how their handshakes ended.

        Returns:
            How each ended.
        """
        pair = self.pair
        verdicts = [pair.verdict(each) for each in self.handshakes]
        lost = {event.connection for end in pair.ends for event in end.lost}
        if self.silent is not None:
            # It has not said anything; the other one is not held up for ever.
            return self._names(verdicts)
        assert pair.faults == []
        for index, handshake in enumerate(self.handshakes):
            mine, theirs = verdicts[index], verdicts[1 - index]
            tcp = pair.tcp(handshake)
            found = bytes(tcp.arrived + tcp.transit)
            assert mine is not None or tcp.peer.is_cut, "neither ended nor given up"
            if isinstance(mine, FellBack):
                # The application reads what is there; nobody else's bytes.
                their_bytes = PAYLOAD[1 - index] if self.wrote[1 - index] else b""
                if isinstance(theirs, FellBack):
                    assert found == their_bytes, f"the application reads {found!r}"
                elif isinstance(theirs, Established):
                    assert theirs.connection in lost, "one on TCP, one on SMC-R"
                else:
                    assert tcp.is_cut, "one on TCP, and the other has gone untold"
            if isinstance(mine, Established) and not isinstance(theirs, Established):
                told = mine.connection in lost or tcp.is_cut
                assert told, "one on SMC-R, and the other has gone untold"
            if isinstance(mine, Failed):
                assert pair.tcp(handshake).peer.is_cut, "an error that nobody learns of"
        return self._names(verdicts)

    def _names(self, verdicts: list[Event | None]) -> tuple[str, str]:
        client, server = (type(each).__name__ if each else "none" for each in verdicts)
        return client, server


class Fault:
    """Something that goes wrong.

    Args:
        happen: Lets it happen.
        is_possible: Whether it can happen now and changes anything.
    """

    def __init__(
        self,
        happen: Callable[[Scenario], object],
        is_possible: Callable[[Scenario], bool] = lambda scenario: True,
    ) -> None:
        self.happen = happen
        self.is_possible = is_possible


def has_link(scenario: Scenario, *names: str) -> bool:
    return any(
        end.name in names and stub.down is None and stub.connected is None
        for end in scenario.pair.ends
        for stub in end.queue_pairs.values()
    )


def cut(scenario: Scenario, *names: str) -> None:
    for end in scenario.pair.ends:
        if end.name not in names:
            continue
        for stub in list(end.queue_pairs.values()):
            stub.down = ("peer gone", "")


def lose_sends(scenario: Scenario) -> None:
    for end in scenario.pair.ends:
        scenario.pair.drop("send", end)


def is_anything_sent(scenario: Scenario) -> bool:
    return any(s.sends for e in scenario.pair.ends for s in e.queue_pairs.values())


def fail(order: type[Any], name: str) -> Fault:
    def happen(scenario: Scenario) -> None:
        end = scenario.pair.client if name == "client" else scenario.pair.server
        scenario.pair.fail_next(end, order, "no memory", "ENOMEM")

    def is_possible(scenario: Scenario) -> bool:
        # Once is enough: it waits for the next order of the kind.
        return scenario.pair.now == 0 and not scenario.is_over

    return Fault(happen, is_possible)


def abandon(name: str) -> Fault:
    def of(scenario: Scenario) -> Handshake:
        return scenario.client if name == "client" else scenario.server

    return Fault(
        lambda scenario: scenario.pair.abandon(of(scenario)),
        lambda scenario: not of(scenario).is_over,
    )


def silence(name: str) -> Fault:
    def happen(scenario: Scenario) -> None:
        scenario.silent = next(e for e in scenario.pair.ends if e.name == name)

    return Fault(happen, lambda scenario: scenario.silent is None)


FAULTS: dict[str, Fault] = {
    "link lost": Fault(
        lambda scenario: cut(scenario, "client", "server"),
        lambda scenario: has_link(scenario, "client", "server"),
    ),
    "link lost for the client": Fault(
        lambda scenario: cut(scenario, "client"),
        lambda scenario: has_link(scenario, "client"),
    ),
    "link lost for the server": Fault(
        lambda scenario: cut(scenario, "server"),
        lambda scenario: has_link(scenario, "server"),
    ),
    "LLC lost": Fault(lose_sends, is_anything_sent),
    "TCP ends": Fault(lambda scenario: scenario.pair.cut_tcp(scenario.client)),
    "client gives up": abandon("client"),
    "server gives up": abandon("server"),
    "client stands still": silence("client"),
    "server stands still": silence("server"),
    **{
        f"{order.__name__} fails at the {name}": fail(order, name)
        for order in (CreateQueuePair, RegisterMemory, ConnectQueuePair)
        for name in ("client", "server")
    },
}


class Broken(AssertionError):
    """A promise is broken; the text is the way to it."""


def explore(scenario: Scenario, most: int = 1 << 62) -> tuple[int, Counter[Any]]:
    """Enter every state that can be reached.

    Returns:
        How many there are, and how often the handshakes ended how.

    Raises:
        Broken: A final state in which the two ends cannot live with each other.
    """
    parents: dict[int, tuple[int, str]] = {hash(scenario.key()): (0, "")}
    layer = [(hash(scenario.key()), pickle.dumps(scenario, 5))]
    ends: Counter[Any] = Counter()
    while layer and len(parents) <= most:
        following = []
        for key, packed in layer:
            for action in list(pickle.loads(packed).actions()):
                here: Scenario = pickle.loads(packed)
                try:
                    here.do(action)
                    if here.is_over:
                        here.finish()
                        ends[here.judge()] += 1
                        continue
                except AssertionError as error:
                    raise Broken(f"{error}\n{path(parents, key, action)}") from error
                after = hash(here.key())
                if after not in parents:
                    parents[after] = (key, action)
                    here.pair.wire.notes.clear()
                    following.append((after, pickle.dumps(here, 5)))
        layer = following
    return len(parents), ends


def path(parents: dict[int, tuple[int, str]], key: int, last: str) -> str:
    steps = [last]
    while key in parents:
        key, happened = parents[key]
        steps.append(happened)
    return "\n".join(reversed(steps))


VERSION_2_0 = replace(SMALL, release=0)
EVERYTHING = tuple(FAULTS)
LATE = ("link lost for the client", "link lost for the server", "LLC lost")

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "first contact": ({}, 703),
    "reuse": ({"reuse": True}, 230),
    "nobody is told of a closed queue pair": ({"silent_close": True}, 697),
    "version 2.0": ({"config": VERSION_2_0}, 2092),
    "TCP takes 3/4 of a second": ({"tick": 0.25, "delay": 3}, 5787),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_order(name: str) -> None:
    arguments, expected = CASES[name]
    states, ends = explore(Scenario(**arguments))
    assert ends["Established", "Established"]
    assert ends["FellBack", "FellBack"]
    # A client whose answer to CONFIRM LINK takes for ever has gone on already: that is
    # an error. Everything else that is late is a fallback.
    known = {("Established",) * 2, ("FellBack",) * 2, ("Established", "Failed")}
    assert set(ends) <= known
    assert states == expected


GROUPS: dict[str, tuple[str, ...]] = {
    "the link is lost": tuple(name for name in FAULTS if name.startswith("link lost")),
    "LLC is lost, or TCP ends": ("LLC lost", "TCP ends"),
    "somebody gives up": ("client gives up", "server gives up"),
    "somebody stands still": ("client stands still", "server stands still"),
    "an order fails": tuple(name for name in FAULTS if " fails at the " in name),
}
FOUND: dict[tuple[str, bool], int] = {
    ("the link is lost", False): 4_167,
    ("the link is lost", True): 3_969,
    ("LLC is lost, or TCP ends", False): 3_415,
    ("LLC is lost, or TCP ends", True): 1_126,
    ("somebody gives up", False): 1_511,
    ("somebody gives up", True): 998,
    ("somebody stands still", False): 2_009,
    ("somebody stands still", True): 814,
    ("an order fails", False): 3_766,
    ("an order fails", True): 1_412,
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("reuse", [False, True], ids=["first contact", "reuse"])
@pytest.mark.parametrize("group", GROUPS)
def test_every_fault_at_every_moment(group: str, reuse: bool) -> None:
    states, ends = explore(Scenario(reuse=reuse, faults=GROUPS[group]))
    assert {name for names in GROUPS.values() for name in names} == FAULTS.keys()
    assert ends["Established", "Established"]
    assert ends["FellBack", "FellBack"]
    if group == "somebody stands still":
        # Silence is an error for whoever has heard that the other one speaks SMC.
        assert ends["Failed", "none"]
        assert ends["none", "Failed"]
    assert states == FOUND[group, reuse]


DEEP: tuple[dict[str, Any], ...] = (
    {"faults": LATE, "budget": 2},
    {"faults": LATE, "budget": 2, "silent_close": True},
    {"faults": LATE, "tick": 0.25, "delay": 3},
    {"faults": LATE, "budget": 2, "config": VERSION_2_0},
    {"faults": EVERYTHING, "budget": 2},
    {"faults": EVERYTHING, "budget": 2, "reuse": True},
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.simulate
def test_two_faults(long_run: Callable[..., Any]) -> None:
    with long_run("handshake-model", small=1, full=len(DEEP)) as run:
        for number in run.seeds():
            states, ends = explore(Scenario(**DEEP[number]))
            run.add(states=states, ends=sum(ends.values()))
            if not ends["Established", "Established"]:
                run.fail(f"{DEEP[number]}: nobody was established")


def with_waits(client: float, server: float) -> Config:
    """Make a configuration that `Config` itself would refuse."""
    config = replace(SMALL)
    object.__setattr__(config, "confirm_link_client_wait", client)
    object.__setattr__(config, "confirm_link_server_wait", server)
    return config


@pytest.mark.parametrize(("client", "server"), [(2.0, 2.0), (2.5, 2.0), (6.0, 6.0)])
def test_with_the_old_kernel_and_its_waits_declines_cross(
    client: float, server: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of the test: CVE-2023-52775 shows up when its time-outs are put in."""
    with pytest.raises(ValueError, match="confirm_link_client_wait"):
        replace(SMALL, confirm_link_client_wait=client, confirm_link_server_wait=server)
    put_the_old_kernel_in(monkeypatch)
    with pytest.raises(Broken) as caught:
        explore(Scenario(with_waits(client, server)))
    assert str(caught.value).startswith(f"the application reads {EYECATCHER!r}"[:-1])


@pytest.mark.parametrize(("client", "server"), [(2.0, 2.0), (6.0, 6.0)])
def test_where_only_the_client_declines_no_waits_let_them_cross(
    client: float, server: float
) -> None:
    _, ends = explore(Scenario(with_waits(client, server)))
    assert ends["FellBack", "FellBack"] or ends["Established", "Established"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("server", "decline", "tick"),
    [(0.5, 0.25, 0.125), (3.0, 1.0, 0.5), (1.0, 3.0, 1.0)],
)
def test_with_waits_that_are_allowed_they_never_do(
    server: float, decline: float, tick: float
) -> None:
    """TCP may take nearly as long as `decline_wait`."""
    config = replace(
        SMALL,
        confirm_link_server_wait=server,
        confirm_link_client_wait=server + 2 * decline,
        decline_wait=decline,
    )
    delay = int(decline / tick) - 1
    faults = ("link lost for the client", "link lost for the server")
    scenario = Scenario(
        config, tick=tick, delay=delay, faults=faults, silent_close=True
    )
    _, ends = explore(scenario)
    assert ends["FellBack", "FellBack"]


def test_a_state_is_known_again() -> None:
    """What is explored does not depend on how it was reached."""
    first, second = Scenario(), Scenario()
    assert first.key() == second.key() == pickle.loads(pickle.dumps(first)).key()
    before = first.key()
    first.do(next(iter(first.actions())))
    assert first.key() != before
