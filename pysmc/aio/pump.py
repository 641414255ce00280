"""The pump: carries the core's orders out, brings answers and the fabric's news back.

Decides in which order: whatever called the endpoint, except on a connection's data
path, ends in `settle`, where orders are carried out until there are none, then the news
is told, then one timer is armed. Completions are processed until the device has none,
then it is armed; what came before the end of a link is therefore always processed
before it.

Reference: RFC 7609 section 3.5; kernel counterparts: smc_core.c, smc_wr.c.
"""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections import deque
from typing import TYPE_CHECKING, Any

from pysmc.aio.devices import Devices
from pysmc.aio.orders import Orders
from pysmc.aio.tcp_linger import Lingering
from pysmc.core.connection import split_wr_id
from pysmc.core.events import (
    ConnectionLost,
    Established,
    Failed,
    FellBack,
    LimitReached,
    News,
)
from pysmc.errors import ConnectionReset, FabricError
from pysmc.fabric.base import CompletionKind, Status
from smcproto.constants import LLC_V2_FLAG, LlcType

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from pysmc.aio.devices import FinderOpener, Opener
    from pysmc.aio.negotiation import Negotiation
    from pysmc.config import Config
    from pysmc.core.actions import Action
    from pysmc.core.connection import Connection
    from pysmc.core.endpoint import Endpoint
    from pysmc.core.link import Link
    from pysmc.fabric.base import Completion, Device, QueuePair

__all__ = ["ROUNDS_MAX", "Pump"]

log = logging.getLogger("pysmc")

ROUNDS_MAX = 64
"""Polls of one pump; more completions wait for the loop's next turn."""

_DELETE_LINK = frozenset({LlcType.DELETE_LINK, LlcType.DELETE_LINK | LLC_V2_FLAG})
_FINAL = News.CLOSED | News.ABORTED
# As asyncio with its callbacks: only Ctrl-C and sys.exit() get through.
_REPORTED = (Exception, CancelledError)

# Looked up once: a member of an Enum is found by a Python call.
_UPDATE, _PUBLISH = CompletionKind.UPDATE, CompletionKind.PUBLISH


class Pump:
    """Moves orders and news between one endpoint and its devices.

    Args:
        loop: The loop; it need not run yet.
        config: How to take part.
        opener: Opens the devices; None is `pysmc.fabric.open_device`.
        clock: Tells the time in seconds; it never goes back.
        finder: Gives what finds the ports of a fabric with many devices; None is
            `pysmc.fabric.open_finder`, or nothing with an opener of one's own.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        opener: Opener | None,
        clock: Callable[[], float],
        finder: FinderOpener | None = None,
    ) -> None:
        self.loop = loop
        self.time = clock
        """Tells the time as the core knows it, in seconds."""
        self.negotiations: dict[Negotiation, None] = {}  # in their order
        self.is_forked = False
        self.is_closed = False
        self.up: set[QueuePair] = set()
        """Queue pairs that are connected; looking at memory is of use only then."""
        self.on_poll: Callable[[], None] | None = None
        """Called once, and forgotten, before devices are polled."""
        self._arms_itself = False
        self._devices = Devices(config, opener, self.attend, self.dismiss, finder)
        self._links: dict[QueuePair, Link] = {}
        self._endpoint: Endpoint | None = None
        self.lingering = Lingering(loop, config.close_wait)
        """TCP sockets of connections whose close is on its way."""
        self._settling = False
        # What an interrupt left over: it comes first when things go on.
        self._ordered: deque[Action] = deque()
        self._news: deque[Any] = deque()
        self._left: list[Completion] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._orders = Orders(self, self._devices.by_name, self._links).table

    @property
    def devices(self) -> list[Device]:
        """The devices that are open."""
        return [*self._devices.by_name.values(), *self._devices.leaving]

    @property
    def endpoint(self) -> Endpoint:
        """The core; only after a device was found."""
        assert self._endpoint is not None, "no fabric was opened"
        return self._endpoint

    # Completions

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
            False when the driver was closed meanwhile, or the device removed.
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
        if self.is_closed:
            return False
        if device.is_gone or device in self._devices.leaving:
            return not self._devices.remove(device)
        return True

    def _take_completions(self, batch: list[Completion]) -> None:
        links, endpoint = self._links, self.endpoint
        now = self.time()
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

    def _take_publish(self, link: Link, wr_id: int) -> None:
        token, sequence = split_wr_id(wr_id)
        connection = self.endpoint.connection_of(link, token)
        if connection is not None:
            news = connection.publish_completed(sequence)
            if self.lingering:
                self.lingering.completed(connection)
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
        if self._arms_itself:
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
            if self.lingering:
                self.lingering.sweep()
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
                self._hand_out(handshake.handle, connection)
            case FellBack(handshake, why):
                handshake.handle.fell_back(why)
            case Failed(handshake, error):
                handshake.handle.failed(error)
            case ConnectionLost(connection, error):
                # Without a handle its handshake is not over, and fails by itself.
                if connection.handle is not None:
                    connection.handle.lose(error)
            case LimitReached(name, limit):
                self.limit_reached(name, limit)

    def _hand_out(self, negotiation: Negotiation, connection: Connection) -> None:
        """Give a connection to its negotiation, unless the fabric knows it is wrong."""
        rkey, address = connection.remote_rkey, connection.remote_address
        size = connection.peer_rmbe_bytes
        if connection.link.handle.names_element(rkey, address, size):
            negotiation.established(connection)
            return
        # A flipped bit in the Accept or Confirm, say: what we write would land in
        # other places of the peer's memory than it reads.
        text = "the peer's receive buffer is not where its CLC message says"
        connection.abort()
        self.publish(connection)
        self.endpoint.reap(connection, self.time())
        negotiation.failed(ConnectionReset(text))

    def limit_reached(self, name: str, limit: int) -> None:
        """The core found a limit exceeded, for the first time."""
        raise NotImplementedError

    def attend(self, device: Device) -> None:
        """A device was opened: make sure that `pump` runs when it has completions."""
        raise NotImplementedError

    def dismiss(self, device: Device) -> None:
        """A device is about to be closed: attend to it no more."""
        raise NotImplementedError

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
            delay = max(0.0, when - self.time())
            self._timer = self.loop.call_later(delay, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self.is_closed or self.is_forked:
            return
        # What arrived before a deadline counts, however late the loop came round. Only
        # theirs is read: with a thousand that stall, one after another is due.
        now = self.time()
        try:
            for negotiation in list(self.negotiations):
                if negotiation.is_due(now):
                    self._guard(negotiation.read_tcp)
            self._guard(self.pump_pending)
            self._guard(self.endpoint.handle_timer, now)
            self.settle()
        finally:
            self._arm_timer()

    def publish(self, connection: Connection) -> None:
        """Publish a connection's state if that is due."""
        if not connection.update_due:
            return
        pair = connection.link.handle
        try:
            connection.published(pair.publish(*connection.take_post()))
            pair.flush()
        except FabricError as error:
            log.debug("%r: its peer could not be told: %s", connection, error)
