"""What must hold in every loop at any time, watched while programs run.

A `Watch` puts itself around the few methods by which things are published, found, ended
and given back. Production code knows nothing of it and pays nothing. It changes nothing
either: what it finds is kept, together with what happened before, until somebody asks.

    watch = Watch()
    watch.install()
    ...                     # any loops, connections, transports of this process
    watch.check()           # AssertionError: which rule, where, after which events
    watch.remove()

The rules:

* **One owner.** While a loop runs, its driver is called by the loop's thread alone.
* **The core is consistent** after every settling of a driver: `Endpoint.check`, which
  counts places, bytes and users, and finds deadlines of what is gone.
* **Registered bytes are counted** alike by the core and by those who register.
* **Published first, last.** What a table finds is alive: no connection is found in an
  ended group. What ends is taken out of the tables first, then its deadlines are
  cancelled, then the queue pair is closed, then the memory goes.
* **Memory is reused** only when both ends have ended the connection that had it, and
  never while a connection is published on it.
* **One end.** A queue pair goes down once, a handshake has one verdict, a protocol gets
  connection_lost once: after our side of the connection was given back, and with
  nothing left behind it: no view, no timer, no descriptor, no place in the selector.
  The TCP socket is closed right behind connection_lost, as asyncio does it.
* **Nothing outlives a driver**: no group, no handshake, no domain, no timer.

Source: RFC 7609 sections 4.4.2 and 4.8; the kernel's counterparts are reference counts
and the order in which smc_core.c and smc_wr.c tear down.
"""

# ruff: noqa: SLF001  # it looks behind every seam, which is what it is for

from __future__ import annotations

import functools
import os
import sys
import threading
import traceback
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.aio.driver import Driver
from pysmc.aio.negotiation import Negotiation
from pysmc.aio.orders import Orders
from pysmc.aio.pump import Pump
from pysmc.aio.transport_end import EndingTransport
from pysmc.core.endpoint import Endpoint
from pysmc.core.keeper import Keeper
from pysmc.core.rmb import RmbState
from pysmc.fabric.base import CompletionKind

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ENVIRONMENT", "Broken", "Watch", "install_if_asked"]

ENVIRONMENT = "PYSMC_WATCH_INVARIANTS"
"""Set to anything, it lets `install_if_asked` install a watch in a child process."""
EVENTS_KEPT = 60
BROKEN_MAX = 20
"""Findings that are kept; a rule that is broken is mostly broken again."""
FRAMES_SHOWN = 8
SMALL = 40
"""Deadlines and connections up to which a core is checked at every settling. A larger
one is checked so much more rarely that the cost of each settling stays the same."""


class Broken(NamedTuple):
    """A rule that did not hold."""

    rule: str
    """Its name in the list above, in a word or two."""
    text: str
    """What was found."""
    events: tuple[str, ...]
    """What had happened before, the last one last."""
    stack: str
    """Who was at it."""

    def __str__(self) -> str:
        events = "".join(f"\n  {event}" for event in self.events)
        return f"{self.rule}: {self.text}\nevents before:{events}\nat:\n{self.stack}"


class Watch:
    """Watches every driver, connection and transport of this process.

    Args:
        report: Is told of every finding at once, as text; None for nobody.
    """

    def __init__(self, report: Callable[[str], None] | None = None) -> None:
        self.events: deque[str] = deque(maxlen=EVENTS_KEPT)
        """What happened, in short sentences."""
        self.broken: list[Broken] = []
        self._report = report
        self._originals: list[tuple[type, str, Any]] = []
        self._drivers: weakref.WeakKeyDictionary[Pump, int] = (
            weakref.WeakKeyDictionary()
        )
        self._made = 0
        self._owners: weakref.WeakKeyDictionary[Pump, int] = weakref.WeakKeyDictionary()
        self._unchecked: weakref.WeakKeyDictionary[Pump, int] = (
            weakref.WeakKeyDictionary()
        )
        self._bytes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._down: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closed: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lost: weakref.WeakSet[EndingTransport] = weakref.WeakSet()

    # For whoever watches

    def install(self) -> None:
        """Watch from now on whatever is made."""
        if self._originals:
            return
        self._around(Pump, "__init__", after=self._driver_made)
        self._around(Pump, "settle", before=self._settles, after=self._settled)
        self._around(Pump, "pump", before=self._pumps)
        self._around(Pump, "_take_control", before=self._control)
        self._around(Driver, "close", after=self._driver_closed)
        self._around(Orders, "_create_pair", after=self._pair_created)
        self._around(Orders, "_close_pair", before=self._pair_closes)
        self._around(Orders, "_close_group", before=self._group_closes)
        self._around(Orders, "_register", after=self._registered)
        self._around(Orders, "_clear", before=self._clears)
        self._around(Orders, "_deregister", before=self._deregisters)
        self._around(Keeper, "remove_connection", before=self._connection_goes)
        self._around(Endpoint, "receive_update", after=self._update_found)
        for verdict in ("established", "fell_back", "failed"):
            before = functools.partial(self._verdict, verdict)
            self._around(Negotiation, verdict, before=before)
        self._around(EndingTransport, "leave", after=self._left)
        self._around(
            EndingTransport,
            "_call_connection_lost",
            before=self._is_lost,
            after=self._was_lost,
        )

    def remove(self) -> None:
        """Watch no more. Idempotent."""
        while self._originals:
            cls, name, original = self._originals.pop()
            setattr(cls, name, original)

    def take(self) -> list[Broken]:
        """Give what was found, and forget it."""
        found, self.broken = self.broken, []
        return found

    def check(self) -> None:
        """Forget what was found, and fail if that was something.

        Raises:
            AssertionError: A rule was broken; says which, where and after what.
        """
        found = self.take()
        if found:
            raise AssertionError("\n\n".join(map(str, found)))

    # How it watches

    def _around(
        self,
        cls: type,
        name: str,
        *,
        before: Callable[..., None] | None = None,
        after: Callable[..., None] | None = None,
    ) -> None:
        original = cls.__dict__[name]

        if after is None:
            assert before is not None, "nothing to watch for"
            watch_before: Callable[..., None] = before

            @functools.wraps(original)
            def watched(*args: Any, **options: Any) -> Any:
                watch_before(*args, **options)
                return original(*args, **options)

        else:
            watch_after: Callable[..., None] = after

            @functools.wraps(original)
            def watched(*args: Any, **options: Any) -> Any:
                if before is not None:
                    before(*args, **options)
                result = original(*args, **options)
                watch_after(result, *args, **options)
                return result

        self._originals.append((cls, name, original))
        setattr(cls, name, watched)

    def _note(self, text: str) -> None:
        self.events.append(text)

    def _break(self, rule: str, text: str) -> None:
        if len(self.broken) >= BROKEN_MAX:
            return
        frames = traceback.extract_stack(sys._getframe(2))
        shown = [one for one in frames if one.filename != __file__][-FRAMES_SHOWN:]
        stack = "".join(traceback.format_list(shown))
        found = Broken(rule, text, tuple(self.events), stack)
        self.broken.append(found)
        if self._report is not None:
            self._report(str(found))

    def _name(self, driver: Pump) -> str:
        return f"driver {self._drivers.get(driver, 0)}"

    def _check_owner(self, driver: Pump, what: str) -> None:
        if not driver.loop.is_running():
            self._owners.pop(driver, None)  # it may go on in another thread
            return
        here = threading.get_ident()
        # Loops of others do not tell their thread; then the first one counts.
        owner = getattr(driver.loop, "_thread_id", None)
        owner = owner or self._owners.setdefault(driver, here)
        if owner != here:
            self._break("one owner", f"{self._name(driver)}: {what} in another thread")

    # Drivers

    def _driver_made(self, _: None, driver: Pump, *args: Any, **options: Any) -> None:
        del args, options
        self._made += 1
        self._drivers[driver] = self._made
        self._note(f"driver {self._made} is made")

    def _settles(self, driver: Pump) -> None:
        self._check_owner(driver, "settle()")

    def _pumps(self, driver: Pump, _: Any) -> None:
        self._check_owner(driver, "pump()")

    def _settled(self, _: None, driver: Pump) -> None:
        endpoint = driver._endpoint
        if endpoint is None or driver._settling or driver.is_forked:
            return
        size = len(endpoint._context.timers)
        if size <= SMALL or self._is_turn(driver, size):
            self._check_core(driver, endpoint)

    def _is_turn(self, driver: Pump, size: int) -> bool:
        """Tell whether a large core is checked this time."""
        waited = self._unchecked.get(driver, 0) + SMALL
        is_turn = waited >= size
        self._unchecked[driver] = 0 if is_turn else waited
        return is_turn

    def _check_core(self, driver: Pump, endpoint: Endpoint) -> None:
        try:
            endpoint.check()
        except AssertionError as error:
            self._break("consistent core", f"{self._name(driver)}: {error}")
        if driver._ordered or driver._news:
            return  # an interrupt left orders for later
        for group in endpoint.groups:
            held = self._bytes.get(group)
            if held is not None and held != group.rmb_bytes:
                text = f"{group}: {held} bytes are registered, {group.rmb_bytes} known"
                self._break("counted bytes", text)

    def _driver_closed(self, _: None, driver: Driver) -> None:
        if driver.is_forked:
            return
        self._note(f"{self._name(driver)} is closed")
        left = []
        endpoint = driver._endpoint
        if endpoint is not None:
            left += [f"{group}" for group in endpoint.groups]
            left += [f"{each}" for each in endpoint._context.handshakes]
            left += [f"a deadline {each}" for each in endpoint._context.timers]
        for device in driver.devices:
            left += [f"{domain}" for domain in getattr(device, "domains", ())]
        if driver._timer is not None:
            left.append("its timer")
        left += _timers_of(driver)
        if left:
            text = f"{self._name(driver)} was closed, but not {', '.join(left)}"
            self._break("nothing outlives a driver", text)

    def _control(self, driver: Pump, _: Any, completion: Any, now: float) -> None:
        del now
        kind, pair = completion.kind, completion.queue_pair
        self._note(f"{self._name(driver)}: {kind.value} of queue pair {pair.number}")
        if kind is CompletionKind.DOWN:
            if pair in self._down:
                self._break("one end", f"queue pair {pair.number} went down twice")
            self._down.add(pair)

    # Orders

    def _pair_created(self, _: None, orders: Orders, action: Any) -> None:
        pair = action.link.handle
        if pair is not None:
            self._note(f"{self._name(orders._pump)}: queue pair {pair.number} made")

    def _pair_closes(self, orders: Orders, action: Any) -> None:
        link = action.link
        pair, group, endpoint = link.handle, link.group, orders._pump.endpoint
        if pair is None:
            return
        self._note(f"{self._name(orders._pump)}: queue pair {pair.number} closes")
        self._closed.add(pair)
        rule = "unpublished first"
        if group in endpoint.groups:
            self._break(rule, f"{group} is listed while its queue pair closes")
        if group.connections:
            text = f"{len(group.connections)} connections are found on {link}, closing"
            self._break(rule, text)
        for kind, subject in endpoint._context.timers:
            if subject is link or subject is group:
                self._break(rule, f"a deadline for {kind} waits for {link}, closing")

    def _group_closes(self, orders: Orders, action: Any) -> None:
        group = action.group
        self._note(f"{self._name(orders._pump)}: memory of group {group.number} goes")
        self._bytes.pop(group, None)
        for link in group.links:
            if link.handle is not None and link.handle not in self._closed:
                text = f"queue pair {link.handle.number} is open while its memory goes"
                self._break("queue pairs before memory", text)

    def _registered(self, _: None, __: Orders, action: Any) -> None:
        rmb = action.rmb
        if rmb.handle is not None:
            self._bytes[rmb.group] = self._bytes.get(rmb.group, 0) + rmb.length

    def _clears(self, _: Orders, action: Any) -> None:
        rmb = action.rmb
        for connection in rmb.group.connections.values():
            # One that nobody was told of may have it already: this comes before the CLC
            # message that lets its peer write.
            used = connection.readable or connection.handle is not None
            if connection.rmb is rmb and used:
                self._break("memory in use", f"{rmb} of {connection} is cleared")

    def _deregisters(self, _: Orders, action: Any) -> None:
        rmb = action.rmb
        if rmb.handle is None:
            return
        for connection in rmb.group.connections.values():
            if connection.rmb is rmb:
                self._break("memory in use", f"{rmb} of {connection} is deregistered")
        if rmb.handle in self._closed:
            self._break("one end", f"{rmb} is deregistered twice")
            return
        self._closed.add(rmb.handle)
        if rmb.state is not RmbState.GONE or rmb in list(rmb.group.pool):
            self._break("unpublished first", f"{rmb} is deregistered, and in use")
        self._bytes[rmb.group] = self._bytes.get(rmb.group, 0) - rmb.length

    # Connections

    def _connection_goes(
        self, keeper: Keeper, connection: Any, now: float, *, clean: bool
    ) -> None:
        del now
        if not keeper.has_connection(connection):
            return
        self._note(f"{connection} goes, its memory {'free' if clean else 'withdrawn'}")
        # A handshake that fails may know that its peer has not begun to write.
        begun = connection.is_established or connection.readable
        if clean and begun and not connection.is_ended:
            text = f"{connection} gives its memory back before both ends have ended it"
            self._break("memory in use", text)

    def _update_found(self, found: Any, _: Endpoint, link: Any, *__: Any) -> None:
        if found is None:
            return
        connection = found[0]
        if connection.group.is_ended or connection.group is not link.group:
            text = f"an update on {link} finds {connection} of {connection.group}"
            self._break("unpublished first", text)

    def _verdict(self, name: str, negotiation: Negotiation, what: Any) -> None:
        self._note(f"handshake of the {negotiation.role}: {name} {what}")
        if negotiation._result is not None or negotiation.connection is not None:
            text = f"a handshake of the {negotiation.role} has two verdicts: {what}"
            self._break("one end", text)

    # Transports

    def _is_lost(self, transport: EndingTransport, error: Any) -> None:
        self._note(f"connection_lost({error!r}) of {transport!r}")
        self._check_owner(transport._driver, "connection_lost()")
        if transport in self._lost:
            self._break("one end", f"{transport!r}: connection_lost comes twice")
        self._lost.add(transport)
        if not transport._released or transport._view is not None:
            text = f"{transport!r}: connection_lost before our side was given back"
            self._break("order of an end", text)
        if transport._queue.size or transport._reading:
            self._break("order of an end", f"{transport!r}: lost, and still at work")

    def _was_lost(self, _: None, transport: EndingTransport, error: Any) -> None:
        del error
        left = _waits_of(transport)
        if transport._sock is not None:
            left.append("its TCP socket")
        if transport in transport._driver.transports:
            left.append("its place in the driver")
        if left:
            text = f"{transport!r} is lost, but not {', '.join(left)}"
            self._break("nothing behind the end", text)

    def _left(self, _: None, transport: EndingTransport) -> None:
        if left := _waits_of(transport):
            text = (
                f"{transport!r} was left at its loop's end, but not {', '.join(left)}"
            )
            self._break("nothing behind the end", text)


def _waits_of(transport: EndingTransport) -> list[str]:
    """Name what would still wake a transport."""
    left, tcp = [], transport._tcp
    if transport._close_timer is not None:
        left.append("the timer of its close")
    if tcp is not None and tcp._watching:
        left.append("its place in the selector")
    if tcp is not None and tcp._timer is not None:
        left.append("the timer of its TCP")
    return left


def _timers_of(driver: Driver) -> list[str]:
    """Name the timers of a loop that would call a driver, or what belongs to it."""
    found = []
    for handle in getattr(driver.loop, "_scheduled", ()):
        owner = getattr(handle._callback, "__self__", None)
        is_ours = owner is driver or getattr(owner, "_driver", None) is driver
        if is_ours and not handle.cancelled():
            found.append(f"a timer for {handle._callback.__qualname__}")
    return found


def install_if_asked() -> Watch | None:
    """Install a watch that reports on standard error, if `ENVIRONMENT` says so.

    For programs that tests start: what it reports begins like a traceback, which
    whoever reads a program's errors will not take for nothing.
    """
    if not os.environ.get(ENVIRONMENT):
        return None

    def report(text: str) -> None:
        sys.stderr.write(f"Traceback (most recent call last): an invariant\n{text}\n")
        sys.stderr.flush()

    watch = Watch(report)
    watch.install()
    return watch
