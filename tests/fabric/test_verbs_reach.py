"""Whether a peer's GID can be reached: known at once, asked for, or never."""

from __future__ import annotations

import errno
import ipaddress
import select
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.fabric import verbs_reach
from pysmc.fabric.netlink import NeighbourEvents
from pysmc.fabric.timerfd import Timer
from pysmc.fabric.verbs_ports import RdmaPort
from pysmc.fabric.verbs_reach import IP_PKTINFO, Reach
from tests.fabric.netns import ip, network_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

NET = """link set lo up
link add near type veth peer name far
addr add 10.1.0.1/24 dev near
link set far up
link set near up
addr add fd01::1/64 dev near nodad
route add 10.2.0.0/16 via 10.1.0.254 dev near"""

HAS = "lladdr 02:00:00:00:00:09 dev near nud"


def gid(address: str) -> bytes:
    text = address if ":" in address else f"::ffff:{address}"
    return ipaddress.IPv6Address(text).packed


def port(address: str, netdev: str = "near") -> RdmaPort:
    return RdmaPort(
        device="rxe0",
        port=1,
        gid_index=1,
        gid=gid(address),
        gid_type="RoCE v2",
        netdev=netdev,
        mac=bytes(6),
        state="ACTIVE",
        mtu_code=3,
    )


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Scene:
    reach: Reach
    clock: Clock

    def ask(self, to: str, ours: str = "10.1.0.1", netdev: str = "near") -> None:
        self.reach.begin(7, gid(to), port(ours, netdev))

    def answer(self) -> tuple[int, bool, str]:
        """Give the one answer, for which the descriptor has to ring."""
        assert select.select([self.reach], [], [], 10)[0], "it did not ring"
        (answer,) = self.reach.poll()
        assert self.is_quiet()
        return answer

    def is_quiet(self) -> bool:
        return self.reach.poll() == [] and not select.select([self.reach], [], [], 0)[0]

    def is_hearing(self) -> bool:
        return self.reach._events is not None


@pytest.fixture
def scene() -> Iterator[Scene]:
    with network_namespace():
        for words in NET.splitlines():
            ip(words)
        clock = Clock()
        reach = Reach(clock=clock)
        yield Scene(reach, clock)
        reach.close()
        reach.close()


@pytest.mark.netns
@pytest.mark.parametrize(
    ("to", "ours", "known"),
    [
        ("10.1.0.9", "10.1.0.1", "10.1.0.9"),
        ("10.2.0.9", "10.1.0.1", "10.1.0.254"),
        ("fd01::9", "fd01::1", "fd01::9"),
        ("10.1.0.1", "10.1.0.1", ""),
    ],
)
@pytest.mark.parametrize("state", ["stale", "permanent", "noarp"])
def test_what_the_kernel_knows_is_answered_at_once(
    scene: Scene, to: str, ours: str, known: str, state: str
) -> None:
    if known:
        ip(f"neigh replace {known} {HAS} {state}")
    scene.ask(to, ours)
    assert not scene.is_hearing()
    assert scene.answer() == (7, True, "")


@pytest.mark.netns
@pytest.mark.parametrize("to", ["10.1.0.9", "10.2.0.9"])
def test_a_neighbour_that_answers_is_reached(scene: Scene, to: str) -> None:
    scene.ask(to)
    assert scene.is_hearing()
    assert scene.reach.poll() == []
    hop = "10.1.0.9" if to == "10.1.0.9" else "10.1.0.254"
    ip(f"neigh replace 10.1.0.8 {HAS} reachable")  # somebody else
    ip(f"neigh replace {hop} {HAS} reachable")
    assert scene.answer() == (7, True, "")
    assert not scene.is_hearing()


@pytest.mark.netns
def test_the_kernel_is_made_to_look_for_it(scene: Scene) -> None:
    for to, ours in (("10.1.0.9", "10.1.0.1"), ("fd01::9", "fd01::1")):
        number = socket.if_nametoindex("near")
        address = ipaddress.ip_address(to)
        assert scene.reach._netlink.neighbour(address, number) is None
        scene.ask(to, ours)
        assert scene.reach._netlink.neighbour(address, number) is not None
        scene.reach.cancel(7)


@pytest.mark.netns
def test_an_answer_that_came_before_we_heard_counts(scene: Scene, monkeypatch) -> None:
    start_hearing = scene.reach._start_hearing

    def too_late() -> None:
        ip(f"neigh replace 10.1.0.9 {HAS} reachable")
        start_hearing()

    monkeypatch.setattr(scene.reach, "_start_hearing", too_late)
    scene.ask("10.1.0.9")
    assert scene.answer() == (7, True, "")


@pytest.mark.netns
def test_a_neighbour_that_the_kernel_gave_up_is_not_reached(scene: Scene) -> None:
    scene.ask("10.1.0.9")
    ip("neigh replace 10.1.0.9 dev near nud failed")
    key, reached, why = scene.answer()
    assert (key, reached) == (7, False)
    assert why == (
        "10.1.0.9 does not answer, which is the way to 10.1.0.9 from 10.1.0.1 over near"
    )


@pytest.mark.netns
def test_a_silent_neighbour_has_its_time(scene: Scene) -> None:
    scene.ask("10.2.0.9")
    scene.clock.now += 1.4
    assert scene.reach.poll() == []
    scene.clock.now += 0.2
    ((key, reached, why),) = scene.reach.poll()
    assert (key, reached) == (7, False)
    assert why.startswith("10.1.0.254 did not answer within 1.5 s")
    assert scene.is_quiet()


@pytest.mark.netns
def test_the_timer_rings(scene: Scene) -> None:
    reach = Reach(wait=0.001)
    reach.begin(7, gid("10.1.0.9"), port("10.1.0.1"))
    assert Scene(reach, scene.clock).answer()[:2] == (7, False)
    reach.close()


@pytest.mark.netns
def test_at_the_end_the_table_counts(scene: Scene, monkeypatch) -> None:
    scene.ask("10.1.0.9")
    monkeypatch.setattr(NeighbourEvents, "take", lambda self: [])
    ip(f"neigh replace 10.1.0.9 {HAS} reachable")
    scene.clock.now += 2
    assert scene.reach.poll() == [(7, True, "")]


@pytest.mark.netns
@pytest.mark.parametrize("works", [True, False])
def test_what_was_not_heard_is_looked_up(
    scene: Scene, monkeypatch, works: bool
) -> None:
    scene.ask("10.1.0.9")

    def overrun(self: object) -> Any:
        raise OSError(errno.ENOBUFS, "some of it was lost")

    def broken(self: object, *_: object) -> Any:
        raise OSError(errno.EPERM, "forbidden")

    monkeypatch.setattr(NeighbourEvents, "take", overrun)
    if not works:
        monkeypatch.setattr("pysmc.fabric.netlink.Netlink.neighbour", broken)
    assert scene.reach.poll() == []
    ip(f"neigh replace 10.1.0.9 {HAS} reachable")
    assert scene.reach.poll() == ([(7, True, "")] if works else [])


@pytest.mark.netns
def test_one_of_many_ends_alone(scene: Scene) -> None:
    for key, to in enumerate(("10.1.0.9", "10.1.0.9", "10.1.0.8", "10.1.0.7")):
        scene.reach.begin(key, gid(to), port("10.1.0.1"))
    scene.reach.cancel(3)
    scene.reach.cancel(3)
    ip(f"neigh replace 10.1.0.9 {HAS} reachable")
    assert scene.reach.poll() == [(0, True, ""), (1, True, "")]
    assert scene.is_hearing()
    scene.reach.cancel(2)
    assert not scene.is_hearing()
    assert scene.is_quiet()


@pytest.mark.netns
def test_an_answer_of_one_that_was_cancelled_is_not_given(scene: Scene) -> None:
    scene.ask("10.1.0.1")
    scene.reach.cancel(7)
    assert scene.is_quiet()


@pytest.mark.netns
@pytest.mark.parametrize(
    ("to", "ours", "netdev", "why"),
    [
        ("fe80::9", "fd01::1", "near", "none that packets are routed to"),
        ("224.0.0.9", "10.1.0.1", "near", "none that packets are routed to"),
        ("fd01::9", "10.1.0.1", "near", "of two IP versions"),
        ("10.1.0.9", "10.9.0.1", "near", "there is no route to 10.1.0.9 from 10.9.0.1"),
        ("10.9.0.9", "10.1.0.1", "", "Network is unreachable"),
        ("10.1.0.9", "10.1.0.1", "gone0", "no network device gone0"),
        ("10.1.0.255", "10.1.0.1", "near", "it is not the address of one host"),
    ],
)
def test_where_there_is_no_way_it_says_so_at_once(
    scene: Scene, to: str, ours: str, netdev: str, why: str
) -> None:
    scene.ask(to, ours, netdev)
    assert not scene.is_hearing()
    key, reached, said = scene.answer()
    assert (key, reached) == (7, False)
    assert why in said


@pytest.mark.netns
def test_a_packet_that_may_not_be_sent_is_no_way(scene: Scene, monkeypatch) -> None:
    """A firewall says so when it is asked."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(verbs_reach, "_ask_kernel", refuse)
    scene.ask("10.1.0.9")
    key, reached, said = scene.answer()
    assert (key, reached) == (7, False)
    assert "nothing can be sent to 10.1.0.9" in said


def test_without_descriptors_nothing_stays_open(monkeypatch) -> None:
    def short() -> None:
        raise OSError(errno.EMFILE, "no descriptors")

    opened = []

    def timer() -> Any:
        opened.append(Timer())
        return opened[0]

    monkeypatch.setattr(verbs_reach, "Timer", timer)
    monkeypatch.setattr(verbs_reach, "Netlink", short)
    with pytest.raises(OSError, match="no descriptors"):
        Reach()
    assert opened[0].fileno() == -1


def test_the_number_of_packet_info_is_the_kernels() -> None:
    known = getattr(socket, "IP_PKTINFO", 8)
    assert known == IP_PKTINFO, sys.version
