"""Beacons: how a listener of pysmc is known on its host, and how one is looked up.

Decides which abstract Unix names stand for a listener, who of several workers holds
them, and whether an address that is dialled has one. Knows nothing of marks and of what
a beacon leads to; it proves nothing about the process that will accept.

A beacon is a bound SOCK_DGRAM socket: a client connects a probe to the name, which is
one system call, costs the listener nothing and leaves nothing behind. Names live in the
network namespace, just like the ports. Each listener has

* ``pysmc/b/1/<port>``, asked first, so that a plain server costs one system call;
* ``pysmc/b/1/<family>-<address>-<port>``, the address in hexadecimal, and for a
  wildcard IPv6 listener that takes IPv4 too, the same with family ``46``.

Beside each beacon its holder keeps a SOCK_STREAM listener, the keeper, ``pysmc/k/1/…``.
A worker that finds the beacon taken connects to the keeper; the end of that connection
tells it to take over. Who of several survivors does is settled by EADDRINUSE.

Source: unix(7); kernel counterpart: af_unix.c.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import TYPE_CHECKING

from pysmc.discovery.address import dialled, is_local
from pysmc.discovery.rendezvous import close_stranger, refuse_descriptors
from pysmc.disposal import has_room

if TYPE_CHECKING:
    import asyncio

    from pysmc.discovery.address import Endpoint
    from pysmc.discovery.rendezvous import Users

__all__ = ["Beacon", "BeaconRegistry", "Lookup", "listener_names"]

log = logging.getLogger(__name__)

BEACON_PREFIX = b"\0pysmc/b/1/"
KEEPER_PREFIX = b"\0pysmc/k/1/"
KEEPER_BACKLOG = 4096
RETRY_FIRST = 0.001
"""Seconds before the first new attempt while another holder comes or goes."""
RETRIES_MAX = 12
"""Attempts, each after twice the time: four seconds in total."""
STEADY = 0.25
"""Seconds after which a holder's end is news and no sign of a bad keeper."""
ADMIT_PAUSE = 1.0
"""Seconds without accepting watchers after the descriptors ran out."""

ANY_IPV4 = bytes(4)
ANY_IPV6 = bytes(16)


def _exact_name(family: bytes, packed: bytes, port: int) -> bytes:
    return b"%b-%b-%d" % (family, packed.hex().encode("ascii"), port)


def _name_of(target: Endpoint) -> bytes:
    family = b"4" if len(target.packed) == 4 else b"6"
    return _exact_name(family, target.packed, target.port)


def listener_names(bound: Endpoint, *, dual_stack: bool) -> tuple[bytes, ...]:
    """Return the names, without their prefix, that announce a listener.

    Args:
        bound: The address it is bound to.
        dual_stack: Whether it is an IPv6 listener that takes IPv4 connections too.
    """
    names = [b"%d" % bound.port, _name_of(bound)]
    if dual_stack and bound.packed == ANY_IPV6:
        names.append(_exact_name(b"46", bound.packed, bound.port))
    return tuple(names)


class Lookup:
    """Asks for beacons, one system call for each name.

    One unbound socket serves all lookups of a loop: connecting it again replaces the
    association, and a refused connect changes nothing.
    """

    def __init__(self) -> None:
        """Open the probe.

        Raises:
            OSError: There is no descriptor left, or Unix sockets are forbidden.
        """
        self._probe = _unix_socket(socket.SOCK_DGRAM)
        self._connect = self._probe.connect_ex

    def has_port(self, port: int) -> bool:
        """Tell whether any listener of this port is announced."""
        return self._connect(BEACON_PREFIX + b"%d" % port) == 0

    def has_address(self, target: Endpoint) -> bool:
        """Tell whether a listener is announced that takes this very address.

        Ask `has_port` first. A wildcard listener takes only addresses of this host.
        """
        target = dialled(target)
        if self._exists(_name_of(target)):
            return True
        names = [_name_of(target._replace(packed=bytes(len(target.packed))))]
        if len(target.packed) == 4:
            names.append(_exact_name(b"46", ANY_IPV6, target.port))
        return any(self._exists(name) for name in names) and is_local(target)

    def _exists(self, name: bytes) -> bool:
        return self._connect(BEACON_PREFIX + name) == 0

    def close(self) -> None:
        """Close the probe; idempotent."""
        self._probe.close()


class Beacon:
    """One name, held by us or watched while another process holds it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, name: bytes, users: Users
    ) -> None:
        """Take the name, or begin to watch its holder.

        Raises:
            OSError: There is no descriptor left, or Unix sockets are forbidden.
        """
        self.name = name
        self.sharers = 0
        """Listeners of this loop that share the name."""
        self._loop = loop
        self._users = users
        self._beacon: socket.socket | None = None
        self._keeper: socket.socket | None = None
        self._watch: socket.socket | None = None
        self._watching_since = 0.0
        self._watchers: set[socket.socket] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._retries = 0
        try:
            self._acquire()
        except OSError:
            self.close()
            raise

    @property
    def is_holder(self) -> bool:
        """Whether this loop holds the name; otherwise it watches the holder."""
        return self._beacon is not None

    @property
    def is_guarded(self) -> bool:
        """Whether the holder's end will be noticed: by us, or by others if it is us."""
        return self._keeper is not None or self._watch is not None

    def _acquire(self) -> None:
        """Take the name, or else follow whoever has it."""
        if self._beacon is None:
            beacon = _unix_socket(socket.SOCK_DGRAM)
            try:
                beacon.bind(BEACON_PREFIX + self.name)
                # Nobody has anything to say to a beacon: datagrams are refused.
                beacon.shutdown(socket.SHUT_RD)
            except OSError as error:
                beacon.close()
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                self._beacon = beacon
        if self._beacon is None:
            self._follow()
        else:
            self._open_keeper()

    def _open_keeper(self) -> None:
        keeper = _unix_socket(socket.SOCK_STREAM)
        try:
            keeper.bind(KEEPER_PREFIX + self.name)
            keeper.listen(KEEPER_BACKLOG)
        except OSError as error:
            keeper.close()
            if error.errno != errno.EADDRINUSE:
                raise
            # The last holder's keeper may outlive its beacon by a moment.
            self._retry(error)
            return
        self._keeper = keeper
        self._retries = 0
        self._loop.add_reader(keeper.fileno(), self._admit)

    def _follow(self) -> None:
        watch = _unix_socket(socket.SOCK_STREAM)
        try:
            watch.connect(KEEPER_PREFIX + self.name)
        except OSError as error:
            watch.close()
            if error.errno not in {errno.ECONNREFUSED, errno.EAGAIN}:
                raise
            # The holder has not opened its keeper yet, or is just going.
            self._retry(error)
            return
        self._watch = watch
        self._watching_since = self._loop.time()
        self._loop.add_reader(watch.fileno(), self._on_holder_gone)

    def _retry(self, error: OSError) -> None:
        if self._retries == RETRIES_MAX:
            log.warning(
                "beacon %s: giving up to hold or to watch it (%s); "
                "when its holder ends, nobody takes over",
                self.name.decode("ascii"),
                error,
            )
            return
        delay = RETRY_FIRST * 2**self._retries
        self._retries += 1
        self._timer = self._loop.call_later(delay, self._try_again)

    def _try_again(self) -> None:
        self._timer = None
        try:
            self._acquire()
        except OSError as error:
            # No descriptor is left for now.
            self._retry(error)

    def _on_holder_gone(self) -> None:
        """The holder never sends: readable means that it has gone."""
        assert self._watch is not None
        self._loop.remove_reader(self._watch.fileno())
        self._watch.close()
        self._watch = None
        if self._loop.time() - self._watching_since >= STEADY:
            self._retries = 0
            self._try_again()
        else:
            # Not at once: a keeper that ends each connection must not keep us busy.
            self._retry(ConnectionResetError(errno.ECONNRESET, "the keeper hung up"))

    def _admit(self) -> None:
        assert self._keeper is not None
        if not has_room():
            self._pause_admitting()  # of the next one we might not get rid at once
            return
        try:
            watcher, _ = self._keeper.accept()
        except BlockingIOError:
            return
        except OSError:
            self._pause_admitting()  # no descriptor is left
            return
        if self._users.foreign(watcher) is not None:
            # Strangers could fill our descriptor table.
            close_stranger(watcher)
            return
        watcher.settimeout(0)
        self._watchers.add(watcher)
        self._loop.add_reader(watcher.fileno(), self._dismiss, watcher)

    def _pause_admitting(self) -> None:
        # The connection keeps waiting, and so do we: a readable listener would wake the
        # loop without end.
        assert self._keeper is not None
        self._loop.remove_reader(self._keeper.fileno())
        self._timer = self._loop.call_later(ADMIT_PAUSE, self._resume_admitting)

    def _resume_admitting(self) -> None:
        self._timer = None
        if self._keeper is not None:
            self._loop.add_reader(self._keeper.fileno(), self._admit)

    def _dismiss(self, watcher: socket.socket) -> None:
        """A watcher never sends: readable means that it has gone."""
        self._loop.remove_reader(watcher.fileno())
        watcher.close()
        self._watchers.discard(watcher)

    def close(self) -> None:
        """Give the name up; a watcher takes over. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._beacon is not None:
            # First, so that the name is free when the watchers wake.
            self._beacon.close()
            self._beacon = None
        for sock in (self._keeper, self._watch, *self._watchers):
            if sock is not None:
                self._loop.remove_reader(sock.fileno())
                sock.close()
        self._keeper = self._watch = None
        self._watchers.clear()

    def abandon(self) -> None:
        """In a forked child: close the copies, and leave the parent's loop alone."""
        for sock in (self._beacon, self._keeper, self._watch, *self._watchers):
            if sock is not None:
                sock.close()
        self._beacon = self._keeper = self._watch = None
        self._watchers.clear()


class BeaconRegistry:
    """The beacons of one loop; listeners of one port share its name."""

    def __init__(self, loop: asyncio.AbstractEventLoop, users: Users) -> None:
        """Begin with none; `users` are those whose workers may watch ours."""
        self._loop = loop
        self._users = users
        self._beacons: dict[bytes, Beacon] = {}

    def hold(self, name: bytes) -> Beacon:
        """Take or share a name; give it back with `release`.

        Raises:
            OSError: There is no descriptor left, or Unix sockets are forbidden.
        """
        beacon = self._beacons.get(name)
        if beacon is None:
            beacon = self._beacons[name] = Beacon(self._loop, name, self._users)
        beacon.sharers += 1
        return beacon

    def release(self, beacon: Beacon) -> None:
        """Give one use of a name back; the last one closes the beacon."""
        beacon.sharers -= 1
        if beacon.sharers == 0:
            self._beacons.pop(beacon.name, None)
            beacon.close()

    def close(self) -> None:
        """Give all names up; idempotent."""
        while self._beacons:
            self._beacons.popitem()[1].close()

    def abandon(self) -> None:
        """In a forked child: close the copies of all sockets, and nothing more."""
        for beacon in self._beacons.values():
            beacon.abandon()


def _unix_socket(kind: socket.SocketKind) -> socket.socket:
    # Python sets close-on-exec on every socket.
    made = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    refuse_descriptors(made)
    return made
