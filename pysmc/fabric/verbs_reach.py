"""Whether a peer's GID can be reached, found out without blocking.

The kernel resolves the address of a peer's GID when a queue pair goes to RTR, and waits
for the answer: an unreachable peer would hold the whole interpreter for a second.
`Reach` asks before what the kernel would find: the route from our GID to the peer's,
and the neighbour that it leads to. Is that one known, RTR cannot block. Is it not, an
empty datagram makes the kernel look for it, and its answer is awaited in a selector.

Reference: kernel, ib_resolve_unicast_gid_dmac() in drivers/infiniband/core/verbs.c and
addr_resolve() in addr.c; rtnetlink(7).
"""

from __future__ import annotations

import contextlib
import ipaddress
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pysmc.fabric.netlink import (
    NEIGHBOUR_FAILED,
    NEIGHBOUR_VALID,
    Address,
    NeighbourEvents,
    Netlink,
)
from pysmc.fabric.timerfd import Timer

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.fabric.netlink import Neighbour
    from pysmc.fabric.verbs_ports import RdmaPort

__all__ = ["IP_PKTINFO", "REACH_WAIT", "Finder", "Reach"]

REACH_WAIT: Final = 1.5
"""Seconds until a neighbour has to have answered. The kernel asks three times, a second
apart; a client that gives up within 2 s can still decline at once."""
DISCARD_PORT: Final = 9
"""Where the empty datagram goes (RFC 863): nobody listens, and nobody would care."""
IP_PKTINFO: Final = 8
"""Python names it from 3.14 on only."""
_PACKET_INFO4 = struct.Struct("=i4s4s")
_PACKET_INFO6 = struct.Struct("=16si")

Answer = tuple[int, bool, str]


class Finder(Protocol):
    """Finds the way to a peer: what a device needs of a `Reach`."""

    def fileno(self) -> int:
        """Readable when `poll` may have an answer."""

    def begin(self, key: int, gid: bytes, port: RdmaPort) -> None:
        """Begin to look for the way from a port to a GID."""

    def cancel(self, key: int) -> None:
        """Forget one that was begun."""

    def poll(self) -> list[Answer]:
        """Take the answers: key, whether there is a way, why not."""

    def close(self) -> None:
        """Forget everything."""


class _Search(NamedTuple):
    """A neighbour that is being looked for."""

    due_at: float
    hop: Address
    interface: int
    what: str
    """What is looked for, in words."""


class Reach:
    """Looks for the way to peers' GIDs; one for each device.

    `fileno` becomes readable when `poll` may have an answer. Nothing blocks, nothing
    calls back, and no privilege is needed. Neighbours are listened to only while
    somebody waits for one.

    Args:
        wait: Seconds that an answer may take.
        clock: Tells the time in seconds; it never goes back.

    Raises:
        OSError: There is no descriptor left, or netlink is forbidden here.
    """

    def __init__(
        self,
        wait: float = REACH_WAIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wait = wait
        self._clock = clock
        self._searches: dict[int, _Search] = {}
        self._answers: list[Answer] = []
        self._events: NeighbourEvents | None = None
        with contextlib.ExitStack() as opened:
            self._epoll = opened.enter_context(contextlib.closing(select.epoll()))
            self._timer = opened.enter_context(contextlib.closing(Timer()))
            self._epoll.register(self._timer.fileno(), select.EPOLLIN)
            self._netlink = Netlink()
            opened.pop_all()

    def fileno(self) -> int:
        """The descriptor for a selector (level-triggered, for reading)."""
        return self._epoll.fileno()

    def begin(self, key: int, gid: bytes, port: RdmaPort) -> None:
        """Begin to look for the way from a port to a peer's GID.

        `poll` tells the answer, once; it may be there at once.

        Args:
            key: The caller's name for it, not in use.
            gid: The peer's, 16 bytes.
            port: Ours.
        """
        try:
            search = self._find(gid, port)
        except OSError as error:
            self._answer(key, why=error.strerror or str(error))
        else:
            if search is None:
                self._answer(key)
            else:
                self._searches[key] = search
        self._arm()

    def cancel(self, key: int) -> None:
        """Forget one that was begun; nothing when it is not there."""
        self._searches.pop(key, None)
        self._answers = [answer for answer in self._answers if answer[0] != key]
        self._arm()

    def poll(self) -> list[Answer]:
        """Take the answers: (key, whether it can be reached, a sentence why not)."""
        self._hear()
        now = self._clock()
        for key, search in list(self._searches.items()):
            if search.due_at <= now:
                # The last word is the table's: what was heard may have been lost.
                self._look(key, search, is_last=True)
        answers, self._answers = self._answers, []
        self._arm()
        return answers

    def close(self) -> None:
        """Forget everything. Idempotent."""
        self._searches.clear()
        self._answers.clear()
        self._stop_hearing()
        self._netlink.close()
        self._timer.close()
        self._epoll.close()

    # Finding out

    def _find(self, gid: bytes, port: RdmaPort) -> _Search | None:
        """Look for the way; None when there is one already.

        Raises:
            OSError: There is none; the text says why.
        """
        to = _address_of(gid)
        ours = port.address
        if to.is_link_local or to.is_multicast or to.is_unspecified:
            raise OSError(0, f"the peer's GID {to} is none that packets are routed to")
        if to.version != ours.version:
            message = f"the peer's GID {to} and ours, {ours}, are of two IP versions"
            raise OSError(0, message)
        interface = _number_of(port.netdev)
        what = f"{to} from {ours} over {port.netdev}"
        try:
            route = self._netlink.route(to, ours, interface)
        except OSError as error:
            message = f"there is no route to {what}: {error.strerror}"
            raise OSError(0, message) from error
        if route.is_local:
            return None
        hop = route.gateway or to
        search = _Search(self._clock() + self._wait, hop, route.interface, what)
        known = self._netlink.neighbour(hop, route.interface)
        if known is not None and known.state & NEIGHBOUR_VALID:
            return None
        # Before the kernel asks: its answer may be there at once.
        self._start_hearing()
        try:
            _ask_kernel(to, ours, route.interface)
        except OSError as error:
            message = f"nothing can be sent to {what}: {error.strerror}"
            raise OSError(0, message) from error
        # It may have answered somebody else before we heard.
        known = self._netlink.neighbour(hop, route.interface)
        return None if known is not None and known.state & NEIGHBOUR_VALID else search

    def _hear(self) -> None:
        if self._events is None:
            return
        try:
            while heard := self._events.take():
                for neighbour in heard:
                    self._judge(neighbour)
        except OSError:
            # Some of it was lost: the table tells.
            for key, search in list(self._searches.items()):
                self._look(key, search)

    def _judge(self, neighbour: Neighbour) -> None:
        for key, search in list(self._searches.items()):
            if (search.hop, search.interface) == (
                neighbour.address,
                neighbour.interface,
            ):
                self._take_state(key, search, neighbour.state)

    def _look(self, key: int, search: _Search, *, is_last: bool = False) -> None:
        try:
            known = self._netlink.neighbour(search.hop, search.interface)
        except OSError:
            known = None
        self._take_state(key, search, known.state if known else 0)
        if is_last and key in self._searches:
            del self._searches[key]
            self._answer(key, why=_silence(search, self._wait))

    def _take_state(self, key: int, search: _Search, state: int) -> None:
        if state & NEIGHBOUR_VALID:
            del self._searches[key]
            self._answer(key)
        elif state & NEIGHBOUR_FAILED:
            del self._searches[key]
            self._answer(key, why=_silence(search))

    def _answer(self, key: int, *, why: str = "") -> None:
        self._answers.append((key, not why, why))

    # Being told

    def _start_hearing(self) -> None:
        if self._events is None:
            self._events = NeighbourEvents()
            self._epoll.register(self._events.fileno(), select.EPOLLIN)

    def _stop_hearing(self) -> None:
        if self._events is not None:
            self._events.close()  # which takes it out of the epoll set as well
            self._events = None

    def _arm(self) -> None:
        if not self._searches:
            self._stop_hearing()
        if self._answers:
            self._timer.set(0.0)
        elif self._searches:
            due_at = min(search.due_at for search in self._searches.values())
            self._timer.set(due_at - self._clock())
        else:
            self._timer.stop()


def _address_of(gid: bytes) -> Address:
    address = ipaddress.IPv6Address(gid)
    return address.ipv4_mapped or address


def _number_of(netdev: str) -> int:
    try:
        return socket.if_nametoindex(netdev) if netdev else 0
    except OSError as error:
        raise OSError(0, f"there is no network device {netdev}") from error


def _silence(search: _Search, wait: float | None = None) -> str:
    how = "does not answer" if wait is None else f"did not answer within {wait:g} s"
    return f"{search.hop} {how}, which is the way to {search.what}"


def _ask_kernel(to: Address, source: Address, interface: int) -> None:
    """Make the kernel look for the next hop: it has to, before it sends anything.

    Raises:
        OSError: It may not be sent (a firewall), or there is no way.
    """
    if to.version == 4:
        family, level, kind = socket.AF_INET, socket.IPPROTO_IP, IP_PKTINFO
        info = _PACKET_INFO4.pack(interface, source.packed, bytes(4))
    else:
        family, level = socket.AF_INET6, socket.IPPROTO_IPV6
        kind = socket.IPV6_PKTINFO
        info = _PACKET_INFO6.pack(source.packed, interface)
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as asking:
        asking.sendmsg([b""], [(level, kind, info)], 0, (str(to), DISCARD_PORT))
