"""The rendezvous: two processes of one host agree that one TCP connection is SMC-R.

Decides, for a connection whose SYN was marked, whether the process that accepted it and
the process that connected it are both willing, of allowed users and alive, so that both
ends reach the same verdict. Here is the client's end; the server's is `offer`. Knows
nothing of beacons, and sends nothing over TCP.

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

import weakref
from typing import TYPE_CHECKING

from pysmc.discovery.address import connection_id
from pysmc.discovery.order import Way
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
    close_stranger,
    failed,
    foreign,
    receive,
    refused,
    rendezvous_name,
    send,
    stream_socket,
    tcp,
)
from pysmc.errors import LocalProtocolError

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable

    from pysmc.discovery.mark import MarkedSocket
    from pysmc.reasons import Reason

__all__ = ["Mark"]

BACKLOG = 16

UNCLAIMED_WAIT = 0.1
"""Seconds that an offer is held for a socket that nobody has asked about yet."""


def _is_alive(sock: socket.socket, identity: bytes) -> bool:
    try:
        return connection_id(sock, client=True) == identity
    except OSError:
        return False


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
        self.way = Way.LOCAL if verdict is None else Way.STATIC
        """Which way of discovery it belongs to."""
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

    @property
    def goes_on(self) -> Mark | None:
        """What holds something from now on, and has to be closed; None: nothing."""
        return None if self._listener is None else self

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
        listener = stream_socket()
        try:
            listener.bind(rendezvous_name(self._id))
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

    def settle_tcp(
        self, why: Refusal = Refusal.RAW, because: Reason | None = None
    ) -> None:
        """Decide for TCP now, and answer NO to an offer that comes later.

        Args:
            why: What the server is told.
            because: Nothing here: the rendezvous has no room for it.
        """
        del because
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
