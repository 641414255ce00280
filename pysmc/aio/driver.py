"""The driver: everything of SMC-R that belongs to one loop.

One `Driver` serves one loop. It owns discovery, the devices and the core's `Endpoint`,
decides when they are made (as late as possible: a loop that only talks TCP opens none)
and in which order they end. It knows neither bytes nor the application. How orders and
completions move is in `pysmc.aio.pump`, which it builds on. In a forked child all but
closing descriptors is refused.

Reference: RFC 7609 section 3.5; kernel counterparts: smc_core.c, af_smc.c.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import time
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

from pysmc.aio.admission import Admission
from pysmc.aio.identity import SYSTEM, RandomTokens, host_name, new_peer_id
from pysmc.aio.negotiation import Outcome
from pysmc.aio.parting import is_awaited, let_peers_close
from pysmc.aio.pump import Pump
from pysmc.core.endpoint import Endpoint, Identity
from pysmc.core.rate import Rate
from pysmc.discovery import Discovery
from pysmc.discovery.beacon import Lookup
from pysmc.discovery.presence import Presence
from pysmc.errors import (
    ConnectionReset,
    Declined,
    ForkedError,
)
from pysmc.info import ConnectionInfo
from pysmc.reasons import Reason, reason

if TYPE_CHECKING:
    import asyncio
    import random
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from pysmc.aio.devices import FinderOpener, Fitting, Opener
    from pysmc.aio.transport_end import EndingTransport
    from pysmc.config import Config
    from pysmc.core.connection import Connection
    from pysmc.core.endpoint import FabricOffer
    from pysmc.discovery import Announcement, Mark, OptionMark, Way
    from pysmc.fabric.base import Device

__all__ = ["Driver"]

log = logging.getLogger("pysmc")

NOT_MARKED = reason("NOT_MARKED", "local")

INET = frozenset({socket.AF_INET, socket.AF_INET6})
NEWCOMERS_AT_ONCE = 1000
"""Connections that are accepted as they come while there are some on SMC-R. Of more
than that a listener takes one every second time that the loop looks at it: under a
flood the turn of those that are open would come a few times a second only."""
NEWCOMERS_PER_SECOND = 10
"""How fast the next burst is saved up: little beside one in every second turn."""
TCP_OUTCOMES_MAX = 64
"""Reasons whose outcome is kept, and made only once."""


_living: weakref.WeakSet[Driver] = weakref.WeakSet()


def _refuse_in_child() -> None:
    for driver in list(_living):
        driver.disown()


def _leave_at_exit() -> None:
    """Close what a process leaves open, as the kernel does with its TCP sockets."""
    for driver in list(_living):
        if not driver.is_forked and not driver.loop.is_running():
            for transport in list(driver.transports):
                with contextlib.suppress(RuntimeError):  # a loop closed without us
                    transport.leave()


os.register_at_fork(after_in_child=_refuse_in_child)
atexit.register(_leave_at_exit)


class Driver(Pump):
    """Everything of SMC-R that belongs to one loop.

    Args:
        loop: The loop; it need not run yet.
        config: How to take part.
        watch: Is told of every device that was opened, and makes sure that `pump` runs
            when it has completions. None registers a reader with the loop, as any loop
            allows; only then does the driver arm the devices itself.
        opener: Opens the devices; None is `pysmc.fabric.open_device`.
        clock: Tells the time in seconds; it never goes back.
        entropy: Where random numbers come from.
        discovery: Recognises peers; None is `pysmc.discovery.Discovery`.
        unwatch: Undoes what `watch` did, for a device that is about to be closed.
        finder: See `Pump`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        watch: Callable[[Driver, Device], None] | None = None,
        opener: Opener | None = None,
        clock: Callable[[], float] = time.monotonic,
        entropy: random.Random = SYSTEM,
        discovery: Discovery | None = None,
        unwatch: Callable[[Driver, Device], None] | None = None,
        finder: FinderOpener | None = None,
    ) -> None:
        super().__init__(loop, config, opener, clock, finder)
        self.config = config
        is_wanted = "tcp_option" in config.discovery and bool(config.fabrics)
        self.presence = Presence(loop.time, is_wanted=is_wanted and discovery is None)
        """Whether the TCP option is installed."""
        self.discovery = discovery or Discovery(loop, config, self.presence)
        self.lookup = _quick_lookup(config) if discovery is None else None
        """Tells alone whether a port has a beacon; None where that is not enough to
        know that a destination is plain. It never is where the option is installed."""
        self.no_device: Reason | None = None
        """Why no fabric could be opened; None when one was, or none was tried."""
        self._is_unopened = True  # or a limit forbade it, which may be gone next time
        self._identity: Identity
        self._offers: list[FabricOffer] = []  # the endpoint's, which sees them come
        # In the order in which they were made, as a set would not be.
        self.transports: weakref.WeakKeyDictionary[EndingTransport, None] = (
            weakref.WeakKeyDictionary()
        )
        self._watch = watch
        self._unwatch = unwatch
        self._entropy = entropy
        self._arms_itself = watch is None
        self._newcomers = Rate(NEWCOMERS_PER_SECOND, NEWCOMERS_AT_ONCE)
        self._passed: set[int] = set()
        """Descriptors of listeners that were passed over: it is their turn."""
        self.admission = Admission(config)
        """Counts negotiations, and what goes beyond the limits."""
        self._tcp_outcomes: dict[
            tuple[str, int, Way | None], tuple[Reason, Outcome]
        ] = {}
        _living.add(self)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"links={len(self.up)}"
        excess = "".join(f" {name}+{count}" for name, count in self.excess.items())
        return f"<Driver {state} fabrics={list(self._devices.by_name)}{excess}>"

    @property
    def excess(self) -> dict[str, int]:
        """How often each limit was exceeded, by its name."""
        core = {} if self._endpoint is None else self._endpoint.excess
        return {**self.admission.excess, **core}

    # Who may use it

    def check_owner(self) -> None:
        """Refuse a forked child.

        Raises:
            ForkedError: This process is a child of the one that made the loop.
        """
        if self.is_forked:
            self.refuse()

    def refuse(self) -> NoReturn:
        """Raise the error of a forked child."""
        message = (
            "this loop and its connections belong to the parent process; "
            "make a new loop after fork()"
        )
        raise ForkedError(message)

    def disown(self) -> None:
        """In a forked child: let every later use raise, and touch nothing."""
        self.is_forked = True
        self._close_lookup()
        for transport in list(self.transports):
            transport.disown()

    # What the application is told

    def has_room(self) -> bool:
        """Whether another negotiation may begin."""
        return self.admission.has_room()

    def limit_reason(self) -> Reason:
        """Say, and count, that no further negotiation may begin."""
        return self.admission.over("max_handshakes")

    def negotiating(self, host: str | None = None) -> AbstractContextManager[None]:
        """Count a negotiation while it lasts; see `Admission.negotiating`."""
        self.check_owner()
        return self.admission.negotiating(host)

    def on_tcp(self, role: str, why: Reason | None, way: Way | None = None) -> Outcome:
        """Give the outcome of a connection that is plain TCP.

        Args:
            role: "client" or "server".
            why: The reason.
            way: How the peer showed that it speaks SMC, if it did.

        Raises:
            Declined: SMC-R is required.
        """
        assert why is not None, "plain TCP always has a reason"
        if self.config.fallback == "require":
            raise Declined(why)
        # By identity: the usual reasons are constants, and hashing them would cost more
        # than making the outcome.
        known = self._tcp_outcomes.get((role, id(why), way))
        if known is not None:
            outcome = known[1]
        else:
            info = ConnectionInfo(
                mode="tcp",
                role="client" if role == "client" else "server",
                reason=why,
                discovery=None if way is None else way.value,
            )
            outcome = Outcome(info)
            # Reasons that name addresses or waits would otherwise pile up.
            if len(self._tcp_outcomes) < TCP_OUTCOMES_MAX:
                self._tcp_outcomes[role, id(why), way] = (why, outcome)
        return outcome

    def plain(self, role: str) -> ConnectionInfo:
        """Describe a connection whose peer showed nothing, after a look if it is time.

        Raises:
            Declined: SMC-R is required.
        """
        self.presence.is_here()
        return self.on_tcp(role, self.presence.plain).info

    def info_of(
        self, connection: Connection, role: str, way: Way | None = None
    ) -> ConnectionInfo:
        """Describe a connection on SMC-R, and how its peer showed itself."""
        group, link = connection.group, connection.link
        assert link.remote is not None, "an established connection has a peer"
        return ConnectionInfo(
            mode="smcr",
            role="client" if role == "client" else "server",
            version=group.version,
            fabric=group.fabric,
            link_group=group.number,
            links=tuple(link.number for link in group.links if link.is_active),
            eid=group.eid,
            local_gid=socket.inet_ntop(socket.AF_INET6, link.local.gid),
            peer_gid=socket.inet_ntop(socket.AF_INET6, link.remote.gid),
            rmbe_bytes=connection.rmbe_bytes,
            peer_rmbe_bytes=connection.peer_rmbe_bytes,
            discovery=None if way is None else way.value,
        )

    # Devices

    def open(self) -> Reason | None:
        """Open the fabrics of the configuration, once.

        Returns:
            Why no connection of ours can be SMC-R, None when it can.

        Raises:
            ForkedError: In a forked child.
        """
        self.check_owner()
        if self._is_unopened:
            return self._open_devices()
        if self.no_device is not None and self._devices.recheck(self.time()):
            self.no_device = None
        return self.no_device

    def _open_devices(self) -> Reason | None:
        if self._endpoint is None:
            # Without a device it can still decline, where a peer expects CLC.
            self._identity = Identity(new_peer_id(self._entropy), host_name())
            self._endpoint = Endpoint(
                self._identity, self._offers, self.config, RandomTokens(self._entropy)
            )
        self._offers[:] = self._devices.open(self._identity.peer_id)
        why = self._devices.why_none()
        # What is short may be there again next time: it is not remembered.
        self._is_unopened = why is not None and why.name == "LIMIT"
        if not self._is_unopened:
            self.no_device = why
        return why

    def fitting(self, sock: socket.socket) -> Fitting:
        """Find the devices that a connection may use; see `Devices.fitting`."""
        # Beside a fabric that was there from the beginning nobody else looks again.
        now = self.time()
        self._devices.recheck(now)
        return self._devices.fitting(
            sock, lambda: {group.device for group in self.endpoint.groups}, now
        )

    def refusal(
        self, host: str | None = None, *, must_answer: bool = False
    ) -> Reason | None:
        """Tell why a peer that speaks CLC in any case has to be declined now, if so.

        Its connection can be neither ignored nor TCP without a word.

        Args:
            host: The peer's numeric address, when it is our client.
            must_answer: Decline however many there are: a client that showed the option
                would lose a connection that plain TCP had given it.

        Raises:
            ConnectionReset: There are so many that not even a Decline is affordable.
        """
        why = self.open()
        limit = None if must_answer else self.admission.exceeded(host, times=2)
        if limit:
            self.admission.over(limit)
            message = "too many handshakes are in progress to decline another one"
            raise ConnectionReset(message)
        if why is None and (limit := self.admission.exceeded(host)):
            why = self.admission.over(limit)
        return why

    def attend(self, device: Device) -> None:
        """A device was opened: make sure that `pump` runs when it has completions."""
        # What comes last is called first: connections end before their device does,
        # which may have a call of its own.
        atexit.unregister(_leave_at_exit)
        atexit.register(_leave_at_exit)
        if self._watch is not None:
            self._watch(self, device)
            return
        self.loop.add_reader(device.fileno(), self.pump_armed, device)
        if not device.arm():
            self.loop.call_soon(self.pump_armed, device)

    def dismiss(self, device: Device) -> None:
        """A device is about to be closed: attend to it no more."""
        if self._unwatch is not None:
            self._unwatch(self, device)
        elif self._arms_itself and not self.loop.is_closed():
            self.loop.remove_reader(device.fileno())

    def limit_reached(self, name: str, limit: int) -> None:
        """Log that the core found a limit exceeded."""
        self.admission.log(name, limit)

    # Listeners and sockets

    def announce(self, listener: socket.socket) -> Announcement | None:
        """Let clients know of a listener, if any of its connections can be SMC-R."""
        self.check_owner()
        if not is_tcp(listener) or not self.config.fabrics or self.open() is not None:
            return None
        return self.discovery.announce(listener)

    def accepts(self, listener: socket.socket, backlog: int) -> int:
        """Tell how many connections a listener may take in this turn of the loop.

        Args:
            listener: Which; once for each time that the loop finds it readable.
            backlog: What it would take, 0 or more.

        Returns:
            0 to `backlog`; 0 where it is passed over, and takes one next time.
        """
        if not self.transports:
            return backlog
        left = self._newcomers.left(self.time())
        if left > 0:
            return min(backlog, left)
        self._passed ^= {listener.fileno()}
        return 0 if listener.fileno() in self._passed else min(backlog, 1)

    def accepted(self) -> None:
        """Count a newcomer."""
        if self.transports:
            self._newcomers.take(self.time())

    def opt_in(self, listener: socket.socket) -> None:
        """Let a listener show the TCP option; before it listens."""
        self.check_owner()
        if is_tcp(listener):
            is_able = self.presence.is_here() and self.open() is None
            self.discovery.opt_in(listener, is_able=is_able)

    def inspect(self, conn: socket.socket, *, is_given: bool = False) -> Way | Reason:
        """Look at an accepted connection: a way when `negotiate_server` is worth it.

        Args:
            conn: The accepted socket.
            is_given: Whether the program brought it, from whatever listener.
        """
        return self.judge(self.discovery.inspect(conn, is_given=is_given))

    def judge(self, found: Way | Reason) -> Way | Reason:
        """Say what discovery's answer about an accepted connection comes to."""
        if isinstance(found, Reason):
            # Without a device no listener was announced, which is all it found out.
            return self.no_device or found
        if found.is_binding:
            return found
        if not self.has_room() and not self.admission.may_refuse():
            return self.limit_reason()
        return self.open() or found

    def prepare(self, sock: socket.socket, address: Any) -> Mark | OptionMark | Reason:
        """Look for SMC before a socket connects; follow with `connected`."""
        self.check_owner()
        return self.discovery.prepare(sock, address, self.why_not)

    def why_not(self) -> Reason | None:
        """Say why no connection can begin a handshake now, if so."""
        why = self.open()
        return self.limit_reason() if why is None and not self.has_room() else why

    # The application's side of a connection

    def end(self, connection: Connection, *, abort: bool) -> None:
        """Close or abort a connection, tell the peer, and give back what can be."""
        if abort:
            connection.abort()
        else:
            connection.close()
        self.publish(connection)
        self.endpoint.reap(connection, self.time())
        self.settle()

    # The end

    def close(self) -> None:
        """End everything: connections, links, devices, discovery. Idempotent.

        Ctrl-C, and what else gets through, spares the wait for peers that still close.
        """
        if self.is_closed:
            return
        if self.is_forked:
            self._close_in_child()
            return
        # Each step is taken, wherever another one is interrupted; the last first.
        with contextlib.ExitStack() as rest:
            rest.callback(self._close_what_is_left)
            rest.callback(self._close_devices)
            rest.callback(self._stop)
            rest.callback(self._shut_down)
            for transport in list(self.transports):
                self._guard(transport.leave)
            if self._endpoint is not None and not self.loop.is_closed():
                self._guard(let_peers_close, self._devices_of_closing_peers, self.pump)

    def _shut_down(self) -> None:
        if self._endpoint is not None:
            self._guard(self._endpoint.shutdown, self.time())
            self.settle()

    def _stop(self) -> None:
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_devices(self) -> None:
        with contextlib.ExitStack() as rest:
            for device in reversed(self.devices):
                rest.callback(device.close)
                if self._arms_itself and not self.loop.is_closed():
                    rest.callback(self.loop.remove_reader, device.fileno())

    def _close_what_is_left(self) -> None:
        self.lingering.close()
        self._devices.close()
        self.discovery.close()
        self._close_lookup()
        self._links.clear()
        self.transports.clear()
        _living.discard(self)

    def _devices_of_closing_peers(self) -> list[Device]:
        names = {group.device for group in self.endpoint.groups if is_awaited(group)}
        found = [self._devices.by_name.get(name) for name in names]
        return [each for each in found if each is not None and each.peers_retry]

    def _close_lookup(self) -> None:
        if self.lookup is not None:
            self.lookup.close()
            self.lookup = None

    def _close_in_child(self) -> None:
        self.is_closed = True
        for device in self.devices:
            device.close()
        self.lingering.close()
        self._devices.close()
        self.discovery.close()
        _living.discard(self)


def _quick_lookup(config: Config) -> Lookup | None:
    """Make the look-up that is enough where nothing but beacons is asked."""
    if set(config.discovery) - {"tcp_option"} != {"local"} or not config.fabrics:
        return None
    try:
        return Lookup()
    except OSError:
        return None


def is_tcp(sock: socket.socket) -> bool:
    """Tell whether a socket may carry a connection that SMC-R can take over."""
    # Family and type become enums at every look, which costs more than the rest.
    return sock.proto == socket.IPPROTO_TCP or (
        sock.type == socket.SOCK_STREAM and sock.family in INET
    )
