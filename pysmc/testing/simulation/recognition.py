"""Recognition in a world: how two simulated processes learn that both speak SMC.

Stands where `pysmc.discovery.Discovery` stands in the driver, and decides the same by
the same rules: a mark on the SYN, read from the accepted socket, then a rendezvous of
the two processes with one commit point. Marks, verdicts, reasons and static lists are
the real ones. Only the Unix sockets of the rendezvous are replaced, by messages which
are steps of the world, so that every order of the two ends comes up.

Whoever has no fabric, or no discovery "local", neither marks nor listens for marks: it
is to the others as a program without pysmc.

Reference: `pysmc.discovery.local`, which this follows; RFC 7609 section 3.1.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pysmc.discovery.address import endpoint
from pysmc.discovery.findings import NOT_LISTED, NOT_MARKED, OWN_TOS, PEER_NO_SMC
from pysmc.discovery.local import UNCLAIMED_WAIT
from pysmc.discovery.mark import read_mark, save_syn, set_mark
from pysmc.discovery.offer import OFFERED_SHARE, SERVER_SHARE
from pysmc.discovery.order import Way
from pysmc.discovery.rendezvous import SMC, Refusal, Verdict, failed, refused, tcp
from pysmc.discovery.static import StaticPeers
from pysmc.reasons import Reason, reason
from pysmc.testing.simulation.tcp import Channel

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from pysmc.config import Config
    from pysmc.discovery.mark import MarkedSocket
    from pysmc.testing.simulation.sockets import Address, SimSocket
    from pysmc.testing.simulation.tcp import TcpNetwork

__all__ = ["SimDiscovery", "SimLookup"]


class SimLookup:
    """Tells whether a port has a listener that is known to take part.

    Args:
        network: Whose listeners.
    """

    def __init__(self, network: TcpNetwork) -> None:
        self._network = network

    def has_port(self, port: int) -> bool:
        """Whether any listener of this port is announced."""
        return self._network.is_announced(port)

    def close(self) -> None:
        """Hold nothing, so end nothing."""


class SimAnnouncement:
    """A listener's announcement; it ends with `close`."""

    is_holder = True

    def __init__(self, listener: SimSocket) -> None:
        self._listener = weakref.ref(listener.kernel)
        listener.kernel.is_announced = True

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        listener = self._listener()
        return listener is None or not listener.is_announced

    def close(self) -> None:
        """End it; idempotent."""
        listener = self._listener()
        if listener is not None:
            listener.is_announced = False


class Meeting:
    """What two processes say to each other about one connection.

    Args:
        network: Carries it.
        name: Of the connection.
    """

    def __init__(self, network: TcpNetwork, name: str) -> None:
        self._channel = Channel(network, f"meeting of {name}:")
        self.mark: SimMark | None = None
        """The client's end, once it has opened it."""
        self.offer: Offer | None = None
        """The server's end, once it looks for the client."""
        self.answer: Verdict | None = None
        """What the client has said; it counts from here on."""
        self.is_withdrawn = False
        """Whether the server listens no more; no answer can be given then."""

    def say(self, text: str, loop: asyncio.AbstractEventLoop, call: Any) -> None:
        """Have a party be called in its own loop, some steps from now."""

        def arrive() -> None:
            if not loop.is_closed():
                loop.call_soon(call)

        self._channel.put(text, arrive)

    def look(self) -> None:
        """Offer, if the server looks and the client can be found."""
        offer, mark = self.offer, self.mark
        if self.is_withdrawn:
            return
        if offer is not None and mark is not None and not offer.is_made:
            offer.is_made = True
            if offer.find(mark):
                self.say("offer", mark.loop, mark.on_offer)

    def withdraw(self) -> None:
        """Make a later answer impossible."""
        if not self.is_withdrawn:
            self.is_withdrawn = True
            if self.mark is not None and self.answer is None:
                self.say("withdrawn", self.mark.loop, self.mark.on_withdrawn)

    def refuse(self) -> None:
        """Tell the client that the server has no room for it."""
        assert self.mark is not None
        self.is_withdrawn = True
        self.say("REFUSE", self.mark.loop, self.mark.on_refused)

    def reply(self, verdict: Verdict) -> bool:
        """Answer an offer; False when it was withdrawn."""
        if self.is_withdrawn:
            return False
        self.answer = verdict
        if self.offer is not None:
            self.say("GO" if verdict.smc else "NO", self.offer.loop, self.offer.hear)
        return True


class SimMark:
    """The client's end: one socket, from before its connect until the verdict.

    Args:
        discovery: Made it.
        sock: The TCP socket; only a weak reference is kept.
        marked: What to put back once it is connected.
        verdict: What is known already.
    """

    def __init__(
        self,
        discovery: SimDiscovery,
        sock: SimSocket,
        marked: MarkedSocket | None,
        verdict: Verdict | None = None,
    ) -> None:
        self.verdict = verdict
        """What was decided, None as long as nothing is."""
        self.way = Way.LOCAL if verdict is None else Way.STATIC
        """Which way of discovery it belongs to."""
        self.loop = discovery.loop
        self.process = discovery.process
        """Number of its process."""
        self._discovery = discovery
        self._sock = weakref.ref(sock)
        self._marked = marked
        self._meeting: Meeting | None = None
        self._offered = False
        self._declining: Refusal | None = None
        self._claim: asyncio.Future[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []

    def connected(self) -> None:
        """Take the mark off and let the server find us."""
        sock = self._sock()
        if self.verdict is not None or self._meeting is not None or sock is None:
            return
        self._unmark(sock)
        try:
            self._meeting = meeting = self._discovery.meeting(sock)
        except OSError as error:
            self._settle(failed("The rendezvous could not be opened", error))
            return
        self._discovery.marks[self] = None
        meeting.mark = self
        wait = self._discovery.wait_seconds
        later = self.loop.call_later
        self._timers = [
            later(wait, self._on_deadline),
            later(UNCLAIMED_WAIT, self._on_unclaimed),
        ]
        meeting.look()

    async def wait(self) -> Verdict:
        """Claim the meeting and wait for the verdict."""
        sock = self._sock()
        if self.verdict is None and (sock is None or sock.fileno() < 0):
            self._settle(tcp("MARK_LOST", "local", "The socket was closed."))
        if self.verdict is not None or sock is None:
            return self._decided()
        self._claim = self.loop.create_future()
        self._declining = None
        self._timers.pop().cancel()
        if self._offered:
            self._answer()
        else:
            fileno = sock.fileno()
            self.loop.add_reader(fileno, self._on_tcp_readable)
            try:
                await self._claim
            finally:
                self.loop.remove_reader(fileno)
                detail = "The wait for the confirmation was cancelled."
                self._settle(tcp("MARK_LOST", "local", detail))
        return self._decided()

    def _decided(self) -> Verdict:
        assert self.verdict is not None
        return self.verdict

    def settle_tcp(self, why: Refusal = Refusal.RAW) -> None:
        """Decide for TCP, and say so to an offer that comes later."""
        if self.verdict is not None:
            return
        sock = self._sock()
        if sock is not None:
            self._unmark(sock)
        detail = "The program uses the TCP socket itself."
        verdict = tcp("NOT_MARKED", "local", detail)
        if self._meeting is None or self._claim is not None:
            self._settle(verdict)
            return
        self.verdict = verdict
        self._declining = why
        if self._offered:
            self._decline(why)

    def close(self) -> None:
        """Decide for TCP if nothing is decided; idempotent."""
        self._settle(tcp("MARK_LOST", "local", "The loop's discovery was closed."))
        self._release()

    def on_offer(self) -> None:
        """The server has found us."""
        assert self._meeting is not None
        if self._meeting.is_withdrawn or self._offered:
            return
        self._offered = True
        if self not in self._discovery.marks:
            self._meeting.reply(tcp("MARK_LOST", "peer", "It closed its rendezvous."))
        elif self._declining is not None:
            self._decline(self._declining)
        elif self._claim is not None:
            self._answer()

    def on_refused(self) -> None:
        """The server has found us, and has no room."""
        self._settle(refused(Refusal.LIMIT))
        self._release()

    def on_withdrawn(self) -> None:
        """The server has given up."""
        if self._offered:
            self._settle(tcp("MARK_LOST", "peer", "It withdrew its offer."))
            self._release()

    def _on_tcp_readable(self) -> None:
        detail = "It spoke first, or ended the connection, without a confirmation."
        self._settle(tcp("MARK_LOST", "peer", detail))

    def _on_unclaimed(self) -> None:
        self._declining = Refusal.RAW
        if self._offered:
            self._decline(Refusal.RAW)

    def _on_deadline(self) -> None:
        detail = f"No confirmation came within {self._discovery.wait_seconds:g} s."
        self._settle(tcp("MARK_LOST", "peer", detail))
        self._release()

    def _answer(self) -> None:
        """The commit point."""
        assert self._meeting is not None
        sock = self._sock()
        try:
            if sock is not None:
                sock.getpeername()
        except OSError:
            sock = None
        if sock is None:
            self._meeting.reply(refused(Refusal.UNFIT))
            verdict = tcp("MARK_LOST", "local", "The connection has gone.")
        elif self._meeting.reply(SMC):
            verdict = SMC
        else:
            verdict = tcp("MARK_LOST", "peer", "It withdrew its offer.")
        self._settle(verdict)

    def _decline(self, why: Refusal) -> None:
        assert self._meeting is not None
        self._meeting.reply(refused(why))
        detail = "The program uses the TCP socket itself."
        self._settle(tcp("NOT_MARKED", "local", detail))
        self._release()

    def _settle(self, verdict: Verdict) -> None:
        if self.verdict is not None:
            return
        self.verdict = verdict
        if self._claim is not None and not self._claim.done():
            self._claim.set_result(None)
        self._release()

    def _unmark(self, sock: SimSocket) -> None:
        if self._marked is not None:
            self._marked.clear(sock)  # type: ignore[arg-type]
            self._marked = None

    def _release(self) -> None:
        while self._timers:
            self._timers.pop().cancel()
        self._discovery.marks.pop(self, None)
        meeting = self._meeting
        if meeting is not None and meeting.answer is None and not self._offered:
            # Whoever offers from now on finds nobody.
            if meeting.offer is not None and meeting.offer.is_made:
                return  # on its way: it is answered when it comes
            meeting.mark = None


class Offer:
    """The server's end: one accepted connection that was marked.

    Args:
        discovery: Made it.
        conn: The accepted TCP socket; it stays the caller's.
        meeting: Of the connection.
        instead: The limit because of which the client gets a refusal, no offer.
    """

    def __init__(
        self,
        discovery: SimDiscovery,
        conn: SimSocket,
        meeting: Meeting,
        instead: Reason | None,
    ) -> None:
        self.loop = discovery.loop
        self.is_made = False
        """Whether it is on its way to the client."""
        self._conn = conn
        self._meeting = meeting
        self._instead = instead
        self._process: int | None = None
        self._wait = discovery.wait_seconds
        self._verdict: Verdict | None = None
        self._done: asyncio.Future[None] = self.loop.create_future()

    async def verdict(self) -> Verdict:
        """Offer, and wait for the client's answer."""
        fileno, later = self._conn.fileno(), self.loop.call_later
        timers = (
            later(self._wait * SERVER_SHARE, self._give_up_search),
            later(self._wait * OFFERED_SHARE, self.give_up),
        )
        self.loop.add_reader(fileno, self.give_up)
        self._meeting.offer = self
        try:
            self._meeting.look()
            await self._done
        finally:
            for timer in timers:
                timer.cancel()
            self.loop.remove_reader(fileno)
            self._meeting.withdraw()
        assert self._verdict is not None
        return replace(self._verdict, process=self._process)

    def find(self, mark: SimMark) -> bool:
        """Find the client: True when it gets an offer."""
        if self._instead is not None:
            self._meeting.refuse()
            self._verdict = Verdict(smc=False, reason=self._instead)
            self._done.set_result(None)
            return False
        self._process = mark.process
        return True

    def hear(self) -> None:
        """The client has answered."""
        if not self._done.done():
            self._verdict = self._meeting.answer
            self._done.set_result(None)

    def _give_up_search(self) -> None:
        if not self.is_made:
            self.give_up()

    def give_up(self) -> None:
        """Go by the answer that was given before this, if any."""
        if self._done.done():
            return
        self._meeting.withdraw()
        said = "It did not answer the offer."
        if not self.is_made:
            said = "Its rendezvous was not found."
        self._verdict = self._meeting.answer or tcp("MARK_LOST", "peer", said)
        self._done.set_result(None)


class SimDiscovery:
    """Everything that one simulated loop knows of discovery.

    It has the methods of `pysmc.discovery.Discovery`, and they mean the same.

    Args:
        loop: The loop that will run.
        config: `discovery`, `fabrics`, `peers` and `discovery_wait` count.
        network: Whose sockets there are.
        process: Number of the process.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        network: TcpNetwork,
        process: int,
    ) -> None:
        self.loop = loop
        self.process = process
        self.wait_seconds = config.discovery_wait
        self.marks: dict[SimMark, None] = {}
        """Meetings that are open."""
        self._network = network
        self._offers: dict[Offer, None] = {}
        self._peers: StaticPeers | None = None
        self._off: Reason | None = None
        self._is_local = "local" in config.discovery and bool(config.fabrics)
        self._has_announced = False
        if "static" in config.discovery:
            self._peers = StaticPeers(config.peers)
        if not config.fabrics or not config.discovery:
            self._off = reason("DISABLED", "local")

    def lookup(self) -> SimLookup | None:
        """Give what knows alone that a destination is plain, where that is enough."""
        is_enough = self._is_local and self._peers is None
        return SimLookup(self._network) if is_enough else None

    def meeting(self, sock: SimSocket) -> Meeting:
        """Find the meeting of a connection, or begin it.

        Raises:
            OSError: ENOTCONN, the connection has ended. The network may have forgotten
                it before its program is told.
        """
        sock.getpeername()
        connection = self._network.connection_of(sock)
        assert connection is not None, "only connected sockets are asked about"
        if connection.meeting is None:
            name = connection.there.name.removeprefix("tcp ")
            connection.meeting = Meeting(self._network, name)
        assert isinstance(connection.meeting, Meeting)
        return connection.meeting

    serves_option = False
    """There is no TCP option in the simulated network."""

    def opt_in(self, listener: SimSocket, *, is_able: bool = True) -> None:
        """Nothing: there is no TCP option here."""

    def announce(self, listener: SimSocket) -> SimAnnouncement | None:
        """Make a listener known."""
        if not self._is_local:
            return None
        save_syn(listener)  # type: ignore[arg-type]
        self._has_announced = True
        return SimAnnouncement(listener)

    def inspect(self, conn: SimSocket, *, is_given: bool = False) -> Way | Reason:
        """Look at an accepted connection: a way when `confirm` is worth awaiting."""
        del is_given  # there is no option here, by which another's listener may differ
        if self.lists(conn):
            return Way.STATIC
        if self._off is not None:
            return self._off
        if not self._is_local:
            return NOT_LISTED
        marked = read_mark(conn) if self._has_announced else None  # type: ignore[arg-type]
        if marked is None:
            return NOT_MARKED
        return Way.LOCAL if marked else PEER_NO_SMC

    async def confirm(
        self, conn: SimSocket, *, instead: Reason | None = None
    ) -> Verdict:
        """Agree with the client of an accepted connection."""
        if self.lists(conn):
            return SMC
        try:
            meeting = self.meeting(conn)
        except OSError as error:
            return failed("The client cannot be looked for", error)
        offer = Offer(self, conn, meeting, instead)
        self._offers[offer] = None
        try:
            return await offer.verdict()
        finally:
            self._offers.pop(offer, None)

    def prepare(
        self,
        sock: SimSocket,
        address: Address,
        why_not: Callable[[], Reason | None] = lambda: None,
    ) -> SimMark | Reason:
        """Look for a listener before connecting."""
        if self._peers is not None:
            target = endpoint(address)
            if target is not None and (target, target.port) in self._peers:
                return SimMark(self, sock, None, SMC)
        if self._off is not None:
            return self._off
        if not self._is_local:
            return NOT_LISTED
        host, port = address[:2]
        if not self._network.is_announced(port, host):
            return PEER_NO_SMC
        if (why := why_not()) is not None:
            return why
        marked = set_mark(sock, ipv4=True)  # type: ignore[arg-type]
        return OWN_TOS if marked is None else SimMark(self, sock, marked)

    def connected(self, mark: SimMark) -> None:
        """Take the mark off and open the meeting, right after the connect."""
        mark.connected()

    async def wait_confirmed(self, mark: SimMark) -> Verdict:
        """Wait until both ends agree."""
        return await mark.wait()

    def settle_tcp(
        self,
        mark: SimMark,
        why: Refusal = Refusal.RAW,
        because: Reason | None = None,
    ) -> None:
        """Decide for TCP."""
        del because
        mark.settle_tcp(why)

    def lists(self, conn: SimSocket) -> bool:
        """Tell whether the static list names the client of an accepted socket."""
        if self._peers is None:
            return False
        try:
            peer, own = endpoint(conn.getpeername()), endpoint(conn.getsockname())
        except OSError:
            return False
        assert peer is not None
        assert own is not None
        return (peer, own.port) in self._peers

    def close(self) -> None:
        """End every meeting. Idempotent."""
        for offer in list(self._offers):
            offer.give_up()
        for mark in list(self.marks):
            mark.close()
