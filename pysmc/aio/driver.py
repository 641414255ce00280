"""The pump: carries the core's orders out, brings answers and the fabric's news back.

One `Driver` serves one loop. It owns discovery, the devices and the core's `Endpoint`,
decides when they are made (as late as possible: a loop that only talks TCP opens none)
and in which order they end. It knows neither bytes nor the application.

* Whatever called the endpoint, except on a connection's data path, ends in `settle`:
  orders are carried out until there are none, then the news is told, then one timer is
  armed.
* Completions are processed until the device has none, then it is armed; what came
  before the end of a link is therefore always processed before it.
* In a forked child everything but closing descriptors is refused.

Reference: RFC 7609 section 3.5; kernel counterparts: smc_core.c, smc_wr.c.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import time
import weakref
from asyncio import CancelledError
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn

from pysmc.aio.devices import Devices
from pysmc.aio.identity import RandomTokens, host_name, new_peer_id
from pysmc.aio.negotiation import Negotiation, Outcome
from pysmc.aio.orders import Orders
from pysmc.core.endpoint import Endpoint, Identity
from pysmc.core.events import ConnectionLost, Established, Failed, FellBack, News
from pysmc.discovery import Discovery
from pysmc.discovery.beacon import Lookup
from pysmc.errors import (
    ConnectionReset,
    Declined,
    FabricError,
    ForkedError,
)
from pysmc.fabric.base import CompletionKind, Status
from pysmc.info import ConnectionInfo
from pysmc.reasons import Reason, reason
from smcproto.constants import LLC_V2_FLAG, LlcType

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from pysmc.aio.devices import Opener
    from pysmc.aio.transport_end import EndingTransport
    from pysmc.config import Config
    from pysmc.core.actions import Action
    from pysmc.core.connection import Connection
    from pysmc.core.link import Link
    from pysmc.discovery import Announcement, Mark
    from pysmc.fabric.base import Completion, Device, QueuePair

__all__ = ["Driver"]

log = logging.getLogger("pysmc")

NOT_MARKED = reason("NOT_MARKED", "local")

INET = frozenset({socket.AF_INET, socket.AF_INET6})
TCP_OUTCOMES_MAX = 64
"""Reasons whose outcome is kept, and made only once."""
ROUNDS_MAX = 64
"""Polls of one pump; more completions wait for the loop's next turn."""

_DELETE_LINK = frozenset({LlcType.DELETE_LINK, LlcType.DELETE_LINK | LLC_V2_FLAG})
_FINAL = News.CLOSED | News.ABORTED
# As asyncio with its callbacks: only Ctrl-C and sys.exit() get through.
_REPORTED = (Exception, CancelledError)

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

# Looked up once: a member of an Enum is found by a Python call.
_UPDATE, _PUBLISH = CompletionKind.UPDATE, CompletionKind.PUBLISH


class Driver:
    """Everything of SMC-R that belongs to one loop.

    Args:
        loop: The loop; it need not run yet.
        config: How to take part.
        watch: Is told of every device that was opened, and makes sure that `pump` runs
            when it has completions. None registers a reader with the loop, as any loop
            allows; only then does the driver arm the devices itself.
        opener: Opens the devices; None is `pysmc.fabric.open_device`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        watch: Callable[[Driver, Device], None] | None = None,
        opener: Opener | None = None,
    ) -> None:
        self.loop = loop
        self.config = config
        self.discovery = Discovery(loop, config)
        self.lookup = _quick_lookup(config)
        """Tells alone whether a port has a beacon; None where that is not enough to
        know that a destination is plain."""
        self.no_device: Reason | None = None
        """Why no fabric could be opened; None when one was, or none was tried."""
        self.transports: weakref.WeakSet[EndingTransport] = weakref.WeakSet()
        self.negotiations: set[Negotiation] = set()
        self.is_forked = False
        self.is_closed = False
        self.up: set[QueuePair] = set()
        """Queue pairs that are connected; looking at memory is of use only then."""
        self.on_poll: Callable[[], None] | None = None
        """Called once, and forgotten, before devices are polled."""
        self._watch = watch
        self._devices = Devices(config, opener)
        self._links: dict[QueuePair, Link] = {}
        self._endpoint: Endpoint | None = None
        self._negotiations = 0
        self._settling = False
        # What an interrupt left over: it comes first when things go on.
        self._ordered: deque[Action] = deque()
        self._news: deque[Any] = deque()
        self._left: list[Completion] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._tcp_outcomes: dict[tuple[str, int], tuple[Reason, Outcome]] = {}
        self._orders = Orders(self, self._devices.by_name, self._links).table
        _living.add(self)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"links={len(self.up)}"
        return f"<Driver {state} fabrics={list(self._devices.by_name)}>"

    def time(self) -> float:
        """Tell the time as the core knows it, in seconds."""
        return time.monotonic()

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
        return self._negotiations < self.config.max_handshakes

    def limit_reason(self) -> Reason:
        """Say that no further negotiation may begin."""
        limit = self.config.max_handshakes
        return reason("LIMIT", "local", f"max_handshakes is {limit}.")

    @contextlib.contextmanager
    def negotiating(self) -> Iterator[None]:
        """Count a negotiation while it lasts."""
        self.check_owner()
        self._negotiations += 1
        try:
            yield
        finally:
            self._negotiations -= 1

    def on_tcp(self, role: str, why: Reason | None) -> Outcome:
        """Give the outcome of a connection that is plain TCP.

        Raises:
            Declined: SMC-R is required.
        """
        assert why is not None, "plain TCP always has a reason"
        if self.config.fallback == "require":
            raise Declined(why)
        # By identity: the usual reasons are constants, and hashing them would cost more
        # than making the outcome.
        known = self._tcp_outcomes.get((role, id(why)))
        if known is not None:
            outcome = known[1]
        else:
            info = ConnectionInfo(
                mode="tcp", role="client" if role == "client" else "server", reason=why
            )
            outcome = Outcome(info)
            # Reasons that name addresses or waits would otherwise pile up.
            if len(self._tcp_outcomes) < TCP_OUTCOMES_MAX:
                self._tcp_outcomes[role, id(why)] = (why, outcome)
        return outcome

    def info_of(self, connection: Connection, role: str) -> ConnectionInfo:
        """Describe a connection on SMC-R."""
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
        )

    # Devices

    @property
    def devices(self) -> list[Device]:
        """The devices that are open."""
        return list(self._devices.by_name.values())

    @property
    def endpoint(self) -> Endpoint:
        """The core; only after `open` found a device."""
        assert self._endpoint is not None, "no fabric was opened"
        return self._endpoint

    def open(self) -> Reason | None:
        """Open the fabrics of the configuration, once.

        Returns:
            Why no connection of ours can be SMC-R, None when it can.

        Raises:
            ForkedError: In a forked child.
        """
        self.check_owner()
        if self._endpoint is None:
            identity = Identity(new_peer_id(), host_name())
            offers = self._devices.open(identity.peer_id)
            why = self._devices.why_none()
            if why is not None and why.name == "LIMIT":
                return why  # it may be there again next time: nothing is remembered
            self.no_device = why
            for device in self.devices:
                self._attend(device)
            # Without a device it can still decline, where a peer expects CLC.
            tokens = RandomTokens()
            self._endpoint = Endpoint(identity, offers, self.config, tokens)
        return self.no_device

    def refusal(self) -> Reason | None:
        """Tell why a peer of the static list has to be declined now, if so.

        It speaks CLC in any case, so its connection can be neither ignored nor TCP.

        Raises:
            ConnectionReset: There are so many that not even a Decline is affordable.
        """
        why = self.open()
        if self._endpoint is None:
            message = f"there is nothing left to answer the peer with: {why}"
            raise ConnectionReset(message)
        if why is None and self._negotiations > self.config.max_handshakes:
            why = self.limit_reason()
        if self._negotiations > 2 * self.config.max_handshakes:
            message = "too many handshakes are in progress to decline another one"
            raise ConnectionReset(message)
        return why

    def _attend(self, device: Device) -> None:
        """Make sure that `pump` runs when a device has completions."""
        if self._watch is not None:
            self._watch(self, device)
            return
        self.loop.add_reader(device.fileno(), self.pump_armed, device)
        if not device.arm():
            self.loop.call_soon(self.pump_armed, device)

    # Listeners and sockets

    def announce(self, listener: socket.socket) -> Announcement | None:
        """Let clients know of a listener, if any of its connections can be SMC-R."""
        self.check_owner()
        if not is_tcp(listener) or not self.config.fabrics or self.open() is not None:
            return None
        return self.discovery.announce(listener)

    def inspect(self, conn: socket.socket) -> Reason | None:
        """Look at an accepted connection: None when `negotiate_server` is worth it."""
        return self.judge(conn, self.discovery.inspect(conn))

    def judge(self, conn: socket.socket, found: Reason | bool) -> Reason | None:  # noqa: FBT001
        """Say what discovery's answer about an accepted connection comes to."""
        if isinstance(found, Reason):
            # Without a device no listener was announced, which is all it found out.
            return self.no_device or found
        if self.discovery.lists(conn):
            return None
        if not self.has_room():
            return self.limit_reason()
        return self.open()

    def prepare(self, sock: socket.socket, address: Any) -> Mark | Reason:
        """Look for SMC before a socket connects; follow with `connected`."""
        self.check_owner()
        found = self.discovery.prepare(sock, address)
        if isinstance(found, Reason) or found.verdict is not None:
            return found
        why = self.open()
        if why is None and not self.has_room():
            why = self.limit_reason()
        if why is not None:
            self.discovery.settle_tcp(found)
            return why
        return found

    # The pump

    def pump_armed(self, device: Device) -> None:
        """Pump, then arm: for loops whose selector does not know of devices."""
        if self.is_closed or self.is_forked:
            return
        device.disarm()
        if self.pump(device) and not device.arm():
            self.loop.call_soon(self.pump_armed, device)

    def pump(self, device: Device) -> bool:
        """Process what has completed on a device, up to a bound.

        Returns:
            False when the driver was closed meanwhile.
        """
        if self.on_poll is not None:
            on_poll, self.on_poll = self.on_poll, None
            on_poll()
        if self._left:
            self._take_left()
        poll, take, pending = device.poll, self._take_completions, device.pending
        for _ in range(ROUNDS_MAX):
            if self.is_closed:
                return False
            batch = poll()
            if batch:
                take(batch)
            # Cheaper than another poll; whatever it misses makes the descriptor
            # readable, or keeps arm() from arming.
            if not pending():
                break
        return not self.is_closed

    def _take_completions(self, batch: list[Completion]) -> None:
        links, endpoint = self._links, self.endpoint
        now = time.monotonic()
        rest = iter(batch)
        try:
            for completion in rest:
                pair = completion.queue_pair
                if pair not in links:
                    continue
                try:
                    if completion.kind is _UPDATE:
                        link = links[pair]
                        found = endpoint.receive_update(link, completion.payload, now)
                        if found is not None:
                            connection, news = found
                            try:
                                if connection.handle is not None:
                                    connection.handle.receive_news(news)
                            finally:
                                if news & _FINAL:
                                    endpoint.reap(connection, now)
                                    self.settle()
                    elif completion.kind is _PUBLISH:
                        self._take_publish(links[pair], completion.wr_id)
                    else:
                        self._take_control(links[pair], completion, now)
                        self.settle()
                except _REPORTED as error:
                    self._report(error, "a completion")
        finally:
            # Only Ctrl-C and sys.exit() cut it short: the rest comes next, and first.
            self._left.extend(rest)
            if self._left and not self.is_closed:
                self.loop.call_soon(self._take_left)

    def _take_left(self) -> None:
        left, self._left = self._left, []
        if left and not self.is_closed:
            self._take_completions(left)

    def _take_publish(self, link: Link, token: int) -> None:
        connection = self.endpoint.connection_of(link, token)
        if connection is not None:
            news = connection.publish_completed()
            if news and connection.handle is not None:
                connection.handle.receive_news(news)

    def _take_control(self, link: Link, completion: Completion, now: float) -> None:
        endpoint, status = self.endpoint, completion.status
        detail = completion.payload
        match completion.kind:
            case CompletionKind.RECEIVE:
                if detail[0] in _DELETE_LINK:
                    self._read_tcp_of(link)
                endpoint.receive_message(link, completion.payload, now)
            case CompletionKind.CONNECTED if status is Status.SUCCESS:
                self.up.add(completion.queue_pair)
                endpoint.pair_connected(link, now)
            case CompletionKind.CONNECTED:
                endpoint.pair_failed(link, status.value, detail or "", now)
            case CompletionKind.DOWN:
                self.up.discard(completion.queue_pair)
                self._read_tcp_of(link)
                endpoint.link_down(link, status.value, detail or "", now)

    def pump_all(self) -> None:
        """Process what has completed on every device."""
        for device in self.devices:
            self._pump_now(device)

    def pump_pending(self) -> None:
        """Process what memory shows to be there, in the middle of a turn of the loop.

        A turn in which a thousand connections shake hands takes seconds, and the peer
        does not wait that long for LLC.
        """
        for device in self.devices:
            if device.pending():
                self._pump_now(device)

    def _pump_now(self, device: Device) -> None:
        if self._watch is None:
            self.pump_armed(device)  # whoever polls has to arm again
        else:
            self.pump(device)

    def _read_tcp_of(self, link: Link) -> None:
        """Give handshakes the TCP bytes that were sent before a link's end."""
        for negotiation in list(self.negotiations):
            if negotiation.is_on(link):
                self._guard(negotiation.read_tcp)

    # The core's orders

    def settle(self) -> None:
        """Carry out the core's orders, tell its news, arm the timer.

        Calls from within are left to the outermost one.
        """
        if self._settling or self._endpoint is None:
            return
        self._settling = True
        try:
            while self._take_orders():
                while self._ordered:
                    action = self._ordered.popleft()
                    self._guard(self._orders[type(action)], action)
                while self._news:
                    self._guard(self._tell, self._news.popleft())
        except (SystemExit, KeyboardInterrupt):
            self.loop.call_soon(self.settle)
            raise
        finally:
            self._settling = False
            self._arm_timer()

    def _take_orders(self) -> bool:
        """Ask the core for orders and news; False when there are none."""
        if not (self._ordered or self._news):
            self._ordered.extend(self.endpoint.take_actions())
            self._news.extend(self.endpoint.take_events())
            for event in self._news:
                if type(event) is ConnectionLost and event.connection.handle:
                    # Its memory goes with the orders; what arrived is still owed.
                    self._guard(event.connection.handle.salvage)
        return bool(self._ordered or self._news)

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        """Call something whose failure must not cost the others their turn."""
        try:
            call(*args)
        except _REPORTED as error:
            self._report(error, getattr(call, "__qualname__", "a call"))

    def _report(self, error: BaseException, where: str) -> None:
        message = f"Exception in {where} of {self!r}"
        self.loop.call_exception_handler({"message": message, "exception": error})

    def _tell(self, event: Any) -> None:
        match event:
            case Established(handshake, connection):
                handshake.handle.established(connection)
            case FellBack(handshake, why):
                handshake.handle.fell_back(why)
            case Failed(handshake, error):
                handshake.handle.failed(error)
            case ConnectionLost(connection, error):
                # Without a handle its handshake is not over, and fails by itself.
                if connection.handle is not None:
                    connection.handle.lose(error)

    def _arm_timer(self) -> None:
        endpoint = self._endpoint
        if endpoint is None or self.is_closed:
            return
        when = endpoint.next_timer()
        if self._timer is not None:
            # A timer that rings too early asks again; only a later one is too late.
            if when is None or self._timer_due <= when:
                return
            self._timer.cancel()
            self._timer = None
        if when is not None:
            self._timer_due = when
            delay = max(0.0, when - time.monotonic())
            self._timer = self.loop.call_later(delay, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self.is_closed or self.is_forked:
            return
        # What arrived before a deadline counts, however late the loop came round.
        try:
            for negotiation in list(self.negotiations):
                self._guard(negotiation.read_tcp)
            self._guard(self.pump_pending)
            self._guard(self.endpoint.handle_timer, time.monotonic())
            self.settle()
        finally:
            self._arm_timer()

    # The application's side of a connection

    def publish(self, connection: Connection) -> None:
        """Publish a connection's state if that is due."""
        if not connection.update_due:
            return
        pair = connection.link.handle
        try:
            connection.published(
                pair.publish(
                    connection.remote_rkey,
                    connection.alert_token,
                    *connection.take_update(),
                )
            )
            pair.flush()
        except FabricError as error:
            log.debug("%r: its peer could not be told: %s", connection, error)

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
        """End everything: connections, links, devices, discovery. Idempotent."""
        if self.is_closed:
            return
        if self.is_forked:
            self._close_in_child()
            return
        for transport in list(self.transports):
            self._guard(transport.leave)
        if self._endpoint is not None:
            self._guard(self._endpoint.shutdown, self.time())
            self.settle()
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for device in self.devices:
            if self._watch is None and not self.loop.is_closed():
                self.loop.remove_reader(device.fileno())
            device.close()
        self.discovery.close()
        self._close_lookup()
        self._links.clear()
        self.transports.clear()
        _living.discard(self)

    def _close_lookup(self) -> None:
        if self.lookup is not None:
            self.lookup.close()
            self.lookup = None

    def _close_in_child(self) -> None:
        self.is_closed = True
        for device in self.devices:
            device.close()
        self.discovery.close()
        _living.discard(self)


def _quick_lookup(config: Config) -> Lookup | None:
    """Make the look-up that is enough where nothing but beacons is asked."""
    if config.discovery != ("local",) or not config.fabrics:
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
