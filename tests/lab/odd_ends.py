"""Ends of ours that do what a good one does not: decline, stop or be deaf at a step.

Such an end is a whole pysmc whose own process changes one step of the core, as a loop
that is stopped there, a shortage or a lost message would.
"""

from __future__ import annotations

import fcntl
import functools
import os
import select
import signal
import socket
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pysmc.aio.driver
from pysmc.core.client import ClientNegotiator
from pysmc.core.llc_flows import LlcFlows
from pysmc.core.negotiator import Negotiator
from pysmc.core.server import ServerNegotiator
from pysmc.reasons import reason
from tests.lab.players import KernelPlayer, PysmcPlayer, be_a_kernel_end

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.core.handshake import Handshake
    from smcproto import clc
    from tests.lab.ends import End, Ends

__all__ = ["CLIENT", "COUNT", "SERVER", "SHORTAGE", "Meetings", "OddPlayer"]

SERVER, CLIENT = "10.0.0.1", "10.0.0.2"
SHORTAGE = reason("NO_MEMORY", "local", "The scenario wants it so.")
"""Why such an end declines."""
COUNT = 100_000
"""Bytes of an exchange: more than a receive buffer holds."""
STEP_WAIT = 20.0
"""Seconds in which an end comes to its step."""

STEPS: dict[str, tuple[Any, str]] = {
    "client begins": (ClientNegotiator, "begin"),
    "client has the Accept": (ClientNegotiator, "_receive_accept"),
    "client has its memory": (ClientNegotiator, "memory_ready"),
    "client has CONFIRM LINK": (ClientNegotiator, "confirm_link_received"),
    "server has the Proposal": (ServerNegotiator, "_receive_proposal"),
    "server has its memory": (ServerNegotiator, "memory_ready"),
    "server has the Confirm": (ServerNegotiator, "_receive_confirm"),
    "server has its queue pair": (ServerNegotiator, "pair_connected"),
    "server has CONFIRM LINK": (ServerNegotiator, "confirm_link_received"),
    "either has CONFIRM RKEY": (LlcFlows, "_answer_confirm_rkey"),
}
"""Steps at which an end may do something odd, and where the core does them."""


class OddPlayer(PysmcPlayer):
    """An end with more orders."""

    async def do_decline_at(self, step: str) -> dict[str, Any]:
        """Decline at a step, for want of memory; at each connection."""
        ways: dict[str, Callable[..., Any]] = {
            "client begins": _begin_and_decline,
            "client has CONFIRM LINK": _fail_the_link,
            "server has the Confirm": _refuse_the_confirm,
        }
        _replace(step, ways.get(step, _decline))
        return {}

    async def do_stop_at(self, step: str) -> dict[str, Any]:
        """Stop the process at a step, once, until somebody lets it go on."""
        _replace(step, _Stop())
        return {}

    async def do_be_deaf_at(self, step: str) -> dict[str, Any]:
        """Pass over what comes at a step, as if it had been lost."""
        _replace(step, _nothing)
        return {}

    async def do_time_declines(self) -> dict[str, Any]:
        """Measure from now on when Declines come after our Confirm."""
        self._declines: list[float] = []
        real = Negotiator.declined

        def declined(
            this: Any, handshake: Handshake, message: clc.Decline, now: float
        ) -> None:
            self._declines.append(now - handshake.confirmed_at)
            real(this, handshake, message, now)

        setattr(Negotiator, "declined", declined)  # noqa: B010  # typed otherwise
        return {}

    async def do_declines(self) -> dict[str, Any]:
        """Tell the seconds between our Confirm and each Decline."""
        return {"seconds": self._declines}

    async def do_be_a_twin(self, peer_id: str) -> dict[str, Any]:
        """Be known by a peer ID that another process may have; before all else."""
        made = bytes.fromhex(peer_id)
        vars(pysmc.aio.driver)["new_peer_id"] = lambda _: made
        return {}


class OddKernelPlayer(KernelPlayer):
    """An end of the kernel that uses more of what its sockets can do."""

    def do_send_urgent(self) -> dict[str, Any]:
        """Send the next byte as an urgent one."""
        self._line.way.send(self._line.sent.take(1), socket.MSG_OOB)
        return {}

    def do_peek(self, count: int) -> dict[str, Any]:
        """Look at so many bytes, twice, and at how many there are; take none."""
        way = self._line.way
        how = socket.MSG_PEEK | socket.MSG_WAITALL
        looks = [way.recv(length, how) for length in (count // 2, count)]
        known = fcntl.ioctl(way, termios.FIONREAD, bytes(4))
        wanted = self._line.received._flow.at(self._line.received.count, count)
        return {
            "are_right": looks == [wanted[: count // 2], wanted],
            "count": int.from_bytes(known, "little"),
        }

    def do_stop_reading(self) -> dict[str, Any]:
        """Say that nothing more will be read."""
        self._line.way.shutdown(socket.SHUT_RD)
        return {}


class _Stop:
    """Stops the process before the step, the first time."""

    def __init__(self) -> None:
        self._is_over = False

    def __call__(self, step: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        if not self._is_over:
            self._is_over = True
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(*arguments, **more)


def _replace(step: str, by: Callable[..., Any]) -> None:
    """Let something else be done at a step; it gets the step and its arguments."""
    kind, name = STEPS[step]
    real = getattr(kind, name)

    @functools.wraps(real)
    def odd(*arguments: Any, **more: Any) -> Any:
        return by(real, *arguments, **more)

    setattr(kind, name, odd)


def _nothing(step: Any, *arguments: Any, **more: Any) -> None:
    """Do nothing."""


def _decline(step: Any, self: Any, handshake: Any, *rest: Any, **more: Any) -> None:
    """Decline in place of the step; the time is the last argument."""
    self.decline(handshake, SHORTAGE, rest[-1])


def _begin_and_decline(
    step: Any, self: Any, peer_key: Any, now: float, *rest: Any
) -> Any:
    return step(self, peer_key, now, SHORTAGE, *rest[1:])


def _fail_the_link(step: Any, self: Any, handshake: Any, *rest: Any) -> None:
    self.link_failed(handshake, SHORTAGE)


def _refuse_the_confirm(
    step: Any, self: Any, handshake: Any, confirm: Any, now: float
) -> None:
    self._refuse_confirm(handshake, SHORTAGE, now)


class Meetings:
    """Brings an end of ours and one of the kernel together.

    Args:
        ends: Starts them; of the kind `OddPlayer`.
    """

    def __init__(self, ends: Ends) -> None:
        self.ends = ends

    def ours(self, name: str, **changes: Any) -> End:
        """Start an end of ours, which knows its peers by the TCP option."""
        option: dict[str, Any] = {"discovery": ("tcp_option",), "peers": ()}
        return self.ends.start(name, **(option | changes))

    def theirs(self, name: str) -> End:
        """Start one with the kernel's sockets."""
        be = functools.partial(be_a_kernel_end, kind=OddKernelPlayer)
        return self.ends.start_as(name, be)

    def connect(self, client: End, server: End, port: int) -> str:
        """Make a connection; gives what carries it, as our end of it says."""
        server.tell("take")
        opened = client.ask("open", port=port)
        taken = server.answer()
        assert "error" not in taken, taken
        (info,) = opened.get("infos") or taken["infos"]
        mode: str = info["mode"]
        return mode

    def exchange(self, *pair: End, count: int = COUNT) -> None:
        """Send so many bytes each way, at once."""
        for end in pair:
            end.tell("exchange", count=count)
        for end in pair:
            answer = end.answer()
            if "error" in answer:
                end.fail(f"exchange: {answer}")

    def talk(self, *pair: End) -> None:
        """Send a little over every connection, the older ones too."""
        for end in pair:
            end.tell("talk")
        for end in pair:
            answer = end.answer()
            assert "error" not in answer, (end.name, answer)

    def part(self, first: End, second: End) -> None:
        """End both directions, and compare what both ends say of all of it."""
        first.ask("finish")
        second.ask("end")
        second.ask("finish")
        first.ask("end")
        here = first.ask("told")["lines"][-1]
        there = second.ask("told")["lines"][-1]
        assert here["sent"] == there["received"]
        assert here["received"] == there["sent"]

    def use(self, first: End, second: End) -> None:
        """Exchange bytes and part: the connection is as good as any."""
        self.exchange(first, second)
        self.part(first, second)


def wait_until_stopped(end: End) -> float:
    """Wait until an end has stopped itself; gives the moment."""
    until = time.monotonic() + STEP_WAIT
    while (
        Path(f"/proc/{end.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
    ):
        assert time.monotonic() < until, f"{end.name} did not come to its step"
        rest(0.02)
    return time.monotonic()


def rest(seconds: float) -> None:
    """Let time pass, where it is time that is tested."""
    select.select([], [], [], seconds)
