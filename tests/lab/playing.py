"""Carries out a cell of the table with two ends, and looks how the kernel saw it.

What is true of every cell: each byte is compared where it arrives, the hashes of both
ends agree (of a broken connection: a prefix arrived), both are on SMC-R or both on TCP,
the kernel says the same of its own end, and nothing is left of either.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import platform
import select
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from smcproto.llc import TestLink
from tests.lab import smc_netlink
from tests.lab.capture import captured, frames
from tests.lab.kernel_smc import set_up
from tests.lab.matrix import (
    CELLS,
    END,
    OUR_REASONS,
    SEEN_BY_KERNEL,
    Cell,
    Kind,
    Order,
    Seen,
    Stage,
    one_way,
    order,
)
from tests.lab.measuring import show
from tests.lab.network_faults import (
    impaired,
    impaired_packets,
    more_than,
    resources,
)
from tests.lab.players import PysmcPlayer, be_a_kernel_end
from tests.lab.wire_log import said

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from tests.lab.ends import End, Ends
    from tests.lab.kernel_smc import Kernel

__all__ = ["Play", "cases", "play"]

KIB = 1 << 10
DEADLINE = 240.0
"""Seconds for an order of a stage; a cell has a limit of its own."""
CONNECT_SECONDS = 20.0
"""A kernel gives up after 6 s, or after 10 in all."""
PACKETS_LEAST = 2048
"""Of 1,024 bytes, which a network that is hurt has to see: a mebibyte each way."""
TEST_LINKS_LEAST = 2
"""Of the cell that is idle for five times as long as it takes to ask for one; an end
that was asked need not ask."""
NOTICE_SECONDS = 12.0
"""In which an end has to notice that the other is gone, with `QUICK`."""
QUICK = {"test_link_interval": 1.0, "test_link_wait": 2.0}
QUICK_KERNEL = {"smcr_testlink_time": 1}
TALK, CLOSE_ALL = order("talk"), order("close_all")
APPLICATION_CLOSES, PROCESS_ABORTS = 22, 27
"""States of a kernel's socket after the peer's close, and after its abort."""
DEVICES = {"client": "vb", "server": "va"}
STATES: dict[str, dict[str, Any]] = {
    "usual": {},
    "no_option": {"discovery": ("local",)},
    "no_device": {"rdma_device": "absent0"},
    "other_ueid": {"ueids": ("PYSMC.OTHER",)},
}
"""How a pysmc end is brought into each state of the table: changes of its Config."""
DECLINES: dict[str, dict[str, Any]] = {
    "client": {"ueids": ()},
    # A listener that could not take anybody shows no option.
    "server": {"fabrics": ("shm",)},
}
"""How it is brought to decline, by its role."""


@contextlib.contextmanager
def kernel_in_state(kernel: Kernel, state: str) -> Iterator[None]:
    """Bring the kernel into a state of the table, while the block lasts."""
    with contextlib.ExitStack() as undo:
        if state == "declines":
            undo.enter_context(kernel.no_ueid())
        elif state == "other_ueid":
            undo.enter_context(kernel.no_ueid("PYSMC.OTHER"))
        elif state == "no_device":
            # A network device with a PNETID that no RDMA device has.
            smc_netlink.flush_pnetids()
            undo.callback(set_up)
            for device in DEVICES.values():
                smc_netlink.add_pnetid("ELSEWHERE", device)
        yield


class Play:
    """One cell, carried out by two ends of given kinds.

    Args:
        cell: What they do.
        kinds: Of the client and of the server.
        ends: Starts processes.
        kernel: The kernel's SMC, where an end is the kernel.
    """

    def __init__(
        self,
        cell: Cell,
        kinds: tuple[Kind, Kind],
        ends: Ends,
        kernel: Kernel | None = None,
    ) -> None:
        self.cell = cell
        self.kinds = dict(zip(("client", "server"), kinds, strict=True))
        self._kernel = kernel
        self._ends = ends
        ends.kind = PysmcPlayer
        self.ends: dict[str, End] = {}
        self.infos: dict[str, dict[str, Any] | None] = {}
        self.ports: list[int] = []
        self.figures: dict[str, Any] = {}

    # Ends

    def start(self, role: str, **changes: Any) -> End:
        """Start an end, and a server's listener."""
        state = getattr(self.cell, role)
        if self.kinds[role] == "kernel":
            protocol = 0 if state == "no_option" else 256
            be = functools.partial(be_a_kernel_end, protocol=protocol)
            end = self._ends.start_as(role, be)
        else:
            settings: dict[str, Any] = {"discovery": ("tcp_option",), "peers": ()}
            in_state = DECLINES[role] if state == "declines" else STATES[state]
            settings |= self.cell.config | in_state | changes
            end = self._ends.start(role, **settings)
        self.ends[role] = end
        if role == "server":
            self._port = end.ask("serve")["port"]
        return end

    def connect(self, count: int = 1) -> None:
        """Connect the ends, and look at what carries it."""
        client, server = self.ends["client"], self.ends["server"]
        client.tell("open", port=self._port, count=count)
        server.tell("take", count=count)
        answers = {
            "client": self._answer("client", CONNECT_SECONDS + count),
            "server": self._answer("server", CONNECT_SECONDS + count),
        }
        ports = answers["client"]["ports"]
        assert sorted(ports) == sorted(answers["server"]["ports"])
        self.ports += ports
        self.figures.setdefault("connect_seconds", answers["client"]["seconds"])
        for role, answer in answers.items():
            self._look(role, answer, ports)

    def _answer(self, role: str, deadline: float) -> Any:
        answer = self.ends[role].answer(deadline)
        if "error" in answer:
            self.ends[role].fail(str(answer))
        return answer

    # Views

    def _look(self, role: str, answer: dict[str, Any], ports: list[int]) -> None:
        if self.kinds[role] == "kernel":
            self._look_at_kernel(role, ports)
            return
        version = "2.0" if self.cell.config.get("release") == 0 else "2.1"
        for info in answer["infos"]:
            if self.cell.is_smcr:
                found = (info["mode"], info["version"], info["fabric"])
                assert found == ("smcr", version, "verbs"), info
            else:
                assert info["mode"] == "tcp", info
                why = info["reason"]["name"]
                self.figures[f"{role}_reason"] = why
                assert why == OUR_REASONS[self.cell.name, role], info
        self.infos[role] = answer["infos"][-1]
        self.figures.setdefault("mode", info["mode"] if info else "tcp")
        self.figures["link_groups"] = dict(
            collections.Counter(
                str(info and info["link_group"]) for info in answer["infos"]
            )
        )

    def _look_at_kernel(self, role: str, ports: list[int]) -> None:
        """The kernel's own view of its end of each connection."""
        assert self._kernel is not None
        side = "port" if role == "client" else "peer_port"
        views = {getattr(one, side): one for one in self._kernel.sockets()}
        if getattr(self.cell, role) == "no_option":
            assert not set(ports) & set(views)
            return
        device = RDMA_DEVICES[role]
        for port in ports:
            view = views[port]
            if self.cell.is_smcr:
                assert (view.mode, view.role, view.device) == ("smcr", role, device)
            else:
                assert view.mode == "tcp", view
                found = Seen(view.reason, view.peer_diagnosis)
                self.figures["kernel"] = (
                    f"{found.reason:08x}/{found.peer_diagnosis:08x}"
                )
                assert found == SEEN_BY_KERNEL[self.cell.name, role], self.figures

    # Stages

    def stages(self, stages: tuple[Stage, ...]) -> None:
        """Let both ends carry out stage by stage."""
        handed = 0
        for stage in stages:
            orders = {role: getattr(stage, role) for role in ("client", "server")}
            orders = {role: one for role, one in orders.items() if one is not None}
            for role, one in orders.items():
                more = {"count": handed} if one.do == "catch_up" else {}
                self.ends[role].tell(one.do, **one.arguments, **more)
            answers = {role: self._answer(role, DEADLINE) for role in orders}
            for role, answer in answers.items():
                handed = answer.get("count", handed)
                self._judge(role, orders, answer)

    def _judge(
        self, role: str, orders: dict[str, Order], answer: dict[str, Any]
    ) -> None:
        other = "server" if role == "client" else "client"
        if orders[role].do == "reset":
            self.figures[f"{role}_told"] = f"{answer['failed']}: {answer['text']}"
            self._judge_reset(role, orders.get(other), answer["failed"])
        elif orders[role].do == "exchange":
            self.figures[f"{role}_seconds"] = answer["seconds"]

    def _judge_reset(self, role: str, done: Order | None, failed: str | None) -> None:
        """An end was to see that the other one, which did this, broke off."""
        # What has nothing left to lose ends in order, as over TCP; and Linux always
        # does, unless something is unread.
        other = "server" if role == "client" else "client"
        is_orderly = done is not None and done.do == "abort"
        if "unsent" in self.cell.name and self.kinds[other] == "pysmc":
            is_orderly = False
        if self.kinds[role] == "kernel":
            # A reader of Linux that waits is told of an end; the error comes later.
            assert self._kernel is not None
            # Not by its port, which Linux forgets when TCP beneath was reset.
            found = self._kernel.sockets()
            states = [one.state for one in found if one.role == role]
            orderly, reset = (None, APPLICATION_CLOSES), (RESETS[0], PROCESS_ABORTS)
            wanted = orderly if is_orderly else reset
            assert [(failed, state) for state in states] == [wanted], (failed, found)
        else:
            assert failed in ((None,) if is_orderly else RESETS)

    def compare(self) -> None:
        """What one end has sent the other has received: all, or a prefix."""
        told = {role: self.told(role) for role in ("client", "server")}
        assert sorted(told["client"]) == sorted(told["server"])
        for port, at_client in told["client"].items():
            at_server = told["server"][port]
            if self.cell.is_broken:
                self.figures["client_to_server"] = _counts(at_client, at_server)
                self.figures["server_to_client"] = _counts(at_server, at_client)
            for sender, receiver in ((at_client, at_server), (at_server, at_client)):
                if self.cell.is_broken:
                    # Each byte was compared with the one that was sent in its place.
                    assert receiver["received"][0] <= sender["sent"][0]
                else:
                    assert receiver["received"] == sender["sent"]

    def told(self, role: str) -> dict[int, Any]:
        """Ask an end what went through its connections; it forgets them."""
        lines = self.ends[role].ask("told")["lines"]
        return {line["port"]: line for line in lines}

    def finish(self) -> None:
        """Let both ends end in order."""
        for end in self.ends.values():
            assert end.finish() == 0
        if self._kernel is not None:
            self._kernel.wait_until_gone()

    def groups(self, wanted: list[int], deadline: float = 15.0) -> None:
        """Wait until the link groups of every pysmc end have so many connections."""

        def found() -> list[Any]:
            ours = [role for role, kind in self.kinds.items() if kind == "pysmc"]
            return [self.ends[role].ask("groups")["connections"] for role in ours]

        wait_until(lambda: all(one == wanted for one in found()), found, deadline)

    # Cells that are more than their stages

    def run(self) -> None:
        """Carry it out; `figures` is what is worth telling."""
        special = getattr(self, f"_{self.cell.special}", self._plain)
        with contextlib.ExitStack() as undo:
            if self._kernel is not None:
                for role, kind in self.kinds.items():
                    if kind == "kernel":
                        state = getattr(self.cell, role)
                        undo.enter_context(kernel_in_state(self._kernel, state))
                for name, value in self.cell.sysctl.items():
                    self._kernel.sysctl(name, value)
            before = held()
            began = time.monotonic()
            special()
            self.figures["seconds"] = time.monotonic() - began
            wait_until(lambda: not more_than(held(), before), lambda: (held(), before))

    def _plain(self) -> None:
        self.start("server")
        self.start("client")
        self.connect()
        with contextlib.ExitStack() as undo:
            if self.cell.network:
                undo.enter_context(impaired(self.cell.network))
            self.stages(self.cell.stages)
            if self.cell.network:
                self._judge_network()
        self.compare()
        self.finish()

    def _judge_network(self) -> None:
        """What was to be hurt went through there, and was hurt."""
        hurt = impaired_packets()
        self.figures |= {"packets": hurt.packets, "dropped": hurt.dropped}
        assert hurt.packets > PACKETS_LEAST, hurt
        assert hurt.dropped or "loss" not in self.cell.network, hurt

    def _idle(self) -> None:
        """What crosses the wire meanwhile is the ends' asking each other."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "idle.pcap"
            with captured(path):
                self._plain()
            words = collections.Counter(
                f"{one.end}: {one.words}"
                for one in said(frames(path.read_bytes()))
                if one.words.startswith(TestLink.__name__)
            )
        self.figures["test_links"] = dict(words)
        asked = [words[f"{role}: TestLink"] for role in self.kinds]
        answered = [words[f"{role}: TestLink response"] for role in self.kinds]
        assert sum(asked) >= TEST_LINKS_LEAST, words
        assert asked == answered[::-1], words

    def _crowd(self) -> None:
        small = {"rmbe_bytes": 16 * KIB, "sndbuf_bytes": 16 * KIB}
        self.start("server", **small)
        self.start("client", **small)
        self.connect(256)
        assert sorted(self.figures["link_groups"].values()) == [1, 255]
        self.stages(tuple(Stage(all_do, all_do) for all_do in (TALK, CLOSE_ALL)))
        self.compare()
        self.finish()

    def _again(self) -> list[int | None]:
        """Connect, talk and close; gives the number of each pysmc end's link group."""
        self.connect()
        self.stages(one_way(1) + END)
        infos = [self.infos.get(role) or {} for role in ("client", "server")]
        return [info.get("link_group") for info in infos]

    def _reuse(self) -> None:
        self.start("server")
        self.start("client")
        first = self._again()
        self.groups([0])
        assert self._again() == first
        self.groups([0])
        self.compare()
        self.finish()

    def _renewed(self) -> None:
        self.start("server")
        self.start("client")
        first = self._again()
        self.groups([])
        second = self._again()
        for one, other in zip(first, second, strict=True):
            assert one is None or one != other
        self.compare()
        self.finish()

    def _broken(self) -> tuple[str, str]:
        """Connect two ends that notice soon; gives the one that goes and the other."""
        if self._kernel is not None:
            for name, value in QUICK_KERNEL.items():
                self._kernel.sysctl(name, value)
        for role in ("server", "client"):
            self.start(role, **QUICK if self.kinds[role] == "pysmc" else {})
        self.connect()
        self.stages(one_way(5000))
        if "client" in self.cell.name:
            return "client", "server"
        return "server", "client"

    def _kill(self) -> None:
        victim, survivor = self._broken()
        began = self.ends[victim].signal(signal.SIGKILL)
        assert self.ends[victim].wait() == -signal.SIGKILL
        self._notices(survivor, began, killed=self.kinds[victim])
        self.told(survivor)
        self.start(victim, **QUICK if self.kinds[victim] == "pysmc" else {})
        self._again()
        self.compare()
        self.finish()

    def _cut(self) -> None:
        victim, survivor = self._broken()
        with impaired("loss 100%", devices=(DEVICES[victim],)):
            began = time.monotonic()
            for role in (victim, survivor):
                self.ends[role].tell("reset")
            for role in (victim, survivor):
                self._notices(role, began)
        for role in (victim, survivor):
            self.told(role)
        self._again()
        self.compare()
        self.finish()

    def _notices(self, role: str, began: float, killed: str = "") -> None:
        """An end is told that its connection is over, in time."""
        if killed:
            self.ends[role].tell("reset")
        answer = self._answer(role, NOTICE_SECONDS)
        seconds = time.monotonic() - began
        self.figures[f"{role}_told"] = f"{answer['failed']}: {answer['text']}"
        self.figures[f"{role}_told_after"] = seconds
        # The kernel closes a dead process' connections as if it had done so itself.
        allowed = {None, *RESETS} if killed == "kernel" else set(RESETS)
        assert answer["failed"] in allowed, answer


RDMA_DEVICES = {"client": "rxe1", "server": "rxe0"}
RESETS = ("ConnectionResetError", "ConnectionAbortedError", "ConnectionReset")


def _counts(sender: dict[str, Any], receiver: dict[str, Any]) -> str:
    return f"{receiver['received'][0]} of {sender['sent'][0]} bytes"


def held() -> dict[str, dict[str, int]]:
    """Count what is held of each RDMA device, but for what the kernel keeps for good.

    Its SMC makes two completion queues for a device that is used for the first time.
    """
    return {
        device: {kind: count for kind, count in counts.items() if kind != "cq"}
        for device, counts in resources().items()
    }


def wait_until(
    is_so: Callable[[], bool], tell: Callable[[], object], deadline: float = 10.0
) -> None:
    """Wait until something is so; says what else was after the deadline."""
    until = time.monotonic() + deadline
    while not is_so():
        assert time.monotonic() < until, tell()
        select.select([], [], [], 0.05)


def cases(quick: Collection[str], left_out: Collection[str] = ()) -> list[Any]:
    """Make a pytest parameter of every cell.

    Args:
        quick: Names of the cells that belong to every run.
        left_out: Names of those that this pair of kinds does not have.
    """
    assert {*quick, *left_out} <= {cell.name for cell in CELLS}
    made = []
    for cell in CELLS:
        if cell.name not in left_out:
            marker = pytest.mark.lab if cell.name in quick else pytest.mark.lab_long
            marks = marker(seconds=cell.seconds)
            made.append(pytest.param(cell, id=cell.slug, marks=marks))
    return made


def play(
    cell: Cell,
    kinds: tuple[Kind, Kind],
    ends: Ends,
    record: Callable[[str, object], None],
    kernel: Kernel | None = None,
) -> None:
    """Carry out a cell; what is worth telling of it is put into the report.

    Args:
        cell: What they do.
        kinds: Of the client and of the server.
        ends: Starts processes.
        record: The fixture `record_property`.
        kernel: The kernel's SMC, where an end is the kernel.
    """
    one = Play(cell, kinds, ends, kernel)
    figures = {"cell": cell.name, "client": kinds[0], "server": kinds[1]}
    figures["kernel_release"] = platform.release()
    try:
        one.run()
    finally:
        figures |= one.figures
        record("cell", figures)
        show(f"{cell.name}: {figures}")
