"""The rendezvous: two processes of one host agree that one TCP connection is SMC-R.

Decides, for a connection whose SYN was marked, whether the process that accepted it and
the process that connected it are both willing, of allowed users and alive, so that both
ends reach the same verdict. Knows nothing of beacons, and sends nothing over TCP.

The client listens on an abstract Unix name made of its connection (`connection_id`);
the process that accepted the connection knows the same name from its own socket and
connects to it. Then, over that Unix connection::

    server   OFFER  version (1 byte), connection_id     or   REFUSE reason (1 byte)
    client   GO                                         or   NO reason (1 byte)

GO is the commit point, and no party decides for TCP while the other might still decide
for SMC-R: the server that gives up shuts down its reading end, after which GO cannot be
sent any more, and then reads what was sent before; the client decides by whether its
send succeeded.

Source: unix(7); kernel counterpart: af_unix.c (unix_stream_sendmsg and unix_shutdown
exclude each other by the receiver's lock).
"""

from __future__ import annotations

import errno
import os
import socket
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

from pysmc.discovery.address import connection_id, endpoint, is_local
from pysmc.discovery.rendezvous import (
    GO,
    NO,
    OFFER,
    REFUSE,
    SMC,
    VERSION,
    Refusal,
    Users,
    Verdict,
    answer_of,
    close_stranger,
    failed,
    foreign,
    process_of,
    receive,
    refuse_descriptors,
    refused,
    send,
    tcp,
)
from pysmc.errors import LocalProtocolError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from pysmc.discovery.mark import MarkedSocket
    from pysmc.reasons import Reason

__all__ = ["Mark", "Offer"]

RENDEZVOUS_PREFIX = b"\0pysmc/r/1/"
BACKLOG = 16

UNCLAIMED_WAIT = 0.1
"""Seconds that an offer is held for a socket that nobody has asked about yet."""
SPIN = 0.0003
"""Seconds in which a server looks for the client's name at each turn of the loop."""
RETRY_FIRST = 0.0005
"""Seconds until the next look after that; each further one takes twice as long."""
RETRY_MOST = 0.032
"""Longest time in seconds between two looks."""
SERVER_SHARE = 0.5
"""Part of ``Config.discovery_wait`` after which a server gives up the search."""
OFFERED_SHARE = 4.0
"""The same once it has offered. A client that has gone, or has decided without us, ends
the rendezvous at once; one that is silent but there is busy, with a thousand other
connections for example."""

NOT_LISTENING = frozenset({errno.ECONNREFUSED, errno.EAGAIN})


def _is_alive(sock: socket.socket, identity: bytes) -> bool:
    try:
        return connection_id(sock, client=True) == identity
    except OSError:
        return False


def _stream_socket() -> socket.socket:
    # Python sets close-on-exec on every socket.
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    refuse_descriptors(made)
    return made


class Mark:
    """The client's end: one socket, from before its connect until the verdict.

    `connected` opens the rendezvous, `wait` claims it, `settle_tcp` gives it up. Offers
    that come before it is claimed are held for `UNCLAIMED_WAIT`; after that, or once
    given up, they are answered with NO until ``discovery_wait`` is over.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        users: Users,
        *,
        marked: MarkedSocket | None,
        wait: float,
        forget: Callable[[Mark], None],
        verdict: Verdict | None = None,
    ) -> None:
        """Remember a socket that is about to connect.

        Args:
            loop: The running loop.
            sock: The TCP socket; only a weak reference is kept.
            users: Who may be the server.
            marked: What to put back once it is connected.
            wait: Seconds until the client gives up.
            forget: Called when nothing is open any more.
            verdict: What is known already, for a peer of the static list.
        """
        self.verdict = verdict
        """What was decided, None as long as nothing is."""
        self._loop = loop
        self._sock = weakref.ref(sock)
        self._users = users
        self._marked: MarkedSocket | None = marked
        self._wait_seconds = wait
        self._forget = forget
        self._id = b""
        self._listener: socket.socket | None = None
        self._conn: socket.socket | None = None
        self._offered = False
        self._declining: Refusal | None = None
        self._abandoned = False
        self._claim: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._unclaimed: asyncio.TimerHandle | None = None

    # --- what the driver calls ---------------------------------------------------

    def connected(self) -> None:
        """Take the mark off the socket and open the rendezvous.

        Must follow the connect at once: the server is looking for the name.
        """
        sock = self._sock()
        if self.verdict is not None or self._listener is not None:
            return
        if sock is None:
            self._settle(tcp("MARK_LOST", "local", "The socket was dropped."))
            return
        self._unmark(sock)
        try:
            self._open_rendezvous(sock)
        except OSError as error:
            self._settle(failed("The rendezvous could not be opened", error))

    def _open_rendezvous(self, sock: socket.socket) -> None:
        self._id = connection_id(sock, client=True)
        listener = _stream_socket()
        try:
            listener.bind(RENDEZVOUS_PREFIX + self._id.hex().encode("ascii"))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        call_later = self._loop.call_later
        self._deadline = call_later(self._wait_seconds, self._on_deadline)
        self._unclaimed = call_later(UNCLAIMED_WAIT, self._on_unclaimed)
        self._loop.add_reader(listener.fileno(), self._on_connection)

    async def wait(self) -> Verdict:
        """Claim the rendezvous and wait for the verdict.

        When this is cancelled the connection is settled as TCP on both ends.

        Raises:
            LocalProtocolError: `connected` was not called, or another task waits.
        """
        if self.verdict is not None:
            return self.verdict
        sock = self._sock()
        if self._listener is None or self._claim is not None:
            message = (
                "connected() was not called for this mark"
                if self._claim is None
                else "another task waits for this mark"
            )
            raise LocalProtocolError(message)
        if sock is None or sock.fileno() < 0:
            self._settle(tcp("MARK_LOST", "local", "The socket was closed."))
            return self._decided()
        self._claim = self._loop.create_future()
        self._declining = None
        self._cancel_unclaimed()
        if self._offered:
            self._answer(sock)
            return self._decided()
        # A server of ours never speaks first on TCP, so anything to read there, and
        # also its end, means that no offer will come. It is not looked at.
        fileno = sock.fileno()
        self._loop.add_reader(fileno, self._on_tcp_readable)
        try:
            await self._claim
        finally:
            if not self._abandoned:
                self._loop.remove_reader(fileno)
            detail = "The wait for the confirmation was cancelled."
            self._settle(tcp("MARK_LOST", "local", detail))
        return self._decided()

    def settle_tcp(self, why: Refusal = Refusal.RAW) -> None:
        """Decide for TCP now, and answer NO to an offer that comes later.

        Args:
            why: What the server is told.
        """
        if self.verdict is not None:
            return
        sock = self._sock()
        if sock is not None:
            self._unmark(sock)
        detail = "The program uses the TCP socket itself."
        verdict = tcp("NOT_MARKED", "local", detail)
        if self._listener is None or self._claim is not None:
            self._settle(verdict)
            return
        self.verdict = verdict
        self._declining = why
        self._cancel_unclaimed()
        if self._offered:
            self._decline(why)

    def close(self) -> None:
        """Decide for TCP if nothing is decided, and close everything; idempotent."""
        self._settle(tcp("MARK_LOST", "local", "The loop's discovery was closed."))
        self._release()

    def abandon(self) -> None:
        """In a forked child: close the copies, and leave the parent's loop alone."""
        self._abandoned = True
        for unix in (self._listener, self._conn):
            if unix is not None:
                unix.close()
        self._listener = self._conn = None

    # --- what the loop calls -----------------------------------------------------

    def _on_connection(self) -> None:
        """Somebody who knows our connection's name has connected to it."""
        assert self._listener is not None
        try:
            conn, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._settle(failed("The offer was lost", error))
            self._release()
            return
        conn.settimeout(0)
        uid = self._users.foreign(conn)
        if uid is not None:
            send(conn, NO + bytes([Refusal.FOREIGN]))
            close_stranger(conn)
            self._settle(foreign(uid))
            self._release()
        elif self._conn is not None:
            # The first one has not ended; a server of ours connects only once.
            conn.close()
        else:
            self._conn = conn
            self._loop.add_reader(conn.fileno(), self._on_offer)
            self._on_offer()

    def _on_offer(self) -> None:
        """The party that connected has sent something, or has gone."""
        assert self._conn is not None
        message = receive(self._conn)
        if message is None:
            return
        if message[:1] == REFUSE:
            self._settle(refused(message[1] if len(message) > 1 else 0))
            self._release()
        elif message == OFFER + bytes([VERSION]) + self._id and not self._offered:
            self._offered = True
            if self._declining is not None:
                self._decline(self._declining)
            elif self._claim is not None:
                self._answer(self._sock())
        elif self._offered:
            self._settle(tcp("MARK_LOST", "peer", "It withdrew its offer."))
            self._release()
        elif message:
            self._decline(Refusal.UNFIT)
        else:
            self._drop_conn()

    def _on_tcp_readable(self) -> None:
        # What the server said on the rendezvous before it spoke on TCP explains more,
        # and both may have become readable in the same turn of the loop.
        if self._conn is not None:
            self._on_offer()
        elif self._listener is not None:
            self._on_connection()
        if self.verdict is not None:
            return
        detail = "It spoke first, or ended the connection, without a confirmation."
        self._settle(tcp("MARK_LOST", "peer", detail))

    def _on_unclaimed(self) -> None:
        self._unclaimed = None
        self._declining = Refusal.RAW
        if self._offered:
            self._decline(Refusal.RAW)

    def _on_deadline(self) -> None:
        self._deadline = None
        detail = f"No confirmation came within {self._wait_seconds:g} s."
        self._settle(tcp("MARK_LOST", "peer", detail))
        self._release()

    # --- decisions ---------------------------------------------------------------

    def _answer(self, sock: socket.socket | None) -> None:
        """Answer the offer that is held: the commit point."""
        assert self._conn is not None
        # The offer is for a connection that was alive when it was made. If ours is
        # alive now, it is that one: no two live ones have the same identity.
        if sock is None or not _is_alive(sock, self._id):
            send(self._conn, NO + bytes([Refusal.UNFIT]))
            verdict = tcp("MARK_LOST", "local", "The connection has gone.")
        elif send(self._conn, GO):
            verdict = SMC
        else:
            verdict = tcp("MARK_LOST", "peer", "It withdrew its offer.")
        self._settle(verdict)

    def _decline(self, why: Refusal) -> None:
        """Answer NO, which decides for TCP on both ends."""
        assert self._conn is not None
        send(self._conn, NO + bytes([why]))
        name = "NOT_MARKED" if why is Refusal.RAW else "MARK_LOST"
        detail = (
            "The program uses the TCP socket itself."
            if why is Refusal.RAW
            else "The offer was for another connection."
        )
        self._settle(tcp(name, "local", detail))
        self._release()

    def _settle(self, verdict: Verdict) -> None:
        """Record the first verdict, wake who waits, and close what is open."""
        if self.verdict is not None:
            return
        self.verdict = verdict
        if self._claim is not None and not self._claim.done():
            self._claim.set_result(None)
        self._release()

    def _decided(self) -> Verdict:
        assert self.verdict is not None
        return self.verdict

    # --- what is held ------------------------------------------------------------

    def _unmark(self, sock: socket.socket) -> None:
        if self._marked is not None:
            self._marked.clear(sock)
            self._marked = None

    def _cancel_unclaimed(self) -> None:
        if self._unclaimed is not None:
            self._unclaimed.cancel()
            self._unclaimed = None

    def _drop_conn(self) -> None:
        if self._conn is not None:
            self._loop.remove_reader(self._conn.fileno())
            self._conn.close()
            self._conn = None

    def _release(self) -> None:
        self._cancel_unclaimed()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._drop_conn()
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        self._forget(self)


class Offer:
    """The server's end: one accepted connection that was marked."""

    # Whoever is found and does not answer costs as little as can be.
    __slots__ = (
        "_abandoned",
        "_begin",
        "_conn",
        "_deadline",
        "_delay",
        "_done",
        "_id",
        "_instead",
        "_loop",
        "_offered",
        "_process",
        "_retry",
        "_unix",
        "_users",
        "_verdict",
        "_wait_seconds",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        conn: socket.socket,
        users: Users,
        *,
        wait: float,
        instead: Reason | None = None,
    ) -> None:
        """Prepare to look for the client of a connection.

        Args:
            loop: The running loop.
            conn: The accepted TCP socket; it stays the caller's.
            users: Who may be the client.
            wait: The client's ``discovery_wait``, as far as we know it, in seconds.
            instead: The limit because of which the client gets a refusal, no offer.
        """
        self._loop = loop
        self._conn = conn
        self._users = users
        self._wait_seconds = wait
        self._instead = instead
        self._process: int | None = None
        self._id = b""
        self._unix: socket.socket | None = None
        self._offered = False
        self._abandoned = False
        self._delay = RETRY_FIRST
        self._begin = 0.0
        self._retry: asyncio.Handle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._verdict: Verdict | None = None
        self._done: asyncio.Future[None] = loop.create_future()

    async def verdict(self) -> Verdict:
        """Find the client, offer, and wait for its answer.

        After a cancellation the verdict is unknown: the TCP connection must be closed.
        """
        fileno = self._conn.fileno()
        try:
            self._id = connection_id(self._conn, client=False)
            self._unix = _stream_socket()
        except OSError as error:
            return failed("The client cannot be looked for", error)
        self._set_deadline(SERVER_SHARE)
        # The client sends nothing before its verdict; if something can be read, or the
        # connection has ended, that verdict has been reached.
        self._loop.add_reader(fileno, self._give_up)
        try:
            self._look()
            await self._done
        finally:
            if not self._abandoned:
                self._loop.remove_reader(fileno)
            self._release()
        assert self._verdict is not None
        return replace(self._verdict, process=self._process)

    def close(self) -> None:
        """Give up now; the verdict is still the client's if it has answered."""
        self._give_up()

    def abandon(self) -> None:
        """In a forked child: close the copy, and leave the parent's loop alone."""
        # The coroutine may be collected here; it must not reach the shared epoll.
        self._abandoned = True
        if self._unix is not None:
            self._unix.close()
            self._unix = None

    def _look(self) -> None:
        """Connect to the client's name, now or a little later."""
        assert self._unix is not None
        self._retry = None
        name = RENDEZVOUS_PREFIX + self._id.hex().encode("ascii")
        code = self._unix.connect_ex(name)
        if code == 0:
            self._offer(self._unix)
            return
        if code not in NOT_LISTENING:
            detail = f"The client's name cannot be reached: {os.strerror(code)}."
            self._settle(tcp("MARK_LOST", "local", detail))
            return
        now = self._loop.time()
        if self._begin == 0.0:
            self._begin = now
            if not self._peer_is_local():
                # Somebody else's use of a DSCP that is meant for experiments.
                detail = "Its address is not of this host."
                self._settle(tcp("PEER_NO_SMC", "peer", detail))
                return
        # We mostly see the connection a moment before the client's loop does, and a
        # timer of a loop cannot be shorter than a millisecond.
        if now - self._begin < SPIN:
            self._retry = self._loop.call_soon(self._look)
            return
        self._retry = self._loop.call_later(self._delay, self._look)
        self._delay = min(self._delay * 2, RETRY_MOST)

    def _peer_is_local(self) -> bool:
        try:
            peer = endpoint(self._conn.getpeername())
        except OSError:
            return False
        return peer is not None and is_local(peer)

    def _offer(self, unix: socket.socket) -> None:
        uid = self._users.foreign(unix)
        if uid is not None:
            send(unix, REFUSE + bytes([Refusal.FOREIGN]))
            self._settle(foreign(uid))
            return
        if self._instead is not None:
            send(unix, REFUSE + bytes([Refusal.LIMIT]))
            self._settle(Verdict(smc=False, reason=self._instead))
            return
        self._process = process_of(unix)
        try:
            # The name is bound only while its owner is connected. If our connection
            # is alive now, it is the owner's: no two have the same identity.
            self._conn.getpeername()
        except OSError as error:
            send(unix, REFUSE + bytes([Refusal.UNFIT]))
            detail = f"The connection has gone: {error}."
            self._settle(tcp("MARK_LOST", "local", detail))
            return
        if not send(unix, OFFER + bytes([VERSION]) + self._id):
            # A client that refuses our user says so as soon as we connect, and leaves.
            said = receive(unix) or b""
            gone = tcp("MARK_LOST", "peer", "It closed its rendezvous.")
            self._settle(answer_of(said) if said[:1] == NO else gone)
            return
        self._offered = True
        self._set_deadline(OFFERED_SHARE)
        self._loop.add_reader(unix.fileno(), self._on_answer)

    def _on_answer(self) -> None:
        assert self._unix is not None
        message = receive(self._unix)
        if message is not None:
            self._settle(answer_of(message))

    def _set_deadline(self, share: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        wait = self._wait_seconds * share
        self._deadline = self._loop.call_later(wait, self._give_up)

    def _give_up(self) -> None:
        """Make a later answer impossible, then go by the one that has come, if any."""
        if self._done.done():
            return
        if self._unix is None or not self._offered:
            detail = "Its rendezvous was not found."
            self._settle(tcp("MARK_LOST", "peer", detail))
            return
        self._unix.shutdown(socket.SHUT_RD)
        self._settle(answer_of(receive(self._unix) or b""))

    def _settle(self, verdict: Verdict) -> None:
        if not self._done.done():
            self._verdict = verdict
            self._done.set_result(None)
        self._release()

    def _release(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._unix is not None:
            self._loop.remove_reader(self._unix.fileno())
            self._unix.close()
            self._unix = None
