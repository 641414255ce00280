"""Discovery: how one end of a TCP connection learns that the other speaks SMC.

Decides, before the first byte of a connection, whether both ends may speak SMC on it.
Nothing is sent over TCP unless that is known. Knows nothing of transports or of what
happens when the answer is no; of CLC it knows the Decline alone, by which a promise
that the option made is taken back.

* `option` is the protocol's own way: a TCP option on SYN and SYN-ACK, set by a program
  in the kernel for sockets that opt in (`option_mark`, `option_server`).
* `local` joins processes of one host: a beacon says that a listener is pysmc's
  (`beacon`), a DSCP on the SYN says that the client is (`mark`), and a rendezvous over
  a Unix socket lets the two agree (`local`).
* `static` is a list of peers in the configuration (`static`).

Which one decides when several could is told in `order`.

Works on any running loop with public calls only. Source: RFC 7609 section 3.1.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pysmc.discovery.address import bound_device, endpoint
from pysmc.discovery.announcement import Announcement
from pysmc.discovery.beacon import BeaconRegistry, Lookup, listener_names
from pysmc.discovery.findings import (
    BOUND_TO_DEVICE,
    NO_SYN_KEPT,
    NOT_INSTALLED,
    NOT_LISTED,
    NOT_MARKED,
    NOT_TCP,
    OTHER_CGROUP,
    OWN_TOS,
    PEER_NO_SMC,
    TOO_LATE,
    setup_missing,
)
from pysmc.discovery.local import Mark
from pysmc.discovery.mark import is_marked, keeps_syn, read_mark, save_syn, set_mark
from pysmc.discovery.offer import Offer
from pysmc.discovery.option import sockets
from pysmc.discovery.option.sockets import OptionState
from pysmc.discovery.option_mark import OptionMark
from pysmc.discovery.option_server import OptionServer
from pysmc.discovery.order import ORDER, Way
from pysmc.discovery.presence import Presence
from pysmc.discovery.rendezvous import SMC, Refusal, Users, Verdict
from pysmc.discovery.static import StaticPeers
from pysmc.errors import ForkedError
from pysmc.reasons import Reason, reason

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from pysmc.config import Config
    from pysmc.discovery.mark import MarkedSocket

__all__ = ["Announcement", "Discovery", "Mark", "OptionMark", "Verdict", "Way"]

log = logging.getLogger(__name__)

INET_FAMILIES = frozenset({socket.AF_INET, socket.AF_INET6})
TCP_PROTOCOLS = frozenset({0, socket.IPPROTO_TCP})


class Discovery:
    """Everything that one loop knows and holds for discovery.

    All methods but `close` raise `ForkedError` in a child of the process that made it.
    After `close` all but `settle_tcp` raise `RuntimeError`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        presence: Presence | None = None,
    ) -> None:
        """Prepare the ways of discovery that the configuration enables.

        Args:
            loop: The loop that will run; only its public methods are used.
            config: `discovery`, `fabrics`, `peers`, `allowed_uids`, `discovery_wait`.
            presence: Who else asks whether the option is installed; else nobody.

        Raises:
            ValueError: ``config.peers`` contains something that is not an address.
        """
        self._loop = loop
        self._wait = config.discovery_wait
        self._users = Users(config.allowed_uids)
        self._off: Reason | None = None
        self._peers: StaticPeers | None = None
        self._lookup: Lookup | None = None
        self._is_short = False
        wants_option = "tcp_option" in config.discovery and bool(config.fabrics)
        self._presence = presence or Presence(loop.time, is_wanted=wants_option)
        self._option = OptionServer(self._presence)
        self._closed = False
        self._forked = False
        self._has_announced = False
        self._registry = BeaconRegistry(loop, self._users)
        self._by_listener: weakref.WeakKeyDictionary[socket.socket, Announcement] = (
            weakref.WeakKeyDictionary()
        )
        self._by_socket: weakref.WeakKeyDictionary[socket.socket, Mark | OptionMark] = (
            weakref.WeakKeyDictionary()
        )
        self._open_marks: set[Mark | OptionMark] = set()
        self._offers: set[Offer] = set()
        self._inspections: dict[Way, Callable[[socket.socket, bool], Any]] = {
            Way.OPTION: self._inspect_option,
            Way.STATIC: self._inspect_static,
            Way.LOCAL: self._inspect_local,
        }
        self._enable(config)
        _alive.add(self)

    def _enable(self, config: Config) -> None:
        if "static" in config.discovery:
            # Even without a fabric: a peer that lists us sends CLC in any case.
            self._peers = StaticPeers(config.peers)
        if not config.fabrics or not config.discovery:
            self._off = reason("DISABLED", "local")
            return
        if "local" in config.discovery:
            self._open_lookup()
        elif self._peers is None:
            self._off = NOT_INSTALLED

    def _open_lookup(self) -> None:
        """Open the probe; where only a descriptor was missing, the next use tries."""
        self._is_short = False
        try:
            self._lookup = Lookup()
        except OSError as error:
            self._is_short = error.errno in {errno.EMFILE, errno.ENFILE}
            detail = f"Discovery 'local' has no Unix socket: {error.strerror}."
            make = (
                partial(reason, "LIMIT", "local") if self._is_short else setup_missing
            )
            self._off = None if self._peers else make(detail)
        else:
            self._off = None

    def _check_usable_again(self) -> None:
        self._check_usable()
        if self._is_short:
            self._open_lookup()

    # --- listeners ---------------------------------------------------------------

    @property
    def serves_option(self) -> bool:
        """Whether clients may have shown the option: a listener has opted in."""
        return self._option.serves

    def opt_in(self, listener: socket.socket, *, is_able: bool = True) -> None:
        """Let a listener show the option; to be called once bound, before listen().

        Args:
            listener: Any socket; nothing happens to those that are not TCP.
            is_able: Whether a connection of its could be SMC-R.
        """
        self._check_usable()
        if is_tcp(listener):
            self._option.open(listener, is_able=is_able)

    def announce(self, listener: socket.socket) -> Announcement | None:
        """Make a listener of this loop known to clients of this host.

        To be called once it is bound; again with the same socket it gives the same
        announcement. Whatever goes wrong is logged and costs only SMC, never the
        listener.

        Returns:
            None when it is not a TCP listener or the discovery "local" is off.
        """
        self._check_usable_again()
        if self._lookup is None or not is_tcp(listener):
            return None
        known = self._by_listener.get(listener)
        if known is not None and not known.is_closed:
            return known
        try:
            bound = endpoint(listener.getsockname())
            if bound is None or bound.port == 0:
                return None
            if bound_device(listener) and not bound.is_link_local:
                log.info("listener %s is not announced: %s", bound, BOUND_TO_DEVICE)
                return None
            # Before the beacon: a client that sees the beacon relies on it.
            save_syn(listener)
            names = listener_names(bound, dual_stack=_is_dual_stack(listener))
            announcement = Announcement(self._registry, names)
        except OSError as error:
            log.warning("listener %r is not announced: %s", listener, error)
            return None
        self._has_announced = True
        self._by_listener[listener] = announcement
        return announcement

    # --- server side -------------------------------------------------------------

    def inspect(self, conn: socket.socket, *, is_given: bool = False) -> Way | Reason:
        """Look at an accepted connection: one system call if its client is plain.

        Two where a listener of the loop shows the option. Reads the saved SYN, which
        can be done only once.

        Args:
            conn: The accepted socket.
            is_given: Whether the program brought it. Somebody else's listener, which
                opted in, may have accepted it: it is always asked.

        Returns:
            By which way its client may have shown that it speaks SMC, for `confirm`.
            Otherwise why it is TCP.
        """
        self._check_usable_again()
        why = self._off or NOT_LISTED
        for way in ORDER:
            found = self._inspections[way](conn, is_given)
            if found is None:
                return way
            why = found or why
        return why

    def _inspect_option(
        self,
        conn: socket.socket,
        is_given: bool,  # noqa: FBT001
    ) -> Reason | Literal[False] | None:
        is_silent = not self._presence.is_wanted and not self._option.serves
        if is_silent and not is_given:
            return False
        found = self._option.inspect(conn, is_given=is_given)
        return False if is_silent and found is not None else found

    def _inspect_static(
        self,
        conn: socket.socket,
        _is_given: bool,  # noqa: FBT001
    ) -> Literal[False] | None:
        return None if self.lists(conn) else False

    def _inspect_local(
        self,
        conn: socket.socket,
        _is_given: bool,  # noqa: FBT001
    ) -> Reason | Literal[False] | None:
        """Look for the mark; False when there is nothing to say."""
        syn = self._option.take_syn()
        if self._lookup is None:
            return False
        if not self._has_announced:
            return False if self._option.serves else NOT_MARKED
        try:
            marked = read_mark(conn) if syn is None else is_marked(syn)
        except OSError:
            return NOT_MARKED
        if marked is None:
            return NO_SYN_KEPT if keeps_syn(conn) else NOT_MARKED
        return None if marked else PEER_NO_SMC

    async def confirm(
        self, conn: socket.socket, *, instead: Reason | None = None
    ) -> Verdict:
        """Agree with the client of a connection for which `inspect` gave a way.

        Where that is not ``Way.LOCAL`` there is nothing to agree on any more.

        Takes at most half of ``Config.discovery_wait`` to find the client, and four
        times that wait for the answer of one that was found, because a client that
        answers late is busy and not gone. After a cancellation the client may believe
        that it is on SMC-R: close the connection.

        Args:
            conn: The accepted socket.
            instead: The limit that forbids another handshake. The client is told then,
                so that it need not wait; the verdict is TCP in any case.
        """
        self._check_usable()
        if self.lists(conn):
            return SMC
        offer = Offer(self._loop, conn, self._users, wait=self._wait, instead=instead)
        self._offers.add(offer)
        try:
            return await offer.verdict()
        finally:
            self._offers.discard(offer)

    # --- client side -------------------------------------------------------------

    def prepare(
        self,
        sock: socket.socket,
        address: Any,
        why_not: Callable[[], Reason | None] = lambda: None,
    ) -> Mark | OptionMark | Reason:
        """Find out about a peer, before connecting: one system call if it is plain.

        One more where the option is installed, and one more again in `connected`.

        Args:
            sock: The socket that will connect.
            address: What it will connect to, with a numeric host.
            why_not: Asked before anything is done for `local`, which needs somebody
                there: why no connection can be SMC-R now, if so.

        Returns:
            A mark, to be handed to `connected`, or to `settle_tcp` when the connect
            fails. Otherwise why the connection is TCP; then nothing was changed.
        """
        self._check_usable_again()
        earlier = self._by_socket.get(sock)
        if earlier is not None:
            # A socket may connect again after a failure; then its mark is still on.
            earlier.settle_tcp()
        other = self._prepare_other(sock, address, why_not)
        if other is NOT_TCP or not is_tcp(sock) or not self._presence.is_here():
            return other
        if (why := self._opt_in(sock)) is not None:
            is_silent = isinstance(other, Reason) and other.name == "PEER_NO_SMC"
            return why if is_silent or other is self._off else other
        mark = OptionMark(self._loop, sock, other, self._open_marks.discard)
        self._by_socket[sock] = mark
        return mark

    def _opt_in(self, sock: socket.socket) -> Reason | None:
        """Let a client's socket opt in; else say why it cannot."""
        try:
            if sockets.opt_in(sock):
                return None
        except OSError:
            # A connect that goes on after its waiter was cancelled has opted in before.
            state = sockets.read_state(sock)
            is_in = state is not None and OptionState.WANT in state
            return None if is_in else TOO_LATE
        return OTHER_CGROUP if self._presence.doubt() else NOT_INSTALLED

    def _prepare_other(
        self, sock: socket.socket, address: Any, why_not: Callable[[], Reason | None]
    ) -> Mark | Reason:
        """Do what the ways without the option need."""
        if self._peers is not None:
            target = endpoint(address)
            if target is not None and (target, target.port) in self._peers:
                return self._new_mark(sock, None, verdict=SMC)
        if self._off is not None:
            return self._off
        if self._lookup is None:
            return NOT_LISTED
        if not isinstance(address, tuple) or not isinstance(address[1], int):
            return NOT_TCP
        if not self._lookup.has_port(address[1]):
            return self._presence.plain
        return self._prepare_local(sock, address, self._lookup, why_not)

    def _prepare_local(
        self,
        sock: socket.socket,
        address: Any,
        lookup: Lookup,
        why_not: Callable[[], Reason | None],
    ) -> Mark | Reason:
        target = endpoint(address)
        if target is None or not is_tcp(sock):
            return NOT_TCP
        if not lookup.has_address(target):
            return self._presence.plain
        if (why := why_not()) is not None:
            return why
        if bound_device(sock) and not target.is_link_local:
            return BOUND_TO_DEVICE
        try:
            marked = set_mark(sock, ipv4=len(target.packed) == 4)
        except OSError as error:
            return setup_missing(f"The socket cannot be marked: {error.strerror}.")
        if marked is None:
            return OWN_TOS
        mark = self._new_mark(sock, marked)
        self._by_socket[sock] = mark
        return mark

    def connected(self, mark: Mark | OptionMark) -> None:
        """Read the option's result, or open the rendezvous, right after the connect."""
        self._check_usable()
        mark.connected()
        going_on = mark.goes_on
        if going_on is not None:
            self._open_marks.add(going_on)

    async def wait_confirmed(self, mark: Mark | OptionMark) -> Verdict:
        """Wait until both ends agree, at most ``Config.discovery_wait``.

        Ends at once, with TCP, when the TCP socket can be read. After a cancellation
        both ends are TCP, or the server believes in SMC-R: close the connection.

        Raises:
            LocalProtocolError: The mark is not connected, or another task waits.
        """
        self._check_usable()
        return await mark.wait()

    def settle_tcp(
        self,
        mark: Mark | OptionMark,
        why: Refusal = Refusal.RAW,
        because: Reason | None = None,
    ) -> None:
        """Decide for TCP, because the program uses the socket itself; idempotent.

        The server is told as soon as it asks, or at once where it awaits CLC. Also
        takes the mark off a socket whose connect failed, and does so after `close` too.

        Args:
            mark: The client's.
            why: Another reason that the server is told.
            because: The same in full, for its code.
        """
        self._check_owner()
        if isinstance(mark, OptionMark):
            mark.settle_late(because)
        mark.settle_tcp(why, because)

    # --- life and end ------------------------------------------------------------

    def close(self) -> None:
        """Close everything; whoever waits gets a verdict. Idempotent."""
        if self._closed or self._forked:
            return
        self._closed = True
        for offer in tuple(self._offers):
            offer.close()
        for mark in tuple(self._open_marks):
            mark.close()
        self._registry.close()
        if self._lookup is not None:
            self._lookup.close()

    def _abandon(self) -> None:
        """In a forked child: close the copies of the sockets and nothing more."""
        self._forked = True
        self._registry.abandon()
        for offer in self._offers:
            offer.abandon()
        for mark in self._open_marks:
            mark.abandon()
        if self._lookup is not None:
            self._lookup.close()

    def _check_owner(self) -> None:
        if self._forked:
            message = (
                "this discovery belongs to the parent process; "
                "make a new event loop after fork()"
            )
            raise ForkedError(message)

    def _check_usable(self) -> None:
        self._check_owner()
        if self._closed:
            message = "this discovery is closed, like the loop it belonged to"
            raise RuntimeError(message)

    def _new_mark(
        self,
        sock: socket.socket,
        marked: MarkedSocket | None,
        verdict: Verdict | None = None,
    ) -> Mark:
        return Mark(
            self._loop,
            sock,
            self._users,
            marked=marked,
            wait=self._wait,
            forget=self._open_marks.discard,
            verdict=verdict,
        )

    def lists(self, conn: socket.socket) -> bool:
        """Tell whether the static list names the client of an accepted socket.

        Such a client speaks CLC whatever happens here, so it has to get an answer.
        """
        if self._peers is None:
            return False
        try:
            peer, own = endpoint(conn.getpeername()), endpoint(conn.getsockname())
        except OSError:
            return False
        if peer is None or own is None:
            return False
        return (peer, own.port) in self._peers


def is_tcp(sock: socket.socket) -> bool:
    """Tell whether a socket is TCP's, of whatever version of IP."""
    return (
        sock.family in INET_FAMILIES
        and sock.type == socket.SOCK_STREAM
        and sock.proto in TCP_PROTOCOLS
    )


def _is_dual_stack(listener: socket.socket) -> bool:
    return (
        listener.family == socket.AF_INET6
        and listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
    )


_alive: weakref.WeakSet[Discovery] = weakref.WeakSet()


def _abandon_all() -> None:
    for discovery in tuple(_alive):
        discovery._abandon()  # noqa: SLF001  # the module's own class


os.register_at_fork(after_in_child=_abandon_all)
